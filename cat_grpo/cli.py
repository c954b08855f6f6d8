"""The command line reads what the user typed, calls a flow, and prints the result."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cat_grpo.errors import BadInput, Stopped, first_line

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.steps=20")
]
Preset = Annotated[str | None, typer.Option(help="lab-verifiable, lab-open, math500 or healthbench")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A TOML file over the preset")]

app = typer.Typer(
    help="Compute as Teacher: a language model trains itself without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lab_app = typer.Typer(
    help="The lab: the tiny task and base model that ship with cat_grpo.", no_args_is_help=True
)
app.add_typer(lab_app, name="lab")


def main() -> None:
    """Bad input is one line on stderr and exit code 2; a bug keeps its traceback and is exit code 1."""
    # Read when transformers and its neighbours are imported: our own bar is the only one.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except BadInput as error:
        typer.echo(f"cat-grpo: {first_line(error)}", err=True)
        raise SystemExit(2) from None
    except Stopped as error:
        typer.echo(f"cat-grpo: stopped: {first_line(error)}", err=True)
        raise SystemExit(1) from None


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Of both training runs")] = 0,
    out: Annotated[Path, typer.Option(help="Where the runs and summary.json go")] = Path("runs/demo"),
) -> None:
    """Train both families of the lab without labels; show what held-out answers say before and after."""
    with _progress("demo"):
        from cat_grpo.report.pages import summary_table
        from flows.demo import demo as demo_flow

        summary = asyncio.run(demo_flow(seed=seed, out=str(out)))
    _print_markdown(summary_table(summary))
    typer.echo(f"\n{out / 'summary.json'} has these figures; {out}/*/steps has every reference as parquet.")


@app.command()
def train(
    run: Annotated[Path, typer.Option(help="The run's directory; an existing run is resumed")],
    overrides: Overrides = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan")
    ] = False,
) -> None:
    """Train a policy on unlabelled problems; an existing run is resumed where it stopped."""
    from cat_grpo.settings import load_config

    config = load_config(preset, config_file, overrides or [])
    if dry_run:
        _print_plan(config)
        return
    _check_training(config, run)
    with _progress("train"):
        from flows.train import train as train_flow

        best = asyncio.run(train_flow(config, str(run)))
    typer.echo(f"The best checkpoint is {best}")


@app.command()
def synthesize(
    model: Annotated[str, typer.Option(help="A folder, a hub id, or lab")],
    problems: Annotated[str, typer.Option(help="A file, a folder or a hub data set")],
    out: Annotated[Path, typer.Option(help="A .jsonl or .parquet file")],
    overrides: Overrides = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
) -> None:
    """Inference-time CaT: sample, synthesise and write one reference per problem. No training, no labels."""
    config = _config_for_model(
        model, preset, config_file, [f"data.path={json.dumps(problems)}", *(overrides or [])]
    )
    _check_synthesis(config, out)
    with _progress("synthesize"):
        from flows.synthesize import synthesize as synthesize_flow

        asyncio.run(synthesize_flow(config, str(out)))
    typer.echo(f"Wrote {out}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="A checkpoint, a hub id, or lab")],
    problems: Annotated[Path, typer.Option(help="A labelled file: id, prompt, kind, answer or points")],
    overrides: Overrides = None,
    anchor: Annotated[str | None, typer.Option(help="Default: what the checkpoint was trained with")] = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    limit: Annotated[int | None, typer.Option(help="At most this many problems")] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else")] = False,
) -> None:
    """Measure a checkpoint on labelled problems: the only place where gold answers are read."""
    config = _config_for_model(model, preset, config_file, overrides or [])
    _check_evaluation(config, problems, model, anchor)
    with _progress("evaluate", quiet=as_json):
        from flows.evaluate import evaluate as evaluate_flow

        figures = asyncio.run(
            evaluate_flow(config, str(problems), model=model, anchor=anchor, limit=limit, seed=seed)
        )
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        for name, value in figures.items():
            typer.echo(f"{name:32} {value:.4f}")


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="A run's directory")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet")],
    checkpoint: Annotated[Literal["best", "latest"], typer.Option()] = "best",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "bfloat16",
) -> None:
    """Write a run's checkpoint as a plain model folder, without the optimizer."""
    from cat_grpo.run.checkpoints import export_model
    from cat_grpo.run.rundir import RunDir

    typer.echo(f"Wrote {export_model(RunDir(run).checkpoints / checkpoint, out, dtype)}")


