"""Which images are training images, queries and gallery: SYSU-MM01, RegDB and LLCM as they lie on disk.

Lists of test images come back as (paths, ids, cameras): a list of str and two int64 arrays of the same length.
Errors are `InputError`s that name the file.
"""

import itertools
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.io import loadmat

from utils import InputError

# Where --data_path looks by default
DATA_PATHS = {"sysu": "../data/SYSU-MM01/", "regdb": "../data/RegDB/", "llcm": "../data/LLCM/"}
DATA_NAMES = {"sysu": "SYSU-MM01", "regdb": "RegDB", "llcm": "LLCM"}
QUERIES = {"sysu": {3803}, "regdb": {2060}, "llcm": {8680, 7166}}  # of the whole test set; LLCM's by direction
DIRECTIONS = {  # data set -> "query to gallery"; the first is the default
    "sysu": ["infrared to visible"],
    "regdb": ["visible to thermal", "thermal to visible"],
    "llcm": ["visible to infrared", "infrared to visible"],
}
TRIALS = range(10)  # galleries of SYSU-MM01 and LLCM
SYSU_VISIBLE = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # --mode -> gallery cameras
SYSU_INFRARED = (3, 6)
SYSU_PROTOCOLS = ("seeded", "official")  # who draws the galleries
SYSU_SHOTS = (1, 10)  # gallery images of an id and camera
REGDB_TRIALS = range(1, 11)
REGDB_CAMERAS = {"visible": 1, "thermal": 2}
LLCM_CAMERAS = range(1, 10)
LLCM_NAMES = {"visible": "vis", "infrared": "nir"}  # in the names of its lists and folders
NUMBER = "[0-9]{1,9}"  # an id or label
DEMO_FILE = "demo.txt"  # in a folder that demo_data.py drew


# --------------------------------------------------------------------------------------------------------- SYSU-MM01


def process_query_sysu(data_path, mode="all", split="test"):
    """SYSU-MM01's queries: every infrared image of a split's ids, by id, then camera, then file name.

    Both modes ask the same queries; they differ in the gallery.
    """
    _check_mode(mode)
    return sysu_images(data_path, read_ids(data_path, split), SYSU_INFRARED)


def process_gallery_sysu(data_path, mode="all", trial=0, protocol="seeded", shots=1, split="test"):
    """SYSU-MM01's gallery of one trial, 0 to 9: `shots` visible images of each id of the split from each camera.

    seeded (de facto): one generator, seeded with the trial, walks through the sorted ids and each one's cameras, and
    draws of the sorted files one by `choice`, or ten by `sample` (of fewer files, all). It is Python's own generator,
    so the single-shot draws are those of the published code; the global generator is not touched.

    official: the first `shots` numbers of the trial's row in `exp/rand_perm_cam.mat`; they count the sorted files from
    1. A folder with another number of files than the row is refused.
    """
    _check_mode(mode)
    if protocol not in SYSU_PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is neither 'seeded' nor 'official'")
    listing = _listing(data_path, read_ids(data_path, split), SYSU_VISIBLE[mode])
    permutations = read_permutations(data_path) if protocol == "official" else None
    return _columns(_draw(listing, trial, shots, permutations))


def sysu_images(data_path, identities, cameras):
    """All images of some ids and cameras, by sorted id, then camera in the order given, then file name."""
    return _columns(_all(_listing(data_path, identities, cameras)))


def permutations_file(data_path):
    """Where the official protocol's draws lie."""
    return Path(data_path) / "exp" / "rand_perm_cam.mat"


def read_permutations(data_path):
    """The official protocol's draws, as `load_permutations` gives them."""
    path = permutations_file(data_path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; the data set's authors publish it with their evaluation code "
            "(github.com/wuancong/SYSU-MM01): put it there, or use --protocol seeded"
        )
    return load_permutations(path)


