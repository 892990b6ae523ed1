"""Query and gallery lists against the published draws, and file-list parsing."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from data_manager import process_gallery_sysu, process_query_sysu, process_test_regdb

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sysu_protocol.json").read_text())
MODES = ("all", "indoor")
GALLERY_CAMERAS = {"all": {1, 2, 4, 5}, "indoor": {1, 2}}


def build_sysu(root):
    """The golden tree as empty files, created in shuffled order."""
    files = [
        root / folder / f"{n:04d}.jpg"
        for folder, count in GOLDEN["images_per_folder"].items()
        for n in range(1, count + 1)
    ]
    random.Random(0).shuffle(files)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "exp").mkdir()
    (root / "exp" / "test_id.txt").write_text(GOLDEN["test_id_txt"] + "\n")


@pytest.fixture(scope="module")
def sysu(tmp_path_factory):
    # A parent folder that itself looks like a camera and a person: ids and cameras come from the end of a path.
    root = tmp_path_factory.mktemp("data") / "cam4" / "0666" / "SYSU-MM01"
    build_sysu(root)
    return root


@pytest.fixture
def regdb(tmp_path):
    """Trial t lists identities in reverse order and starts at a different image."""
    (tmp_path / "idx").mkdir()
    for trial in (1, 2, 10):
        for modal, folder in (("visible", "Visible"), ("thermal", "Thermal")):
            lines = [f"{folder}/{pid}/{modal}_{trial}_{n}.bmp {pid}" for pid in (12, 7, 0) for n in range(2)]
            (tmp_path / "idx" / f"test_{modal}_{trial}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def relative(paths, root):
    return [Path(path).relative_to(root).as_posix() for path in paths]


def assert_ids_and_cameras_parse(paths, ids, cameras, root):
    """`cam3/0053/0001.jpg` is person 53 seen by camera 3."""
    parts = [path.split("/") for path in relative(paths, root)]
    assert [int(i) for i in ids] == [int(person) for _, person, _ in parts]
    assert [int(c) for c in cameras] == [int(camera.removeprefix("cam")) for camera, _, _ in parts]


@pytest.mark.parametrize("mode", MODES)
def test_query_golden(sysu, mode):
    paths, ids, cameras = process_query_sysu(str(sysu), mode=mode)
    assert relative(paths, sysu) == GOLDEN["query"][mode]
    assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
    assert set(cameras) == {3, 6}


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("mode", MODES)
def test_gallery_golden(sysu, mode, trial):
    paths, ids, cameras = process_gallery_sysu(str(sysu), mode=mode, trial=trial)
    assert relative(paths, sysu) == GOLDEN["gallery"][f"{mode}/{trial}"]
    assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
    assert set(cameras) == GALLERY_CAMERAS[mode]
    assert len(set(zip(ids, cameras, strict=True))) == len(paths)  # one shot: one image per person and camera


def test_defaults_are_all_search_trial_0(sysu):
    assert relative(process_query_sysu(str(sysu))[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(str(sysu))[0], sysu) == GOLDEN["gallery"]["all/0"]


def test_trailing_slash_of_the_data_path(sysu):
    """The published default paths end in a slash."""
    assert relative(process_query_sysu(f"{sysu}/")[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(f"{sysu}/", trial=4)[0], sysu) == GOLDEN["gallery"]["all/4"]


@pytest.mark.parametrize("mode", MODES)
def test_global_generators_are_neither_used_nor_touched(sysu, mode):
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        python_state, numpy_state = random.getstate(), np.random.get_state()
        process_query_sysu(str(sysu), mode=mode)
        paths, _, _ = process_gallery_sysu(str(sysu), mode=mode, trial=3)
        assert relative(paths, sysu) == GOLDEN["gallery"][f"{mode}/3"]
        assert random.getstate() == python_state
        for now, before in zip(np.random.get_state(), numpy_state, strict=True):
            np.testing.assert_array_equal(now, before)


class Entries(list):
    """What os.scandir returns: an iterator that is also a context manager."""

    def __init__(self, entries):
        super().__init__(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass


def test_order_of_directory_listing_is_irrelevant(sysu, monkeypatch):
    """File systems list in any order; here always backwards."""
    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    monkeypatch.setattr(os, "scandir", lambda path=".": Entries(scandir(path)))
    assert relative(process_query_sysu(str(sysu))[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(str(sysu), trial=7)[0], sysu) == GOLDEN["gallery"]["all/7"]


@pytest.mark.parametrize("process", [process_query_sysu, process_gallery_sysu])
def test_sysu_errors_name_what_is_wrong(process, sysu, tmp_path):
    with pytest.raises(ValueError, match="test_id.txt"):
        process(str(tmp_path))
    with pytest.raises(ValueError, match="outdoor"):
        process(str(sysu), mode="outdoor")


@pytest.mark.parametrize("trial", [1, 2, 10])
@pytest.mark.parametrize(("modal", "folder", "camera"), [("visible", "Visible", 1), ("thermal", "Thermal", 2)])
def test_regdb_lists(regdb, trial, modal, folder, camera):
    paths, ids, cameras = process_test_regdb(str(regdb), trial=trial, modal=modal)
    assert relative(paths, regdb) == [f"{folder}/{pid}/{modal}_{trial}_{n}.bmp" for pid in (12, 7, 0) for n in range(2)]
    assert [int(i) for i in ids] == [12, 12, 7, 7, 0, 0]
    assert [int(c) for c in cameras] == [camera] * 6


def test_regdb_defaults_are_trial_1_visible(regdb):
    assert relative(process_test_regdb(f"{regdb}/")[0], regdb)[0] == "Visible/12/visible_1_0.bmp"


def test_regdb_errors_name_what_is_wrong(regdb):
    with pytest.raises(ValueError, match="test_thermal_5.txt"):
        process_test_regdb(str(regdb), trial=5, modal="thermal")
    with pytest.raises(ValueError, match="infrared"):
        process_test_regdb(str(regdb), modal="infrared")
