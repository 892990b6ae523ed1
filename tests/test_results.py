"""Rows of results, their table, and the images behind them."""

import numpy as np
import pytest
import torch

from conftest import result_row
from datasets import DATASETS, Images, Search
from eval_metrics import SYSU_RULES, match_ranks
from test_datasets import HIDDEN
from testing import engine
from testing.results import choose_queries, pair_distances, print_results, rank_images, scores, summarise
from utils import InputError


def test_metrics_are_percents():
    """Two queries: of the first, matches rank 1 and 3; of the second, 2, behind an image of another identity."""
    distances = np.array([[0.1, 0.3, 0.2, 0.4], [0.1, 0.2, 0.3, 0.15]])
    matches = match_ranks(SYSU_RULES, distances, [7, 9], [7, 7, 8, 9], [6, 6], [1, 1, 1, 1])
    assert scores(matches) == pytest.approx(
        {
            "Rank-1": 50,
            "Rank-5": 100,
            "Rank-10": 100,
            "Rank-20": 100,
            "mAP": 50 * (5 / 6 + 1 / 2),
            "mINP": 50 * (2 / 3 + 1 / 2),
        }
    )


def test_trials_of_a_setting_become_one_row_with_all_metrics(capsys):
    """Columns follow from the metrics of the rows, whatever these are."""
    labels = result_row(checkpoint="net.t", network="adp", queries=9, evaluated=8, gallery=4)
    del labels["trials"], labels["per_trial"]  # these are rows of single searches
    rows = [
        labels | {"feature": feature, "trial": trial, "metrics": {"new": value}, "curves": {"cmc": [value, 100.0]}}
        for trial, value in ((0, 20.0), (1, 40.0))
        for feature in ("POOL", "FC")
    ]
    table = summarise(rows)
    assert [(row["feature"], row["trials"]) for row in table] == [("POOL", [0, 1]), ("FC", [0, 1])]
    assert (table[0]["mean"], table[0]["std"], table[0]["curves"]) == ({"new": 30}, {"new": 10}, {"cmc": [30, 100]})
    assert [trial["metrics"] for trial in table[1]["per_trial"]] == [{"new": 20}, {"new": 40}]
    assert summarise(rows[:1])[0]["std"] is None

    print_results(table, by_trial=True)
    lines = capsys.readouterr().out.splitlines()
    title = "data like SYSU-MM01, all-search, infrared to visible, seeded protocol, 1-shot, 2 trials"
    assert f"{title}: 9 queries (8 with a match), gallery of 4" in lines
    assert [line.split() for line in lines if line.startswith("trial ")] == 2 * [
        ["trial", "0", "new", "20.00"],
        ["trial", "1", "new", "40.00"],
    ]
    assert lines[-4].split()[-1] == "new"
    assert lines[-1].split() == ["trained", "FC", "yes", "none", "test", "30.00", "±10.00"]


def random_search(dataset, seed):
    """A small search and features of its images: (features, paths, search)."""
    rng = np.random.default_rng(seed)
    cameras = {"sysu": ([3, 6], [1, 2, 4, 5]), "llcm": ([1, 2, 3], [1, 2, 3]), "regdb": ([2], [1])}[dataset]
    features, images = {}, []
    for modality, count, seen_by in (("infrared", 12, cameras[0]), ("visible", 30, cameras[1])):
        rows = rng.permutation(count + 5)[:count]  # of more images, in another order
        images.append(Images(modality, rows, rng.integers(1, 5, count), rng.choice(seen_by, count)))
        x = torch.from_numpy(rng.normal(size=(count + 5, 6))).float()
        features[modality] = {"FC": torch.nn.functional.normalize(x)}
    paths = {modality: [f"{modality}{i}" for i in range(len(x["FC"]))] for modality, x in features.items()}
    return features, paths, Search({"dataset": dataset}, *images)


@pytest.mark.parametrize("dataset", DATASETS)
def test_rankings_and_distances_against_plain_loops(dataset):
    for seed in range(10):
        features, paths, search = random_search(dataset, seed)
        query, gallery = search.query, search.gallery
        expected, same, other = {}, [], []
        for q, (row, *person) in enumerate(zip(query.rows, query.ids, query.cameras, strict=True)):
            seen = []
            for g_row, *other_person in zip(gallery.rows, gallery.ids, gallery.cameras, strict=True):
                if not HIDDEN[dataset](tuple(person), tuple(other_person)):
                    similarity = float(features["infrared"]["FC"][row] @ features["visible"]["FC"][g_row])
                    seen.append((similarity, f"visible{g_row}", *other_person))
                    (same if person[0] == other_person[0] else other).append(1 - similarity)
            seen.sort(key=lambda image: -image[0])
            hits = [rank for rank, image in enumerate(seen, 1) if image[2] == person[0]]
            if hits:
                precision = np.mean([(i + 1) / rank for i, rank in enumerate(hits)])
                expected[q] = (f"infrared{row}", *person, precision, seen)

        matches = match_ranks(
            DATASETS[dataset].rules,
            -features["infrared"]["FC"][query.rows] @ features["visible"]["FC"][gallery.rows].T,
            *(query.ids, gallery.ids, query.cameras, gallery.cameras),
        )
        for which, sign in (("worst", 1), ("best", -1)):
            positions = choose_queries(matches, search, which, 5)
            ranked = rank_images(features, paths, search, "FC", matches, positions, 7)
            order = sorted(expected.values(), key=lambda row: sign * row[3])[:5]
            for drawn, (path, identity, camera, precision, seen) in zip(ranked, order, strict=True):
                assert (drawn["path"], drawn["id"], drawn["camera"]) == (path, identity, camera)
                assert drawn["average_precision"] == pytest.approx(precision)
                assert drawn["first_match"] == 1 + [image[2] for image in seen].index(identity)
                assert len(drawn["gallery"]) == min(7, len(seen))
                for image, (similarity, *where) in zip(drawn["gallery"], seen, strict=False):
                    assert [image["path"], image["id"], image["camera"]] == where
                    assert image["similarity"] == pytest.approx(similarity, abs=1e-6)
                    assert image["correct"] == (where[1] == identity)
        identity = int(query.ids[matches.rows[0]])
        of_one = choose_queries(matches, search, str(identity), 50)
        rows = [i for i, q in enumerate(expected) if query.ids[q] == identity]
        assert sorted(of_one) == rows
        drawn = choose_queries(matches, search, "random", 4)
        assert drawn == choose_queries(matches, search, "random", 4)
        assert len({*drawn}) == len(drawn) == min(4, len(expected))
        for actual, plain in zip(pair_distances(features, search, "FC"), (same, other), strict=True):
            np.testing.assert_allclose(actual, plain, atol=1e-6)


def test_an_identity_without_a_query_is_named():
    features, _, search = random_search("regdb", 0)
    matches = engine.run_search(features, search)["FC", "none"]
    with pytest.raises(InputError, match="--which 77: no query of that identity has a match; choose one of 1, 2, 3, 4"):
        choose_queries(matches, search, "77", 1)