def load_permutations(path):
    """`rand_perm_cam.mat` -> {(camera, id): int64 [trials, images], each row a permutation of 1 .. images}.

    The file holds a cell for each camera, and in it a cell for each id, empty where the camera does not see the person.
    """
    try:
        rows = {
            (camera, identity): draws.astype(np.int64)
            for camera, people in enumerate(loadmat(path)["rand_perm_cam"].ravel(), 1)
            for identity, draws in enumerate(people.ravel(), 1)
            if draws.size
        }
        whole = all(np.array_equal(np.sort(draws), np.ones_like(draws).cumsum(axis=1)) for draws in rows.values())
    except Exception as error:  # scipy's reader raises anything when a file is damaged
        raise InputError(f"{path}: is no rand_perm_cam.mat ({type(error).__name__}); fetch it again") from error
    if not (rows and whole and all(len(draws) >= len(TRIALS) for draws in rows.values())):
        raise InputError(f"{path}: holds no permutations of 1 .. N for {len(TRIALS)} trials; fetch it again")
    return rows


def _listing(root, identities, cameras):
    """{folder: (id, camera, its sorted files)} of every id and camera, by sorted id, then camera in the order given."""
    listing = {}
    for identity in sorted(identities):
        for camera in cameras:
            folder = os.path.join(Path(root), f"cam{camera}", f"{identity:04d}")
            if not os.path.isdir(folder):
                _check_unpadded(folder)
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            files = [os.path.join(folder, name) for name in names if not name.startswith(".")]
            listing[folder] = identity, camera, files
    if not any(files for _, _, files in listing.values()):
        names = ", ".join(f"cam{camera}" for camera in cameras)
        raise InputError(f"{root}: none of the {len(identities)} listed ids has an image under {names}")
    return listing


def _check_unpadded(folder):
    """A folder 7 or 07 instead of 0007 would not be seen."""
    parent, name = os.path.split(folder)
    for digits in range(len(str(int(name))), len(name)):
        if os.path.isdir(other := os.path.join(parent, name[-digits:])):
            raise InputError(f"{other}: people's folders have four digits at least; name it {name}")


def _all(listing):
    """All images of a listing, as rows (path, id, camera)."""
    return [(file, identity, camera) for identity, camera, files in listing.values() for file in files]


def _draw(listing, trial, shots=1, permutations=None):
    """One gallery of a listing, as rows (path, id, camera): seeded, or by permutations."""
    generator, drawn = random.Random(trial), []
    for folder, (identity, camera, files) in listing.items():
        if permutations is not None:
            draws = permutations.get((camera, identity), np.empty((trial + 1, 0), np.int64))
            if draws.shape[1] != len(files):
                raise InputError(
                    f"{folder}: {len(files)} images, but rand_perm_cam.mat permutes {draws.shape[1]}: take the images "
                    "that it was made for, or --protocol seeded"
                )
            chosen = [files[number - 1] for number in draws[trial, :shots]]
        elif shots == 1:
            chosen = [generator.choice(files)] if files else []
        else:
            chosen = generator.sample(files, min(shots, len(files)))
        drawn += [(file, identity, camera) for file in chosen]
    return drawn


def _check_mode(mode):
    if mode not in SYSU_VISIBLE:
        raise ValueError(f"mode {mode!r} is neither 'all' nor 'indoor'")


# ------------------------------------------------------------------------------------------------------------- RegDB


def process_test_regdb(data_path, trial=1, modal="visible"):
    """RegDB's test images of one modality, "visible" or "thermal", in one trial, 1 to 10, in the order of the list.

    RegDB has one camera of each kind: visible 1, thermal 2.
    """
    if modal not in REGDB_CAMERAS:
        raise ValueError(f"modal {modal!r} is neither 'visible' nor 'thermal'")
    paths, ids = read_list(data_path, f"test_{modal}_{trial}")
    return paths, ids, np.full(len(ids), REGDB_CAMERAS[modal])


# -------------------------------------------------------------------------------------------------------------- LLCM


def process_query_llcm(data_path, modality="visible"):
    """LLCM's queries: every test image of one modality, "visible" or "infrared", by id, then camera, then file name."""
    return _columns(_all(_llcm_listing(data_path, modality)))


