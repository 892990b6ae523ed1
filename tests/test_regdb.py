"""RegDB from the flags to the table: both directions, trials, checkpoints of this repo and published ones."""

import numpy as np
import pytest
import torch

import data_manager
import testa
import train_ext_test0
from conftest import flags
from core.checkpoint import save_checkpoint
from eval_metrics import eval_regdb
from tests.oracles import plain_embedding
from utils import InputError


@pytest.fixture(scope="module")
def regdb_runs(regdb_tree, tmp_path_factory):
    """One short run for two of RegDB's trials -> the folder of the checkpoints."""
    out = tmp_path_factory.mktemp("regdb_run")
    for trial in ("1", "2"):
        train_ext_test0.main(flags(regdb_tree, out, "--dataset", "regdb", "--trial", trial, "--epochs", "1"))
    return out / "models"


REGDB_NAME = "regdb_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p2_n4_lr_0.01_seed_0_9_adam_trial_{trial}_best.t"


def test_regdb_trains_and_tests_in_both_directions(regdb_runs, regdb_tree):
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--workers", "0"]
    common += ["--model_path", str(regdb_runs), "--resume", REGDB_NAME.format(trial=1)]
    both = testa.main([*common, "--all"])
    assert {row["direction"] for row in both} == {"visible to thermal", "thermal to visible"}
    assert all(row["trials"] == [1] and row["std"] is None for row in both)
    for direction, flag in (("visible to thermal", []), ("thermal to visible", ["--tvsearch"])):
        alone = testa.main([*common, *flag])
        assert alone == [row for row in both if row["direction"] == direction]


def test_no_image_goes_through_the_other_stem(regdb_runs, regdb_tree, tmp_path):
    """Two stems that differ: in either direction, each image has the features that its own stem gives alone."""
    checkpoint = torch.load(regdb_runs / REGDB_NAME.format(trial=1))
    for name, value in checkpoint["net"].items():
        if name.startswith("infrared.") and value.is_floating_point():
            value.mul_(1 + torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(checkpoint, tmp_path / "stems.t")
    embed = plain_embedding(tmp_path / "stems.t")
    features, ids, distances = {}, {}, {}
    for modal, modality in (("visible", "visible"), ("thermal", "infrared")):
        paths, ids[modal], _ = data_manager.process_test_regdb(regdb_tree, 1, modal)
        features[modal] = np.stack([embed(path, modality) for path in paths])
        swapped = embed(paths[0], {"visible": "infrared", "infrared": "visible"}[modality])
        assert features[modal][0] @ swapped < 0.999  # the stems do differ

    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--resume", f"{tmp_path}/stems.t"]
    for direction, flag in (("visible to thermal", []), ("thermal to visible", ["--tvsearch"])):
        file = tmp_path / f"{direction}.npz"
        rows = testa.main([*common, *flag, "--features", str(file)])
        saved = np.load(file)
        for modal, modality in (("visible", "visible"), ("thermal", "infrared")):
            np.testing.assert_allclose(saved[f"{modality}/trained/FC"], features[modal], rtol=0, atol=1e-5)
        query, gallery = direction.split(" to ")
        distances[direction] = -features[query] @ features[gallery].T
        _, mean_ap, _ = eval_regdb(distances[direction], ids[query], ids[gallery])
        assert rows[1]["mean"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
    np.testing.assert_allclose(distances["visible to thermal"], distances["thermal to visible"].T, atol=1e-6)


def test_regdb_trial_must_be_the_checkpoint_s(regdb_runs, regdb_tree):
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--model_path", str(regdb_runs)]
    with pytest.raises(InputError, match="trial 2"):
        testa.main([*common, "--resume", REGDB_NAME.format(trial=2), "--trial", "1"])
    with pytest.raises(InputError, match=r"trial_3_best\.t: no such file; of the ten there are those of trial 1, 2"):
        testa.main([*common, "--resume", REGDB_NAME])


def test_regdb_ten_trials_in_one_table(regdb_runs, regdb_tree, tmp_path):
    for trial in range(1, 11):  # stands in for ten trainings: the same weights, each said to be of its trial
        checkpoint = torch.load(regdb_runs / REGDB_NAME.format(trial=1))
        checkpoint["args"]["trial"] = trial
        save_checkpoint(checkpoint, tmp_path / REGDB_NAME.format(trial=trial))
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--workers", "0"]
    common += ["--all"]
    saved = tmp_path / "features_{trial}.npz"
    both = testa.main([*common, "--model_path", str(tmp_path), "--resume", REGDB_NAME, "--features", str(saved)])
    assert len(list(tmp_path.glob("*.npz"))) == 10
    assert testa.main([*common, "--from_features", str(saved)]) == both
    assert [row["direction"] for row in both] == ["visible to thermal"] * 2 + ["thermal to visible"] * 2
    rows = both[:2]
    assert [row["trials"] for row in rows] == [list(range(1, 11))] * 2
    metrics = [trial["metrics"]["Rank-1"] for trial in rows[1]["per_trial"]]
    assert len(set(metrics)) > 1
    assert rows[1]["mean"]["Rank-1"] == pytest.approx(np.mean(metrics))


def test_published_regdb_checkpoints_are_tested_on_the_trial_in_their_name(regdb_runs, regdb_tree, tmp_path):
    """They hold no flags: {trial} and --trial say which trial they are of, and without either there is no guess."""
    for trial in range(1, 11):
        checkpoint = torch.load(regdb_runs / REGDB_NAME.format(trial=1))
        del checkpoint["args"]
        torch.save(checkpoint, tmp_path / f"published_trial_{trial}.t")
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--workers", "0"]
    common += ["--model_path", str(tmp_path)]
    rows = testa.main([*common, "--resume", "published_trial_{trial}.t"])
    assert rows[0]["trials"] == list(range(1, 11))
    for trial in rows[0]["per_trial"]:
        assert trial["checkpoint"].endswith(f"published_trial_{trial['trial']}.t")
    (alone,) = testa.main([*common, "--resume", "published_trial_7.t", "--trial", "7"])[:1]
    assert alone["per_trial"] == [rows[0]["per_trial"][6]]
    with pytest.raises(InputError, match="give --trial"):
        testa.main([*common, "--resume", "published_trial_7.t"])
