"""The index of images: the same tests on a SQLite file and on a PostgreSQL server, against plain NumPy."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import re
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools.search import file_index, server_index
from tools.search.address import open_index
from tools.search.file_index import FileIndex
from tools.search.index import Entry, Filter, track_key
from tools.search.indexer import list_images, open_to_write, spread_tracks
from tools.search.labels import parse_time, read_labels
from utils import InputError

DIM = 16


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def images(count):
    """Images of two folders, two modalities, three cameras and one without a name, one a minute."""
    return [
        Entry(
            f"/photos/{'a_b' if i % 2 else 'aXb'}/ü {i}.jpg",
            f"{i} 0",
            "visible" if i % 3 else "infrared",
            (None, "1", "2", "yard")[i % 4],
            None,
            f"2026-11-20 {i // 60:02d}:{i % 60:02d}:00",
        )
        for i in range(count)
    ]


FILTERS = [
    (Filter(), lambda entry: True),
    (Filter(modality="infrared"), lambda entry: entry.modality == "infrared"),
    (Filter(cameras=("2", "yard")), lambda entry: entry.camera in ("2", "yard")),
    (Filter(start="2026-11-20 00:30:00"), lambda entry: entry.time >= "2026-11-20 00:30:00"),
    (Filter(end="2026-11-20 00:30:00"), lambda entry: entry.time < "2026-11-20 00:30:00"),
    (Filter(folder="/photos/a_b"), lambda entry: entry.path.startswith("/photos/a_b/")),  # _ is no wildcard
    (Filter(folder="/photos/a"), lambda entry: False),
    (
        Filter("visible", ("1", "2"), "2026-11-20 00:10:00", "2026-11-20 01:00:00", "/photos"),
        lambda entry: (
            entry.modality == "visible"
            and entry.camera in ("1", "2")
            and "2026-11-20 00:10:00" <= entry.time < "2026-11-20 01:00:00"
            and entry.path.startswith("/photos/")
        ),
    ),
]


def check_search(index, version, expected, top=7):
    """expected: {Entry: vector}. Every filter finds what a sort of all similarities finds."""
    queries = unit(3, seed=9)
    for where, fits in FILTERS:
        entries = [entry for entry in expected if fits(entry)]
        scores = queries @ np.array([expected[entry] for entry in entries], np.float32).reshape(-1, DIM).T
        for found, row in zip(index.search(version, queries, top, where), scores, strict=True):
            nearest = np.argsort(-row)[:top]
            assert [Entry(*(image[name] for name in Entry._fields)) for image in found] == [entries[i] for i in nearest]
            np.testing.assert_allclose([image["similarity"] for image in found], row[nearest], atol=1e-6)


@pytest.fixture
def index(address):
    with contextlib.closing(open_index(address, create=True)) as index:
        yield index


def test_an_index_finds_what_plain_numpy_finds(index, address):
    entries, vectors = images(90), unit(90)
    version = index.begin("net.t", "a" * 64, "FC", DIM)
    index.add(version, entries[:50], vectors[:50])
    with contextlib.closing(open_index(address)) as reader:  # already open when another process writes
        expected = dict(zip(entries[:50], vectors[:50], strict=True))
        check_search(reader, version, expected)
        index.add(version, entries[50:], vectors[50:])
        changed = entries[3]._replace(stamp="new", time="2026-11-20 01:29:30")
        index.add(version, [changed], unit(1, seed=5))
        index.remove([entries[4].path, entries[89].path, "/photos/none.jpg"])
        relabelled = entries[5]._replace(camera="yard", person="Ann", time="2026-11-20 00:00:30")
        index.label([relabelled])
        expected = dict(zip(entries, vectors, strict=True)) | {changed: unit(1, seed=5)[0], relabelled: vectors[5]}
        for entry in (entries[3], entries[4], entries[5], entries[89]):
            del expected[entry]
        check_search(reader, version, expected)
        check_search(reader, version, expected, top=200)
        assert reader.entries(version) == {entry.path: entry for entry in expected}
        folder = {entry.path: entry for entry in expected if "/aXb/" in entry.path}
        assert reader.entries(version, "/photos/aXb") == folder
        assert sum(reader.counts(version, "camera").values()) == 88
        ids = [image["id"] for image in reader.search(version, unit(1, seed=9), 5)[0]]
        stored = {image["id"]: image["path"] for image in reader.search(version, unit(1, seed=9), 99)[0]}
        by_path = {entry.path: vector for entry, vector in expected.items()}
        vectors = reader.vectors([*ids, 10**6])  # the last one is not there
        assert set(vectors) == {*ids}
        for i in ids:
            np.testing.assert_array_equal(vectors[i], by_path[stored[i]])
        moved = [entry for entry in expected if "/a_b/" in entry.path]
        new = [entry._replace(path=entry.path.replace("/photos/a_b", "/elsewhere")) for entry in moved]
        index.add(version, new[:1], unit(1))  # was indexed at the new place already
        assert index.move("/photos/a_b", "/elsewhere") == len(moved)
        expected |= {entry: expected.pop(old) for old, entry in zip(moved, new, strict=True)}
        check_search(reader, version, expected | {new[0]: unit(1)[0]})


def test_a_later_version_keeps_labels_and_embeds_what_has_changed_anew(index):
    """One checkpoint serves while another one is still embedding the images."""
    (first, second, third), vectors = images(3), unit(3)
    serves, begun = (index.begin(f"{name}.t", name * 64, "FC", DIM) for name in "ab")
    for version in (serves, begun):
        index.add(version, [first, second, third], vectors)
    labelled = first._replace(camera="yard", person="Ann", time="2026-11-20 00:00:30", track="/photos//7")
    index.label([labelled])
    changed = second._replace(stamp="new")
    index.add(serves, [changed, third], unit(2, seed=5))
    assert index.entries(serves) == {entry.path: entry for entry in (labelled, changed, third)}
    assert index.entries(begun) == {entry.path: entry for entry in (labelled, third)}
    index.add(begun, [changed], unit(1))
    assert index.entries(serves) == index.entries(begun)


def test_a_file_that_is_gone_or_another_one_is_not_used_any_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(open_index("index.db", create=True)) as index:
        version = index.begin("net.t", "a" * 64, "FC", DIM)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        index.add(version, images(2), unit(2))
        (tmp_path / "index.db").rename(tmp_path / "old.db")
        for _ in range(2):
            for use in (lambda: index.add(version, images(2), unit(2)), lambda: index.search(version, unit(1), 5)):
                with pytest.raises(InputError, match="index.db: has been removed or replaced meanwhile; run again"):
                    use()
            open_index(str(tmp_path / "index.db"), create=True).close()


def plain_tracks(expected, queries):
    """{Entry: vector} -> for each query {(modality, camera, track): (similarity of the mean, its best image)}; what has
    no track is one by itself. By loops."""
    results = []
    for query in queries:
        tracks = {}
        for entry, vector in expected.items():
            tracks.setdefault((entry.modality, entry.camera, entry.track or entry.path), []).append((entry, vector))
        for key, pairs in tracks.items():
            mean = sum(vector.astype(np.float64) for _, vector in pairs)
            best = max(pairs, key=lambda pair: float(pair[1] @ query))[0]
            tracks[key] = float(mean @ query / np.linalg.norm(mean)), best
        results.append(tracks)
    return results


def check_tracks(index, version, expected):
    queries = unit(3, seed=9)
    for where, fits in FILTERS:
        chosen = {entry: vector for entry, vector in expected.items() if fits(entry)}
        plain = plain_tracks(chosen, queries)
        for top in (4, 200):
            for found, tracks in zip(index.search_tracks(version, queries, top, where), plain, strict=True):
                ranked = sorted(tracks.values(), key=lambda pair: -pair[0])[:top]
                np.testing.assert_allclose([image["similarity"] for image in found], [s for s, _ in ranked], atol=1e-6)
                assert [Entry(*(image[name] for name in Entry._fields)) for image in found] == [e for _, e in ranked]
        members = index.members(version, [*[*plain[0]][::2], ("visible", None, "none")], where)
        assert members.pop(("visible", None, "none")) == []
        for key, images in members.items():
            mine = [entry for entry in chosen if (entry.modality, entry.camera, entry.track or entry.path) == key]
            assert images == [entry._asdict() for entry in sorted(mine, key=lambda entry: (entry.time, entry.path))]


def test_tracks_are_those_of_plain_loops(index, address):
    """Cameras and modalities count their tracks from 0; every fifth image has none. Images come, go and change."""
    entries = [e._replace(track=f"/photos//{i % 7}" if i % 5 else None) for i, e in enumerate(images(90))]
    version, vectors = index.begin("net.t", "a" * 64, "FC", DIM), unit(90)
    index.add(version, entries[:60], vectors[:60])
    other = index.begin("other.t", "b" * 64, "FC", DIM)
    index.add(other, entries, unit(90, seed=3))  # which does not serve
    with contextlib.closing(open_index(address)) as reader:
        check_tracks(reader, version, dict(zip(entries[:60], vectors, strict=False)))
        index.add(version, entries[60:], vectors[60:])
        index.remove([entry.path for entry in entries[10:20]])
        changed = [entries[1]._replace(track="/photos//new"), entries[2]._replace(track=None)]
        index.label(changed)
        expected = dict(zip([entries[0], *changed, *entries[3:]], vectors, strict=True))
        check_tracks(reader, version, {e: v for e, v in expected.items() if e not in entries[10:20]})
        assert reader.search_tracks(version, unit(1), 5, Filter(cameras=("none",))) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("address", ["server"], indirect=True)
def test_a_track_that_is_removed_during_a_search_is_not_found(index, monkeypatch):
    entries = [entry._replace(track=f"/photos//{i}") for i, entry in enumerate(images(3))]
    version = index.begin("net.t", "a" * 64, "FC", DIM)
    index.add(version, entries, unit(3))
    (whole,) = index.search_tracks(version, unit(1), 5)
    results = index._results
    monkeypatch.setattr(index, "_results", lambda rows: results(rows[:-1]))
    (rest,) = index.search_tracks(version, unit(1), 5)
    assert len(rest) == 2
    assert [image for image in whole if image in rest] == rest


def test_tracks_move_with_their_folder(index):
    tracks = ["/a//1", "/a/b//1", None, "/a_b//1"]
    entries = [Entry(f"/a/b/{i}", "0 0", "visible", None, None, "2026-11-20 10:00:00", t) for i, t in enumerate(tracks)]
    version = index.begin("net.t", "a" * 64, "FC", DIM)
    index.add(version, entries, unit(4))
    for old, new, expected in (
        ("/a", "/c", ["/c//1", "/c/b//1", None, "/a_b//1"]),
        ("/c", "/c/c", ["/c/c//1", "/c/c/b//1", None, "/a_b//1"]),  # by a third place
        ("/c/c/b", "/d", ["/c/c//1", "/d//1", None, "/a_b//1"]),
    ):
        assert index.move(old, new) == 4
        assert [entry.track for _, entry in sorted(index.entries(version).items())] == expected


OLD_TABLES = """CREATE TABLE versions (version INTEGER PRIMARY KEY AUTOINCREMENT, checkpoint TEXT NOT NULL, \
sha256 TEXT NOT NULL, feature TEXT NOT NULL,
    dim INT NOT NULL, UNIQUE (sha256, feature)) STRICT;
