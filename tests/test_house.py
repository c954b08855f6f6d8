"""The structure as laws: which room may know which. Architecture that nobody checks is a wish."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from cat_grpo.method import templates_of
from cat_grpo.method.prompts import refuse_missing
from cat_grpo.method.references import ESTIMATORS
from cat_grpo.method.rewards import REWARDS
from cat_grpo.method.rollouts import solve_template
from cat_grpo.records import Kind
from cat_grpo.settings import load_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cat_grpo"

HEAVY = {"torch", "transformers", "prefect", "datasets", "pandas", "math_verify"}
LIGHT_ROOMS = (
    *("cat_grpo", "cat_grpo.cli", "cat_grpo.config", "cat_grpo.records", "cat_grpo.settings"),
    *("cat_grpo.engines", "cat_grpo.learner", "cat_grpo.report", "cat_grpo.run"),
)
ROOMS = {
    "aiolimiter": {"engines.pool"},
    "datasets": {"data"},
    "defusedxml": {"method.rewards.parsing"},
    "fastapi": {"inspector.app", "inspector.pages", "inspector.security"},
    "jinja2": {"inspector.pages", "method.prompts"},
    "latex2mathml": {"inspector.texts"},
    "math_verify": {"method.equivalence"},
    "openai": {"engines.pool"},
    "peft": {"learner.lora"},
    "ray": {"learner.sharded"},
    "rich": {"cli"},
    "typer": {"cli"},
    "uvicorn": {"inspector.app"},
    "vllm": {"engines.vllm", "engines.vllm_worker"},
}
FLOORS = (
    {"errors", "records", "shipped"},
    {"config", "files", "models"},
    {"data", "metrics", "settings", "learner"},
    {"engines"},
    {"method"},
    {"evaluation", "lab", "report"},
    {"run"},
    {"inspector", "library"},
    {"cli"},
)
"""A room imports from lower floors alone. `cat_grpo` itself hands out names from all of them, when asked."""
STAGES = ("method.rollouts", "method.references", "method.rewards", "learner.batches", "learner.learner")
STAGES_THAT_MAY_MEET = {
    ("learner.learner", "learner.batches"),  # a batch is made of tensors: records.py loads no torch
}
LONGEST_FILE = 300


@dataclass(frozen=True)
class Import:
    """One imported module, absolute. `lazy`: inside a function, so not run when the importer is imported."""

    module: str
    line: int
    lazy: bool


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """`learner` for cat_grpo/learner.py, `engines.hf` for engines/hf.py, `engines` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    yield from _imports_below(ast.parse(path.read_text(encoding="utf-8")), path, lazy=False)


