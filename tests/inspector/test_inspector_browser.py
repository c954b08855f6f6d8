"""The inspector in a real browser: no text of a model runs, and a person reviews with the keyboard."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from browsing import MARKS, PATIENCE_S, a_page
from cat_grpo.inspector.app import create_app
from cat_grpo.report.reviews import REVIEWS, read_reviews
from inspecting import HOSTILE_NAME, hostile_groups, make_run, plain_groups

pytestmark = MARKS


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "plain", plain_groups())
    make_run(tmp_path / "runs" / HOSTILE_NAME, hostile_groups(), num_steps=1, finished=1)
    return tmp_path / "runs"


@pytest.fixture
def address(runs: Path) -> Iterator[str]:
    """Of an inspector of this test's own."""
    config = uvicorn.Config(create_app(runs), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page() -> Iterator[Any]:
    with a_page(1280) as page:
        yield page


def test_no_text_of_a_model_runs(address: str, page: Any):
    """Every page of the hostile run, with what the browser complains of, and every host that it asks."""
    alarms: list[str] = []
    page.on("dialog", lambda dialog: (alarms.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: alarms.append(message.text))
    page.on("pageerror", lambda error: alarms.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(address + "/") or alarms.append(asked.url))
    seen: set[str] = set()
    waiting = [f"{address}/"]
    while waiting:
        page.goto(waiting.pop())
        seen.add(page.url)
        assert page.locator("main h1").count() == 1, page.url
        assert page.locator("main script, main img, main iframe, main a[href^='javascript']").count() == 0
        for link in page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)"):
            is_page = link.startswith(address) and not re.search(
                r"/export|/run/plain|[?&](only|sort)=|#", link
            )
            if is_page and link not in seen and link not in waiting:
                waiting.append(link)
    assert not alarms
    assert len(seen) > 20


def test_a_person_filters_opens_and_reviews_with_the_keyboard(
    runs: Path, address: str, page: Any, tmp_path: Path
):
    page.goto(address)
    page.get_by_role("link", name="plain", exact=True).click()
    page.get_by_role("link", name="Step 2", exact=True).click()
    page.get_by_role("link", name="Differs from every rollout").click()
    page.get_by_text("1 of 5 groups").wait_for()
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Group 3").wait_for()
    page.keyboard.press("w")  # without a name the key leads to its field
    page.keyboard.type("Ada")
    page.keyboard.press("Escape")
    page.keyboard.press("w")
    page.get_by_text("Marked wrong by Ada.").wait_for()
    assert page.locator('[data-accuracy="run"]').inner_text() == "0.0% of 1"
    page.goto(f"{address}/run/plain/step/1/group/0")
    page.keyboard.press("r")  # the name is remembered
    page.get_by_text("Marked right by Ada.").wait_for()
    page.keyboard.press("j")
    page.get_by_role("heading", name="Group 2").wait_for()
    page.keyboard.press("k")
    page.get_by_role("heading", name="Group 1").wait_for()
    assert page.locator("button.opinion.right").get_attribute("aria-pressed") == "true"
    page.goto(f"{address}/run/plain")
    assert page.locator('[data-accuracy="run"]').inner_text() == "50.0% ± 35.4% of 2"
    said = [(review.group, review.opinion) for review in read_reviews(runs / "plain" / REVIEWS)]
    assert said == [(2, "wrong"), (0, "right")]


def test_search_and_keys(address: str, page: Any):
    page.goto(f"{address}/run/plain/step/1")
    page.keyboard.press("/")
    page.keyboard.type("äpfel")
    page.keyboard.press("Enter")
    page.get_by_text("1 of 5 groups").wait_for()
    page.keyboard.press("?")
    page.get_by_role("dialog").get_by_text("next and previous").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")


def test_a_form_without_scripts_reviews_too(runs: Path, address: str):
    with a_page(has_scripts=False) as page:
        page.goto(f"{address}/run/plain/step/1/group/0?sort=reward")
        page.get_by_label("Your name").fill("Grace")
        page.get_by_label("Note").fill("by hand")
        page.get_by_role("button", name="Unsure").click()
        page.get_by_text("by hand").wait_for()
        assert page.url.endswith("/group/0?sort=reward#review")
    [line] = (runs / "plain" / REVIEWS).read_text().splitlines()
    assert json.loads(line)["opinion"] == "unsure"


def test_another_site_cannot_review(runs: Path, address: str, page: Any):
    """Its form reaches the inspector, which does not take it."""
    other = address.replace("127.0.0.1", "localhost")
    form = f'<form method="post" action="{address}/run/plain/step/1/group/0/review">'
    fields = '<input name="name" value="Eve"><input name="opinion" value="right"><button>Win</button></form>'
    page.route(f"{other}/evil", lambda route: route.fulfill(body=form + fields, content_type="text/html"))
    page.goto(f"{other}/evil")
    page.get_by_role("button").click()
    page.get_by_text("Only these pages may send a review.").wait_for()
    assert not (runs / "plain" / REVIEWS).exists()
