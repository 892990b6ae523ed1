"""Keeps an index up to date with a folder that grows, and says when a watched person is seen."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from tools.search.finder import least_similarity_of, unit_mean
from tools.search.indexer import Indexer, existing_folder, file_stamp, label_files, list_images, open_to_write
from tools.search.labels import read_labels
from utils import InputError, one_line

POLL = 1.0  # seconds between two looks at the folder
SETTLED = 10.0  # seconds without a change after which a file that cannot be read is taken for damaged


def watch_folder(args):
    """Index new, changed and deleted images of a folder until the process is stopped."""
    least = args.min_similarity if args.false_positives is None else args.false_positives
    given = args.watch_for, args.watch_modality, least
    if None in given and given != (None, None, None):
        raise InputError(
            "--watch_for, --watch_modality and --min_similarity, or --false_positives with --calibration, belong "
            "together; pass all or none"
        )
    folder = existing_folder(args.folder)
    with contextlib.closing(open_to_write(args)) as index:
        watcher = Watcher(args, index, folder)
        print(f"{folder}: watched (Ctrl-C stops it)", file=sys.stderr, flush=True)
        while True:
            watcher.look()
            time.sleep(POLL)


class Watcher:
    """A folder and its state in the index. Each `look` costs a listing of the folder, if nothing has changed."""

    def __init__(self, args, index, folder):
        self.args, self.folder = args, folder
        self.table, self.read = table_stamp(args), read_labels(args.pattern, args.csv)
        self.indexer = Indexer(args, index, folder, list_images(folder)[0])
        self.report = Alarm(args, self.indexer.embedder) if args.watch_for else None
        self.seen = dict.fromkeys(self.indexer.before)  # {path: stamp}, or None to look at it again
        self.unread = {}  # {path: (stamp, when it could not be read with it for the first time)}
        self.told = set()  # lines that need not be repeated

    def look(self):
        """Bring the index up to date."""
        files, lines, unchecked, _ = list_images(self.folder)
        self._read_table()
        # A folder without any image is probably not mounted.
        gone = [path for path in self.seen.keys() - files.keys() if files and not path.startswith(unchecked)]
        changed = {path: stamp for path, stamp in files.items() if self.seen.get(path) != stamp}
        if changed or gone:
            labels, unlabelled = label_files(self.read, self.args.tracks, changed, self.folder)
            lines += [f"{path}: has no labels, as --pattern or --csv does not fit it" for path in unlabelled]
            failed = []
            embedded = len(self.indexer.update(changed, labels, gone, failed, self.report))
            embedded += self.indexer.embed_rest(failed)
            retried = self._unreadable(changed)
            lines += [line for line in failed if not line.startswith(tuple(f"{path}: " for path in retried))]
            for path in gone:
                del self.seen[path]
            self.seen |= {path: stamp for path, stamp in changed.items() if path not in retried}
            if embedded or gone:
                print(f"{self.folder}: embedded: {embedded}; deleted: {len(gone)}", file=sys.stderr, flush=True)
        self._tell(lines)

    def _unreadable(self, changed):
        """Those of changed files that could not be read and may still be written."""
        now, retried = time.monotonic(), set()
        for path, stamp in changed.items():
            if path in self.indexer.known:
                self.unread.pop(path, None)
                continue
            if self.unread.get(path, (None,))[0] != stamp:
                self.unread[path] = stamp, now
            if now - self.unread[path][1] < SETTLED:
                retried.add(path)
        return retried

    def _read_table(self):
        """Read the table of labels again if it has changed; then look at all images again."""
        if (stamp := table_stamp(self.args)) == self.table:
            return
        try:
            self.read = read_labels(None, self.args.csv)
        except InputError as error:  # it may still be written
            self._tell([str(error)])
        else:
            self.table, self.seen = stamp, dict.fromkeys(self.seen)

    def _tell(self, lines):
        for line in lines:
            if line not in self.told:
                print(one_line(line), file=sys.stderr, flush=True)
        self.told.update(lines)


class Alarm:
    """The people of --watch_for: a line of JSON on stdout for each image that is as similar to one as the flags ask.

    Each folder in there is a person of its name, and so is each image beside them."""

    def __init__(self, args, embedder):
        folder, people = existing_folder(args.watch_for), {}
        files, unreadable, *_ = list_images(folder)
        if unreadable or not files:
            raise InputError(next(iter(unreadable), f"{folder}: contains no image; pass images of the watched people"))
        for row, path in enumerate(files):
            people.setdefault(Path(path).relative_to(folder).parts[0], []).append(row)
        features = embedder([*files], args.watch_modality)
        self.people = {name: unit_mean(features[rows])[0] for name, rows in people.items()}
        self.least = least_similarity_of(args, {"sha256": embedder.sha256, "feature": embedder.feature})

    def __call__(self, entries, features):
        for entry, feature in zip(entries, features, strict=True):
            for name, person in self.people.items():
                if (similarity := float(feature @ person)) >= self.least:
                    print(json.dumps({"watched": name, "similarity": similarity, **entry._asdict()}), flush=True)


def table_stamp(args):
    """What changes when the table of --csv does."""
    try:
        return args.csv and file_stamp(os.stat(args.csv))
    except FileNotFoundError:  # it is being replaced
        return ""
