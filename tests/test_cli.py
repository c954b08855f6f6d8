"""The command line: what it prints, and that bad input is one line with exit code 2 before any run starts.

Commands that run flows on good input are tested with the flows.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from cat_grpo import cli
from cat_grpo.config import Config
from cat_grpo.errors import Stopped
from cat_grpo.method.prompts import set_folder
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import load_config

ROOT = Path(__file__).parent.parent
SUM = {"id": "a", "kind": "verifiable", "prompt": "1 + 1?"}


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cat_grpo(capfd, monkeypatch, tmp_path):
    """Runs a command line in this process, in an empty folder where nothing may start."""

    def started(flow):
        flow.close()
        raise AssertionError("the flow was started")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["cat-grpo", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capfd.readouterr())

    monkeypatch.setattr(asyncio, "run", started)
    monkeypatch.chdir(tmp_path)
    return run


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(said: Said, *parts: object) -> None:
    """One line on stderr that holds the parts, nothing on stdout, exit code 2."""
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("cat-grpo: ")
    assert said.err.count("\n") == 1, said.err
    assert all(str(part) in said.err for part in parts), said.err


def training(tmp_path: Path, *arguments: object) -> list[object]:
    """`train` on one good problem, into a run directory that is not there yet."""
    data = write(tmp_path / "good.jsonl", SUM)
    return ["train", "--preset", "lab-verifiable", "--run", tmp_path / "run", f"data.path={data}", *arguments]


# The lab's problems


def test_verifiable_problems_have_their_columns_and_right_sums(cat_grpo):
    said = cat_grpo("lab", "problems", "--kind", "verifiable", "--n", 5, "--seed", 7)
    assert (said.code, said.err) == (0, "")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 5
    for row in rows:
        assert row.keys() == {"id", "prompt", "kind", "answer"}
        assert row["kind"] == "verifiable"
        operands = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        sums = [a + b for a, b in zip(operands[::2], operands[1::2], strict=True)]
        assert len(sums) == 4
        assert row["answer"] == ", ".join(map(str, sums))


def test_open_problems_have_two_points_a_complaint(cat_grpo):
    said = cat_grpo("lab", "problems", "--kind", "open", "--n", 4)
    for row in map(json.loads, said.out.splitlines()):
        assert row.keys() == {"id", "prompt", "kind", "points"}
        complaints = row["prompt"].removeprefix("Write a care note: ").strip(".").split(", ")
        assert len(row["points"]) == len(set(row["points"])) == 2 * len(complaints) == 6


def test_a_seed_is_a_set_of_problems(cat_grpo):
    first, again, other = (
        cat_grpo("lab", "problems", "--kind", "open", "--n", 9, "--seed", seed).out for seed in (7, 7, 8)
    )
    assert first == again != other


def test_problems_go_to_a_file(cat_grpo, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    printed = cat_grpo("lab", "problems", "--kind", "verifiable", "--n", 3).out
    said = cat_grpo("lab", "problems", "--kind", "verifiable", "--n", 3, "--out", out)
    assert (said.code, said.out) == (0, f"Wrote 3 problems to {out}\n")
    assert out.read_text() == printed


# A dry run


def test_a_dry_run_prints_the_config_and_the_plan_and_writes_nothing(cat_grpo, tmp_path):
    data = write(tmp_path / "two.jsonl", SUM, SUM | {"id": "b"})
    said = cat_grpo(*training(tmp_path, f"data.path={data}", "train.steps=7", "--dry-run"))
    assert (said.code, said.err) == (0, "")
    tree, end = json.JSONDecoder().raw_decode(said.out)
    expected = load_config("lab-verifiable", overrides=[f"data.path={data}", "train.steps=7"])
    assert Config.model_validate(tree) == expected
    plan = said.out[end:]
    assert "2 problems, 7 steps of 32: 112.0 epochs, 256 rollouts per update." in " ".join(plan.split())
    for stage in ("rollouts", "references", "rubrics", "verdicts"):
        assert stage in plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl", "two.jsonl"]


@pytest.mark.parametrize(
    ("argument", "part"),
    [("data.path=none.jsonl", "none.jsonl: no such file"), ("train.stepz=3", "config: train.stepz: ")],
)
def test_a_dry_run_of_bad_input_is_refused(cat_grpo, tmp_path, argument, part):
    refused(cat_grpo(*training(tmp_path, argument, "--dry-run")), part)


# Bad input


def bad_training(tmp_path: Path) -> dict[str, tuple[list[object], list[object]]]:
    """What is wrong -> the arguments, and what the line must name."""
    bad_row = write(tmp_path / "bad.jsonl", SUM, SUM | {"id": "b", "prompt": 3})
    bad_gold = write(tmp_path / "gold.jsonl", SUM | {"answer": "2"}, SUM)
    bad_toml = write(tmp_path / "bad.toml", "[train", "steps = 3")
    model, prompts = tmp_path / "model", tmp_path / "prompts"
    model.mkdir()
    shutil.copytree(set_folder("lab"), prompts)
    (prompts / "solve_verifiable.txt").write_text("{{ question")
    return {
        "a missing file": (["data.path=none.jsonl"], ["none.jsonl: no such file"]),
        "no file": (["data.path="], ["data.path: expected a file"]),
        "a bad row": ([f"data.path={bad_row}"], [f"{bad_row}:2: prompt: "]),
        "an empty file": ([f"data.path={write(tmp_path / 'empty.jsonl')}"], ["empty.jsonl: no rows"]),
        "an unknown override": (["train.stepz=3"], ["config: train.stepz: "]),
        "no override": (["steps"], ["override 'steps'"]),
        "a wrong type": (["train.steps=few"], ["config: train.steps: "]),
        "a value out of range": (["rollout.group_size=1"], ["config: rollout.group_size: "]),
        "an unknown preset": (["--preset", "maths"], ["unknown preset 'maths'", "math500"]),
        "a missing config": (["--config", "none.toml"], ["none.toml: No such file"]),
        "a bad config": (["--config", bad_toml], [f"{bad_toml}: ", "line 1"]),
        "an unknown prompt set": (["prompts=nowhere"], ["prompts: 'nowhere': there is no such set"]),
        "a prompt set that lacks a template": (["prompts=model"], ["model has no solve_verifiable.txt"]),
        "a template that is no template": ([f"prompts={prompts}"], ["solve_verifiable.txt:1: "]),
        "an unknown estimator": (
            ["reference.estimator=best"],
            ["reference.estimator: 'best': expected one of"],
        ),
        "an estimator of no module": (["reference.estimator=mine:f"], ["there is no module 'mine'"]),
        "an unknown reward": (
            ["reward.verifiable={form = 1.0}"],
            ["reward.verifiable: 'form': expected one of"],
        ),
        "a majority of notes": (
            ["data.path=lab:open", "reference.estimator=majority"],
            ["reference.estimator: 'majority': is for verifiable problems, and the data has open ones"],
        ),
        "a missing validation": (["train.validation=none.jsonl"], ["none.jsonl: no such file"]),
        "a bad validation": ([f"train.validation={bad_gold}"], [f"{bad_gold}:2: answer: "]),
        "a missing model": (["model.path=./none"], ["model './none': no such folder"]),
        "no model in a folder": ([f"model.path={model}"], [f"model '{model}': "]),
        "a missing judge": (["model.path=lab", "judge.path=./none"], ["model './none': "]),
    }


WRONG = [
    *("a missing file", "no file", "a bad row", "an empty file", "an unknown override", "no override"),
    *("a wrong type", "a value out of range", "an unknown preset", "a missing config", "a bad config"),
    *("an unknown prompt set", "a prompt set that lacks a template", "a template that is no template"),
    *("an unknown estimator", "an estimator of no module", "an unknown reward", "a majority of notes"),
    *("a missing validation", "a bad validation", "a missing model"),
    *("no model in a folder", "a missing judge"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_training_on_bad_input_is_one_line_and_leaves_no_run(cat_grpo, tmp_path, wrong):
    arguments, parts = bad_training(tmp_path)[wrong]
    before = sorted(tmp_path.rglob("*"))
    refused(cat_grpo(*training(tmp_path, *arguments)), *parts)
    assert sorted({*before, tmp_path / "good.jsonl"}) == sorted(tmp_path.rglob("*"))


def test_every_kind_of_bad_input_is_tried(tmp_path):
    assert sorted(bad_training(tmp_path)) == sorted(WRONG)


def test_a_run_of_other_settings_is_left_as_it_is(cat_grpo, tmp_path):
    arguments = training(tmp_path)
    RunDir.open(tmp_path / "run", load_config("lab-verifiable", overrides=[arguments[-1]]), [])
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(
        cat_grpo(*arguments, "learner.learning_rate=0.1"),
        tmp_path / "run" / "config.json",
        ": learner.learning_rate: ",
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_directory_that_is_a_file_is_refused(cat_grpo, tmp_path):
    write(tmp_path / "run", "a file")
    refused(cat_grpo(*training(tmp_path)), f"{tmp_path / 'run'}: is not a directory")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--problems": "none.jsonl"}, ["none.jsonl: no such file"]),
        ({"--problems": "gold.jsonl"}, ["gold.jsonl:1: answer: "]),
        ({"--model": "./none"}, ["model './none': "]),
        ({"--anchor": "./none"}, ["model './none': "]),
        ({"--preset": "maths"}, ["unknown preset 'maths'"]),
    ],
)
def test_evaluation_of_bad_input_is_one_line(cat_grpo, tmp_path, changes, parts):
    write(tmp_path / "gold.jsonl", SUM)
    write(tmp_path / "good.jsonl", SUM | {"answer": "2"})
    options = {"--model": "lab", "--problems": "good.jsonl", "--json": ""} | changes
    refused(cat_grpo("evaluate", *words(options)), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--problems": "none.jsonl"}, ["none.jsonl: no such file"]),
        ({"--problems": "bad.jsonl"}, ["bad.jsonl:2: not JSON"]),
        ({"--model": "./none"}, ["model './none': "]),
        ({"--out": "out.txt"}, ["out.txt: expected a name that ends in .jsonl or .parquet"]),
    ],
)
def test_synthesis_of_bad_input_is_one_line(cat_grpo, tmp_path, changes, parts):
    write(tmp_path / "good.jsonl", SUM)
    write(tmp_path / "bad.jsonl", SUM, "{")
    options = {"--model": "lab", "--problems": "good.jsonl", "--out": "out.jsonl"} | changes
    refused(cat_grpo("synthesize", *words(options)), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]


def words(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (name, value) if word]


def test_good_input_starts_the_flow(cat_grpo, tmp_path, lab_model):
    with pytest.raises(AssertionError, match="the flow was started"):
        cat_grpo(*training(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["lab", "problems", "--kind", "maths", "--n", "3"], ["lab", "problems", "--n", "0"], ["fly"]],
)
def test_a_bad_option_is_exit_code_2(cat_grpo, arguments):
    said = cat_grpo(*arguments)
    assert said.code == 2
    assert "Error" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("bug", [TypeError, ValueError, KeyError, RuntimeError, ArithmeticError, OSError])
def test_a_bug_of_ours_keeps_its_traceback(cat_grpo, monkeypatch, tmp_path, bug):
    def broken(*_, **__):
        raise bug("a bug")

    monkeypatch.setattr("cat_grpo.settings.load_config", broken)
    with pytest.raises(bug, match="a bug"):
        cat_grpo(*training(tmp_path))


def test_a_run_that_stopped_by_itself_is_exit_code_1(cat_grpo, monkeypatch, tmp_path):
    def diverged(*_, **__):
        raise Stopped("step 3: the loss is nan\nand a second line")

    monkeypatch.setattr("cat_grpo.settings.load_config", diverged)
    said = cat_grpo(*training(tmp_path))
    assert (said.code, said.out) == (1, "")
    assert said.err == "cat-grpo: stopped: step 3: the loss is nan\n"


# As a program of its own


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from cat_grpo.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_program_says_one_line_and_no_traceback(tmp_path):
    done = program(*training(tmp_path, f"data.path={tmp_path / 'none.jsonl'}"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cat-grpo: {tmp_path / 'none.jsonl'}: no such file or folder\n"
    assert not (tmp_path / "run").exists()


def test_the_program_prints_rows_that_a_pipe_can_read():
    done = program("lab", "problems", "--kind", "verifiable", "--n", 5, "--seed", 7)
    assert (done.returncode, done.stderr) == (0, "")
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 5


# Export


@pytest.fixture
def run_with_checkpoint(tmp_path, lab_model) -> Path:
    """A run directory whose best checkpoint is the lab's base model, with an optimizer beside it."""
    run = tmp_path / "run"
    shutil.copytree(lab_model, run / "checkpoints" / "000010")
    (run / "config.json").write_text(Config().model_dump_json())
    (run / "checkpoints" / "000010" / "optimizer.pt").write_bytes(b"large")
    (run / "checkpoints" / "best").symlink_to("000010")
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_a_plain_model_folder(cat_grpo, tmp_path, run_with_checkpoint, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported"
    said = cat_grpo("export", "--run", run_with_checkpoint, "--out", out, "--dtype", dtype)
    assert (said.code, said.out) == (0, f"Wrote {out}\n")
    assert not (out / "optimizer.pt").exists()
    best = run_with_checkpoint / "checkpoints" / "best"
    there, exported = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (best, out))
    assert exported.dtype == getattr(torch, dtype)
    for name, weights in there.state_dict().items():
        assert torch.equal(weights.to(exported.dtype), exported.state_dict()[name]), name
    text = r"The sums are \boxed{1, 2}."
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(best)(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "run"]


