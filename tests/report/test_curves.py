"""A run's curves: panels of the pages, and one small picture for the dashboard."""

import random
import re
from xml.etree import ElementTree

import pytest

from cat_grpo.report.curves import MAX_PICTURE_BYTES, PANELS, panels, picture

NAMES = [name for curves in PANELS.values() for name in curves.values()]


def noise(num_steps: int) -> list[dict[str, float]]:
    rng = random.Random(0)
    return [{name: rng.gauss(0, 1) for name in NAMES} for _ in range(num_steps)]


def test_a_panel_by_hand():
    [panel] = panels({"run": [{"reward/mean": 0.0}, {"reward/mean": 0.4}]})
    assert (panel.title, [*panel.curves]) == ("Reward", [("c0", "reward")])
    assert '<polyline class="c0" points="44.0,148.0 330.0,10.0"/>' in panel.svg
    assert '<path class="c0 dots" d="M44.0,148.0h0M330.0,10.0h0"/>' in panel.svg
    assert re.findall(r'text-anchor="end">([\d.]+)<', panel.svg) == ["0", "0.1", "0.2", "0.3", "0.4", "2"]


def test_what_is_no_number_is_left_out():
    assert panels({"run": [{"reward/mean": float("nan")}]}) == []
    assert panels({"run": []}) == []


def test_two_runs_share_a_panel_and_names_are_escaped():
    [panel] = panels({"<a>": [{"reward/mean": 1.0}], "b": [{"reward/mean": -1.0}]})
    assert [look for look, _ in panel.curves] == ["c0 d0", "c1 d0"]
    assert "<a>" not in panel.svg


def test_a_long_curve_has_few_points():
    [panel] = panels({"run": [{"reward/mean": i / 5000} for i in range(5000)]})
    assert len(panel.svg) < 60_000


@pytest.mark.parametrize("num_steps", [1, 20, 60, 1000, 20_000])
def test_the_picture_is_small_and_has_every_panel(num_steps: int):
    image = picture(noise(num_steps))
    assert len(image.encode()) <= MAX_PICTURE_BYTES
    drawn = ElementTree.fromstring(image)
    titles = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text") if text.get("class")]
    assert titles == [*PANELS]


def test_a_picture_of_nothing_is_one_too():
    assert ElementTree.fromstring(picture([{"step": 0.0}])).tag.endswith("svg")
