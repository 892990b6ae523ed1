"""RegDB from the flags to the table: both directions, trials, checkpoints of this repo and published ones."""

import numpy as np
import pytest
import torch

import testa
import train_ext_test0
import utils
from conftest import flags
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
    assert all(row["trials"] == [1] for row in both)
    for direction, flag in (("visible to thermal", []), ("thermal to visible", ["--tvsearch"])):
        alone = testa.main([*common, *flag])
        assert alone == [row for row in both if row["direction"] == direction]


def test_regdb_trial_must_be_the_checkpoint_s(regdb_runs, regdb_tree):
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--model_path", str(regdb_runs)]
    with pytest.raises(InputError, match="trial 2"):
        testa.main([*common, "--resume", REGDB_NAME.format(trial=2), "--trial", "1"])
    with pytest.raises(InputError, match=r"trial_3_best\.t"):
        testa.main([*common, "--resume", REGDB_NAME])


def test_regdb_ten_trials_in_one_table(regdb_runs, regdb_tree, tmp_path):
    for trial in range(1, 11):  # stands in for ten trainings: the same weights, each said to be of its trial
        checkpoint = torch.load(regdb_runs / REGDB_NAME.format(trial=1))
        checkpoint["args"]["trial"] = trial
        utils.save_checkpoint(checkpoint, tmp_path / REGDB_NAME.format(trial=trial))
    common = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--workers", "0"]
    rows = testa.main([*common, "--model_path", str(tmp_path), "--resume", REGDB_NAME])
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
