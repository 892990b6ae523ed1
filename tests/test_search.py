"""Searching one's own images: indexing folders, queries, the library, and ONNX files."""

import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import utils
from checks import embedded_images, stored
from conftest import SIZE, save_network
from core.images import read_image
from testing.re_rank import k_reciprocal
from tests.oracles import plain_embedding
from tools import embedder, export
from tools.search import __main__ as search
from tools.search import finder, indexer, labels
from tools.search import page as search_page
from tools.search.address import open_index
from tools.search.file_index import FileIndex
from tools.search.index import Entry
from tools.search.server_index import ServerIndex
from utils import InputError

PROCESSES = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
PROCESSES.set_forkserver_preload(["tools.search"])
CPU = ["--gpu", "cpu", "--workers", "0"]
pytestmark = pytest.mark.usefixtures("in_float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "net.t", seed=0)


@pytest.fixture(scope="module")
def pictures(sysu_tree):
    """(visible, infrared) images of the demo tree."""
    return sorted(sysu_tree.glob("cam[12]/*/*.jpg"))[:14], sorted(sysu_tree.glob("cam3/*/*.jpg"))[:3]


@pytest.fixture
def folder(pictures, tmp_path):
    """Images at several depths, two that cannot be read, and what is left out."""
    folder = tmp_path / "mine"
    for number, path in enumerate(pictures[0]):
        place = folder / ("", "b", "b/deep er/ü", "a")[number % 4] / f"{number:02d}.JPG"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "lost.jpg").symlink_to("nowhere")
    for name in ("notes.txt", ".hidden.jpg"):
        shutil.copy(pictures[0][0], folder / name)
    os.mkfifo(folder / "pipe.jpg")
    return folder


@pytest.fixture
def made(folder, checkpoint, tmp_path):
    """(folder, index) after a first call."""
    index = tmp_path / "index.db"
    run_index(folder, index, "--resume", checkpoint, "--modality", "visible")
    return folder, index


def run_index(folder, index, *more):
    return search.main(["index", str(folder), "--index", str(index), *CPU, *map(str, more)])


def run_query(index, images, *more, modality="infrared"):
    flags = ["--modality", modality, "--index", str(index), *CPU, *map(str, more)]
    return search.main(["query", *map(str, images), *flags])


def readable(folder):
    return sorted(path for path in folder.rglob("[0-9]*.JPG"))


def plain_search(checkpoint, folder, images, modality="infrared"):
    """[(path, similarity)] for each image, best first, by a loop over plain features."""
    embed = plain_embedding(checkpoint)
    gallery = {str(path.resolve()): embed(path, "visible") for path in readable(folder)}
    ranked = []
    for image in images:
        query = embed(image, modality)
        scores = {path: float(query @ feature) for path, feature in gallery.items()}
        ranked.append(sorted(scores.items(), key=lambda item: -item[1]))
    return ranked


def check_found(results, expected, top=None):
    """Same paths in the same order (neighbours whose similarity differs by rounding may change places)."""
    for result, ranked in zip(results, expected, strict=True):
        scores = dict(ranked)
        assert [image["rank"] for image in result["found"]] == list(range(1, len(ranked[:top]) + 1))
        assert len({image["path"] for image in result["found"]}) == len(result["found"])
        for image, (_, similarity) in zip(result["found"], ranked[:top], strict=True):
            assert image["similarity"] == pytest.approx(similarity, abs=2e-6)
            assert image["similarity"] == pytest.approx(scores[image["path"]], abs=2e-6)


def test_a_query_finds_what_a_plain_loop_finds(folder, checkpoint, pictures, tmp_path, capsys):
    flags = ["--resume", checkpoint, "--modality", "visible", "--workers", "2", "--batch", "4"]
    counts = run_index(folder, tmp_path / "index.db", *flags)
    assert {name: counts[name] for name in ("embedded", "changed", "vanished", "images")} == {
        "embedded": 14,
        "changed": 0,
        "vanished": 0,
        "images": 14,
    }
    assert len(counts["unreadable"]) == 3
    out = capsys.readouterr().out
    assert f"unreadable: {folder}/pipe.jpg: is no regular file; remove it\n" in out
    assert all(re.search(rf"unreadable: .*{name}: cannot be read", out) for name in ("broken.png", "lost.jpg"))
    expected = plain_search(checkpoint, folder, pictures[1])
    check_found(run_query(tmp_path / "index.db", pictures[1], "--top", "5"), expected, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pictures[1][0]} (infrared)"
    assert lines[1].startswith(f"   1  {expected[0][0][1]:6.3f}  {expected[0][0][0]}  20")  # and its file's time
    # More than there are; and of the images themselves, each is its own first.
    check_found(run_query(tmp_path / "index.db", pictures[1][:1], "--top", "50"), expected[:1])
    own = readable(folder)[:3]
    results = run_query(tmp_path / "index.db", own, "--top", "1", modality="visible")
    assert [result["found"][0]["path"] for result in results] == [str(path.resolve()) for path in own]


def test_a_second_call_embeds_only_what_is_new_or_changed(made, checkpoint, pictures, monkeypatch):
    folder, index = made
    seen, before = embedded_images(monkeypatch), stored(index)
    assert run_index(folder, index)["embedded"] == 0
    assert seen == ["broken.png"]  # which is tried each time
    assert stored(index) == before

    gone, changed, spoilt = readable(folder)[:3]
    gone.unlink()
    shutil.copy(pictures[1][0], changed)
    spoilt.write_bytes(b"no image")
    shutil.copy(pictures[1][1], folder / "b" / "77.JPG")
    seen.clear()
    counts = run_index(folder, index)
    assert sorted(seen) == sorted([changed.name, spoilt.name, "77.JPG", "broken.png"])
    assert (counts["embedded"], counts["changed"], counts["vanished"], counts["images"]) == (2, 2, 1, 13)
    assert len(counts["unreadable"]) == 4
    spoilt.unlink()
    check_found(run_query(index, pictures[1]), plain_search(checkpoint, folder, pictures[1]), 10)


def test_what_does_not_fit_an_index_is_refused(made, checkpoint, pictures, tmp_path):
    folder, index = made
    other, before = save_network(tmp_path / "other.t", seed=1), stored(index)
    with pytest.raises(InputError, match="other.t: is not the checkpoint that made .*index.db; pass .*net.t .sha256"):
        run_query(index, pictures[1], "--resume", other)
    # The checkpoint that the index remembers is another one now, or gone: its hash is what counts.
    mine = shutil.copy(checkpoint, tmp_path / "mine.t")
    run_index(folder, index, "--resume", mine)  # its place is remembered
    shutil.copy(other, mine)
    with pytest.raises(InputError, match=r"mine.t: is not the checkpoint"):
        run_query(index, pictures[1])
    Path(mine).unlink()
    with pytest.raises(InputError, match=r"mine.t: no such file; .*index.db was made with it: pass .* with --resume"):
        run_query(index, pictures[1])
    assert run_query(index, pictures[1], "--resume", checkpoint)
    assert stored(index) == before


def test_a_moved_folder_is_not_embedded_again(made, checkpoint, pictures, monkeypatch):
    folder, index = made
    seen, old = embedded_images(monkeypatch), folder
    folder = folder.rename(folder.parent / "moved")
    assert run_index(folder, index, "--moved_from", old)["embedded"] == 0
    assert set(seen) == {"broken.png"}
    check_found(run_query(index, pictures[1]), plain_search(checkpoint, folder, pictures[1]), 10)


