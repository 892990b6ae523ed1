"""demo_data.py: exact layouts, a seed fixes every byte, nothing half-made is left, and colour tells nothing."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import operator
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

import data_manager
import testa
import utils
from data_loader import eval_loader
from tools import demo_data


def make(out: Path, *switches, **flags) -> Path:
    """Run the script with small defaults; returns the tree."""
    flags = {"ids": 8, "images": 2, "seed": 3, "workers": 2} | flags
    result = demo_data.main(["--out", str(out), *switches, *(f"--{name}={value}" for name, value in flags.items())])
    assert result["out"] == out
    return out


def files(tree: Path) -> list:
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())


def digest(tree: Path) -> str:
    return hashlib.sha256(b"".join(name.encode() + (tree / name).read_bytes() for name in files(tree))).hexdigest()


def read_ids(tree: Path, part: str) -> list:
    text = (tree / f"exp/{part}_id.txt").read_text()
    assert len(text.splitlines()) == 1
    return [int(word) for word in text.split(",")]


@pytest.fixture(scope="module")
def sysu(tmp_path_factory):
    return make(tmp_path_factory.mktemp("demo") / "sysu", ids=20)


def test_number_of_held_out_people(tmp_path):
    tree = make(tmp_path / "out", ids=20, images=1, test_ids=3)
    assert {name: len(read_ids(tree, name)) for name in ("train", "val", "test")} == {"train": 15, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def regdb(tmp_path_factory):
    return make(tmp_path_factory.mktemp("demo") / "regdb", layout="regdb", ids=5, images=10)


SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("llcm", "vcm", "buptcampus")]


@pytest.mark.parametrize("layout", ["sysu", "regdb", *SLOW])
def test_seed_fixes_every_byte(tmp_path, layout):
    size = {"layout": layout, "images": 12 if layout == "vcm" else 2}
    first = digest(make(tmp_path / "a", workers=1, **size))
    assert digest(make(tmp_path / "b", workers=3, **size)) == first
    assert digest(make(tmp_path / "c", seed=4, **size)) != first


def test_sysu_layout(sysu):
    parts = {name: read_ids(sysu, name) for name in ("train", "val", "test")}
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 12, "val": 2, "test": 6}
    everybody = sum(parts.values(), [])
    assert len(set(everybody)) == 20
    assert set(everybody) <= set(range(1, 534))
    assert max(everybody) > 20  # with holes

    expected, cameras = {f"exp/{name}_id.txt" for name in parts} | {"exp/rand_perm_cam.mat", "demo.txt"}, {}
    for identity in everybody:
        cameras[identity] = {camera for camera in range(1, 7) if (sysu / f"cam{camera}/{identity:04d}").exists()}
        assert cameras[identity] & {1, 2, 4, 5}
        assert cameras[identity] & {3, 6}
        for camera in cameras[identity]:
            count = len(list((sysu / f"cam{camera}/{identity:04d}").iterdir()))
            assert 1 <= count <= 3
            expected |= {f"cam{camera}/{identity:04d}/{number:04d}.jpg" for number in range(1, count + 1)}
    assert set(files(sysu)) == expected
    assert {1, 2, 3} in cameras.values()
    assert {1, 2, 3, 4, 5, 6} in cameras.values()


def test_sysu_permutations_fit_the_folders(sysu):
    cells = loadmat(sysu / "exp/rand_perm_cam.mat")["rand_perm_cam"]
    assert cells.shape == (6, 1)
    counted = 0
    for camera, people in enumerate(cells[:, 0], 1):
        for identity, rows in enumerate(people[:, 0], 1):
            count = len(list((sysu / f"cam{camera}/{identity:04d}").glob("*.jpg")))
            assert rows.shape == (10, count)
            assert (np.sort(rows, axis=1) == np.arange(1, count + 1)).all()
            counted += count
    assert counted == len(list(sysu.glob("cam*/*/*.jpg")))


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """A tree like another one's rand_perm_cam.mat -> (folder of the .mat files, tree, counts of the file)."""
    folder = tmp_path_factory.mktemp("like")
    counts = {(1, 3): 3, (3, 3): 2, (2, 4): 1, (6, 4): 4, (5, 7): 2, (3, 7): 1, (4, 9): 2, (6, 12): 300, (1, 13): 1}
    counts |= {(6, 13): 1}
    cells = np.empty((6, 1), object)
    for camera in range(1, 7):
        cells[camera - 1, 0] = np.empty((20, 1), object)
        for identity in range(1, 21):
            count = counts.get((camera, identity), 0)
            cells[camera - 1, 0][identity - 1, 0] = np.tile(np.arange(1, count + 1), (10, 1))
    savemat(folder / "rand_perm_cam.mat", {"rand_perm_cam": cells})
    savemat(folder / "train_id.mat", {"id": [[3.0]]})
    savemat(folder / "test_id.mat", {"id": [[7, 4]]})
    result = demo_data.main(["--out", str(folder / "tree"), "--like", str(folder / "rand_perm_cam.mat")])
    assert (result["ids"], result["images"]) == (6, 317)
    return folder, folder / "tree", counts


