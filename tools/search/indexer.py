"""Fills an index from folders of images."""

import contextlib
import os
import posixpath
import stat
from collections import Counter
from pathlib import Path

from core.images import image_suffixes
from model import MODALITIES
from tools.embedder import Embedder
from tools.search.address import open_index
from tools.search.index import REPLACED, Entry
from tools.search.labels import file_time, read_labels, wall_clock
from utils import InputError

NO_INDEX = "there is no index yet; pass --resume and --modality to make one"


def index_folder(args):
    """Returns {"embedded", "changed", "vanished", "images": counts, "unreadable": lines, "unlabelled": paths, "spread":
    names of tracks without a camera that several folders have, "others": what else there is, in words}."""
    folder = existing_folder(args.folder)
    files, unreadable, unchecked, others = list_images(folder)
    if not files:
        found = f" by its name (but {others}; convert these, or give them a suffix)" if others else ""
        raise InputError(next(iter(unreadable), f"{folder}: contains no image{found}; pass a folder of images"))
    labels, unlabelled = label_files(read_labels(args.pattern, args.csv), args.tracks, files, folder)
    if len(unlabelled) == len(files):
        flag = f"--pattern {args.pattern}" if args.pattern else f"--csv {args.csv}"
        name = os.path.relpath(unlabelled[0], folder)
        raise InputError(f"{flag}: fits no image of {folder}, such as {name}; write it for paths below that folder")
    with contextlib.closing(open_to_write(args)) as index:
        if args.approximate and not index.approximates:
            raise InputError(f"--approximate: {args.index} is a file, which is searched exactly; leave it out")
        if args.moved_from:
            move_folder(args, index, folder)
        indexer = Indexer(args, index, folder, files)
        known = any(entry.camera or entry.person or entry.track for entry in indexer.before.values())
        if known and not (args.pattern or args.csv or args.tracks):
            unlabelled += [path for path in files if path not in indexer.before]
        gone = [path for path in indexer.before if path not in files and not path.startswith(unchecked)]
        changed = sum(path in indexer.known for path in indexer.new(files))
        count = len(indexer.update(files, labels, gone, unreadable)) + indexer.embed_rest(unreadable)
        if args.approximate:
            index.approximate(indexer.version, indexer.embedder.dim)
        images = sum(index.counts(indexer.version, "modality").values())
    if not images and unreadable:
        raise InputError(f"{folder}: none of its {len(files)} images can be read: {unreadable[0]}")
    if not images:
        raise InputError(f"{args.index}: {REPLACED}; run again")
    counts = {"embedded": count, "changed": changed, "vanished": len(gone), "images": images}
    spread = spread_tracks(labels)
    return counts | {"unreadable": unreadable, "unlabelled": unlabelled, "spread": spread, "others": others}


def open_to_write(args):
    """The index of the flags. A file is made only if they have all that a new index needs."""
    if not (args.resume and args.modality or "://" in args.index or os.path.exists(args.index)):
        raise InputError(f"{args.index}: {NO_INDEX}")
    return open_index(args.index, create=True)


def spread_tracks(labels):
    """Names of tracks without a camera that have images in several folders: perhaps of several cameras, each counting
    its own tracks. labels: of `label_files`."""
    places = {}
    for path, found in labels.items():
        if found.get("track") and not found.get("camera"):
            places.setdefault(found["track"].partition("//")[2], set()).add(os.path.dirname(path))
    return [name for name, folders in places.items() if len(folders) > 1]


def move_folder(args, index, folder):
    """Tell the index that --moved_from is now `folder`. A part of a folder that was indexed with tracks is an
    InputError: its tracks would keep their names, which new ones in its place might get, too."""
    for place in dict.fromkeys(places(args.moved_from)):
        for version in index.versions():
            for entry in index.entries(version["version"], place).values():
                if entry.track and not entry.track.startswith(f"{place}/"):
                    whole = entry.track.partition("//")[0]
                    raise InputError(
                        f"--moved_from {args.moved_from}: is a part of {whole}, which was indexed with tracks; move "
                        "the whole, or remove the part and index it anew"
                    )
        if index.move(place, folder):
            return
    raise InputError(f"--moved_from {args.moved_from}: {args.index} has no image there; pass its path at that time")


