"""Everything that differs between data sets, one spec for each in `DATASETS`; and the searches that test on them.

To add a data set, write its `training` and `searches` and add a `DataSet` to `DATASETS`: flags, tables, figures and
checks follow from it.
"""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data_manager
from core.files import is_regular
from core.images import image_suffixes
from data_loader import check_prepared, listed_train, sysu_train
from eval_metrics import REGDB_RULES, SYSU_RULES, Rules
from utils import InputError

TRIALS = range(10)  # a drawn gallery for each
BOTH = ("visible to infrared", "infrared to visible")


@dataclass(frozen=True)
class DataSet:
    """The spec of a data set. For "a modality", write "visible" or "infrared".

    name: for people. path: default of --data_path. directions: "query to gallery", the default first; --tvsearch picks
    the second. published: how many ids and images the data set has, by the names of `training_counts` and
    `Searches.counts`; tables call a test with another number of queries "data like ...".
    rules: what a query does not see, and what the CMC counts. options: flags that not every data set has -> their
    values, the default first. Of these, mode, protocol and shots choose searches; select: "val" needs validation ids;
    trial: a network is trained for each, so that a test has only that one. trials: what a test goes through.
    parts: the names of the data sets that a `union` is made of. lists: patterns of the files that list images or ids.
    tracks: whether queries and gallery are tracks, each of several images.

    training(data_path; trial, if it is an option) -> {name: (paths, ids)} of the visible and of the infrared
    training images.
    prepared(data_path, size, **options) -> what `train` returns, if it is not decoded from the images of `training`.
    searches(data_path, directions, trials, **options) -> `Searches`; the options are `mode`, `protocol` and `shots`, a
    sequence of values each, and `select`, one value.
    """

    name: str
    path: str
    directions: tuple
    rules: Rules
    training: Callable
    searches: Callable
    prepared: Callable | None = None
    trials: range = TRIALS
    published: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    parts: tuple = ()
    lists: tuple = ("exp/*.txt", "idx/*.txt")
    tracks: bool = False

    def own(self, **flags):
        """Those of the flags that are options of this data set."""
        return {flag: value for flag, value in flags.items() if flag in self.options}

    def train(self, data_path, size, **options):
        """-> `data_loader.TrainData`, of images of size = (height, width), which are decoded once and kept in
        `{data_path}/cache/`. options: `trial` and `select`, as far as the data set has them. A test image among the
        training images is an InputError."""
        if self.prepared:
            return self.prepared(data_path, size, **options)
        test = []
        specs = [DATASETS[part] for part in self.parts] or [self]
        for spec, folder in zip(specs, self.folders(data_path), strict=True):
            trials = [options.get("trial", 1)] if "trial" in spec.options else spec.trials
            test += spec.searches(folder, spec.directions, trials).paths.values()
        return listed_train(data_path, self.training(data_path, **options), size, test)

    def check_not_data(self, output, data_path):
        """Raise InputError if a file to be written is there as an image, or is a list or an array of the data set."""
        if os.path.isfile(output) and Path(output).suffix.lower() in image_suffixes():
            raise InputError(f"{output}: is an image; choose another file")
        patterns = (*self.lists, "exp/*.mat", "*.npy", "cache/*.npy", data_manager.DEMO_FILE)
        for top, pattern in itertools.product(self.folders(data_path or self.path), patterns):
            if os.path.realpath(output) in map(os.path.realpath, Path(top).glob(pattern)):
                raise InputError(f"{output}: is a file of the data set; choose another")

    def folders(self, data_path):
        """The folders that have the lists: the data set's own, or in it those of the parts."""
        return [os.path.join(data_path, Path(DATASETS[part].path).name) for part in self.parts] or [data_path]

    def title(self, demo, queries):
        """The name in tables and figures: the data set's own only for as many queries as it has."""
        published = [count for name, count in self.published.items() if name.startswith("queries ")]
        if demo:
            return f"demo data like {self.name}"
        return self.name if queries in published or not published else f"data like {self.name}"


def option_values(flag):
    """All values that an option has in any data set; the first is the flag's default."""
    return tuple(dict.fromkeys(value for dataset in DATASETS.values() for value in dataset.options.get(flag, ())))


