"""Lists of images, as SYSU-MM01, RegDB and LLCM have them on disk: queries, galleries, ids and labels; and of tracks,
as HITSZ-VCM and BUPTCampus have them.

Images are returned as (paths, ids, cameras): a list of str and two int64 arrays of the same length. Of tracks, each
item of the first list is itself a list: the paths of some frames. Every InputError names the file.
"""

import os
import random
import re
from collections import Counter
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from core.files import regular
from core.formats import Text, read_json
from utils import InputError, map_processes

SYSU_VISIBLE = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # --mode -> gallery cameras
SYSU_INFRARED = (3, 6)
SYSU_PROTOCOLS = ("seeded", "official")  # how galleries are drawn
SYSU_DRAWS = 10  # trials in rand_perm_cam.mat
PERMUTATIONS_SOURCE = "its authors publish it: github.com/wuancong/SYSU-MM01"
REGDB_CAMERAS = {"visible": 1, "thermal": 2}
LLCM_CAMERAS = range(1, 10)
LLCM_NAMES = {"visible": "vis", "infrared": "nir"}  # in the names of its lists and folders
VCM_FEWEST = 12  # frames; shorter tracks are left out, as in MITML (CVPR 2022) and M3-ReID (TIFS 2025)
BUPT_CAMERAS = ("LS3", "G25", "CQ1", "W4", "TSG1", "TSG2")  # numbered from 1
TRACK_FRAMES = {"train": 12, "test": 6}  # of each track; 6: sample_seq_num in M3-ReID's test_m3reid.py
BuptFrames = dict[str, dict[str, dict[str, dict[str, list[Text]]]]]  # by person, modality, camera and track
NUMBER = "[0-9]{1,9}"  # an id or label
DEMO_FILE = "demo.txt"  # marks a folder of demo data
Images = tuple[list[str], np.ndarray, np.ndarray]  # their paths, ids and cameras


# --------------------------------------------------------------------------------------------------------- SYSU-MM01


def process_query_sysu(data_path: Path | str, mode: str = "all", split: str = "test") -> Images:
    """SYSU-MM01's queries: every infrared image of a split's ids, by id, then camera, then file name.

    Both modes have the same queries; they differ in the gallery.
    """
    _check_mode(mode)
    return sysu_images(data_path, read_ids(data_path, split), SYSU_INFRARED)


def process_gallery_sysu(
    data_path: Path | str,
    mode: str = "all",
    trial: int = 0,
    protocol: str = "seeded",
    shots: int = 1,
    split: str = "test",
) -> Images:
    """SYSU-MM01's gallery of one trial, 0 to 9: `shots` visible images of each id of the split from each camera.

    seeded (de facto): one generator of Python's `random`, seeded with the trial, goes through the sorted ids and the
    cameras of each. It draws one of the sorted files by `choice`, or ten by `sample` (all, if there are fewer). So the
    single-shot draws are those of the published code. The global generator is not touched.

    official: the first `shots` numbers of the trial's row in `exp/rand_perm_cam.mat`, which count the sorted files from
    1. A folder with another number of files than the row is an error.
    """
    _check_mode(mode)
    if protocol not in SYSU_PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is neither 'seeded' nor 'official'")
    folders = list_folders(data_path, read_ids(data_path, split), SYSU_VISIBLE[mode])
    permutations = read_permutations(data_path) if protocol == "official" else None
    return draw_gallery(folders, trial, shots, permutations)


def sysu_images(data_path, identities, cameras):
    """All images of some ids and cameras, by sorted id, then camera in the order given, then file name."""
    return all_images(list_folders(data_path, identities, cameras))


def sysu_training_images(data_path, identities):
    """{"visible" | "infrared": `sysu_images`} of the ids that are trained on."""
    cameras = {"visible": SYSU_VISIBLE["all"], "infrared": SYSU_INFRARED}
    return {modality: sysu_images(data_path, identities, own) for modality, own in cameras.items()}


def permutations_file(data_path):
    """The file with the official protocol's draws."""
    return Path(data_path) / "exp" / "rand_perm_cam.mat"


