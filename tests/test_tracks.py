"""HITSZ-VCM and BUPTCampus: their lists by hand, and tracks from the flags to the table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import testa
import train_ext_test0
from conftest import exit_status, flags, search_flags
from core.images import read_image
from data_manager import evenly
from datasets import DATASETS, difference, fingerprint
from test_datasets import HIDDEN
from tests.oracles import plain_embedding, plain_match_ranks
from utils import InputError

TREES = ("vcm", "buptcampus")


@pytest.fixture
def tree(request, dataset):
    return request.getfixturevalue(f"{dataset}_tree")


def write(folder, **lists):
    """Files of lines: {name, with "/" as "__": lines}."""
    for name, lines in lists.items():
        file = Path(folder, *name.split("__")).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")


RAGGED = ["2 tracks have frames of several people, modalities or cameras", "24 frames are in several tracks"]


def vcm(folder):
    """Names of 60 frames of two people, in tracks that overlap in cameras; the second and the last are short."""
    names = [f"0007M{m}D{c}T{t}F{n}.jpg" for m, c, t in ((1, 2, 1), (2, 2, 1), (2, 10, 2)) for n in range(1, 14)]
    names += [f"0012M{m}D2T1F{n}.jpg" for m in (1, 2) for n in range(1, 12)]
    rows = ["1 1 13 0007 2", "2 14 24 0007 2", "2 27 39 0007 10", "1 38 50 0012 2", "2 40 61 0012 2", "1 51 61 0012 2"]
    for split in ("train", "test"):
        write(folder, **{f"info__{split}_name": names, f"info__track_{split}_info": rows})
    write(folder, info__query_IDX=["1 4", "6"])
    return folder


def bupt(folder):
    frames = {
        "3": {
            "IR": {"G25": {"1": [f"3/IR/G25/{n}.jpg" for n in range(13)]}},
            "RGB": {"G25": {"1": [f"3/RGB/G25/{n}.jpg" for n in range(13)], "2": ["3/RGB/G25/b.jpg"]}},
            "FakeIR": {"G25": {"1": ["3/FakeIR/G25/0.jpg"]}},
        },
        "21": {"IR": {"TSG2": {"7": ["21/a.jpg", "21/b.jpg", "21/c.jpg"]}}, "RGB": {"LS3": {"1": ["21/d.jpg"]}}},
    }
    Path(folder, "data_paths.json").write_text(json.dumps(frames))
    write(folder, train=["3 RGB/IR G25 1", "21 RGB LS3 1"], query=["3 RGB G25 1", "21 IR TSG2 7"])
    write(folder, gallery=["21 RGB LS3 1", "3 RGB G25 2", "3 IR G25 1", "21 IR TSG2 7"])
    return folder


def shown(test, images, folder):
    """[(frames relative to the folder, id, camera)] of `datasets.Images`."""
    paths = [[str(Path(test.paths[images.modality][row]).relative_to(folder)) for row in rows] for rows in images.rows]
    return list(zip(paths, images.ids.tolist(), images.cameras.tolist(), strict=True))


@pytest.mark.parametrize("length", range(1, 40))
def test_evenly_spaced_frames(length):
    """The first of six, or twelve, spans of equal length."""
    for number in (6, 12):
        expected = [next(f for f in range(length - 1, -1, -1) if f * number <= i * length) for i in range(number)]
        assert evenly(range(length), number) == expected
    if length == 24:  # those of M3-ReID's test
        assert evenly(range(24), 6) == [0, 4, 8, 12, 16, 20]


def test_vcm_by_hand(tmp_path):
    spec, folder = DATASETS["vcm"], vcm(tmp_path)
    training = spec.training(folder)
    twelve = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # of 13: the last is left out
    infrared = [f"Train/0007/ir/D2/{n}.jpg" for n in twelve]
    infrared += ["Train/0007/rgb/D10/12.jpg", "Train/0007/rgb/D10/13.jpg"]  # as the rows say, whatever the names do
    infrared += [f"Train/0012/ir/D2/{n}.jpg" for n in range(1, 11)]
    visible = [f"Train/0007/rgb/D10/{n}.jpg" for n in twelve]
    of_22 = [f"Train/0012/ir/D2/{n}.jpg" for n in (1, 2, 4, 6, 8, 10)]
    of_22 += [f"Train/0012/rgb/D2/{n}.jpg" for n in (1, 2, 4, 6, 8, 10)]
    assert training.keys() == {"train_visible", "train_infrared"}
    for name, frames, ids in (
        ("train_visible", visible + of_22, [7] * 12 + [12] * 12),
        ("train_infrared", infrared, [7] * 12 + [12] * 12),
    ):
        assert [str(Path(path).relative_to(folder)) for path in training[name][0]] == frames
        assert training[name][1].tolist() == ids

    test = spec.searches(folder, spec.directions)
    assert test.notes == [f"warning: {tmp_path}/info/track_test_info.txt: {problem}" for problem in RAGGED]
    there, back = test.searches
    queries = [([f"Test/0007/rgb/D10/{n}.jpg" for n in (1, 3, 5, 7, 9, 11)], 7, 10)]
    queries += [([f.replace("Train", "Test") for f in (of_22[0], of_22[2], of_22[4], *of_22[6::2])], 12, 2)]
    gallery = [([f"Test/0007/ir/D2/{n}.jpg" for n in (1, 3, 5, 7, 9, 11)], 7, 2)]
    gallery += [([infrared[i].replace("Train", "Test") for i in (12, 14, 16, 18, 20, 22)], 12, 2)]
    assert shown(test, there.query, folder) == shown(test, back.gallery, folder) == queries
    assert shown(test, there.gallery, folder) == shown(test, back.query, folder) == gallery
    assert there.sees(np.arange(2)).tolist() == [[True, True], [True, False]]  # 12 was in camera 2 both times
    there.check_matches()
    setting = there.setting
    assert (setting["protocol"], setting["trial"], setting["shots"], setting["cmc_counts"]) == (
        "standard",
        0,
        None,
        "images",
    )


def test_vcm_takes_the_modality_of_the_list_of_queries(tmp_path):
    write(vcm(tmp_path), info__query_IDX=["1 3 6"])
    test = DATASETS["vcm"].searches(tmp_path)
    (search,) = test.searches
    assert search.query.ids.tolist() == [12, 12]
    assert search.gallery.ids.tolist() == [7, 7]
    note = "query_IDX.txt: 2 tracks are of another modality in track_test_info.txt"
    assert test.notes[0] == f"warning: {tmp_path}/info/{note}"


def test_buptcampus_by_hand(tmp_path):
    spec, folder = DATASETS["buptcampus"], bupt(tmp_path)
    training = spec.training(folder)
    twelve = [*range(12)]
    for name, frames, ids in (
        ("train_visible", [f"DATA/3/RGB/G25/{n}.jpg" for n in twelve] + ["DATA/21/d.jpg"], [3] * 12 + [21]),
        ("train_infrared", [f"DATA/3/IR/G25/{n}.jpg" for n in twelve], [3] * 12),
    ):
        assert [str(Path(path).relative_to(folder)) for path in training[name][0]] == frames
        assert training[name][1].tolist() == ids
    test = spec.searches(folder, spec.directions)
    there, back = test.searches
    six = (0, 2, 4, 6, 8, 10)
    short = [f"DATA/21/{name}.jpg" for name in "aabbcc"]
    assert shown(test, there.query, folder) == [([f"DATA/3/RGB/G25/{n}.jpg" for n in six], 3, 2)]
    assert shown(test, there.gallery, folder) == [([f"DATA/3/IR/G25/{n}.jpg" for n in six], 3, 2), (short, 21, 6)]
    assert shown(test, back.query, folder) == [(short, 21, 6)]
    one = [(["DATA/21/d.jpg"] * 6, 21, 1), (["DATA/3/RGB/G25/b.jpg"] * 6, 3, 2)]
    assert shown(test, back.gallery, folder) == one
    assert [search.sees(np.arange(1)).tolist() for search in (there, back)] == [[[False, True]], [[True, True]]]
    back.check_matches()
    with pytest.raises(InputError, match="no query has a match in the gallery that it sees"):
        there.check_matches()


def test_a_frame_whose_name_no_file_has(tmp_path):
    folder = bupt(tmp_path)
    file = folder / "data_paths.json"
    file.write_text(file.read_text().replace("21/d.jpg", "21/\\u0000.jpg"))
    with pytest.raises(InputError, match=r"data_paths.json: 'DATA/21/\\x00.jpg' has a control character; correct it"):
        DATASETS["buptcampus"].training(folder)


@pytest.mark.parametrize("dataset", TREES)
def test_training_arrays_are_the_listed_frames(dataset, tree):
    spec, size = DATASETS[dataset], (32, 16)
    data, lists = spec.train(tree, size), spec.training(tree).values()
    people = sorted({*np.concatenate([ids for _, ids in lists]).tolist()})
    for images, labels, (paths, _) in zip(data[::2], data[1::2], lists, strict=True):
        assert [people[label] for label in labels] == [int(Path(path).relative_to(tree).parts[1]) for path in paths]
        for i in (0, 5, len(paths) - 1):
            assert np.array_equal(images[i], read_image(paths[i], size))


@pytest.mark.parametrize(("dataset", "name"), [("vcm", "info/track_train_info.txt"), ("buptcampus", "data_paths.json")])
def test_other_lists_make_another_data_set(dataset, name, tree, tmp_path):
    own = shutil.copytree(tree, tmp_path / "own")
    before = fingerprint(dataset, str(own))
    assert before == fingerprint(dataset, str(tree))
    with open(own / name, "a") as file:
        file.write("\n")
    assert fingerprint(dataset, str(own)) != before


def test_published_numbers():
    """Those that M3-ReID's data/manager.py states; twelve frames of each of 9,751 training tracks."""
    vcm, bupt = (DATASETS[name].published for name in TREES)
    assert (vcm["training ids"], vcm["training images"], bupt["training ids"]) == (500, 12 * 9751, 1074)
    assert [sum(n for name, n in of.items() if name.startswith("queries ")) for of in (vcm, bupt)] == [9683, 1076]
    assert difference("buptcampus", bupt | {"training images": 1}) is None  # nobody counts them


