"""The specs of the data sets: what a training and a test get, and which flags go with which."""

import dataclasses
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import testa
import train_ext_test0
from conftest import SIZE
from core.images import read_image
from data_manager import (
    SYSU_PROTOCOLS,
    draw_gallery,
    llcm_folders,
    process_gallery_sysu,
    process_query_llcm,
    process_query_sysu,
)
from datasets import (
    DATASETS,
    TRAINING_SETS,
    Images,
    Search,
    check_options,
    difference,
    fingerprint,
    llcm_searches,
    search_title,
    sysu_searches,
    training_counts,
    union,
)
from testing.evaluation import tested_trial
from utils import InputError


@pytest.fixture
def tree(request, dataset):
    return request.getfixturevalue(f"{dataset}_tree")


FIRST = {  # title of the first search, and what its CMC counts
    "sysu": ("all-search, infrared to visible, seeded protocol, 1-shot", "identities"),
    "regdb": ("visible to thermal, standard protocol", "images"),
    "llcm": ("visible to infrared, seeded protocol, 1-shot", "identities"),
    "vcm": ("visible to infrared, standard protocol", "images"),
    "buptcampus": ("visible to infrared, standard protocol", "images"),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_what_training_and_testing_use(dataset, tree):
    spec = DATASETS[dataset]
    trials = list(spec.trials)[:2]
    data = spec.train(tree, SIZE, **spec.own(trial=1, select="test"))
    for images, labels in ((data.visible, data.visible_labels), (data.infrared, data.infrared_labels)):
        assert (images.shape, images.dtype) == ((len(labels), *SIZE, 3), np.uint8)
        assert (labels.min(), labels.max(), labels.dtype) == (0, data.num_classes - 1, np.int64)
    options = {flag: spec.options[flag] for flag in ("mode", "protocol", "shots") if flag in spec.options}
    test = spec.searches(tree, spec.directions, trials, **options)
    settings = [search.setting for search in test.searches]
    assert (search_title(settings[0]), settings[0]["cmc_counts"]) == FIRST[dataset]
    assert len(settings) == np.prod([len(spec.directions), len(trials), *map(len, options.values())])
    assert len({json.dumps(setting) for setting in settings}) == len(settings)
    assert {setting["dataset"] for setting in settings} == {dataset}
    assert list(dict.fromkeys(setting["trial"] for setting in settings)) == trials
    for search in test.searches:
        search.check_matches()
        names = dict(zip(("query", "gallery"), search.setting["direction"].split(" to "), strict=True))
        for part, images in (("query", search.query), ("gallery", search.gallery)):
            assert images.modality == {"thermal": "infrared"}.get(names[part], names[part])
    for modality, paths in test.paths.items():  # every image once, and none that is not used
        assert len(set(paths)) == len(paths)
        parts = [images.rows for s in test.searches for images in s[1:] if images.modality == modality]
        used = {row for rows in parts for row in rows.flat}
        assert used == set(range(len(paths)))


def test_sysu_searches_are_the_lists_of_data_manager(sysu_tree, monkeypatch):
    folders, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: folders.append(path) or listdir(path))
    test = sysu_searches(sysu_tree, mode=("all",), shots=(1, 10), trials=(0, 3))
    assert len(folders) == len(set(folders))  # each folder is read once for all searches
    monkeypatch.undo()
    test.searches += sysu_searches(
        sysu_tree, mode=("indoor",), protocol=("official",), trials=[4], select="val"
    ).searches
    assert [search_title(search.setting) for search in test.searches[-2:]] == [
        "all-search, infrared to visible, seeded protocol, 10-shot",
        "indoor-search, infrared to visible, official protocol, 1-shot",
    ]
    for search in test.searches[:-1]:
        query, gallery = (
            process_query_sysu(sysu_tree),
            process_gallery_sysu(sysu_tree, trial=search.setting["trial"], shots=search.setting["shots"]),
        )
        for images, (paths, ids, cameras) in ((search.query, query), (search.gallery, gallery)):
            assert [test.paths[images.modality][row] for row in images.rows] == paths
            np.testing.assert_array_equal(images.ids, ids)
            np.testing.assert_array_equal(images.cameras, cameras)
    official = process_gallery_sysu(sysu_tree, "indoor", 4, "official", split="val")
    assert test.searches[-1].gallery.ids.tolist() == official[1].tolist()
    assert test.searches[-1].setting["split"] == "val"


def test_galleries_of_the_official_protocol(sysu_tree):
    test = sysu_searches(sysu_tree, protocol=("official",))
    drawn = [[test.paths["visible"][row] for row in search.gallery.rows] for search in test.searches]
    of = {name: [process_gallery_sysu(sysu_tree, "all", n, name)[0] for n in range(10)] for name in SYSU_PROTOCOLS}
    assert drawn == of["official"] != of["seeded"]


