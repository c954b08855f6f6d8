"""The user's stories in a browser, on what `cat-grpo serve` starts: schedule, train, inspect, review."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from browsing import MARKS, a_page
from cat_grpo.report.reviews import REVIEWS, read_reviews
from cat_grpo.run.rundir import RunDir
from dashboard import ENDED, Served, num_steps, small_config, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = MARKS

PICTURES = os.environ.get("PICTURES")
"""A folder to keep what the tests see, for the README."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    serving = Served(tmp_path_factory.mktemp("dashboard"), None)
    yield serving
    serving.stop()


@pytest.fixture
def page() -> Iterator[Any]:
    with a_page() as page:
        yield page


def start_from_form(page: Any, served: Served, run_dir: str, num_steps: int) -> None:
    """As a person does: Deployments, Run, Custom run, the form; and then to the run's page."""
    open_deployment(page, served)
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.get_by_text("Custom run").first.click()
    page.get_by_label("run_dir").and_(page.get_by_text("runs/lab-verifiable")).wait_for()
    page.get_by_label("Steps (Optional)", exact=True).first.fill(str(num_steps))
    page.get_by_label("run_dir").fill(run_dir)
    before = {run["id"] for run in served.post("flow_runs/filter")}
    submit = page.get_by_role("button", name="Submit")
    click(submit, partial(submit.wait_for, state="hidden"))
    [made] = [run["id"] for run in served.post("flow_runs/filter") if run["id"] not in before]
    page.goto(f"{served.ui}/v2/runs/flow-run/{made}")


def click(button: Any, wait: Callable[..., Any]) -> None:
    """Until it has led there: a busy browser loses a click now and then, a busy server refuses one."""
    button.click()
    for _ in range(3):
        with suppress(sync_api.TimeoutError):
            return wait(timeout=20_000)
        with suppress(sync_api.TimeoutError):  # it may have led there after all
            button.click(timeout=1_000)
    wait()


def open_deployment(page: Any, served: Served) -> None:
    page.goto(f"{served.ui}/v2/deployments")
    page.get_by_role("link", name="lab-verifiable").first.click()


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.mouse.move(0, 0)
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def test_a_run_from_the_form_to_a_reviewed_reference(served: Served, page: Any):
    folder = served.folder / "runs" / "first"
    start_from_form(page, served, "runs/first", 2)
    page.get_by_text("Completed", exact=True).first.wait_for()
    picture(page, "run")
    assert len(RunDir(folder).metrics()) == 2

    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("runs-first-report").first.wait_for()
    page.get_by_text("runs-first-curves").first.click()
    page.locator('a[href*="/artifacts/artifact/"]').first.click()
    page.get_by_role("img", name="The run's curves").wait_for()
    assert page.get_by_role("img", name="The run's curves").evaluate("image => image.naturalWidth") > 500
    picture(page, "curves")
    page.go_back()
    page.go_back()
    page.get_by_text("runs-first-references").first.click()
    page.locator('a[href*="/artifacts/artifact/"]').first.click()
    page.get_by_role("row").nth(1).wait_for()
    known = {group.reference.text for step in (0, 1) for group in RunDir(folder).read_step(step)}
    assert known & {cell.inner_text() for cell in page.get_by_role("cell").all()}
    page.get_by_role("link", name="Every group of this step in the inspector").click()

    page.get_by_role("link", name="differs from every rollout").click()
    page.wait_for_load_state()  # the keys are the page's script's
    found = [
        (step, i)
        for step in (0, 1)
        for i, group in enumerate(RunDir(folder).read_step(step))
        if group.reference.text and not any(reward.agrees for reward in group.rewards)
    ]
    step = int(re.search(r"/step/(\d+)", page.url).group(1))  # type: ignore[union-attr]
    here = [i for at, i in found if at == step]
    links = page.locator("a[data-row]")
    assert [int(link.inner_text()) - 1 for link in links.all()] == here
    picture(page, "step")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.locator("#name").fill("Ada")
    page.locator("h1").click()  # out of the field: keys are letters there
    assert page.locator('[data-accuracy="run"]').first.inner_text() == "—"
    page.keyboard.press("w")
    page.locator('[data-accuracy="run"]', has_text=re.compile(r"^0\.0% of 1")).first.wait_for()
    page.keyboard.press("r")
    page.locator('[data-accuracy="run"]', has_text=re.compile(r"^100\.0% of 1")).first.wait_for()
    picture(page, "group")
    said = read_reviews(folder / REVIEWS)
    assert [(one.name, one.step, one.group, one.opinion) for one in said] == [
        ("Ada", step, here[0], "wrong"),
        ("Ada", step, here[0], "right"),
    ]


