"""The LM head's part of an update, forward and backward: in tiles, against all logits at once."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cat_grpo.learner.grpo import token_logprobs
from cat_grpo.learner.lm_head import head_loss


def tiled(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return head_loss(hidden, weight, token_ids, lambda logprobs, at: -logprobs.sum())[0]


def whole(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return -token_logprobs(hidden @ weight.to(hidden.dtype).T, token_ids).sum()


def seconds(head: Callable[..., Tensor], hidden: Tensor, weight: Tensor, token_ids: Tensor) -> float:
    hidden.grad = weight.grad = None
    synchronize()
    began = time.perf_counter()
    head(hidden, weight, token_ids).backward()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 128)
    parser.add_argument("--vocab", type=int, default=151936 if on_gpu else 4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device) / arguments.hidden**0.5
    weight.requires_grad_()
    token_ids = torch.randint(arguments.vocab, (arguments.tokens,), device=device)

    sides = {"tiles": tiled, "whole": whole}
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks, gradients = {}, {}
    for _ in range(arguments.steps + 1):
        for name, head in sides.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds(head, hidden, weight, token_ids))
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
            gradients[name] = hidden.grad.double(), weight.grad.double()
    gaps = [
        ((ours - plain).norm() / plain.norm()).item()
        for ours, plain in zip(gradients["tiles"], gradients["whole"], strict=True)
    ]
    report = {
        "hidden": arguments.hidden,
        "vocab": arguments.vocab,
        "tokens": arguments.tokens,
        "gradient_gap": max(gaps),
        "milliseconds": {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()},
        "peak_gib": peaks,
    }
    print(json.dumps(report, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
