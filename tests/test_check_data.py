"""`tools.check_data`: data sets as drawn pass, and each kind of damage is said in its line."""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import model
import pre_process_sysu
import testa
import train_ext_test0
from conftest import SIZE, exit_status, parse
from data_manager import DEMO_FILE, list_folders, read_splits
from datasets import DATASETS, TRAINING_SETS, difference, training_counts
from tools import bench, check_data, pretrain
from utils import InputError

OFF = ["--gpu", "cpu", "--workers", "0"]


def check(tree, dataset="sysu", *more):
    """{check: (state, text)}, and what the InputError says, if there is one."""
    file = tree.parent / "lines.json"
    problem = ""
    try:
        check_data.main(["--dataset", dataset, "--data_path", str(tree), "--json", str(file), *OFF, *more])
    except InputError as error:
        problem = str(error)
    return {line["check"]: (line["state"], line["text"]) for line in json.loads(file.read_text())}, problem


@pytest.fixture
def own_tree(sysu_tree, tmp_path):
    return shutil.copytree(sysu_tree, tmp_path / "own")


def images_of(tree, split, modality):
    """Sorted images of one of the splits."""
    cameras = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}[modality]
    return [image for *_, files in list_folders(tree, read_splits(tree)[split], cameras).values() for image in files]


@pytest.mark.parametrize("dataset", DATASETS)
def test_drawn_data_passes(dataset, request, tmp_path):
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "own")
    lines, problem = check(tree, dataset)
    assert not problem
    assert {state for state, _ in lines.values()} == {"ok", "note"}
    assert lines["counts"][0] == "note"
    spec = DATASETS[dataset]
    trials = [{"trial": trial} for trial in spec.options.get("trial", ())] or [{}]
    images = {path for own in trials for paths, _ in spec.training(tree, **own).values() for path in paths}
    images |= {path for paths in spec.searches(tree, spec.directions, spec.trials).paths.values() for path in paths}
    assert lines["images"] == ("ok", f"{len(images):,}, all can be read")
    (tree / DEMO_FILE).unlink()
    lines, problem = check(tree, dataset)
    assert lines["counts"][0] == "WRONG"
    assert "as published; see docs/data.md" in lines["counts"][1]
    assert problem.startswith(f"{tree}: counts")


@pytest.mark.parametrize(
    "name", ["training ids", "queries infrared to visible", "gallery images in all-search, 1-shot"]
)
def test_the_first_difference_from_the_published_numbers(name):
    published = DATASETS["sysu"].published
    assert difference("sysu", published) is None
    count = f"{published[name]:,}"
    assert difference("sysu", published | {name: 7}) == f"7 {name}, not {count} as published"
    assert difference("sysu", {"something else": 3}) is None


