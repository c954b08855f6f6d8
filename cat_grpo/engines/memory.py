"""How a GPU is shared by the learner and the engines that stand beside it."""

from cat_grpo.errors import BadInput

GIB = 1024**3
HALF = 2
"""Bytes of a weight that is served."""
TRAINED = 16
"""Bytes of a weight that is trained: itself in float32, its gradient, AdamW's two moments."""
SPARE = 0.15
"""Of the GPU, for what a backward pass keeps and for the libraries' own."""
LEAST_CACHE = GIB
"""For keys and values: with less, an engine has no batch."""


def engine_share(num_weights: int, gpu_bytes: int, num_engines: int, taken: int) -> float:
    """The share of the GPU for each of `num_engines` engines of this many weights.

    `taken` are the bytes of the learner and of other models there. BadInput where an engine would have no
    room for its weights and a cache.
    """
    free = gpu_bytes * (1 - SPARE) - taken
    each = free / num_engines
    needed = num_weights * HALF + LEAST_CACHE
    if each < needed:
        raise BadInput(
            f"model.engine: a vLLM engine of {num_weights / 1e9:.1f}B weights needs {needed / GIB:.0f} GiB,"
            f" and the GPU has {max(each, 0) / GIB:.0f} for it: learner.lora_rank, learner.num_ranks, servers"
        )
    return round(each / gpu_bytes, 3)