def test_like_has_every_person_camera_count(like):
    folder, tree, counts = like
    names = {
        f"cam{camera}/{identity:04d}/{number:04d}.jpg"
        for (camera, identity), count in counts.items()
        for number in range(1, count + 1)
    }
    lists = {"demo.txt", "exp/rand_perm_cam.mat", "exp/train_id.txt", "exp/val_id.txt", "exp/test_id.txt"}
    assert set(files(tree)) == names | lists
    assert (tree / "exp/rand_perm_cam.mat").read_bytes() == (folder / "rand_perm_cam.mat").read_bytes()
    # 9 is seen in visible light only and 12 in infrared only: in no list.
    assert {part: read_ids(tree, part) for part in ("train", "val", "test")} == {
        "train": [3],
        "val": [13],
        "test": [4, 7],
    }


READ_MAT = data_manager._read_mat


def end_at_ids(path_and_name):
    """As scipy's reader ends the process at some damaged files."""
    return os._exit(1) if path_and_name[1] == "id" else READ_MAT(path_and_name)


def test_like_needs_the_files_beside_it_and_takes_no_sizes(like, tmp_path, monkeypatch):
    folder, _, _ = like
    with pytest.raises(utils.InputError, match=r"--like .*leave out --ids"):
        demo_data.main(["--out", str(tmp_path / "out"), "--like", str(folder / "rand_perm_cam.mat"), "--ids", "9"])
    (tmp_path / "rand_perm_cam.mat").write_bytes((folder / "rand_perm_cam.mat").read_bytes())
    with pytest.raises(utils.InputError, match=r"train_id\.mat: cannot be read as a list of ids"):
        demo_data.main(["--out", str(tmp_path / "out"), "--like", str(tmp_path / "rand_perm_cam.mat")])
    with pytest.raises(utils.InputError, match=r"test_id\.mat: is not a rand_perm_cam\.mat"):
        demo_data.main(["--out", str(tmp_path / "out"), "--like", str(folder / "test_id.mat")])
    for ids in ([1, -3], [2.7], [np.nan], [1e30], ["a"]):
        savemat(tmp_path / "train_id.mat", {"id": [ids]})
        with pytest.raises(utils.InputError, match=r"train_id\.mat: cannot be read as a list of ids"):
            demo_data.main(["--out", str(tmp_path / "out"), "--like", str(tmp_path / "rand_perm_cam.mat")])
    savemat(tmp_path / "train_id.mat", {"id": [[1, 2, 3]]})
    monkeypatch.setattr(data_manager, "_read_mat", end_at_ids)
    with pytest.raises(utils.InputError, match=r"train_id\.mat: cannot be read as a list of ids"):
        demo_data.main(["--out", str(tmp_path / "out"), "--like", str(tmp_path / "rand_perm_cam.mat")])
    assert files(tmp_path) == ["rand_perm_cam.mat", "train_id.mat"]


