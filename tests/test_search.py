"""Searching one's own images: the index on disk, queries, the library, ONNX files, and the page in a browser."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image

import data_loader
import utils
from conftest import SIZE, save_network
from core.images import read_image
from tests.oracles import plain_embedding
from tools import export, indexer, search, search_page
from tools import index as image_index
from utils import InputError

REPO = Path(utils.__file__).parent
CPU = ["--gpu", "cpu", "--workers", "0"]


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
    index = tmp_path / "index"
    run_index(folder, index, "--resume", checkpoint, "--modality", "visible")
    return folder, index


def run_index(folder, index, *more):
    return search.main(["index", str(folder), "--out", str(index), *CPU, *map(str, more)])


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


@contextlib.contextmanager
def process(*arguments, **pipes):
    """Python with these arguments in the repo, killed at the end of the block or after two minutes."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True, **pipes) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def embedded_images(monkeypatch):
    """A list that gets the file names of all images that are decoded from now on (without loading processes)."""
    seen, read = [], data_loader.ImageFiles.__getitem__

    def counted(self, index):
        seen.append(Path(self.paths[index]).name)
        return read(self, index)

    monkeypatch.setattr(data_loader.ImageFiles, "__getitem__", counted)
    return seen


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_query_finds_what_a_plain_loop_finds(folder, checkpoint, pictures, tmp_path, workers, capsys):
    flags = ["--resume", checkpoint, "--modality", "visible", "--workers", workers, "--batch", "4"]
    counts = run_index(folder, tmp_path / "index", *flags)
    assert {name: counts[name] for name in ("embedded", "changed", "vanished", "images")} == {
        "embedded": 14,
        "changed": 0,
        "vanished": 0,
        "images": 14,
    }
    assert len(counts["unreadable"]) == 2
    out = capsys.readouterr().out
    assert all(re.search(rf"unreadable: .*{name}: cannot be read", out) for name in ("broken.png", "lost.jpg"))
    expected = plain_search(checkpoint, folder, pictures[1])
    check_found(run_query(tmp_path / "index", pictures[1], "--top", "5"), expected, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pictures[1][0]} (infrared)"
    assert lines[1] == f"   1  {expected[0][0][1]:6.3f}  {expected[0][0][0]}"
    # More than there are; and of the images themselves, each is its own first.
    check_found(run_query(tmp_path / "index", pictures[1][:1], "--top", "50"), expected[:1])
    own = readable(folder)[:3]
    results = run_query(tmp_path / "index", own, "--top", "1", modality="visible")
    assert [result["found"][0]["path"] for result in results] == [str(path.resolve()) for path in own]


def test_a_second_call_embeds_only_what_is_new_or_changed(made, checkpoint, pictures, monkeypatch):
    folder, index = made
    seen, before = embedded_images(monkeypatch), sorted(index.glob("[!.]*"))
    assert run_index(folder, index)["embedded"] == 0
    assert seen == ["broken.png"]  # which is tried each time
    assert sorted(index.glob("[!.]*")) == before  # nothing was written

    gone, changed, spoilt = readable(folder)[:3]
    gone.unlink()
    shutil.copy(pictures[1][0], changed)
    spoilt.write_bytes(b"no image")
    shutil.copy(pictures[1][1], folder / "b" / "77.JPG")
    seen.clear()
    counts = run_index(folder, index)
    assert sorted(seen) == sorted([changed.name, spoilt.name, "77.JPG", "broken.png"])
    assert (counts["embedded"], counts["changed"], counts["vanished"], counts["images"]) == (2, 2, 1, 13)
    assert len(counts["unreadable"]) == 3
    assert len(list(index.glob("[!.]*"))) == 2
    spoilt.unlink()
    check_found(run_query(index, pictures[1]), plain_search(checkpoint, folder, pictures[1]), 10)


