"""Whole files, which appear complete or not at all, and seeds, which depend on names alone."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a place to write a file or folder at, which stands at `path`, on the disk, when the block ends.

    Until then `path` has its old content. It keeps that when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # left behind by a process that was killed
    try:
        yield temporary
        if not temporary.is_symlink():
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
        if path.is_dir() and not path.is_symlink():  # a rename replaces a file, and no folder that is full
            _remove(path)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        _remove(temporary)


def write_whole(path: Path, text: str) -> None:
    """Writes the text. The file has the old text or the new one, never a part."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Adds one line in one write, so that several processes may add to the same file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seed_of(run_seed: int, step: int, stage: str, problem_id: str) -> int:
    """Returns 63 bits that depend on all four arguments and on nothing else."""
    digest = hashlib.sha256(f"{run_seed} {step} {stage} {problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
