"""`tools.search watch`: a folder that grows, watched people, and processes that are stopped and killed."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils
from checks import embedded_images, stored
from conftest import SIZE
from core.checkpoint import save_checkpoint
from model import GFMNet
from tests.oracles import plain_embedding
from tools import embedder
from tools.search import __main__ as search
from tools.search import watcher
from tools.search.address import open_index
from tools.search.index import Index
from utils import InputError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tools.search.__main__"])
CPU = ["--gpu", "cpu", "--workers", "0"]
pytestmark = pytest.mark.usefixtures("in_float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network whose streams differ, as they do after a training."""
    torch.manual_seed(0)
    net = GFMNet(num_classes=4, arch="resnet18")
    torch.nn.init.normal_(net.infrared.conv1.weight, std=0.05)
    path = tmp_path_factory.mktemp("network") / "net.t"
    content = {"net": net.state_dict(), "options": net.options, "image_size": list(SIZE), "args": {"dataset": None}}
    save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def pictures(sysu_tree):
    return sorted(sysu_tree.glob("cam[12]/*/*.jpg"))


@pytest.fixture
def site(checkpoint, tmp_path):
    """A folder without images, the place of an index, and a function that makes a Watcher, whose index is open."""
    folder, uri = tmp_path / "crops", str(tmp_path / "index.db")
    folder.mkdir()
    flags = ["watch", str(folder), "--index", uri, "--resume", str(checkpoint), "--modality", "visible", *CPU]
    with contextlib.ExitStack() as stack:

        def watch(*more):
            args = search.get_args_parser().parse_args([*flags, *map(str, more)])
            index = stack.enter_context(contextlib.closing(open_index(uri, create=True)))
            return watcher.Watcher(args, index, os.path.realpath(folder))

        yield SimpleNamespace(folder=folder, uri=uri, flags=flags, watch=watch)


def test_each_look_sees_what_has_changed_and_costs_nothing_else(site, checkpoint, pictures, monkeypatch, capsys):
    crops = site.watch("--pattern", "cam{camera}/{track}/{n}.jpg")
    crops.look()
    assert capsys.readouterr().err == ""
    place = site.folder / "cam3" / "17"
    place.mkdir(parents=True)
    for number in range(3):
        shutil.copy(pictures[number], place / f"{number}.jpg")
    shutil.copy(pictures[3], site.folder / "stray.jpg")
    seen = embedded_images(monkeypatch)
    crops.look()
    assert sorted(seen) == ["0.jpg", "1.jpg", "2.jpg", "stray.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        f"{site.folder}: embedded: 4; deleted: 0",
        f"{site.folder}/stray.jpg: has no labels, as --pattern or --csv does not fit it",
    ]
    entries = stored(site.uri)
    assert {entry.camera for entry, _ in entries.values()} == {"3", None}
    assert entries[f"{place}/1.jpg"][0].track == f"{site.folder}//17"

    with monkeypatch.context() as patch:  # nothing has changed: the index is not asked
        for name in ("label", "remove", "add", "switch"):
            patch.setattr(Index, name, lambda *_: pytest.fail("asks the index"))
        for _ in range(3):
            crops.look()
    (place / "0.jpg").unlink()
    shutil.copy(pictures[4], place / "1.jpg")
    seen.clear()
    for _ in range(2):
        crops.look()
    assert seen == ["1.jpg"]
    assert capsys.readouterr().err == f"{site.folder}: embedded: 1; deleted: 1\n"
    entries, embed = stored(site.uri), plain_embedding(checkpoint)
    assert {Path(path).name for path in entries} == {"1.jpg", "2.jpg", "stray.jpg"}
    for path, (_, vector) in entries.items():
        np.testing.assert_allclose(vector, embed(path, "visible"), atol=2e-6)
    away = (place / "2.jpg").rename(site.folder.with_name("away"))  # and comes back as it was
    crops.look()
    away.rename(place / "2.jpg")
    crops.look()
    assert len(stored(site.uri)) == 3
    # A second start goes on from there; and a folder that is not mounted has not been deleted.
    seen.clear()
    again = site.watch()
    again.look()
    assert seen == []
    site.folder.rename(site.folder.with_name("elsewhere"))
    for mounted in (False, True):
        again.look()
        assert len(stored(site.uri)) == 3
        if not mounted:
            site.folder.mkdir()
    assert "crops: cannot be listed (No such file or directory)" in capsys.readouterr().err