def process_gallery_llcm(data_path, modality="infrared", trial=0):
    """LLCM's gallery of one trial, 0 to 9: of each test id and camera one image of that modality, drawn as SYSU-MM01's
    seeded single-shot galleries are."""
    return _columns(_draw(_llcm_listing(data_path, modality), trial))


def _llcm_listing(data_path, modality):
    folder = Path(data_path) / f"test_{LLCM_NAMES[modality]}"
    return _listing(folder, read_ids(data_path, "test", "idx"), LLCM_CAMERAS)


# ------------------------------------------------------------------------------------------------------------- lists


def read_ids(data_path, split, folder="exp"):
    """The ids of `{folder}/{split}_id.txt` (of SYSU-MM01: train, val or test): numbers separated by commas."""
    path = Path(data_path) / folder / f"{split}_id.txt"
    text = _read(data_path, f"{folder}/{split}_id.txt")
    fields = [field.strip() for line in text.split("\n") for field in line.split(",") if field.strip()]
    wrong = [field for field in fields if not re.fullmatch(NUMBER, field)]
    if wrong or not fields:
        what = f"{wrong[0]!r} is no id" if wrong else "holds no ids"
        raise InputError(f"{path}: {what}; list numbers, separated by commas")
    ids = [int(field) for field in fields]
    if len(set(ids)) < len(ids):
        twice = next(identity for identity in ids if ids.count(identity) > 1)
        raise InputError(f"{path}: id {twice} stands there twice; remove one")
    return ids


def read_list(data_path, name):
    """(paths, ids) of `idx/{name}.txt` (of RegDB and LLCM), whose lines are `path label`, in the order of the list.

    A path may hold spaces. Raises InputError for one that leads out of the data set's folder, also through links.
    """
    listing = Path(data_path) / "idx" / f"{name}.txt"
    text = _read(data_path, f"idx/{name}.txt")
    root, found = os.path.realpath(data_path), []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(rf"(\S.*?)\s+({NUMBER})", line.strip())
        if not match or not match[1].isprintable():
            raise InputError(f"{listing}, line {number}: {line!r} is not 'path label'; write one image's there")
        file = match[1]
        outside = Path(file).is_absolute() or ".." in Path(file).parts
        if outside or not os.path.realpath(Path(data_path) / file).startswith(root + os.sep):
            raise InputError(f"{listing}, line {number}: {file} lies outside of {data_path}; list paths within it")
        found.append((str(Path(data_path) / file), int(match[2])))
    if not found:
        raise InputError(f"{listing}: lists no images; write lines 'path label'")
    paths, ids = zip(*found, strict=True)
    return list(paths), np.array(ids)


def relabel(ids):
    """Ids -> labels 0 .. K-1, the rank of each id among all of them."""
    return np.unique(ids, return_inverse=True)[1]


def _read(data_path, name):
    """The text of a list of the data set."""
    if not Path(data_path).is_dir():
        raise InputError(f"{data_path}: no such folder; give the data set's with --data_path")
    path = Path(data_path) / name
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); the data set's list of ids or images belongs there"
        ) from error


def is_demo(data_path):
    """Whether `demo_data.py` drew this folder: it leaves a file that says so."""
    return (Path(data_path) / DEMO_FILE).is_file()


def _columns(rows):
    paths, ids, cameras = zip(*rows, strict=True)
    return list(paths), np.array(ids), np.array(cameras)


# ---------------------------------------------------------------------------------------------------------- searches


class Images(NamedTuple):
    """Some rows of one of the lists of a `Searches`, with their identities and cameras [N]."""

    modality: str
    rows: np.ndarray
    ids: np.ndarray
    cameras: np.ndarray


class Search(NamedTuple):
    """One search of a protocol; `setting` says which: data set, split, mode, direction, protocol, shots, trial."""

    setting: dict
    query: Images
    gallery: Images