def test_an_export_of_nothing_is_one_line(cat_grpo, tmp_path):
    said = cat_grpo("export", "--run", tmp_path / "run", "--out", tmp_path / "exported")
    refused(said, tmp_path / "run" / "config.json", "No such file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(Config().model_dump_json())
    said = cat_grpo("export", "--run", tmp_path / "run", "--out", tmp_path / "exported")
    refused(said, tmp_path / "run" / "checkpoints" / "best", "no such checkpoint")


def test_an_export_overwrites_nothing(cat_grpo, tmp_path, run_with_checkpoint):
    out = write(tmp_path / "exported", "mine")
    refused(cat_grpo("export", "--run", run_with_checkpoint, "--out", out), f"{out}: is there already")
    assert out.read_text() == "mine\n"


def test_a_gate_that_nobody_could_open_is_refused(cat_grpo, tmp_path):
    said = cat_grpo(
        "train", "--preset", "lab-verifiable", "--run", tmp_path / "run", "train.review_gate=true"
    )
    refused(said, "train.review_gate: it asks in the dashboard")


def test_a_port_that_is_taken_is_refused(cat_grpo):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        refused(cat_grpo("serve", "--port", other.getsockname()[1]), "is not available")


def test_a_part_of_the_dashboard_that_dies_is_exit_code_1(cat_grpo, monkeypatch):
    def die(*_: object) -> None:
        raise Stopped("the inspector ended with status 2: see inspector.log")

    monkeypatch.setattr("flows.serve.serve", die)
    said = cat_grpo("serve")
    assert (said.code, said.out) == (1, "")
    assert said.err == "cat-grpo: stopped: the inspector ended with status 2: see inspector.log\n"
