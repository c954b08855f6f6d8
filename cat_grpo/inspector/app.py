"""The routes of the pages. A page's address holds its whole state, so that it can be shared and kept.

Steps and groups count from 0 in addresses, as folders do, and from 1 in headings, as people do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from markupsafe import Markup

from cat_grpo.errors import BadInput, first_line
from cat_grpo.inspector import reading, views
from cat_grpo.inspector.pages import FOLDER, accuracy_text, page, run_url
from cat_grpo.inspector.reading import NotThere
from cat_grpo.inspector.security import SCRIPT_HEADER, is_own_page, refuse_open_host, secure
from cat_grpo.inspector.texts import clipped, compared
from cat_grpo.inspector.views import FILTERS, SORTS, View
from cat_grpo.report.curves import panels
from cat_grpo.report.pages import HEADLINE
from cat_grpo.report.reviews import REVIEWS, Opinion, Review, accuracy, append_review, now
from cat_grpo.run.rundir import RunDir
from cat_grpo.run.stopping import alarm, warnings
from cat_grpo.run.tables import Row
from cat_grpo.settings import differences

LONGEST_REVIEW = 16_384
"""Bytes."""
LONGEST_NAME, LONGEST_NOTE = 80, 2_000
ROLLOUTS_SHOWN = 32
STEPS_SHOWN = 100

router = APIRouter()


def create_app(runs: Path, token: str | None = None) -> FastAPI:
    """The app that shows the runs below a folder. Without a token it answers only under loopback names.

    BadInput for a folder that does not exist, or is a run itself.
    """
    if not runs.is_dir():
        raise BadInput(f"{runs}: there is no such folder")
    if (runs / "config.json").exists():
        raise BadInput(f"{runs}: this is a run itself; name the folder that contains it")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.runs = runs
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    handlers: Mapping[Any, Any] = {
        NotThere: _not_there,
        FileNotFoundError: _not_there_yet,
        BadInput: _unusable,
        RequestValidationError: _no_page,
        404: _no_page,
    }
    for what, handler in handlers.items():
        app.add_exception_handler(what, handler)
    secure(app, token)
    return app


def serve(runs: Path, host: str, port: int, token: str | None) -> None:
    """Answers until Ctrl-C. BadInput when others can reach the address and there is no token."""
    refuse_open_host(host, token)
    # uvicorn's log of requests would contain the token.
    uvicorn.run(create_app(runs, token), host=host, port=port, access_log=False)


@router.get("/")
def runs_page(request: Request) -> Response:
    """All runs, newest first."""
    return page("runs.html", cards=reading.cards(request.app.state.runs))


@router.get("/compare")
def compare_page(request: Request, a: str = "", b: str = "", step: int | None = None) -> Response:
    """Two runs beside each other: curves, figures, settings, and the problems that both had at a step."""
    names = reading.run_names(request.app.state.runs)
    if not (a and b):
        return page("compare.html", names=names, a=a, b=b, both=None)
    runs = (_run(request, a), _run(request, b))
    histories = [run.metrics() for run in runs]
    steps = reading.shared_steps(*runs)
    at = step if step is not None else max(steps, default=0)
    both = {
        "panels": panels(dict(zip("AB", histories, strict=True))),
        "headline": HEADLINE,
        "last": [reading.figures_at(history, len(history) - 1) for history in histories],
        "settings": differences(reading.settings(runs[0]), reading.settings(runs[1])),
        "steps": steps,
        "step": at,
        "problems": [
            (*pair, _side_by_side(*pair))
            for pair in (reading.shared_problems(*runs, at) if at in steps else [])
        ],
    }
    return page("compare.html", names=names, a=a, b=b, both=both)


# The longest addresses come first, because a run's name may contain slashes.


@router.post("/run/{name:path}/step/{step}/group/{group}/review")
async def add_review(request: Request, name: str, step: int, group: int) -> Response:
    """Adds a review to the run. Only our own pages may send one, by their script or by their plain form."""
    is_script = request.headers.get("content-type", "").partition(";")[0] == "application/json"
    if not is_own_page(request) or (is_script and SCRIPT_HEADER not in request.headers):
        return page("message.html", status=403, title="Refused", text="Only these pages may send a review.")
    run = _run(request, name)
    review = _review(await _fields(request, is_script), run, step, group)
    append_review(run.path / REVIEWS, review)
    if is_script:
        reviewed = reading.reviews_of(run.path)
        told = {"run": accuracy(reviewed), "step": accuracy(r for r in reviewed if r.step == step)}
        return JSONResponse({scope: accuracy_text(found) for scope, found in told.items()}, 201)
    here = View.of(request.query_params).query()
    return RedirectResponse(f"{run_url(name)}/step/{step}/group/{group}{here}#review", 303)


@router.get("/run/{name:path}/step/{step}/group/{group}")
def group_page(request: Request, name: str, step: int, group: int) -> Response:
    """One group in full, and its neighbours in the view that the query describes."""
    run, view = _run(request, name), View.of(request.query_params)
    [row] = reading.summary_rows_at(run, step, [reading.place_of(run, step, group)])
    rewarded = reading.read_group(run, step, group)
    first = min(max(_whole(request, "from"), 0), max(len(rewarded.rewards) - 1, 0))
    shown = slice(first, first + ROLLOUTS_SHOWN)
    reference, rollouts = compared(
        rewarded.reference.text, [rollout.text for rollout in rewarded.group.rollouts[shown]]
    )
    reviews = reading.reviews_of(run.path)
    return page(
        "group.html",
        **_place(run, name, step),
        group=group,
        row=row,
        rewarded=rewarded,
        shown=range(*shown.indices(len(rewarded.rewards))),
        rollouts_shown=ROLLOUTS_SHOWN,
        reference=reference,
        rollouts=rollouts,
        kl_coef=run.config.learner.kl_coef,
        view=view,
        **_neighbours(run, step, group, view),
        reviews=[review for review in reviews if (review.step, review.group) == (step, group)][::-1],
        opinions=get_args(Opinion),
    )


@router.get("/run/{name:path}/step/{step}/export")
def export(request: Request, name: str, step: int, format: str = "jsonl") -> Response:
    """Streams all rows of the view while it reads them."""
    run, view = _run(request, name), View.of(request.query_params)
    if format not in ("jsonl", "csv"):
        raise BadInput("format: expected jsonl or csv")
    reviews = reading.reviews_of_step(run, step)
    places = view.places(run, step, reviews)
    write, media = {
        "jsonl": (views.exported_jsonl, "application/x-ndjson"),
        "csv": (views.exported_csv, "text/csv"),
    }[format]
    file = f'attachment; filename="step-{step:06d}.{format}"'
    lines = write(run, step, places, reviews)
    return StreamingResponse(lines, media_type=media, headers={"Content-Disposition": file})


@router.get("/run/{name:path}/step/{step}")
def step_page(request: Request, name: str, step: int) -> Response:
    """A page of the step's groups."""
    run, view = _run(request, name), View.of(request.query_params)
    if step not in (steps := reading.steps_of(run)):
        raise NotThere(f"{name} has no step {step}")
    reviews = reading.reviews_of_step(run, step)
    places = view.places(run, step, reviews)
    return page(
        "step.html",
        **_place(run, name, step),
        view=view,
        rows=reading.summary_rows_at(run, step, view.on_page(places)),
        num_found=len(places),
        num_groups=len(reading.groups_of(run, step)),
        page_size=views.PAGE,
        reviews=reviews,
        figures=reading.figures_at(run.metrics(), step),
        headline=HEADLINE,
        filters=FILTERS,
        sorts=SORTS,
        previous=max((other for other in steps if other < step), default=None),
        next=min((other for other in steps if other > step), default=None),
    )