def read_permutations(data_path):
    """The official protocol's draws, as `load_permutations` gives them."""
    path = permutations_file(data_path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; put it there ({PERMUTATIONS_SOURCE}), or use --protocol seeded")
    return load_permutations(path)


def read_mat(path, name):
    """An array of a MATLAB file. It is read by a process of its own, which a damaged file can end."""
    with map_processes(_read_mat, [(path, name)], 1) as read:
        return next(read)


def _read_mat(path_and_name):
    path, name = path_and_name
    return loadmat(regular(path))[name]


def load_permutations(path):
    """`rand_perm_cam.mat` -> {(camera, id): int64 [trials, images], each row a permutation of 1 .. images}.

    The file holds a cell for each camera, and in it a cell for each id, empty where the camera does not see the person.
    """
    try:
        rows = {
            (camera, identity): draws.astype(np.int64)
            for camera, people in enumerate(read_mat(path, "rand_perm_cam").ravel(), 1)
            for identity, draws in enumerate(people.ravel(), 1)
            if draws.size
        }
        whole = all(
            draws.ndim == 2 and np.array_equal(np.sort(draws), np.ones_like(draws).cumsum(axis=1))
            for draws in rows.values()
        )
    except Exception as error:  # scipy's reader raises anything when a file is damaged
        raise InputError(f"{path}: is not a rand_perm_cam.mat ({type(error).__name__}); download it again") from error
    if not (rows and whole and all(len(draws) >= SYSU_DRAWS for draws in rows.values())):
        raise InputError(f"{path}: has no permutations of 1 .. N for {SYSU_DRAWS} trials; download it again")
    return rows


def list_folders(root, identities, cameras):
    """{folder: (id, camera, its sorted files)} of every id and camera, by sorted id, then camera in the order given.

    A folder's name is the id, with any number of leading zeros. There may be none, but one that is there and cannot be
    listed is an InputError, as are two of one id.
    """
    people: dict[tuple[int, int], str] = {}
    others = []
    for camera in cameras:
        place = os.path.join(Path(root), f"cam{camera}")
        for name in _listing(place, needed=False):
            if not re.fullmatch(NUMBER, name):
                others.append(name)
                if name[0].isdigit() and os.path.isdir(os.path.join(place, name)):
                    raise InputError(f"{place}: folder {name} is named by no number of at most 9 digits; rename it")
            elif other := people.get(key := (int(name), camera)):
                raise InputError(f"{place}: has two folders of person {key[0]}, {other} and {name}; remove one")
            else:
                people[key] = name
    folders = {}
    for identity in sorted(identities):
        for camera in cameras:
            name = people.get((identity, camera))
            folder = os.path.join(Path(root), f"cam{camera}", name or f"{identity:04d}")
            names = _listing(folder) if name else []
            folders[folder] = identity, camera, [os.path.join(folder, file) for file in names]
    if not any(files for _, _, files in folders.values()):
        names = ", ".join(f"cam{camera}" for camera in cameras)
        there = [*dict.fromkeys([*people.values(), *others])] or ["none"]
        raise InputError(
            f"{root}: none of the {len(identities)} listed ids has an image under {names}, in a folder named by its "
            f"number (there are {', '.join(there[:4])}); add images, rename the folders, or correct the list of ids"
        )
    return folders


def _listing(folder, needed=True):
    """The sorted names in a folder but hidden ones. One that is not needed may be missing."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        if not needed and isinstance(error, FileNotFoundError) and not os.path.islink(folder):
            return []
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); correct it, or its permissions") from error


def all_images(folders):
    """All images of `list_folders`."""
    return _columns((file, identity, camera) for identity, camera, files in folders.values() for file in files)


def draw_gallery(folders, trial, shots=1, permutations=None):
    """One gallery of `list_folders`: seeded, or by permutations, as `process_gallery_sysu` says."""
    generator, rows = random.Random(trial), []
    for folder, (identity, camera, files) in folders.items():
        if permutations is not None:
            draws = permutations.get((camera, identity), np.empty((trial + 1, 0), np.int64))
            if draws.shape[1] != len(files):
                raise InputError(
                    f"{folder}: {len(files)} images, but rand_perm_cam.mat permutes {draws.shape[1]}; restore the "
                    "original images, or use --protocol seeded"
                )
            sample = [files[number - 1] for number in draws[trial, :shots]]
        elif shots == 1:
            sample = [generator.choice(files)] if files else []
        else:
            sample = generator.sample(files, min(shots, len(files)))
        rows += [(file, identity, camera) for file in sample]
    return _columns(rows)


def _check_mode(mode):
    if mode not in SYSU_VISIBLE:
        raise ValueError(f"mode {mode!r} is neither 'all' nor 'indoor'")


# ------------------------------------------------------------------------------------------------------------- RegDB


def process_test_regdb(data_path: Path | str, trial: int = 1, modal: str = "visible") -> Images:
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
    return all_images(llcm_folders(data_path, modality))


def llcm_folders(data_path, modality):
    """`list_folders` of LLCM's test images of one modality."""
    folder = Path(data_path) / f"test_{LLCM_NAMES[modality]}"
    return list_folders(folder, read_ids(data_path, "test", "idx"), LLCM_CAMERAS)


# --------------------------------------------------------------------------------------------- HITSZ-VCM, BUPTCampus


def evenly(track, number):
    """`number` evenly spaced frames of a track, the first among them; if it has fewer, some are there several times.
    Source: "uniform" in BUPTCampus's dataloader.py."""
    return [track[i * len(track) // number] for i in range(number)]


def vcm_tracks(data_path, split):
    """HITSZ-VCM's tracks of "train" or "test", as `by_modality` gives them; and notes, lines for the user.

    Each line "modality first last person camera" of `info/track_{split}_info.txt` is a track. Its frames are those
    lines of `info/{split}_name.txt`, such as 0001M2D3T1F1.jpg. Modality 1 is infrared. In the test, the published codes
    take the tracks that `info/query_IDX.txt` counts, from 1, for the infrared ones, and so does this.
    """
    info, notes = Path(data_path) / "info", []
    file, name = info / f"track_{split}_info.txt", rf"({NUMBER})M([12])(D{NUMBER})T{NUMBER}F(\w+\.\w+)"
    names = _fields(data_path, info / f"{split}_name.txt", name, "a frame's name, such as 0001M2D3T1F1.jpg")
    place = Path(data_path) / split.capitalize()
    frames = [os.path.join(place, person, "ir" if m == "1" else "rgb", *rest) for person, m, *rest in names]
    form = "'modality (1 or 2) first last person camera', numbers"
    rows = [[*map(int, row)] for row in _fields(data_path, file, "([12])" + 4 * f" ({NUMBER})", form)]
    infrared = {number for number, row in enumerate(rows, 1) if row[0] == 1}
    if split == "test":
        index = info / "query_IDX.txt"
        lines = _fields(data_path, index, rf"({NUMBER}(?:\s+{NUMBER})*)", "numbers of tracks")
        queries = {int(word) for (line,) in lines for word in line.split()}
        if outside := queries.difference(range(1, len(rows) + 1)):
            raise InputError(f"{index}: {min(outside)} is not the number of one of {len(rows)} tracks; correct it")
        if count := len(infrared ^ queries):
            notes.append(f"warning: {index}: {count} tracks are of another modality in {file.name}")
        infrared = queries
    used: Counter[int] = Counter()
    tracks, mixed = [], 0
    for number, (_, first, last, identity, camera) in enumerate(rows, 1):
        if not 1 <= first <= last <= len(frames):
            problem = f"frames {first} to {last} are not among the {len(frames)} of {split}_name.txt"
            raise InputError(f"{file}, line {number}: {problem}; correct it")
        mixed += len({frame[:3] for frame in names[first - 1 : last]}) > 1
        used.update(range(first, last + 1))
        if last - first + 1 >= VCM_FEWEST:
            modality = "infrared" if number in infrared else "visible"
            tracks.append((modality, evenly(frames[first - 1 : last], TRACK_FRAMES[split]), identity, camera))
    if mixed:
        notes.append(f"warning: {file}: {mixed} tracks have frames of several people, modalities or cameras")
    if twice := sum(count > 1 for count in used.values()):
        notes.append(f"warning: {file}: {twice} frames are in several tracks")
    return by_modality(tracks, file), notes


def bupt_tracks(data_path, *names):
    """BUPTCampus's tracks of each `{name}.txt`, "train", "query" or "gallery": a list of what `by_modality` gives.

    Its lines are "person modality camera track", where the modality is RGB, IR or RGB/IR, both. `data_paths.json`, a
    large file, has the frames of each, by these four, below `DATA/`.
    """
    index, root, found = Path(data_path) / "data_paths.json", os.path.realpath(data_path), []
    form = f"'person modality camera track', with RGB, IR or RGB/IR and a camera of {', '.join(BUPT_CAMERAS)}"
    line = rf"({NUMBER}) (RGB|IR|RGB/IR) ({'|'.join(BUPT_CAMERAS)}) (\w+)"
    listings = {name: _fields(data_path, Path(data_path) / f"{name}.txt", line, form) for name in names}
    frames = read_json(index, BuptFrames, "put the data set's list of frames there")
    for name, rows in listings.items():
        listing, tracks = Path(data_path) / f"{name}.txt", []
        for number, (person, modalities, camera, track) in enumerate(rows, 1):
            for modality in modalities.split("/"):
                some = frames.get(person, {}).get(modality, {}).get(camera, {}).get(track)
                if not some:
                    problem = f"{index.name} has no frames of {person} {modality} {camera} {track}"
                    raise InputError(f"{listing}, line {number}: {problem}; copy both again")
                some = evenly(some, TRACK_FRAMES["train" if name == "train" else "test"])
                some = [_below(data_path, root, f"DATA/{frame}", index) for frame in some]
                number_of_camera = 1 + BUPT_CAMERAS.index(camera)
                tracks.append(("infrared" if modality == "IR" else "visible", some, int(person), number_of_camera))
        found.append(by_modality(tracks, listing))
    return found


def by_modality(tracks, file):
    """[(modality, frames, id, camera)] of a list -> {"visible" | "infrared": (frames of each track, ids, cameras)}."""
    found = {modality: [row for of, *row in tracks if of == modality] for modality in ("visible", "infrared")}
    if empty := [modality for modality, rows in found.items() if not rows]:
        raise InputError(f"{file}: has no {empty[0]} track that can be used; copy it again")
    return {modality: _columns(rows) for modality, rows in found.items()}


def track_images(name, tracks):
    """The frames of tracks, as `by_modality` gives these, as images, each once: {name_modality: (paths, ids)}."""
    images = {}
    for modality, (frames, ids, _) in tracks.items():
        once = [list(dict.fromkeys(some)) for some in frames]
        images[f"{name}_{modality}"] = list(chain(*once)), np.repeat(ids, [len(some) for some in once])
    return images


# ------------------------------------------------------------------------------------------------------------- lists


def read_ids(data_path, split, folder="exp"):
    """The ids of `{folder}/{split}_id.txt` (of SYSU-MM01: train, val or test): numbers separated by commas."""
    path = Path(data_path) / folder / f"{split}_id.txt"
    lines = _read(data_path, path).split("\n")
    fields = [field.strip() for line in lines for field in line.split(",") if field.strip()]
    wrong = [field for field in fields if not re.fullmatch(NUMBER, field)]
    if wrong or not fields:
        problem = f"{wrong[0]!r} is not an id" if wrong else "has no ids"
        raise InputError(f"{path}: {problem}; write numbers, separated by commas")
    ids = [int(field) for field in fields]
    if double := [identity for identity, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{path}: lists id {double[0]} twice; remove one")
    return ids


def read_splits(data_path):
    """SYSU-MM01's ids, {"train", "val", "test": set}. An id in two of the lists is an InputError."""
    splits = {split: set(read_ids(data_path, split)) for split in ("train", "val", "test")}
    for one, other in combinations(splits, 2):
        if both := splits[one] & splits[other]:
            raise InputError(
                f"{data_path}: id {min(both)} is in exp/{one}_id.txt and in exp/{other}_id.txt; remove it from one"
            )
    return splits


def read_list(data_path, name):
    """(paths, ids) of `idx/{name}.txt` (of RegDB and LLCM), whose lines are `path label`, in the order of the list.

    A path may contain spaces, and backslashes, as Windows writes it. One that leads out of the data set's folder, also
    through links, is an InputError.
    """
    listing = Path(data_path) / "idx" / f"{name}.txt"
    root, rows = os.path.realpath(data_path), []
    for number, line in enumerate(_read(data_path, listing).split("\n"), 1):
        if not line.strip():
            continue
        *file, label = line.strip().rsplit(maxsplit=1)
        if not (file and file[0].isprintable() and re.fullmatch(NUMBER, label)):
            raise InputError(f"{listing}, line {number}: {line[:200]!r} is not 'path label'; correct it")
        file = file[0].rstrip().replace("\\", "/")
        rows.append((_below(data_path, root, file, f"{listing}, line {number}"), int(label)))
    if not rows:
        raise InputError(f"{listing}: lists no images; write lines 'path label'")
    paths, ids = zip(*rows, strict=True)
    return list(paths), np.array(ids)


def _below(data_path, root, file, place):
    """The path of a listed file. root: the real path of the folder; place: of the list. A file that leads out of the
    folder, also through links, is an InputError."""
    if not file.isprintable():
        raise InputError(f"{place}: {file!r:.200} has a control character; correct it")
    outside = Path(file).is_absolute() or ".." in Path(file).parts
    if outside or not os.path.realpath(Path(data_path) / file).startswith(root + os.sep):
        raise InputError(f"{place}: {file} is outside {data_path}; move it there")
    return str(Path(data_path) / file)


def _fields(data_path, path, pattern, form):
    """The groups of a pattern in each line of a list, which must have it; form: the pattern, in words."""
    fields = []
    for number, line in enumerate(_read(data_path, path).rstrip().split("\n"), 1):
        if not (match := re.fullmatch(pattern, line.strip())):
            raise InputError(f"{path}, line {number}: {line[:200]!r} is not {form}; correct it")
        fields.append(match.groups())
    return fields


def _read(data_path, path):
    """The text of one of the data set's lists."""
    check_data_folder(data_path)
    try:
        return regular(path, text=True).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); put the data set's list of ids or images there"
        ) from error


def check_data_folder(data_path):
    """Raise InputError if there is no such folder."""
    if not Path(data_path).is_dir():
        raise InputError(f"{data_path}: no such folder; pass the data set's folder with --data_path")


def is_demo(data_path):
    """Whether `tools.demo_data` drew this folder; it leaves a file there."""
    return (Path(data_path) / DEMO_FILE).is_file()


def _columns(rows):
    paths, ids, cameras = zip(*rows, strict=True)
    return list(paths), np.array(ids), np.array(cameras)
