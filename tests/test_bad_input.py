"""Bad input is one line on stderr and exit code 2, with nothing begun; a bug of ours is a traceback and 1."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cat_grpo import cli
from cat_grpo.method.prompts import set_folder
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import load_config

SUM = {"id": "a", "kind": "verifiable", "prompt": "1 + 1?"}
NOTE = {"id": "a", "kind": "open", "prompt": "Be kind."}

Arguments = list[str]
Kind = Callable[[Path], tuple[Arguments, str]]
"""What is typed in a folder, and what the line must say."""


def rows(folder: Path, *lines: object, name: str = "bad.jsonl") -> str:
    """A data file, as a setting; a row is JSON unless it is text or bytes."""
    texts = [
        line if isinstance(line, str) else json.dumps(line) for line in lines if not isinstance(line, bytes)
    ]
    raw = b"".join(line for line in lines if isinstance(line, bytes))
    (folder / name).write_bytes("".join(f"{text}\n" for text in texts).encode() + raw)
    return f"data.path={folder / name}"


def train(folder: Path, *settings: str, preset: str = "lab-verifiable") -> Arguments:
    good = rows(folder, SUM, name="good.jsonl")
    return ["train", "--preset", preset, "--run", str(folder / "run"), good, *settings]


def said_by(role: str) -> dict:
    return {**SUM, "prompt": [{"role": role, "content": "x"}]}


def data(says: str, *lines: object, name: str = "bad.jsonl") -> Kind:
    return lambda folder: (train(folder, rows(folder, *lines, name=name)), says)


def setting(says: str, *settings: str) -> Kind:
    return lambda folder: (train(folder, *settings), says)


def open_problem(says: str, *settings: str) -> Kind:
    return lambda folder: (train(folder, rows(folder, NOTE), *settings), says)


def own_prompts(change: Callable[[Path], object], says: str) -> Kind:
    def kind(folder: Path) -> tuple[Arguments, str]:
        shutil.copytree(set_folder("lab"), folder / "prompts")
        change(folder / "prompts")
        return train(folder, f"prompts={folder / 'prompts'}"), says

    return kind


def existing_run(folder: Path) -> tuple[Arguments, str]:
    arguments = train(folder)
    config = load_config("lab-verifiable", overrides=[arguments[-1], "train.seed=5"])
    RunDir.open(folder / "other", config, [])
    arguments[arguments.index("--run") + 1] = str(folder / "other")
    return arguments, "other/config.json: train.seed: the run was started with 5; take another"


def run_is_a_file(folder: Path) -> tuple[Arguments, str]:
    (folder / "file").write_text("")
    arguments = train(folder)
    arguments[arguments.index("--run") + 1] = str(folder / "file")
    return arguments, "file: is not a directory"


def config_file(text: str | None, says: str) -> Kind:
    def kind(folder: Path) -> tuple[Arguments, str]:
        if text is not None:
            (folder / "my.toml").write_text(text)
        return [*train(folder), "--config", str(folder / "my.toml")], says

    return kind


def no_tokenizer(folder: Path) -> tuple[Arguments, str]:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return train(folder, f"model.path={folder / 'model'}"), "model "


def validation_without_answers(folder: Path) -> tuple[Arguments, str]:
    rows(folder, SUM, name="held_out.jsonl")
    return train(folder, f"train.validation={folder / 'held_out.jsonl'}"), "held_out.jsonl:1: answer: "


def taken_port(folder: Path) -> tuple[Arguments, str]:
    listening = socket.create_server(("127.0.0.1", 0))
    OPENED.append(listening)
    port = listening.getsockname()[1]
    return ["serve", "--port", str(port)], f"port {port} of 127.0.0.1 is not available"


def a_run_to_inspect(folder: Path) -> tuple[Arguments, str]:
    (folder / "config.json").write_text("{}")
    return ["inspect", str(folder)], "this is a run itself"


def an_export_over(folder: Path) -> tuple[Arguments, str]:
    (folder / "run" / "checkpoints" / "best").mkdir(parents=True)
    (folder / "run" / "config.json").write_text("{}")
    (folder / "out").mkdir()
    return ["export", "--run", str(folder / "run"), "--out", str(folder / "out")], "out: is there already"


OPENED: list[socket.socket] = []
SERVER = 'model.server.urls=["http://127.0.0.1:9/v1"]'
KINDS: dict[str, Kind] = {
    "no such file": setting("none.jsonl: no such file or folder", "data.path=none.jsonl"),
    "no data": setting("data.path: expected a file, a folder or a hub data set id", "data.path="),
    "an unknown lab": setting("data.path: expected lab:verifiable or lab:open", "data.path=lab:other"),
    "an unknown extension": data("bad.xml: unknown extension", SUM, name="bad.xml"),
    "no rows": data("bad.jsonl: no rows"),
    "no JSON": data("bad.jsonl:2: not JSON", SUM, "{"),
    "a row that is no object": data("bad.jsonl:1: expected an object, got [1]", [1]),
    "a file that is no array": data("bad.json: expected an array of objects", SUM, name="bad.json"),
    "not UTF-8": data("bad.jsonl:1: not UTF-8", b"\xff\xfe"),
    "a csv row too short": data("bad.csv:2: expected 3 fields, got 1", "id,kind,prompt", "a", name="bad.csv"),
    "no parquet": data("bad.parquet: not parquet", b"PAR1", name="bad.parquet"),
    "no prompt": data("bad.jsonl:1: prompt: expected text or chat messages, got nothing", {"kind": "open"}),
    "an empty prompt": data("bad.jsonl:1: prompt: empty", {**SUM, "prompt": " "}),
    "an unknown kind": data("bad.jsonl:1: kind: expected verifiable or open", {**SUM, "kind": "code"}),
    "an id that is a list": data("bad.jsonl:1: id: expected text or a whole number", {**SUM, "id": [1]}),
    "an id twice": data("bad.jsonl:2: id: 'a' again, first at", SUM, SUM),
    "an unknown role": data("message 1: role: expected one of", said_by("me")),
    "a chat that ends with an answer": data("the last message must be the user's", said_by("assistant")),
    "an unknown preset": lambda folder: (
        ["train", "--run", str(folder / "run"), "--preset", "none"],
        "unknown preset 'none': the presets are healthbench, lab-open",
    ),
    "no config file": config_file(None, "my.toml: No such file or directory"),
    "a config that is no TOML": config_file("steps =", "my.toml: Invalid value"),
    "a config with an unknown key": config_file("[train]\nstepz = 3", "config: train.stepz: "),
    "an unknown key": setting("config: train.stepz: ", "train.stepz=3"),
    "a number that is text": setting("config: train.steps: ", "train.steps=many"),
    "a number out of bounds": setting("config: rollout.group_size: ", "rollout.group_size=1"),
    "a number that is infinite": setting("config: learner.learning_rate: ", "learner.learning_rate=inf"),
    "an override without a value": setting("override 'train.steps': expected section", "train.steps"),
    "k1 in the loss": setting(
        "k1 has no gradient", "learner.kl_in=loss", "learner.kl_coef=0.1", "learner.kl_estimator=k1"
    ),
    "soft verdicts that are written": setting(
        "a written verdict has no probability", "reward.verdict=xml", "reward.soft_verdicts=true"
    ),
    "adapters on ranks": setting(
        "adapters are trained on 1 rank", "learner.lora_rank=8", "learner.num_ranks=2"
    ),
    "servers without addresses": setting("engine openai needs at least one", "model.engine=openai"),
    "a key itself": setting("config: model.server.api_key: ", "model.server.api_key=sk-secret"),
    "a policy behind a chat server": setting(
        "model.server.api: the policy needs its token ids",
        SERVER,
        "model.engine=openai",
        "model.server.api=chat",
    ),
    "whole weights for servers": setting("learner.lora_rank: servers take", SERVER, "model.engine=openai"),
    "an unknown estimator": setting(
        "reference.estimator: 'best': expected one of synthesis, majority, or module:function",
        "reference.estimator=best",
    ),
    "an estimator in no module": setting(
        "reference.estimator: 'no_such:best': there is no module 'no_such'",
        "reference.estimator=no_such:best",
    ),
    "an estimator that its module lacks": setting("'json:best': ", "reference.estimator=json:best"),
    "the majority of open problems": open_problem(
        "reference.estimator: 'majority': is for verifiable problems", "reference.estimator=majority"
    ),
    "an unknown reward": setting(
        "reward.verifiable: 'style': expected one of agreement, self_rubric", "reward.verifiable={style=1.0}"
    ),
    "a reward for others": open_problem(
        "reward.open: 'agreement': is for verifiable problems", "reward.open={agreement=1.0}"
    ),
    "no reward": setting("config: reward.verifiable: ", "reward.verifiable={}"),
    "a weight that is no number": setting(
        "config: reward.verifiable.agreement: ", "reward.verifiable={agreement=nan}"
    ),
    "no such prompt set": setting("prompts: 'none': there is no such set", "prompts=none"),
    "a template that is missing": own_prompts(
        lambda folder: (folder / "solve_verifiable.txt").unlink(), "has no solve_verifiable.txt"
    ),
    "a template that is no Jinja": own_prompts(
        lambda folder: (folder / "solve_verifiable.txt").write_text("a\n{% if %}"), "solve_verifiable.txt:2: "
    ),
    "no such model": setting("model './none': no such folder", "model.path=./none"),
    "a model without a tokenizer": no_tokenizer,
    "no such validation file": setting("none.jsonl: no such file", "train.validation=none.jsonl"),
    "a validation file without answers": validation_without_answers,
    "a run of other settings": existing_run,
    "a run that is a file": run_is_a_file,
    "a gate that nobody can open": setting(
        "train.review_gate: it asks in the dashboard", "train.review_gate=true"
    ),
    "references into an unknown format": lambda folder: (
        ["synthesize", "--model", "lab", "--problems", "lab:open", "--out", "out.txt"],
        "out.txt: expected a name that ends in .jsonl or .parquet",
    ),
    "no such labelled file": lambda folder: (
        ["evaluate", "--model", "lab", "--problems", "none.jsonl"],
        "none.jsonl: no such file",
    ),
    "no such run": lambda folder: (
        ["export", "--run", str(folder / "none"), "--out", str(folder / "out")],
        "none/config.json: No such file or directory",
    ),
    "an export over something": an_export_over,
    "no folder to inspect": lambda folder: (
        ["inspect", str(folder / "none")],
        "none: there is no such folder",
    ),
    "a run to inspect": a_run_to_inspect,
    "an inspector for all": lambda folder: (
        ["inspect", str(folder), "--host", "0.0.0.0"],
        "so it needs a --token",
    ),
    "a dashboard for all": lambda folder: (["serve", "--host", "0.0.0.0"], "--host 0.0.0.0: "),
    "a port that is taken": taken_port,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder in which no flow, server or page may be started."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("it was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asyncio.run", started)
    monkeypatch.setattr("uvicorn.run", started)
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_bad_input_is_one_line_and_nothing_begins(kind: Kind, tmp_path: Path, capfd, monkeypatch):
    arguments, says = kind(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["cat-grpo", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("cat-grpo: ") and err.count("\n") == 1, err
    assert says in err
    assert "sk-secret" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_as_many_kinds_as_were_asked_for():
    assert len(KINDS) >= 40


SABOTAGED = """
import sys
from cat_grpo import cli, data

def load_problems(config):
    return list(zip([1], [1, 2], strict=True))

data.load_problems = load_problems
sys.argv = ["cat-grpo", "train", "--preset", "lab-verifiable", "--run", "run"]
cli.main()
"""


def test_a_value_error_of_ours_is_a_traceback_and_exit_code_1():
    done = subprocess.run([sys.executable, "-c", SABOTAGED], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "zip() argument 2 is longer than argument 1" in done.stderr
