"""LLCM from the flags to the table, and its measure."""

import numpy as np
import pytest

import data_loader
import data_manager
import testa
import train_ext_test0
from conftest import SIZE, flags
from eval_metrics import eval_llcm
from test_eval_metrics import random_problem
from tests.oracles import plain_embedding, plain_llcm_metrics


@pytest.fixture(scope="module")
def llcm_run(llcm_tree, tmp_path_factory):
    """A short run -> main's result."""
    out = tmp_path_factory.mktemp("llcm_run")
    return train_ext_test0.main(flags(llcm_tree, out, "--dataset", "llcm", "--epochs", "1"))


def test_measure_against_a_plain_loop():
    hidden = 0
    for seed in range(200):
        problem = random_problem(seed)
        rng = np.random.default_rng(seed)
        problem["q_camids"], problem["g_camids"] = (
            rng.integers(1, 10, len(problem[key])) for key in ("q_pids", "g_pids")
        )
        problem["g_camids"][0] = problem["q_camids"][0] % 9 + 1  # one match stays
        problem["g_pids"][0] = problem["q_pids"][0]
        for actual, expected in zip(eval_llcm(*problem.values()), plain_llcm_metrics(*problem.values()), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        same_id = problem["q_pids"][:, None] == problem["g_pids"]
        hidden += (same_id & (problem["q_camids"][:, None] == problem["g_camids"])).any()
    assert hidden > 50


def test_same_identity_in_the_same_camera_is_not_seen():
    """Nearest is the query's own shot, then another person of its camera, then the match."""
    distances = np.array([[0.0, 1.0, 2.0]])
    cmc, mean_ap, mean_inp = eval_llcm(
        distances, np.array([5]), np.array([5, 6, 5]), np.array([2]), np.array([2, 2, 4]), max_rank=3
    )
    np.testing.assert_array_equal(cmc, [0, 1, 1])
    assert mean_ap == mean_inp == 0.5
    with pytest.raises(ValueError, match="no query has a match"):
        eval_llcm(distances[:, :2], np.array([5]), np.array([5, 6]), np.array([2]), np.array([2, 2]))


def test_training_lists(llcm_tree):
    data = data_loader.llcm_train(llcm_tree, SIZE)
    assert data.num_classes == 8
    for name, images, labels in (
        ("vis", data.visible, data.visible_labels),
        ("nir", data.infrared, data.infrared_labels),
    ):
        lines = [line.split() for line in (llcm_tree / "idx" / f"train_{name}.txt").read_text().splitlines()]
        assert labels.tolist() == [int(label) for _, label in lines]
        assert np.array_equal(images[-1], data_loader.read_image(llcm_tree / lines[-1][0], SIZE))


def test_run_is_chosen_by_the_first_direction(llcm_run, llcm_tree):
    common = ["--dataset", "llcm", "--data_path", str(llcm_tree), "--gpu", "cpu", "--workers", "0"]
    rows = testa.main([*common, "--resume", llcm_run["best"]])
    assert {row["direction"] for row in rows} == {"visible to infrared"}
    assert rows[1]["trials"] == list(range(10))
    assert rows[1]["selection"] == "test"
    assert rows[1]["per_trial"][0]["metrics"]["Rank-1"] == pytest.approx(llcm_run["metrics"]["Rank-1"])


def test_both_directions_against_a_plain_loop_over_files(llcm_run, llcm_tree):
    common = ["--dataset", "llcm", "--data_path", str(llcm_tree), "--gpu", "cpu", "--workers", "0"]
    rows = testa.main([*common, "--resume", llcm_run["last"], "--all"])
    assert testa.main([*common, "--resume", llcm_run["last"], "--tvsearch"]) == [
        row for row in rows if row["direction"] == "infrared to visible"
    ]

    embed = plain_embedding(llcm_run["last"])
    for direction in ("visible to infrared", "infrared to visible"):
        asked, searched = direction.split(" to ")
        (row,) = [row for row in rows if row["direction"] == direction and row["feature"] == "FC"]
        assert row["unseen"] == "same identity in the same camera"
        query, q_ids, q_cameras = data_manager.process_query_llcm(llcm_tree, asked)
        gallery, g_ids, g_cameras = data_manager.process_gallery_llcm(llcm_tree, searched, 4)
        distances = -np.stack([embed(p, asked) for p in query]) @ np.stack([embed(p, searched) for p in gallery]).T
        cmc, mean_ap, _ = plain_llcm_metrics(distances, q_ids, g_ids, q_cameras, g_cameras)
        found = row["per_trial"][4]
        assert (found["queries"], found["gallery"]) == (len(query), len(gallery))
        assert found["metrics"]["Rank-1"] == pytest.approx(100 * cmc[0], abs=1e-6)
        assert found["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
