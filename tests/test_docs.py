"""README and docs: short, every link leads somewhere, and every example runs as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cat_grpo.config import Config
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.train import train
from cat_grpo.settings import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FEW = ["train.steps=1", "train.problems_per_step=2", "rollout.group_size=4"]


def examples(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_there(page: Path):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_by_its_path_is_there(page: Path):
    named = re.findall(
        r"`((?:cat_grpo|flows|prompts|tests|data)/[\w/.-]+)`", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readmes_library_example_runs(tmp_path: Path):
    (code,) = examples(ROOT / "README.md", "python")
    assert len(code.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"checkpoints/(best|latest) \d\.\d+\n", done.stdout), done.stdout
    assert len(RunDir(tmp_path / "runs" / "from-python").metrics()) == 2


def own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: int) -> Config:
    """Puts an example of docs/extending.md into the current folder; the config of the command below it."""
    page = ROOT / "docs" / "extending.md"
    code, command = examples(page, "python")[example], examples(page, "sh")[example]
    name = re.match(r"# (\w+)\.py\n", code)
    assert name
    (tmp_path / f"{name[1]}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:4] == ["cat-grpo", "train", "--preset", "lab-verifiable"]
    return load_config("lab-verifiable", overrides=[words[-1], *FEW])


async def test_a_reward_of_ones_own_is_added_and_kept(tmp_path: Path, monkeypatch):
    run = await train(own_function(tmp_path, monkeypatch, 0), tmp_path / "run")
    for group in run.read_step(0):
        assert {*group.rewards[0].parts} == {"agreement", "brevity:brevity"}
        lengths = [len(rollout.token_ids) for rollout in group.group.rollouts]
        for length, earned in zip(lengths, group.rewards, strict=True):
            assert earned.parts["brevity:brevity"] == 1.0 or length > min(lengths)
            equal, brief = earned.parts["agreement"], earned.parts["brevity:brevity"]
            assert equal is not None and brief is not None
            assert earned.reward == pytest.approx(equal + 0.1 * brief)


async def test_an_estimator_of_ones_own_chooses_the_references(tmp_path: Path, monkeypatch):
    run = await train(own_function(tmp_path, monkeypatch, 1), tmp_path / "run")
    for group in run.read_step(0):
        assert group.reference.estimator == "longest:longest"
        assert group.reference.chosen is not None
        chosen = group.group.rollouts[group.reference.chosen]
        assert len(chosen.token_ids) == max(len(rollout.token_ids) for rollout in group.group.rollouts)
        assert group.rewards[group.reference.chosen].agrees