def test_llcm_layout(tmp_path):
    tree = make(tmp_path / "llcm", layout="llcm", ids=9)
    test_ids = [int(word) for word in (tree / "idx/test_id.txt").read_text().split(",")]
    assert len(test_ids) == 3
    everything, owners = (
        set(files(tree)) - {"demo.txt", "idx/train_vis.txt", "idx/train_nir.txt", "idx/test_id.txt"},
        {},
    )
    for kind in ("vis", "nir"):
        lines = [line.split() for line in (tree / f"idx/train_{kind}.txt").read_text().splitlines()]
        assert {path for path, _ in lines} == {name for name in everything if name.startswith(f"train_{kind}/")}
        for path, label in lines:
            owners.setdefault(int(label), set()).add(int(path.split("/")[2]))
        tested = {name.split("/")[2] for name in everything if name.startswith(f"test_{kind}/")}
        assert tested == {f"{identity:04d}" for identity in test_ids}
        gray = Image.open(tree / next(name for name in everything if name.startswith(f"test_{kind}/")))
        spread = np.ptp(np.asarray(gray).astype(int), axis=2).mean()
        assert spread < 1 if kind == "nir" else spread > 5
    assert sorted(owners) == list(range(6))
    assert all(len(ids) == 1 for ids in owners.values())
    assert not set.union(*owners.values()) & set(test_ids)
    places = {tuple(name.split("/")[1:3]) for name in everything if name.startswith("test_vis/")}
    assert places == {tuple(name.split("/")[1:3]) for name in everything if name.startswith("test_nir/")}
    # The two spectra are two moments, not one pose twice.
    visible, infrared = (
        Image.open(tree / f"test_{kind}" / "/".join(sorted(places)[0]) / "0001.jpg").size for kind in ("vis", "nir")
    )
    assert visible != infrared


def test_vcm_layout(vcm_tree):
    lists, images, people = ("train_name", "test_name", "track_train_info", "track_test_info", "query_IDX"), set(), {}
    for part in ("train", "test"):
        names = (vcm_tree / f"info/{part}_name.txt").read_text().splitlines()
        rows = [line.split() for line in (vcm_tree / f"info/track_{part}_info.txt").read_text().splitlines()]
        after = 0
        for modality, first, last, person, camera in rows:
            assert (int(first), int(last)) == (after + 1, after + 12)
            after = int(last)
            own = [f"{person}M{modality}D{camera}T1F{n}.jpg" for n in range(1, 13)]
            assert names[int(first) - 1 : after] == own
            folder = f"{part.capitalize()}/{person}/{('ir', 'rgb')[int(modality) - 1]}/D{camera}"
            images |= {f"{folder}/{n}.jpg" for n in range(1, 13)}
            people.setdefault((part, person), set()).add((modality, int(camera)))
        assert len(names) == after
        infrared = [number for number, row in enumerate(rows, 1) if row[0] == "1"]
    assert [int(word) for word in (vcm_tree / "info/query_IDX.txt").read_text().split()] == infrared
    drawn = {file for file in files(vcm_tree) if not file.startswith("cache/")}  # of trainings of other tests
    assert drawn == images | {f"info/{name}.txt" for name in lists} | {"demo.txt"}
    assert sorted(part for part, _ in people) == ["test"] * 2 + ["train"] * 4
    assert len({person for _, person in people}) == 6
    for seen in people.values():  # three cameras, each in both modalities
        cameras = {camera for _, camera in seen}
        assert (len(seen), len(cameras)) == (6, 3)
        assert cameras <= set(range(1, 7))