class Indexer:
    """A folder in an open index. files: those that it has now. before: {path: Entry} as the index has its images;
    known: the same of those that the checkpoint has embedded already."""

    def __init__(self, args, index, folder, files):
        self.index, old = index, next(iter(index.versions()), None)
        self.before = index.entries(old["version"], folder) if old else {}
        self.modality = folder_modality(args, self.before, folder, files)
        self.version, self.embedder = begin_version(args, index, old)
        self.known = index.entries(self.version, folder)
        self.before |= self.known

    def new(self, files):
        """The paths of files that have to be embedded."""
        known = {path: self.known[path][:3] for path in files if path in self.known}
        return {path for path, stamp in files.items() if known.get(path) != (path, stamp, self.modality)}

    def update(self, files, labels, gone, unreadable, report=None):
        """Bring the index up to date with some files, {path: stamp}, and with others that are gone -> paths of those
        that were embedded now. labels: of `label_files`; unreadable: a list that gets lines; report: a function that
        is called with Entries and their features, before these are added."""
        entries = [make_entry(path, files[path], self.modality, labels[path], self.before.get(path)) for path in files]
        new = self.new(files)
        labelled = [entry for entry in entries if entry.path not in new and entry != self.known[entry.path]]
        self.index.label(labelled)
        self.index.remove(gone)
        embedded = self._embed([entry for entry in entries if entry.path in new], unreadable, report)
        self.index.remove(new - embedded)
        for path in (*gone, *(new - embedded)):
            self.known.pop(path, None)
            self.before.pop(path, None)
        current = {entry.path: entry for entry in entries if entry.path not in new or entry.path in embedded}
        self.known |= current
        self.before |= current
        return embedded

    def _embed(self, entries, unreadable, report=None):
        """Embed images and add them to the index, batch by batch -> the set of their paths."""
        embedded = set()
        for modality in MODALITIES:
            part = [entry for entry in entries if entry.modality == modality]
            batches = self.embedder.batches([entry.path for entry in part], modality) if part else ()
            for rows, features, failed in batches:
                batch = [part[row] for row in rows]
                if report:
                    report(batch, features)
                self.index.add(self.version, batch, features)
                embedded.update(entry.path for entry in batch)
                unreadable += failed
        return embedded

    def embed_rest(self, unreadable):
        """Embed what older versions have and a new one lacks, until it has taken their place -> number of images."""
        count = 0
        while missing := self.index.switch(self.version):
            embedded = len(self._embed(missing, unreadable))
            if not embedded:
                raise InputError(
                    f"{self.index.uri}: {len(missing)} images, such as {missing[0].path}, cannot be read, so the old "
                    "features still serve; restore them, or index their folder again to drop them; then run this again"
                )
            count += embedded
        return count


def existing_folder(folder):
    """The absolute path of a folder, without links. InputError if there is none."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; pass a folder of images")
    return os.path.realpath(folder)


def remove_folder(args):
    """Take the images of a folder, which need not exist, out of an index -> their number."""
    with contextlib.closing(open_index(args.index)) as index:
        versions = [row["version"] for row in index.versions()]
        found = ({path for v in versions for path in index.entries(v, place)} for place in places(args.folder))
        if not (paths := sorted(next(filter(None, found), ()))):
            raise InputError(f"{args.folder}: {args.index} has no image of it; pass a folder that was indexed")
        index.remove(paths)
    return len(paths)


def places(folder):
    """Where a folder was when it was indexed: as it is written, or where its links lead."""
    return os.path.abspath(folder), os.path.realpath(folder)


def label_files(read, tracks, files, folder):
    """-> ({path: labels}, paths to which a pattern or a table gives none). read: of `read_labels`; tracks: the value of
    --tracks."""
    labels, unlabelled = {}, []
    for path in files:
        name = Path(path).relative_to(folder).as_posix()
        found = read(name)
        if found is None:
            unlabelled.append(path)
        found = dict(found or {})
        if tracks and "track" in found:
            raise InputError(f"--tracks {tracks}: --pattern or --csv names the tracks; leave one of the two out")
        if tracks:
            found["track"] = posixpath.dirname(name) or "."
        if "track" in found:
            found["track"] = f"{folder}//{found['track']}"
        labels[path] = found
    return labels, unlabelled


def folder_modality(args, before, folder, files):
    """The modality of a folder's images: of --modality, or as the index has it."""
    known = {entry.modality for entry in before.values()}
    if args.modality and known <= {args.modality}:
        return args.modality
    if args.modality:
        raise InputError(
            f"--modality {args.modality}: {args.index} has other images of {folder}; index its folders one by one, or "
            "remove it first"
        )
    # Images beside the known ones may be of the other modality.
    common = os.path.join(os.path.commonpath([os.path.dirname(path) for path in before]), "") if before else ""
    beside = next((path for path in files if not path.startswith(common)), None)
    if len(known) != 1 or beside:
        raise InputError(f"--modality: {args.index} does not know which one {beside or folder} has; pass it")
    return known.pop()