def test_a_moved_folder_is_the_same_and_another_is_refused(made, checkpoint, pictures, monkeypatch):
    folder, index = made
    other = folder.parent / "other"
    shutil.copytree(folder / "a", other)
    with pytest.raises(InputError, match=r"other: .*index was made from .*mine; choose another --out"):
        run_index(other, index)
    seen = embedded_images(monkeypatch)
    folder = folder.rename(folder.parent / "moved")
    assert run_index(folder, index)["embedded"] == 0
    assert set(seen) == {"broken.png"}
    check_found(run_query(index, pictures[1]), plain_search(checkpoint, folder, pictures[1]), 10)


def test_what_does_not_fit_an_index_is_refused(made, checkpoint, pictures, tmp_path):
    folder, index = made
    other = save_network(tmp_path / "other.t", seed=1)
    before = {path: path.read_bytes() for path in index.glob("[!.]*")}
    for flags, words in (
        (["--resume", other], "other.t: is not the checkpoint that made .*index; pass .*net.t .sha256"),
        (["--modality", "infrared"], "--modality infrared: .*index was made with --modality visible"),
        (["--feature", "POOL"], "--feature POOL: .*index was made with --feature FC"),
    ):
        with pytest.raises(InputError, match=words):
            run_index(folder, index, *flags)
    with pytest.raises(InputError, match="is not the checkpoint"):
        run_query(index, pictures[1], "--resume", other)
    # The checkpoint that the index remembers is another one now, or gone: its hash is what counts.
    mine = shutil.copy(checkpoint, tmp_path / "mine.t")
    run_index(folder, tmp_path / "second", "--resume", mine, "--modality", "visible")
    shutil.copy(other, mine)
    with pytest.raises(InputError, match="is not the checkpoint"):
        run_query(tmp_path / "second", pictures[1])
    Path(mine).unlink()
    with pytest.raises(InputError, match=r"mine.t: no such file; .*second was made with it: pass .* with --resume"):
        run_query(tmp_path / "second", pictures[1])
    assert run_query(tmp_path / "second", pictures[1], "--resume", checkpoint)
    assert {path: path.read_bytes() for path in index.glob("[!.]*")} == before