def check_options(args):
    """Raise InputError for a flag that has no meaning for --dataset. Flags at their defaults pass."""
    dataset = TRAINING_SETS[args.dataset]
    for flag in dict.fromkeys(flag for other in DATASETS.values() for flag in other.options):
        value = getattr(args, flag, None)
        if value not in (None, option_values(flag)[0], *dataset.options.get(flag, ())):
            names = [other.name for other in DATASETS.values() if value in other.options.get(flag, ())]
            raise InputError(
                f"--{flag} {value}: is an option of {' and '.join(names)}; leave it out with --dataset {args.dataset}"
            )
    if getattr(args, "tvsearch", False) and len(dataset.directions) < 2:
        raise InputError(f"--tvsearch: {dataset.name} is searched from {dataset.directions[0]} only; leave it out")


def training_counts(ids, visible, infrared):
    """Numbers of what is trained on, by name."""
    return {
        "training ids": ids,
        "visible training images": visible,
        "infrared training images": infrared,
        "training images": visible + infrared,
    }


def difference(dataset, counts):
    """The first of some counts that is not as published, in words, or None if all are."""
    published = TRAINING_SETS[dataset].published
    if not published:
        return "nothing is published to compare with"
    for name, count in counts.items():
        if count != published.get(name, count):
            return f"{count:,} {name}, not {published[name]:,} as published"


