"""Bad input of every kind: one line that names the file or flag, the value and the remedy, status 2, and nothing that
existed is changed. And odd input that is good."""

import contextlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
import data_manager
import datasets
import pre_process_sysu
import testa
import train_ext_test0
from conftest import SIZE, exit_status, flags, parse, save_network, search_flags
from core.checkpoint import VERSION
from core.images import read_image
from data_loader import sysu_train_files
from model import GFMNet
from utils import InputError

SCRIPTS = {
    "prepare": (pre_process_sysu, ["--data_path", "sysu", "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])]),
    "train": (train_ext_test0, flags("sysu", "out", "--epochs", "1")),
    "regdb": (train_ext_test0, flags("regdb", "out", "--dataset", "regdb", "--epochs", "1")),
    "llcm": (train_ext_test0, flags("llcm", "out", "--dataset", "llcm", "--epochs", "1")),
    "vcm": (train_ext_test0, flags("vcm", "out", "--dataset", "vcm", "--epochs", "1")),
    "buptcampus": (train_ext_test0, flags("buptcampus", "out", "--dataset", "buptcampus", "--epochs", "1")),
    "test": (testa, search_flags("sysu", "good.t")),
    "features": (testa, ["--data_path", "sysu", "--gpu", "cpu", "--from_features", "f.npz"]),
}


class Crafted:
    """Unpickling this makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def write(name, content=b""):
    """Put a file into the copy of the trees. (It must go first: the copies are links to the originals.)"""
    Path(name).unlink(missing_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def pipe(name):
    """Whoever opens it waits for somebody to write to it."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    Path(name).unlink()
    os.mkfifo(name)


def append(name, text):
    write(name, Path(name).read_text() + text)


def edit(name, number, line):
    """Replace a line of a list; the first is 1."""
    lines = Path(name).read_text().splitlines()
    write(name, "\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n")


def cut(name, size):
    write(name, Path(name).read_bytes()[:size])


def flip(name, position):
    content = bytearray(Path(name).read_bytes())
    content[position] ^= 1
    write(name, bytes(content))


def array(number):
    return sysu_train_files("sysu")[number]


def edit_arrays(edit, *numbers):
    for number in numbers:
        with io.BytesIO() as file:
            np.save(file, edit(np.load(array(number))))
            write(array(number), file.getvalue())


def good_checkpoint(**more):
    net = GFMNet(10, "resnet18", stages=3)
    return {"net": net.state_dict(), "options": net.options, "image_size": SIZE, "args": {"dataset": "sysu"}} | more


def jpeg():
    return sorted(Path("sysu").glob("cam1/*/*.jpg"))[0]


def png(width, height, bits, colour, content):
    """A PNG file; colour: 0 for gray, 2 for RGB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def large_image(width, height):
    with io.BytesIO() as file:
        Image.new("1", (width, height)).save(file, "TIFF", compression="group4")
        return file.getvalue()


def bomb():
    """A PNG that says it has 50,000 x 50,000 pixels."""
    return png(50_000, 50_000, 8, 2, bytes(1000))


def float_image():
    with io.BytesIO() as file:
        Image.fromarray(np.zeros((9, 5), np.float32)).save(file, "TIFF")
        return file.getvalue()


def zipped():
    with io.BytesIO() as file:
        np.savez(file, a=1)
        return file.getvalue()


def weights_with(edit):
    state = good_checkpoint()["net"]
    edit(state)
    return state


def query():
    return data_manager.process_query_sysu("sysu")[0][3]


def training_images(cameras):
    identities = data_manager.read_ids("sysu", "train") + data_manager.read_ids("sysu", "val")
    return data_manager.sysu_images("sysu", identities, cameras)[0]


def case(script, damage, *words, flags=""):
    """damage: what is done to the trees; words: of the line; flags: further ones."""
    return script, damage, words, flags.split()


def resumed(script, content, first, *words):
    """`case` of a checkpoint c.t, which `content` gives. first: what the line says after its name."""
    return case(script, lambda: torch.save(content(), "c.t"), f"c.t: {first}", *words, flags="--resume c.t")


def nothing():
    pass


def packed():
    """A checkpoint with 10 MB of zeros in some kilobytes."""
    torch.save(good_checkpoint(), "whole.t")
    with zipfile.ZipFile("whole.t") as whole, zipfile.ZipFile("c.t", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in whole.infolist():
            archive.writestr(entry.filename, whole.read(entry))
        archive.writestr("archive/more", bytes(10**7 + os.path.getsize("whole.t")))
    os.remove("whole.t")


INFO = "vcm/info"
IDX = "regdb/idx/train_visible_1.txt"
EXP = "sysu/exp/train_id.txt"
PERMUTATIONS = "sysu/exp/rand_perm_cam.mat"
CASES = {
    # images
    "truncated image": case(
        "prepare", lambda: cut(jpeg(), 300), "cam1/", "remove it, or continue without it: --skip_bad"
    ),
    "pipe as image": case("prepare", lambda: pipe(jpeg()), "cam1/", "is no regular file", "--skip_bad"),
    "text as pixels": case(
        "prepare", lambda: write(jpeg(), b"P3\n20 40\n255\n" + 9000 * b"#\n"), "numbers are written as text; convert it"
    ),
    "one list in many places": resumed(
        "test",
        lambda: good_checkpoint(args={str(i): many for many in [[1] * 101] for i in range(9)}),
        "args[...]: expected array of length <= 100",
    ),
    "pipe as output": case(
        "test", lambda: os.mkfifo("out.json"), "out.json: is no regular file", flags="--json out.json"
    ),
    "weights that unpack to more": case(
        "test", packed, "c.t: cannot be loaded safely (ValueError)", flags="--resume c.t"
    ),
    "too many pixels": case("prepare", lambda: write(jpeg(), large_image(8193, 8192)), "8193 x 8192 pixels are more"),
    "decompression bomb": case("prepare", lambda: write(jpeg(), bomb()), "cam1/", "50000 x 50000 pixels are more"),
    "image of floats": case("prepare", lambda: write(jpeg(), float_image()), "cam1/", "floating-point"),
    "bad query image": case("test", lambda: cut(query(), 200), "sysu/cam", "remove it"),
    "bad listed image": case("regdb", lambda: cut(sorted(Path("regdb").rglob("*.bmp"))[0], 50), "regdb/", "remove it"),
    "lost test image": case(
        "regdb", lambda: os.unlink(data_manager.process_test_regdb("regdb")[0][2]), "no such image"
    ),
    # lists of ids
    "no list of ids": case("prepare", lambda: os.unlink(EXP), EXP, "put the data set's list"),
    "pipe as list of ids": case("prepare", lambda: pipe(EXP), EXP, "put the data set's list"),
    "empty list of ids": case("prepare", lambda: write(EXP), EXP, "has no ids", "separated by commas"),
    "id that climbs": case("prepare", lambda: write(EXP, "1,../2"), EXP, "'../2' is not an id"),
    "id twice": case("prepare", lambda: append(EXP, f",{Path(EXP).read_text()}"), EXP, "twice", "remove"),
    "binary list": case("prepare", lambda: write(EXP, b"\xff\xfe\x00"), EXP, "UnicodeDecodeError"),
    "train id is a test id": case(
        "prepare",
        lambda: append(EXP, f",{Path('sysu/exp/test_id.txt').read_text()}"),
        "is in exp/train_id.txt and in exp/test_id.txt; remove it",
    ),
    "id without images": case("prepare", lambda: append(EXP, ",999"), "id 999", "take"),
    "empty folders": case(
        "prepare",
        lambda: [file.unlink() for camera in (3, 6) for file in Path(f"sysu/cam{camera}").rglob("*.jpg")],
        "sysu: none of the",
        "cam3, cam6",
    ),
    "no data path": case("prepare", nothing, "nowhere: no such folder", "--data_path", flags="--data_path nowhere"),
    "folder for an array": case(
        "prepare", lambda: [os.unlink(array(0)), os.mkdir(array(0))], "train_rgb_resized_img.npy: is a folder"
    ),
    # arrays
    "not prepared": case("train", lambda: os.unlink(array(2)), "train_ir", "pre_process_sysu.py"),
    "pipe as array": case("train", lambda: pipe(array(0)), "train_rgb_resized_img.npy", "pre_process_sysu.py"),
    "cut array": case("train", lambda: cut(array(0), 5000), "train_rgb_resized_img.npy", "pre_process_sysu.py"),
    "pickled array": case(
        "train",
        lambda: edit_arrays(lambda _: np.array([Crafted()], dtype=object), 1),
        "train_rgb_resized_label.npy",
        "pre_process_sysu.py",
    ),
    "images of floats": case("train", lambda: edit_arrays(lambda a: a.astype(np.float32), 0), "float32", "uint8"),
    "arrays in a zip": case("train", lambda: write(array(0), zipped()), "holds several arrays", "pre_process"),
    "images of another size": case("train", lambda: edit_arrays(lambda a: a[:, 1:], 0), "(95, 48, 3)", "--img_h 96"),
    "labels in columns": case("train", lambda: edit_arrays(lambda a: a[:, None], 1), "int64 [62, 1], not integers [N]"),
    "negative labels": case("train", lambda: edit_arrays(lambda a: a - 1, 1), "without a gap (-1)"),
    "fewer labels": case("train", lambda: edit_arrays(lambda a: a[1:], 1), "62 images, and 61 labels"),
    "labels of floats": case("train", lambda: edit_arrays(lambda a: a + 0.5, 3), "float64 [32], not integers"),
    "labels with a gap": case(
        "train", lambda: edit_arrays(lambda a: a + (a > 4), 1, 3), "without a gap (5)", "pre_process_sysu.py"
    ),
    "no images": case("train", lambda: edit_arrays(lambda a: a[:0], 0, 1), "0 images, and"),
    # idx files
    "blank idx file": case("regdb", lambda: write(IDX, "\n \n"), IDX, "lists no images"),
    "no label": case("regdb", lambda: write(IDX, "a.bmp\n"), IDX, "line 1", "'a.bmp' is not 'path label'"),
    "nul in a name": case("regdb", lambda: write(IDX, "a\0.bmp 1\n"), IDX, "line 1"),
    "name that climbs": case("regdb", lambda: write(IDX, "../a.bmp 1\n"), IDX, "../a.bmp is outside regdb"),
    "name that climbs, of Windows": case(
        "regdb", lambda: write(IDX, "..\\a.bmp 1\n"), IDX, "../a.bmp is outside regdb"
    ),
    "link that leads out": case(
        "regdb",
        lambda: [os.symlink(os.getcwd(), "regdb/out"), write("a.bmp"), write(IDX, "out/a.bmp 1")],
        IDX,
        "line 1",
        "is outside regdb",
    ),
    "image that is not there": case(
        "regdb", lambda: write(IDX, "a.bmp 1\n"), "regdb/a.bmp: no such image", "the list that names it"
    ),
    "training image is a test image": case(
        "regdb",
        lambda: append(IDX, Path("regdb/idx/test_visible_1.txt").read_text()),
        ": is listed for training and for the test; take it out of one",
    ),
    "LLCM's training image is a test image": case(
        "llcm",
        lambda: append("llcm/idx/train_nir.txt", f"{next(Path('llcm').glob('test_nir/*/*/*')).relative_to('llcm')} 1"),
        ": is listed for training and for the test; take it out of one",
    ),
    # tracks
    "vcm, no lists": case("vcm", lambda: os.remove(f"{INFO}/test_name.txt"), "test_name.txt: cannot be read", "put"),
    "vcm, a name of no frame": case(
        "vcm", lambda: edit(f"{INFO}/train_name.txt", 3, "0001_2.jpg"), "line 3: '0001_2.jpg' is not a frame's name"
    ),
    "vcm, a name that leads out": case(
        "vcm", lambda: edit(f"{INFO}/train_name.txt", 3, "0001M1D2T1F../../a.jpg"), "line 3: ", "is not a frame's name"
    ),
    "vcm, a row of four": case(
        "vcm",
        lambda: edit(f"{INFO}/track_train_info.txt", 2, "1 13 24 0006"),
        "track_train_info.txt, line 2: '1 13 24 0006' is not 'modality (1 or 2) first last person camera'",
    ),
    "vcm, a third modality": case(
        "vcm",
        lambda: edit(f"{INFO}/track_test_info.txt", 2, "3 13 24 6 1"),
        "track_test_info.txt, line 2: '3 13 24 6 1'",
    ),
    "vcm, frames that are not there": case(
        "vcm",
        lambda: edit(f"{INFO}/track_train_info.txt", 2, "1 13 9999 6 1"),
        "track_train_info.txt, line 2: frames 13 to 9999 are not among the 288 of train_name.txt; correct it",
    ),
    "vcm, frame 0": case(
        "vcm", lambda: edit(f"{INFO}/track_train_info.txt", 1, "1 0 12 6 1"), "line 1: frames 0 to 12 are not among"
    ),
    "vcm, frames backwards": case(
        "vcm", lambda: edit(f"{INFO}/track_train_info.txt", 1, "1 12 1 6 1"), "line 1: frames 12 to 1 are not among"
    ),
    "vcm, a query that is no track": case(
        "vcm",
        lambda: write(f"{INFO}/query_IDX.txt", "2 13\n"),
        "query_IDX.txt: 13 is not the number of one of 12 tracks",
    ),
    "vcm, a query without a number": case(
        "vcm", lambda: write(f"{INFO}/query_IDX.txt", "2 a\n"), "query_IDX.txt, line 1: '2 a' is not numbers of tracks"
    ),
    "vcm, short tracks only": case(
        "vcm",
        lambda: write(f"{INFO}/track_train_info.txt", "1 1 11 6 1\n"),
        "track_train_info.txt: has no visible track that can be used",
    ),
    "vcm, no frames": case("vcm", nothing, "/rgb/", "1.jpg: no such image", "the list that names it"),
    "buptcampus, a row": case(
        "buptcampus",
        lambda: edit("buptcampus/gallery.txt", 4, "1 RGB X9 1"),
        "gallery.txt, line 4: '1 RGB X9 1' is not 'person modality camera track', with RGB, IR or RGB/IR",
        "and a camera of LS3, G25, CQ1, W4, TSG1, TSG2; correct it",
    ),
    "buptcampus, a track without frames": case(
        "buptcampus",
        lambda: edit("buptcampus/train.txt", 2, "1 RGB/IR W4 2"),
        "train.txt, line 2: data_paths.json has no frames of 1 RGB W4 2; copy both again",
    ),
    "buptcampus, no JSON": case(
        "buptcampus", lambda: write("buptcampus/data_paths.json", "{"), "data_paths.json: cannot be read as JSON", "put"
    ),
    "buptcampus, other JSON": case(
        "buptcampus", lambda: write("buptcampus/data_paths.json", '{"1": {"IR": 3}}'), "data_paths.json: ", "expected"
    ),
    "buptcampus, frames outside": case(
        "buptcampus",
        lambda: write(
            "buptcampus/data_paths.json", Path("buptcampus/data_paths.json").read_text().replace("/IR", "/../..")
        ),
        "data_paths.json: DATA/",
        "is outside buptcampus; move it there",
    ),
    "buptcampus, frames of the other direction's test in training": case(
        "buptcampus",
        lambda: append("buptcampus/train.txt", re.search(r"\d+ IR .*", Path("buptcampus/query.txt").read_text())[0]),
        ": is listed for training and for the test; take it out of one",
    ),
    # flags of training
    "more identities than there are": case("train", nothing, "--batch_size 11", "only 10", flags="--batch_size 11"),
    "unknown gpu": case("train", nothing, "--gpu one", "cpu", flags="--gpu one"),
    "images on no gpu": case("train", nothing, "--cache gpu", "use --cache ram", flags="--cache gpu"),
    "file for model_path": case(
        "train", lambda: write("f"), "f/sysu_adp", "choose a folder that you may write to", flags="--model_path f"
    ),
    "file for log_path": case(
        "train", lambda: write("f"), "f/sysu_log", "choose a folder that you may write to", flags="--log_path f"
    ),
    "no weights": case("train", nothing, "none.pth: no such file", flags="--weights none.pth"),
    "weights of another network": case(
        "train",
        lambda: torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "w.pth"),
        "w.pth",
        "resnet18",
        flags="--weights w.pth",
    ),
    "resume from nothing": case("train", nothing, "none_last.t", "train first", flags="--resume none_last.t"),
    "resume without an optimiser": case("train", nothing, "good.t", "..._last.t", flags="--resume good.t"),
    "resume another run": resumed(
        "train",
        lambda: resumable(10, dataset="llcm"),
        "was saved with --dataset llcm",
        "pass the same values to resume",
    ),
    "resume a checkpoint that lacks something": resumed(
        "train",
        lambda: {"net": {}, "optimizer": {"state": {}}, "version": VERSION},
        "is not a complete ..._last.t",
        "resume from another",
    ),
    "resume on other images": resumed(
        "train", lambda: resumable(10) | {"num_images": [9, 9]}, "was trained on [9, 9] images, not [62, 32]"
    ),
    "resume on as many other images": resumed(
        "train", lambda: resumable(10) | {"num_images": [62, 32], "data_digest": 1}, "was trained on other images"
    ),
    "resume another number of classes": resumed("train", lambda: resumable(9), "has num_classes 9, not 10"),
    # checkpoints
    "cut checkpoint": case("test", lambda: cut("good.t", 9999), "good.t"),
    "one bit of the weights": case("test", lambda: flip("good.t", 200_000), "loaded safely (ValueError)", "or damaged"),
    "pipe as checkpoint": case("test", lambda: pipe("good.t"), "good.t: no such file"),
    "pipe as permutations": case(
        "test", lambda: pipe(PERMUTATIONS), "rand_perm_cam.mat: no such file", flags="--protocol official"
    ),
    "folder as checkpoint": case("test", nothing, "sysu: is a folder; pass one of its files", flags="--resume sysu"),
    "checkpoint that runs code": resumed("test", lambda: {"net": Crafted()}, "cannot be loaded safely"),
    "checkpoint of another number of classes": resumed(
        "test",
        lambda: good_checkpoint(options=GFMNet(11, "resnet18", stages=3).options),
        "does not fit its resnet18: 'classifier.weight' has the shape",
    ),
    "checkpoint without an image size": resumed(
        "test", lambda: good_checkpoint(image_size=(-1, 0)), "image_size[0]: expected int >= 1", "train again"
    ),
    "checkpoint with unknown options": resumed(
        "test",
        lambda: good_checkpoint(options={"num_classes": 10, "depth": 18}),
        "its options are not those of this GFMNet",
    ),
    "checkpoint whose options name a file": resumed(
        "test",
        lambda: good_checkpoint(options=GFMNet(10, "resnet18").options | {"weights": "good.t"}),
        "its options are not those of this GFMNet",
    ),
    "checkpoint of NaNs": resumed(
        "test",
        lambda: good_checkpoint(net=weights_with(lambda s: s["classifier.weight"].fill_(np.nan))),
        "'classifier.weight' holds values that are not finite",
    ),
    "checkpoint without a layer": resumed(
        "test",
        lambda: good_checkpoint(net=weights_with(lambda s: s.pop("local.conv.bias"))),
        "does not fit",
        "'local.conv.bias' is missing",
    ),
    "checkpoint with another layer": resumed(
        "test",
        lambda: good_checkpoint(net=weights_with(lambda s: s.update(a=s["local.conv.bias"]))),
        "does not fit its resnet18: 'a' is unknown;",
    ),
    "checkpoint within an epoch, of which it lacks the sums": resumed(
        "test",
        lambda: good_checkpoint(epoch=1, within={"generators": []}),
        "was saved within an epoch, but lacks its sums",
        "use another",
    ),
    "checkpoint of another data set": resumed(
        "test", lambda: good_checkpoint(args={"dataset": "llcm"}), "was trained on llcm", "--dataset llcm"
    ),
    # other files of testing
    "features that run code": case(
        "features", lambda: np.savez("f.npz", np.array([Crafted()], dtype=object)), "f.npz", "save it again"
    ),
    # before the checkpoint is looked for
    "folder for results": case("test", nothing, "sysu: is a folder", flags="--resume no.t --json sysu"),
    "file for a folder": case(
        "test", lambda: write("f"), "f/r.json", "choose a folder that you may write to", flags="--json f/r.json"
    ),
    "no permutations": case(
        "test",
        lambda: os.unlink(PERMUTATIONS),
        "rand_perm_cam.mat: no such file",
        "github.com/wuancong/SYSU-MM01",
        "--protocol seeded",
        flags="--protocol official",
    ),
    "damaged permutations": case(
        "test", lambda: write(PERMUTATIONS, "x"), "rand_perm_cam.mat", "download it again", flags="--protocol official"
    ),
}


def resumable(classes, **more):
    args = vars(parse(*SCRIPTS["train"][1])) | more
    net = GFMNet(classes, "resnet18", stages=3)
    state = {"optimizer": {"state": {}}, "epoch": 0, "best": {"Rank-1": -1.0}, "version": VERSION}
    return good_checkpoint(net=net.state_dict(), options=net.options, args=args, **state)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    file = tmp_path_factory.mktemp("network") / "good.t"
    torch.save(good_checkpoint(), file)
    return file


def contents():
    return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file() and file.suffix != ".lock"}


def link(tree, *left_out):
    """The tree in the working directory, linked file by file."""
    shutil.copytree(tree, tree.name, copy_function=os.link, ignore=shutil.ignore_patterns("cache", *left_out))


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_lost(case, good, request, tmp_path, monkeypatch, capsys):
    name, damage, words, more = CASES[case]
    script, arguments = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    os.link(good, "good.t")
    dataset = name if name in datasets.DATASETS else "sysu"
    lists = ["*.jpg"] if name in ("vcm", "buptcampus") else []  # there are many images, and no case comes to them
    link(request.getfixturevalue(f"{dataset}_tree"), *lists)
    damage()
    before = contents()
    assert exit_status(script, [*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"{Path(script.__file__).name}: error: ")
    for word in words:
        assert word in error
    after = contents()
    assert {file: after.get(file) for file in before} == before
    assert all("cache" in file.parts for file in set(after) - set(before))  # whole arrays of the other images
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [{1: 2}, {"conv1.weight": 1.0}, {"net": [1]}, {"net": {"a": 1.0}, "options": {}}])
def test_files_without_weights_are_refused(sysu_tree, tmp_path, content):
    file = tmp_path / "odd.t"
    torch.save(content, file)
    with pytest.raises(InputError, match=r"odd\.t"):
        testa.main(search_flags(sysu_tree, file))
    with pytest.raises(InputError, match=r"odd\.t"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--weights", str(file)))


@pytest.mark.parametrize("flag", ["--features", "--json"])
def test_an_output_does_not_replace_a_checkpoint_found_in_model_path(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("m")
    write("m/x.t", b"precious")
    with pytest.raises(InputError, match="./m/x.t: is what is tested; choose another file"):
        testa.main(["--resume", "x.t", "--model_path", "m", "--gpu", "cpu", flag, "./m/x.t"])
    assert Path("m/x.t").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (testa, [], ["--resume", "--from_features"]),
        (testa, ["--from_features", "none.npz"], ["none.npz", "--features"]),
        (testa, ["--from_features", "x.npz", "--baselines"], ["--baselines", "--resume"]),
        (testa, ["--resume", "x.t", "--tvsearch"], ["--tvsearch", "SYSU-MM01"]),
        (testa, ["--resume", "x.t", "--dataset", "llcm", "--shots", "10"], ["--shots", "llcm"]),
        (testa, ["--resume", "x_{trial}.t", "--dataset", "regdb", "--features", "f"], ["--features f", "{trial}"]),
        (testa, ["--resume", ""], ["--resume: has an empty value; give one, or leave it out"]),
        (testa, ["--resume", "x.t", "--json="], ["--json=: has an empty value"]),
        (testa, ["--resume", "x.t", "--all", "--protocol", "official"], ["--all", "--protocol"]),
        (testa, ["--resume", "x.t", "--dataset", "regdb", "--mode", "indoor"], ["--mode", "regdb"]),
        (testa, ["--resume", "x.t", "--features", "f_{trial}.npz"], ["{trial}", "sysu"]),
        (testa, ["--resume", "x.t", "--features", "./x.t"], ["x.t, ./x.t", "twice"]),
        (
            testa,
            ["--resume", "x.t", "--dataset", "regdb", "--cross_data", "--features", "f_{trial}"],
            ["with --cross_data, one file has all trials; drop {trial}"],
        ),
        (testa, ["--resume", "x.t", "--features", "o", "--json", "o"], ["x.t, o, o", "twice"]),
        (testa, ["--resume", "x.t", "--trial", "2"], ["--trial", "RegDB"]),
        (testa, ["--resume", "x.t", "--tvsearch", "True"], ["arguments: True (a flag without a value"]),
        (train_ext_test0, ["--dataset", "llcm", "--mode", "indoor"], ["--mode indoor", "SYSU-MM01"]),
        (train_ext_test0, ["--trial", "2"], ["--trial 2", "RegDB"]),
        (train_ext_test0, ["--data_path", "nowhere"], ["nowhere: no such folder", "--data_path"]),
        (train_ext_test0, ["--dataset", "regdb", "--data_path", "nowhere"], ["nowhere: no such folder"]),
        (train_ext_test0, ["--log_path", "a\udcff"], ["error: a?: is no text in UTF-8", "rename"]),
        (train_ext_test0, ["--lr", "nan"], ["--lr", "nan"]),
    ],
)
def test_bad_flags_are_one_line_and_status_2(script, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(script, [*arguments, "--gpu", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_a_search_without_a_match_is_refused_before_the_training(sysu_tree, tmp_path):
    """Camera 3's queries do not see camera 2: with no other cameras there is nothing to find."""
    tree = shutil.copytree(sysu_tree, tmp_path / "tree")
    for camera in (1, 4, 5, 6):
        shutil.rmtree(tree / f"cam{camera}")
    words = "no query has a match in the gallery that it sees .*not seen: camera 2 by queries of camera 3"
    with pytest.raises(InputError, match=words):
        train_ext_test0.main(flags(tree, tmp_path, "--epochs", "1"))
    assert not list((tmp_path / "models").glob("*.t"))
    checkpoint = save_network(tmp_path / "net.t", 0, "sysu")
    with pytest.raises(InputError, match=words):
        testa.main(search_flags(tree, checkpoint))


@pytest.mark.slow
def test_an_error_ends_the_loading_processes(good, sysu_tree, tmp_path, monkeypatch):
    """The processes that load images ignore SIGTERM; an error in one of them must not leave the script waiting."""
    monkeypatch.chdir(tmp_path)
    os.link(good, "good.t")
    link(sysu_tree)
    cut(query(), 200)
    command = [sys.executable, Path(testa.__file__), *SCRIPTS["test"][1], "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "remove it" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "a/1.jpg 1\nb c/2.jpg 2\n",
        "a/1.jpg 1\r\nb c/2.jpg 2\r\n",
        "\ufeffa/1.jpg 1\nb c/2.jpg 2",
        "\n\na/1.jpg\t1\n\n  b c/2.jpg  \t 2  \n \n",
        "a\\1.jpg 1\r\nb c\\2.jpg 2\r\n",  # of Windows
    ],
)
def test_lists_of_other_editors(text, tmp_path):
    (tmp_path / "idx").mkdir()
    write(tmp_path / "idx" / "l.txt", text)
    paths, ids = data_manager.read_list(tmp_path, "l")
    assert paths == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b c/2.jpg"]
    assert ids.tolist() == [1, 2]


@pytest.mark.parametrize("text", ["1,2,30", "1, 2,\t30\r\n", "\ufeff0001,2,\n30,", "1,2\n30\n"])
def test_ids_of_other_editors(text, tmp_path):
    (tmp_path / "exp").mkdir()
    write(tmp_path / "exp" / "train_id.txt", text)
    assert data_manager.read_ids(tmp_path, "train") == [1, 2, 30]
    write(tmp_path / "exp" / "train_id.txt", f"{text},2")
    with pytest.raises(InputError, match=r"train_id\.txt: lists id 2 twice"):
        data_manager.read_ids(tmp_path, "train")


RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 7, 3), np.uint8)
GRAYS = RNG.integers(0, 256, (12, 7), np.uint8)
DEEP = RNG.integers(0, 2**16, (12, 7), np.uint16)