def test_cameras_are_counted_below_any_folder(sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(check_data, "difference", lambda *_: None)
    tree = tmp_path / "webcam2" / "sysu"
    shutil.copytree(sysu_tree, tree)
    line = check(tree)[0]["counts"][1]
    assert all(f"cam{number} " in line for number in range(1, 7))


def test_counts_are_those_of_the_folders(sysu_tree):
    test = DATASETS["sysu"].searches(sysu_tree, shots=(1, 10))
    queries = len(images_of(sysu_tree, "test", "infrared"))
    folders = list_folders(sysu_tree, read_splits(sysu_tree)["test"], (1, 2, 4, 5)).values()
    assert test.counts() == {
        "queries infrared to visible": queries,
        "gallery images in all-search, 1-shot": sum(bool(files) for *_, files in folders),
        "gallery images in all-search, 10-shot": sum(min(10, len(files)) for *_, files in folders),
    }
    training = DATASETS["sysu"].training(sysu_tree)
    for modality, (paths, ids) in training.items():
        expected = images_of(sysu_tree, "train", modality) + images_of(sysu_tree, "val", modality)
        assert sorted(map(str, paths)) == sorted(map(str, expected))
        assert [int(path.split("/")[-2]) for path in map(str, paths)] == ids.tolist()
    assert training_counts(3, 4, 5)["training images"] == 9


def cut(tree):
    image = images_of(tree, "test", "infrared")[-1]
    with open(image, "r+b") as file:
        file.truncate(100)
    return "images", [str(image), "1 cannot be read"]


def one_image_of_two_people(tree):
    one, *_, other = images_of(tree, "train", "visible")
    shutil.copyfile(one, other)
    return "images", ["1 files of two people are the same", str(one), str(other)]


def a_missing_image(tree):
    os.remove(images_of(tree, "train", "infrared")[0])
    return "folders", ["images, exp/rand_perm_cam.mat counts", "copy it again"]


def a_missing_test_image(tree):
    os.remove(images_of(tree, "test", "visible")[0])
    return "folders", ["images, exp/rand_perm_cam.mat counts", "copy it again"]


def later_images(tree):
    image = images_of(tree, "train", "visible")[3]
    os.utime(image, (2**32, 2**32))
    return "prepared arrays", [f"is older than {image}", "run: python pre_process_sysu.py"]


def other_people(tree):
    """A val id becomes a test id, and the reverse."""
    ids = [(tree / "exp" / f"{split}_id.txt") for split in ("val", "test")]
    val, test = (file.read_text().strip().split(",") for file in ids)
    for file, people in zip(ids, ([test[0], *val[1:]], [val[0], *test[1:]]), strict=True):
        file.write_text(",".join(people))


def an_array_less(tree):
    (tree / "train_ir_resized_label.npy").unlink()
    return "prepared arrays", ["train_ir_resized_label.npy: is missing, but others are there"]


def an_image_more(tree):
    """Older than the arrays, and without a file that counts the images of its folder."""
    (tree / "exp" / "rand_perm_cam.mat").unlink()
    image = images_of(tree, "train", "visible")[0]
    shutil.copy2(image, os.path.join(os.path.dirname(image), "9999.jpg"))
    return "prepared arrays", ["images are prepared, but", "run: python pre_process_sysu.py"]


def a_link_to_nothing(tree):
    image = images_of(tree, "train", "infrared")[0]
    os.remove(image)
    os.symlink("nothing.jpg", image)
    return "images", ["1 cannot be read", str(image)]


DAMAGE = [
    cut,
    one_image_of_two_people,
    a_missing_image,
    a_missing_test_image,
    later_images,
    an_array_less,
    an_image_more,
    a_link_to_nothing,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_wrong_line(damage, own_tree):
    name, words = damage(own_tree)
    lines, problem = check(own_tree)
    assert lines[name][0] == "WRONG"
    assert all(word in lines[name][1] for word in words), lines[name]
    assert name in problem


def test_people_of_the_test_in_prepared_arrays(own_tree):
    other_people(own_tree)
    with pytest.raises(InputError, match="is a test id now, but was prepared for training; run: python pre_process"):
        check_data.main(["--data_path", str(own_tree), *OFF])


def test_the_same_image_in_training_and_test(llcm_tree, tmp_path):
    tree = shutil.copytree(llcm_tree, tmp_path / "own")
    training = DATASETS["llcm"].training(tree)["train_vis"][0]
    target = next(iter(tree.glob("test_vis/cam*/*")))
    person = target.with_name(os.path.basename(os.path.dirname(training[0])))
    assert not person.exists()
    for folder in tree.glob(f"test_*/cam*/{target.name}"):
        folder.rename(folder.with_name(person.name))  # a number of training
    ids = (tree / "idx" / "test_id.txt").read_text().strip().split(",")
    ids = [str(int(person.name)) if int(one) == int(target.name) else one for one in ids]
    (tree / "idx" / "test_id.txt").write_text(",".join(ids))
    assert not check(tree, "llcm")[1]
    shutil.copyfile(training[0], next(iter(person.iterdir())))
    lines, _ = check(tree, "llcm")
    assert "1 files of training and test are the same" in lines["images"][1]


def test_published_ids_are_known(own_tree, monkeypatch):
    (own_tree / DEMO_FILE).unlink()
    assert check(own_tree)[0]["ids"][0] == "WRONG"
    splits = {split: sorted(ids) for split, ids in read_splits(own_tree).items()}
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    monkeypatch.setattr(check_data, "SYSU_IDS", digest)
    state, text = check(own_tree)[0]["ids"]
    assert (state, "is not the published file" in text) == ("WRONG", True)
    (own_tree / "exp" / "rand_perm_cam.mat").unlink()
    lines, _ = check(own_tree)
    assert lines["ids"][0] == lines["folders"][0] == "note"


def test_weights_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert check_data.check_weights("resnet18").startswith("note: --weights imagenet, the default, downloads https://")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"junk")
    with pytest.raises(InputError, match="resnet18-f37072fd.pth: is damaged; delete it"):
        check_data.check_weights("resnet18")
    monkeypatch.setattr(model, "file_sha256", lambda file: "f37072fd" + 56 * "0")
    assert check_data.check_weights("resnet18") == "of resnet18, are here"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is no folder; choose another --model_path"):
        check_data.check_disk(tmp_path / "file" / "models")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: is no folder"):
        check_data.check_disk(tmp_path / "loop" / "models")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda folder, mode: (folder, mode) != (tmp_path, os.W_OK | os.X_OK))
        with pytest.raises(InputError, match=f"{tmp_path}: may not be written; correct its permissions, or choose ano"):
            check_data.check_disk(tmp_path / "models")
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="not/there: 0.0 GiB are free"):
        check_data.check_disk(tmp_path / "not" / "there")


