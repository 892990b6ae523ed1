"""Searches an index."""

import itertools
import os
from operator import itemgetter

import numpy as np

from testing.re_rank import k_reciprocal
from testing.verification import least_similarity
from tools.search.address import open_index
from tools.search.index import REPLACED, Filter, track_key
from tools.search.indexer import file_stamp, load_embedder
from tools.search.labels import parse_time
from utils import InputError

EMPTY = "contains no image; fill it with python -m tools.search index"
RERANKED = 100  # so many of the nearest images are ordered anew
STRIP = 6  # images that stand for a track


class Finder:
    """An open index: finder(image files, modality, top) -> for each file a list of dicts, best first.

    Each has "rank", "similarity", the fields of `Entry`, and "changed": the file differs from the one that was indexed,
    or is missing. A track has these of its most similar image, and "images": their number, "first" and "last": times,
    and "strip": at most STRIP of them, spaced evenly. about: the version of the index. least: the similarity from which
    on images are taken for the same person, -1 without `--min_similarity` and `--false_positives`.
    """

    def __init__(self, args):
        self.index = open_index(args.index)
        self.about = next(iter(self.index.versions()), None)
        if not (self.about and self.counts("modality")):
            raise InputError(f"{args.index}: {EMPTY}")
        self.embedder = load_embedder(args, self.about, args.index)
        if (self.embedder.sha256, self.embedder.dim) != (self.about["sha256"], self.about["dim"]):
            raise InputError(
                f"{self.embedder.path}: is not the checkpoint that made {args.index}; pass {self.about['checkpoint']} "
                f"(sha256 {self.about['sha256'][:12]}...) with --resume, or index with the new one"
            )
        self.least = least_similarity_of(args, self.about)

    def counts(self, column):
        """{value of a column: number of images}."""
        return self.index.counts(self.about["version"], column)

    def read_filter(self, camera=(), modality=None, start=None, end=None, folder=None):
        """The values of the flags that choose images -> Filter. InputError for one that fits no image. folder: absolute
        and without links, as paths of the index; it is only compared."""
        cameras = self.counts("camera")
        for name in camera:
            if name not in cameras:
                known = ", ".join(filter(None, cameras)) or "none; index again with --pattern or --csv"
                raise InputError(f"--camera {name}: {self.index.uri} has no image of it; its cameras: {known:.300}")
        first = parse_time(start, "--from") if start else None
        last = parse_time(end, "--to", end=True) if end else None
        if first and last and first >= last:
            raise InputError(f"--from {start} --to {end}: leave no time between; exchange them")
        return Filter(modality or None, tuple(camera), first, last, folder or None)

    def __call__(self, images, modality, top, page=1, where=Filter(), combine=None, rerank=False, group=None):  # noqa: B008
        """page: of `top` images. where: a Filter. combine: all files show one person, which their "mean" feature or
        the "best" of them finds. rerank: order the first RERANKED anew. group: show each known "person" once; or tracks
        in place of images, by the "mean" feature or the "best" of those images of a track that the Filter leaves."""
        by_mean, tracks = group == "mean", group in ("mean", "best")
        if by_mean and rerank:
            raise InputError("--rerank orders images, not means of tracks; pass --tracks best, or leave it out")
        if self.index.versions()[0]["version"] != self.about["version"]:
            raise InputError(f"{self.index.uri}: {REPLACED}; start again")
        queries, need = self.embedder(images, modality), top * page
        if combine == "mean":
            queries = unit_mean(queries)
        count = max(need, RERANKED) if rerank else need
        search = self.index.search_tracks if by_mean else self.index.search
        while True:
            lists = search(self.about["version"], queries, count, where)
            whole = min(map(len, lists)) < count  # there are no more
            sets = [queries[row : row + 1] for row in range(len(queries))]
            if combine == "best":
                lists, sets = [best_of(lists, track_key if by_mean else itemgetter("id"))[:count]], [queries]
            if rerank:
                lists = [self._reranked(*pair) for pair in zip(lists, sets, strict=True)]
            if group:
                # Images of unknown people are of a person each.
                key = track_key if tracks else lambda image: image["person"] or image["id"]
                lists = [grouped(found, key) for found in lists]
            if whole or min(map(len, lists)) >= need:
                break
            count *= 4
        if not lists[0]:
            problem = "none of its images fits all filters; leave one out" if self.counts("modality") else EMPTY
            raise InputError(f"{self.index.uri}: {problem}")
        lists = [
            [{"rank": rank, **compared(image)} for rank, image in enumerate(found[need - top : need], need - top + 1)]
            for found in lists
        ]
        if tracks:
            members = self.index.members(self.about["version"], {*map(track_key, itertools.chain(*lists))}, where)
            # Another process may have removed them meanwhile.
            lists = [[image | track_facts(members[track_key(image)] or [image]) for image in found] for found in lists]
        return lists

    def _reranked(self, found, queries):
        if not found:
            return found
        vectors = self.index.vectors([image["id"] for image in found[:RERANKED]])
        first = [image for image in found[:RERANKED] if image["id"] in vectors]  # another process may remove some
        if not first:
            return found
        vectors = np.stack([vectors[image["id"]] for image in first])
        order = np.argsort(k_reciprocal(queries, vectors).min(axis=0), kind="stable")
        return [first[row] for row in order] + found[RERANKED:]