@pytest.fixture
def cameras(sysu_tree, checkpoint, address):
    """An index of cameras 1 and 2, visible, and 3, infrared, with persons and times -> (address, images' facts)."""
    facts = {}
    for camera, modality in (("1", "visible"), ("2", "visible"), ("3", "infrared")):
        table = Path(f"{sysu_tree}-{camera}.csv")
        lines = ["path,camera,person,time"]
        for minute, path in enumerate(sorted((sysu_tree / f"cam{camera}").glob("*/*.jpg"))):
            time = f"2026-11-{19 + int(camera)} 14:{minute:02d}:00"
            facts[str(path)] = {"camera": camera, "person": path.parent.name, "time": time, "modality": modality}
            lines.append(f"{path.relative_to(sysu_tree / f'cam{camera}')},{camera},{path.parent.name},{time}")
        table.write_text("\n".join(lines))
        flags = ["--modality", modality, "--csv", table, "--resume", checkpoint]
        assert run_index(sysu_tree / f"cam{camera}", address, *flags)["unlabelled"] == []
    return address, facts


def test_filters_groups_pages_and_several_queries(cameras, checkpoint, sysu_tree):
    address, facts = cameras
    embed = plain_embedding(checkpoint)
    gallery = {path: embed(path, fact["modality"]) for path, fact in facts.items()}
    images = sorted(sysu_tree.glob("cam6/*/*.jpg"))[:3]
    queries = np.stack([embed(path, "infrared") for path in images])

    def ranked(fits, scores=None):
        """Paths that fit, best first by the first query or by scores(feature)."""
        scores = scores or (lambda feature: feature @ queries[0])
        chosen = {path: float(scores(feature)) for path, feature in gallery.items() if fits(facts[path])}
        return sorted(chosen.items(), key=lambda item: -item[1])

    def found(*flags):
        return run_query(address, images[: 1 if "--combine" not in flags else 3], *flags, "--top", "9")

    filters = ["--camera", "2", "3", "--gallery_modality", "visible", "--from", "2026-11-21T14:10"]
    expected = ranked(lambda f: f["camera"] == "2" and f["time"] >= "2026-11-21 14:10")[:9]
    check_found(found(*filters, "--to", "2026-11-22"), [expected])
    (first,) = found("--folder", sysu_tree / "cam2", "--to", "2026-11-21")
    assert {facts[image["path"]]["camera"] for image in first["found"]} == {"2"}
    for image in first["found"]:
        assert {name: image[name] for name in facts[image["path"]]} == facts[image["path"]]

    second = found("--combine", "best", "--page", "2")
    assert [image["rank"] for image in second[0]["found"]] == list(range(10, 19))
    best = ranked(lambda fact: True, lambda feature: (queries @ feature).max())
    scores = [image["similarity"] for image in second[0]["found"]]
    assert scores == pytest.approx([score for _, score in best[9:18]], abs=2e-6)
    people = list(dict.fromkeys(facts[path]["person"] for path, _ in ranked(lambda fact: True)))
    assert [image["person"] for image in found("--group")[0]["found"]] == people[:9]
    assert found("--rerank") != found()


def test_lists_of_made_up_features_are_those_of_plain_loops(tmp_path, monkeypatch):
    """Every way to combine queries, order anew, group and turn pages; of 40 images, every fifth is of nobody known and
    every seventh of no track."""
    monkeypatch.setattr(finder, "RERANKED", 12)
    queries, vectors = np.split(np.random.default_rng(0).normal(size=(43, 5)), [3])
    queries, vectors = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors))
    (tmp_path / "0").touch()
    stamp = finder.file_stamp(os.stat(tmp_path / "0"))
    about = {"stamp": stamp, "modality": "visible", "time": "2026-11-20 10:00:00"}
    images = [about | {"id": i, "path": f"{tmp_path}/{i}", "person": i % 5 and f"p{i % 9}"} for i in range(40)]
    images = [image | {"camera": i % 2, "track": i % 7 and f"/t//{i % 9}"} for i, image in enumerate(images)]

    def nearest(queries, count):
        scores = (queries @ vectors.T).max(axis=0)
        return [images[i] | {"similarity": round(scores[i], 9)} for i in np.argsort(-scores)[:count]]

    mine = finder.Finder.__new__(finder.Finder)
    mine.about, mine.embedder = {"version": 1}, lambda files, modality: queries.copy()
    mine.index = SimpleNamespace(
        uri="", versions=lambda: [mine.about], vectors=lambda ids: {i: vectors[i] for i in ids}
    )
    mine.index.counts = lambda version, column: {"visible": 40}
    mine.index.search = lambda version, queries, count, where: [nearest(row[None], count) for row in queries]
    mine.index.members = lambda version, keys, where: dict.fromkeys(keys, images[:1])
    mean = queries.mean(axis=0, keepdims=True) / np.linalg.norm(queries.mean(axis=0))
    whole = {None: [row[None] for row in queries], "mean": [mean], "best": [queries]}
    for combine, rerank, group, page in itertools.product(whole, (False, True), (None, "person", "best"), (1, 2, 4)):
        lists = mine([], "visible", 6, page, combine=combine, rerank=rerank, group=group)
        for found, asked in zip(lists, whole[combine], strict=True):
            plain = nearest(asked, 40)
            if rerank:
                order = k_reciprocal(asked, np.stack([vectors[image["id"]] for image in plain[:12]])).min(axis=0)
                plain = [plain[i] for i in np.argsort(order, kind="stable")] + plain[12:]
            if group:
                people = [image["person"] or image["id"] for image in plain]
                if group == "best":
                    people = [(image["camera"], image["track"] or image["id"]) for image in plain]
                plain = [image for i, image in enumerate(plain) if people[i] not in people[:i]]
            expected = [image | {"rank": rank, "changed": image["id"] > 0} for rank, image in enumerate(plain, 1)]
            facts = {"images", "first", "last", "strip"} if group == "best" else set()
            assert all(facts <= image.keys() for image in found)
            found = [{name: value for name, value in image.items() if name not in facts} for image in found]
            assert found == expected[6 * page - 6 : 6 * page]

    def tracks(query):
        """[(similarity of the mean, key, best image)], best first."""
        rows, found = {}, []
        for i, image in enumerate(images):
            rows.setdefault((image["camera"], image["track"] or image["id"]), []).append(i)
        for key, members in rows.items():
            total = vectors[members].sum(axis=0)
            best = images[max(members, key=lambda i: vectors[i] @ query)]
            found.append((round(float(total @ query / np.linalg.norm(total)), 9), key, best))
        return sorted(found, key=lambda track: -track[0])

    mine.index.search_tracks = lambda version, queries, count, where: [
        [image | {"similarity": similarity} for similarity, _, image in tracks(query)[:count]] for query in queries
    ]
    for combine, (top, page) in itertools.product(whole, ((6, 1), (6, 3), (30, 1))):
        lists = mine([], "visible", top, page, combine=combine, group="mean")
        for found, asked in zip(lists, whole[combine], strict=True):
            best = {}
            for similarity, key, _ in itertools.chain(*map(tracks, asked)):
                best[key] = max(similarity, best.get(key, -1))
            plain = sorted(best.items(), key=lambda item: -item[1])[top * (page - 1) : top * page]
            assert [(image["camera"], image["track"] or image["id"]) for image in found] == [key for key, _ in plain]
            assert [image["similarity"] for image in found] == [similarity for _, similarity in plain]
    mine.index.vectors = lambda ids: {}  # another process has removed them
    assert mine([], "visible", 6, rerank=True) == mine([], "visible", 6)
    mine.index.search = lambda *_: [[]] * 3
    with pytest.raises(InputError, match="none of its images fits all filters"):
        mine([], "visible", 6, rerank=True)


