"""A run's curves as one small picture."""

import io
import random

import pytest
from PIL import Image

from cat_grpo.plots import MAX_PNG_BYTES, PANELS, curves_png


@pytest.mark.parametrize("num_steps", [1, 20, 1000])
def test_curves_are_a_small_image(num_steps: int):
    rng = random.Random(0)
    names = [name for curves in PANELS.values() for name in curves.values()]
    png = curves_png([{name: rng.gauss(0, 1) for name in names} for _ in range(num_steps)])
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert len(png) <= MAX_PNG_BYTES


def test_curves_of_nothing_are_an_image_too():
    assert curves_png([{"step": 0.0}])
