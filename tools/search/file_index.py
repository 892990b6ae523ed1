"""An index of image features in one SQLite file, searched in memory."""

import contextlib
import json
import os
import sqlite3
from pathlib import Path

import numpy as np

from core.files import check_output, is_regular
from tools.search.index import BLOCK, TRACK, UPDATES, Entry, Filter, Index, damaged, tables
from utils import InputError


class FileIndex(Index):
    """One SQLite file. The vectors of a version are read into memory, and compared with all of a query's."""

    driver = sqlite3

    def __init__(self, path, create=False):
        self.uri, self.blocks, self.seen, self.file = str(path), [], None, None
        if Path(path).is_dir():
            raise InputError(f"{path}: is a folder; name a file, such as {os.path.join(path, 'index.db')}")
        if create:
            for file in (path, f"{path}-journal"):  # which SQLite writes beside it
                check_output(file)
        elif not is_regular(path):
            raise InputError(f"{path}: no such index; make it with python -m tools.search index")
        self.place = os.path.abspath(path)  # SQLite takes some relative names for a URI, or for memory
        with self._errors():
            # Threads of the page take turns.
            self.connection = sqlite3.connect(self.place, timeout=60, isolation_level=None, check_same_thread=False)
            self.connection.execute("PRAGMA trusted_schema = OFF")
            self.connection.execute("PRAGMA foreign_keys = ON")
            self._check_tables(create)
            # So that readers and a writer do not wait for each other. It fails while another process that has made the
            # same file writes to it; whoever opens the file next succeeds.
            with contextlib.suppress(sqlite3.OperationalError):
                self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
        self.file = self._file()

    def _file(self):
        """What tells the file from another one in its place; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            stat = os.stat(self.place)
            return stat.st_dev, stat.st_ino

    def _check_tables(self, create):
        """Make the tables of an empty file; refuse a file with others, whatever they would run."""
        ours = tables(serial="INTEGER PRIMARY KEY AUTOINCREMENT", vector="BLOB", strict=" STRICT")
        # As they were before there were tracks.
        old = [sql.replace(", track TEXT", "") for sql in ours if sql != UPDATES[-1]]
        with self.transaction(write=create):
            found = self._found_tables()
            if create and not found:
                for sql in (found := ours):
                    self._run(sql)
        if sorted(found) == sorted(old):
            with self.transaction():
                if sorted(self._found_tables()) == sorted(old):  # else another process has been faster
                    for sql in UPDATES:
                        self._run(sql)
        elif sorted(found) != sorted(ours):
            raise InputError(f"{self.uri}: is not an index, or was written by another program; choose another file")

    def _found_tables(self):
        read = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'sqlite_sequence'"
        return [sql for (sql,) in self._run(read)]

    @staticmethod
    def _remedy(error):
        name = getattr(error, "sqlite_errorname", "")
        return {
            "SQLITE_IOERR": "free some space, or check the disk, and run again",
            "SQLITE_FULL": "free some space and run again; the index is intact",
            "SQLITE_BUSY": "another process keeps it; run again later",
            "SQLITE_CANTOPEN": "a search writes beside it; copy it to a folder that you may write to",
            "SQLITE_READONLY": "a search writes beside it; copy it to a folder that you may write to",
        }.get("_".join(name.split("_")[:2]), "check the file, or remove it and index again")

    @contextlib.contextmanager
    def transaction(self, write=True):
        if self.file and self._file() != self.file:  # SQLite would go on with the one that is gone
            raise InputError(f"{self.uri}: has been removed or replaced meanwhile; run again")
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
            return self._results(ids, similarities)

    def search_tracks(self, version, queries, top, where=Filter()):  # noqa: B008 (a constant)
        """As `search`, of the tracks that the filter leaves, by the direction of the mean of their vectors: each as its
        most similar image, with the similarity of the mean."""
        with self.transaction(write=False):
            self._read(version)
            condition, values = where.where(version)
            number = f"dense_rank() OVER (ORDER BY modality, camera, {TRACK}) - 1"
            rows = self._run(f"SELECT id, {number} FROM images WHERE {condition} ORDER BY id", values)
            ids, tracks = np.fromiter(rows, np.dtype((np.int64, 2))).T
            sums = np.zeros((tracks.max(initial=-1) + 1, queries.shape[1]), np.float32)
            scores = np.empty((len(queries), len(ids)), np.float32)
            for block, vectors in self.blocks:
                inside = np.isin(block, ids)
                if inside.any():
                    places, vectors = np.searchsorted(ids, block[inside]), vectors[inside]
                    scores[:, places] = queries @ vectors.T
                    order = np.argsort(tracks[places], kind="stable")
                    present, starts = np.unique(tracks[places][order], return_index=True)
                    sums[present] += np.add.reduceat(vectors[order], starts)
            means = queries @ sums.T / np.maximum(np.linalg.norm(sums, axis=1), 1e-6)  # 0 where they cancel out
            nearest = np.argsort(-means, axis=1, kind="stable")[:, :top]
            best = np.empty_like(nearest)
            for row, chosen in enumerate(nearest):
                inside = np.flatnonzero(np.isin(tracks, chosen))
                inside = inside[np.lexsort((-scores[row, inside], tracks[inside]))]
                present, first = np.unique(tracks[inside], return_index=True)
                best[row] = ids[inside[first]][np.searchsorted(present, chosen)]
            return self._results(best, np.take_along_axis(means, nearest, 1))

    def _results(self, ids, similarities):
        """Both [Q, K] -> what `search` returns."""
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
