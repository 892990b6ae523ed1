"""An index of image features on disk: a folder of a FAISS file with the vectors and `index.json`, which names that file
and knows each vector's image. Exact, or in inverted lists. Nothing in it is executed."""

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

# Inverted lists: about LISTS * sqrt(N) of them, their centres learned from SAMPLE vectors a list. A search looks into
# one of PROBED lists, and into LEAST at least (`nprobe`, which the FAISS file holds).
LISTS, SAMPLE, PROBED, LEAST = 4, 64, 16, 8
BLOCK = 100_000  # vectors that move from one FAISS index to another at a time
# Several queries at once by matrix products: at 100 of them 16 times as fast as FAISS' own choice, row by row.
faiss.cvar.distance_compute_blas_threshold = 1024

VECTORS = r"index\.\d+\.faiss"
FIELDS = {  # of index.json
    "folder": str,  # absolute
    "modality": str,
    "feature": str,
    "image_size": list,  # height, width
    "dim": int,  # C
    "checkpoint": str,  # absolute path, at the time
    "sha256": str,  # of the checkpoint; what decides
    "vectors": str,  # name of the FAISS file
    "bytes": int,  # its size
    "images": dict,  # path below the folder: [size, mtime_ns]; in the order of the vectors
}


def read_about(folder):
    """`index.json` of an index: a dict with FIELDS. InputError if it is missing, damaged or another program's."""
    file = Path(folder) / "index.json"
    if not file.is_file():
        raise InputError(f"{folder}: no index.json there; make an index with python -m tools.search index")
    try:
        about = json.loads(file.read_text())
        whole = all(isinstance(about[name], kind) for name, kind in FIELDS.items())
        whole = whole and re.fullmatch(VECTORS, about["vectors"]) and about["modality"] in MODALITIES
        whole = whole and not any(os.path.isabs(path) or ".." in Path(path).parts for path in about["images"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{file}: damaged, or of another program; remove it and its .faiss file, and index anew")
    return about


def read_index(folder, mapped=True):
    """An index -> (dict with FIELDS, faiss.IndexFlatIP or IndexIVFFlat of its vectors). Nothing in it is executed.

    mapped: leave the vectors in their file, which processes that search at the same time share. InputError: as
    `read_about`, and for vectors that do not fit.
    """
    about = read_about(folder)
    file = Path(folder) / about["vectors"]
    try:
        if file.stat().st_size != about["bytes"]:
            raise ValueError("cut off")
        with file.open("rb") as start:
            if start.read(4) not in (b"IxFI", b"IwFl"):  # what FAISS calls flat and inverted
                raise ValueError("of another kind")
        vectors = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        has = vectors.ntotal, vectors.d, vectors.metric_type
        if has != (len(about["images"]), about["dim"], faiss.METRIC_INNER_PRODUCT):
            raise ValueError(f"{vectors.ntotal} of {vectors.d} values")
        if isinstance(vectors, faiss.IndexIVF):
            _check_lists(vectors)
    except Exception as error:  # FAISS raises RuntimeError for anything
        if read_about(folder)["vectors"] != about["vectors"]:
            return read_index(folder, mapped)  # it was replaced meanwhile
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{file}: does not hold the {len(about['images'])} vectors of the index.json beside it ({reason}); "
            "remove both, and index anew"
        ) from error
    return about, vectors


def _check_lists(vectors):
    """Raise ValueError for what `arrange` does not make: lists in other files, say, which adding would write to."""
    quantizer, lists = faiss.downcast_index(vectors.quantizer), faiss.downcast_InvertedLists(vectors.invlists)
    if type(quantizer) is not faiss.IndexFlatIP or type(lists) is not faiss.ArrayInvertedLists:
        raise ValueError("of another kind")
    for i in range(vectors.nlist):
        ids = faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i))
        if len(ids) and not (ids.min() >= 0 and ids.max() < vectors.ntotal):
            raise ValueError("damaged")


def save_index(folder, about, vectors):
    """Write both files; until the second, index.json, is in place, the old index is whole, and then the new one.

    Sets `vectors` and `bytes` of `about`.
    """
    folder, before = Path(folder), about.get("vectors", "index.0.faiss")
    about["vectors"] = f"index.{int(before.split('.')[1]) + 1}.faiss"
    with atomic(folder / about["vectors"]) as temporary, temporary.open("wb") as file:
        faiss.write_index(vectors, faiss.PyCallbackIOWriter(file.write, 2**24))
        about["bytes"] = file.tell()
    with atomic(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(about))  # not indented, as others: of millions of images that takes minutes
    for other in folder.iterdir():  # and what killed runs have left
        if other.name != about["vectors"] and re.fullmatch(rf"{VECTORS}|\.{VECTORS}\..*", other.name):
            other.unlink()


def drop_rows(vectors, kept):
    """Remove the rows of a FAISS index where kept, bool [N], is False; the others close up, in their order."""
    vectors.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(~kept)))
    if isinstance(vectors, faiss.IndexIVF):  # its lists name the rows, and did not close up
        row = kept.cumsum() - 1
        for i in range(vectors.nlist):
            ids = faiss.rev_swig_ptr(vectors.invlists.get_ids(i), vectors.invlists.list_size(i))
            ids[:] = row[ids]


def arrange(vectors):
    """The same vectors in inverted lists, as many as suit their number: a FAISS index, `vectors` itself where that has
    between half and twice as many."""
    count, had = vectors.ntotal, vectors.nlist if isinstance(vectors, faiss.IndexIVF) else 0
    lists = max(1, min(int(LISTS * math.sqrt(count)), count // 39))  # 39 vectors a list: what FAISS asks for
    if lists / 2 <= had <= 2 * lists:
        return vectors
    if had:
        vectors.make_direct_map()  # to read rows
    arranged = faiss.index_factory(vectors.d, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    arranged.cp.min_points_per_centroid, arranged.cp.max_points_per_centroid = 1, SAMPLE
    sample = np.random.default_rng(0).choice(count, min(count, SAMPLE * lists), replace=False)
    arranged.train(vectors.reconstruct_batch(np.sort(sample)))
    arranged.nprobe = min(lists, max(LEAST, math.ceil(lists / PROBED)))
    for start in progress(range(0, count, BLOCK), desc="arranging", unit="block", leave=False):
        arranged.add(vectors.reconstruct_n(start, min(BLOCK, count - start)))
    return arranged
