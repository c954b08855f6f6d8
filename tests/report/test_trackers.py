"""Figures arrive in the tracker, and a run that is resumed is the same run there."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from cat_grpo.errors import BadInput
from cat_grpo.report.trackers import open_tracker
from dashboard import until

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trackers' own libraries


def track(name: str | None, run: Path) -> None:
    """Two steps, the second of them again after a new start."""
    run.mkdir(exist_ok=True)
    for next_step, rewards in ((0, (0.25, 0.5)), (1, (0.75,))):
        tracker = open_tracker(name, run, {"seed": 0}, next_step)
        for step, reward in enumerate(rewards, start=next_step + 1):
            tracker.log({"reward/mean": reward}, step)
        tracker.close()


def test_nothing_is_tracked_where_nothing_is_asked_for(tmp_path: Path):
    track(None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensorboard(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", tmp_path)
    seen = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(e.step, e.value) for e in seen.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track("wandb", tmp_path)
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert len({path.stem for path in files}) == 1  # one run, by its id
    # A process of wandb's own writes the file, perhaps after `finish` has returned.
    until(lambda: b"reward/mean" in max(files).read_bytes(), "the figures of the second start")


def test_trackio(tmp_path: Path):
    """In a process of its own: it reads the folder that it writes to when it is imported."""
    pytest.importorskip("trackio")
    code = "import sys, pathlib; from test_trackers import track; track('trackio', pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "db"), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(
        command, env=environment, check=True, capture_output=True, cwd=Path(__file__).parent.parent
    )
    with sqlite3.connect(tmp_path / "db" / "cat_grpo.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"{tmp_path.name}/run"}
    assert [step for _, step, _ in rows] == [1, 2, 2]


def test_a_library_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match=r"^train\.tracker: wandb is not installed: pip install wandb$"):
        open_tracker("wandb", tmp_path, {}, 0)