@app.command()
def serve(
    runs: Annotated[Path, typer.Option(help="The folder of runs that the inspector shows")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need a password")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65534, help="The inspector takes the next one")] = 4200,
    database: Annotated[
        str | None, typer.Option(help="postgresql+asyncpg://user:password@host/name; default: SQLite")
    ] = None,
) -> None:
    """The dashboard: schedule, watch, stop and inspect runs in a browser, until Ctrl-C."""
    from flows.serve import serve as serve_flows

    serve_flows(runs, host, port, database)


@app.command()
def inspect(
    runs: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="The folder that runs are in")],
    host: Annotated[str, typer.Option(help="Another than loopback needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 4280,
    token: Annotated[
        str | None, typer.Option(help="What a browser is asked for", envvar="CAT_GRPO_INSPECTOR_TOKEN")
    ] = None,
) -> None:
    """Look into runs in a browser: curves, references beside their rollouts, and reviews."""
    from cat_grpo.inspector.app import serve

    serve(runs, host, port, token)


@lab_app.command("build")
def lab_build(
    out: Annotated[Path, typer.Option(help="Where problems and model go")],
    seed: int = 0,
    steps: Annotated[
        int | None, typer.Option(help="Fewer for a trial; the default makes the shipped model")
    ] = None,
) -> None:
    """Build the lab again: problems, tokenizer, base model. A build in OUT that stopped is resumed."""
    with _progress("lab build"):
        from cat_grpo.lab.build import STEPS, build_lab

        model = build_lab(out, seed=seed, steps=steps or STEPS)
    typer.echo(f"Wrote {model}")


@lab_app.command("problems")
def lab_problems(
    kind: Annotated[Literal["verifiable", "open"], typer.Option()],
    n: Annotated[int, typer.Option(min=1, help="How many")],
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file; default: print")] = None,
) -> None:
    """Write labelled problems that neither the base model nor training has seen."""
    from cat_grpo.lab.problems import labelled_rows, write_problems

    rows = labelled_rows(kind, n, seed)
    if out is None:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        write_problems(rows, out)
        typer.echo(f"Wrote {n} problems to {out}")


def _config_for_model(model: str, preset: str | None, file: Path | None, overrides: list[str]) -> Any:
    """Returns the config for asking one model. A model of ours brings the settings it was trained with."""
    from cat_grpo.models import read_card
    from cat_grpo.settings import load_config

    base = read_card(model).get("config")
    return load_config(preset, file, [f"model.path={json.dumps(model)}", *overrides], base=base)


# These refuse, before Prefect starts, what a flow would refuse: at once, in one line, without a traceback.


def _check_training(config: Any, run: Path) -> None:
    from cat_grpo.engines.roles import refuse_untrainable
    from cat_grpo.run.rundir import refuse_other_settings

    if config.train.review_gate:
        from flows.gate import refuse_unseen

        refuse_unseen(config.train)
    problems = _check_problems(config)
    refuse_other_settings(run, config, problems)
    if config.train.validation:
        from cat_grpo.evaluation import load_labelled

        load_labelled(Path(config.train.validation))
    refuse_untrainable(config)
    _check_models(config, config.model.path)


def _check_synthesis(config: Any, out: Path) -> None:
    from cat_grpo.run.synthesize import refuse_suffix

    refuse_suffix(out)
    _check_problems(config, with_rewards=False)
    _check_models(config, config.model.path)


def _check_evaluation(config: Any, problems: Path, model: str, anchor: str | None) -> None:
    from cat_grpo.evaluation import load_labelled
    from cat_grpo.method.cat import refuse_unusable
    from cat_grpo.records import kinds_of

    refuse_unusable(config, kinds_of(item.problem for item in load_labelled(problems)))
    _check_models(config, model, *([anchor] if anchor else []))


def _check_problems(config: Any, with_rewards: bool = True) -> Any:
    from cat_grpo.data import load_problems
    from cat_grpo.method.cat import refuse_unusable
    from cat_grpo.records import kinds_of

    problems = load_problems(config.data)
    refuse_unusable(config, kinds_of(problems), with_rewards)
    return problems


def _check_models(config: Any, *paths: str) -> None:
    from cat_grpo.engines.tokens import load_tokenizer

    others = [model for model in (config.anchor, config.judge) if model and not model.is_chat]
    for path in (*(() if config.model.is_chat else paths), *(model.path for model in others)):
        load_tokenizer(path)


def _print_plan(config: Any) -> None:
    from cat_grpo.data import load_problems
    from cat_grpo.run.plan import plan_markdown

    problems = load_problems(config.data)
    typer.echo(config.model_dump_json(indent=2))
    _print_markdown(plan_markdown(config, problems))


def _print_markdown(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


@contextmanager
def _progress(title: str, quiet: bool = False) -> Iterator[None]:
    """Shows one bar on stderr, which follows the log records that carry `progress=(done, total)`."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        handler = _ProgressHandler(progress, progress.add_task(title, total=None))
        loggers = [logging.getLogger(name) for name in ("cat_grpo", "flows")]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


class _ProgressHandler(logging.Handler):
    def __init__(self, progress: Any, task_id: Any) -> None:
        super().__init__()
        self._progress, self._task_id = progress, task_id

    def emit(self, record: logging.LogRecord) -> None:
        done, total = getattr(record, "progress", (None, None))
        if total is not None:
            self._progress.update(
                self._task_id, completed=done, total=total, description=record.getMessage(), refresh=True
            )