def test_a_run_is_paused_and_resumed_and_cancelled_and_resumed_by_the_next(served: Served, page: Any):
    folder = served.folder / "runs" / "second"
    start_from_form(page, served, "runs/second", 500)
    until(lambda: num_steps(folder) >= 2, "two steps")
    from_menu(page, "Pause")
    page.get_by_text("Suspended", exact=True).first.wait_for()
    until(lambda: not served.engines(), "the process ends, and its GPU is free")
    done = num_steps(folder)
    from_menu(page, "Resume")
    until(lambda: num_steps(folder) > done, "another step")

    from_menu(page, "Cancel")
    page.get_by_text("Cancelled", exact=True).first.wait_for()
    until(lambda: not served.engines(), "no process is left")
    done = num_steps(folder)
    kept = RunDir(folder).checkpoints / "latest"
    start_from_form(page, served, "runs/second", done + 1)
    page.get_by_text("Completed", exact=True).first.wait_for()
    assert num_steps(folder) == done + 1
    assert kept.resolve().name == f"{done + 1:06d}"


def test_a_person_skips_a_step_in_the_form_of_the_gate_and_accepts_the_next(served: Served, page: Any):
    folder = served.folder / "runs" / "gated"
    gated = served.run("runs/gated", num_steps=2, review_gate=True)
    page.goto(f"{served.ui}/v2/runs/flow-run/{gated}")
    served.wait(gated, "Paused")
    answer(page, 1, "skip this step", "all wrong")
    until(lambda: num_steps(folder) == 1, "the step is done")
    served.wait(gated, "Paused")
    page.reload()
    answer(page, 2, "update", "")
    served.wait(gated, "Completed")
    skipped, updated = RunDir(folder).metrics()
    assert skipped["policy/skipped"] == 1.0 and "policy/skipped" not in updated
    gates = [json.loads((RunDir(folder).step_folder(step) / "gate.json").read_text()) for step in (0, 1)]
    assert gates == [{"accepted": False, "note": "all wrong"}, {"accepted": True, "note": ""}]


def test_a_schedule_from_the_dialog_starts_runs_until_it_is_switched_off(served: Served, page: Any):
    folder = served.folder / "runs" / "scheduled"
    deployment = served.deployments()["lab-verifiable"]
    small = deployment["parameters"] | {"config": small_config(deployment, num_steps=1)}
    served.patch(f"deployments/{deployment['id']}", parameters=small)
    open_deployment(page, served)
    toggle = page.get_by_role("switch", name="toggle Every 10 seconds")
    add_schedule(page, "runs/scheduled")
    toggle.and_(page.get_by_role("switch", checked=True)).wait_for()
    until(lambda: "RUNNING" in states(served, "runs/scheduled"), "a run starts by itself")
    click(toggle, toggle.and_(page.get_by_role("switch", checked=False)).wait_for)
    until(lambda: states(served, "runs/scheduled") <= ENDED, "all end")
    runs = served.runs_in("runs/scheduled")
    assert {(run["state"]["name"], run["auto_scheduled"]) for run in runs} == {("Completed", True)}
    assert num_steps(folder) == len(runs)  # each resumes where the last one stopped
    served.patch(f"deployments/{deployment['id']}", parameters=deployment["parameters"])


def states(served: Served, run_dir: str) -> set[str]:
    return {run["state"]["type"] for run in served.runs_in(run_dir)}


def add_schedule(page: Any, run_dir: str) -> None:
    """Every ten seconds, with the deployment's config: one left empty in the dialog would replace it."""
    page.get_by_role("button", name="Schedule", exact=True).click()
    dialog = page.get_by_role("dialog", name="Add Schedule")
    dialog.get_by_label("Value", exact=True).fill("10")
    dialog.get_by_role("combobox").first.click()
    page.get_by_role("option", name="Seconds").click()
    dialog.get_by_role("button", name="Open menu").first.click()
    page.get_by_role("menuitem", name="Omit value").click()
    dialog.locator("fieldset[disabled]").wait_for()
    dialog.get_by_label("run_dir").fill(run_dir)
    click(dialog.get_by_role("button", name="Save"), partial(dialog.wait_for, state="hidden"))


def answer(page: Any, step: int, decision: str, note: str) -> None:
    """On the page of a run that is paused: Resume in its menu, and the form."""
    page.get_by_text("Paused", exact=True).first.wait_for()
    page.locator('button[aria-haspopup="menu"]').last.click()
    page.get_by_role("menuitem", name="Resume").click()
    form = page.get_by_role("dialog")
    form.get_by_text(f"Step {step}: 4 of 4 references").wait_for()
    assert form.get_by_role("row").count() == 5
    form.get_by_role("button", name="Select These references").click()
    page.get_by_role("option", name=decision).click()
    form.get_by_label("Note (Optional)").fill(note)
    click(form.get_by_role("button", name="Resume"), partial(form.wait_for, state="hidden"))


def from_menu(page: Any, what: str) -> None:
    """Of the run's page: the entry of its menu, and what is asked to confirm it."""
    page.locator('button[aria-haspopup="menu"]').last.click()
    page.get_by_role("menuitem", name=what).click()
    asked = page.get_by_role("dialog").or_(page.get_by_role("alertdialog"))
    confirm = asked.get_by_role("button", name=re.compile(f"^(Confirm|{what}|{what} Flow Run|Submit)$")).last
    click(confirm, partial(asked.wait_for, state="hidden"))
