"""An index of image features on disk: a folder with the vectors in a FAISS file, exact or in inverted lists, and
`index.json`, which names that file and the image of each vector. Loading an index executes nothing in it."""

import json
import math
import os
import re
from pathlib import Path

import faiss
import numpy as np

from core.files import atomic
from model import MODALITIES
from utils import InputError, progress

# Inverted lists: about LISTS * sqrt(N) of them, with centres learned from SAMPLE vectors per list. A search probes one
# list of PROBED, at least LEAST (`nprobe`, which the FAISS file holds).
LISTS, SAMPLE, PROBED, LEAST = 4, 64, 16, 8
BLOCK = 100_000  # vectors copied at a time from one FAISS index to another
# Several queries at once use matrix products: 100 are then 16 times as fast as row by row, FAISS's own choice.
faiss.cvar.distance_compute_blas_threshold = 1024

VECTORS = r"index\.\d+\.faiss"
FIELDS = {  # of index.json
    "folder": str,  # absolute
    "modality": str,
    "feature": str,
    "image_size": list,  # height, width
    "dim": int,  # C
    "checkpoint": str,  # absolute path when the index was made
    "sha256": str,  # of the checkpoint; identifies it
    "vectors": str,  # name of the FAISS file
    "bytes": int,  # its size
    "images": dict,  # path below the folder: [size, mtime_ns]; in the order of the vectors
}


def read_about(folder):
    """`index.json` of an index: a dict with FIELDS. InputError if it is missing, damaged or not ours."""
    file = Path(folder) / "index.json"
    if not file.is_file():
        raise InputError(f"{folder}: contains no index.json; make an index with python -m tools.search index")
    try:
        about = json.loads(file.read_text())
        whole = all(isinstance(about[name], kind) for name, kind in FIELDS.items())
        whole = whole and re.fullmatch(VECTORS, about["vectors"]) and about["modality"] in MODALITIES
        whole = whole and not any(os.path.isabs(path) or ".." in Path(path).parts for path in about["images"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(
            f"{file}: damaged, or written by another program; remove it and its .faiss file, and make a new index"
        )
    return about


def read_index(folder, mapped=True):
    """An index -> (dict with FIELDS, faiss.IndexFlatIP or IndexIVFFlat of its vectors).

    mapped: leave the vectors in their file, which processes share. Raises InputError as `read_about`, and for vectors
    that do not fit.
    """
    about = read_about(folder)
    file = Path(folder) / about["vectors"]
    try:
        if file.stat().st_size != about["bytes"]:
            raise ValueError("the file is cut off")
        with file.open("rb") as start:
            if start.read(4) not in (b"IxFI", b"IwFl"):  # what FAISS calls flat and inverted
                raise ValueError("it is of another kind")
        vectors = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        if (vectors.ntotal, vectors.d, vectors.metric_type) != (
            len(about["images"]),
            about["dim"],
            faiss.METRIC_INNER_PRODUCT,
        ):
            raise ValueError(f"it holds {vectors.ntotal} of {vectors.d} values")
        if isinstance(vectors, faiss.IndexIVF):
            _check_lists(vectors)
    except Exception as error:  # FAISS raises RuntimeError for anything
        if read_about(folder)["vectors"] != about["vectors"]:
            return read_index(folder, mapped)  # another process has replaced the index
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{file}: does not hold the {len(about['images'])} vectors of the index.json beside it ({reason}); "
            "remove both, and make a new index"
        ) from error
    return about, vectors


def _check_lists(vectors):
    """Raise ValueError for an index that `arrange` does not make, such as lists in other files, which adding vectors
    would overwrite."""
    quantizer, lists = faiss.downcast_index(vectors.quantizer), faiss.downcast_InvertedLists(vectors.invlists)
    if type(quantizer) is not faiss.IndexFlatIP or type(lists) is not faiss.ArrayInvertedLists:
        raise ValueError("it is of another kind")
    for i in range(vectors.nlist):
        ids = faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i))
        if len(ids) and not (ids.min() >= 0 and ids.max() < vectors.ntotal):
            raise ValueError("it is damaged")


def save_index(folder, about, vectors):
    """Write both files, index.json last: until it is in place, the old index stays intact.

    Sets `vectors` and `bytes` of `about`.
    """
    folder, before = Path(folder), about.get("vectors", "index.0.faiss")
    about["vectors"] = f"index.{int(before.split('.')[1]) + 1}.faiss"
    with atomic(folder / about["vectors"]) as temporary, temporary.open("wb") as file:
        faiss.write_index(vectors, faiss.PyCallbackIOWriter(file.write, 2**24))
        about["bytes"] = file.tell()
    with atomic(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(about))  # no indentation: for millions of images it takes minutes
    for other in folder.iterdir():  # also what killed runs have left
        if other.name != about["vectors"] and re.fullmatch(rf"{VECTORS}|\.{VECTORS}\..*", other.name):
            other.unlink()


def drop_rows(vectors, kept):
    """Remove the rows of a FAISS index where kept, bool [N], is False; the others close up in order."""
    vectors.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(~kept)))
    if isinstance(vectors, faiss.IndexIVF):  # FAISS leaves the row numbers in its lists as they were
        row = kept.cumsum() - 1
        for i in range(vectors.nlist):
            ids = faiss.rev_swig_ptr(vectors.invlists.get_ids(i), vectors.invlists.list_size(i))
            ids[:] = row[ids]


def arrange(vectors):
    """The same vectors in a suitable number of inverted lists: a FAISS index; `vectors` itself if it has between half
    and twice as many."""
    count, current = vectors.ntotal, vectors.nlist if isinstance(vectors, faiss.IndexIVF) else 0
    lists = max(1, min(int(LISTS * math.sqrt(count)), count // 39))  # FAISS asks for 39 vectors per list
    if lists / 2 <= current <= 2 * lists:
        return vectors
    if current:
        vectors.make_direct_map()  # to read rows
    arranged = faiss.index_factory(vectors.d, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    arranged.cp.min_points_per_centroid, arranged.cp.max_points_per_centroid = 1, SAMPLE
    sample = np.random.default_rng(0).choice(count, min(count, SAMPLE * lists), replace=False)
    arranged.train(vectors.reconstruct_batch(np.sort(sample)))
    arranged.nprobe = min(lists, max(LEAST, math.ceil(lists / PROBED)))
    for start in progress(range(0, count, BLOCK), desc="arranging", unit="block", leave=False):
        arranged.add(vectors.reconstruct_n(start, min(BLOCK, count - start)))
    return arranged