def test_what_a_test_says_of_its_lists_is_a_note(own_tree):
    (own_tree / "exp" / "rand_perm_cam.mat").unlink()
    for folder in (own_tree / "cam5").iterdir():
        shutil.rmtree(folder)
    state, text = check(own_tree)[0]["lists"]
    assert state == "note"
    assert "so without the official protocol" in text
    assert text.endswith(f"; {own_tree}: no test id has an image of camera 5")


def test_lists_that_cannot_be_read_end_it_in_one_line(own_tree, capsys):
    (own_tree / "exp" / "val_id.txt").write_text("1,x")
    status = exit_status(check_data, ["--data_path", str(own_tree), *OFF])
    assert status == 2
    assert "val_id.txt: 'x' is not an id" in capsys.readouterr().err


def test_training_says_what_differs(own_tree, monkeypatch):
    args = parse("--data_path", str(own_tree), "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1]))
    data, test = train_ext_test0.load_data(args)
    say = lambda **flags: train_ext_test0.describe(  # noqa: E731
        argparse.Namespace(**vars(args) | flags), data, test, 9, torch.device("cpu")
    ).split("\n")[1]
    assert say() == f"data: demo data, {data.num_classes} training ids, not 395 as published"
    (own_tree / DEMO_FILE).unlink()
    assert say(select="val") == "data: without the validation ids"
    counts = training_counts(data.num_classes, *data.num_images) | test.counts()
    monkeypatch.setattr(train_ext_test0, "difference", lambda dataset, found: found != counts or None)
    assert say() == "data: complete as published"


def test_without_published_numbers_nothing_is_compared(own_tree, monkeypatch):
    (own_tree / DEMO_FILE).unlink()
    for table in (DATASETS, TRAINING_SETS):
        monkeypatch.setitem(table, "sysu", dataclasses.replace(DATASETS["sysu"], published={}))
    assert check(own_tree)[0]["counts"] == ("note", "nothing is published to compare with")


def test_one_person_has_one_name_with_any_number_of_zeros(own_tree):
    image = images_of(own_tree, "train", "visible")[0]
    folder = os.path.dirname(image)
    camera, name = os.path.split(folder)
    other = next(one for one in images_of(own_tree, "train", "visible") if f"/{name}/" in one and folder not in one)
    shutil.copyfile(image, other)
    os.rename(folder, os.path.join(camera, name.lstrip("0")))
    state, text = check(own_tree)[0]["images"]
    assert (state, "1 are there twice, of one person" in text) == ("ok", True)


@pytest.mark.parametrize(("dataset", "name"), [("regdb", "train_visible_1"), ("llcm", "train_vis")])
def test_lists_with_an_image_twice(dataset, name, request, tmp_path):
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "own")
    file = tree / "idx" / f"{name}.txt"
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[0].rsplit(" ", 1)[0] + " 3\n")
    assert "is listed 2 times for training; list it once" in check(tree, dataset)[0]["lists"][1]
    test = DATASETS[dataset].searches(tree).paths["visible"][0]
    file.write_text(f"{whole}{os.path.relpath(test, tree)} 3\n")
    assert "is listed for training and for the test" in check(tree, dataset)[0]["lists"][1]