def fingerprint(dataset, data_path):
    """SHA-256, in hexadecimal, of the lists in a data set's folder and of the names and sizes of the images that its
    first searches test. It tells data sets apart, whatever their folders are called."""
    digest, spec = hashlib.sha256(), TRAINING_SETS[dataset]
    for top, pattern in itertools.product(spec.folders(data_path), spec.lists):
        for file in filter(is_regular, sorted(Path(top).glob(pattern))):
            digest.update(os.fsencode(file.name) + file.read_bytes())
    for paths in spec.searches(data_path).paths.values():
        for path in paths:
            digest.update(os.fsencode(f"{Path(path).relative_to(data_path)} {os.path.getsize(path)}\n"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- searches


class Images(NamedTuple):
    """Some images of one of the lists of a `Searches`, with their identities and cameras [N].

    rows: where they are in the list [N]; of tracks, where their frames are [N, frames].
    """

    modality: str
    rows: np.ndarray
    ids: np.ndarray
    cameras: np.ndarray

    @property
    def shown(self):
        """The row of each image, or of the first frame of each track [N]."""
        return self.rows.reshape(len(self.rows), -1)[:, 0]

    def features(self, features, name):
        """Their rows of one feature [N, C]; of a track, the mean of its frames', of unit length again. features: as
        `engine.run_search` has."""
        found = features[self.modality][name][self.rows]
        return found if found.ndim == 2 else F.normalize(found.mean(dim=1))


class Search(NamedTuple):
    """One search of a protocol; `setting` says which: data set, split, mode, direction, protocol, shots, trial."""

    setting: dict
    query: Images
    gallery: Images

    @property
    def rules(self):
        return DATASETS[self.setting["dataset"]].rules

    def features(self, features, name):
        """The queries' and the gallery's rows of one feature: [Q, C], [G, C], as `Images.features` gives them."""
        return [images.features(features, name) for images in (self.query, self.gallery)]

    def sees(self, rows):
        """Which gallery images the queries of some rows (NumPy) see: bool [n, G], on the CPU."""
        hidden = np.zeros((len(rows), len(self.gallery.ids)), bool)
        if self.rules.not_seen:
            rows = rows[:, None]
            hidden |= self.rules.not_seen(self.query.ids[rows], self.query.cameras[rows], *self.gallery[2:])
        return ~torch.from_numpy(hidden)

    def check_matches(self):
        """Raise InputError when no query has a match that it sees."""
        query, gallery = (np.unique(np.stack(images[2:]), axis=1) for images in (self.query, self.gallery))
        match = query[0][:, None] == gallery[0]
        if self.rules.not_seen:
            match &= ~self.rules.not_seen(*query[:, :, None], *gallery)
        if not match.any():
            raise InputError(
                f"no query has a match in the gallery that it sees ({search_title(self.setting)}; not seen: "
                f"{self.rules.unseen or 'nothing'}); check the ids and the numbers of the cameras"
            )


class Searches:
    """Some searches of a data set, and every image that they need, once: `paths` {modality: list}.

    notes: lines for the user, on what is missing.
    """

    def __init__(self, dataset):
        self.dataset, self.searches, self.notes = dataset, [], []
        self._row = {"visible": {}, "infrared": {}}

    @property
    def paths(self):
        return {modality: list(rows) for modality, rows in self._row.items()}

    def images(self, modality, listing):
        """(paths, ids, cameras) -> Images. Of tracks, paths are lists, as many frames of each."""
        paths, ids, cameras = listing
        row = self._row[modality]
        frames = np.array(paths, object)
        double = [path for path, count in Counter(paths).items() if count > 1] if frames.ndim == 1 else []
        if double:
            self.notes.append(f"warning: {double[0]} is listed and counts several times ({len(double)} such images)")
        rows = [row.setdefault(path, len(row)) for path in frames.flat]
        return Images(modality, np.array(rows).reshape(frames.shape), ids, cameras)

    def add(self, query, gallery, direction, protocol, trial, mode=None, shots=1, split="test"):
        """Append a search. Its setting says what a number means, as plain values for tables and JSON."""
        rules = DATASETS[self.dataset].rules
        setting = {
            "dataset": self.dataset,
            "split": split,
            "mode": mode,
            "direction": direction,
            "protocol": protocol,
            "shots": shots,
            "similarity": "cosine",
            "cmc_counts": "identities" if rules.counts_identities else "images",
            "unseen": rules.unseen,
            "trial": trial,
        }
        self.searches.append(Search(setting, query, gallery))

    def counts(self):
        """Numbers of queries and gallery images, by name."""
        counts = {}
        for search in self.searches:
            setting = search.setting
            counts[f"queries {setting['direction']}"] = len(search.query.ids)
            if setting["mode"]:
                gallery = f"gallery images in {setting['mode']}-search, {setting['shots']}-shot"
                counts[gallery] = len(search.gallery.ids)
        return counts


def search_title(setting):
    """What a search is, in words: "all-search, infrared to visible, seeded protocol, 1-shot"."""
    parts = [f"{setting['mode']}-search"] if setting["mode"] else []
    parts += [setting["direction"], f"{setting['protocol']} protocol"]
    parts += [f"{setting['shots']}-shot"] if setting["shots"] else []
    return ", ".join(parts)


# ----------------------------------------------------------------------- SYSU-MM01, RegDB, LLCM, HITSZ-VCM, BUPTCampus


def sysu_searches(
    data_path, directions=BOTH[1:], trials=TRIALS, mode=("all",), protocol=("seeded",), shots=(1,), select="test"
):
    """SYSU-MM01's searches, one for each protocol, mode, number of shots and trial: all queries in that gallery.

    They are those of `process_query_sysu` and `process_gallery_sysu`, but folders and permutations are read once. The
    official protocol among others is left out, with a note, where its file is missing.
    """
    check_prepared(data_path)
    test = Searches("sysu")
    if len(protocol) > 1 and not (file := data_manager.permutations_file(data_path)).is_file():
        protocol = ("seeded",)
        test.notes.append(f"note: no {file}, so without the official protocol ({data_manager.PERMUTATIONS_SOURCE})")
    query = test.images("infrared", data_manager.process_query_sysu(data_path, split=select))
    identities = data_manager.read_ids(data_path, select)
    folders = {name: data_manager.list_folders(data_path, identities, data_manager.SYSU_VISIBLE[name]) for name in mode}
    official = data_manager.read_permutations(data_path) if "official" in protocol else None
    for direction, draws, name, number, trial in itertools.product(directions, protocol, mode, shots, trials):
        drawn = data_manager.draw_gallery(folders[name], trial, number, official if draws == "official" else None)
        test.add(query, test.images("visible", drawn), direction, draws, trial, name, number, select)
    cameras = {*data_manager.SYSU_INFRARED, *(camera for name in mode for camera in data_manager.SYSU_VISIBLE[name])}
    for search in test.searches:
        cameras.difference_update(search.query.cameras.tolist(), search.gallery.cameras.tolist())
    if cameras:
        numbers = ", ".join(map(str, sorted(cameras)))
        test.notes.append(f"warning: {data_path}: no {select} id has an image of camera {numbers}")
    return test


def sysu_training(data_path):
    splits = data_manager.read_splits(data_path)
    images = data_manager.sysu_training_images(data_path, splits["train"] | splits["val"])
    return {modality: (paths, ids) for modality, (paths, ids, _) in images.items()}


def regdb_training(data_path, trial=1):
    names = [f"train_{modal}_{trial}" for modal in data_manager.REGDB_CAMERAS]
    return {name: data_manager.read_list(data_path, name) for name in names}


def llcm_training(data_path):
    names = [f"train_{name}" for name in data_manager.LLCM_NAMES.values()]
    return {name: data_manager.read_list(data_path, name) for name in names}


def regdb_searches(data_path, directions=("visible to thermal",), trials=(1,)):
    """RegDB's searches, one for each trial and direction. Both directions use the same two lists; each image goes
    through the stream of its modality."""
    test = Searches("regdb")
    for trial in trials:
        images = {
            modal: test.images(modality, data_manager.process_test_regdb(data_path, trial, modal))
            for modal, modality in (("visible", "visible"), ("thermal", "infrared"))
        }
        for direction in directions:
            query, gallery = direction.split(" to ")
            test.add(images[query], images[gallery], direction, "standard", trial, shots=None)
    return test


def llcm_searches(data_path, directions=("visible to infrared",), trials=TRIALS):
    """LLCM's searches, one for each direction and trial: every image of one modality in a gallery of the other."""
    test = Searches("llcm")
    for direction in directions:
        from_modality, to_modality = direction.split(" to ")
        query = test.images(from_modality, data_manager.process_query_llcm(data_path, from_modality))
        folders = data_manager.llcm_folders(data_path, to_modality)
        for trial in trials:
            gallery = test.images(to_modality, data_manager.draw_gallery(folders, trial))
            test.add(query, gallery, direction, "seeded", trial)
    return test


def vcm_training(data_path):
    return data_manager.track_images("train", data_manager.vcm_tracks(data_path, "train")[0])


def vcm_searches(data_path, directions=BOTH[:1], trials=(0,)):
    """HITSZ-VCM's search of each direction: all tracks of one modality among all of the other."""
    tracks, notes = data_manager.vcm_tracks(data_path, "test")
    test = track_searches("vcm", tracks, tracks, directions, trials)
    test.notes += notes
    return test


def bupt_training(data_path):  # without the auxiliary tracks, as M3-ReID
    return data_manager.track_images("train", *data_manager.bupt_tracks(data_path, "train"))


def bupt_searches(data_path, directions=BOTH[:1], trials=(0,)):
    """BUPTCampus's search of each direction: the queries of one modality among the gallery's tracks of the other."""
    tracks = data_manager.bupt_tracks(data_path, "query", "gallery")
    return track_searches("buptcampus", *tracks, directions, trials)


def track_searches(dataset, query, gallery, directions, trials):
    """query, gallery: {modality: tracks}, as `data_manager.by_modality` gives them."""
    test = Searches(dataset)
    for direction, trial in itertools.product(directions, trials):
        images = [test.images(m, of[m]) for m, of in zip(direction.split(" to "), (query, gallery), strict=True)]
        test.add(*images, direction, "standard", trial, shots=None)
    return test


# LLCM's cameras take both modalities. Source: Zhang and Wang, "Diverse Embedding Expansion Network and Low-Light
# Cross-Modality Benchmark for Visible-Infrared Person Re-identification", CVPR 2023.
LLCM_RULES = Rules(
    not_seen=lambda q_pids, q_camids, g_pids, g_camids: (q_pids == g_pids) & (q_camids == g_camids),
    unseen="same identity in the same camera",
    counts_identities=True,
)
TRACK_RULES = LLCM_RULES._replace(counts_identities=False)  # as in MITML's and M3-ReID's eval_metrics.py

DATASETS = {
    "sysu": DataSet(
        name="SYSU-MM01",
        path="../data/SYSU-MM01/",
        directions=("infrared to visible",),
        rules=SYSU_RULES,
        training=sysu_training,
        prepared=sysu_train,
        searches=sysu_searches,
        published=training_counts(395, 22258, 11909)
        | {"queries infrared to visible": 3803}
        | {"gallery images in all-search, 1-shot": 301, "gallery images in all-search, 10-shot": 3010}
        | {"gallery images in indoor-search, 1-shot": 112, "gallery images in indoor-search, 10-shot": 1120},
        options={
            "mode": tuple(data_manager.SYSU_VISIBLE),
            "protocol": data_manager.SYSU_PROTOCOLS,
            "shots": (1, 10),
            "select": ("test", "val"),
        },
    ),
    "regdb": DataSet(
        name="RegDB",
        path="../data/RegDB/",
        directions=("visible to thermal", "thermal to visible"),
        rules=REGDB_RULES,
        training=regdb_training,
        searches=regdb_searches,
        trials=range(1, 11),
        published=training_counts(206, 2060, 2060)
        | {"queries visible to thermal": 2060, "queries thermal to visible": 2060},
        options={"trial": range(1, 11)},
    ),
    "llcm": DataSet(
        name="LLCM",
        path="../data/LLCM/",
        directions=BOTH,
        rules=LLCM_RULES,
        training=llcm_training,
        searches=llcm_searches,
        # Its paper counts 46,767 images, 15,846 of them for the test; L2RW (CVPR 2025) counts each modality.
        published=training_counts(713, 16946, 13975)
        | {"queries visible to infrared": 8680, "queries infrared to visible": 7166},
    ),
    "vcm": DataSet(
        name="HITSZ-VCM",
        path="../data/HITSZ-VCM/",
        directions=BOTH,
        rules=TRACK_RULES,
        training=vcm_training,
        searches=vcm_searches,
        trials=TRIALS[:1],
        # Numbers of tracks by M3-ReID's data/manager.py, twelve frames each for training.
        published=training_counts(500, 12 * 5460, 12 * 4291)
        | {"queries visible to infrared": 5099, "queries infrared to visible": 4584},
        lists=("info/*.txt",),
        tracks=True,
    ),
    "buptcampus": DataSet(
        name="BUPTCampus",
        path="../data/BUPTCampus/",
        directions=BOTH,
        rules=TRACK_RULES,
        training=bupt_training,
        searches=bupt_searches,
        trials=TRIALS[:1],
        # By M3-ReID's data/manager.py. Nobody says how many tracks have fewer than twelve frames.
        published={"training ids": 1074, "queries visible to infrared": 540, "queries infrared to visible": 536},
        lists=("*.txt", "data_paths.json"),
        tracks=True,
    ),
}


def union(*parts):
    """Several data sets as one to train on, as in L2RW (CVPR 2025, github.com/Joey623/L2RW, protocol ES): all images
    together, ids apart, batches of ids from any of them. Its data_path is the folder with their folders. Tests during
    training are those of the first."""
    specs = [DATASETS[part] for part in parts]

    def training(data_path, **options):
        lists, count = [([], []), ([], [])], 0
        for spec, folder in zip(specs, whole.folders(data_path), strict=True):
            found = list(spec.training(folder, **spec.own(**options)).values())
            labels = np.unique(np.concatenate([ids for _, ids in found]), return_inverse=True)[1] + count
            count = labels.max() + 1
            for (paths, ids), (some, _), own in zip(lists, found, np.split(labels, [len(found[0][1])]), strict=True):
                paths += some
                ids += own.tolist()
        trial = "".join(f"_trial_{value}" for value in whole.own(**options).values())
        names = [f"{'+'.join(parts)}{trial}_{modality}" for modality in ("visible", "infrared")]
        return {name: (paths, np.array(ids)) for name, (paths, ids) in zip(names, lists, strict=True)}

    def searches(data_path, directions=specs[0].directions[:1], trials=(1,), **_):
        own = trials if "trial" in specs[0].options else TRIALS[:1]
        return specs[0].searches(whole.folders(data_path)[0], directions, own)

    published = {name: sum(spec.published.get(name, 0) for spec in specs) for name in training_counts(0, 0, 0)}
    trial = {flag: values for spec in specs for flag, values in spec.options.items() if flag == "trial"}
    whole = DataSet(
        name=" + ".join(spec.name for spec in specs),
        path="../data/",
        directions=specs[0].directions,
        rules=specs[0].rules,
        training=training,
        searches=searches,
        published=published,
        options=trial,
        parts=parts,
    )
    return whole


# What can be trained on: a data set, or several of those whose tests are of images.
OF_IMAGES = [name for name, spec in DATASETS.items() if not spec.tracks]
TRAINING_SETS = DATASETS | {
    "+".join(parts): union(*parts) for number in (2, 3) for parts in itertools.combinations(OF_IMAGES, number)
}
