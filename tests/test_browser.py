"""What a person sees: a training run against a real server, its artifacts opened in a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cat_grpo.rundir import RunDir

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 120
TRAIN = "from cat_grpo.cli import main; main()", "train", "--preset", "lab-verifiable"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a Prefect server with a database of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_healthy(address, process)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_until_healthy(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}/api/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(f"the server did not answer: exit status {process.poll()}")


def train(server: str, folder: Path) -> str:
    """Trains for one step as a user would. Returns the id of the flow run."""
    few = ["train.steps=1", "train.problems_per_step=8", "rollout.group_size=4"]
    subprocess.run(
        [sys.executable, "-c", *TRAIN, "--run", str(folder), *few],
        env=os.environ | {"PREFECT_API_URL": f"{server}/api"},
        check=True,
    )
    [flow_run] = httpx.post(f"{server}/api/flow_runs/filter", json={}).json()
    return flow_run["id"]


def test_the_references_of_a_run_can_be_read_in_the_dashboard(server: str, tmp_path: Path):
    folder = tmp_path / "runs" / "first"
    flow_run_id = train(server, folder)
    known = next(group.reference.text for group in RunDir(folder).read_step(0) if group.reference.text)

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(1000 * PATIENCE_S)
        page.goto(f"{server}/runs/flow-run/{flow_run_id}")  # the address that Prefect prints
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("runs-first-step").first.wait_for()
        page.get_by_text("runs-first-references").first.click()
        page.get_by_text(known, exact=True).first.wait_for()
        picture = tmp_path / "references.png"
        page.screenshot(path=picture)
        browser.close()
    assert picture.stat().st_size > 10_000
