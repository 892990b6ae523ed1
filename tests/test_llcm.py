"""LLCM from the flags to the table."""

import numpy as np
import pytest

import testa
import train_ext_test0
from conftest import flags, search_flags
from data_manager import draw_gallery, llcm_folders, process_query_llcm
from test_datasets import HIDDEN
from tests.oracles import plain_embedding, plain_match_ranks


@pytest.mark.slow
def test_training_and_both_directions_against_a_plain_loop_over_files(llcm_tree, tmp_path):
    run = train_ext_test0.main(flags(llcm_tree, tmp_path, "--dataset", "llcm", "--epochs", "1"))
    common = search_flags(llcm_tree, run["best"], "--dataset", "llcm")
    rows = testa.main([*common, "--all"])
    by_direction = {
        direction: [row for row in rows if row["direction"] == direction]
        for direction in ("visible to infrared", "infrared to visible")
    }
    for direction, more in zip(by_direction, ([], ["--tvsearch"]), strict=True):
        assert testa.main([*common, *more]) == by_direction[direction]
    # The run's epoch is chosen by the first trial of the first direction.
    (_, first), _ = by_direction.values()
    assert (first["trials"], first["selection"]) == (list(range(10)), "test")
    assert first["per_trial"][0]["metrics"]["Rank-1"] == pytest.approx(run["metrics"]["Rank-1"])

    embed = plain_embedding(run["best"])
    for direction, (_, row) in by_direction.items():
        assert (row["feature"], row["unseen"]) == ("FC", "same identity in the same camera")
        modalities = direction.split(" to ")
        query, q_ids, q_cameras = process_query_llcm(llcm_tree, modalities[0])
        gallery, g_ids, g_cameras = draw_gallery(llcm_folders(llcm_tree, modalities[1]), 4)
        queries, images = (
            np.stack([embed(path, m) for path in paths]) for paths, m in zip((query, gallery), modalities, strict=True)
        )
        matches = plain_match_ranks(HIDDEN["llcm"], True, -queries @ images.T, q_ids, g_ids, q_cameras, g_cameras)
        trial = row["per_trial"][4]
        assert (trial["queries"], trial["gallery"], trial["evaluated"]) == (len(query), len(gallery), len(matches))
        assert trial["metrics"]["Rank-1"] == pytest.approx(100 * np.mean([first == 1 for _, first, _ in matches]))
        precisions = [np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]) for *_, ranks in matches]
        assert trial["metrics"]["mAP"] == pytest.approx(100 * np.mean(precisions), abs=1e-3)
