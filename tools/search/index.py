"""An index of image features: what a file (file_index.py) and a database server (server_index.py) share.

Both hold the same two tables. A version is what one checkpoint has embedded. The oldest version
serves. When a younger one is complete, the older ones are deleted.
"""

import contextlib
import itertools
import os
from typing import Annotated, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from core.formats import Count, Text, checked
from model import FEATURES, MODALITIES
from utils import InputError, one_line, printable

TABLES = """
CREATE TABLE versions (version {serial}, checkpoint TEXT NOT NULL, sha256 TEXT NOT NULL, feature TEXT NOT NULL,
    dim INT NOT NULL, UNIQUE (sha256, feature)){strict};
CREATE TABLE images (id {serial}, version INT NOT NULL REFERENCES versions ON DELETE CASCADE, path TEXT NOT NULL,
    stamp TEXT NOT NULL, modality TEXT NOT NULL, camera TEXT, person TEXT, time TEXT NOT NULL, \
vector {vector} NOT NULL, track TEXT,
    UNIQUE (path, version)){strict};
CREATE INDEX images_by_place ON images (version, camera, time);
CREATE INDEX images_by_track ON images (version, (COALESCE(track, path)));
"""
# What brings an index from before there were tracks up to date, in place.
UPDATES = "ALTER TABLE images ADD COLUMN track TEXT", TABLES.split(";\n")[-2]
TRACK = "COALESCE(track, path)"  # an image without a track is one by itself
REPLACED = "another checkpoint has replaced this version"
TIME = "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]) ([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([+-][0-9:]{5})?$"
BLOCK = 8192  # vectors read or compared at a time


class Version(NamedTuple):
    """What one checkpoint has embedded."""

    version: Count
    checkpoint: Text
    sha256: Text
    feature: Literal[FEATURES]
    dim: Annotated[int, Meta(ge=1, le=2**20)]


class Entry(NamedTuple):
    """An image of an index. path: absolute; stamp: of the file when it was embedded; time: on the clock of the place,
    and if it is the file's, the offset from UTC after it, such as +01:00. Compared as text, that does not count.
    track: FOLDER//NAME, of the folder that was indexed and the tracker's name; `track_key` says which images share one.
    """

    path: Annotated[str, Meta(pattern=r"^[^\0]+$", max_length=10_000)]
    stamp: str
    modality: Literal[MODALITIES]
    camera: str | None
    person: str | None
    time: Annotated[str, Meta(pattern=TIME)]
    track: Text | None = None


class Filter(NamedTuple):
    """Which images a search sees: start <= time < end."""

    modality: str | None = None
    cameras: tuple = ()
    start: str | None = None
    end: str | None = None
    folder: str | None = None

    def where(self, version):
        """-> (SQL condition, its values)."""
        terms = {"version = ?": [version]}
        if self.modality:
            terms["modality = ?"] = [self.modality]
        if self.cameras:
            terms[f"camera IN ({', '.join('?' * len(self.cameras))})"] = self.cameras
        if self.start:
            terms["time >= ?"] = [self.start]
        if self.end:
            terms["time < ?"] = [self.end]
        if self.folder:
            prefix = os.path.join(self.folder, "")
            terms["substr(path, 1, ?) = ?"] = [len(prefix), prefix]
        return " AND ".join(terms), [value for values in terms.values() for value in values]


