"""Re-ranking against golden values and plain loops after the papers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from testing import re_rank
from tools.benchmarks.plain import plain_k_reciprocal

GOLDEN = np.load(Path(__file__).parent / "golden" / "rerank.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files})


def reference(query, gallery, *parameters):
    """`plain_k_reciprocal` in float64."""
    return plain_k_reciprocal(query.astype(np.float64), gallery.astype(np.float64), *parameters)


def clusters(seed, queries=23, images=41, size=8, people=9):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, size))
    return tuple(
        (centres[rng.integers(people, size=n)] + 0.6 * rng.normal(size=(n, size))).astype(np.float32)
        for n in (queries, images)
    )


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    """Those of k-reciprocal re-ranking were computed in float16: within 6e-3 on average."""
    query, gallery = GOLDEN[f"{case}/query"], GOLDEN[f"{case}/gallery"]
    distances = re_rank.k_reciprocal(query, gallery)
    assert np.abs(distances - GOLDEN[f"{case}/k_reciprocal_fp16"]).mean() < 6e-3
    np.testing.assert_allclose(distances, reference(query, gallery), rtol=0, atol=1e-6)
    np.testing.assert_allclose(re_rank.random_walk(query, gallery), GOLDEN[f"{case}/random_walk"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 100, 2**22])
@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value"),
    [(20, 6, 0.3), (6, 3, 0.3), (5, 1, 0.0), (7, 2, 0.3), (4, 2, 1.0), (1, 1, 0.5), (3, 6, 0.3), (100, 80, 0.3)],
)
def test_k_reciprocal_against_plain_loops(k1, k2, lambda_value, block, monkeypatch):
    monkeypatch.setattr(re_rank, "BLOCK", block)
    query, gallery = clusters(seed=k1)
    expected = reference(query, gallery, k1, k2, lambda_value)
    np.testing.assert_allclose(re_rank.k_reciprocal(query, gallery, k1, k2, lambda_value), expected, rtol=0, atol=3e-6)


def test_k_reciprocal_of_features_with_a_common_offset():
    """Features of a network point much the same way; what they share must not eat the digits of their distances."""
    query, gallery = (x + np.float32(100) * (-1.0) ** np.arange(x.shape[1], dtype=np.float32) for x in clusters(seed=2))
    expected = reference(query, gallery)
    np.testing.assert_allclose(re_rank.k_reciprocal(query, gallery), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_random_walk_is_the_sum_of_its_steps(alpha):
    given = clusters(seed=3)
    query, gallery = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in given)
    walk = gallery @ gallery.T
    np.fill_diagonal(walk, 0)
    walk = np.exp(walk) / np.exp(walk).sum(axis=1, keepdims=True)
    step, similarity = query @ gallery.T, 0
    for _ in range(1000):
        similarity = similarity + (1 - alpha) * step
        step = alpha * step @ walk.T
    np.testing.assert_allclose(re_rank.random_walk(*given, alpha), -similarity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("measure", [re_rank.k_reciprocal, re_rank.random_walk])
def test_kind_in_is_kind_out_and_inputs_are_left_alone(measure):
    query, gallery = clusters(seed=1)
    before = query.copy(), gallery.copy()
    from_numpy = measure(query, gallery)
    from_torch = measure(torch.from_numpy(query), torch.from_numpy(gallery))
    assert isinstance(from_numpy, np.ndarray)
    assert from_torch.dtype == torch.float32
    assert from_numpy.shape == (23, 41)
    np.testing.assert_array_equal(from_torch.numpy(), from_numpy)
    np.testing.assert_array_equal(query, before[0])
    np.testing.assert_array_equal(gallery, before[1])


@pytest.mark.parametrize("measure", [re_rank.k_reciprocal, re_rank.random_walk])
def test_without_queries_or_images_there_are_no_distances(measure):
    query, gallery = clusters(0)
    assert measure(query[:0], gallery).shape == (0, len(gallery))
    assert measure(query, gallery[:0]).shape == (len(query), 0)


def test_duplicates_and_tiny_galleries():
    same = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(re_rank.k_reciprocal(same, same), 0, atol=1e-6)
    np.testing.assert_allclose(re_rank.random_walk(same, same), -1, atol=1e-6)
    # One image: it is all there is to walk to, and its weight of itself is the whole softmax.
    one, other = np.array([[3.0, 4.0]], np.float32), np.array([[2.0, 0.0]], np.float32)
    assert re_rank.random_walk(one, other)[0, 0] == pytest.approx(-0.6)
    assert re_rank.k_reciprocal(one, other)[0, 0] == pytest.approx(reference(one, other)[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("measure", [re_rank.k_reciprocal, re_rank.random_walk])
def test_on_the_gpu(measure):
    query, gallery = (torch.from_numpy(x) for x in clusters(seed=4))
    there = measure(query.cuda(), gallery.cuda())
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), measure(query, gallery), rtol=0, atol=1e-5)