def test_buptcampus_layout(tmp_path):
    tree = make(tmp_path / "bupt", layout="buptcampus", ids=9, images=2)
    paths = json.loads((tree / "data_paths.json").read_text())
    tracks = {}
    for person, kinds in paths.items():
        for kind, cameras in kinds.items():
            for camera, numbered in cameras.items():
                stem = f"{person}/{kind}/{camera}/{person}_{kind}_{camera}_1"
                assert numbered == {"1": [f"{stem}_1.jpg", f"{stem}_2.jpg"]}
                tracks[person, kind, camera, "1"] = numbered["1"]
    lists = {name: (tree / f"{name}.txt").read_text().splitlines() for name in ("train", "query", "gallery")}
    images = {f"DATA/{frame}" for frames in tracks.values() for frame in frames}
    assert set(files(tree)) == images | {f"{name}.txt" for name in lists} | {"data_paths.json", "demo.txt"}
    rows = {name: [tuple(line.split()) for line in lines] for name, lines in lists.items()}
    assert {kind for _, kind, _, _ in rows["train"]} == {"RGB/IR"}
    both = [(person, kind, *rest) for person, kinds, *rest in rows["train"] for kind in kinds.split("/")]
    assert sorted(both + rows["query"] + rows["gallery"]) == sorted(tracks)  # each once
    people = {name: {row[0] for row in of} for name, of in rows.items()}
    assert (len(people["train"]), len(rows["query"])) == (6, 3)
    assert people["query"] == people["gallery"] == paths.keys() - people["train"]
    assert sorted(kind for _, kind, _, _ in rows["query"]) == ["IR", "IR", "RGB"]


