"""One GRPO update, ours against TRL's, on the same tokens: `make bench`, or this file with --help.

Before anything is timed, both make the same gradient. Then they take turns, a step of TRL and a step of ours,
in one process; TRL with the fastest of its settings. Memory is that of either alone, in a process of its own.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel
from workloads import (
    GROUP_SIZE,
    SHAPES,
    WORKLOADS,
    Workload,
    measured_flops,
    random_model,
    random_rows,
    useful_flops,
)

from cat_grpo.config import LearnerConfig
from cat_grpo.learner.batches import Batch, TrainingRow
from cat_grpo.learner.learner import Learner


class Ours:
    """Our learner on a batch."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[TrainingRow], pack_tokens: int) -> None:
        config = LearnerConfig(learning_rate=1e-6, micro_batch_tokens=pack_tokens)
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        self.learner = Learner(model, config, temperature=1.0, compute_dtype=dtype)
        self.batch = Batch(tuple(rows))

    def step(self) -> dict[str, float]:
        return self.learner.update(self.batch)


def trl_steps(
    model: PreTrainedModel,
    rows: Sequence[TrainingRow],
    micro_batch: int,
    checkpointing: bool,
    num_steps: int,
    between: "Ours | None" = None,
) -> tuple[list[float], list[float]]:
    """Seconds of each of TRL's steps, and of one of ours after each."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from cat_grpo.shipped import shipped

    theirs: list[float] = []
    ours: list[float] = []
    sampling: list[float] = []
    """Seconds that a step of TRL spends on rollouts and rewards, which are not the update's."""

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            synchronize(model)
            sampling.append(time.perf_counter() - began)
            return result

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize(model)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize(model)
            theirs.append(time.perf_counter() - self.began - sampling.pop())
            if between is not None:
                ours.append(seconds(between))

    def rollouts(prompts: list, trainer: object) -> dict[str, list]:
        del prompts, trainer
        return {
            "prompt_ids": [list(row.prompt_token_ids) for row in rows],
            "completion_ids": [list(row.token_ids) for row in rows],
            "logprobs": [list(row.logprobs) for row in rows],
        }

    def rewards(completions: list, **_: object) -> list[float]:
        # Advantages of advantages are the same, once TRL's 1e-4 beside the standard deviation is nothing.
        return [1e6 * row.advantage for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        is_cuda = model.device.type == "cuda"
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(rows) // micro_batch,
            steps_per_generation=len(rows) // micro_batch,
            num_generations=GROUP_SIZE,
            max_completion_length=max(len(row.token_ids) for row in rows),
            max_steps=num_steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            gradient_checkpointing=checkpointing,
            bf16=is_cuda,
            use_cpu=not is_cuda,
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model,
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["?"] * len(rows)}),
            processing_class=AutoTokenizer.from_pretrained(shipped("data", "lab", "model")),
            rollout_func=rollouts,
            callbacks=[Clock()],
        ).train()
    model.gradient_checkpointing_disable()
    return theirs, ours


def synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(ours: Ours) -> float:
    synchronize(ours.learner.model)
    began = time.perf_counter()
    ours.step()
    synchronize(ours.learner.model)
    return time.perf_counter() - began


