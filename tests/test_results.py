"""Rows of results, their table, and the images behind them."""

from itertools import product

import numpy as np
import pytest
import torch

from conftest import result_row
from datasets import DATASETS, Images, Search
from eval_metrics import SYSU_RULES, match_ranks
from test_datasets import HIDDEN
from testing import engine, results
from testing.results import choose_queries, pair_distances, print_results, rank_images, result_title, scores, summarise
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


def test_trials_of_a_setting_become_one_row_with_all_metrics():
    """Columns follow from the metrics of the rows, whatever these are."""
    labels = result_row(checkpoint="net.t", network="adp", queries=9, evaluated=8, gallery=4, chance=25.0)
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


MODELS = (("gray pixels", "pixels", "none", 5.5), ("untrained", "POOL", "none", 6.5), ("untrained", "FC", "none", 7.5))
MODELS += (("trained", "POOL", "none", 80), ("trained", "FC", "none", 78.26), ("trained", "FC", "random_walk", 78.5))


def test_the_screen_of_a_test_is_one_number_in_words_and_a_short_table(capsys):
    """Of eight protocols, in twelve lines; the full table has every row and metric."""
    trial = {"queries": 188, "evaluated": 180, "gallery": 97, "chance": 3.25, "checkpoint": "net.t", "network": "adp"}
    rows = [
        result_row(mode=mode, protocol=protocol, shots=shots, model=model, feature=feature, reranking=reranking)
        | {"selection": "test" if model == "trained" else None, "trials": [0, 1], "per_trial": [trial, trial]}
        | {"mean": {"Rank-1": first + number, "Rank-5": 99.0, "mAP": 44.44, "mINP": 55.55}}
        | {"std": dict.fromkeys(("Rank-1", "Rank-5", "mAP", "mINP"), 1.25)}
        for number, (protocol, mode, shots) in enumerate(product(("seeded", "official"), ("all", "indoor"), (1, 10)))
        for model, feature, reranking, first in MODELS
    ]
    print_results(rows, files=["demo/results.json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[:2] == [
        "78.3 % of 180 infrared queries have an image of their person in first place (Rank-1).",
        "Beside it: gray pixels 5.5, untrained 7.5, random_walk 78.5, chance 3.2",
    ]
    assert lines[2].split() == ["mode", "protocol", "shots", "Rank-1", "mAP", "mINP"]
    assert lines[10].split() == [
        "indoor",
        "official",
        "10",
        "85.26",
        "±",
        "1.25",
        "44.44",
        "±",
        "1.25",
        "55.55",
        "±",
        "1.25",
    ]
    assert lines[11].startswith("trained FC; data: data like SYSU-MM01; direction: infrared to visible; trials: 2; ")
    assert lines[11].endswith("; with a match: 180; gallery: 97. All rows: --table full, demo/results.json")

    for name in ("similarity", "CMC counts", "not seen", "flip", "re-ranking", "–"):
        assert name not in lines[11]

    print_results(rows, full=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + len(rows) + 1
    assert lines[2].split()[-4:] == ["Rank-1", "Rank-5", "mAP", "mINP"]
    assert lines[-1].endswith("with a match: 180; gallery: 97; checkpoint: net.t (adp); images: /data")

    hostile = [row | {"per_trial": [trial | {"network": "\x1b]0;x"}], "direction": "a\x1bb"} for row in rows[:2]]
    hostile[1]["direction"] = "c\x1bd"  # now a column
    for full in (False, True):
        print_results(hostile, full)
        assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)

    print_results([row | {"dataset": "vcm"} for row in rows[:1]])
    assert "% of 180 infrared queries have a track of their person" in capsys.readouterr().out
    single = [row | {"trials": [0], "per_trial": [trial], "std": None} for row in rows[:1]]  # of a baseline alone
    print_results(single)
    lines = capsys.readouterr().out.splitlines()
    assert [lines[1], lines[3].split()] == ["Beside it: chance 3.2", ["5.50", "44.44", "55.55"]]
    assert "; mode: all; direction: infrared to visible; protocol: seeded; shots: 1; trials: trial 0; " in lines[4]
    print_results([row | {"mode": None} for row in single])
    assert "data like SYSU-MM01; direction: infrared to visible; " in capsys.readouterr().out


def random_search(dataset, seed):
    """A small search and features of its images, or of the frames of its tracks: (features, paths, search)."""
    rng = np.random.default_rng(seed)
    cameras = {"sysu": ([3, 6], [1, 2, 4, 5]), "regdb": ([2], [1])}.get(dataset, ([1, 2, 3], [1, 2, 3]))
    features, images = {}, []
    for modality, count, seen_by in (("infrared", 12, cameras[0]), ("visible", 30, cameras[1])):
        rows = rng.permutation(count + 5)[:count]  # of more images, in another order
        if DATASETS[dataset].tracks:
            rows = np.stack([rows, *rng.integers(0, count + 5, (2, count))], axis=1)
        images.append(Images(modality, rows, rng.integers(1, 5, count), rng.choice(seen_by, count)))
        x = torch.from_numpy(rng.normal(size=(count + 5, 6))).float()
        features[modality] = {"FC": torch.nn.functional.normalize(x)}
    paths = {modality: [f"{modality}{i}" for i in range(len(x["FC"]))] for modality, x in features.items()}
    return features, paths, Search({"dataset": dataset}, *images)


def plain_feature(features, row):
    """The feature of an image, or of a track: the mean of its frames', of unit length."""
    total = [sum(float(features[frame][c]) for frame in row.flat) for c in range(features.shape[1])]
    length = sum(value**2 for value in total) ** 0.5
    return np.array([value / length for value in total])


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
                    pair = (plain_feature(features[m]["FC"], r) for m, r in (("infrared", row), ("visible", g_row)))
                    similarity = float(np.dot(*pair))
                    seen.append((similarity, f"visible{g_row.flat[0]}", *other_person))
                    (same if person[0] == other_person[0] else other).append(1 - similarity)
            seen.sort(key=lambda image: -image[0])
            hits = [rank for rank, image in enumerate(seen, 1) if image[2] == person[0]]
            if hits:
                precision = np.mean([(i + 1) / rank for i, rank in enumerate(hits)])
                expected[q] = (f"infrared{row.flat[0]}", *person, precision, seen)

        sides = [
            np.stack([plain_feature(features[side.modality]["FC"], r) for r in side.rows]) for side in (query, gallery)
        ]
        labels = query.ids, gallery.ids, query.cameras, gallery.cameras
        matches = match_ranks(DATASETS[dataset].rules, -sides[0] @ sides[1].T, *labels)
        searched = engine.run_search(features, search)["FC", "none"]
        assert searched.positions.tolist() == matches.positions.tolist()
        for which, sign, top in (("worst", 1, 7), ("best", -1, None)):
            positions = choose_queries(matches, search, which, 5)
            ranked = rank_images(features, paths, search, "FC", matches, positions, top)
            order = sorted(expected.values(), key=lambda row: sign * row[3])[:5]
            for drawn, (path, identity, camera, precision, seen) in zip(ranked, order, strict=True):
                assert (drawn["path"], drawn["id"], drawn["camera"]) == (path, identity, camera)
                assert drawn["average_precision"] == pytest.approx(precision)
                assert drawn["first_match"] == 1 + [image[2] for image in seen].index(identity)
                assert len(drawn["gallery"]) == len(seen[:top])
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
        luck = [np.mean([image[2] == row[1] for image in row[4]]) for row in expected.values()]
        row = results.result_row(search, matches)
        assert row["chance"] == pytest.approx(100 * np.mean(luck))
        assert row["curves"]["cmc"][0] == pytest.approx(row["metrics"]["Rank-1"])
        for actual, plain in zip(pair_distances(features, search, "FC"), (same, other), strict=True):
            np.testing.assert_allclose(actual, plain, atol=1e-6)


def test_an_identity_without_a_query_is_named():
    features, _, search = random_search("regdb", 0)
    matches = engine.run_search(features, search)["FC", "none"]
    with pytest.raises(InputError, match="--which 77: no query of that identity has a match; choose one of 1, 2, 3, 4"):
        choose_queries(matches, search, "77", 1)
    for count, some in ((10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"), (11, r"0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$")):
        search = search._replace(query=search.query._replace(ids=np.arange(len(search.query.ids)) % count))
        with pytest.raises(InputError, match=f"choose one of {some}"):
            choose_queries(matches, search, "77", 1)


def test_a_title_names_the_trial_or_counts_them():
    assert result_title(result_row(trials=[3])).endswith(", trial 3")
    assert result_title(result_row(trials=[0, 1])).endswith(", 2 trials")
