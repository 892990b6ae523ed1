"""RegDB from the flags to the table: both directions, trials, and checkpoints that do not record theirs."""

import os
import shutil

import numpy as np
import pytest
import torch

import testa
import train_ext_test0
from conftest import PROGRAM, flags, save_network, search_flags
from data_manager import process_test_regdb
from datasets import DATASETS
from eval_metrics import eval_regdb
from testing import corruptions
from tests.oracles import plain_embedding
from utils import InputError

MODALITIES = {"visible": "visible", "thermal": "infrared"}


def search_regdb(tree, checkpoint, *more):
    return testa.main(search_flags(tree, checkpoint, "--dataset", "regdb", *more))


@pytest.mark.slow
def test_a_run_is_tested_on_its_own_trial(regdb_tree, tmp_path):
    run = train_ext_test0.main(flags(regdb_tree, tmp_path, "--dataset", "regdb", "--trial", "2", "--epochs", "1"))
    assert run["best"].endswith("_trial_2_best.t")
    rows = search_regdb(regdb_tree, run["best"])
    assert [(row["direction"], row["trials"], row["std"]) for row in rows] == [("visible to thermal", [2], None)] * 2
    assert rows[1]["mean"]["mAP"] == pytest.approx(run["metrics"]["mAP"])
    with pytest.raises(InputError, match="was trained on trial 2"):
        search_regdb(regdb_tree, run["best"], "--trial", "1")


def test_an_image_that_is_listed_twice_is_told(regdb_tree, tmp_path):
    tree = shutil.copytree(regdb_tree, tmp_path / "tree", copy_function=os.link)
    listing = tree / "idx" / "test_thermal_2.txt"
    lines = listing.read_text().splitlines()
    listing.unlink()
    listing.write_text("\n".join([*lines, lines[0], lines[0], lines[1]]))
    test = DATASETS["regdb"].searches(tree, trials=[1, 2])
    image = tree / lines[0].rpartition(" ")[0]
    assert test.notes == [f"warning: {image} is listed and counts several times (2 such images)"]