def begin_version(args, index, old):
    """-> (number of the version that the flags ask for, its Embedder). old: the version that serves, or None."""
    if not (args.resume or old):
        raise InputError(f"{args.index}: {NO_INDEX}")
    embedder = load_embedder(args, old, args.index)
    if not (args.resume or args.feature):  # it must not come back if another one replaces it meanwhile
        return old["version"], embedder
    path, sha256 = str(embedder.path.resolve()), embedder.sha256
    # An .onnx file embeds one modality only; the index remembers a checkpoint while there is one.
    if old and len(embedder.modalities) == 1 and old["sha256"] == sha256 and os.path.isfile(old["checkpoint"]):
        path = old["checkpoint"]
    return index.begin(path, sha256, embedder.feature, embedder.dim), embedder


def load_embedder(args, version, uri):
    """The network of --resume, or the checkpoint of a version of an index, from where it was."""
    path = args.resume or version["checkpoint"]
    if not args.resume and Path(path).suffix == ".onnx":  # anybody may have written the name
        raise InputError(
            f"{path}: {uri} was made with this ONNX file, a program; if you trust it, pass it with --resume"
        )
    if not os.path.isfile(path):
        remedy = f"{uri} was made with it: pass its new location with --resume"
        raise InputError(f"{path}: no such file; {'pass a checkpoint or an .onnx file' if args.resume else remedy}")
    feature = getattr(args, "feature", None) or (version["feature"] if version else "FC")
    return Embedder(path, feature, args.gpu, args.batch, args.workers)


def make_entry(path, stamp, modality, found, before):
    """The Entry of a file. found: its labels; before: as the index has it, or None."""
    entry = Entry(path, stamp, modality, None, None, file_time(stamp), None)
    if before:
        entry = entry._replace(camera=before.camera, person=before.person, track=before.track)
        if before.stamp == stamp or before.time == wall_clock(before.time):  # the same file, or a label
            entry = entry._replace(time=before.time)
    return entry._replace(**found)


def list_images(folder):
    """A folder's images at any depth -> ({path: stamp of size and time}, lines on what cannot be read, beginnings of
    paths that could not be checked, the kinds of other files in words).

    Images are the files with one of `image_suffixes`. Hidden files and folders, and links to folders, are left out.
    """
    suffixes, files, unreadable, unchecked, others = image_suffixes(), {}, [], [], Counter()
    folders = [folder]
    while folders:  # `os.walk` calls itself, which ends at a depth of 1,000
        where, below = folders.pop(), []
        try:
            with os.scandir(where) as entries:
                shown = sorted((entry.name, entry) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            unreadable.append(f"{where}: cannot be listed ({error.strerror}); correct its permissions")
            unchecked.append(os.path.join(where, ""))
            continue
        for name, entry in shown:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.path)
                continue
            if entry.is_symlink() and os.path.isdir(entry.path):
                continue
            if (suffix := os.path.splitext(name)[1].lower()) not in suffixes:
                others[suffix or "no suffix"] += 1
                continue
            path = entry.path
            try:
                path.encode()  # a database holds text
                status = os.stat(path)
            except UnicodeEncodeError:
                unreadable.append(f"{os.fsencode(path)!r}: its name is not UTF-8; rename it")
            except OSError as error:
                unreadable.append(f"{path}: cannot be read ({error.strerror})")
                if not isinstance(error, FileNotFoundError):
                    unchecked.append(path)
            else:
                if stat.S_ISREG(status.st_mode):  # reading a pipe would wait
                    files[path] = file_stamp(status)
                else:
                    unreadable.append(f"{path}: is no regular file; remove it")
        folders += reversed(below)
    return files, unreadable, tuple(unchecked), ", ".join(f"{kind} ({n})" for kind, n in others.most_common(9))


def file_stamp(status):
    return f"{status.st_size} {status.st_mtime_ns}"
