"""The folders that ship with the package: `prompts` and `data`.

In a clone they stand beside `cat_grpo`; the wheel carries them inside it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(*parts: str) -> Path:
    """The path of a shipped file or folder, for example `shipped("data", "lab", "model")`."""
    root = _PACKAGE / "_shipped"
    return (root if root.is_dir() else _PACKAGE.parent).joinpath(*parts)