@contextmanager
def gradients(model: PreTrainedModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Those of the model at every optimizer step made meanwhile, after clipping."""
    seen: list[dict[str, torch.Tensor]] = []

    def keep(*_: object) -> None:
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    yield seen
    handle.remove()


def check_parity(shape: str, device: str) -> float:
    """The largest relative difference of a parameter's gradient, on short rows; ValueError if it is large."""
    rows = random_rows(Workload(12, 40, 0.5), 2 * GROUP_SIZE, SHAPES[shape]["vocab_size"])
    with gradients(theirs := random_model(shape, device)) as trl:
        trl_steps(theirs, rows, GROUP_SIZE, checkpointing=False, num_steps=1)
    with gradients(model := random_model(shape, device)) as ours:
        Ours(model, rows, 512).step()
    gaps = [
        ((ours[0][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        for name, gradient in trl[0].items()
    ]
    limit = 1e-5 if device == "cpu" else 1e-2
    if max(gaps) > limit:
        raise ValueError(f"the gradients differ by {max(gaps):.2g}, more than {limit:g}: nothing to compare")
    return max(gaps)


def best_setting(shape: str, device: str, rows: Sequence[TrainingRow]) -> tuple[int, bool]:
    """TRL's fastest micro-batch, and whether with checkpointing."""
    times = {}
    for micro_batch in (m for m in (4, 8, 16, 32, 64) if len(rows) % m == 0):
        for checkpointing in (False, True):
            try:
                steps, _ = trl_steps(random_model(shape, device), rows, micro_batch, checkpointing, 2)
            except torch.OutOfMemoryError:
                continue
            times[micro_batch, checkpointing] = steps[-1]
    return min(times, key=times.__getitem__)


def peak_bytes(
    side: str, shape: str, device: str, workload: str, rollouts: int, micro_batch: int, ckpt: bool
) -> int:
    """Of two steps of one side alone: what torch had allocated on a GPU, else the resident memory."""
    import_module("trl.trainer.grpo_trainer")  # resident memory: the libraries of both sides are the same
    rows = random_rows(WORKLOADS[workload], rollouts, SHAPES[shape]["vocab_size"])
    model = random_model(shape, device)
    if side == "trl":
        trl_steps(model, rows, micro_batch, ckpt, 2)
    else:
        ours = Ours(model, rows, PACK_TOKENS[device])
        ours.step(), ours.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process that another has started begins with that one's peak.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak.split()[1]) * 1024


PACK_TOKENS = {"cpu": 8192, "cuda": 16384}
"""Of our micro-batches. On a CPU larger ones are no faster, and take memory."""


def compare(name: str, shape: str, device: str, num_rollouts: int, num_steps: int, flops: float) -> dict:
    """The figures of one workload."""
    rows = random_rows(WORKLOADS[name], num_rollouts, SHAPES[shape]["vocab_size"])
    micro_batch, checkpointing = best_setting(shape, device, rows)
    peer = random_model(shape, device)
    ours = Ours(random_model(shape, device), rows, PACK_TOKENS[device])
    theirs, mine = trl_steps(peer, rows, micro_batch, checkpointing, num_steps + 1, between=ours)
    theirs, mine = theirs[1:], mine[1:]  # the first is a warm-up
    tokens = sum(len(row.token_ids) for row in rows)
    peaks = {
        side: peak_alone(side, shape, device, name, num_rollouts, micro_batch, checkpointing)
        for side in ("trl", "ours")
    }
    return {
        "workload": name,
        "completion_tokens": tokens,
        "mean_over_max": tokens / len(rows) / max(len(row.token_ids) for row in rows),
        "trl_setting": f"micro-batch {micro_batch}, checkpointing {'on' if checkpointing else 'off'}",
        "trl_s": statistics.median(theirs),
        "ours_s": statistics.median(mine),
        "trl_spread_s": [min(theirs), max(theirs)],
        "ours_spread_s": [min(mine), max(mine)],
        "speedup": statistics.median(t / m for t, m in zip(theirs, mine, strict=True)),
        "ours_tokens_per_s": tokens / statistics.median(mine),
        "memory_ratio": peaks["ours"] / peaks["trl"],
        "ours_peak_gib": peaks["ours"] / 2**30,
        "trl_peak_gib": peaks["trl"] / 2**30,
        "ours_share_of_ceiling": useful_flops(shape, rows) / statistics.median(mine) / flops,
    }


def peak_alone(*arguments: object) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps(arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def whole_groups(rollouts: int) -> int:
    """At least so many rollouts, in groups of GROUP_SIZE: a part of a group is no group."""
    return GROUP_SIZE * max(1, math.ceil(rollouts / GROUP_SIZE))


def growth(shape: str, device: str, num_rollouts: int) -> float | None:
    """The slope of log update time over log tokens, from an eighth of the groups to all of them.

    None of a single group, which has no slope.
    """
    points = []
    num_groups = num_rollouts // GROUP_SIZE
    for n in sorted({max(1, num_groups // part) for part in (8, 4, 2, 1)}):
        rows = random_rows(WORKLOADS["R"], n * GROUP_SIZE, SHAPES[shape]["vocab_size"])
        ours = Ours(random_model(shape, device), rows, PACK_TOKENS[device])
        median = statistics.median(seconds(ours) for _ in range(4))
        points.append((math.log(sum(len(row.token_ids) for row in rows)), math.log(median)))
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


INTRO = """# The update, beside TRL's

`make bench` times one GRPO update of ours against TRL's `GRPOTrainer`, on identical token ids, after
showing that both make the same gradient; what TRL spends on rollouts and rewards is taken off its step.
Both take turns in one process; TRL has the fastest of its settings (micro-batches of 4 to 64, gradient
checkpointing on and off). Seconds are medians, tokens are those of completions, peak memory is ours over
TRL's, each alone in a process of its own. On a CPU the model has 2 layers, a width of 128 and a vocabulary
of 4,096: TRL computes the head at all positions there, and a large vocabulary would flatter us. On a GPU it
is one of `--shape 0.5B` or `4B`.

Groups of 8. U: prompts of 256 tokens, completions of 1,024. R: the same, lengths lognormal. L: 1,024 and
512.

"""
COLUMNS = (
    ("workload", "{workload}"),
    ("mean / max length", "{mean_over_max:.2f}"),
    ("TRL at its best", "{trl_setting}"),
    ("TRL, s", "{trl_s:.2f}"),
    ("ours, s", "{ours_s:.2f}"),
    ("speed-up", "{speedup:.2f}x"),
    ("tokens/s", "{ours_tokens_per_s:,.0f}"),
    ("peak memory", "{memory_ratio:.2f}x"),
    ("of the ceiling", "{ours_share_of_ceiling:.0%}"),
)


def table(report: dict) -> str:
    """The report as a markdown table."""
    rows = [[name for name, _ in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [[form.format(**row) for _, form in COLUMNS] for row in report["workloads"]]
    slope = "none" if report["growth"] is None else f"{report['growth']:.2f}"
    lines = [
        "{date}, {machine}, {shape}, {rollouts} rollouts, {versions}.".format(**report),
        "Largest relative difference of a gradient: {gradient_gap:.1e}. "
        "Slope of log time over log tokens: {slope}.".format(**report, slope=slope),
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"


def versions() -> str:
    names = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl")]
    return ", ".join([*names, f"Python {platform.python_version()}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rollouts", type=int, default=64, help="made up to whole groups of 8")
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, help="a .json; the table goes beside it as .md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_bytes(*json.loads(arguments.peak)))
        return
    device, num_rollouts = "cuda" if torch.cuda.is_available() else "cpu", whole_groups(arguments.rollouts)
    flops = measured_flops(device)
    report = {
        "date": date.today().isoformat(),
        "machine": machine(device),
        "shape": arguments.shape,
        "rollouts": num_rollouts,
        "versions": versions(),
        "ceiling_flops": flops,
        "gradient_gap": check_parity(arguments.shape, device),
        "growth": growth(arguments.shape, device, num_rollouts),
        "workloads": [
            compare(name, arguments.shape, device, num_rollouts, arguments.steps, flops)
            for name in arguments.workloads
        ],
    }
    print(table(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        arguments.out.with_suffix(".md").write_text(INTRO + table(report))


if __name__ == "__main__":
    main()
