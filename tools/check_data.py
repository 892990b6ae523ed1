"""Check a data set, and the machine, before a long training.

    python -m tools.check_data --dataset sysu --data_path ../data/SYSU-MM01/ --gpu 0

One line for each check: "ok", "note", or "WRONG" with what to do. It reads every image, and changes nothing.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

import data_manager
from core.files import check_output, file_sha256, save_json
from core.images import read_image
from data_loader import check_prepared, sysu_train_files
from datasets import DATASETS, difference, training_counts
from model import ARCHS, CLIP, cache_file, is_intact
from utils import (
    ArgumentParser,
    InputError,
    bounded,
    cli,
    computes_bf16,
    cores,
    map_processes,
    one_line,
    progress,
    select_device,
)

# Of SYSU-MM01's ids, as its authors publish them (train_id.mat, test_id.mat; val: all others with images of both
# modalities), and of their file of permutations: github.com/wuancong/SYSU-MM01.
SYSU_IDS = "d906b78d2b201ce9a950c3602992c9243dfe5f702c548ae58e03eae9da65e018"
SYSU_PERMUTATIONS = "90402382dd587e05b615dcee35637fee9ad61e56e26ac86988a00a43997ac0a7"
DISK = 5 * 2**30  # bytes that checkpoints and logs of a run may take
# Which folder above an image names its person, where lists name them too: 0 for the nearest.
PERSON_FOLDER = {"regdb": 0, "llcm": 0, "vcm": 2, "buptcampus": 2}
SHOWN = 5  # findings of a kind


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="sysu", help="data set")
    parser.add_argument("--data_path", help="folder of the data set (default: by --dataset)")
    parser.add_argument("--arch", choices=ARCHS, default="resnet50", help="backbone of the training")
    parser.add_argument("--model_path", default="save_model/", help="folder of the checkpoints to come")
    parser.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    parser.add_argument("--workers", type=bounded(int, 0), default=cores(), help="reading processes")
    parser.add_argument("--json", metavar="FILE", help="write the lines to this file, too")
    return parser


def main(argv=None):
    """Returns the lines, a list of {"check", "state": "ok", "note" or "WRONG", "text"}. Raises InputError if anything
    is wrong, after the last line."""
    args = get_args_parser().parse_args(argv)
    path, lines = args.data_path or DATASETS[args.dataset].path, []
    if args.json:
        check_output(args.json)
        DATASETS[args.dataset].check_not_data(args.json, path)
    listed = read_lists(args.dataset, path)  # an InputError ends all: without lists there is nothing to check
    checks = [("lists", partial(check_lists, listed)), ("counts", partial(check_counts, args.dataset, path, listed))]
    if args.dataset == "sysu":
        checks += [("ids", partial(check_ids, path)), ("folders", partial(check_folders, path))]
        checks += [("prepared arrays", partial(check_arrays, path, listed))]
    if args.dataset in PERSON_FOLDER:
        checks.append(("people", partial(check_people, listed, PERSON_FOLDER[args.dataset])))
    checks += [("images", partial(check_images, listed, args.workers)), ("device", partial(check_gpu, args.gpu))]
    checks += [("disk", partial(check_disk, args.model_path)), ("weights", partial(check_weights, args.arch))]
    for name, check in checks:
        try:
            state, text = "ok", check()
            if text.startswith("note: "):
                state, text = "note", text.removeprefix("note: ")
        except (InputError, OSError) as error:
            state, text = "WRONG", str(error)
        lines.append({"check": name, "state": state, "text": text})
        print(one_line(f"{state:6}{name}: {text}"), flush=True)
    if args.json:
        save_json(lines, args.json)
    if wrong := [line["check"] for line in lines if line["state"] == "WRONG"]:
        raise InputError(f"{path}: {', '.join(wrong)}: see the lines above")
    return lines


def read_lists(dataset, path):
    """{trial: (training images {name: (paths, ids)}, `Searches` of every protocol)}; without trials, of None."""
    spec = DATASETS[dataset]
    options = {name: spec.options[name] for name in ("mode", "protocol", "shots") if name in spec.options}
    found = {}
    for trial in spec.options.get("trial", (None,)):
        own = {} if trial is None else {"trial": trial}
        read = partial(spec.searches, path, spec.directions, spec.trials if trial is None else [trial])
        try:
            test = read(**options)
        except InputError:
            if "protocol" not in options:
                raise
            # What does not fit the official one, `check_folders` tells.
            test = read(**options | {"protocol": ["seeded"]})
        for search in test.searches:
            search.check_matches()
        found[trial] = spec.training(path, **own), test
    return found


def check_counts(dataset, path, listed):
    for trial, (training, test) in listed.items():
        numbers = [len(paths) for paths, _ in training.values()]
        ids = len(np.unique(np.concatenate([ids for _, ids in training.values()])))
        if found := difference(dataset, training_counts(ids, *numbers) | test.counts()):
            found = found if trial is None else f"trial {trial}: {found}"
            if data_manager.is_demo(path) or not DATASETS[dataset].published:
                return f"note: {found}"
            raise InputError(f"{found}; see docs/data.md, and copy what is missing")
    images = [os.path.relpath(image, path) for paths, _ in training.values() for image in paths]
    cameras = Counter(re.search(r"cam\d+|$", image)[0] for image in images)
    by_camera = ", ".join(f"{name} {count:,}" for name, count in sorted(cameras.items()) if name)
    drawn = " (demo data)" if data_manager.is_demo(path) else ""
    return f"as published{drawn}" + (f"; training images: {by_camera}" if by_camera else "")


def check_ids(path):
    splits = {split: sorted(ids) for split, ids in data_manager.read_splits(path).items()}
    file = data_manager.permutations_file(path)
    if hashlib.sha256(json.dumps(splits).encode()).hexdigest() != SYSU_IDS:
        if data_manager.is_demo(path):
            return "note: demo data has its own"
        raise InputError(f"{path}: exp/*_id.txt list other ids than the published ones; copy exp/ again")
    if not file.is_file():
        return f"note: as published, but no {file}, so no official protocol; {data_manager.PERMUTATIONS_SOURCE}"
    if file_sha256(file) != SYSU_PERMUTATIONS:
        raise InputError(f"{file}: is not the published file; {data_manager.PERMUTATIONS_SOURCE}")
    return "as published, and so are the permutations of the official protocol"


def check_folders(path):
    """Each folder has as many images as the official protocol permutes."""
    if not data_manager.permutations_file(path).is_file():
        return "note: not compared, as there is no exp/rand_perm_cam.mat"
    rows = data_manager.read_permutations(path)
    identities = set().union(*data_manager.read_splits(path).values())
    folders = data_manager.list_folders(path, identities, range(1, 7))
    counts = {(camera, identity): len(files) for identity, camera, files in folders.values()}
    wanted = {key: draws.shape[1] for key, draws in rows.items() if key[1] in identities}
    if other := sorted(key for key in counts.keys() | wanted.keys() if counts.get(key, 0) != wanted.get(key, 0)):
        (camera, identity), more = other[0], f" ({len(other)} such folders)" if len(other) > 1 else ""
        found, listed = counts.get(other[0], 0), wanted.get(other[0], 0)
        folder = f"{path}/cam{camera}/{identity:04d}"
        raise InputError(f"{folder}: has {found} images, exp/rand_perm_cam.mat counts {listed}{more}; copy it again")
    return f"{len(counts):,}, each with as many images as exp/rand_perm_cam.mat counts"


def check_arrays(path, listed):
    files, remedy = sysu_train_files(path), f"run: python pre_process_sysu.py --data_path {path}"
    *needed, _ = files  # older versions wrote no ids
    if not any(file.exists() for file in files):
        return f"note: none yet; {remedy}"
    if missing := [file for file in needed if not file.exists()]:
        raise InputError(f"{missing[0]}: is missing, but others are there; {remedy}")
    check_prepared(path)
    prepared = min(file.stat().st_mtime for file in needed)
    ((training, _),) = listed.values()
    for (paths, _), labels in zip(training.values(), needed[1::2], strict=True):
        if len(paths) != (count := len(np.load(labels, mmap_mode="r"))):
            raise InputError(f"{labels}: {count} images are prepared, but {len(paths)} are in the folders; {remedy}")
        if later := [image for image in paths if Path(image).stat().st_mtime > prepared]:
            raise InputError(f"{needed[0]}: is older than {later[0]}; {remedy}")
    return "of these people and numbers of images, and newer than the images"


def check_lists(listed):
    """No list has an image or track twice, and none of the training one of the test."""
    for training, test in listed.values():
        tested = {image for paths in test.paths.values() for image in paths}
        for images in (images for search in test.searches for images in (search.query, search.gallery)):
            rows, counts = np.unique(images.rows, axis=0, return_counts=True)
            if counts[most := counts.argmax()] > 1:
                image = test.paths[images.modality][np.ravel(rows[most])[0]]
                raise InputError(f"{image}: is listed {counts[most]} times for one test; list it once")
        if both := set.intersection(*map(set, test.paths.values())):
            raise InputError(f"{min(both)}: is listed for the test in both modalities; take it out of one")
        trained = Counter(itertools.chain(*(paths for paths, _ in training.values())))
        image, count = trained.most_common(1)[0]
        if count > 1:
            raise InputError(f"{image}: is listed {count} times for training; list it once")
        if both := tested & trained.keys():
            raise InputError(f"{min(both)}: is listed for training and for the test; take it out of one")
    notes = dict.fromkeys(note.partition(": ")[2] for _, test in listed.values() for note in test.notes)
    return f"note: {'; '.join(notes)}" if notes else "no image is there twice, or for training and for the test"


def people_of(listed):
    """{image: {(trial, "training" or "test"): ids}}: each list numbers its own people."""
    people = defaultdict(lambda: defaultdict(set))
    for trial, (training, test) in listed.items():
        for paths, ids in training.values():
            for image, identity in zip(paths, ids.tolist(), strict=True):
                people[image][trial, "training"].add(identity)
        paths = test.paths
        for images in (images for search in test.searches for images in (search.query, search.gallery)):
            for rows, identity in zip(images.rows.tolist(), images.ids.tolist(), strict=True):
                for row in np.ravel(rows):
                    people[paths[images.modality][row]][trial, "test"].add(identity)
    return people


def check_people(listed, level):
    """A person's folders have one name in both modalities, and the lists pair these, and no others."""
    folders = {}
    for image, places in sorted(people_of(listed).items()):
        name = Path(image).parts[-2 - level :][0]
        for place, identity in ((place, identity) for place, ids in places.items() for identity in sorted(ids)):
            for known, value in (((*place, identity), name), ((*place, f"folder {name}"), identity)):
                if folders.setdefault(known, value) != value:
                    trial, part, _ = known
                    of = f"{identity} ({part if trial is None else f'{part}, trial {trial}'})"
                    raise InputError(f"{image}: is of id {of}, unlike others of this id or folder; copy the lists")
    return "the lists pair folders of one name"