def test_no_image_goes_through_the_other_stem(regdb_tree, tmp_path):
    """Two stems that differ: in either direction, each image has the features that its own stem gives alone."""
    checkpoint = save_network(tmp_path / "stems.t", 0, "regdb")
    content = torch.load(checkpoint)
    for name, value in content["net"].items():
        if name.startswith("infrared.") and value.is_floating_point():
            value.mul_(1 + torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(content, checkpoint)
    embed = plain_embedding(checkpoint)
    features, ids, distances = {}, {}, {}
    for modal, modality in MODALITIES.items():
        paths, ids[modal], _ = process_test_regdb(regdb_tree, 2, modal)
        features[modal] = np.stack([embed(path, modality) for path in paths])
        swapped = embed(paths[0], {"visible": "infrared", "infrared": "visible"}[modality])
        assert features[modal][0] @ swapped < 0.999  # the stems do differ

    both = search_regdb(regdb_tree, checkpoint, "--trial", "2", "--all")
    for direction, more in (("visible to thermal", []), ("thermal to visible", ["--tvsearch"])):
        file = tmp_path / f"{direction}.npz"
        rows = search_regdb(regdb_tree, checkpoint, "--trial", "2", *more, "--features", file)
        assert rows == [row for row in both if row["direction"] == direction]
        saved = np.load(file)
        for modal, modality in MODALITIES.items():
            np.testing.assert_allclose(saved[f"{modality}/trained/FC"], features[modal], rtol=0, atol=1e-5)
        query, gallery = direction.split(" to ")
        distances[direction] = -features[query] @ features[gallery].T
        _, mean_ap, _ = eval_regdb(distances[direction], ids[query], ids[gallery])
        assert rows[1]["mean"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
    np.testing.assert_allclose(distances["visible to thermal"], distances["thermal to visible"].T, atol=1e-6)


@pytest.mark.slow
def test_ten_trials_in_one_table(regdb_tree, tmp_path):
    """Of checkpoints without flags, as published: {trial} and --trial say their trials, and nothing is guessed."""
    for trial in range(1, 11):
        path = save_network(tmp_path / f"net_trial_{trial}.t", trial)
        torch.save({**torch.load(path), "args": {}}, path)
    networks, saved = str(tmp_path / "net_trial_{trial}.t"), str(tmp_path / "features_{trial}.npz")
    both = search_regdb(regdb_tree, networks, "--all", "--features", saved)
    assert [row["direction"] for row in both] == ["visible to thermal"] * 2 + ["thermal to visible"] * 2
    assert [row["trials"] for row in both] == [list(range(1, 11))] * 4
    for trial in both[0]["per_trial"]:
        assert trial["checkpoint"].endswith(f"net_trial_{trial['trial']}.t")
    scores = [trial["metrics"]["mAP"] for trial in both[1]["per_trial"]]
    assert len(set(scores)) > 1
    assert both[1]["mean"]["mAP"] == pytest.approx(np.mean(scores))
    features = ["--dataset", "regdb", "--data_path", str(regdb_tree), *PROGRAM, "--from_features", saved]
    assert testa.main([*features, "--all"]) == both

    alone = search_regdb(regdb_tree, networks.format(trial=7), "--trial", "7")
    assert [row["per_trial"] for row in alone] == [[row["per_trial"][6]] for row in both[:2]]
    with pytest.raises(InputError, match="pass it with --trial"):
        search_regdb(regdb_tree, networks.format(trial=7))
    (tmp_path / "net_trial_3.t").unlink()
    with pytest.raises(InputError, match=r"trial_3\.t: no such file; of the 10, only trials 1, 2, 4, .* exist"):
        search_regdb(regdb_tree, networks)


@pytest.mark.slow
def test_a_network_of_another_data_set_is_tested_on_all_trials(regdb_tree, tmp_path, capsys):
    """As one without a data set is on each, and the table says what it was trained on."""
    own, foreign = (save_network(tmp_path / f"{name}.t", 0, dataset=name) for name in (None, "sysu"))
    (row,) = [row for row in search_regdb(regdb_tree, foreign, "--cross_data") if row["feature"] == "FC"]
    assert (row["model"], row["trials"]) == ("trained on SYSU-MM01", [*range(1, 11)])
    assert "trained on SYSU-MM01 FC; " in capsys.readouterr().out
    for trial in (1, 7):
        (alone,) = [r for r in search_regdb(regdb_tree, own, "--trial", str(trial)) if r["feature"] == "FC"]
        assert (alone["model"], alone["mean"]) == ("trained", row["per_trial"][trial - 1]["metrics"])
    saved = str(tmp_path / "f.npz")
    search_regdb(regdb_tree, foreign, "--cross_data", "--features", saved)
    files = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--from_features", saved]
    again = testa.main([*files, "--cross_data"])
    assert {r["model"] for r in again} == {"trained on SYSU-MM01"}
    assert [r["mean"] for r in again if r["feature"] == "FC"] == [row["mean"]]
    with pytest.raises(
        InputError, match="was trained on sysu; test it with --dataset sysu, or with testa.py --cross_data"
    ):
        search_regdb(regdb_tree, foreign)
    itself = save_network(tmp_path / "itself.t", 0, dataset="regdb")
    with pytest.raises(InputError, match="was trained on regdb itself; leave out --cross_data"):
        search_regdb(regdb_tree, itself, "--cross_data")


@pytest.mark.slow
def test_corrupted_images_are_tested_ten_times_in_all(regdb_tree, tmp_path, monkeypatch, capsys):
    """Once with each of ten networks, or ten times with one. Images that stay as they are have the same results."""
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    seen = []
    monkeypatch.setattr(corruptions, "corrupt", lambda image, *_, repetition, **__: seen.append(repetition) or image)
    monkeypatch.setattr(corruptions, "prepare", lambda: None)
    networks = str(tmp_path / "net_{trial}.t")
    for trial in range(1, 11):
        save_network(tmp_path / f"net_{trial}.t", trial, dataset="regdb")
    rows = {(r["model"], r["feature"]): r for r in search_regdb(regdb_tree, networks, "--corrupt")}
    clean, corrupt = rows["trained", "FC"], rows["trained, visible images corrupted", "FC"]
    assert clean["trials"] == corrupt["trials"] == [*range(1, 11)]
    assert clean["mean"] == corrupt["mean"]
    assert list(dict.fromkeys(seen)) == [*range(10)]

    seen.clear()
    one = networks.format(trial=3)
    search_regdb(regdb_tree, one, "--trial", "3", "--corrupt", "--table", "full")
    assert list(dict.fromkeys(seen)) == [*range(10)]
    assert "trial 3, 10 times" in capsys.readouterr().out