CREATE TABLE images (id INTEGER PRIMARY KEY AUTOINCREMENT, \
version INT NOT NULL REFERENCES versions ON DELETE CASCADE, path TEXT NOT NULL,
    stamp TEXT NOT NULL, modality TEXT NOT NULL, camera TEXT, person TEXT, time TEXT NOT NULL, vector BLOB NOT NULL,
    UNIQUE (path, version)) STRICT;
CREATE INDEX images_by_place ON images (version, camera, time);"""


def test_an_index_from_before_there_were_tracks_is_taken_over(address):
    """With what is in it, by whoever opens it first, and for good."""
    entries, vectors = images(9), unit(9)
    rows = [(1, *entry[:-1], vector.tobytes()) for entry, vector in zip(entries[:5], vectors, strict=False)]
    names = "version, path, stamp, modality, camera, person, time, vector"
    if address.startswith("postgres"):
        with contextlib.closing(open_index(address, create=True)) as index:
            assert index.begin("net.t", "a" * 64, "FC", DIM) == 1
            index.add(1, entries[:5], vectors[:5])
            index.connection.execute("ALTER TABLE images DROP COLUMN track")
    else:
        with contextlib.closing(sqlite3.connect(address)) as old, old:
            old.executescript(OLD_TABLES)
            old.execute("INSERT INTO versions VALUES (1, 'net.t', ?, 'FC', ?)", ("a" * 64, DIM))
            old.executemany(f"INSERT INTO images ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    for create in (False, True, False):
        with contextlib.closing(open_index(address, create)) as index:
            check_search(index, 1, dict(zip(entries[:5], vectors, strict=False)))
    tracked = [entry._replace(track="/photos//1") for entry in entries[5:]]
    with contextlib.closing(open_index(address)) as index:
        index.add(1, tracked, vectors[5:])
        check_tracks(index, 1, dict(zip([*entries[:5], *tracked], vectors, strict=True)))


def test_two_processes_take_an_old_index_over_at_once(tmp_path, monkeypatch):
    """Both have seen the old tables before one of them changes these."""
    path, found_tables = str(tmp_path / "index.db"), FileIndex._found_tables
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(f"PRAGMA journal_mode = WAL; {OLD_TABLES}")

    def found_slowly(index):
        found = found_tables(index)
        monkeypatch.undo()
        open_index(path).close()  # the other one
        return found

    monkeypatch.setattr(FileIndex, "_found_tables", found_slowly)
    with contextlib.closing(open_index(path)) as index:
        assert index.versions() == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30, 0.9])
def test_vectors_that_are_not_of_unit_length_are_not_added(index, wrong):
    version, vectors = index.begin("net.t", "a" * 64, "FC", DIM), unit(3)
    vectors[1, 2] = wrong
    with pytest.raises(InputError, match=r"ü 1\.jpg: its features are not of unit length; .*--resume"):
        index.add(version, images(3), vectors)
    assert index.entries(version) == {}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30, 0.9])
def test_damaged_vectors_in_a_file_are_named(tmp_path, wrong):
    """NaN would rank last, infinity first. (pgvector stores neither.)"""
    file, vectors = str(tmp_path / "index.db"), unit(3)
    with contextlib.closing(open_index(file, create=True)) as index:
        version = index.begin("net.t", "a" * 64, "FC", DIM)
        index.add(version, images(3), vectors)
    vectors[1, 2] = wrong
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE images SET vector = ? WHERE path LIKE '%1.jpg'", (vectors[1].tobytes(),))
    with (
        contextlib.closing(open_index(file)) as index,
        pytest.raises(InputError, match=r"index\.db: the vector of .*ü 1\.jpg is damaged; .*remove.*index"),
    ):
        index.search(version, unit(1), 2)


@pytest.mark.parametrize(("old", "new"), [("/a", "/a/b"), ("/a/b", "/a"), ("/a", "/a"), ("/a/b", "/a/c")])
def test_a_folder_moves_into_itself_and_out_of_itself(index, old, new):
    entries = [
        Entry(f"/{name}", "0 0", "visible", None, None, "2026-11-20 10:00:00")
        for name in ("a/x", "a/b/x", "a/b/b/x", "a/y")
    ]
    version, vectors = index.begin("net.t", "a" * 64, "FC", DIM), unit(4)
    index.add(version, entries, vectors)
    moved = [entry.path.startswith(f"{old}/") and old != new for entry in entries]
    paths = [new + entry.path[len(old) :] if m else entry.path for entry, m in zip(entries, moved, strict=True)]
    expected = {path: i for i, path in enumerate(paths) if moved[i]}
    expected |= {path: i for i, path in enumerate(paths) if not moved[i]}  # what stays wins
    assert index.move(old, new) == sum(moved)
    found = {image["path"]: image["id"] for image in index.search(version, vectors[:1], 9)[0]}
    stored = index.vectors([*found.values()])
    assert found.keys() == expected.keys()
    for path, i in expected.items():
        np.testing.assert_array_equal(stored[found[path]], vectors[i])


def test_who_reads_does_not_wait_for_who_writes(tmp_path):
    path = tmp_path / "index.db"
    with (
        contextlib.closing(open_index(str(path), create=True)) as index,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        version, entries = index.begin("net.t", "a" * 64, "FC", DIM), images(3)
        index.add(version, entries, unit(3))
        other.execute("BEGIN IMMEDIATE")
        index.connection.execute("PRAGMA busy_timeout = 100")
        (trusted,) = index.connection.execute("PRAGMA trusted_schema").fetchone()
        assert not trusted
        assert index.versions()[0]["version"] == version
        assert index.counts(version, "modality") == {"visible": 2, "infrared": 1}
        assert index.entries(version) == {image.path: image for image in entries}
        assert len(index.vectors([image["id"] for image in index.search(version, unit(1), 3)[0]])) == 3
        assert len(index.search_tracks(version, unit(1), 3)[0]) == 3
        keys = [track_key(image._asdict()) for image in entries]
        assert [*index.members(version, keys, Filter()).values()] == [[image._asdict()] for image in entries]


def test_a_transaction_that_fails_changes_nothing_and_is_seen_when_it_ends(index, address):
    version, entries = index.begin("net.t", "a" * 64, "FC", DIM), images(3)
    index.add(version, entries, unit(3))
    with contextlib.closing(open_index(address)) as reader:
        with contextlib.suppress(KeyboardInterrupt), index.transaction():
            index._run("DELETE FROM images")
            assert len(reader.entries(version)) == 3
            raise KeyboardInterrupt
        assert len(reader.entries(version)) == 3
        with index.transaction():
            index._run("DELETE FROM images")
        assert not reader.entries(version)


def test_the_nearest_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(file_index, "BLOCK", 300)
    vectors, queries = unit(1000), unit(2, seed=9)
    with contextlib.closing(open_index(str(tmp_path / "index.db"), create=True)) as index:
        version = index.begin("net.t", "a" * 64, "FC", DIM)
        index.add(version, images(1000), vectors)
        for top in (1, 2, 20, 299, 300, 301, 999):
            for found, row in zip(index.search(version, queries, top), queries @ vectors.T, strict=True):
                assert [image["id"] - 1 for image in found] == np.argsort(-row)[:top].tolist()


def test_pages_show_equal_images_once(index):
    """Copies of an image have the same similarity; pages are the beginnings of one order."""
    version, entries = index.begin("net.t", "a" * 64, "FC", DIM), images(90)
    index.add(version, entries, np.repeat(unit(3), 30, axis=0))
    lists = [index.search(version, unit(1, seed=9), top)[0] for top in (10, 20, 45, 90)]
    assert {image["path"] for image in lists[-1]} == {entry.path for entry in entries}
    for shorter, longer in itertools.pairwise(lists):
        assert shorter == longer[: len(shorter)]


def test_a_version_serves_until_a_complete_one_takes_its_place(index, address):
    entries, old, new = images(20), unit(20), unit(20, seed=1)
    first = index.begin("old.t", "a" * 64, "FC", DIM)
    index.add(first, entries, old)
    second = index.begin("new.t", "b" * 64, "FC", DIM)
    assert second == index.begin("moved.t", "b" * 64, "FC", DIM) != index.begin("new.t", "b" * 64, "POOL", DIM)
    index.add(second, entries[:12], new[:12])
    assert [row["checkpoint"] for row in index.versions()][:2] == ["old.t", "moved.t"]
    check_search(index, first, dict(zip(entries, old, strict=True)))
    check_search(index, second, dict(zip(entries[:12], new, strict=False)))
    assert {entry.path for entry in index.switch(second)} == {entry.path for entry in entries[12:]}
    assert index.versions()[0]["version"] == first  # it still serves, as the other one lacks images
    index.add(second, entries[12:], new[12:])
    assert index.switch(second) == []
    assert index.versions()[0]["version"] == second
    check_search(index, second, dict(zip(entries, new, strict=True)))
    assert not index.entries(first)
    with contextlib.closing(open_index(address)) as other, pytest.raises(InputError, match="another checkpoint has re"):
        other.add(first, entries[:1], old[:1])


def add_part(address, start, barrier):
    barrier.wait()
    with contextlib.closing(open_index(address, create=True)) as index:
        version = index.begin("net.t", "a" * 64, "FC", DIM)
        entries, vectors = images(90), unit(90)
        for row in range(start, start + 40, 4):  # neighbours share rows
            index.add(version, entries[row : row + 4], vectors[row : row + 4])


def test_an_index_opens_while_another_process_makes_it(tmp_path):
    """Two processes make the tables of one file; the second writes before the first has set the journal."""
    path = str(tmp_path / "index.db")
    open_index(path, create=True).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
        other.execute("BEGIN IMMEDIATE")
        with contextlib.closing(open_index(path)) as index:
            other.execute("COMMIT")
            open_index(path).close()
            version = index.begin("net.t", "a" * 64, "FC", DIM)
        with contextlib.closing(open_index(path)) as index:
            assert index.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert index.versions()[0]["version"] == version


@pytest.mark.slow
def test_several_processes_fill_one_index(address):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=add_part, args=(address, start, barrier)) for start in (0, 0, 20, 50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    with contextlib.closing(open_index(address)) as index:
        check_search(index, index.versions()[0]["version"], dict(zip(images(90), unit(90), strict=True)))


@pytest.mark.slow
def test_the_graph_of_a_server_finds_nearly_the_same(database):
    entries, vectors = images(90) * 30, unit(2700)
    entries = [entry._replace(path=f"/{i}.jpg") for i, entry in enumerate(entries)]
    with contextlib.closing(open_index(database, create=True)) as index:
        version = index.begin("net.t", "a" * 64, "FC", DIM)
        index.add(version, entries, vectors)
        plain = [index.search(version, unit(20, seed=9), 10, where) for where, _ in FILTERS]
        index.approximate(version, DIM)
        index.approximate(version, DIM)  # it is there already
        for (where, _), exact in zip(FILTERS, plain, strict=True):
            found = index.search(version, unit(20, seed=9), 10, where)
            names = [[image["path"] for image in images] for pair in (found, exact) for images in pair]
            recall = [np.isin(b, a).mean() for a, b in zip(names[:20], names[20:], strict=True) if b]
            assert not recall or np.mean(recall) > 0.95
            scores = [[image["similarity"] for image in images] for images in found]
            assert all(row == sorted(row, reverse=True) for row in scores)


@pytest.mark.slow
def test_a_graph_that_gives_up_is_no_end_of_a_list_and_goes_with_its_version(database, monkeypatch):
    """pgvector stops after so many images, though more fit the filter."""
    monkeypatch.setattr(server_index, "EXACT", 0)
    with contextlib.closing(open_index(database, create=True)) as index:
        version, (query,) = index.begin("net.t", "a" * 64, "FC", DIM), unit(1, seed=9)
        entries = [Entry(f"/{i}.jpg", "0 0", "visible", str(i % 50), None, "2026-11-20 10:00:00") for i in range(3000)]
        vectors = np.where(np.arange(3000)[:, None] % 50 == 7, -query, query) + 0.1 * unit(3000)
        index.add(version, entries, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        exact = index.search(version, query[None], 60, Filter(cameras=("7",)))
        assert len(exact[0]) == 60
        index.approximate(version, DIM)
        index.connection.execute("SET hnsw.max_scan_tuples = 100")
        index.connection.execute("SET enable_sort = off")  # keeps the planner on the graph
        found = index.search(version, query[None], 60, Filter(cameras=("7",)))
        assert [image["id"] for image in found[0]] == [image["id"] for image in exact[0]]
        second = index.begin("new.t", "b" * 64, "FC", DIM)
        index.add(second, entries, unit(3000))
        index.switch(second)
        graphs = "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'graph%'"
        assert index.connection.execute(graphs).fetchone() == (0,)


@pytest.mark.slow
def test_a_server_that_cannot_be_used_is_one_line(database, postgres, monkeypatch):
    with pytest.raises(InputError, match="contains no index; make it with"):
        open_index(database)
    for address in (database.replace("@", ":secret@"), f"{database}?password=secret"):
        with pytest.raises(InputError, match="leave the password out of the address; set PGPASSWORD") as caught:
            open_index(address)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("PGPASSWORD", "wrong")
    for address, words in ((database, "password authentication failed"), ("postgresql://127.0.0.1:1/a", "refused")):
        with pytest.raises(InputError, match=f"cannot be used as an index .*{words}.*; check the address") as caught:
            open_index(address)
        assert "\n" not in str(caught.value)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match=r'needs python -m pip install "psycopg\[binary\]>=3.2.3" "pgvector>=0.5"'):
        open_index("postgresql://127.0.0.1/a")
    with pytest.raises(InputError, match="http://127.0.0.1:1: unknown kind of address; pass a file, or postgresql://"):
        open_index("http://127.0.0.1:1")


def test_files_that_are_no_index_are_refused_and_stay(tmp_path):
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE notes (text)")
    (tmp_path / "text.db").write_text("no database" * 100)
    for name in ("other.db", "text.db"):
        before = (tmp_path / name).read_bytes()
        for create in (False, True):
            with pytest.raises(InputError, match=f"{name}: (is not an index|cannot be used as an index .file is not)"):
                open_index(str(tmp_path / name), create)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(InputError, match=r"none.db: no such index; make it with python -m tools.search index"):
        open_index(str(tmp_path / "none.db"))
    with pytest.raises(InputError, match=r"is a folder; name a file, such as .*index.db"):
        open_index(str(tmp_path))


def test_a_damaged_or_doctored_file_is_refused(tmp_path):
    path = str(tmp_path / "index.db")
    with contextlib.closing(open_index(path, create=True)) as index:
        index.add(index.begin("net.t", "a" * 64, "FC", DIM), images(20), unit(20))
    good = (tmp_path / "index.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"cut.db: cannot be used as an index \(.*\); check the file, or remove it"):
        open_index(str(tmp_path / "cut.db")).search(1, unit(1), 5)
    for name, sql, words in (
        ("run.db", "CREATE TRIGGER t AFTER DELETE ON images BEGIN DELETE FROM versions; END", "is not an index"),
        ("size.db", "UPDATE images SET vector = x'00'", "cannot be used as an index"),
    ):
        path = str(tmp_path / name)
        Path(path).write_bytes(good)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(sql)
        with pytest.raises(InputError, match=words):
            open_index(path).search(1, unit(1), 5)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("cam3/0007/20261120_140311_5.jpg", {"camera": "3", "person": "0007", "time": "2026-11-20 14:03:11"}),
        ("cam3/0007/20261340_140311_5.jpg", None),  # no such month
        ("cam3/0007/20261120_5.jpg", None),
        ("a/cam3/0007/20261120_140311_5.jpg", None),
        ("cam3/0007/20261120_140311_5.jpgg", None),
    ],
)
def test_a_pattern_reads_a_path(path, expected):
    assert read_labels("cam{camera}/{person}/{time:%Y%m%d_%H%M%S}_{n}.jpg", None)(path) == expected


def test_a_time_may_have_its_date_in_a_folder_but_not_lack_it():
    read = read_labels("cam{camera}/{time:%Y%m%d/%H%M%S}_{n}.jpg", None)
    assert read("cam1/20261120/140311_1.jpg") == {"camera": "1", "time": "2026-11-20 14:03:11"}
    assert read("cam1/20261120/a/140311_1.jpg") is None
    for lacking in ("%H%M%S", "%m%d_%H%M%S", "%Y_%H%M%S"):  # all of 1900, or of January
        with pytest.raises(InputError, match="the time needs year, month and day"):
            read_labels(f"{{time:{lacking}}}.jpg", None)


def test_the_parts_of_a_track_are_joined(tmp_path):
    read = read_labels("{track}/cam{camera}/{track}/{n}.jpg", None)
    assert read("monday/cam3/17/1.jpg") == {"track": "monday/17", "camera": "3"}
    assert read("monday/cam3/1.jpg") is None
    (tmp_path / "labels.csv").write_text("path,track\na.jpg,17\nb.jpg,\n")
    read = read_labels(None, tmp_path / "labels.csv")
    assert (read("a.jpg"), read("b.jpg")) == ({"track": "17"}, {})


def test_a_pattern_reads_as_a_lazy_regular_expression_but_never_for_long():
    rng, found = random.Random(0), 0
    for _ in range(400):
        names = rng.sample(["camera", "person", "a", "b", "c"], rng.randint(1, 4))
        parts = [(rng.choice(["", "_", "c", "/", "ab"]), name) for name in names]
        expression = "".join(f"{text}(?P<{name}>[^/]+?)" for text, name in parts) + "_"
        read = read_labels("".join(f"{text}{{{name}}}" for text, name in parts) + "_", None)
        for _ in range(5):
            path = "".join(rng.choice("abc_/x") for _ in range(rng.randint(1, 9))) + "_"
            match = re.fullmatch(expression, path)
            wanted = {name: match[name] for name in ("camera", "person") if name in names} if match else None
            assert read(path) == wanted
            found += bool(wanted)
    assert found > 20
    # Tried one after the other, the ends of five fields are billions.
    assert read_labels("{a}_{b}_{c}_{d}_{e}_{person}.png", None)("_" * 250) is None


def test_labels_of_a_table(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,camera,time\na.jpg,3,2026-11-20T14:00\nb.jpg,,\n")
    labels = read_labels(None, table)
    assert labels("a.jpg") == {"camera": "3", "time": "2026-11-20 14:00:00"}
    assert (labels("b.jpg"), labels("c.jpg")) == ({}, None)
    table.write_text("\ufeffpath, camera\n.\\a\\b.jpg, 3\n")  # of Windows, with spaces
    assert read_labels(None, table)("a/b.jpg") == {"camera": "3"}
    for text, words in (
        ("path,time\na.jpg,noon\n", "labels.csv, line 2: time noon: is not a time; write it as 2026-11-20 or"),
        ("path,camera,camera\na.jpg,3,3\n", "labels.csv: has two columns camera; keep one"),
        ("path, Camera\na.jpg,3\n", "labels.csv: its first line must name its columns"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            read_labels(None, table)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="pipe.csv: cannot be read"):
        read_labels(None, tmp_path / "pipe.csv")
    assert read_labels("/".join(["{a}"] * 100), None)("/".join("b" * 100)) == {}
    with pytest.raises(InputError, match="more than 100 fields"):
        read_labels("{a}/" * 101, None)
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        read_labels(None, tmp_path / "none.csv")
    with pytest.raises(InputError, match="{time} needs a format, such as {time:%Y%m%d_%H%M%S}"):
        read_labels("{time}", None)
    with pytest.raises(InputError, match="times have no zone; put {zone} after {time}, in place of %z"):
        read_labels("{time:%Y%m%d%z}", None)
    times = ("{time}", "{time:%H%M%z}", "{time:%s}", "{time:%H%H}")
    for pattern in (*times, "cam{camera", "{camera}/{camera}.jpg", "{}.jpg", "{a b}.jpg"):
        with pytest.raises(InputError, match="--pattern .*; write it as"):
            read_labels(pattern, None)


def test_times_of_flags():
    assert parse_time("2026-11-20", "--to", end=True) == "2026-11-21 00:00:00"
    assert parse_time("2026-11-20T14:30", "--to", end=True) == "2026-11-20 14:30:00"
    assert parse_time("20261120T14", "--to", end=True) == "2026-11-20 14:00:00"
    assert parse_time("2026-11-20 14:30:59.999", "--from") == "2026-11-20 14:30:59"
    for zoned in ("2026-11-20T14:30Z", "2026-11-20T14:30+01:00"):
        with pytest.raises(InputError, match="--from 2026-.*14:30.+: has a time zone; write what a clock"):
            parse_time(zoned, "--from")
    with pytest.raises(InputError, match="--from noon: is not a time; write it as"):
        parse_time("noon", "--from")
    assert parse_time("9999-12-31", "--to", end=True) == "9999-12-31 23:59:59"


@pytest.mark.parametrize("name", [":memory:", "file:a.db?mode=memory", "file:a.db"])
def test_a_name_is_that_of_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FileIndex(name, create=True).close()
    assert name in os.listdir()
    FileIndex(name).close()


BESIDE = "a search writes beside it; copy it to a folder that you may write to"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("SQLITE_IOERR_SHMOPEN", "free some space, or check the disk, and run again"),
        ("SQLITE_FULL", "free some space and run again; the index is intact"),
        ("SQLITE_BUSY_SNAPSHOT", "another process keeps it; run again later"),
        ("SQLITE_CANTOPEN", BESIDE),
        ("SQLITE_READONLY_DBMOVED", BESIDE),
        ("SQLITE_CORRUPT", "check the file, or remove it and index again"),
        (None, "check the file, or remove it and index again"),
    ],
)
def test_what_helps_depends_on_the_fault(name, remedy, tmp_path):
    index, error = FileIndex(tmp_path / "a.db", create=True), sqlite3.OperationalError("it failed\nDETAIL: of a server")
    if name:
        error.sqlite_errorname = name
    words = f"a.db: cannot be used as an index (it failed); {remedy}"
    with pytest.raises(InputError, match=f"{re.escape(words)}$"), index._errors():
        raise error
    index.close()


def test_an_image_whose_name_is_not_utf_8_is_listed(tmp_path):
    """As old archives unpack them."""
    for name in (b"a\xff.jpg", b"b.jpg"):
        open(os.path.join(bytes(tmp_path), name), "w").close()
    files, unreadable, _, _ = list_images(str(tmp_path))
    assert [*files] == [str(tmp_path / "b.jpg")]
    (line,) = unreadable
    assert line.endswith(r"/a\xff.jpg': its name is not UTF-8; rename it")


def test_folders_of_any_depth_are_listed(tmp_path):
    folders = [tmp_path]
    try:
        for _ in range(1200):  # Python's functions call themselves at most 1,000 times
            folders.append(Path(f"{folders[-1]}/d"))
            folders[-1].mkdir()
        (folders[-1] / "a.jpg").touch()
        (folders[600] / "b.jpg").touch()
        files, *rest = list_images(str(tmp_path))
        assert ([*files], *rest) == ([f"{folders[600]}/b.jpg", f"{folders[1200]}/a.jpg"], [], (), "")
        (folders[-1] / "a.jpg").unlink()
        (folders[600] / "b.jpg").unlink()
    finally:  # pytest would call itself, too
        for folder in folders[:0:-1]:
            folder.rmdir()


def test_an_image_s_place_is_listed_as_os_walk_does(tmp_path):
    """Files before folders, each sorted, folder by folder; without what is hidden, and without links to folders."""
    places = ("b.jpg", "a/c.jpg", "a/b/d.jpg", "a.jpg/e.jpg", "é/f.jpg", ".h/g.jpg", "a/.i.jpg", "z/k.png")
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    (tmp_path / "to a").symlink_to("a")
    (tmp_path / "c.jpg").symlink_to("a")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "d.jpg").symlink_to("a/c.jpg")
    expected = []
    for where, folders, names in os.walk(tmp_path):
        folders[:] = sorted(name for name in folders if name != ".h")
        expected += [f"{where}/{name}" for name in sorted(names) if name not in (".i.jpg", "loop.jpg")]
    files, unreadable, unchecked, others = list_images(str(tmp_path))
    assert ([*files], others) == (expected, "")
    assert unreadable == [f"{tmp_path}/loop.jpg: cannot be read (Too many levels of symbolic links)"]
    assert unchecked == (f"{tmp_path}/loop.jpg",)


def test_images_that_cannot_be_checked_are_not_taken_for_deleted(tmp_path, monkeypatch):
    errors = {
        "gone.jpg": FileNotFoundError(errno.ENOENT, "gone"),
        "locked.jpg": PermissionError(errno.EACCES, "locked"),
    }
    for name in (*errors, "good.jpg"):
        (tmp_path / name).touch()
    stat = os.stat

    def some(path, **more):
        if error := errors.get(os.path.basename(path)):
            raise error
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", some)
    files, unreadable, unchecked, _ = list_images(str(tmp_path))
    monkeypatch.undo()
    assert [*files] == [f"{tmp_path}/good.jpg"]
    assert unreadable == [f"{tmp_path}/{name}.jpg: cannot be read ({name})" for name in ("gone", "locked")]
    assert unchecked == (f"{tmp_path}/locked.jpg",)


@pytest.mark.parametrize("flags", [{"resume": "x.t"}, {"modality": "visible"}])
def test_a_file_is_made_with_all_that_an_index_needs(flags, tmp_path):
    with pytest.raises(InputError, match="there is no index yet; pass --resume and --modality"):
        open_to_write(SimpleNamespace(index=f"{tmp_path}/a.db", **{"resume": None, "modality": None} | flags))
    assert not [*tmp_path.iterdir()]


def test_tracks_of_one_name_in_several_folders_are_told():
    """Unless their cameras tell them apart."""
    tracks = [("/a/1.jpg", "1", None), ("/a/2.jpg", "1", None), ("/a/3.jpg", "2", None), ("/b/1.jpg", "2", None)]
    tracks += [("/a/4.jpg", "3", "c"), ("/b/4.jpg", "3", "d")]
    labels = {path: {"track": f"/f//{track}", "camera": camera} for path, track, camera in tracks}
    assert spread_tracks(labels | {"/a/5.jpg": {}}) == ["2"]


def test_a_name_that_is_not_utf_8_is_told(tmp_path):
    index = FileIndex(tmp_path / "a.db", create=True)
    with pytest.raises(InputError, match=r"^a\?: is no name in UTF-8; rename it"), index._errors():
        raise UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates")
    index.close()
