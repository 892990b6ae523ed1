"""An index of image features: one SQLite file, searched in memory, or a database server (server_index.py).

The address decides. Both hold the same two tables. A version is what one checkpoint has embedded. The oldest version
serves. When a younger one is complete, the older ones are deleted.
"""

import contextlib
import itertools
import json
import os
import re
import sqlite3
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from core.files import check_output
from core.formats import Count, Text, checked
from model import FEATURES, MODALITIES
from utils import InputError

TABLES = """
CREATE TABLE versions (version {serial}, checkpoint TEXT NOT NULL, sha256 TEXT NOT NULL, feature TEXT NOT NULL,
    dim INT NOT NULL, UNIQUE (sha256, feature)){strict};
CREATE TABLE images (id {serial}, version INT NOT NULL REFERENCES versions ON DELETE CASCADE, path TEXT NOT NULL,
    stamp TEXT NOT NULL, modality TEXT NOT NULL, camera TEXT, person TEXT, time TEXT NOT NULL, vector {vector} NOT NULL,
    UNIQUE (path, version)){strict};
CREATE INDEX images_by_place ON images (version, camera, time);
"""
REPLACED = "another checkpoint has replaced this version"
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
    and if it is the file's, the offset from UTC after it, such as +01:00. Compared as text, that does not count."""

    path: Text
    stamp: str
    modality: Literal[MODALITIES]
    camera: str | None
    person: str | None
    time: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([+-]\d\d:\d\d)?$")]


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


def open_index(uri, create=False):
    """The index at an address. InputError if there is none (unless `create`) or it cannot be used."""
    if re.match("postgres(ql)?://", uri):
        from tools.server_index import ServerIndex  # it builds on this module

        return ServerIndex(uri, create)
    if "://" in uri:
        raise InputError(f"{uri}: unknown kind of address; pass a file, or postgresql://USER@HOST:PORT/DATABASE")
    return FileIndex(uri, create)


class Index:
    """What both kinds share. Each method is one transaction. Subclasses give `search` and what talks to the
    database: `connection`, `driver` (its module) and the `_remedy` of an error."""

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
        except (self.driver.Error, ValueError) as error:  # ValueError: vectors of another size
            reason = "".join(c if c.isprintable() else "?" for c in str(error).strip().partition("\n")[0])
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

    def counts(self, version, column):
        """{value of a column: number of images}."""
        with self.transaction(write=False):
            sql = f"SELECT {column}, COUNT(*) FROM images WHERE version = ? GROUP BY {column} ORDER BY {column}"
            return dict(self._run(sql, (version,)).fetchall())

    def add(self, version, entries, vectors):
        """Add images, or replace those of the same path. vectors: of unit length."""
        if (row := damaged(vectors)) is not None:
            raise InputError(f"{entries[row].path}: its features are not of unit length; use another --resume")
        names = ("version", *Entry._fields, "vector")
        rows = [(version, *entry, self._encode(vector)) for entry, vector in zip(entries, vectors, strict=True)]
        with self.transaction():
            self._run_many("DELETE FROM images WHERE version = ? AND path = ?", [row[:2] for row in rows])
            marks = ", ".join("?" * len(names))
            # Another process may be adding the same image.
            sql = f"INSERT INTO images ({', '.join(names)}) VALUES ({marks}) ON CONFLICT (path, version) DO NOTHING"
            self._run_many(sql, rows)

    def label(self, version, entries):
        """Replace camera, person and time of images."""
        rows = [(entry.camera, entry.person, entry.time, version, entry.path) for entry in entries]
        with self.transaction():
            self._run_many("UPDATE images SET camera = ?, person = ?, time = ? WHERE version = ? AND path = ?", rows)

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
        renamed = names.replace("path", "CAST(? AS TEXT) || substr(path, ?)")
        below = "substr(path, 1, ?) = ?"
        with self.transaction():
            if self.lock_images:
                self._run(self.lock_images)
            for source, target in itertools.pairwise([old, *["moving:/"] * nested, new]):
                # Not UPDATE: the path says which machine of a cluster has the image.
                select = f"SELECT {renamed} FROM images WHERE {below}"
                sql = f"INSERT INTO images ({names}) {select} ON CONFLICT (path, version) DO NOTHING"
                self._run(sql, (target, len(source) + 1, len(source), source))
                count = self._run(f"DELETE FROM images WHERE {below}", (len(source), source)).rowcount
        return count

    def vectors(self, ids):
        """{id: vector [C]} of those that are there; for some hundred."""
        with self.transaction(write=False):
            rows = self._run(f"SELECT id, vector FROM images WHERE id IN ({', '.join('?' * len(ids))})", ids).fetchall()
        return {i: self._decode(value) for i, value in rows}


