"""Shares a GPU between the learner and the engines beside it."""

from cat_grpo.errors import BadInput

GIB = 1024**3
HALF = 2
"""Bytes per weight that is served."""
TRAINED = 16
"""Bytes per weight that is trained: the weight in float32, its gradient and AdamW's two moments."""
SPARE = 0.15
"""The share of the GPU left for what a backward pass keeps and for the libraries themselves."""
LEAST_CACHE = GIB
"""Bytes that an engine needs for keys and values. With less it cannot batch requests."""


def engine_share(num_weights: int, gpu_bytes: int, num_engines: int, taken: int) -> float:
    """The share of the GPU for each of `num_engines` engines of `num_weights` weights.

    `taken` is the bytes of the learner and other models there. BadInput when an engine would have no room for
    its weights and a cache.
    """
    free = gpu_bytes * (1 - SPARE) - taken
    each = free / num_engines
    needed = num_weights * HALF + LEAST_CACHE
    if each < needed:
        raise BadInput(
            f"model.engine: a vLLM engine of {num_weights / 1e9:.1f}B weights needs {needed / GIB:.0f} GiB,"
            f" and the GPU has {max(each, 0) / GIB:.0f} for it. Set learner.lora_rank or learner.num_ranks,"
            " or use servers"
        )
    return round(each / gpu_bytes, 3)