def test_a_crop_that_is_still_written_is_tried_again_and_a_damaged_one_listed_once(site, pictures, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(watcher.time, "monotonic", lambda: now)
    crops, content = site.watch(), pictures[0].read_bytes()
    written, damaged = site.folder / "written.jpg", site.folder / "damaged.jpg"
    written.write_bytes(content[: len(content) // 3])
    damaged.write_bytes(b"no image")
    for now in (0.0, 4.0, 9.0):
        crops.look()
        if now == 4.0:
            written.write_bytes(content[: len(content) // 2])
    assert stored(site.uri) == {}
    assert capsys.readouterr().err == ""
    now = 13.0
    crops.look()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"{damaged}: cannot be read as an image \(", line)
    written.write_bytes(content)
    seen = embedded_images(monkeypatch)
    for now in (14.0, 30.0, 60.0):  # noqa: B007 (read above)
        crops.look()
    assert seen == ["written.jpg"]
    assert capsys.readouterr().err == f"{site.folder}: embedded: 1; deleted: 0\n"
    assert [*stored(site.uri)] == [str(written)]
    written.write_bytes(content[:100])  # is written anew, and cannot be found meanwhile
    crops.look()
    assert stored(site.uri) == {}
    damaged.write_bytes(content)
    written.write_bytes(content)
    crops.look()
    assert {*stored(site.uri)} == {str(written), str(damaged)}


def test_another_image_of_a_name_does_not_get_the_labels_of_one_that_is_gone(site, pictures, tmp_path, monkeypatch):
    """Nor does it in a new call of `index`. One that is changed keeps them."""
    now, table = 0.0, tmp_path / "labels.csv"
    monkeypatch.setattr(watcher.time, "monotonic", lambda: now)
    table.write_text("path,camera,person\na.jpg,7,ann\n")
    image = site.folder / "a.jpg"
    shutil.copy(pictures[0], image)
    shutil.copy(pictures[0], site.folder / "other.jpg")  # an empty folder could be one that is not mounted
    crops = site.watch("--csv", table)

    def labels_after(*seconds):
        nonlocal now
        for now in seconds:  # noqa: B007 (read above)
            crops.look()
        entries = stored(site.uri)
        return [(entries[path][0].camera, entries[path][0].person) for path in entries if path == str(image)]

    assert labels_after(0.0, 10.0) == [("7", "ann")]
    table.write_text("path,camera,person\nb.jpg,8,bob\n")
    shutil.copy(pictures[1], image)
    assert labels_after(20.0, 30.0) == [("7", "ann")]
    image.unlink()
    assert labels_after(40.0, 50.0) == []
    shutil.copy(pictures[2], image)
    assert labels_after(60.0, 70.0) == [(None, None)]


def test_a_table_of_labels_that_grows_is_read_again(site, pictures, tmp_path, monkeypatch, capsys):
    table = tmp_path / "labels.csv"
    table.write_text("path,camera,track,time\na.jpg,3,17,2026-11-20T14:03:11\n")
    for name, source in zip("ab", pictures, strict=False):
        shutil.copy(source, site.folder / f"{name}.jpg")
    crops = site.watch("--csv", table)
    crops.look()
    seen = embedded_images(monkeypatch)
    table.write_text(table.read_text() + "b.jpg,5,4,2026-1")
    crops.look()
    crops.look()
    assert capsys.readouterr().err.count("time 2026-1: is not a time") == 1
    table.write_text(table.read_text() + "1-20T14:31:00\n")
    crops.look()
    table.unlink()  # is replaced
    crops.look()
    assert seen == []
    entries = {Path(path).name: entry for path, (entry, _) in stored(site.uri).items()}
    labels = {name: (entry.camera, entry.track) for name, entry in entries.items()}
    assert labels == {"a.jpg": ("3", f"{site.folder}//17"), "b.jpg": ("5", f"{site.folder}//4")}
    assert entries["b.jpg"].time == "2026-11-20 14:31:00"


def test_lines_of_a_watcher_write_nothing_else(capsys):
    told = SimpleNamespace(told=set())
    for _ in range(2):
        watcher.Watcher._tell(told, ["a\x1b[2J.jpg: cannot be read"])
    assert capsys.readouterr().err == "a?[2J.jpg: cannot be read\n"


def test_new_images_of_watched_people_are_printed(site, checkpoint, pictures, tmp_path, capsys):
    """Each folder is a person, by the mean of its images, and so is each image beside them."""
    embed, people = plain_embedding(checkpoint), tmp_path / "people"
    (people / "ann" / "deep").mkdir(parents=True)
    for name, source in (("ann/1.jpg", 8), ("ann/deep/2.jpg", 9), ("ann.jpg", 10), ("ann.png", 11)):
        shutil.copy(pictures[source], people / name)
    total = embed(people / "ann/1.jpg", "infrared") + embed(people / "ann/deep/2.jpg", "infrared")
    persons = {name: embed(people / name, "infrared") for name in ("ann.jpg", "ann.png")}
    persons["ann"] = total / np.linalg.norm(total)
    features = {str(site.folder / f"{i}.jpg"): embed(pictures[i], "visible") for i in range(6)}
    scores = {(path, name): float(f @ person) for path, f in features.items() for name, person in persons.items()}
    least = float(np.median([*scores.values()]))
    flags = ["--watch_for", people, "--watch_modality", "infrared", "--min_similarity", least, "--tracks", "folder"]
    crops = site.watch(*flags)
    for i in range(6):
        shutil.copy(pictures[i], site.folder / f"{i}.jpg")
        if i % 3 == 2:
            crops.look()
            crops.look()
    site.watch(*flags).look()  # a new start does not repeat them
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(line["path"], line["watched"]) for line in lines}
    assert found == {key for key, score in scores.items() if score >= least}
    assert len(lines) == 9
    for line in lines:
        assert line["similarity"] == pytest.approx(scores[line["path"], line["watched"]], abs=2e-6)
        assert line["track"] == f"{site.folder}//."
        assert {"camera", "time", "modality", "person"} <= line.keys()


def test_an_image_is_reported_before_it_is_indexed(site, pictures, tmp_path, monkeypatch, capsys):
    """So that a kill between the two loses no report."""
    (tmp_path / "people").mkdir()
    for place in (tmp_path / "people", site.folder):
        shutil.copy(pictures[0], place / "ann.jpg")
    crops = site.watch("--watch_for", tmp_path / "people", "--watch_modality", "visible", "--min_similarity", "0.9")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        crops.look()
    assert json.loads(capsys.readouterr().out)["path"] == str(site.folder / "ann.jpg")


def test_flags_that_do_not_fit_are_one_line(site, tmp_path, monkeypatch):
    monkeypatch.setattr(watcher.time, "sleep", lambda _: pytest.fail("watches"))
    (tmp_path / "empty").mkdir()
    together = "--watch_for, --watch_modality and --min_similarity, or .* belong together; pass all or none"
    for more, words in (
        (["--watch_for", "people", "--watch_modality", "visible"], together),
        (["--watch_for", "people", "--min_similarity", "0.0"], together),
        (["--min_similarity", "0.5"], together),
        (["--watch_for", "none", "--watch_modality", "visible", "--min_similarity", "0"], "none: no such folder; pass"),
        (
            ["--watch_for", tmp_path / "empty", "--watch_modality", "visible", "--min_similarity", "0"],
            "empty: contains no image; pass images of the watched people",
        ),
    ):
        with pytest.raises(InputError, match=words) as caught:
            search.main([*site.flags, *map(str, more)])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="none: no such folder"):
        search.main(["watch", "none", *site.flags[2:]])
    with pytest.raises(InputError, match="--modality: .* does not know which one .*crops has; pass it"):
        search.main([*site.flags[:6], *CPU])


# ---------------------------------------------------------------------------------------------------- as processes


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def killed_after(process, seconds):
    """So that a test that waits for what it prints ends."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(site, pictures, tmp_path, stop):
    people = tmp_path / "people"
    people.mkdir()
    shutil.copy(pictures[0], people / "ann.jpg")
    flags = [*site.flags, "--watch_for", str(people), "--watch_modality", "visible", "--min_similarity", "-1"]
    command = [sys.executable, "-m", "tools.search", *flags]
    root = Path(utils.__file__).parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background, it is ignored
    with subprocess.Popen(command, cwd=root, **pipes) as process, killed_after(process, 60):
        assert process.stderr.readline() == f"{site.folder}: watched (Ctrl-C stops it)\n"
        start = time.monotonic()
        shutil.copy(pictures[0], site.folder / "a.jpg")
        line = json.loads(process.stdout.readline())  # at once, though stdout is a pipe
        assert time.monotonic() - start < 10
        assert (line["watched"], line["path"]) == ("ann.jpg", str(site.folder / "a.jpg"))
        assert process.stderr.readline() == f"{site.folder}: embedded: 1; deleted: 0\n"
        process.send_signal(stop)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (128 + stop, "")
    assert errors == f"\nsearch.py: stopped by {stop.name}\n"
    assert [*stored(site.uri)] == [str(site.folder / "a.jpg")]


def _watch(argv, output, environment):
    os.environ.update(environment)
    with open(output, "a") as sys.stdout:
        torch.set_num_threads(1)
        embedder.computes_bf16 = lambda device: False
        search.main(argv)


@pytest.mark.slow
def test_what_is_killed_at_any_moment_loses_nothing(checkpoint, pictures, address, tmp_path):
    """Two folders that grow, each watched by a process, into one index; twenty kills. Every image is indexed exactly
    once, and reported at least once."""
    rng, folders, written = random.Random(0), [tmp_path / "left", tmp_path / "right"], []
    people = tmp_path / "people"
    people.mkdir()
    shutil.copy(pictures[0], people / "ann.jpg")
    flags = ["--index", address, "--resume", str(checkpoint), "--modality", "visible", "--batch", "2", *CPU]
    flags += ["--watch_for", str(people), "--watch_modality", "visible", "--min_similarity", "-1"]

    def start(folder):
        folder.mkdir(exist_ok=True)
        argv = ["watch", str(folder), *flags, "--tracks", "folder"]
        process = PROCESSES.Process(target=_watch, args=(argv, str(folder) + ".out", dict(os.environ)))
        process.start()
        return process

    def grow():
        """One more crop in each folder, written in two parts."""
        for folder in folders:
            content = rng.choice(pictures).read_bytes()
            path = folder / f"{len(written):04d}.jpg"
            written.append(path)
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                time.sleep(rng.random() * 0.1)
                file.write(content[len(content) // 2 :])

    def reported():
        files = [Path(f"{folder}.out") for folder in folders]
        text = "".join(file.read_text() for file in files if file.exists())
        return [json.loads(line)["path"] for line in text.splitlines() if line.endswith("}")]

    processes = [start(folder) for folder in folders]
    for kill in range(20):
        before, end = len(reported()), time.monotonic() + 60
        while len(reported()) == before and time.monotonic() < end:  # it is at work, and may be killed anywhere
            grow()
        time.sleep(rng.random())
        processes[kill % 2].kill()
        processes[kill % 2].join()
        assert processes[kill % 2].exitcode == -signal.SIGKILL  # it had not ended by itself
        processes[kill % 2] = start(folders[kill % 2])
    grow()
    wait_for(lambda: {*reported()} >= {*map(str, written)}, 120)
    wait_for(lambda: len(stored(address)) == len(written), 30)
    for process in processes:
        assert process.is_alive()
        process.kill()
        process.join()
    entries, embed, features = stored(address), plain_embedding(checkpoint), {}
    assert {*entries} == {*map(str, written)}
    for path in written:
        entry, vector = entries[str(path)]
        content = path.read_bytes()
        features.setdefault(content, embed(path, "visible"))
        np.testing.assert_allclose(vector, features[content], atol=2e-6)
        assert entry.track == f"{path.parent}//."