class FileIndex(Index):
    """One SQLite file. The vectors of a version are read into memory, and compared with all of a query's."""

    driver = sqlite3

    def __init__(self, path, create=False):
        self.uri, self.blocks, self.seen = str(path), [], None
        if Path(path).is_dir():
            raise InputError(f"{path}: is a folder; name a file, such as {os.path.join(path, 'index.db')}")
        if create:
            for file in (path, f"{path}-journal"):  # which SQLite writes beside it
                check_output(file)
        elif not Path(path).is_file():
            raise InputError(f"{path}: no such index; make it with python -m tools.search index")
        with self._errors():
            # Threads of the page take turns.
            self.connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self.connection.execute("PRAGMA trusted_schema = OFF")
            self.connection.execute("PRAGMA foreign_keys = ON")
            self._check_tables(create)
            # So that readers and a writer do not wait for each other. It fails while another process that has made the
            # same file writes to it; whoever opens the file next succeeds.
            with contextlib.suppress(sqlite3.OperationalError):
                self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")

    def _check_tables(self, create):
        """Make the tables of an empty file; refuse a file with others, whatever they would run."""
        ours = tables(serial="INTEGER PRIMARY KEY AUTOINCREMENT", vector="BLOB", strict=" STRICT")
        with self.transaction(write=create):
            read = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'sqlite_sequence'"
            found = [sql for (sql,) in self._run(read)]
            if create and not found:
                for sql in ours:
                    self._run(sql)
            elif sorted(found) != sorted(ours):
                raise InputError(f"{self.uri}: is not an index, or was written by another program; choose another file")

    @staticmethod
    def _remedy(error):
        name = getattr(error, "sqlite_errorname", "")
        return {
            "SQLITE_FULL": "free some space and run again; the index is intact",
            "SQLITE_BUSY": "another process keeps it; run again later",
            "SQLITE_CANTOPEN": "a search writes beside it; copy it to a folder that you may write to",
            "SQLITE_READONLY": "a search writes beside it; copy it to a folder that you may write to",
        }.get("_".join(name.split("_")[:2]), "check the file, or remove it and index again")

    @contextlib.contextmanager
    def transaction(self, write=True):
        with self._errors(), self.connection:  # commits, or rolls back
            self.connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            self.seen = None if write else self.seen
            yield

    def _run(self, sql, values=()):
        return self.connection.execute(sql, values)

    def _run_many(self, sql, rows):
        self.connection.executemany(sql, rows)

    def _encode(self, vector):
        return vector.astype("<f4").tobytes()

    def _decode(self, value):
        return np.frombuffer(value, "<f4")

    def search(self, version, queries, top, where=Filter()):  # noqa: B008 (a constant)
        """queries [Q, C] -> for each, dicts with "id", "similarity" and the fields of `Entry`, best first."""
        with self.transaction(write=False):
            self._read(version)
            chosen = None
            if any(where):
                condition, values = where.where(version)
                chosen = self._ids(f"SELECT id FROM images WHERE {condition}", values)
            similarities, ids = self._nearest(queries, top, chosen)
            names = ("id", *Entry._fields)
            # As JSON: there is a limit to a statement's values.
            sql = f"SELECT {', '.join(names)} FROM images WHERE id IN (SELECT value FROM json_each(?))"
            rows = self._run(sql, (json.dumps(np.unique(ids).tolist()),)).fetchall()
            entries = self._checked([row[1:] for row in rows], Entry)
            found = {row[0]: {"id": row[0]} | entry._asdict() for row, entry in zip(rows, entries, strict=True)}
        return [
            [found[i] | {"similarity": similarity} for i, similarity in zip(*ranked, strict=True)]
            for ranked in zip(ids.tolist(), similarities.tolist(), strict=True)
        ]

    def _ids(self, sql, values):
        return np.fromiter((i for (i,) in self._run(sql, values)), np.int64)

    def _read(self, version):
        """Bring the vectors in memory up to date with the file."""
        seen = version, self._run("PRAGMA data_version").fetchone()[0]  # changes when another connection writes
        if seen == self.seen:
            return
        ids = self._ids("SELECT id FROM images WHERE version = ?", (version,))
        kept = [(block, vectors, np.isin(block, ids)) for block, vectors in self.blocks]
        self.blocks = [(block[keep], vectors if keep.all() else vectors[keep]) for block, vectors, keep in kept]
        last = max((int(block[-1]) for block, _ in self.blocks if len(block)), default=0)
        sql = "SELECT id, vector FROM images WHERE version = ? AND id > ? ORDER BY id"  # a changed image has a new id
        cursor = self._run(sql, (version, last))
        while rows := cursor.fetchmany(BLOCK):
            block, vectors = zip(*rows, strict=True)
            vectors = np.frombuffer(b"".join(vectors), "<f4").reshape(len(block), -1)
            if (row := damaged(vectors)) is not None:
                path = self._run("SELECT path FROM images WHERE id = ?", (block[row],)).fetchone()[0]
                remedy = "python -m tools.search remove, then index"
                raise InputError(f"{self.uri}: the vector of {path} is damaged; make it anew: {remedy}")
            self.blocks.append((np.array(block), vectors))
        self.seen = seen

    def _nearest(self, queries, top, chosen=None):
        """The inner products [Q, K] and ids of the nearest vectors, best first. chosen: ids that may be found."""
        best, best_ids = np.empty((len(queries), 0), np.float32), np.empty(0, np.int64)
        masks = [None] * len(self.blocks)
        if chosen is not None and self.blocks:
            mask = np.isin(np.concatenate([ids for ids, _ in self.blocks]), chosen)
            masks = np.split(mask, np.cumsum([len(ids) for ids, _ in self.blocks])[:-1])
        for (ids, vectors), mask in zip(self.blocks, masks, strict=True):
            if mask is not None:
                ids, vectors = ids[mask], vectors[mask]
            best, best_ids = np.hstack([best, queries @ vectors.T]), np.append(best_ids, ids)
            if best.shape[1] > top:
                # With all that are as near as the last one: of equal ones, the first in the index are found.
                kept = (best >= -np.partition(-best, top - 1, axis=1)[:, top - 1 : top]).any(axis=0)
                best, best_ids = best[:, kept], best_ids[kept]
        order = np.argsort(-best, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(best, order, 1), best_ids[order]


def damaged(vectors):
    """The row of the first vector that is not of unit length, or not finite; None if all are."""
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = ~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 0.01)
    return int(wrong.argmax()) if wrong.any() else None


def tables(serial, vector, strict):
    return [sql.strip() for sql in TABLES.format(serial=serial, vector=vector, strict=strict).split(";")[:-1]]