def test_validation_ids_are_searched_and_not_trained_on(sysu_tree):
    test, spec = sysu_searches(sysu_tree, trials=[0], select="val"), DATASETS["sysu"]
    (search,) = test.searches
    paths, ids, _ = process_query_sysu(sysu_tree, split="val")
    assert [test.paths["infrared"][row] for row in search.query.rows] == paths
    known = [spec.train(sysu_tree, SIZE, **more).num_classes for more in ({}, {"select": "val"})]
    assert known[0] - known[1] == len(set(ids)) > 0


def test_features_of_a_track_are_the_mean_of_its_frames():
    values = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    features, none = {"visible": {"FC": values}}, np.zeros(2, int)
    tracks = Images("visible", np.array([[0, 3], [2, 2]]), none, none)
    expected = torch.stack([values[0] + values[3], values[2]])
    torch.testing.assert_close(tracks.features(features, "FC"), expected / expected.norm(dim=1, keepdim=True))
    assert tracks.shown.tolist() == [0, 2]
    images = Images("visible", np.array([2, 0]), none, none)
    assert torch.equal(images.features(features, "FC"), values[[2, 0]])
    assert images.shown.tolist() == [2, 0]


def test_llcm_searches_all_images_of_one_modality_in_a_drawn_gallery_of_the_other(llcm_tree):
    test = llcm_searches(llcm_tree, ["visible to infrared", "infrared to visible"], trials=(2, 5))
    for search in test.searches:
        query, gallery = search.setting["direction"].split(" to ")
        folders = llcm_folders(llcm_tree, gallery)
        drawn = draw_gallery(folders, search.setting["trial"])
        assert [Path(path).parent for path in drawn[0]] == [
            Path(name) for name, (*_, files) in folders.items() if files
        ]
        for images, (paths, _, _) in ((search.query, process_query_llcm(llcm_tree, query)), (search.gallery, drawn)):
            assert [test.paths[images.modality][row] for row in images.rows] == paths


def test_llcm_training_lists(llcm_tree):
    data = DATASETS["llcm"].train(llcm_tree, SIZE)
    for name, images, labels in (
        ("vis", data.visible, data.visible_labels),
        ("nir", data.infrared, data.infrared_labels),
    ):
        lines = [line.split() for line in (llcm_tree / "idx" / f"train_{name}.txt").read_text().splitlines()]
        assert labels.tolist() == [int(label) for _, label in lines]
        assert np.array_equal(images[-1], read_image(llcm_tree / lines[-1][0], SIZE))


def test_no_test_image_of_llcm_is_trained_on(llcm_tree, monkeypatch):
    """Of either modality, whether it is drawn for a gallery or not."""
    compared = []
    monkeypatch.setattr("datasets.listed_train", lambda _path, _lists, _size, test: compared.extend(test))
    dataclasses.replace(DATASETS["llcm"], trials=range(1)).train(llcm_tree, SIZE)
    assert {path for paths in compared for path in paths} == {str(path) for path in llcm_tree.glob("test_*/*/*/*")}