@router.get("/run/{name:path}/problem")
def problem_page(request: Request, name: str, id: str, before: int | None = None) -> Response:
    """The same problem in every step that had it."""
    run = _run(request, name)
    rows, more = reading.problem_rows(run, id, before)
    if not rows and more is None:
        raise NotThere(f"{name} has no problem {id!r} in a finished step")
    reviews = reading.latest(reading.reviews_of(run.path))
    return page("problem.html", name=name, id=id, rows=rows, more=more, reviews=reviews)


@router.get("/run/{name:path}")
def run_page(request: Request, name: str, steps: str = "") -> Response:
    """A run: its curves, what to look at, its steps and its settings."""
    run = _run(request, name)
    history, all_steps = run.metrics(), reading.steps_of(run)[::-1]
    manifest = run.path / "manifest.json"
    return page(
        "run.html",
        name=name,
        config=run.config,
        panels=panels({name: history}),
        last=reading.figures_at(history, len(history) - 1),
        headline={name: words for name, words in HEADLINE.items() if any(name in now for now in history)},
        warnings=list(warnings(history).values()) if history else [],
        alarm=alarm(history, run.config.train) if history else None,
        differences=differences(reading.settings(run), reading.default_settings()),
        manifest=json.dumps(json.loads(manifest.read_text()), indent=2) if manifest.is_file() else "",
        history=history,
        steps=all_steps if steps == "all" else all_steps[:STEPS_SHOWN],
        num_steps=len(all_steps),
        accuracy=accuracy(reading.reviews_of(run.path)),
    )


