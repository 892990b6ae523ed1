"""Reading image files, and writing many into one array. Kinds of images: see test_bad_input.py."""

import numpy as np
import pytest
from PIL import Image

from core import images
from data_manager import process_query_sysu
from utils import InputError


def test_chunks_and_processes_do_not_change_the_array(sysu_tree, tmp_path, monkeypatch):
    paths, _, _ = process_query_sysu(sysu_tree)
    images.write_images(paths, (16, 8), tmp_path / "whole.npy", "whole", workers=1)
    monkeypatch.setattr(images, "CHUNK", 7)
    images.write_images(paths, (16, 8), tmp_path / "chunks.npy", "chunks", workers=3)
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "chunks.npy").read_bytes()
    with Image.open(paths[-1]) as image:
        expected = image.convert("RGB").resize((8, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.load(tmp_path / "whole.npy")[-1], np.asarray(expected))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut off"])
def test_unreadable_image_is_named(tmp_path, content):
    file = tmp_path / "0007.jpg"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"0007\.jpg: cannot be read as an image"):
        images.read_image(file, (16, 8))
