"""The commands of docs/search.md, as they stand there, section by section."""

import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import testa
import utils
from checks import stored
from conftest import save_network, search_flags
from tests.oracles import plain_embedding
from tools.search import __main__ as search
from tools.search import watcher

CPU = ["--gpu", "cpu", "--workers", "0"]
PAGE = (Path(utils.__file__).parent / "docs" / "search.md").read_text()
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_float32")]


def blocks(kind):
    """{title of a section: its blocks of code of a kind}, of sections that have any."""
    found = {}
    for text in PAGE.split("\n## ")[1:]:
        code = re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)
        found |= {text.partition("\n")[0]: code} if code else {}
    return found


class Walk:
    """Runs the commands of a section, one after the other, in a folder of its own."""

    def __init__(self, title, tree, request):
        self.tree, self.request, self.place = tree, request, Path.cwd()
        self.checkpoint = save_network(self.place / "net.t", 0, "sysu")
        self.embed = plain_embedding(self.checkpoint)
        lines = "".join(blocks("sh").get(title, [])).replace("\\\n", "").splitlines()
        self.commands = [shlex.split(line) for line in lines]

    def words(self):
        """The next command, with the checkpoint in its place."""
        words = self.commands.pop(0)
        return [str(self.checkpoint) if word == "save_model/..._best.t" else word for word in words]

    def next(self, *more):
        """Run the next command -> what its `main` returns."""
        python, *words = self.words()
        if words[0] == "testa.py":
            assert words[:3] == ["testa.py", "--data_path", "mydata"]
            options = words[words.index("--calibrate") :]
            return testa.main([*search_flags("mydata", self.checkpoint), *options])
        assert [python, *words[:2]] == ["python", "-m", "tools.search"]
        return search.main([*words[2:], *([] if words[2] == "remove" else CPU), *more])

    def copies(self, folder, count, camera=1):
        """Copies of images of the tree."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        sources = sorted(self.tree.glob(f"cam{camera}/*/*.jpg"))[:count]
        return [shutil.copy(source, Path(folder, f"{number}.jpg")) for number, source in enumerate(sources)]

    def best(self, query, gallery):
        """A feature, {path: feature} -> [(path, similarity)], best first."""
        return sorted(((path, float(query @ feature)) for path, feature in gallery.items()), key=lambda pair: -pair[1])

    def calibrate(self):
        """Run the next command, which calibrates -> the similarity at a false-positive rate of 1 %."""
        Path("mydata").symlink_to(self.tree)
        self.next()
        same = json.loads(Path("same.json").read_text())
        return same["similarity"][same["false_positives"].index(pytest.approx(0.01))]


def agrees(found, expected):
    """What a query found are these [(path, similarity)]."""
    assert [image["path"] for image in found] == [path for path, _ in expected]
    assert [image["similarity"] for image in found] == pytest.approx([score for _, score in expected], abs=2e-6)


def index_query_serve(walk):
    visible, night = walk.copies("photos/visible", 8), walk.copies("photos/night", 3, camera=3)
    shutil.copy(night[1], "query.jpg")
    assert walk.next()["embedded"] == len(visible)
    gallery = {str(path.resolve()): walk.embed(path, "visible") for path in map(Path, visible)}
    (result,) = walk.next()
    agrees(result["found"], walk.best(walk.embed("query.jpg", "infrared"), gallery))
    with Image.open("sheet.png") as sheet:
        assert sheet.width > sheet.height  # one row: the query and eight images
    _, *words = walk.words()
    with subprocess.Popen([sys.executable, *words, *CPU[:2], "--port", "0"], stdout=subprocess.PIPE, text=True) as page:
        try:
            with urllib.request.urlopen(page.stdout.readline().split()[0], timeout=60) as answer:
                assert "<title>" in answer.read().decode()
        finally:
            page.terminate()
    assert page.returncode == 143
    assert walk.next()["embedded"] == len(night)
    shutil.copy(walk.copies("more", 9)[-1], "photos/visible/new.jpg")
    assert walk.next()["embedded"] == 1
    Path("disk2").mkdir()
    shutil.move("photos/visible", "disk2/visible")
    assert walk.next()["embedded"] == 0
    moved = {str(path) for path in (walk.place / "disk2" / "visible").iterdir()}
    assert {*stored("photos/index.db")} == moved | {str(walk.place / path) for path in map(Path, night)}
    walk.next()
    assert {*stored("photos/index.db")} == moved


def labelled_crops(walk):
    """Crops of seven cameras, as the pattern of the section "Cameras, people and times" has them -> {path: (camera,
    person, time)}."""
    facts, start = {}, datetime.datetime(2026, 11, 20, 13, 0, 30)
    for number, source in enumerate(sorted(walk.tree.glob("cam*/*/*.jpg"))):
        camera, person = str(1 + number % 7), source.parent.name
        time = start + datetime.timedelta(minutes=2 * number)
        path = walk.place / "crops" / f"cam{camera}" / person / f"{time:%Y%m%d_%H%M%S}_{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        facts[str(path)] = (camera, person, str(time))
    return facts


def cameras_people_and_times(walk):
    facts = labelled_crops(walk)
    assert walk.next()["unlabelled"] == []
    entries = {path: entry for path, (entry, _) in stored("site.db").items()}
    assert {path: (entry.camera, entry.person, entry.time) for path, entry in entries.items()} == facts
    lines = [f"{Path(path).relative_to(walk.place / 'crops')},{person} too" for path, (_, person, _) in facts.items()]
    Path("crops.csv").write_text("\n".join(["path,person", *lines]))
    counts = walk.next()
    assert (counts["embedded"], counts["unlabelled"]) == (0, [])
    people = {path: entry.person for path, (entry, _) in stored("site.db").items()}
    assert people == {path: f"{person} too" for path, (_, person, _) in facts.items()}


def queries(walk):
    facts = labelled_crops(walk)
    pattern = "cam{camera}/{person}/{time:%Y%m%d_%H%M%S}_{n}.jpg"
    flags = ["--modality", "visible", "--index", "site.db", "--resume", str(walk.checkpoint), "--pattern", pattern]
    search.main(["index", "crops", *flags, *CPU])
    for name, source in zip("abc", walk.copies("queries", 3, camera=6), strict=True):
        shutil.copy(source, f"{name}.jpg")
    gallery = {path: walk.embed(path, "visible") for path in facts}
    embedded = np.stack([walk.embed(f"{name}.jpg", "infrared") for name in "abc"])
    query, mean = embedded[0], embedded.sum(axis=0) / np.linalg.norm(embedded.sum(axis=0))
    ranked = walk.best(query, gallery)

    def chosen(fits):
        return [pair for pair in ranked if fits(pair[0])][:10]

    between, cameras = ("2026-11-20 14:00", "2026-11-20 16:00"), set("34567")
    (result,) = walk.next()
    expected = chosen(lambda path: facts[path][0] in cameras and between[0] <= facts[path][2] < between[1])
    assert expected
    agrees(result["found"], expected)
    (result,) = walk.next()
    agrees(result["found"], chosen(lambda path: facts[path][0] == "3"))
    (result,) = walk.next()
    groups = {}
    for path, score in walk.best(mean, gallery):
        groups.setdefault(facts[path][1], (path, score))
    agrees(result["found"], [*groups.values()][:10])
    (result,) = walk.next()
    assert [image["rank"] for image in result["found"]] == [*range(21, 41)]
    similarities = [image["similarity"] for image in result["found"]]
    assert similarities == pytest.approx([query @ gallery[image["path"]] for image in result["found"]], abs=2e-6)
    assert similarities != sorted(similarities, reverse=True)  # the order is that of re-ranking
    least = walk.calibrate()
    (result,) = walk.next("--top", "200")
    expected = [(path, score) for path, score in ranked if score >= least]
    assert 0 < len(expected) < len(ranked)
    agrees(result["found"], expected)
    (result,) = walk.next()
    assert ranked[-1][1] > 0.62
    agrees(result["found"], ranked[:10])


def crops_of_a_tracker(walk):
    """The layout of the section "Where else was this track seen?": cameras count their tracks from numbers of their
    own -> {(camera, track): its images}."""
    tracks, first = {}, {"1": 1, "2": 1, "4": 9, "5": 4, "3": 17, "6": 2}
    for modality, cameras in (("visible", "1245"), ("infrared", "36")):
        for camera in cameras:
            for number, folder in enumerate(sorted((walk.tree / f"cam{camera}").iterdir()), first[camera]):
                for n, source in enumerate(sorted(folder.glob("*.jpg"))):
                    name = f"cam{camera}/{number}/20261120_14{number:02d}{n:02d}_{n}.jpg"
                    path = walk.place / "crops" / modality / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    tracks.setdefault((camera, str(number)), []).append(shutil.copy(source, path))
    return tracks


def tracks(walk):
    tracks = crops_of_a_tracker(walk)
    shutil.move("crops/infrared", "night")
    for camera in Path("crops/visible").iterdir():
        camera.rename(Path("crops", camera.name))
    Path("crops/visible").rmdir()
    shutil.copy("night/cam6/2/20261120_140200_0.jpg", "a.jpg")
    flags = ["--modality", "visible", "--index", "site.db", "--resume", str(walk.checkpoint)]
    made = search.main(["index", "crops/cam1", *flags, *CPU])["embedded"]
    visible, infrared = walk.next(), walk.next()
    counts = [sum(len(paths) for (camera, _), paths in tracks.items() if camera in part) for part in ("1245", "36")]
    assert [visible["images"], infrared["images"] - visible["images"]] == counts
    assert (visible["unlabelled"], visible["embedded"], infrared["embedded"]) == ([], counts[0] - made, counts[1])
    first = walk.next()[0]["found"][0]
    assert (first["track"], first["similarity"]) == (f"{walk.place}/night//cam3/17", pytest.approx(1, abs=2e-6))
    assert walk.next()[0]["found"] == []  # there is no second page of camera 5


def where_else_was_this_track_seen(walk):
    tracks = crops_of_a_tracker(walk)
    walk.next()
    walk.next()
    least = walk.calibrate()
    capsys = walk.request.getfixturevalue("capsys")
    capsys.readouterr()
    found = walk.next()[0]["found"]

    def mean(track, modality):
        total = sum(walk.embed(path, modality) for path in tracks[track])
        return total / np.linalg.norm(total)

    seen = {number: mean((camera, number), "visible") for camera, number in tracks if camera == "5"}
    ranked = walk.best(mean(("3", "17"), "infrared"), seen)
    expected = [(number, score) for number, score in ranked if score >= least][:10]
    assert [image["track"].split("//")[1] for image in found] == [number for number, _ in expected]
    assert [image["similarity"] for image in found] == pytest.approx([score for _, score in expected], abs=2e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "crops/infrared/cam3/17 (infrared)"
    number = int(expected[0][0])
    times = f"2026-11-20 14:{number:02d}:00 to 14:{number:02d}:01"
    assert lines[1].endswith(f"  camera 5, track {number}, 2 images, {times}")


def watch_a_folder(walk):
    """Each until it has looked once; before the second one, a new crop comes."""
    capsys, patch = walk.request.getfixturevalue("capsys"), walk.request.getfixturevalue("monkeypatch")
    Path("mydata").symlink_to(walk.tree)
    testa.main(search_flags("mydata", walk.checkpoint, "--calibrate", "same.json"))
    least = json.loads(Path("same.json").read_text())
    least = least["similarity"][least["false_positives"].index(pytest.approx(0.01))]
    tracks = crops_of_a_tracker(walk)
    Path("people").mkdir()
    shutil.copy(tracks["5", "4"][0], "people/ann.jpg")  # to this network, as similar as an infrared image can be
    shutil.copy(tracks["3", "17"][0], "people/bob.jpg")
    flags = ["--modality", "infrared", "--index", "site.db", "--resume", str(walk.checkpoint)]
    search.main(["index", "crops/infrared", *flags, *CPU])
    new = tracks["5", "4"][0].relative_to(walk.place / "crops" / "visible")
    Path("crops/visible", new).rename("new.jpg")
    Path("crops.csv").write_text(f"path,camera,track\n{new},5,four\n")

    def stop(_):
        raise KeyboardInterrupt

    patch.setattr(watcher.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        walk.next()
    shutil.move("new.jpg", Path("crops/visible", new))
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        walk.next()
    crop = walk.embed(Path("crops/visible", new), "visible")
    ann, bob = (float(walk.embed(f"people/{name}.jpg", "infrared") @ crop) for name in ("ann", "bob"))
    assert bob < least < ann
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["path"] == str(walk.place / "crops" / "visible" / new)
    assert line["watched"] == "ann.jpg"
    assert line["similarity"] == pytest.approx(ann, abs=2e-6)
    entries = {path: entry for path, (entry, _) in stored("site.db").items()}
    assert {*entries} == {str(path) for paths in tracks.values() for path in paths}
    assert entries[str(tracks["5", "4"][0])].track == f"{walk.place}/crops/visible//four"
    assert entries[str(tracks["5", "4"][1])].track == f"{walk.place}/crops/visible//4"


def a_server(walk):
    """On a server of this machine, whose password stands in PGPASSWORD already."""
    address = walk.request.getfixturevalue("database")
    _, *install = walk.words()
    run = subprocess.run([sys.executable, *install, "--dry-run", "--no-index"], capture_output=True, text=True)
    assert (run.returncode, "Would install" in run.stdout) == (0, False)  # the tests' versions are of these ranges
    assert walk.words() == ["export", "PGPASSWORD=..."]
    facts = labelled_crops(walk)
    assert walk.next("--index", address)["embedded"] == len(facts)
    flags = ["--index", address, "--pattern", "cam{camera}/{person}/{n}.jpg"]
    search.main(["index", "crops", *flags, *CPU])
    shutil.copy(walk.copies("queries", 1, camera=3)[0], "a.jpg")
    (result,) = walk.next("--index", address)
    gallery = {path: walk.embed(path, "visible") for path, (camera, *_) in facts.items() if camera == "3"}
    agrees(result["found"], walk.best(walk.embed("a.jpg", "infrared"), gallery)[:10])


def as_a_library(walk):
    for name, source in zip("ab", walk.copies("queries", 2, camera=3), strict=True):
        shutil.copy(source, f"{name}.jpg")
    with Image.open(walk.copies("coloured", 1)[0]) as image:
        frame = np.asarray(image.convert("RGB"))[..., ::-1].repeat(2, 0)  # BGR, of twice the height
    height, width = frame.shape[:2]
    names = {"frame": frame, "boxes": [(0, 0, width, height), (0, 0, width // 2, height // 2)]}
    for code in blocks("python")["As a library"]:
        exec(code.replace("save_model/..._best.t", str(walk.checkpoint)), names)
        if "embed_crops" not in code:
            expected = [walk.embed(f"{name}.jpg", "infrared") for name in "ab"]
            np.testing.assert_allclose(names["features"], expected, atol=2e-6)
    for number, (_, _, right, bottom) in enumerate(names["boxes"]):
        Image.fromarray(frame[:bottom, :right, ::-1]).save("crop.png")
        np.testing.assert_allclose(names["features"][number], walk.embed("crop.png", "visible"), atol=2e-6)


WALKS = {
    "Index, query, serve": index_query_serve,
    "Cameras, people and times": cameras_people_and_times,
    "Queries": queries,
    "Tracks": tracks,
    "Where else was this track seen?": where_else_was_this_track_seen,
    "Watch a folder": watch_a_folder,
    "A server": a_server,
    "As a library": as_a_library,
}


@pytest.mark.parametrize("title", blocks("(?:sh|python)"))
def test_the_commands_of(title, sysu_tree, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    walk = Walk(title, sysu_tree, request)
    WALKS[title](walk)
    assert walk.commands == []
