"""Compute as Teacher (arXiv:2509.14234): a language model trains itself without labels.

    from cat_grpo import load_config, train

    run = train(load_config("lab-verifiable"), "runs/mine")
    print(run.best_checkpoint, run.metrics()[-1]["reward/mean"])

Every name is loaded when it is first used, so that this import is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_grpo.config import Config
    from cat_grpo.learner.grpo import group_advantages
    from cat_grpo.library import evaluate, synthesize, train
    from cat_grpo.method.answers import extract_answer
    from cat_grpo.method.equivalence import equivalent
    from cat_grpo.method.rewards.parsing import parse_rubric
    from cat_grpo.settings import load_config

__version__ = "0.1.0"

__all__ = [
    "Config",
    "equivalent",
    "evaluate",
    "extract_answer",
    "group_advantages",
    "load_config",
    "parse_rubric",
    "synthesize",
    "train",
]

_HOMES = {
    "Config": "config",
    "equivalent": "method.equivalence",
    "evaluate": "library",
    "extract_answer": "method.answers",
    "group_advantages": "learner.grpo",
    "load_config": "settings",
    "parse_rubric": "method.rewards.parsing",
    "synthesize": "library",
    "train": "library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