@pytest.mark.parametrize(
    ("dataset", "name", "place"),
    [
        ("regdb", "train_thermal_3", "training, trial 3"),
        ("regdb", "test_visible_1", "test, trial 1"),
        ("llcm", "train_nir", "training"),
    ],
)
def test_lists_that_pair_strangers(dataset, name, place, request, tmp_path):
    """Of two people, one modality of each has the label of the other."""
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "own")
    assert check(tree, dataset)[0]["people"] == ("ok", "the lists pair folders of one name")
    file = tree / "idx" / f"{name}.txt"
    lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
    first, second = sorted({int(label) for _, label in lines})[:2]
    swapped = {str(first): second, str(second): first}
    file.write_text("".join(f"{image} {swapped.get(label, label)}\n" for image, label in lines))
    state, text = check(tree, dataset)[0]["people"]
    assert state == "WRONG"
    assert f" ({place}), unlike others of this id or folder" in text
    assert re.search(rf" id ({first}|{second}) ", text)


def test_tracks_of_other_people(vcm_tree, buptcampus_tree, tmp_path):
    """VCM: the lines of one track name another person. BUPTCampus: a track has the frames of another person."""
    vcm, bupt = (shutil.copytree(tree, tmp_path / tree.name) for tree in (vcm_tree, buptcampus_tree))
    for tree in (vcm, bupt):
        assert check(tree, tree.name)[0]["people"] == ("ok", "the lists pair folders of one name")
    file = vcm / "info" / "track_test_info.txt"
    rows = [line.split() for line in file.read_text().splitlines()]
    other = next(person for *_, person, _ in rows if person != rows[0][3])
    rows[0][3] = other
    file.write_text("".join(f"{' '.join(row)}\n" for row in rows))
    file = bupt / "data_paths.json"
    frames = json.loads(file.read_text())
    person, modality, camera, track = next(
        words for words in map(str.split, (bupt / "query.txt").read_text().splitlines()) if "/" not in words[1]
    )
    other = next(one for one in frames if one != person and modality in frames[one])
    ((taken, *_), *_) = (list(tracks.values()) for tracks in frames[other][modality].values())
    frames[person][modality][camera][track] = taken
    file.write_text(json.dumps(frames))
    for tree in (vcm, bupt):
        state, text = check(tree, tree.name)[0]["people"]
        assert state == "WRONG"
        assert " (test), unlike others of this id or folder; copy the lists" in text


def test_frames_in_no_folder_of_a_person(buptcampus_tree, tmp_path, monkeypatch):
    """Their paths are short, as seen from the data set's own folder."""
    monkeypatch.chdir(shutil.copytree(buptcampus_tree, tmp_path / "own"))
    file = Path("data_paths.json")
    file.write_text(re.sub(r'"[^"]*/', '"', file.read_text()))
    assert check(Path(), "buptcampus")[0]["people"][0] == "WRONG"


def test_test_tracks_that_are_listed_twice(buptcampus_tree, tmp_path):
    tree = shutil.copytree(buptcampus_tree, tmp_path / "own")
    file = tree / "gallery.txt"
    file.write_text(2 * (file.read_text().rstrip() + "\n"))
    state, text = check(tree, "buptcampus")[0]["lists"]
    assert (state, "is listed 2 times for one test; list it once" in text) == ("WRONG", True)


@pytest.mark.parametrize(
    ("copy", "words"),
    [("train_{}_1", "is listed 2 times for training"), ("test_{}_1", "is listed for the test in both modalities")],
)
def test_a_list_of_one_modality_in_the_place_of_the_other(copy, words, regdb_tree, tmp_path):
    tree = shutil.copytree(regdb_tree, tmp_path / "own")
    shutil.copy(tree / "idx" / f"{copy.format('visible')}.txt", tree / "idx" / f"{copy.format('thermal')}.txt")
    state, text = check(tree, "regdb")[0]["lists"]
    assert (state, words in text) == ("WRONG", True)