def _whole(request: Request, key: str) -> int:
    """The whole number under this key of the address; 0 when it is missing."""
    text = request.query_params.get(key, "0")
    try:
        return int(text)
    except ValueError as error:
        raise BadInput(f"{key}: expected a whole number, got {text!r:.60}") from error


def _run(request: Request, name: str) -> RunDir:
    return reading.find_run(request.app.state.runs, name)


def _side_by_side(ours: Row, theirs: Row) -> tuple[Markup, Markup]:
    """The beginnings of two references. Each marks what the other lacks."""
    texts = [clipped(row["reference"] or "none", 240) for row in (ours, theirs)]
    first, [second] = compared(texts[0], texts[1:])
    return first, second


def _place(run: RunDir, name: str, step: int) -> dict[str, Any]:
    """The fields that tell a step's or a group's page its run, its step, and the accuracy of both."""
    reviews = reading.reviews_of(run.path)
    of_step = accuracy(review for review in reviews if review.step == step)
    return {"name": name, "step": step, "run_accuracy": accuracy(reviews), "step_accuracy": of_step}


def _neighbours(run: RunDir, step: int, group: int, view: View) -> dict[str, Any]:
    """The previous and the next group in the view, and this group's place there; None if it is not shown."""
    groups = reading.groups_of(run, step)
    found = [groups[place] for place in view.places(run, step, reading.reviews_of_step(run, step))]
    if group not in found:
        return {"previous": None, "next": None, "position": None, "num_found": len(found)}
    i = found.index(group)
    return {
        "previous": found[i - 1] if i else None,
        "next": found[i + 1] if i + 1 < len(found) else None,
        "position": i + 1,
        "num_found": len(found),
    }


async def _fields(request: Request, is_script: bool) -> dict[str, Any]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_REVIEW:
            raise BadInput("the review is too long")
    if not is_script:
        return {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
    try:
        told = json.loads(body)
    except ValueError as error:
        raise BadInput(f"the review is not JSON: {error}") from error
    return told if isinstance(told, dict) else {}


def _review(fields: Mapping[str, Any], run: RunDir, step: int, group: int) -> Review:
    """The review that the fields hold. BadInput says which field is wrong."""
    told = {key: str(fields.get(key, "")).strip() for key in ("name", "opinion", "note")}
    opinion = next((one for one in get_args(Opinion) if one == told["opinion"]), None)
    if opinion is None:
        raise BadInput("opinion: expected right, wrong or unsure")
    if not 0 < len(told["name"]) <= LONGEST_NAME:
        raise BadInput(f"name: expected 1 to {LONGEST_NAME} characters")
    if len(told["note"]) > LONGEST_NOTE:
        raise BadInput(f"note: expected at most {LONGEST_NOTE} characters")
    [row] = reading.summary_rows_at(run, step, [reading.place_of(run, step, group)])
    return Review(now(), told["name"], step, group, row["problem_id"], opinion, told["note"])


def _not_there(request: Request, error: Exception) -> Response:
    return page("message.html", status=404, title="Not found", text=str(error))


def _not_there_yet(request: Request, error: Exception) -> Response:
    return page("message.html", status=404, title="Not ready yet", text="A file has not been written yet.")


def _unusable(request: Request, error: Exception) -> Response:
    return page("message.html", status=400, title="Bad request", text=first_line(error))


def _no_page(request: Request, error: Exception) -> Response:
    return page("message.html", status=404, title="Not found", text="There is no such page.")