class Index:
    """What both kinds share. Each method is one transaction. Subclasses give `search`, `search_tracks` and what talks
    to the database: `connection`, `driver` (its module) and the `_remedy` of an error."""

    approximates = False  # whether it has `approximate`
    # What ends a SELECT that locks its rows, and what lets nobody else write. A transaction that writes to a file has
    # locked all of it.
    for_update = lock_images = ""

    def close(self):
        self.connection.close()

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except InputError:
            raise
        except self.driver.IntegrityError as error:
            raise InputError(f"{self.uri}: {REPLACED}; run again") from error
        except UnicodeEncodeError as error:
            raise InputError(f"{printable(error.object):.200}: is no name in UTF-8; rename it") from error
        except (self.driver.Error, ValueError) as error:  # ValueError: vectors of another size
            reason = one_line(str(error).strip().partition("\n")[0])
            raise InputError(f"{self.uri}: cannot be used as an index ({reason}); {self._remedy(error)}") from error

    def _checked(self, rows, kind):
        """Rows of a table as Versions or Entries. InputError for values that this program does not write."""
        return checked(rows, list[kind], f"{self.uri}: {kind.__name__.lower()}", "remove it and index again")

    def versions(self):
        """The fields of `Version` as dicts, the one that serves first."""
        with self.transaction(write=False):
            rows = self._run(f"SELECT {', '.join(Version._fields)} FROM versions ORDER BY version").fetchall()
        return [version._asdict() for version in self._checked(rows, Version)]

    def begin(self, checkpoint, sha256, feature, dim):
        """The number of the version of a checkpoint, new or old; remembers where the checkpoint is."""
        with self.transaction():
            self._run(
                "INSERT INTO versions (checkpoint, sha256, feature, dim) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (sha256, feature) DO UPDATE SET checkpoint = excluded.checkpoint",
                (checkpoint, sha256, feature, dim),
            )
            where = "sha256 = ? AND feature = ?"
            return self._run(f"SELECT version FROM versions WHERE {where}", (sha256, feature)).fetchone()[0]

    def switch(self, version):
        """Let a version serve and delete the older ones, unless they have images that it lacks -> their Entries."""
        with self.transaction():
            # Wait for who is adding to them, and let nobody begin to.
            self._run(f"SELECT version FROM versions WHERE version < ?{self.for_update}", (version,))
            where = "version < ? AND path NOT IN (SELECT path FROM images WHERE version = ?)"
            sql = f"SELECT {', '.join(Entry._fields)} FROM images WHERE {where}"
            rows = self._run(sql, (version, version)).fetchall()
            if not rows:
                self._run("DELETE FROM versions WHERE version < ?", (version,))
        return [*{entry.path: entry for entry in self._checked(rows, Entry)}.values()]

    def entries(self, version, folder=None):
        """{path: Entry} of a folder, or of the whole version."""
        where, values = Filter(folder=folder).where(version)
        with self.transaction(write=False):
            rows = self._run(f"SELECT {', '.join(Entry._fields)} FROM images WHERE {where}", values).fetchall()
        return {entry.path: entry for entry in self._checked(rows, Entry)}

    def members(self, version, keys, where):
        """{`track_key`: its images that a Filter chooses, as dicts of the fields of `Entry`, in the order of time}."""
        condition, values = where.where(version)
        names, found, rows = sorted({key[-1] for key in keys}), {key: [] for key in keys}, []
        with self.transaction(write=False):
            for start in range(0, len(names), BLOCK):  # there is a limit to a statement's values
                part = names[start : start + BLOCK]
                some = f"{condition} AND {TRACK} IN ({', '.join('?' * len(part))})"
                rows += self._run(f"SELECT {', '.join(Entry._fields)} FROM images WHERE {some}", [*values, *part])
        for entry in sorted(self._checked(rows, Entry), key=lambda entry: (entry.time, entry.path)):
            if (key := track_key(image := entry._asdict())) in found:
                found[key].append(image)
        return found

    def counts(self, version, column):
        """{value of a column: number of images}."""
        with self.transaction(write=False):
            sql = f"SELECT {column}, COUNT(*) FROM images WHERE version = ? GROUP BY {column} ORDER BY {column}"
            return dict(self._run(sql, (version,)).fetchall())

    def add(self, version, entries, vectors):
        """Add images, or replace those of the same path; later versions embed those that have changed anew. vectors: of
        unit length."""
        if (row := damaged(vectors)) is not None:
            raise InputError(f"{entries[row].path}: its features are not of unit length; use another --resume")
        names = ("version", *Entry._fields, "vector")
        rows = [(version, *entry, self._encode(vector)) for entry, vector in zip(entries, vectors, strict=True)]
        with self.transaction():
            old = "DELETE FROM images WHERE path = ? AND (version = ? OR version > ? AND stamp <> ?)"
            self._run_many(old, [(path, version, version, stamp) for _, path, stamp, *_ in rows])
            marks = ", ".join("?" * len(names))
            # Another process may be adding the same image.
            sql = f"INSERT INTO images ({', '.join(names)}) VALUES ({marks}) ON CONFLICT (path, version) DO NOTHING"
            self._run_many(sql, rows)

    def label(self, entries):
        """Replace camera, person, time and track of images in all versions."""
        rows = [(entry.camera, entry.person, entry.time, entry.track, entry.path) for entry in entries]
        names = "camera = ?, person = ?, time = ?, track = ?"
        with self.transaction():
            self._run_many(f"UPDATE images SET {names} WHERE path = ?", rows)

    def remove(self, paths):
        """Remove images from all versions."""
        with self.transaction():
            self._run_many("DELETE FROM images WHERE path = ?", [(path,) for path in paths])

    def move(self, old, new):
        """Rename a folder in all versions -> number of its images. Those that the new one has already are dropped."""
        old, new = (os.path.join(folder, "") for folder in (old, new))
        if old == new:
            return 0
        # Of two folders, one within the other, images would be in each other's way: they go by a third place.
        nested = old.startswith(new) or new.startswith(old)
        names = ", ".join(("version", *Entry._fields, "vector"))
        below, new_name = "substr(path, 1, ?) = ?", "CAST(? AS TEXT) || substr(path, ?)"
        track = f"CASE WHEN {below} THEN {new_name} ELSE path END".replace("path", "track")
        renamed = names.replace("track", track).replace("path", new_name)
        with self.transaction():
            if self.lock_images:
                self._run(self.lock_images)
            for source, target in itertools.pairwise([old, *["moving:/"] * nested, new]):
                # Not UPDATE: the path says which machine of a cluster has the image.
                select = f"SELECT {renamed} FROM images WHERE {below}"
                sql = f"INSERT INTO images ({names}) {select} ON CONFLICT (path, version) DO NOTHING"
                start, name = (len(source), source), (target, len(source) + 1)
                self._run(sql, (*name, *start, *name, *start))
                count = self._run(f"DELETE FROM images WHERE {below}", (len(source), source)).rowcount
        return count

    def vectors(self, ids):
        """{id: vector [C]} of those that are there; for some hundred."""
        with self.transaction(write=False):
            rows = self._run(f"SELECT id, vector FROM images WHERE id IN ({', '.join('?' * len(ids))})", ids).fetchall()
        return {i: self._decode(value) for i, value in rows}


def track_key(image):
    """What the images of one track have in common: trackers of two cameras may give the same names. image: a dict with
    the fields of `Entry`."""
    return image["modality"], image["camera"], image["track"] or image["path"]


def damaged(vectors):
    """The row of the first vector that is not of unit length, or not finite; None if all are."""
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = ~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.01)
    return int(wrong.argmax()) if wrong.any() else None


def tables(serial, vector, strict):
    return [sql.strip() for sql in TABLES.format(serial=serial, vector=vector, strict=strict).split(";")[:-1]]