@pytest.fixture
def tracked(sysu_tree, checkpoint, address, tmp_path):
    """An index of tracks, which cameras 1 and 2 both count from 0, and of a folder of infrared ones by --tracks folder
    -> (address, {path: facts}, folders)."""
    facts, folders = {}, {"visible": tmp_path / "visible", "infrared": tmp_path / "infrared"}
    for camera, modality in (("1", "visible"), ("2", "visible"), ("3", "infrared")):
        for number, source in enumerate(sorted((sysu_tree / f"cam{camera}").glob("*/*.jpg"))[:14]):
            name = f"cam{camera}/{number // 4}/{number:02d}.jpg"
            path = folders[modality] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path)
            os.utime(path, (10**9 + 60 * number, 10**9 + 60 * number))
            track = f"{number // 4}" if modality == "visible" else f"cam3/{number // 4}"
            track = f"{folders[modality]}//{track}"
            camera_label = camera if modality == "visible" else None
            facts[str(path)] = {"modality": modality, "camera": camera_label, "track": track, "number": number}
    flags = ["--resume", checkpoint, "--pattern", "cam{camera}/{track}/{n}.jpg"]
    assert run_index(folders["visible"], address, *flags, "--modality", "visible")["unlabelled"] == []
    run_index(folders["infrared"], address, "--tracks", "folder", "--modality", "infrared")
    return address, facts, folders


def test_tracks_are_found_as_by_plain_loops(tracked, checkpoint, sysu_tree, capsys):
    address, facts, folders = tracked
    embed = plain_embedding(checkpoint)
    features = {path: embed(path, fact["modality"]) for path, fact in facts.items()}
    images = sorted(sysu_tree.glob("cam6/*/*.jpg"))[:3]
    queries = np.stack([embed(path, "infrared") for path in images])
    mean = queries.mean(axis=0) / np.linalg.norm(queries.mean(axis=0))

    def unit_mean(paths):
        total = sum(features[path] for path in paths)
        return total / np.linalg.norm(total)

    def plain(how, fits, asked=(mean,)):
        """[(similarity, key, its images in the order of time, the most similar one)], best first."""
        tracks = {}
        for path in filter(fits, facts):
            tracks.setdefault(tuple(facts[path][name] for name in ("modality", "camera", "track")), []).append(path)
        ranked = []
        for key, paths in tracks.items():
            vectors = [unit_mean(paths)] if how == "mean" else [features[path] for path in paths]
            similarity, nearest = max((float(query @ v), i) for i, query in enumerate(asked) for v in vectors)
            best = max(paths, key=lambda path: asked[nearest] @ features[path])  # to the query that has found the track
            ranked.append((similarity, key, sorted(paths, key=lambda path: facts[path]["number"]), best))
        return sorted(ranked, reverse=True)

    def check(found, expected):
        assert len(found) == len(expected)
        for image, (similarity, key, paths, best) in zip(found, expected, strict=True):
            assert image["similarity"] == pytest.approx(similarity, abs=2e-6)
            assert (image["modality"], image["camera"], image["track"]) == key
            assert (image["images"], image["changed"]) == (len(paths), False)
            assert image["path"] == best
            assert [small["path"] for small in image["strip"]] == paths  # no track has more than four
            times = [labels.file_time(f"0 {os.stat(path).st_mtime_ns}") for path in paths]
            assert (image["first"], image["last"]) == (times[0], times[-1])

    everything = lambda path: True  # noqa: E731
    filters = ["--camera", "1", "--from", labels.file_time("0 1000000120000000000")[:19].replace(" ", "T")]
    later = lambda path: facts[path]["camera"] == "1" and facts[path]["number"] >= 2  # noqa: E731
    for how in ("mean", "best"):
        ask = [address, images, "--tracks", how, "--combine", "mean", "--top", "5"]
        expected = plain(how, everything)
        check(run_query(*ask)[0]["found"], expected[:5])
        (second,) = run_query(*ask, "--page", "2")
        check(second["found"], expected[5:10])
        assert [image["rank"] for image in second["found"]] == [6, 7, 8, 9, 10]
        check(run_query(*ask, *filters)[0]["found"], plain(how, later))
        least = (expected[1][0] + expected[2][0]) / 2
        check(run_query(*ask, "--min_similarity", least)[0]["found"], expected[:2])
        ask[5] = "best"
        expected = plain(how, everything, queries)
        check(run_query(*ask)[0]["found"], expected[:5])
        check(run_query(*ask, "--top", "14")[0]["found"], expected)
    capsys.readouterr()
    (result,) = run_query(*ask)
    best = result["found"][0]
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"   1  {best['similarity']:6.3f}  {best['path']}  ")
    assert line.endswith(
        f"track {best['track'].split('//')[1]}, {best['images']} images, {best['first']} to {best['last'][11:]}"
    )
    assert run_query(*ask, "--json") == json.loads(capsys.readouterr().out)
    for page in ("1", "2"):  # which is not beyond the last
        run_query(*ask, "--min_similarity", "1", "--page", page)
        assert "none: no track has a similarity of 1.000" in capsys.readouterr().out


def test_a_folder_is_a_query_of_all_its_images(tracked, checkpoint, capsys):
    """A track finds itself, and is the mean of its images."""
    address, facts, folders = tracked
    place = folders["visible"] / "cam2" / "1"
    paths = sorted(path for path in facts if path.startswith(f"{place}/"))
    (result,) = run_query(address, [place], "--tracks", "mean", "--top", "1", modality="visible")
    assert (result["queries"], capsys.readouterr().out.splitlines()[-2]) == (paths, f"{place} (visible)")
    found = result["found"][0]
    assert (found["camera"], found["track"]) == ("2", f"{folders['visible']}//1")
    assert found["similarity"] == pytest.approx(1, abs=2e-6)
    assert run_query(address, [place], modality="visible") == run_query(
        address, paths, "--combine", "mean", modality="visible"
    )
    assert run_query(address, [place, paths[0]], "--combine", "best", modality="visible") == run_query(
        address, [*paths, paths[0]], "--combine", "best", modality="visible"
    )


def test_the_strip_of_a_track_is_spaced_evenly():
    images = [{"path": f"/{i}", "stamp": "0 0", "time": f"{i:02d}"} for i in range(21)]
    facts = finder.track_facts(images)
    assert [image["path"] for image in facts["strip"]] == ["/0", "/4", "/8", "/12", "/16", "/20"]
    assert (facts["images"], facts["first"], facts["last"]) == (21, "00", "20")
    assert [image["path"] for image in finder.track_facts(images[:2])["strip"]] == ["/0", "/1"]
    assert [image["path"] for image in finder.track_facts(images[:1])["strip"]] == ["/0"]