HIDDEN = {  # (identity, camera) of query and gallery image
    "sysu": lambda query, gallery: query[1] == 3 and gallery[1] == 2,
    "regdb": lambda query, gallery: False,
    "llcm": lambda query, gallery: query == gallery,
    "vcm": lambda query, gallery: query == gallery,
    "buptcampus": lambda query, gallery: query == gallery,
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_queries_see_against_a_plain_loop(dataset):
    rng, matches = np.random.default_rng(0), []
    setting = {"dataset": dataset, "mode": None, "direction": "", "protocol": "", "shots": 1}
    for _ in range(100):
        images = [
            Images(modality, np.arange(2), rng.integers(1, 3, 2), rng.choice(cameras, 2))
            for modality, cameras in (("infrared", [3, 6]), ("visible", [2, 3] if dataset == "sysu" else [3, 6]))
        ]
        query, gallery = (list(zip(x.ids.tolist(), x.cameras.tolist(), strict=True)) for x in images)
        search = Search(setting, *images)
        seen = [[not HIDDEN[dataset](q, g) for g in gallery] for q in query]
        assert search.sees(np.arange(2)).tolist() == seen
        matches.append(any(seen[i][j] and query[i][0] == gallery[j][0] for i in range(2) for j in range(2)))
        if matches[-1]:
            search.check_matches()
        else:
            with pytest.raises(InputError, match="no query has a match"):
                search.check_matches()
    assert 5 < sum(matches) < 95


def test_only_a_test_set_of_full_size_has_the_name_of_the_data_set():
    assert DATASETS["sysu"].title(None, 3803) == "SYSU-MM01"
    assert DATASETS["sysu"].title(False, 3802) == "data like SYSU-MM01"
    assert DATASETS["sysu"].title(True, 3803) == "demo data like SYSU-MM01"
    assert DATASETS["regdb"].title(False, 2060) == "RegDB"
    assert {DATASETS["llcm"].title(False, count) for count in (8680, 7166)} == {"LLCM"}
    assert {DATASETS["vcm"].title(False, count) for count in (5099, 4584)} == {"HITSZ-VCM"}
    assert {DATASETS["buptcampus"].title(False, count) for count in (540, 536)} == {"BUPTCampus"}


@pytest.mark.parametrize(
    ("dataset", "flag", "value", "owner"),
    [
        ("llcm", "mode", "indoor", "SYSU-MM01"),
        ("regdb", "protocol", "official", "SYSU-MM01"),
        ("llcm", "shots", 10, "SYSU-MM01"),
        ("regdb", "select", "val", "SYSU-MM01"),
        ("sysu", "trial", 2, "RegDB"),
        ("llcm", "trial", 2, "RegDB"),
        ("vcm", "mode", "indoor", "SYSU-MM01"),
        ("vcm", "trial", 2, "RegDB"),
        ("buptcampus", "shots", 10, "SYSU-MM01"),
        ("buptcampus", "select", "val", "SYSU-MM01"),
    ],
)
def test_flags_without_a_meaning_are_refused(dataset, flag, value, owner):
    for other, spec in DATASETS.items():
        if spec.name == owner:
            check_options(Namespace(dataset=other, **{flag: value}))
    check_options(Namespace(dataset=dataset, **{flag: {"mode": "all", "protocol": "seeded", "shots": 1}.get(flag)}))
    with pytest.raises(
        InputError, match=f"--{flag} {value}: is an option of {owner}; leave it out with --dataset {dataset}"
    ):
        check_options(Namespace(dataset=dataset, **{flag: value}))


def test_tvsearch_needs_two_directions():
    for dataset in ("regdb", "llcm", "vcm", "buptcampus"):
        check_options(Namespace(dataset=dataset, tvsearch=True))
    with pytest.raises(InputError, match="--tvsearch: SYSU-MM01 is searched from infrared to visible only"):
        check_options(Namespace(dataset="sysu", tvsearch=True))


@pytest.fixture
def folder(sysu_tree, regdb_tree, llcm_tree, tmp_path, monkeypatch):
    """The folder of a union: that of each data set is in it. The unions are made anew, for tests/mutants.py."""
    for name, spec in TRAINING_SETS.items():
        if spec.parts:
            monkeypatch.setitem(TRAINING_SETS, name, union(*spec.parts))
    for name, tree in (("SYSU-MM01", sysu_tree), ("RegDB", regdb_tree), ("LLCM", llcm_tree)):
        shutil.copytree(tree, tmp_path / name, copy_function=os.link, ignore=shutil.ignore_patterns("cache"))
    return tmp_path


def test_the_union_has_the_images_of_all_and_ids_apart(folder):
    """Against each data set by itself. Its counts are those that L2RW states, for RegDB and LLCM."""
    spec, options = TRAINING_SETS["sysu+regdb+llcm"], {"trial": 3}
    data, first = spec.train(str(folder), SIZE, **options), 0
    places = [0, 0]
    for part, tree in zip(("sysu", "regdb", "llcm"), spec.folders(str(folder)), strict=True):
        alone = DATASETS[part].train(tree, SIZE, **DATASETS[part].own(**options))
        for i in (0, 1):
            place = slice(places[i], places[i] + len(alone[2 * i]))
            places[i] = place.stop
            np.testing.assert_array_equal(data[2 * i][place], alone[2 * i])
            np.testing.assert_array_equal(data[2 * i + 1][place], alone[2 * i + 1] + first)
        first += alone.num_classes
    assert (data.num_classes, [*places]) == (first, [len(data.visible), len(data.infrared)])
    counts = training_counts(919, 19006, 16035)
    assert TRAINING_SETS["regdb+llcm"].published == counts
    assert difference("regdb+llcm", counts) is None


def test_a_union_is_its_parts(folder):
    spec = TRAINING_SETS["sysu+regdb"]
    assert (spec.path, spec.rules, spec.directions) == ("../data/", DATASETS["sysu"].rules, DATASETS["sysu"].directions)
    assert (spec.name, [*spec.options]) == ("SYSU-MM01 + RegDB", ["trial"])
    args = train_ext_test0.get_args_parser().parse_args(["--dataset", "sysu+regdb", "--trial", "4"])
    assert "trial_4" in train_ext_test0.run_name(args)  # another training than that of trial 3
    assert [*spec.training(str(folder), trial=4)] == ["sysu+regdb_trial_4_visible", "sysu+regdb_trial_4_infrared"]


def test_other_lists_of_any_part_make_another_union(folder):
    before = fingerprint("sysu+llcm", str(folder))
    os.mkfifo(folder / "SYSU-MM01/exp/pipe.txt")  # whoever reads it waits
    (folder / "LLCM/idx/folder.txt").mkdir()
    assert fingerprint("sysu+llcm", str(folder)) == before
    assert fingerprint("sysu+regdb", str(folder)) != before
    for file in (folder / "LLCM/idx/train_nir.txt", folder / "SYSU-MM01/exp/val_id.txt"):
        text = file.read_text()
        file.unlink()  # a link to the shared one
        file.write_text(text + "\n")
        after = fingerprint("sysu+llcm", str(folder))
        assert after != before
        before = after
    for image in (folder / "SYSU-MM01/cam3").glob("*/0001.jpg"):
        content = image.read_bytes()
        image.unlink()
        image.write_bytes(content + b"more")
    assert fingerprint("sysu+llcm", str(folder)) != before


@pytest.mark.parametrize("name", ["sysu+llcm", "regdb+llcm"])
def test_tests_while_a_union_trains_are_those_of_its_first(folder, name):
    spec, first = TRAINING_SETS[name], DATASETS[name.split("+")[0]]
    (search,) = spec.searches(str(folder), spec.directions[:1], [4]).searches
    (alone,) = first.searches(spec.folders(folder)[0], trials=[4 if name.startswith("regdb") else 0]).searches
    assert search.setting == alone.setting
    np.testing.assert_array_equal(search.gallery.ids, alone.gallery.ids)


def test_an_image_of_any_test_is_not_trained_on(folder):
    lists = folder / "RegDB" / "idx"
    line = (lists / "test_thermal_2.txt").read_text().splitlines()[0]
    train = (lists / "train_thermal_2.txt").read_text()
    (lists / "train_thermal_2.txt").unlink()  # a link to the shared one
    (lists / "train_thermal_2.txt").write_text(f"{train}{line}\n")
    with pytest.raises(InputError, match=f"{line.split()[0]}: is listed for training and for the test"):
        TRAINING_SETS["sysu+regdb"].train(str(folder), SIZE, trial=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gfm2", "adp", "dns"])
def test_methods_train_on_a_union_and_are_tested_on_another_data_set(folder, tmp_path, method):
    flags = ["--gpu=cpu", "--workers=0", "--arch=resnet18", "--weights=none", "--img_h=64", "--img_w=32"]
    flags += ["--batch_size=4", "--num_pos=2", "--epochs=1", "--warmup=0", f"--method={method}"]
    result = train_ext_test0.main(
        [*flags, "--dataset=sysu+llcm", f"--data_path={folder}", f"--model_path={tmp_path}", f"--log_path={tmp_path}"]
    )
    assert "data: demo data, " in Path(result["log"]).with_suffix(".txt").read_text()
    test = ["--gpu=cpu", "--workers=0", "--resume", str(result["last"])]
    regdb = [*test, "--dataset=regdb", "--tvsearch", f"--data_path={folder}/RegDB"]
    rows = testa.main([*regdb, "--cross_data"])
    assert {(row["model"], len(row["trials"])) for row in rows} == {("trained on SYSU-MM01 + LLCM", 10)}
    (row, *_) = testa.main([*test, "--dataset=llcm", f"--data_path={folder}/LLCM"])
    assert row["model"] == "trained"
    with pytest.raises(InputError, match=r"was trained on sysu\+llcm; test it with"):
        testa.main(regdb)
    with pytest.raises(InputError, match="leave out --cross_data"):
        testa.main([*test, "--dataset=sysu", f"--data_path={folder}/SYSU-MM01", "--cross_data"])


def test_a_union_is_tested_on_its_parts_or_as_one_that_knows_nobody():
    of = lambda name, trial=None: {"dataset": name, "trial": trial}  # noqa: E731
    assert tested_trial("x.t", of("sysu+llcm"), "llcm", None, cross_data=False) is None
    assert tested_trial("x.t", of("sysu+regdb", 4), "regdb", None, cross_data=False) == 4
    assert tested_trial("x.t", of("sysu+llcm"), "regdb", 2, cross_data=True) == 2
    with pytest.raises(InputError, match="was trained on trial 4, with test people of trial 5"):
        tested_trial("x.t", of("sysu+regdb", 4), "regdb", 5, cross_data=False)
    with pytest.raises(InputError, match=r"was trained on sysu\+llcm; test it with --dataset sysu or llcm, or with"):
        tested_trial("x.t", of("sysu+llcm"), "regdb", None, cross_data=False)
    with pytest.raises(InputError, match="was trained on llcm itself; leave out --cross_data"):
        tested_trial("x.t", of("sysu+llcm"), "llcm", None, cross_data=True)