def test_a_run_that_ends_between_the_two_files_leaves_the_old_index(made, pictures, monkeypatch):
    folder, index = made
    before = run_query(index, pictures[1])
    shutil.copy(pictures[1][0], folder / "88.JPG")
    atomic = image_index.atomic

    @contextlib.contextmanager
    def fail(path):
        if Path(path).name == "index.json":
            raise MemoryError
        with atomic(path) as temporary:
            yield temporary
        (index / ".index.7.faiss.host.1.x").write_bytes(b"half")  # as a killed process leaves it

    with monkeypatch.context() as patch:
        patch.setattr(image_index, "atomic", fail)
        with pytest.raises(MemoryError):
            run_index(folder, index)
    assert len(list(index.glob("index.*.faiss"))) == 2
    assert run_query(index, pictures[1]) == before
    assert run_index(folder, index)["embedded"] == 1
    assert sorted(path.name for path in index.glob("[!.]*")) == ["index.2.faiss", "index.json"]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_old_index(made, pictures, monkeypatch):
    folder, index = made
    before = run_query(index, pictures[1])
    shutil.copy(pictures[1][0], folder / "88.JPG")
    flags = ["index", str(folder), "--out", str(index), *CPU]
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\nimport utils\n"
    limited += f"from tools import search\nutils.cli(lambda: search.main({flags}))"
    done = subprocess.run([sys.executable, "-c", limited], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert re.search(r"index\.2\.faiss: cannot be written \(File too large\)", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert run_query(index, pictures[1]) == before


def test_a_long_run_is_saved_as_it_goes(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(indexer, "SAVE_MINUTES", 0)
    index, read = tmp_path / "index", data_loader.ImageFiles.__getitem__
    decoded = []

    def stop_at_ten(self, row):
        decoded.append(row)
        if len(decoded) > 10:
            raise KeyboardInterrupt
        return read(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(data_loader.ImageFiles, "__getitem__", stop_at_ten)
        with pytest.raises(KeyboardInterrupt):
            run_index(folder, index, "--resume", checkpoint, "--modality", "visible", "--batch", "4")
    _, vectors = image_index.read_index(index)
    assert 0 < vectors.ntotal <= 8
    assert run_index(folder, index)["embedded"] == 14 - vectors.ntotal


def test_two_runs_do_not_write_one_index(made):
    folder, index = made
    code = textwrap.dedent(f"""
        from core.run import run_lock
        with run_lock({str(index / "index.json")!r}):
            print("claimed", flush=True)
            input()
    """)
    with process("-c", code, stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(InputError, match=r"index.json: another run .* is writing now \(process \d+"):
            run_index(folder, index)
        other.communicate("\n")


def test_damaged_and_foreign_index_files_are_named(made, pictures):
    folder, index = made
    about, (vectors,) = index / "index.json", index.glob("*.faiss")
    good, json_text = vectors.read_bytes(), about.read_text()
    content = json.loads(json_text)
    paths = list(content["images"])
    shorter = {path: content["images"][path] for path in paths[:-1]}
    hollow = faiss.IndexFlatIP(512)
    other_kind = faiss.IndexFlatL2(512)
    other_kind.add(np.zeros((len(paths), 512), np.float32))
    for bad in (b"", good[:10], good[:-5], os.urandom(len(good)), faiss.serialize_index(hollow).tobytes()):
        vectors.write_bytes(bad)
        for call in (lambda: run_query(index, pictures[1]), lambda: run_index(folder, index)):
            with pytest.raises(InputError, match=rf"{vectors.name}: does not hold the 14 vectors .*; remove both"):
                call()
    for bad in (os.urandom(len(good)), faiss.serialize_index(other_kind).tobytes(), b"IxFI" + os.urandom(99)):
        vectors.write_bytes(bad)  # of the size that index.json says
        about.write_text(json.dumps(content | {"bytes": len(bad)}))
        with pytest.raises(InputError, match="does not hold the 14 vectors"):
            run_query(index, pictures[1])
    vectors.write_bytes(good)
    about.write_text(json.dumps(content | {"images": shorter}))
    with pytest.raises(InputError, match="does not hold the 13 vectors"):
        run_query(index, pictures[1])
    damaged = ["", json_text[:-20], "[]", "\xff", json.dumps(content | {"vectors": "../index.1.faiss"})]
    for bad in (*damaged, json.dumps({}), json.dumps(content | {"modality": "sonar"}), "[" * 10**5):
        about.write_text(bad, "latin-1")
        for call in (lambda: run_query(index, pictures[1]), lambda: run_index(folder, index)):
            with pytest.raises(InputError, match=r"index\.json: damaged, or written by another program; remove it"):
                call()
    assert vectors.read_bytes() == good
    narrow = faiss.IndexFlatIP(4)
    narrow.add(np.zeros((len(paths), 4), np.float32))
    vectors.write_bytes(data := faiss.serialize_index(narrow).tobytes())
    about.write_text(json.dumps(content | {"bytes": len(data)}))
    with pytest.raises(InputError, match="14 of 4 values"):
        run_query(index, pictures[1])


def test_a_reader_meets_an_index_that_is_replaced(made, monkeypatch):
    folder, index = made
    read, calls = image_index.read_about, []

    def stale_at_first(place):
        calls.append(place)
        about = read(place)
        return about | {"vectors": "index.0.faiss"} if len(calls) == 1 else about

    monkeypatch.setattr(image_index, "read_about", stale_at_first)
    about, vectors = image_index.read_index(index)
    assert (about["vectors"], vectors.ntotal) == ("index.1.faiss", 14)


def clustered(count, people, dim=32, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(people, dim))
    x = centres[np.arange(count) % people] + 0.5 * rng.normal(size=(count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_inverted_lists_find_nearly_the_same():
    x, queries = clustered(20_000, 400), clustered(400, 400, seed=1)
    flat = faiss.IndexFlatIP(32)
    flat.add(x)
    inverted = image_index.arrange(flat)
    assert isinstance(inverted, faiss.IndexIVFFlat)
    assert inverted.nlist == 20_000 // 39
    assert inverted.nprobe == 32  # a sixteenth
    exact = np.argsort(-queries @ x.T, axis=1)[:, :10]
    found = inverted.search(queries, 10)[1]
    recall = np.mean([np.isin(mine, theirs).mean() for mine, theirs in zip(found, exact, strict=True)])
    assert recall > 0.95
    assert image_index.arrange(inverted) is inverted  # it suits
    inverted.remove_ids(faiss.IDSelectorRange(5000, 20_000))
    fewer = image_index.arrange(inverted)
    assert fewer.nlist == 5000 // 39
    fewer.make_direct_map()
    np.testing.assert_array_equal(fewer.reconstruct_n(0, 5000), x[:5000])


@pytest.mark.parametrize("ivf", [False, True])
def test_rows_close_up_when_some_go(ivf):
    x = clustered(3000, 50)
    flat = faiss.IndexFlatIP(32)
    flat.add(x)
    vectors, kept = image_index.arrange(flat) if ivf else flat, np.arange(3000) % 3 != 1
    image_index.drop_rows(vectors, kept)
    vectors.add(x[:5])
    left = np.concatenate([x[kept], x[:5]])
    assert vectors.ntotal == len(left)
    _, rows = vectors.search(x, 1)
    np.testing.assert_array_equal((left[rows[:, 0]] == x).all(axis=1)[kept], True)
    if ivf:
        vectors.make_direct_map()
    np.testing.assert_array_equal(vectors.reconstruct_n(0, len(left)), left)


def test_an_index_becomes_inverted_and_stays_so(made, checkpoint, pictures, monkeypatch):
    folder, index = made
    seen, expected = embedded_images(monkeypatch), plain_search(checkpoint, folder, pictures[1])
    for flags in (["--ivf"], []):
        assert run_index(folder, index, *flags)["embedded"] == 0
        assert set(seen) == {"broken.png"}
        assert isinstance(image_index.read_index(index)[1], faiss.IndexIVFFlat)
        check_found(run_query(index, pictures[1]), expected, 10)  # one list: exact
        seen.clear()


def test_an_inverted_index_that_others_made_is_refused(made, pictures):
    """Lists in a file of their own would be written to; row numbers that there are not would be asked for."""
    folder, index = made
    run_index(folder, index, "--ivf")
    about, (file,) = json.loads((index / "index.json").read_text()), index.glob("*.faiss")
    victim = index / "victim.bin"
    for kind in ("elsewhere", "rows", "quantizer"):
        vectors = faiss.read_index(str(file))
        if kind == "elsewhere":
            lists = faiss.OnDiskInvertedLists(vectors.nlist, vectors.code_size, str(victim))
            ids = faiss.rev_swig_ptr(vectors.invlists.get_ids(0), 14).copy()
            lists.add_entries(0, 14, faiss.swig_ptr(ids), vectors.invlists.get_codes(0))
            vectors.replace_invlists(lists)
        elif kind == "rows":
            faiss.rev_swig_ptr(vectors.invlists.get_ids(0), 1)[:] = 99
        else:
            vectors = faiss.IndexIVFFlat(faiss.IndexHNSWFlat(512, 4, faiss.METRIC_INNER_PRODUCT), 512, 1)
        data = faiss.serialize_index(vectors).tobytes()
        bad = index / "index.9.faiss"
        bad.write_bytes(data)
        (index / "index.json").write_text(json.dumps(about | {"vectors": bad.name, "bytes": len(data)}))
        for call in (lambda: run_query(index, pictures[1]), lambda: run_index(folder, index)):
            with pytest.raises(InputError, match="does not hold the 14 vectors"):
                call()
    for path in ("/etc/passwd.jpg", "../a.jpg"):
        images = {path: [1, 2], **about["images"]}
        (index / "index.json").write_text(json.dumps(about | {"images": images}))
        with pytest.raises(InputError, match="damaged, or written by another program"):
            run_query(index, pictures[1])


def test_json_and_sheet(made, pictures, tmp_path, capsys):
    _, index = made
    results = run_query(index, pictures[1], "--save", tmp_path / "a.svg", "--top", "4")
    assert {result["modality"] for result in results} == {"infrared"}
    text = (tmp_path / "a.svg").read_text()
    for result in results:
        for image in result["found"]:
            assert f">{image['similarity']:.3f}<" in text
            assert f"{Path(image['path']).name}<" in text
    assert "infrared queries in visible images of" in text
    capsys.readouterr()
    assert run_query(index, pictures[1], "--json") == json.loads(capsys.readouterr().out)  # and nothing else
    run_query(index, pictures[1], "--save", tmp_path / "a.png", "--top", "4")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 4 * 0.9 * 150


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
    for argv, words in (
        (["query", "none.jpg", *queries], "none.jpg: no such image"),
        (["query", str(folder / "broken.png"), *queries], "broken.png: cannot be read as an image"),
        (["query", image, *queries, "--save", "a.gif"], "--save a.gif: is not a .png"),
        (["query", image, *queries, "--save", "a.png", "--top", "101"], "--save: a sheet has room for 100"),
        (["query", copy, *queries, "--save", copy], "copy.png: is a query"),
        (
            ["query", image, *queries, "--save", str(folder / "in.png")],
            "or an image of the index",
        ),
        (["query", str(folder), *queries], "mine: is a folder; pass its images"),
        (["query", image, *queries, "--resume", "a.safetensors"], "a.safetensors: no such file"),
        (["query", image, *queries, "--resume", "no.t"], "no.t: no such file"),
        (["query", image, *queries[:2], "--index", str(tmp_path)], "contains no index.json"),
        (["index", "nowhere", "--out", str(tmp_path / "x"), *new], "nowhere: no such folder"),
        (["index", str(folder), "--out", str(tmp_path / "x")], "there is no index yet; pass --resume and --modality"),
        (["index", str(tmp_path / "empty"), "--out", str(tmp_path / "x"), *new], "empty: contains no image"),
        (["index", str(tmp_path / "spoilt"), "--out", str(tmp_path / "x"), *new], "none of its 1 images can be read"),
        (["index", str(folder), "--out", image, *new], "cannot write there"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            search.main(argv)
        assert "\n" not in str(caught.value)
    assert Path(copy).read_bytes() == pictures[1][0].read_bytes()
    assert not list((tmp_path / "x").glob("[!.]*"))
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
    assert "data:image" not in search_page.draw_card(found[0], str(folder))
    assert "data:image" in search_page.draw_card(found[1], str(folder))


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


def test_another_folder_does_not_empty_the_index_of_a_lost_one(made, pictures):
    folder, index = made
    other = folder.parent / "other"
    other.mkdir()
    shutil.copy(pictures[0][0], other / "a.jpg")
    folder.rename(folder.parent / "unmounted")
    with pytest.raises(InputError, match=r"other: contains no image of .*mine; that folder no longer exists"):
        run_index(other, index)
    assert image_index.read_index(index)[1].ntotal == 14


def test_the_index_remembers_where_the_checkpoint_is_now(made, checkpoint, pictures, tmp_path):
    folder, index = made
    place = shutil.copy(checkpoint, tmp_path / "moved.t")
    run_index(folder, index, "--resume", place)
    assert image_index.read_index(index)[0]["checkpoint"] == str(place)


def test_files_of_others_in_the_folder_stay(made):
    folder, index = made
    names = ("index.backup.faiss", ".index.html.swp", ".index_notes", "index.1.faiss.txt")
    for name in names:
        (index / name).write_text("mine")
    shutil.copy(readable(folder)[0], folder / "99.JPG")
    assert run_index(folder, index)["embedded"] == 1
    assert all((index / name).read_text() == "mine" for name in names)


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
    example = textwrap.dedent(search.__doc__[search.__doc__.index("    from tools.search import") :])
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
    embedder = names["embedder"]
    assert (embedder.size, embedder.dim, embedder.feature, len(embedder.sha256)) == (SIZE, 512, "FC", 64)
    pooled = search.Embedder(checkpoint, feature="POOL", gpu="cpu")(["a.jpg"], "infrared")
    assert abs(pooled - features[:1]).max() > 1e-3


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
    second = tmp_path / "second"
    run_index(folder, second, "--resume", exported["visible"], "--modality", "visible", "--batch", "4")
    check_found(run_query(second, pictures[1], "--resume", exported["infrared"]), expected, 10)
    check_found(run_query(second, pictures[1], "--resume", checkpoint), expected, 10)
    with pytest.raises(InputError, match=r"visible_FC.onnx: embeds visible images, not infrared ones; pass the .onnx"):
        run_query(second, pictures[1])
    assert search.Embedder(exported["visible"]).sha256 == search.Embedder(checkpoint, gpu="cpu").sha256
    with pytest.raises(InputError, match="gives FC features, not POOL"):
        search.Embedder(exported["visible"], feature="POOL")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(Path(exported["visible"]).read_bytes()[:5000])
    with pytest.raises(InputError, match=r"broken.onnx: not an ONNX file of tools.export"):
        search.Embedder(broken)


# --------------------------------------------------------------------------------------------------------- in a browser


@contextlib.contextmanager
def served(index):
    """tools.search serve as a process -> its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "tools.search", "serve", "--index", str(index), "--port", str(port), "--gpu", "cpu"]
    with process(*command, stderr=subprocess.PIPE) as server:
        assert server.stdout.readline().startswith(f"http://127.0.0.1:{port}"), server.communicate()[1]
        yield port
        server.terminate()
        errors = server.communicate()[1]
    assert server.returncode == 128 + 15
    assert "Traceback" not in errors


def listening(port):
    """Local addresses, in hexadecimal, of the sockets that listen on a port."""
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]


@pytest.mark.slow
def test_the_page_in_a_browser(made, checkpoint, pictures, browser):
    from playwright.sync_api import expect

    folder, index = made
    awkward = folder / "<b>&${value}{{value}}.JPG"  # a name is text, whatever is in it
    readable(folder)[0].rename(awkward)
    run_index(folder, index)
    embed = plain_embedding(checkpoint)
    gallery = [*readable(folder), awkward]
    features = np.stack([embed(path, "visible") for path in gallery])
    with served(index) as port:
        assert listening(port) == ["0100007F"]
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}")
        page.set_input_files("input[type=file]", pictures[1][0])
        for modality in ("infrared", "visible"):
            page.get_by_label(modality).check()
            scores = features @ embed(pictures[1][0], modality)
            order = np.argsort(-scores)[:10]
            expect(page.locator(".found b").nth(1)).to_have_text(f"{scores[order[0]]:.3f}", timeout=20_000)
            cards = page.locator(".found figure")
            expect(cards).to_have_count(10)
            for rank, row in enumerate(order):
                text = f"{rank + 1}. similarity {scores[row]:.3f}\n{gallery[row].relative_to(folder)}"
                assert cards.nth(rank).inner_text().strip() == text
            assert page.evaluate(
                "[...document.querySelectorAll('.found img')].every(image => image.naturalWidth == 128)"
            )
        assert complaints == []

        page.get_by_label("Remove").or_(page.get_by_label("Clear")).first.click()
        expect(page.get_by_text("The most similar images will appear here.")).to_be_visible()
        page.set_input_files("input[type=file]", {"name": "b.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
        expect(page.get_by_role("alert")).to_have_text(
            re.compile(r"^b\.jpg: cannot be read as an image \(.*'b\.jpg'\)")
        )
        assert page.locator(".found figure").count() == 0
        page.close()
        assert {url.split("/")[2] for url in requests if not url.startswith(("data:", "blob:"))} == {
            f"127.0.0.1:{port}"
        }
        rebound = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(rebound)
        for path in (gallery[0], checkpoint, index / "index.json", "/etc/passwd", REPO / "tools" / "search.py"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/file={path}")
            assert refused.value.code in (403, 404)


def test_a_port_that_is_taken_is_named(made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: cannot be used"):
            search.main(["serve", "--index", str(made[1]), "--port", str(port), "--gpu", "cpu"])