def test_images_in_words():
    image = {"person": "7", "camera": "3", "track": None, "time": "2026-11-20 10:00:00", "changed": True}
    words = "camera 3, person 7, 2026-11-20 10:00:00, (changed since it was indexed)"
    assert finder.describe(image) == words
    bare = image | {"person": None, "camera": None, "changed": False}
    assert finder.describe(bare) == image["time"]
    track = bare | {"track": "/a/b//1/2", "images": 2, "first": "09:00", "last": "10:00"}
    assert finder.describe(track) == "track 1/2, 2 images, 09:00 to 10:00"
    assert finder.describe(track | {"images": 1, "first": "10:00"}) == "track 1/2, 1 image, 10:00"
    assert utils.printable("a\udcff.jpg") == "a?.jpg"


def test_a_new_checkpoint_takes_over_when_all_is_embedded(made, checkpoint, pictures, tmp_path, monkeypatch):
    folder, index = made
    second = tmp_path / "second"
    second.mkdir()
    for number, path in enumerate(pictures[0][:3]):
        shutil.copy(path, second / f"{number}.jpg")
    run_index(second, index, "--modality", "visible")
    before, other = stored(index), save_network(tmp_path / "other.t", seed=1)
    lost = second.rename(tmp_path / "unmounted")
    with pytest.raises(
        InputError, match="3 images, such as .*, cannot be read, so the old features still serve; restore"
    ):
        run_index(folder, index, "--resume", other)
    assert stored(index) == before
    run_query(index, pictures[1], "--resume", checkpoint)
    lost.rename(second)
    seen = embedded_images(monkeypatch)
    assert run_index(folder, index, "--resume", other)["embedded"] == 3  # the others were embedded before
    assert "00.JPG" not in seen
    monkeypatch.undo()
    after = stored(index)
    assert {path: entry for path, (entry, _) in after.items()} == {path: entry for path, (entry, _) in before.items()}
    with pytest.raises(InputError, match="net.t: is not the checkpoint"):
        run_query(index, pictures[1], "--resume", checkpoint)
    assert search.main(["remove", str(second), "--index", str(index)]) == 3
    check_found(run_query(index, pictures[1]), plain_search(other, folder, pictures[1]), 10)


def test_a_takeover_in_the_middle_of_a_call_is_not_undone(made, monkeypatch):
    """While a call loads the network of the index, another checkpoint takes its place."""
    folder, index = made
    load, taken = indexer.load_embedder, []

    def load_slowly(*arguments):
        embedder = load(*arguments)
        with contextlib.closing(open_index(str(index))) as other:
            version = other.begin("other.t", "b" * 64, "FC", 512)
            other.add(version, other.entries(other.versions()[0]["version"]).values(), np.eye(14, 512, dtype="f4"))
            assert other.switch(version) == []
            taken.append(other.versions())
        return embedder

    monkeypatch.setattr(indexer, "load_embedder", load_slowly)
    with pytest.raises(InputError, match="index.db: another checkpoint has replaced this version; run again"):
        run_index(folder, index)
    with contextlib.closing(open_index(str(index))) as after:
        assert after.versions() == taken[0]
        assert sum(after.counts(taken[0][0]["version"], "modality").values()) == 14


def test_a_folder_beside_known_ones_needs_its_modality(folder, checkpoint, pictures, tmp_path):
    index = tmp_path / "index.db"
    run_index(folder / "b", index, "--resume", checkpoint, "--modality", "visible")
    with pytest.raises(InputError, match=r"--modality: .*index.db does not know which one .*/mine/\d\d.JPG has; pass"):
        run_index(folder, index)
    shutil.copy(pictures[0][0], folder / "b" / "deep er" / "88.JPG")
    assert run_index(folder / "b", index)["embedded"] == 1
    run_index(folder / "b", tmp_path / "pool.db", "--resume", checkpoint, "--modality", "visible", "--feature", "POOL")
    for file, feature in ((index, "FC"), (tmp_path / "pool.db", "POOL")):
        with contextlib.closing(open_index(str(file))) as content:
            assert [version["feature"] for version in content.versions()] == [feature]
    linked = tmp_path / "link"
    linked.symlink_to(folder / "b")
    serving = finder.Finder(search.get_args_parser().parse_args(["serve", "--index", str(index), *CPU[:2]]))
    assert search.main(["remove", str(linked), "--index", str(index)]) == 8
    with pytest.raises(InputError, match=r"index\.db: contains no image; fill it with python -m tools.search index"):
        serving([pictures[1][0]], "infrared", 1)


def test_labels_stay_until_others_are_given(folder, checkpoint, tmp_path):
    index, times = tmp_path / "index.db", {}
    flags = ["--resume", checkpoint, "--modality", "visible", "--pattern", "b/{n}.JPG"]
    assert len(run_index(folder, index, *flags)["unlabelled"]) == 11
    os.utime(folder / "00.JPG", (10**9, 10**9))
    run_index(folder, index, "--pattern", "{camera}/{person}.JPG", "--tracks", "folder")
    for _ in range(2):
        entries = {Path(path).name: entry for path, (entry, _) in stored(index).items()}
        assert (entries["01.JPG"].camera, entries["01.JPG"].person) == ("b", "01")
        assert (entries["01.JPG"].track, entries["00.JPG"].track) == (f"{folder}//b", f"{folder}//.")
        assert (entries["00.JPG"].camera, entries["00.JPG"].time[:4]) == (None, "2001")
        times = {name: entry.time for name, entry in entries.items()}
        assert run_index(folder, index)["embedded"] == 0
    shutil.copy(folder / "00.JPG", folder / "new.JPG")
    assert run_index(folder, index, "--tracks", "folder")["unlabelled"] == []
    (folder / "new.JPG").unlink()
    run_index(folder, index)
    assert times == {Path(path).name: entry.time for path, (entry, _) in stored(index).items()}


def test_times_stay_when_the_machine_changes_its_time_zone(pictures, checkpoint, tmp_path, monkeypatch):
    """In what is stored and in what filters find. A name that says the file's own second is still a label."""
    folder, index = tmp_path / "site", tmp_path / "index.db"
    folder.mkdir()
    written = {"20010909_024640.jpg": "2001-09-09 02:46:40", "20261120_140311.jpg": "2026-11-20 14:03:11"}
    for name, picture in zip([*written, "plain.jpg"], pictures[0], strict=False):
        shutil.copy(picture, folder / name)
        os.utime(folder / name, (10**9, 10**9))  # 01:46:40 in UTC

    def times(zone, *flags, query=("--from", "2001-09-09T02:46", "--to", "2001-09-09T02:47")):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        run_index(folder, index, *flags)
        (result,) = run_query(index, pictures[1][:1], *query)
        entries = {Path(path).name: entry.time for path, (entry, _) in stored(index).items()}
        return entries, {Path(image["path"]).name: image["time"] for image in result["found"]}

    try:
        flags = ["--resume", checkpoint, "--modality", "visible", "--pattern", "{time:%Y%m%d_%H%M%S}.jpg"]
        expected = written | {"plain.jpg": "2001-09-09 02:46:40+01:00"}
        found = {name: expected[name] for name in ("20010909_024640.jpg", "plain.jpg")}
        assert times("CET-1", *flags) == (expected, found)
        assert times("NZST-12") == times("NZST-12", *flags[4:]) == (expected, found)
        for name in expected:
            os.utime(folder / name, (10**9 + 60, 10**9 + 60))
        expected["plain.jpg"] = "2001-09-09 13:47:40+12:00"
        found = {"plain.jpg": expected["plain.jpg"]}
        later = ("--from", "2001-09-09T13:47:40", "--to", "2001-09-09T13:48")
        assert times("NZST-12", query=later) == (expected, found)
    finally:
        monkeypatch.undo()
        time.tzset()


