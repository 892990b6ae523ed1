"""Searches an index."""

import itertools
import os

import numpy as np

from testing.re_rank import k_reciprocal
from testing.verification import least_similarity
from tools.search.address import open_index
from tools.search.index import REPLACED, Filter
from tools.search.indexer import file_stamp, load_embedder
from tools.search.labels import parse_time
from utils import InputError

RERANKED = 100  # so many of the nearest images are ordered anew


class Finder:
    """An open index: finder(image files, modality, top) -> for each file a list of dicts, best first.

    Each has "rank", "similarity", the fields of `Entry`, and "changed": the file differs from the one that was indexed,
    or is missing. about: the version of the index. least: the similarity from which on images are taken for the same
    person, -1 without `--min_similarity` and `--false_positives`.
    """

    def __init__(self, args):
        self.index = open_index(args.index)
        self.about = next(iter(self.index.versions()), None)
        if not (self.about and self.counts("modality")):
            raise InputError(f"{args.index}: contains no image; fill it with python -m tools.search index")
        self.embedder = load_embedder(args, self.about, args.index)
        if (self.embedder.sha256, self.embedder.dim) != (self.about["sha256"], self.about["dim"]):
            raise InputError(
                f"{self.embedder.path}: is not the checkpoint that made {args.index}; pass {self.about['checkpoint']} "
                f"(sha256 {self.about['sha256'][:12]}...) with --resume, or index with the new one"
            )
        self.least = self._least(args)

    def _least(self, args):
        share, file = args.false_positives, args.calibration
        if (share is None) != (file is None):
            raise InputError("--false_positives and --calibration belong together; pass both, or --min_similarity")
        if share is not None:
            return least_similarity(file, share, self.about["sha256"], self.about["feature"])
        return -1 if args.min_similarity is None else args.min_similarity

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
                raise InputError(f"--camera {name}: {self.index.uri} has no image of it; its cameras: {known}")
        first = parse_time(start, "--from") if start else None
        last = parse_time(end, "--to", end=True) if end else None
        if first and last and first >= last:
            raise InputError(f"--from {start}: is not before --to {end}; exchange them")
        return Filter(modality or None, tuple(camera), first, last, folder or None)

    def __call__(self, images, modality, top, page=1, where=Filter(), combine=None, rerank=False, group=False):  # noqa: B008
        """page: of `top` images. where: a Filter. combine: all files show one person, which their "mean" feature or
        the "best" of them finds. rerank: order the first RERANKED anew. group: each known person once."""
        if self.index.versions()[0]["version"] != self.about["version"]:
            raise InputError(f"{self.index.uri}: {REPLACED}; start again")
        queries, need = self.embedder(images, modality), top * page
        if combine == "mean":
            queries = queries.mean(axis=0, keepdims=True)
            queries /= np.linalg.norm(queries)
        count = max(need, RERANKED) if rerank else need
        while True:
            lists = self.index.search(self.about["version"], queries, count, where)
            whole = min(map(len, lists)) < count  # there are no more
            sets = [queries[row : row + 1] for row in range(len(queries))]
            if combine == "best":
                lists, sets = [best_of(lists)[:count]], [queries]
            if rerank:
                lists = [self._reranked(*pair) for pair in zip(lists, sets, strict=True)]
            lists = [grouped(found) for found in lists] if group else lists
            if whole or min(map(len, lists)) >= need:
                break
            count *= 4
        if not lists[0]:
            raise InputError(f"{self.index.uri}: none of its images fits all filters; leave one out")
        return [
            [self._result(rank, found[rank - 1]) for rank in range(need - top + 1, min(need, len(found)) + 1)]
            for found in lists
        ]

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

    def _result(self, rank, image):
        stamp = image["stamp"]
        try:
            changed = file_stamp(os.stat(image["path"])) != stamp
        except OSError:
            changed = True
        return {"rank": rank, **image, "changed": changed}


def best_of(lists):
    """The images of several queries, each once with its greatest similarity, best first."""
    best = {}
    for image in itertools.chain(*lists):
        best[image["id"]] = max(image, best.get(image["id"], image), key=lambda image: image["similarity"])
    return sorted(best.values(), key=lambda image: -image["similarity"])


def grouped(found):
    """The first image of each known person, and the images of unknown ones."""
    first = {}
    for image in found:
        first.setdefault(image["person"] or image["id"], image)
    return list(first.values())


def describe(image):
    """What is known of one of `Finder`'s images, in words."""
    person = f"person {image['person']}" if image["person"] else ""
    camera = f"camera {image['camera']}" if image["camera"] else ""
    changed = "(changed since it was indexed)" if image["changed"] else ""
    return ", ".join(filter(None, (camera, person, image["time"], changed)))
