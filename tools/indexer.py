"""Builds and updates the index of a folder of images, and searches it."""

import os
import stat
import time
from pathlib import Path

import faiss
import numpy as np
from PIL import Image

from core.images import FORMATS
from core.run import run_lock
from tools.embedder import Embedder
from tools.index import arrange, drop_rows, read_index, save_index
from utils import InputError

SAVE_MINUTES = 15  # between two saves while an index is built


def index_folder(args):
    """Returns {"embedded", "changed", "vanished", "images": counts, "unreadable": lines}."""
    folder, out = Path(args.folder).resolve(), Path(args.out)
    if not folder.is_dir():
        raise InputError(f"{args.folder}: no such folder; pass a folder of images")
    with run_lock(out / "index.json", "another --out"):
        about, vectors = {}, None
        if (out / "index.json").exists():
            about, vectors = read_index(out, mapped=False)
        elif not (args.resume and args.modality):
            raise InputError(f"{out}: there is no index yet; pass --resume and --modality to make one")
        embedder = indexing_embedder(args, about, folder)
        files, unreadable = folder_images(folder, about)
        images = about.get("images", {})
        kept = np.array([files.get(path) == stamp for path, stamp in images.items()], bool)
        changed = sum(path in files for path, keep in zip(images, kept, strict=True) if not keep)
        vanished = int((~kept).sum()) - changed
        if len(kept) and not kept.any() and str(folder) != about["folder"]:
            raise InputError(
                f"{folder}: contains no image of {out}, which was made from {about['folder']}; that folder no longer "
                "exists: pass its new location"
            )
        if vectors is None:
            vectors = faiss.IndexFlatIP(embedder.dim)
        elif not kept.all():
            drop_rows(vectors, kept)
            images = {path: images[path] for path, keep in zip(images, kept, strict=True) if keep}
        before = about.get("folder"), about.get("checkpoint")
        about |= {"folder": str(folder), "modality": args.modality or about.get("modality"), "images": images}
        about |= {"feature": embedder.feature, "image_size": list(embedder.size), "dim": embedder.dim}
        # An .onnx file embeds one modality only; the index remembers a checkpoint while there is one.
        if len(embedder.modalities) > 1 or not os.path.isfile(about.get("checkpoint", "")):
            about |= {"checkpoint": str(embedder.path.resolve()), "sha256": embedder.sha256}

        embedded = add_images(embedder, files, about, vectors, out, unreadable)
        arranged = arrange(vectors) if args.ivf or isinstance(vectors, faiss.IndexIVF) else vectors
        moved = before != (about["folder"], about["checkpoint"])
        if embedded or not kept.all() or arranged is not vectors or moved:
            save_index(out, about, arranged)
    counts = {"embedded": embedded, "changed": changed, "vanished": vanished, "images": len(images)}
    return counts | {"unreadable": unreadable}


def add_images(embedder, files, about, vectors, out, unreadable):
    """Embed the files that the index lacks, and save it every SAVE_MINUTES -> their number."""
    folder, images = Path(about["folder"]), about["images"]
    new = [path for path in files if path not in images]
    embedded, due = 0, time.monotonic() + 60 * SAVE_MINUTES
    for rows, features, failed in embedder.batches([str(folder / path) for path in new], about["modality"]):
        vectors.add(features)
        images |= {new[row]: files[new[row]] for row in rows}
        unreadable += failed
        embedded += len(rows)
        if time.monotonic() > due:
            save_index(out, about, vectors)
            due = time.monotonic() + 60 * SAVE_MINUTES
    if not images:
        raise InputError(f"{folder}: none of its {len(files)} images can be read: {unreadable[0]}")
    return embedded


def indexing_embedder(args, about, folder):
    """The network for a new index (about is empty) or an old one. InputError for flags that do not fit the old one."""
    if not about:
        return Embedder(args.resume, args.feature or "FC", args.gpu, args.batch, args.workers)
    for name in ("modality", "feature"):
        if getattr(args, name) not in (None, about[name]):
            raise InputError(
                f"--{name} {getattr(args, name)}: {args.out} was made with --{name} {about[name]}; choose another --out"
            )
    if str(folder) != about["folder"] and os.path.isdir(about["folder"]):  # else it was moved
        raise InputError(f"{folder}: {args.out} was made from {about['folder']}; choose another --out")
    return index_embedder(args, about, args.out)


def index_embedder(args, about, index):
    """The network that made an index, from --resume or from where it was."""
    path = args.resume or about["checkpoint"]
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; {index} was made with it: pass its new location with --resume")
    embedder = Embedder(path, about["feature"], args.gpu, args.batch, args.workers)
    if (embedder.sha256, list(embedder.size), embedder.dim) != (about["sha256"], about["image_size"], about["dim"]):
        raise InputError(
            f"{path}: is not the checkpoint that made {index}; pass {about['checkpoint']} (sha256 "
            f"{about['sha256'][:12]}...) with --resume, or make a new index"
        )
    return embedder


def folder_images(folder, about):
    """The images of a folder {path below it: [size, mtime_ns]}, and lines on what cannot be read.

    Images of the index `about` that may still exist, because their folder cannot be listed, count as unchanged.
    """
    files, unreadable, unknown = list_images(folder)
    for path, stamp in about.get("images", {}).items():
        if any(path == place or path.startswith(f"{place}{os.sep}") for place in unknown):
            files[path] = stamp
    if not files:
        raise InputError(f"{folder}: contains no image; pass a folder of images")
    return files, unreadable


def list_images(folder):
    """A folder's images at any depth -> ({path below it: [size, mtime_ns]}, lines on what cannot be read, paths below
    it that may still exist).

    Images are the files with a suffix of FORMATS. Hidden files and folders, and links to folders, are left out.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    files, unreadable, unknown = {}, [], []

    def no_listing(error):
        unreadable.append(f"{error.filename}: cannot be listed ({error.strerror})")
        unknown.append(os.path.relpath(error.filename, folder))

    for where, folders, names in os.walk(folder, onerror=no_listing):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in suffixes:
                continue
            path = os.path.join(where, name)
            try:
                status = os.stat(path)
            except OSError as error:
                unreadable.append(f"{path}: cannot be read ({error.strerror})")
                if not isinstance(error, FileNotFoundError):
                    unknown.append(os.path.relpath(path, folder))
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait
                files[os.path.relpath(path, folder)] = _stamp(status)
    return files, unreadable, unknown


def _stamp(status):
    return [status.st_size, status.st_mtime_ns]


class Finder:
    """An open index: finder(image files, modality, top) -> for each, a list of {"rank", "similarity", "path",
    "changed"}, best first. changed: the file differs from the one that was indexed, or is missing."""

    def __init__(self, args):
        self.about, self.vectors = read_index(args.index)
        self.embedder = index_embedder(args, self.about, args.index)
        self.paths = list(self.about["images"])

    def __call__(self, images, modality, top):
        similarities, rows = self.vectors.search(self.embedder(images, modality), min(top, len(self.paths)))
        return [
            [
                {"rank": rank, "similarity": float(similarity), **self._file(self.paths[row])}
                for rank, (similarity, row) in enumerate(zip(*ranked, strict=True), 1)
                if row >= 0  # the probed lists may hold fewer
            ]
            for ranked in zip(similarities, rows, strict=True)
        ]

    def _file(self, name):
        path = os.path.join(self.about["folder"], name)
        try:
            changed = _stamp(os.stat(path)) != self.about["images"][name]
        except OSError:
            changed = True
        return {"path": path, "changed": changed}