def run_killed(argv, statement):
    """search.main in a process of its own that is killed when it asks the database the n-th time -> whether it was."""
    process = PROCESSES.Process(target=_search_until, args=(argv, statement, dict(os.environ)))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def _search_until(argv, statement, environment):
    os.environ.update(environment)
    asked = itertools.count()

    def counting(method):
        def run(*arguments):
            if next(asked) == statement:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        return run

    for kind, name in itertools.product((FileIndex, ServerIndex), ("_run", "_run_many")):
        setattr(kind, name, counting(getattr(kind, name)))
    torch.set_num_threads(1)
    embedder.computes_bf16 = lambda device: False
    search.main(argv)


@pytest.mark.slow
def test_an_index_that_was_killed_20_times_ends_as_an_unbroken_one(folder, checkpoint, pictures, address, tmp_path):
    flags = ["--resume", checkpoint, "--modality", "visible", "--batch", "2"]
    argv = ["index", str(folder), "--index", address, *CPU, *map(str, flags)]
    images, done = readable(folder), 0
    for round in range(20):
        for number in range(3):  # so that there is something to replace
            shutil.copy(pictures[1][(round + number) % 3], images[(3 * round + number) % 14])
        done += run_killed(argv, 6 + (5 * round) % 11)
    assert done > 14  # the others had too little to do
    run_index(folder, address, *flags)
    run_index(folder, tmp_path / "unbroken.db", *flags)
    result, expected = stored(address), stored(tmp_path / "unbroken.db")
    assert {path: entry for path, (entry, _) in result.items()} == {
        path: entry for path, (entry, _) in expected.items()
    }
    for path, (_, vector) in result.items():
        np.testing.assert_allclose(vector, expected[path][1], atol=2e-6)


def test_json_and_sheet(made, pictures, tmp_path, capsys):
    _, index = made
    results = run_query(index, pictures[1], "--save", tmp_path / "a.svg", "--top", "4")
    assert {result["modality"] for result in results} == {"infrared"}
    text = (tmp_path / "a.svg").read_text()
    for result in results:
        for image in result["found"]:
            assert f">{image['similarity']:.3f}<" in text
            assert f"{Path(image['path']).name}<" in text
    assert "infrared queries in" in text
    capsys.readouterr()
    assert run_query(index, pictures[1], "--json") == json.loads(capsys.readouterr().out)  # and nothing else
    run_query(index, pictures[1], "--save", tmp_path / "a.png", "--top", "4")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 4 * 0.9 * 150


def test_a_sheet_marks_images_that_have_changed(made, pictures, tmp_path):
    folder, index = made
    changed = readable(folder)[0]
    changed.write_bytes(Path(pictures[1][0]).read_bytes())
    (result,) = run_query(index, pictures[1][:1], "--save", tmp_path / "a.svg", "--top", "14")
    text = (tmp_path / "a.svg").read_text()
    (image,) = [image for image in result["found"] if image["path"] == str(changed)]
    assert re.findall(r">([\d.]+), changed<", text) == [f"{image['similarity']:.3f}"]


def test_bad_input_is_one_line_and_status_2(made, pictures, tmp_path, monkeypatch, capsys):
    folder, index = made
    image, queries = str(pictures[1][0]), ["--modality", "infrared", "--index", str(index), *CPU]
    (tmp_path / "empty").mkdir()
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "a.jpg").write_bytes(b"")
    copy = shutil.copy(image, tmp_path / "copy.png")
    shutil.copy(image, folder / "in.png")
    run_index(folder, index)
    new = ["--resume", str(save_network(tmp_path / "net.t", 0)), "--modality", "visible", *CPU]
    new_index, index_path = str(tmp_path / "x.db"), str(index)
    for argv, words in (
        (["query", "none.jpg", *queries], "none.jpg: no such image"),
        (["query", str(folder / "broken.png"), *queries], "broken.png: cannot be read as an image"),
        (["query", image, *queries, "--save", "a.gif"], "--save a.gif: is not a .png"),
        (["query", image, *queries, "--save", "a.png", "--top", "101"], "--save: a sheet has room for 100"),
        (["query", copy, *queries, "--save", copy], "copy.png: is a query"),
        (["query", image, *queries, "--save", str(folder / "in.png")], "or an image of the index"),
        (["query", str(folder), *queries], "lost.jpg: cannot be read .No such file or directory."),
        (["query", str(folder / "a"), image, *queries], "a: is a folder; pass it alone, or --combine if all queries"),
        (["query", str(tmp_path / "empty"), *queries], "empty: contains no image; pass a folder of images"),
        (["query", image, *queries, "--tracks", "mean", "--rerank"], "--rerank orders images, not means of tracks; p"),
        (["query", image, *queries, "--resume", "a.safetensors"], "a.safetensors: no such file"),
        (["query", image, *queries, "--resume", "no.t"], "no.t: no such file"),
        (["query", image, *queries[:2], "--index", str(tmp_path / "no.db")], "no.db: no such index; make it with"),
        (["query", image, *queries, "--camera", "9"], "--camera 9: .* has no image of it; its cameras: none; index ag"),
        (["query", image, *queries, "--from", "noon"], "--from noon: is not a time; write it as 2026-11-20 or"),
        (["query", image, *queries, "--to", "noon"], "--to noon: is not a time; write it as 2026-11-20 or"),
        (
            ["query", image, *queries, "--from", "2026-11-21", "--to", "2026-11-20"],
            "^--from 2026-11-21 --to 2026-11-20: leave no time between; exch",
        ),
        (["query", image, *queries, "--folder", "none"], "none of its images fits all filters; leave one out"),
        (["query", image, *queries, "--to", "1999-01-01"], "none of its images fits all filters; leave one out"),
        (["index", "nowhere", "--index", new_index, *new], "nowhere: no such folder"),
        (
            ["index", str(tmp_path / "spoilt"), "--index", index_path, *CPU],
            "--modality: .* does not know which one .*; pass",
        ),
        (["index", str(folder), "--index", new_index, *CPU], "there is no index yet; pass --resume and --modality"),
        (["index", str(folder), "--index", new_index, *new[2:]], "there is no index yet; pass --resume and --modality"),
        (["index", str(tmp_path / "empty"), "--index", new_index, *new], "empty: contains no image; pass a folder of"),
        (
            ["index", str(tmp_path / "spoilt"), "--index", index_path, "--pattern", "{n}.gif", *CPU],
            "^--pattern {n}.gif: fits no image of .*, such as a.jpg; write it for paths below that folder",
        ),
        (["index", str(tmp_path / "spoilt"), "--index", new_index, *new], "none of its 1 images can be read"),
        (["index", str(folder), "--index", f"{image}/a", *new], "cannot write there"),
        (["index", str(folder), "--index", image, *CPU], "cannot be used as an index .file is not a database."),
        (
            ["index", str(folder), "--index", index_path, "--modality", "infrared", *CPU],
            "has other images of .*; index it",
        ),
        (
            ["index", str(folder), "--index", index_path, "--approximate", *CPU],
            "--approximate: .* searched exactly; leave",
        ),
        (["index", str(folder), "--index", index_path, "--moved_from", "a", *CPU], "has no image there; pass its path"),
        (["index", str(folder), "--index", index_path, "--pattern", "{n}.gif", *CPU], "fits no image of .*, such as"),
        (
            ["index", str(folder), "--index", index_path, "--pattern", "{track}.JPG", "--tracks", "folder", *CPU],
            "--tracks folder: --pattern or --csv names the tracks; leave one of the two out",
        ),
        (
            ["remove", "nowhere", "--index", index_path],
            "nowhere: .* has no image of it; pass a folder that was indexed",
        ),
    ):
        with pytest.raises(InputError, match=words) as caught:
            search.main(argv)
        assert "\n" not in str(caught.value)
    assert Path(copy).read_bytes() == pictures[1][0].read_bytes()
    monkeypatch.setattr(sys, "argv", ["search.py"])
    with pytest.raises(SystemExit, match="2"):
        utils.cli(lambda: search.main(["query", "none.jpg", *queries]))
    assert capsys.readouterr().err == "search.py: error: none.jpg: no such image; pass an existing file\n"