def least_similarity_of(args, about):
    """The value of the flags that say which similarity is enough, or -1. about: "sha256" of the checkpoint and
    "feature"."""
    share, file = args.false_positives, args.calibration
    if (share is None) != (file is None):
        raise InputError("--false_positives and --calibration belong together; pass both, or --min_similarity")
    if share is not None:
        return least_similarity(file, share, about["sha256"], about["feature"])
    return -1 if args.min_similarity is None else args.min_similarity


def unit_mean(features):
    """Features [N, C] -> the direction of their mean [1, C]."""
    mean = features.mean(axis=0, keepdims=True)
    return mean / np.linalg.norm(mean)


def compared(image):
    """An image of an index with "changed", by a look at its file."""
    try:
        changed = file_stamp(os.stat(image["path"])) != image["stamp"]
    except OSError:
        changed = True
    return image | {"changed": changed}


def track_facts(images):
    """What `Finder` says of a track. images: in the order of time."""
    places = np.linspace(0, len(images) - 1, min(STRIP, len(images))).round().astype(int)
    strip = [compared(images[place]) for place in places]
    return {"images": len(images), "first": images[0]["time"], "last": images[-1]["time"], "strip": strip}


def best_of(lists, key):
    """The images of several queries, each key once with its greatest similarity, best first."""
    best = {}
    for image in itertools.chain(*lists):
        best[key(image)] = max(image, best.get(key(image), image), key=itemgetter("similarity"))
    return sorted(best.values(), key=lambda image: -image["similarity"])


def grouped(found, key):
    """The first image of each key."""
    first = {}
    for image in found:
        first.setdefault(key(image), image)
    return list(first.values())


def describe(image):
    """What is known of one of `Finder`'s images or tracks, in words."""
    person = f"person {image['person']}" if image["person"] else ""
    camera = f"camera {image['camera']}" if image["camera"] else ""
    track = f"track {image['track'].partition('//')[2]}" if image["track"] else ""
    count, time = "", image["time"]
    if "images" in image:
        count = f"{image['images']} image{'s' * (image['images'] > 1)}"
        last = image["last"].removeprefix(image["first"][:11])  # without a date that is there already
        time = image["first"] + (f" to {last}" if image["last"] != image["first"] else "")
    changed = "(changed since it was indexed)" if image["changed"] else ""
    return ", ".join(filter(None, (camera, person, track, count, time, changed)))