def test_unions_are_of_images(capsys):
    assert exit_status(train_ext_test0, ["--dataset", "llcm+vcm"]) == 2
    error = capsys.readouterr().err
    assert "argument --dataset: invalid choice: 'llcm+vcm' (choose from 'sysu', 'regdb', 'llcm', 'vcm'," in error
    assert error.count("\n") == 1


def test_corrupted_images_of_tracks_are_refused():
    with pytest.raises(
        InputError, match="--corrupt: is of images, but --dataset vcm is tested by tracks; leave it out"
    ):
        testa.main(["--dataset", "vcm", "--resume", "x.t", "--gpu", "cpu", "--corrupt"])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", TREES)
def test_training_and_both_directions_against_a_plain_loop_over_frames(dataset, tree, tmp_path):
    run = train_ext_test0.main(flags(tree, tmp_path, "--dataset", dataset, "--epochs", "1"))
    common = search_flags(tree, run["best"], "--dataset", dataset)
    features, page = tmp_path / "f.npz", tmp_path / "page"
    rows = testa.main([*common, "--all", "--features", str(features), "--report", str(page)])
    assert (page / "report.html").stat().st_size > 1000
    stored = ["--data_path", str(tree), "--dataset", dataset, "--gpu", "cpu", "--from_features", str(features)]
    for row, again in zip(rows, testa.main([*stored, "--all"]), strict=True):
        assert again["per_trial"][0]["metrics"] == pytest.approx(row["per_trial"][0]["metrics"])
    embed, spec = plain_embedding(run["best"]), DATASETS[dataset]
    for direction, more in zip(spec.directions, ([], ["--tvsearch"]), strict=True):
        pool, row = [row for row in rows if row["direction"] == direction]
        assert testa.main([*common, *more]) == [pool, row]
        assert (row["feature"], row["unseen"], row["trials"]) == ("FC", "same identity in the same camera", [0])
        test = spec.searches(tree, [direction])
        (search,) = test.searches
        sides = []
        for images in (search.query, search.gallery):
            vectors = []
            for frames, _, _ in shown(test, images, tree):
                each = [embed(str(tree / frame), images.modality) for frame in frames]
                mean = sum(each) / len(each)
                vectors.append(mean / np.linalg.norm(mean))
            sides.append(np.stack(vectors))
        labels = search.query.ids, search.gallery.ids, search.query.cameras, search.gallery.cameras
        matches = plain_match_ranks(HIDDEN[dataset], False, -sides[0] @ sides[1].T, *labels)
        (trial,) = row["per_trial"]
        assert (trial["queries"], trial["gallery"], trial["evaluated"]) == (*map(len, sides), len(matches))
        assert trial["metrics"]["Rank-1"] == pytest.approx(100 * np.mean([first == 1 for _, first, _ in matches]))
        precisions = [np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]) for *_, ranks in matches]
        assert trial["metrics"]["mAP"] == pytest.approx(100 * np.mean(precisions), abs=1e-3)
    best = next(row for row in rows if row["direction"] == spec.directions[0] and row["feature"] == "FC")
    assert best["per_trial"][0]["metrics"]["Rank-1"] == pytest.approx(run["metrics"]["Rank-1"])
