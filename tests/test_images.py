"""Reading image files, and writing many into one array. Kinds of images: see test_bad_input.py."""

import os
import types

import numpy as np
import pytest

from core import images
from data_manager import process_query_sysu


def test_chunks_and_processes_do_not_change_the_array(sysu_tree, tmp_path, monkeypatch):
    paths, _, _ = process_query_sysu(sysu_tree)
    images.write_images(paths, (16, 8), tmp_path / "whole.npy", "whole", workers=1)
    monkeypatch.setattr(images, "CHUNK", 7)
    images.write_images(paths, (16, 8), tmp_path / "chunks.npy", "chunks", workers=3)
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "chunks.npy").read_bytes()


def test_room_is_taken_where_the_system_has_no_call_for_it(sysu_tree, tmp_path, monkeypatch):
    """As on macOS."""
    paths, _, _ = process_query_sysu(sysu_tree)
    images.write_images(paths, (16, 8), tmp_path / "one.npy", "one", workers=1)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    images.write_images(paths, (16, 8), tmp_path / "other.npy", "other", workers=1)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "other.npy").read_bytes()
    monkeypatch.setattr(images.multiprocessing, "Pool", lambda *_: pytest.fail("the room is taken before the work"))
    if os.path.exists("/dev/full"):
        (tmp_path / "full.npy").symlink_to("/dev/full")
        monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_: types.SimpleNamespace(offset=0))
        with pytest.raises(OSError, match="No space left"):
            images.write_images(paths, (16, 8), tmp_path / "full.npy", "full", workers=1)
