"""How fast the inspector answers on a run of 50 steps x 10,000 groups, and whether its memory stays flat.

    python tests/benchmarks/inspector.py --out tests/benchmarks/inspector.json

One step is written as training writes it, with scripted texts; the other 49 are hard links to it. The pages
are asked of a server in a process of its own; every measured request is for another step.
"""

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from cat_grpo.records import Completion, Group, Problem, Reference, RewardedGroup, RolloutReward
from cat_grpo.report.summaries import summarise_update
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import load_config

NUM_STEPS, NUM_GROUPS, GROUP_SIZE = 50, 10_000, 8
SHARD_SIZE = 1_000
NUM_TOKENS = 200
WORDS = ("add", "carry", "the", "sum", "of", "both", "numbers", "therefore", "equal", "to", "a", "half")
PAGES = {
    "step": "",
    "step, page 150": "?page=150",
    "step, filtered": "?only=differs-majority",
    "step, two filters, sorted": "?only=differs-majority&only=not-reviewed&sort=tokens&order=desc",
    "step, searched": "?q=quokka",
    "step, searched for what is everywhere": "?q=the+sum",
    "step, sorted": "?sort=reward&order=desc",
    "group, first": "/group/0",
    "group, last": "/group/9999",
    "group, in a searched and sorted view": "/group/5000?q=the+sum&sort=std",
}


def scripted(i: int, draw: random.Random) -> RewardedGroup:
    """A group whose texts are of ordinary length; every hundredth prompt has a rare word."""
    rare = " quokka" if i % 100 == 0 else ""
    problem = Problem(f"p{i}", ({"role": "user", "content": f"{i}: {prose(draw, 60)}{rare}"},), "verifiable")
    tokens = tuple(draw.randrange(50_000) for _ in range(NUM_TOKENS))
    logprobs = tuple(-draw.random() for _ in range(NUM_TOKENS))
    answers = [str(draw.randrange(4)) for _ in range(GROUP_SIZE)]
    rollouts = tuple(
        Completion(f"{prose(draw, 120)} $\\frac{{{a}}}{{2}}$ \\boxed{{{a}}}", tokens, logprobs, "stop")
        for a in answers
    )
    majority = max(answers, key=answers.count)
    right = str(draw.randrange(4))
    text = f"{prose(draw, 60)} \\boxed{{{right}}}"
    reference = Reference(
        text,
        answer=right,
        written=text,
        prompt=prose(draw, 900),
        num_tokens=80,
        finish_reason="stop",
        problem_id=problem.id,
        estimator="synthesis",
        majority=majority,
        num_votes=answers.count(majority),
    )
    rewards = tuple(
        RolloutReward(float(answer == right), agrees=answer == right, answer=answer) for answer in answers
    )
    return RewardedGroup(Group(problem, tokens[:60], rollouts), reference, None, rewards)


def prose(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def make_run(path: Path) -> None:
    overrides = [f"train.shard_size={SHARD_SIZE}", f"train.problems_per_step={NUM_GROUPS}"]
    config = load_config("lab-verifiable", overrides=[*overrides, f"rollout.group_size={GROUP_SIZE}"])
    run, draw = RunDir.open(path, config, []), random.Random(0)
    summaries, ones = [], [[1.0] * GROUP_SIZE] * SHARD_SIZE
    for shard in range(NUM_GROUPS // SHARD_SIZE):
        first = shard * SHARD_SIZE
        rewarded = [scripted(i, draw) for i in range(first, first + SHARD_SIZE)]
        run.write_groups(0, shard, [group.group for group in rewarded])
        run.write_references(0, shard, [group.reference for group in rewarded])
        run.write_rewards(0, shard, rewarded)
        rows = summarise_update(rewarded, [], ones, ones)
        summaries += [replace(row, group=first + row.group) for row in rows]
    run.write_summaries(0, summaries)
    for step in range(1, NUM_STEPS):
        run.step_folder(step).mkdir()
        for file in run.step_folder(0).iterdir():
            os.link(file, run.step_folder(step) / file.name)
    for step in range(NUM_STEPS):
        run.add_metrics({"step": float(step), "reward/mean": 0.25, "reward/std": 0.4})


def serve(runs: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from cat_grpo.cli import main; main()"
    server = subprocess.Popen([sys.executable, "-c", code, "inspect", str(runs), "--port", str(port)])
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(address)
            return server, address
        except httpx.TransportError:
            time.sleep(0.1)
    server.terminate()
    raise TimeoutError("the inspector did not answer")


def measure(ask: Callable[[str], object], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by page: median and worst, of as many different steps."""
    figures = {}
    for name, page in PAGES.items():
        times = []
        for step in range(repeats):
            started = time.perf_counter()
            ask(f"/run/big/step/{step}{page}")
            times.append(1000 * (time.perf_counter() - started))
        figures[name] = {"median_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1)}
        print(f"{name:40} {figures[name]['median_ms']:8.1f} ms   worst {figures[name]['worst_ms']:.1f}")
    return figures


def resident_mb(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        make_run(Path(folder) / "big")
        print(f"{NUM_STEPS} steps x {NUM_GROUPS} groups made in {time.monotonic() - started:.0f} s")
        server, address = serve(Path(folder))
        with httpx.Client(base_url=address, timeout=60) as client:
            ask = lambda path: client.get(path).raise_for_status()  # noqa: E731
            try:
                pages = measure(ask, options.repeats)
                memory = []
                for step in range(NUM_STEPS):
                    for page in PAGES.values():
                        ask(f"/run/big/step/{step}{page}")
                    memory.append(round(resident_mb(server)))
            finally:
                server.terminate()
                server.wait()
    rss = {"after_10_steps_mb": memory[9], "after_50_steps_mb": memory[-1], "most_mb": max(memory)}
    print(rss)
    if options.out:
        machine = {"python": platform.python_version(), "cores": os.cpu_count()}
        figures = {"pages": pages, "memory": rss, "machine": machine}
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