def test_frames_of_a_track_are_one_walk(vcm_tree):
    """One size and scene, another stride and other noise in each frame."""
    folder = sorted(vcm_tree.glob("Test/*/rgb/*"))[0]
    frames = []
    for number in range(1, 13):
        with Image.open(folder / f"{number}.jpg") as image:
            frames.append(np.asarray(image.convert("L")).astype(float))
    assert len({frame.shape for frame in frames}) == 1
    differences = [np.abs(one - other) for one, other in itertools.combinations(frames, 2)]
    top = len(frames[0]) // 12  # above the head
    assert all(0.2 < difference[:top].mean() < 8 for difference in differences)
    legs = [difference[len(difference) // 2 :] for difference in differences]
    assert np.mean([part.mean() for part in legs]) > 1.2 * np.mean([d[:top].mean() for d in differences])


def test_images_are_rgb_of_odd_sizes_and_infrared_is_gray(sysu):
    sizes = set()
    for path in sorted(sysu.glob("cam*/*/0001.jpg")):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            pixels = np.asarray(image).astype(int)
            sizes.add(image.size)
        spread = np.ptp(pixels, axis=2).mean()
        assert spread < 1 if path.parts[-3] in ("cam3", "cam6") else spread > 5
    assert len(sizes) > 20
    assert all(80 <= width <= 140 and 2 * width < height < 2.7 * width for width, height in sizes)


def test_regdb_layout(regdb):
    parts, spectra, trials = ("train", "test"), ("visible", "thermal"), range(1, 11)
    images = {
        f"{spectrum.capitalize()}/{identity}/{spectrum[0]}_{number:04d}.bmp"
        for spectrum in spectra for identity in range(1, 6) for number in range(1, 11)
    }  # fmt: skip
    lists = {f"idx/{part}_{kind}_{trial}.txt" for part in parts for kind in spectra for trial in trials}
    assert set(files(regdb)) == images | lists | {"demo.txt"}
    for name in sorted(images)[::17]:
        with Image.open(regdb / name) as image:
            assert (image.format, image.mode, image.size) == ("BMP", "RGB", (64, 128))

    halves = set()
    for trial in trials:
        people = {}
        for part in parts:
            for spectrum in spectra:
                labels = {}
                for line in (regdb / f"idx/{part}_{spectrum}_{trial}.txt").read_text().splitlines():
                    path, label = line.split()
                    assert path in images
                    assert path.startswith(spectrum.capitalize())
                    labels.setdefault(int(label), []).append(path.split("/")[1])
                assert sorted(labels) == list(range(len(labels)))
                assert all(len(owners) == 10 and len(set(owners)) == 1 for owners in labels.values())
                people[part, spectrum] = [labels[label][0] for label in sorted(labels)]
            assert people[part, "visible"] == people[part, "thermal"]
        assert sorted(people["train", "visible"] + people["test", "visible"]) == ["1", "2", "3", "4", "5"]
        assert len(people["train", "visible"]) == 2
        halves.add(tuple(people["train", "visible"]))
    assert len(halves) > 3  # of ten possible ones


def test_no_two_people_are_alike():
    traits = [tuple(person.traits.values()) for person in demo_data.draw_people(list(range(1, 121)), 0).values()]
    alike = [sum(map(operator.eq, one, other)) for one, other in itertools.combinations(traits, 2)]
    assert max(alike) <= 8  # of 12


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ids", "5"], ["--ids 5", "at least 6"]),
        (["--ids", "3", "--layout", "regdb"], ["--ids 3", "at least 4"]),
        (["--sheet", "people.gif"], ["--sheet people.gif", ".png"]),
        (["--test_ids", "5", "--ids", "8"], ["--test_ids 5", "8 people", "--ids"]),
        (["--test_ids", "3", "--layout", "llcm"], ["--test_ids 3", "llcm"]),
        (["--ids", "5", "--layout", "vcm"], ["--ids 5", "at least 6"]),
        (["--images", "11", "--layout", "vcm"], ["--images 11", "at least 12"]),
    ],
)
def test_bad_flags_name_the_remedy(tmp_path, flags, words):
    with pytest.raises(utils.InputError) as error:
        demo_data.main(["--out", str(tmp_path / "out"), *flags])
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_never_overwrites(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("full", "file", "file/below", "loop"):
        with pytest.raises(utils.InputError, match=f"--out .*{name}"):
            make(tmp_path / name)
    (tmp_path / "loop").unlink()
    assert files(tmp_path) == ["file", "full/mine.txt"]
    (tmp_path / "empty").mkdir()
    assert files(make(tmp_path / "empty"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rand_perm_cam.mat")
    with pytest.raises(utils.InputError, match=r"rand_perm_cam\.mat: is not a rand_perm_cam\.mat"):
        demo_data.main(["--out", str(tmp_path / "out"), "--like", str(tmp_path / "rand_perm_cam.mat")])


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, fault):
    seen = []

    def stop_after_three(iterable, **_):
        for count in iterable:
            yield count
            seen.append(files(tmp_path))
            if len(seen) == 3:
                raise fault

    monkeypatch.setattr(utils, "progress", stop_after_three)
    with pytest.raises(fault):
        make(tmp_path / "out")
    assert seen[-1]  # it had begun to write
    assert not any(name.startswith("out") for name in seen[-1])
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_, file, *__, **___):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "old.png").write_text("old")
    plain, words = ["--ids", "6", "--images", "1", "--workers", "0"], r": cannot be written \(No space left on device\)"
    monkeypatch.setattr(demo_data, "draw_sheet", lambda *_: type("Sheet", (), {"save": full})())
    with pytest.raises(utils.InputError, match=rf"old\.png{words}"):
        demo_data.main(["--out", str(tmp_path / "out"), *plain, "--sheet", str(tmp_path / "old.png")])
    assert (tmp_path / "old.png").read_text() == "old"
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(utils.InputError, match=rf"new{words}"):
        demo_data.main(["--out", str(tmp_path / "new"), *plain])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.png", "out"]


