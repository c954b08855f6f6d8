"""The steps that the benchmarks time: lengths, tokens and models, and the operations that they need."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cat_grpo.learner.batches import TrainingRow
from cat_grpo.learner.grpo import group_advantages

GROUP_SIZE = 8
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 4096},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936},
}
HEADS = {"tiny": (4, 2, 32), "0.5B": (14, 2, 64), "4B": (32, 8, 128)}
"""Query heads, key-value heads, their dimension."""


@dataclass(frozen=True)
class Workload:
    """Lengths of a step's rollouts. `spread` 0: all completions are of the full length."""

    prompt: int
    completion: int
    spread: float = 0.0


WORKLOADS = {"U": Workload(256, 1024), "R": Workload(256, 1024, 0.5), "L": Workload(1024, 512)}


def random_rows(workload: Workload, num_rollouts: int, vocab_size: int) -> list[TrainingRow]:
    """Groups of rollouts of random tokens and random rewards; with a `spread` their lengths are lognormal,
    capped, and on average 0.45 of the longest."""
    rng = random.Random(0)
    rewards = torch.rand(num_rollouts // GROUP_SIZE, GROUP_SIZE, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards).flatten().tolist()
    lengths = [workload.completion] * num_rollouts
    if workload.spread:
        drawn = [rng.lognormvariate(0.0, workload.spread) for _ in lengths]
        lengths = [round(min(1.0, 0.45 * x / statistics.mean(drawn)) * workload.completion) for x in drawn]
        lengths[0] = workload.completion
    rows = []
    for i, (length, advantage) in enumerate(zip(lengths, advantages, strict=True)):
        if i % GROUP_SIZE == 0:
            prompt = tuple(rng.choices(range(3, vocab_size), k=workload.prompt))
        completion = tuple(rng.choices(range(3, vocab_size), k=length))
        weight = 1 / length / num_rollouts
        rows.append(TrainingRow(prompt, completion, (0.0,) * length, advantage, weight))
    return rows


def random_model(shape: str, device: str) -> PreTrainedModel:
    """Random weights in float32, as both sides train them."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim = HEADS[shape]
    config = Qwen3Config(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config)


def measured_flops(device: str) -> float:
    """Operations a second in one large product of matrices: the ceiling of this machine, now."""
    dtype, n = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def useful_flops(shape: str, rows: Sequence[TrainingRow]) -> float:
    """Of one update: 6 a weight and token, each prompt once, nothing padded, nothing done twice."""
    size, (heads, kv_heads, head_dim) = SHAPES[shape], HEADS[shape]
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * size["intermediate_size"]
    prompts = {row.prompt_token_ids for row in rows}
    completions = sum(len(row.token_ids) for row in rows)
    tokens = sum(map(len, prompts)) + completions
    pairs = sum(len(prompt) ** 2 / 2 for prompt in prompts)
    pairs += sum(len(row.token_ids) * (len(row.prompt_token_ids) + len(row.token_ids) / 2) for row in rows)
    return (
        6 * layers * per_layer * tokens
        + 3 * 4 * layers * heads * head_dim * pairs
        + 6 * size["vocab_size"] * hidden * completions
    )
