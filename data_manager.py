"""Which images are training images, queries and gallery: SYSU-MM01 and RegDB as they lie on disk.

Every list comes back as (paths, ids, cameras): a list of str and two int64 arrays of the same length.
Errors are `InputError`s that name the file.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import InputError

DATA_PATHS = {"sysu": "../data/SYSU-MM01/", "regdb": "../data/RegDB/"}  # where --data_path looks by default
SYSU_VISIBLE = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # --mode -> gallery cameras
SYSU_INFRARED = (3, 6)
SYSU_TRIALS = range(10)
REGDB_TRIALS = range(1, 11)
REGDB_CAMERAS = {"visible": 1, "thermal": 2}


def process_query_sysu(data_path, mode="all"):
    """SYSU-MM01's queries: every infrared image of the test ids, by id, then camera, then file name.

    Both modes ask the same queries; they differ in the gallery.
    """
    _check_mode(mode)
    return sysu_images(data_path, read_ids(data_path, "test"), SYSU_INFRARED)


def process_gallery_sysu(data_path, mode="all", trial=0):
    """SYSU-MM01's gallery of one trial, 0 to 9: one visible image of each test id and camera that has some.

    The seeded (de facto) protocol: one generator seeded with the trial draws, by sorted id, then camera, one of the
    sorted files. Python's own generator, so the draws are those of the published code; the global one is not touched.
    """
    _check_mode(mode)
    generator = random.Random(trial)
    drawn = []
    for identity in sorted(read_ids(data_path, "test")):
        for camera in SYSU_VISIBLE[mode]:
            if files := _files(data_path, camera, identity):
                drawn.append((str(generator.choice(files)), identity, camera))
    if not drawn:
        cameras = ", ".join(f"cam{camera}" for camera in SYSU_VISIBLE[mode])
        raise InputError(f"{data_path}: no test id has an image under {cameras}; check the folders")
    return _columns(drawn)


def sysu_images(data_path, identities, cameras):
    """All images of some ids and cameras, by sorted id, then camera in the order given, then file name."""
    found = [
        (str(file), identity, camera)
        for identity in sorted(identities)
        for camera in cameras
        for file in _files(data_path, camera, identity)
    ]
    if not found:
        names = ", ".join(f"cam{camera}" for camera in cameras)
        raise InputError(f"{data_path}: none of the {len(identities)} listed ids has an image under {names}")
    return _columns(found)


def read_ids(data_path, split):
    """The ids of `exp/{split}_id.txt` (train, val or test): numbers separated by commas."""
    path = Path(data_path) / "exp" / f"{split}_id.txt"
    text = _read(path, "SYSU-MM01 keeps its lists of ids there; check --data_path")
    fields = [field.strip() for line in text.splitlines() for field in line.split(",") if field.strip()]
    wrong = [field for field in fields if not (field.isascii() and field.isdigit())]
    if wrong or not fields:
        raise InputError(f"{path}: {wrong[0]!r} is no id" if wrong else f"{path}: holds no ids")
    return [int(field) for field in fields]


def process_test_regdb(data_path, trial=1, modal="visible"):
    """RegDB's test images of one modality, "visible" or "thermal", in one trial, 1 to 10, in the order of the list."""
    return regdb_images(data_path, "test", trial, modal)


def regdb_images(data_path, split, trial, modal):
    """The images of `idx/{split}_{modal}_{trial}.txt`, whose lines are `path label`; cameras: visible 1, thermal 2."""
    if modal not in REGDB_CAMERAS:
        raise ValueError(f"modal {modal!r} is neither 'visible' nor 'thermal'")
    listing = Path(data_path) / "idx" / f"{split}_{modal}_{trial}.txt"
    text = _read(listing, "RegDB's lists are numbered by trial, 1 to 10; check --data_path and --trial")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not (name and label.isascii() and label.isdigit()):
            raise InputError(f"{listing}, line {number}: {line!r} is not 'path label'")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{listing}, line {number}: {name} lies outside of {data_path}; list paths within it")
        found.append((str(Path(data_path) / name.strip()), int(label), REGDB_CAMERAS[modal]))
    if not found:
        raise InputError(f"{listing}: lists no images")
    return _columns(found)


class Images(NamedTuple):
    """Some rows of one of the lists of a `Searches`, with their identities and cameras [N]."""

    modality: str
    rows: np.ndarray
    ids: np.ndarray
    cameras: np.ndarray


class Search(NamedTuple):
    """One search of a protocol; `setting` says which: dataset, mode, direction, protocol, shots, trial."""

    setting: dict
    query: Images
    gallery: Images


class Searches(NamedTuple):
    """Every image that some searches need, once (paths by "visible" and "infrared"), and the searches."""

    paths: dict
    searches: list


def sysu_test(data_path, modes=("all", "indoor"), trials=SYSU_TRIALS):
    """SYSU-MM01's searches, one for each mode and trial: all queries in that gallery (seeded protocol, one shot)."""
    query_paths, ids, cameras = process_query_sysu(data_path)
    query = Images("infrared", np.arange(len(ids)), ids, cameras)
    galleries = {(mode, t): process_gallery_sysu(data_path, mode, t) for mode in modes for t in trials}
    union = sorted({path for paths, _, _ in galleries.values() for path in paths})
    row = {path: i for i, path in enumerate(union)}
    searches = [
        Search(
            _setting("sysu", mode, "infrared to visible", "seeded", trial),
            query,
            Images("visible", np.array([row[path] for path in paths]), ids, cameras),
        )
        for (mode, trial), (paths, ids, cameras) in galleries.items()
    ]
    return Searches({"visible": union, "infrared": query_paths}, searches)


def regdb_test(data_path, trial=1, directions=("visible to thermal", "thermal to visible")):
    """RegDB's searches in one trial. Both directions use the same two lists; each image has the stream of its kind."""
    paths, images = {}, {}
    for modal, modality in (("visible", "visible"), ("thermal", "infrared")):
        paths[modality], ids, cameras = process_test_regdb(data_path, trial, modal)
        images[modal] = Images(modality, np.arange(len(ids)), ids, cameras)
    searches = [
        Search(
            _setting("regdb", None, direction, "standard", trial), *(images[modal] for modal in direction.split(" to "))
        )
        for direction in directions
    ]
    return Searches(paths, searches)


def _setting(dataset, mode, direction, protocol, trial):
    """What a number means, as plain values for tables and JSON."""
    sysu = dataset == "sysu"
    return {
        "dataset": dataset,
        "mode": mode,
        "direction": direction,
        "protocol": protocol,
        "shots": 1 if sysu else None,
        "similarity": "cosine",
        "cmc_counts": "identities" if sysu else "images",
        "unseen": "camera 2 by queries of camera 3" if sysu else None,
        "trial": trial,
    }


def relabel(ids):
    """Ids -> labels 0 .. K-1, the rank of each id among all of them."""
    return np.unique(ids, return_inverse=True)[1]


def _read(path, remedy):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}). {remedy}") from error


def _files(data_path, camera, identity):
    folder = Path(data_path) / f"cam{camera}" / f"{identity:04d}"
    return sorted(file for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []


def _columns(rows):
    paths, ids, cameras = zip(*rows, strict=True)
    return list(paths), np.array(ids), np.array(cameras)


def _check_mode(mode):
    if mode not in SYSU_VISIBLE:
        raise ValueError(f"mode {mode!r} is neither 'all' nor 'indoor'")