def test_a_changed_image_is_not_shown_as_found(made, pictures, tmp_path, capsys):
    folder, index = made
    best = run_query(index, pictures[1][:1], "--top", "2")[0]["found"]
    assert [image["changed"] for image in best] == [False, False]
    shutil.copy(pictures[1][1], best[0]["path"])
    capsys.readouterr()
    found = run_query(index, pictures[1][:1], "--top", "2")[0]["found"]
    assert [image["changed"] for image in found] == [True, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("(changed since it was indexed)")
    assert not lines[2].endswith("indexed)")
    assert search_page.picture(found[0]) is None
    assert search_page.picture(found[1]).startswith("data:image/jpeg;base64,")


def test_what_may_still_be_there_stays(made, monkeypatch):
    folder, index = made
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("/b"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fails)
        counts = run_index(folder, index)
    assert (counts["vanished"], counts["images"]) == (0, 14)
    assert any("cannot be listed" in line for line in counts["unreadable"])


def test_a_photograph_is_turned_as_its_orientation_says(pictures, tmp_path):
    with Image.open(pictures[0][0]) as image:
        upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
        image.save(upright)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.rotate(90, expand=True).save(turned, exif=exif)
    a, b = (read_image(path, SIZE) for path in (upright, turned))
    np.testing.assert_array_equal(a, b)


def test_an_image_that_went_is_named_when_it_is_drawn(made, pictures, tmp_path):
    folder, index = made
    shutil.rmtree(folder / "a")
    with pytest.raises(InputError, match=r"--save: an image cannot be drawn \(.*run index again"):
        run_query(index, pictures[1], "--top", "14", "--save", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_documented_example(checkpoint, pictures, tmp_path, monkeypatch):
    """The example of the module's docstring, with the checkpoint replaced."""
    example = textwrap.dedent(search.__doc__[search.__doc__.index("    from tools.embedder import") :])
    monkeypatch.chdir(tmp_path)
    for name, path in zip(("a.jpg", "b.jpg"), pictures[1], strict=False):
        shutil.copy(path, name)
    names = {}
    exec(example.replace("save_model/..._best.t", str(checkpoint)), names)
    embed = plain_embedding(checkpoint)
    features, expected = names["features"], [embed(name, "infrared") for name in ("a.jpg", "b.jpg")]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    made = names["embedder"]
    assert (made.size, made.dim, made.feature, len(made.sha256)) == (SIZE, 256, "FC", 64)
    pooled = search.Embedder(checkpoint, feature="POOL", gpu="cpu")(["a.jpg"], "infrared")
    assert abs(pooled - features[:1]).max() > 1e-3


def test_features_are_in_bfloat16_where_that_is_faster(checkpoint, pictures, monkeypatch):
    exact = search.Embedder(checkpoint, gpu="cpu")(pictures[1], "infrared")
    monkeypatch.setattr(embedder, "computes_bf16", lambda device: True)
    fast = search.Embedder(checkpoint, gpu="cpu")(pictures[1], "infrared")
    assert 1e-5 < abs(fast - exact).max() < 0.02
    assert (fast * exact).sum(axis=1).min() > 0.999
    np.testing.assert_array_equal(search.Embedder(checkpoint, gpu="cpu", amp="off")(pictures[1], "infrared"), exact)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """{modality: ONNX file} of the checkpoint's FC features; visible ones take bytes, infrared ones normalised."""
    out, files = tmp_path_factory.mktemp("onnx"), {}
    for modality, kind in (("visible", "uint8"), ("infrared", "normalised")):
        flags = ["--resume", str(checkpoint), "--format", "onnx", "--modality", modality, "--input", kind]
        ((result),) = export.main([*flags, "--out", str(out)])
        files[modality] = result["path"]
    return files


@pytest.mark.slow
def test_onnx_files_embed_and_search_as_their_checkpoint(exported, made, checkpoint, pictures, tmp_path):
    folder, index = made
    expected = plain_search(checkpoint, folder, pictures[1])
    check_found(run_query(index, pictures[1], "--resume", exported["infrared"]), expected, 10)
    second = tmp_path / "second.db"
    run_index(folder, second, "--resume", exported["visible"], "--modality", "visible", "--batch", "4")
    check_found(run_query(second, pictures[1], "--resume", exported["infrared"]), expected, 10)
    check_found(run_query(second, pictures[1], "--resume", checkpoint), expected, 10)
    with pytest.raises(InputError, match=r"visible_FC.onnx: embeds visible images, not infrared ones; pass the .onnx"):
        run_query(second, pictures[1], "--resume", exported["visible"])
    assert search.Embedder(exported["visible"]).sha256 == search.Embedder(checkpoint, gpu="cpu").sha256
    with pytest.raises(InputError, match="gives FC features, not POOL"):
        search.Embedder(exported["visible"], feature="POOL")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(Path(exported["visible"]).read_bytes()[:5000])
    with pytest.raises(InputError, match=r"broken.onnx: not an ONNX file of tools.export"):
        search.Embedder(broken)


def means_as_onnx(path, batch, axes, last="Identity", kind=onnx.TensorProto.FLOAT, **values):
    """An .onnx file as tools.export writes them, whose features are means of its images over some axes, after one last
    operator with these values."""
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, (batch, 3, 96, 48))
    features = onnx.helper.make_tensor_value_info("features", kind, ("n", 3))
    nodes = [onnx.helper.make_node("Cast", ["images"], ["f"], to=onnx.TensorProto.FLOAT)]
    nodes += [
        onnx.helper.make_node("ReduceMean", ["f", "axes"], ["m"]),
        onnx.helper.make_node("Flatten", ["m"], ["means"]),
        onnx.helper.make_node(last, ["means"], ["features"], **values),
    ]
    axes = onnx.numpy_helper.from_array(np.array(axes), "axes")
    graph = onnx.helper.make_graph(nodes, "g", [images], [features], [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    about = {"image_size": [96, 48], "options": {}, "modality": "visible", "feature": "FC", "input": "uint8"}
    onnx.helper.set_model_props(model, {"gfmnet": json.dumps(about | {"sha256": 64 * "0"})})
    onnx.save(model, path)


def test_a_program_that_only_an_index_names_is_not_run(tmp_path):
    file, marker = tmp_path / "i.db", tmp_path / "own.onnx"
    means_as_onnx(marker, "b", [2, 3])
    Image.new("RGB", (16, 48)).save(tmp_path / "b.png")
    index = FileIndex(file, create=True)
    entry = Entry("/a.jpg", "0 0", "visible", None, None, "2026-11-20 10:00:00")
    index.add(index.begin(str(marker), "0" * 64, "FC", 3), [entry], np.float32([[1, 0, 0]]))
    index.close()
    for command in ("query x.jpg --modality visible", f"index {tmp_path} --modality visible", "serve"):
        with pytest.raises(InputError, match=r"own\.onnx: .*i\.db was made with this ONNX file, a program; .*--resume"):
            search.main([*command.split(), "--index", str(file), "--gpu", "cpu"])
    with pytest.raises(InputError, match=r"x\.jpg: no such image"):
        search.main(f"query x.jpg --modality visible --index {file} --gpu cpu --resume {marker}".split())


@pytest.mark.parametrize(
    ("sha256", "there", "expected"), [("0", True, "net.t"), ("0", False, "own.onnx"), ("1", True, "own.onnx")]
)
def test_an_index_remembers_the_checkpoint_of_an_onnx_file(sha256, there, expected, tmp_path):
    """The file embeds one modality only: queries of the other need the checkpoint, while it is there."""
    file, own, net, folder = (tmp_path / name for name in ("i.db", "own.onnx", "net.t", "site"))
    means_as_onnx(own, "b", [2, 3])
    folder.mkdir()
    Image.new("RGB", (16, 48), (1, 0, 0)).save(folder / "a.png")
    if there:
        net.touch()
    with contextlib.closing(FileIndex(file, create=True)) as index:
        index.begin(str(net), 64 * sha256, "FC", 3)
    assert run_index(folder, file, "--resume", own, "--modality", "visible")["images"] == 1
    with contextlib.closing(FileIndex(file)) as index:
        assert index.versions()[-1]["checkpoint"] == str(tmp_path / expected)
    with pytest.raises(InputError, match="own.onnx: embeds visible images, not infrared ones; pass the .onnx file of"):
        run_query(file, [folder / "a.png"], "--resume", own)
    with pytest.raises(InputError, match="own.onnx: embeds visible images, not infrared ones; pass the .onnx file of"):
        embedder.Embedder(own).embed_crops([np.zeros((9, 5, 3), np.uint8)], "infrared", "RGB")


def test_onnx_files_of_another_batch_are_one_line(pictures, tmp_path):
    """One row for any number of images would be the feature of them all."""
    means_as_onnx(tmp_path / "one.onnx", "b", [0, 2, 3])
    with pytest.raises(InputError, match=r"one.onnx: .*2 images have features float32 \[1, 3\]"):
        search.Embedder(tmp_path / "one.onnx")
    means_as_onnx(tmp_path / "two.onnx", 2, [2, 3])
    embed = search.Embedder(tmp_path / "two.onnx")
    assert embed(pictures[0][:2], "visible").shape == (2, 3)
    with pytest.raises(
        InputError, match=r"two.onnx: not an ONNX file of tools.export \(InvalidArgument: .*; export it"
    ):
        embed(pictures[0][:3], "visible")


@pytest.mark.parametrize(
    ("last", "values", "found"),
    [
        ("Cast", {"kind": onnx.TensorProto.STRING, "to": onnx.TensorProto.STRING}, "object [2, 3]"),
        ("Cast", {"kind": onnx.TensorProto.BOOL, "to": onnx.TensorProto.BOOL}, "bool [2, 3]"),
        ("ReduceMax", {"keepdims": 0}, "float32 []"),
    ],
)
def test_onnx_files_of_other_features_are_one_line(last, values, found, tmp_path, capfd):
    means_as_onnx(tmp_path / "other.onnx", "b", [2, 3], last, **values)
    text = f"other.onnx: not an ONNX file of tools.export (ValueError: 2 images have features {found}); export it again"
    with pytest.raises(InputError, match=re.escape(text)):
        search.Embedder(tmp_path / "other.onnx")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stamp", [0, -(10**30), 10**30, 10**18])
def test_any_time_of_a_file_is_one_of_the_index(stamp, monkeypatch):
    """Also before standard times, when clocks differed from UTC by seconds: in Monrovia until 1972."""
    monkeypatch.setenv("TZ", "Africa/Monrovia")
    try:
        time.tzset()
        text = labels.file_time(f"1 {stamp}")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert msgspec.convert(text, Entry.__annotations__["time"]) == text
    if abs(stamp) < 10**20:
        assert datetime.datetime.fromisoformat(text).timestamp() == stamp // 10**9


def test_an_error_does_not_list_ten_thousand_cameras():
    cameras = {f"camera{n}": 1 for n in range(10_000)}
    index = SimpleNamespace(counts=lambda _: cameras, index=SimpleNamespace(uri="i.db"))
    with pytest.raises(InputError, match=r"^--camera x: i\.db has no image of it; its cameras: camera0, .{250,350}$"):
        finder.Finder.read_filter(index, ["x"])


def test_a_zone_of_a_day_is_refused(monkeypatch):
    """POSIX allows it, Python does not."""
    monkeypatch.setenv("TZ", "XYZ24")
    try:
        time.tzset()
        with pytest.raises(InputError, match="^TZ: is a zone of a day or more from UTC; set it to another"):
            labels.file_time("1 1000000000000000000")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_port_that_is_taken_is_named(made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: cannot be used"):
            search.main(["serve", "--index", str(made[1]), "--port", str(port), "--gpu", "cpu"])


@pytest.mark.slow
def test_errors_name_the_program_and_not_its_file(tmp_path):
    flags = ["query", "a.jpg", "--modality", "infrared", "--index", tmp_path / "none.db"]
    command = [sys.executable, "-m", "tools.search", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr.partition(": ")[0]) == (2, "search.py")


@pytest.mark.parametrize("kind", ["checkpoint", pytest.param("onnx", marks=pytest.mark.slow)])
def test_crops_have_the_features_of_the_same_images_in_files(kind, request, checkpoint, pictures, tmp_path):
    """Of several sizes and in several batches; in the order of OpenCV, and cut out of a larger array."""
    rng, files, crops = np.random.default_rng(0), [], []
    for number, path in enumerate(pictures[0][:5]):
        image = np.array(Image.open(path))[: 90 - 9 * number, : 40 + number]
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(files[-1])
        frame = rng.integers(0, 256, (200, 100, 3), np.uint8)
        frame[10 : 10 + len(image), 20 : 20 + image.shape[1]] = image
        crops.append(frame[10 : 10 + len(image), 20 : 20 + image.shape[1]])
    path = checkpoint if kind == "checkpoint" else request.getfixturevalue("exported")["visible"]
    embed = embedder.Embedder(path, gpu="cpu", batch=2)
    expected = embed(files, "visible")
    # A batch of another size rounds otherwise.
    np.testing.assert_allclose(embed.embed_crops(crops, "visible", "RGB"), expected, rtol=0, atol=1e-6)
    turned = [crop[:, :, ::-1] for crop in crops]
    np.testing.assert_allclose(embed.embed_crops(turned, "visible", "BGR"), expected, rtol=0, atol=1e-6)
    assert np.abs(embed.embed_crops(turned, "visible", "RGB") - expected).max() > 1e-4
    np.testing.assert_array_equal(
        embed.embed_crops((crop for crop in crops), "visible", "RGB"), embed.embed_crops(crops, "visible", "RGB")
    )
    assert embed.embed_crops([], "visible", "BGR").shape == (0, embed.dim)
    if kind == "onnx":
        with pytest.raises(InputError, match="embeds visible images, not infrared ones"):
            embed.embed_crops(crops, "infrared", "RGB")


def test_crops_of_another_kind_are_refused(checkpoint):
    good, embed = np.zeros((9, 5, 3), np.uint8), embedder.Embedder(checkpoint, gpu="cpu")
    for bad, text in (
        (good.astype(np.float32), r"crop 1: is float32 \[9, 5, 3\], not a uint8 array \[H, W, 3\]; convert it"),
        (good[:, :, 0], r"crop 1: is uint8 \[9, 5\], not"),
        (good.transpose(2, 0, 1), r"crop 1: is uint8 \[3, 9, 5\], not"),
        ("a.jpg", "crop 1: is str, not"),
        (good[:0], "crop 1: is empty, 0 x 5; leave it out"),
    ):
        with pytest.raises(InputError, match=text):
            embed.embed_crops([good, bad], "visible", "RGB")
    with pytest.raises(
        InputError, match="embeds visible and infrared images, not thermal ones; pass one of these names"
    ):
        embed.embed_crops([good], "thermal", "RGB")
    with pytest.raises(InputError, match="colours 'rgb': pass 'RGB' or 'BGR'"):
        embed.embed_crops([good], "visible", "rgb")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"feature": "fc"}, "feature 'fc': pass one of 'POOL', 'FC'"),
        ({"amp": "fp16"}, "amp 'fp16': pass one of 'off', 'bf16', None"),
        ({"batch": 0}, "batch 0, workers 4: pass at least 1 image per batch and 0 workers"),
        ({"workers": -1}, "batch 64, workers -1: pass at least"),
        ({"gpu": None}, "--gpu None: give the number of a GPU, or cpu"),
        ({"gpu": 99}, "--gpu 99: "),
    ],
)
def test_values_of_the_embedder_that_cannot_be_used(checkpoint, values, text):
    with pytest.raises(InputError, match=text):
        embedder.Embedder(checkpoint, **{"gpu": "cpu"} | values)