class Searches:
    """Some searches, and every image that they need, once: `paths` by modality, "visible" and "infrared"."""

    def __init__(self):
        self.searches = []
        self._row = {"visible": {}, "infrared": {}}

    @property
    def paths(self):
        return {modality: list(rows) for modality, rows in self._row.items()}

    def images(self, modality, listed):
        """(paths, ids, cameras) -> Images."""
        paths, ids, cameras = listed
        row = self._row[modality]
        return Images(modality, np.array([row.setdefault(path, len(row)) for path in paths]), ids, cameras)

    def add(self, query, gallery, dataset, direction, protocol, trial, mode=None, shots=1, split="test"):
        """Append a search; its setting says what a number means, as plain values for tables and JSON."""
        setting = {
            "dataset": dataset,
            "split": split,
            "mode": mode,
            "direction": direction,
            "protocol": protocol,
            "shots": shots,
            "similarity": "cosine",
            "cmc_counts": "images" if dataset == "regdb" else "identities",
            "unseen": {
                "sysu": "camera 2 by queries of camera 3",
                "regdb": None,
                "llcm": "same identity in the same camera",
            }[dataset],
            "trial": trial,
        }
        self.searches.append(Search(setting, query, gallery))


def describe(setting):
    """What a search is, in words: "all-search, infrared to visible, seeded protocol, 1-shot"."""
    parts = [f"{setting['mode']}-search"] if setting["mode"] else []
    parts += [setting["direction"], f"{setting['protocol']} protocol"]
    parts += [f"{setting['shots']}-shot"] if setting["shots"] else []
    return ", ".join(parts)


def data_name(dataset, demo, queries):
    """The data set as tables and figures call it: by its name only where it has as many queries."""
    like = "demo data like " if demo else "data like " if queries not in QUERIES[dataset] else ""
    return like + DATA_NAMES[dataset]


def describe_result(row):
    """What a row of `engine.summarise` is of: "SYSU-MM01, all-search, ..., 1-shot, 10 trials"."""
    trials = f"trial {row['trials'][0]}" if len(row["trials"]) == 1 else f"{len(row['trials'])} trials"
    name = data_name(row["dataset"], row["demo"], row["per_trial"][0]["queries"])
    return f"{name}, {describe(row)}, {trials}"


def sysu_test(data_path, modes=("all",), protocols=("seeded",), shots=(1,), trials=TRIALS, split="test"):
    """SYSU-MM01's searches, one for each protocol, mode, number of shots and trial: all queries in that gallery.

    As `process_query_sysu` and `process_gallery_sysu` give them, but folders and permutations are read once.
    """
    test = Searches()
    query = test.images("infrared", process_query_sysu(data_path, split=split))
    listings = {mode: _listing(data_path, read_ids(data_path, split), SYSU_VISIBLE[mode]) for mode in modes}
    permutations = {"seeded": None, "official": read_permutations(data_path) if "official" in protocols else None}
    for protocol, mode, number, trial in itertools.product(protocols, modes, shots, trials):
        drawn = _columns(_draw(listings[mode], trial, number, permutations[protocol]))
        gallery = test.images("visible", drawn)
        test.add(query, gallery, "sysu", "infrared to visible", protocol, trial, mode, number, split)
    return test


def regdb_test(data_path, trial=1, directions=DIRECTIONS["regdb"][:1]):
    """RegDB's searches in one trial. Both directions use the same two lists; each image has the stream of its kind."""
    test = Searches()
    images = {
        "visible": test.images("visible", process_test_regdb(data_path, trial, "visible")),
        "thermal": test.images("infrared", process_test_regdb(data_path, trial, "thermal")),
    }
    for direction in directions:
        query, gallery = direction.split(" to ")
        test.add(images[query], images[gallery], "regdb", direction, "standard", trial, shots=None)
    return test


def llcm_test(data_path, directions=DIRECTIONS["llcm"][:1], trials=TRIALS):
    """LLCM's searches, one for each direction and trial: every image of one modality in a gallery of the other."""
    test = Searches()
    for direction in directions:
        asked, searched = direction.split(" to ")
        query = test.images(asked, process_query_llcm(data_path, asked))
        listing = _llcm_listing(data_path, searched)
        for trial in trials:
            gallery = test.images(searched, _columns(_draw(listing, trial)))
            test.add(query, gallery, "llcm", direction, "seeded", trial)
    return test