@pytest.mark.parametrize("kinds", [("visible", "thermal"), ("thermal", "visible")])
def test_an_image_under_two_ids(kinds, regdb_tree, tmp_path):
    """An image of one modality stands in the list of the other, too, as another person's."""
    tree = shutil.copytree(regdb_tree, tmp_path / "own")
    file, its = (tree / "idx" / f"test_{kind}_1.txt" for kind in kinds)
    image, label = its.read_text().splitlines()[0].rsplit(" ", 1)
    lines = file.read_text().splitlines()
    other = next(line.rsplit(" ", 1)[1] for line in lines if line.rsplit(" ", 1)[1] != label)
    file.write_text("\n".join([*lines, f"{image} {other}"]))
    found = check(tree, "regdb")[0]
    assert [found[name][0] for name in ("lists", "people")] == ["WRONG", "WRONG"]


@pytest.mark.parametrize("case", ["two people of one id", "one person of two ids"])
def test_lists_that_number_people_otherwise_than_folders(case, regdb_tree, tmp_path):
    """Both modalities alike, so that the lists pair nobody with a stranger."""
    tree = shutil.copytree(regdb_tree, tmp_path / "own")
    for kind in ("visible", "thermal"):
        file = tree / "idx" / f"test_{kind}_1.txt"
        lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        first, second = sorted({label for _, label in lines})[:2]
        if case == "two people of one id":
            lines = [(image, first if label == second else label) for image, label in lines]
        else:
            (image, _), *others = (line for line in lines if line[1] == first)
            lines = [(image, "999"), *others, *(line for line in lines if line[1] != first)]
        file.write_text("".join(f"{image} {label}\n" for image, label in lines))
    assert check(tree, "regdb")[0]["people"][0] == "WRONG"


def test_names_of_images_write_nothing_on_the_terminal(own_tree, capsys):
    image = Path(images_of(own_tree, "train", "visible")[0])
    image.with_name("\x1b[2J.jpg").write_bytes(b"damaged")
    check(own_tree)
    pre_process_sysu.main(["--data_path", str(own_tree), "--img_h", "48", "--img_w", "16", "--skip_bad"])
    out = capsys.readouterr().out
    assert out.count(f"{image.parent}/?[2J.jpg: cannot be read") == 2
    assert {c for c in out if not c.isprintable()} == {"\n"}


# Programs, what they need besides, and the flag of a file that they write. The first two take any data set.
OUTPUTS = (check_data.main, [], "--json"), (testa.main, ["--resume", "x.t"], "--json")
OUTPUTS += (bench.main, ["data"], "--json"), (pretrain.main, [], "--out")


def test_no_output_replaces_an_image(sysu_tree, tmp_path):
    image = shutil.copy(next(sysu_tree.rglob("*.jpg")), tmp_path / "a.JPG")
    before = image.read_bytes()
    flags = ["--data_path", str(sysu_tree), "--gpu", "cpu"]
    for main, more, output in OUTPUTS:
        with pytest.raises(InputError, match=r"a\.JPG: is an image; choose another file"):
            main([*more, *flags, output, str(image)])
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("sysu", "exp/test_id.txt"),
        ("sysu", "exp/rand_perm_cam.mat"),
        ("sysu", "train_ids.npy"),
        ("sysu", DEMO_FILE),
        ("regdb", "idx/test_visible_1.txt"),
        ("regdb", "cache/train.npy"),
        ("buptcampus", "query.txt"),
        ("buptcampus", "data_paths.json"),
    ],
)
def test_no_output_replaces_a_file_of_the_data_set(dataset, name, request, tmp_path):
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "own")
    (tmp_path / "link").symlink_to(tree)
    (tree / "cache").mkdir(exist_ok=True)
    (tree / "cache" / "train.npy").touch()
    before = (tree / name).read_bytes()
    for main, more, output in OUTPUTS if dataset == "sysu" else OUTPUTS[:2]:
        own = ["--dataset", dataset] if main in (check_data.main, testa.main) else []
        flags = [*more, *own, "--data_path", str(tree), "--gpu", "cpu"]
        with pytest.raises(InputError, match=f"{name}: is a file of the data set; choose another"):
            main([*flags, output, str(tmp_path / "link" / name)])
    assert (tree / name).read_bytes() == before
