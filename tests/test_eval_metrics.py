"""Metrics against golden values, hand-worked cases and a plain per-query loop."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_metrics
from datasets import DATASETS
from eval_metrics import CosineDistances, eval_regdb, eval_sysu, match_ranks
from test_datasets import HIDDEN
from tests.oracles import plain_match_ranks
from tools.benchmarks.plain import plain_metrics

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
GOLDEN_CASES = sorted({key.split("/")[0] for key in GOLDEN.files})
SYSU_KEYS = ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")
REGDB_KEYS = SYSU_KEYS[:3]
PROTOCOLS = {"sysu": (eval_sysu, SYSU_KEYS), "regdb": (eval_regdb, REGDB_KEYS)}
each_protocol = pytest.mark.parametrize(("evaluate", "keys"), PROTOCOLS.values(), ids=PROTOCOLS.keys())


def assert_metrics_close(actual, expected):
    for value, reference in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(value), reference, rtol=0, atol=1e-6)


def random_problem(seed):
    """Small problem with many ties, missing cameras and identities that occur on one side only."""
    rng = np.random.default_rng(seed)
    queries, images = rng.integers(1, 12), rng.integers(1, 30)
    names = rng.permutation(1000)[: rng.integers(1, 26)]  # arbitrary ids, often fewer than 20
    problem = {
        "distmat": rng.integers(0, rng.integers(1, 12), (queries, images)).astype(np.float32),
        "q_pids": rng.choice(names, queries),
        "g_pids": rng.choice(names, images),
        "q_camids": rng.choice([3, 6], queries),
        "g_camids": rng.choice([1, 2, 4, 5], images),
    }
    problem["q_pids"][0], problem["g_camids"][0] = problem["g_pids"][0], 1  # at least one query has a match
    return problem


@pytest.fixture
def problem():
    return random_problem(5)


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_golden(case, name):
    evaluate, keys = PROTOCOLS[name]
    actual = evaluate(*(GOLDEN[f"{case}/{key}"] for key in keys))
    assert_metrics_close(actual, [GOLDEN[f"{case}/{name}_{metric}"] for metric in ("cmc", "mAP", "mINP")])


@each_protocol
@pytest.mark.parametrize(("max_rank", "chunk"), [(1, 7), (20, 1), (50, eval_metrics.CHUNK)])
def test_matches_loop_on_random_problems(evaluate, keys, max_rank, chunk, monkeypatch):
    monkeypatch.setattr(eval_metrics, "CHUNK", chunk)
    skipped = tied = 0
    for seed in range(60):
        problem = random_problem(1000 * max_rank + seed)
        arguments = [problem[key] for key in keys]
        actual = evaluate(*arguments, max_rank=max_rank)
        assert np.shape(actual[0]) == (max_rank,)
        assert_metrics_close(actual, plain_metrics(*(a.tolist() for a in arguments), max_rank=max_rank))
        skipped += not np.isin(problem["q_pids"], problem["g_pids"]).all()
        tied += len(np.unique(problem["distmat"][0])) < problem["distmat"].shape[1]
    # The problems are the awkward ones they are meant to be.
    assert skipped > 10
    assert tied > 40


def test_hand_worked():
    """Ranked ids: 5 5 7 5 7 8 for query 7 of camera 6; 7 5 7 8 for query 8 of camera 3, to which camera 2 is hidden."""
    distances = np.array([[0.3, 0.1, 0.2, 0.4, 0.5, 0.9], [0.1, 0.0, 0.2, 0.0, 0.3, 0.4]])
    g_pids, g_camids = np.array([7, 5, 5, 5, 7, 8]), np.array([1, 2, 4, 2, 5, 1])
    q_pids, q_camids = np.array([7, 8]), np.array([6, 3])

    cmc, m_ap, m_inp = eval_sysu(distances, q_pids, g_pids, q_camids, g_camids, max_rank=4)
    # Identities: 5 7 8 (hit at 2) and 7 5 8 (hit at 3). Images: matches at 3 and 5 of 6, at 4 of 4.
    np.testing.assert_allclose(cmc, [0, 0.5, 1, 1])
    assert m_ap == pytest.approx(((1 / 3 + 2 / 5) / 2 + 1 / 4) / 2)
    assert m_inp == pytest.approx((2 / 5 + 1 / 4) / 2)

    cmc, m_ap, m_inp = eval_regdb(distances, q_pids, g_pids, max_rank=6)
    # Every image counts and is seen by both: first matches at 3 and, last of 5 5 7 5 7 8, at 6.
    np.testing.assert_allclose(cmc, [0, 0, 0.5, 0.5, 0.5, 1])
    assert m_ap == pytest.approx(((1 / 3 + 2 / 5) / 2 + 1 / 6) / 2)
    assert m_inp == pytest.approx((2 / 5 + 1 / 6) / 2)


def test_ties_are_stable_in_a_large_gallery():
    """Short rows are insertion-sorted, hence stable by accident; long ones are not."""
    rng = np.random.default_rng(0)
    distances = rng.integers(0, 3, (5, 3000)).astype(np.float32)
    q_pids, g_pids = np.arange(5), rng.integers(0, 300, 3000)
    assert_metrics_close(eval_regdb(distances, q_pids, g_pids), plain_metrics(distances, q_pids, g_pids))


def evaluate_both(problem):
    return *eval_sysu(*problem.values()), *eval_regdb(*(problem[key] for key in REGDB_KEYS))


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8])
def test_any_distance_type_and_inputs_are_left_alone(problem, dtype, convert):
    """The distances of the problem are small integers, exact in every type."""
    expected = evaluate_both(problem)
    given = {key: convert(value) for key, value in {**problem, "distmat": problem["distmat"].astype(dtype)}.items()}
    before = copy.deepcopy(given)
    torch.testing.assert_close(evaluate_both(given), expected, rtol=0, atol=0)
    torch.testing.assert_close(given, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("far", "near", "dtype"),
    [(1 + 1e-12, 1, torch.float64), (2**24 + 1, 2**24, torch.int32), (2**24 + 1, 2**24, torch.int64)],
)
def test_distances_are_not_rounded(far, near, dtype):
    """Two that float32 takes for one, the match being the nearer and the later."""
    distances = torch.tensor([[far, near]], dtype=dtype)
    assert eval_regdb(distances, np.array([1]), np.array([2, 1]), max_rank=1)[0][0] == 1


@each_protocol
def test_bad_problems_are_refused(problem, evaluate, keys):
    def refused(words, **change):
        with pytest.raises(ValueError, match=words):
            evaluate(*((problem | change)[key] for key in keys))

    for bad in (np.nan, np.inf, -np.inf):
        distances = problem["distmat"].copy()
        distances[-1, -1] = bad
        refused("not all finite", distmat=distances)
    for short in keys:
        refused("do not fit", **{short: problem[short][..., :-1]})
    for wide in keys[1:]:  # labels of such a shape would pair up
        refused(r"do not fit labels of shape .*, 1\]", **{wide: problem[wide][:, None]})
    refused("no query has a match", q_pids=problem["q_pids"] + 10_000)
    for side, none in (("q", np.s_[:0]), ("g", np.s_[:, :0])):
        empty = {key: problem[key][:0] for key in keys if key.startswith(side)}
        refused("no queries, or an empty gallery", distmat=problem["distmat"][none], **empty)


@pytest.mark.parametrize("dataset", DATASETS)
def test_match_ranks_against_a_plain_loop(dataset):
    compared, rules = 0, DATASETS[dataset].rules
    for seed in range(100):
        problem = random_problem(seed)
        if dataset not in ("sysu", "regdb"):
            problem["g_camids"] = np.random.default_rng(seed).choice([3, 6, 7], len(problem["g_camids"]))
            problem["g_camids"][0] = 7  # the first query's match
        expected = plain_match_ranks(HIDDEN[dataset], rules.counts_identities, *problem.values())
        matches = match_ranks(rules, *problem.values())
        assert matches.rows.tolist() == [row for row, _, _ in expected]
        assert matches.first.tolist() == [first for _, first, _ in expected]
        assert [[rank for rank in ranks if rank] for ranks in matches.positions.tolist()] == [r for *_, r in expected]

        curves, precisions = [], []
        for _, _, ranks in expected:
            precision = [(i + 1) / rank for i, rank in enumerate(ranks)]
            precisions.append(sum(precision) / len(ranks))
            recall = [(i + 1) / len(ranks) for i in range(len(ranks))]
            levels = [level / 10 for level in range(11)]
            curves.append(
                [max(p for p, r in zip(precision, recall, strict=True) if r >= level - 1e-9) for level in levels]
            )
        np.testing.assert_allclose(matches.average_precision(), precisions, rtol=1e-12)
        np.testing.assert_allclose(matches.precision_at_recall(), np.mean(curves, axis=0), rtol=1e-12)
        compared += any(0 in ranks for ranks in matches.positions.tolist())
    assert compared > 15  # queries with fewer matches than others


def test_straight_from_features():
    rng = np.random.default_rng(0)
    query, gallery = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 16)))) for n in (40, 90))
    labels = rng.integers(0, 9, 40), rng.integers(0, 9, 90), rng.choice([3, 6], 40), rng.choice([1, 2, 4, 5], 90)
    lazy = CosineDistances(query, gallery)
    assert_metrics_close(eval_sysu(lazy, *labels), plain_metrics(-(query @ gallery.T).numpy(), *labels))
    assert_metrics_close(eval_regdb(lazy, *labels[:2]), plain_metrics(-(query @ gallery.T).numpy(), *labels[:2]))


@pytest.mark.gpu
@each_protocol
def test_on_the_gpu(evaluate, keys):
    for seed in range(20):
        problem = random_problem(seed)
        expected = evaluate(*(problem[key] for key in keys))
        problem["distmat"] = torch.from_numpy(problem["distmat"]).cuda()
        for value, reference in zip(evaluate(*(problem[key] for key in keys)), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-12)