def test_a_safetensors_file_is_no_network_to_search_with(tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(InputError, match="a.safetensors: search cannot read .safetensors files; pass the checkpoint"):
        embedder.Embedder(tmp_path / "a.safetensors")


def test_tracks_without_a_camera_are_told(site_tracks, capsys):
    """The same name in two folders may be of two cameras; and a call that forgets the pattern lists what is new."""
    folder, db, resume = site_tracks
    index = ["index", str(folder), "--index", str(db), "--gpu", "cpu"]
    pattern = ["--pattern", "{c}/{track}/{n}.jpg"]
    search.main([*index, "--resume", str(resume), "--modality", "visible", *pattern])
    assert "note: 1 tracks, such as 7, have images in several folders, but no camera; " in capsys.readouterr().out
    search.main([*index, "--pattern", "{camera}/{track}/{n}.jpg"])
    out = capsys.readouterr().out
    assert "note:" not in out
    assert "without labels" not in out
    shutil.copy(folder / "a/7/1.jpg", folder / "a/7/2.jpg")
    search.main(index)
    assert f"without labels: {folder}/a/7/2.jpg\n" in capsys.readouterr().out
    query = ["query", str(folder / "a/7"), "--modality", "visible", "--index", str(db), "--gpu", "cpu"]
    search.main([*query, "--tracks", "mean", "--page", "9"])
    assert "  none: page 9 is beyond the last track\n" in capsys.readouterr().out


def test_an_index_without_an_image_is_told(tmp_path):
    index = FileIndex(tmp_path / "i.db", create=True)
    for _ in range(2):
        with pytest.raises(InputError, match=r"i\.db: contains no image; fill it with python -m tools.search index"):
            search.main(["query", "x.jpg", "--modality", "visible", "--index", str(tmp_path / "i.db"), "--gpu", "cpu"])
        index.begin("net.t", "a" * 64, "FC", 16)
    index.close()


def test_names_do_not_write_on_the_terminal(site_tracks, capsys):
    folder, db, resume = site_tracks
    shutil.copy(folder / "a/7/1.jpg", odd := folder / "a/7/\x1b[2J\n2.jpg")
    shutil.copy(odd, folder / "a/\x1b4.jpg")
    (folder / "a/7/\x1b3.jpg").write_bytes(b"damaged")
    (folder / "a/7/5.\x1bx").touch()
    index = ["--index", str(db), "--gpu", "cpu", "--resume", str(resume), "--modality", "visible"]
    search.main(["index", str(folder), *index, "--pattern", "{camera}/{track}/{n}.jpg"])
    search.main(["query", str(odd), *index])
    out = capsys.readouterr().out
    assert {c for c in out if not c.isprintable()} == {"\n"}
    assert f"unreadable: {folder}/a/7/?3.jpg: " in out
    assert f"without labels: {folder}/a/?4.jpg\n" in out
    assert out.count(f"{folder}/a/7/?[2J?2.jpg") == 2  # as the query, and found


def test_a_part_of_a_folder_with_tracks_does_not_move(site_tracks, tmp_path):
    folder, db, resume = site_tracks
    index = ["--index", str(db), "--gpu", "cpu", "--resume", str(resume), "--modality", "visible"]
    search.main(["index", str(folder), *index, "--pattern", "{camera}/{track}/{n}.jpg"])
    shutil.move(folder / "b", tmp_path / "b")
    with pytest.raises(
        InputError, match=f"--moved_from {folder}/b: is a part of {folder}, which was indexed with tracks"
    ):
        search.main(["index", str(tmp_path / "b"), *index, "--moved_from", str(folder / "b")])
    shutil.move(tmp_path / "b", folder / "b")
    shutil.move(folder, tmp_path / "moved")
    counts = search.main(["index", str(tmp_path / "moved"), *index, "--moved_from", str(folder)])
    assert (counts["embedded"], counts["vanished"]) == (0, 0)


@pytest.fixture
def site_tracks(tmp_path):
    """Two cameras whose trackers both have a track 7, an index to be made, and a checkpoint."""
    for name, color in (("a", 50), ("b", 150)):
        (tmp_path / f"site/{name}/7").mkdir(parents=True)
        Image.new("RGB", (16, 48), (color, 0, 0)).save(tmp_path / f"site/{name}/7/1.jpg")
    return tmp_path / "site", tmp_path / "index.db", save_network(tmp_path / "net.t", 0, "sysu")


def test_control_characters_are_no_labels(tmp_path):
    (tmp_path / "t.csv").write_text('path,track\n1.jpg,"unclosed\n2.jpg,3\n')
    with pytest.raises(
        InputError, match=r"line 3: track 'unclosed.n2.jpg,3.n' has a line break .*; take it out, or close"
    ):
        labels.read_labels(None, str(tmp_path / "t.csv"))