def palette():
    image = Image.fromarray(GRAYS, "P")
    image.putpalette(COLOURS.ravel().tolist() + 516 * [0])
    table = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    return image, table[GRAYS]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(COLOURS), "PNG", COLOURS),
        (Image.fromarray(GRAYS), "PNG", GRAYS[..., None].repeat(3, axis=2)),
        (Image.fromarray(GRAYS > 99), "PNG", 255 * (GRAYS > 99)[..., None].repeat(3, axis=2).astype(np.uint8)),
        (Image.fromarray(np.dstack([COLOURS, GRAYS])), "PNG", COLOURS),
        (Image.fromarray(np.dstack([GRAYS, GRAYS])), "PNG", GRAYS[..., None].repeat(3, axis=2)),
        (*palette()[:1], "PNG", palette()[1]),
        (Image.fromarray(DEEP), "PNG", (DEEP // 256).astype(np.uint8)[..., None].repeat(3, axis=2)),
        (Image.fromarray(DEEP), "TIFF", (DEEP // 256).astype(np.uint8)[..., None].repeat(3, axis=2)),
        (Image.fromarray(DEEP.astype(np.int32)), "TIFF", (DEEP // 256).astype(np.uint8)[..., None].repeat(3, axis=2)),
        (Image.fromarray(np.dstack([255 - COLOURS, 0 * GRAYS]), "CMYK"), "TIFF", COLOURS),
    ],
    ids=["RGB", "gray", "1 bit", "RGBA", "gray and alpha", "palette", "16 bits", "16-bit TIFF", "32-bit TIFF", "CMYK"],
)
def test_every_kind_of_image(image, kind, expected, tmp_path):
    file = tmp_path / "image.jpg"  # whatever the name says
    image.save(file, kind)
    assert np.array_equal(read_image(file, (12, 7)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("kind", ["L", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_a_tiff_is_turned_as_its_orientation_says(kind, compression, orientation, tmp_path):
    images = {"L": GRAYS, "I;16": DEEP, "RGB": COLOURS, "RGBA": np.dstack([COLOURS, GRAYS])}
    images["CMYK"] = np.dstack([COLOURS, 0 * GRAYS])
    image = palette()[0] if kind == "P" else Image.fromarray(images[kind], "CMYK" if kind == "CMYK" else None)
    image.save(tmp_path / "a.tif", tiffinfo={274: orientation}, compression=compression)
    image.save(tmp_path / "plain.tif")
    size = image.size[::-1]
    plain = read_image(tmp_path / "plain.tif", size)
    # The place of the first row and column, by the standard: of the eight, half exchange rows and columns.
    turned = plain.swapaxes(0, 1) if orientation > 4 else plain
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    assert np.array_equal(read_image(tmp_path / "a.tif", turned.shape[:2]), turned)


def test_16_bits_of_which_white_is_0_are_refused(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with pytest.raises(InputError, match=r"a\.tif: .*white is 0 in its 16 bits; convert it to PNG"):
        read_image(tmp_path / "a.tif", (12, 7))


def test_signed_values_of_8_bits_are_refused(tmp_path):
    Image.fromarray(GRAYS).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(InputError, match=r"a\.tif: .*signed values; convert it to PNG"):
        read_image(tmp_path / "a.tif", (12, 7))


@pytest.mark.parametrize(("most", "words"), [(65535, r"a\.png: .*16-bit colours of a PPM"), (1023, None)])
def test_colours_of_16_bits_in_a_ppm_are_refused(most, words, tmp_path):
    values = np.full((4, 2, 3), most // 2, ">u2")
    write(tmp_path / "a.png", b"P6 2 4 %d\n" % most + values.tobytes())
    with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
        assert np.array_equal(read_image(tmp_path / "a.png", (4, 2)), np.full((4, 2, 3), 127, np.uint8))


def deep_files(values):
    """Files of 16 bits, of uint16 [H, W]: {kind: bytes}."""
    files = {}
    for kind, image, name in (
        ("I;16 PNG", Image.fromarray(values), "PNG"),
        ("I;16 TIFF", Image.fromarray(values), "TIFF"),
        ("I TIFF", Image.fromarray(values.astype(np.int32)), "TIFF"),
    ):
        with io.BytesIO() as file:
            image.save(file, name)
            files[kind] = file.getvalue()
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in values)
    return files | {"RGB PNG": png(*values.shape[::-1], 16, 2, rows)}


@pytest.mark.parametrize(("low", "high"), [(2000, 3000), (20_000, 30_000), (0, 2**14 - 1), (40_000, 40_000)])
def test_16_bit_images_that_use_a_small_part_of_their_range_are_refused(low, high, tmp_path):
    """A sensor of 14 bits, or a thermal camera, would be left with few gray levels. A dead pixel does not count."""
    values = RNG.integers(low, high, (32, 16), np.uint16, endpoint=True)
    values[0, :2] = 0, 2**16 - 1
    for content in deep_files(values).values():
        write(tmp_path / "a.png", content)
        with pytest.raises(InputError, match=r"a\.png: .*16 bits .* from \d+ to \d+ .*8 bits") as error:
            read_image(tmp_path / "a.png", (32, 16))
        found = [int(number) for number in re.search(r"from (\d+) to (\d+)", str(error.value)).groups()]
        assert low - 256 < found[0] <= found[1] <= high + 256
    for content in deep_files(RNG.integers(20_000, 38_000, (32, 16), np.uint16)).values():  # 70 of 256 gray levels
        write(tmp_path / "a.png", content)
        assert 60 < np.ptp(read_image(tmp_path / "a.png", (32, 16))) < 80
    values = np.full((100, 10), 2**15, np.uint16)
    for number, words in ((15, None), (9, "16 bits")):  # black pixels: 1 % of them do not count
        values.flat[:20] = 2**15 * (np.arange(20) >= number)
        write(tmp_path / "a.png", deep_files(values)["I;16 PNG"])
        with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
            read_image(tmp_path / "a.png", (100, 10))
    for content in deep_files(RNG.integers(0, 2**16, (32, 16), np.uint16)).values():
        write(tmp_path / "a.png", content)
        assert np.ptp(read_image(tmp_path / "a.png", (32, 16))) > 240


def test_bad_images_are_left_out_if_asked(sysu_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    link(sysu_tree)
    expected = [np.load(file) for file in sysu_train_files("sysu")]
    visible, infrared = training_images((1, 2, 4, 5)), training_images((3, 6))
    for file in (visible[3], infrared[5]):
        write(file, "x")
    script, arguments = SCRIPTS["prepare"]
    assert exit_status(script, arguments) == 2
    printed = capsys.readouterr()
    assert [line.split(": ")[:2] for line in printed.out.splitlines()] == [
        ["unreadable", visible[3]],
        ["unreadable", infrared[5]],
    ]
    assert "2 of 94 images cannot be read" in printed.err
    assert exit_status(script, [*arguments, "--skip_bad"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {visible[3]}: cannot be read" in out
    assert f"left out: {infrared[5]}: cannot be read" in out
    for number, row in enumerate((3, 3, 5, 5)):
        assert np.array_equal(np.load(array(number)), np.delete(expected[number], row, axis=0))
    assert len(data_loader.sysu_train("sysu", SIZE).visible) == len(expected[0]) - 1


@pytest.mark.slow
def test_one_image_of_an_identity_and_modality_is_enough(sysu_tree, tmp_path):
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, "--num_pos", "1", "--epochs", "1"))
    assert torch.load(result["last"])["epoch"] == 0