def _imports_below(node: ast.AST, path: Path, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: imports here are absolute"
            # Of `from a.b import c`, c may be a module of its own: then it is a.b.c that is wanted.
            yield from (
                Import(_module(child.module or "", alias.name), child.lineno, lazy) for alias in child.names
            )
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_below(child, path, lazy or is_function)


def _module(package: str, name: str) -> str:
    inner = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if inner.with_suffix(".py").is_file() or inner.is_dir() else package


def top(module: str) -> str:
    return module.partition(".")[0]


def loaded_after(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter's sys.modules once it ran `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def test_the_laws_name_rooms_that_there_are():
    """A law about a file that is gone would hold for ever."""
    there = {room(path) for path in sources()}
    named = {*STAGES, *(name for pair in STAGES_THAT_MAY_MEET for name in pair)}.union(*ROOMS.values())
    assert named <= there
    units = {name.partition(".")[0] for name in there} - {""}
    assert sorted(units) == sorted(unit for floor in FLOORS for unit in floor)


@pytest.mark.parametrize("module", LIGHT_ROOMS)
def test_light_rooms_load_no_heavy_library(module: str):
    assert not loaded_after(f"import {module}") & HEAVY


def test_the_method_loads_no_torch_and_no_prefect():
    rooms = [room(path) for path in sorted((PACKAGE / "method").rglob("*.py"))]
    assert "method.cat" in rooms
    loaded = loaded_after("import " + ", ".join(f"cat_grpo.{name}" for name in rooms))
    assert not loaded & {"torch", "transformers", "prefect", "pandas", "datasets"}


def test_the_mathematics_needs_torch_alone():
    assert not loaded_after("import cat_grpo.learner.grpo") & {
        "transformers",
        "pydantic",
        "pandas",
        "prefect",
    }


def test_a_name_of_the_library_loads_what_it_needs_and_no_more():
    light = ("Config", "equivalent", "evaluate", "extract_answer", "load_config", "parse_rubric", "train")
    loaded = loaded_after(f"import cat_grpo; [getattr(cat_grpo, name) for name in {light}]")
    assert not loaded & {"torch", "transformers", "prefect", "pandas", "datasets"}


def test_the_library_gives_what_it_names():
    import cat_grpo

    assert all(callable(getattr(cat_grpo, name)) for name in cat_grpo.__all__)
    assert all(getattr(cat_grpo, name).__doc__ for name in cat_grpo.__all__)
    assert {*cat_grpo.__all__} <= {*dir(cat_grpo)}
    with pytest.raises(AttributeError, match="no_such_name"):
        cat_grpo.no_such_name  # noqa: B018


def test_the_learner_and_its_benchmarks_run_on_a_bare_gpu_machine():
    """torch and transformers are there, and nothing that only flows, files and engines need."""
    missing = ("prefect", "datasets", "vllm", "pandas", "peft", "ray", "trl", "math_verify")
    loaded_after(f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
sys.path.append("tests/benchmarks")
import cat_grpo.learner.learner, tests.benchmarks.update, tests.benchmarks.loss_head
""")


def test_help_loads_no_heavy_library():
    ask_for_help = """
import sys
from cat_grpo.cli import main
sys.argv = ["cat-grpo", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert not loaded_after(ask_for_help) & HEAVY


@pytest.mark.parametrize("path", sources(), ids=room)
def test_the_method_does_not_know_prefect(path: Path):
    for wanted in imports(path):
        if top(wanted.module) in {"prefect", "flows"}:
            assert room(path) == "cli", f"{path}:{wanted.line}: only the command line may start a flow"
            assert wanted.lazy, f"{path}:{wanted.line}: inside the function that needs it, or --help is slow"


@pytest.mark.parametrize("path", sources(), ids=room)
def test_a_heavy_library_has_one_room(path: Path):
    for wanted in imports(path):
        library = top(wanted.module)
        assert library not in ROOMS or room(path) in ROOMS[library], (
            f"{path}:{wanted.line}: {library} is the business of {sorted(ROOMS[library])}"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_know_each_other(stage: str):
    folder = PACKAGE.joinpath(*stage.split("."))
    paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    wanted = {each.module.removeprefix("cat_grpo.") for path in paths for each in imports(path)}
    known = {other for other in STAGES for name in wanted if f"{name}.".startswith(f"{other}.")} - {stage}
    assert {(stage, other) for other in known} <= STAGES_THAT_MAY_MEET


@pytest.mark.parametrize("path", sources(), ids=room)
def test_a_room_imports_from_lower_floors_alone(path: Path):
    floor = {unit: number for number, units in enumerate(FLOORS) for unit in units}
    here = room(path).partition(".")[0]
    for wanted in imports(path):
        if here and wanted.module.startswith("cat_grpo."):
            there = wanted.module.split(".")[1]
            assert there == here or floor[there] < floor[here], f"{path}:{wanted.line}: {there} is above"


def test_imports_make_no_circle():
    graph = {
        room(path): {
            wanted.module.removeprefix("cat_grpo").removeprefix(".")
            for wanted in imports(path)
            if top(wanted.module) == "cat_grpo" and not wanted.lazy
        }
        for path in sources()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "path", [*sources(), *sorted((ROOT / "flows").rglob("*.py"))], ids=lambda path: path.name
)
def test_a_file_can_be_read_in_one_sitting(path: Path):
    assert lines_of_code(path) <= LONGEST_FILE


def lines_of_code(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    text = path.read_text(encoding="utf-8")
    prose = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in prose
        for number, line in enumerate(text.splitlines(), start=1)
    )


@pytest.mark.parametrize("path", sources(), ids=room)
def test_what_is_not_built_is_not_there(path: Path):
    assert "NotImplementedError" not in path.read_text(encoding="utf-8")


def test_the_shipped_prompts_have_what_every_estimator_and_reward_reads():
    wanted = {
        name
        for kind in get_args(Kind)
        for function in (*ESTIMATORS.values(), *REWARDS.values())
        for verdict in ("label", "xml")
        for name in templates_of(function, load_config(overrides=[f"reward.verdict={verdict}"]), kind)
    }
    refuse_missing("default", {*wanted, *map(solve_template, get_args(Kind))})


def test_every_kind_of_problem_has_its_reward():
    assert all(load_config().reward.parts(kind) for kind in get_args(Kind))