@pytest.mark.parametrize("folder", ["new", "out"])
def test_contact_sheet_in_a_folder_that_does_not_exist(tmp_path, folder):
    make(tmp_path / "out", sheet=tmp_path / folder / "sheet.png")
    with Image.open(tmp_path / folder / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("L")).astype(float)
    assert 1000 < pixels.shape[1] < 1300
    rows = pixels[pixels.shape[0] // 8 :: pixels.shape[0] // 4]  # through each of the four rows of people
    assert (rows.std(axis=1) > 20).all()


def garment_tones(people: dict, spectrum: str) -> np.ndarray:
    """Mean brightness of the upper and lower torso as painted, without scene or sensor: [people, 2]."""
    shot = demo_data.Shot(0, 0, 0, 0.1, (0.2, 0.2), x=40, y=195, scale=190, light=0)
    tones = []
    for person in people.values():
        canvas = np.zeros((200, 80, 3 if spectrum == "visible" else 1), np.float32)
        demo_data.draw_person(canvas, person, spectrum, shot)
        tones.append([canvas[45:75, 30:50].mean(), canvas[105:125, 30:50].mean()])
    return np.array(tones)


def test_colour_does_not_carry_over():
    people = demo_data.draw_people(list(range(1, 151)), 0)
    visible, infrared, thermal = (garment_tones(people, spectrum) for spectrum in ("visible", "infrared", "thermal"))
    for other in (infrared, thermal):
        for garment in (0, 1):
            assert other[:, garment].std() > 0.05
            # of 150 independent pairs, the correlation has a standard deviation of 0.08
            assert abs(np.corrcoef(visible[:, garment], other[:, garment])[0, 1]) < 0.25


def test_texture_and_shape_carry_over():
    """In one pose, the edges of the visible image are the edges of the infrared and of the thermal one."""
    shot = demo_data.Shot(0.4, 0.1, 1.0, 0.4, (0.2, 0.6), x=40, y=195, scale=190, light=0.3)
    people = demo_data.draw_people(list(range(1, 31)), 0)
    edges = {}
    for spectrum in ("visible", "infrared", "thermal"):
        for identity, person in people.items():
            canvas = np.full((200, 80, 3 if spectrum == "visible" else 1), 0.02, np.float32)
            demo_data.draw_person(canvas, person, spectrum, shot)
            edges[spectrum, identity] = np.hypot(*np.gradient(canvas.mean(axis=2)))[20:150, 15:65].ravel() > 0.05
    for spectrum in ("infrared", "thermal"):
        agreement = np.corrcoef([edges["visible", i] for i in people], [edges[spectrum, i] for i in people])
        agreement = agreement[: len(people), len(people) :]
        assert (agreement.argmax(axis=1) == np.arange(len(people))).mean() > 0.8


@pytest.mark.slow
def test_naive_matching_stays_low(tmp_path):
    """All-search with one random image per (test id, visible camera): Rank-1 above zero and under 15 %."""
    tree = make(tmp_path / "out", ids=100, images=4, seed=0)
    chance, query, gallery = random.Random(0), [], []
    for identity in sorted(read_ids(tree, "test")):
        for camera in range(1, 7):
            paths = sorted((tree / f"cam{camera}/{identity:04d}").glob("*.jpg"))
            if paths and camera in (3, 6):
                query += [(identity, camera, path) for path in paths]
            elif paths:
                gallery.append((identity, camera, chance.choice(paths)))
    for embed in (testa.gray_pixels, testa.colour_histogram):
        batches = [next(iter(eval_loader([r[2] for r in rows], (128, 64), len(rows), 0))) for rows in (query, gallery)]
        features = [embed(images).numpy() for images in batches]
        (q_ids, q_cams), (g_ids, g_cams) = (np.array([row[:2] for row in rows]).T for rows in (query, gallery))
        likeness = features[0] @ features[1].T
        likeness[(q_cams[:, None] == 3) & (g_cams == 2)] = -np.inf
        assert 0 < (g_ids[likeness.argmax(axis=1)] == q_ids).mean() < 0.15


@pytest.mark.slow
def test_the_drawing_processes_end_quietly(tmp_path):
    command = [sys.executable, "-m", "tools.demo_data", "--out", tmp_path / "d", "--layout", "sysu", "--ids", "14"]
    result = subprocess.run([*command, "--images", "2", "--workers", "2"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