def check_images(listed, workers):
    """All can be read; no two people have the same one, nor have training and test."""
    people = people_of(listed)
    same, unreadable = defaultdict(list), []
    with map_processes(read_and_hash, sorted(people), workers) as done:
        for image, digest, error in progress(done, total=len(people), desc="images", unit="img"):
            unreadable += [error] if error else []
            same[digest].append(image)
    if unreadable:
        raise InputError(f"{len(unreadable)} cannot be read: {'; '.join(unreadable[:SHOWN])}")
    double, found = [images for images in same.values() if len(images) > 1], defaultdict(list)
    for images in double:
        ids = defaultdict(set)
        for place, some in (item for image in images for item in people[image].items()):
            ids[place] |= some
        if any(len(several) > 1 for several in ids.values()):
            found["two people"].append(images)
        elif any((trial, "training") in ids and (trial, "test") in ids for trial in listed):
            found["training and test"].append(images)
    for problem, groups in found.items():
        pairs = "; ".join(" = ".join(images[:2]) for images in groups[:SHOWN])
        raise InputError(f"{len(groups)} files of {problem} are the same: {pairs}; keep the right one")
    return f"{len(people):,}, all can be read" + (f"; {len(double)} are there twice, of one person" if double else "")


def read_and_hash(image):
    """-> (image, digest of the file, or None, what is wrong with it, or None)"""
    try:
        read_image(image, (8, 4))
        return image, file_sha256(image), None
    except InputError as error:
        return image, None, str(error)


def check_gpu(gpu):
    device = select_device(gpu)
    if device.type == "cpu":
        return "note: a training on the CPU is for small images and few people"
    properties = torch.cuda.get_device_properties(device)
    bf16 = "computes in bfloat16" if computes_bf16(device) else "does not compute in bfloat16: leave out --amp bf16"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"


def check_disk(model_path):
    folder = Path(model_path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; choose another --model_path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: may not be written; correct its permissions, or choose another --model_path")
    free = shutil.disk_usage(folder).free
    if free < DISK:
        raise InputError(f"{model_path}: {free / 2**30:.1f} GiB are free; a run may take {DISK / 2**30:.0f}: make room")
    return f"{free / 2**30:.0f} GiB are free for {model_path}"


def check_weights(arch):
    if arch.startswith(CLIP):
        return f"note: {arch} starts from a file of CLIP's: --weights FILE"
    source = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    if (file := cache_file(source)).exists():
        if not is_intact(file, source):
            raise InputError(f"{file}: is damaged; delete it, and the next training downloads it again")
        return f"of {arch}, are here"
    return f"note: --weights imagenet, the default, downloads {source.url}; without internet, pass it: --weights FILE"


if __name__ == "__main__":
    cli(main)
