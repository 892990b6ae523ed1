"""The adapter of docs/tracking.md, as it stands there. With BoxMOT and Ultralytics themselves it is tried by hand: they
are in no list of requirements."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import testa
from conftest import save_network
from tools.embedder import Embedder


@pytest.fixture(scope="module")
def appearance(tmp_path_factory):
    page = (Path(testa.__file__).parent / "docs" / "tracking.md").read_text()
    names, checkpoint = {}, save_network(tmp_path_factory.mktemp("network") / "net.t", 0)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    return names["Appearance"](checkpoint, "visible"), Embedder(checkpoint, gpu="cpu")


def test_boxes_of_a_frame_have_the_features_of_their_images(appearance, tmp_path):
    adapter, embed = appearance
    frame = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    boxes = np.float32([[10.4, 5, 39.6, 70, 0.9, 0], [-20, -3, 12, 30, 0.8, 0], [100, 60, 150, 99, 0.7, 0]])
    files = []
    for number, (rows, columns) in enumerate([((5, 70), (10, 40)), ((0, 30), (0, 12)), ((60, 80), (100, 120))]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(frame[slice(*rows), slice(*columns), ::-1]).save(files[-1])
    np.testing.assert_allclose(adapter.get_features(boxes, frame), embed(files, "visible"), rtol=0, atol=1e-6)


def test_boxes_outside_the_frame_and_no_boxes(appearance):
    adapter, embed = appearance
    frame = np.full((80, 120, 3), 7, np.uint8)
    outside = [[-50, -50, -9, -9], [300, 10, 400, 50], [10, 300, 20, 400], [5, 5, 5, 5]]
    expected = embed.embed_crops([frame[:1, :1]] * 4, "visible", "BGR")
    np.testing.assert_allclose(adapter.get_features(outside, frame), expected, rtol=0, atol=1e-6)
    assert adapter.get_features(np.zeros((0, 6)), frame).shape == (0, embed.dim)
