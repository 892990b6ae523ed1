"""Deterministic weights for conformance checks, under the parameter names of the published GFMNet checkpoints."""

import zlib

import numpy as np


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Value of one published-checkpoint tensor: depends on its name, its shape and the seed only."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_mean"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1 and name.endswith("weight"):  # batch-norm scale
        scale = 0.05 if ".bn3." in name or "downsample" in name else 1.0
        return (scale * (1 + 0.1 * rng.standard_normal(shape))).astype(np.float32)
    if len(shape) == 1:  # any bias
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape) * np.sqrt(1.0 / fan_in)).astype(np.float32)


def read_shapes(path) -> dict[str, tuple[int, ...]]:
    """`name dim dim ...` per line -> {name: shape}."""
    shapes = {}
    for line in open(path):  # noqa: SIM115
        name, *dims = line.split()
        shapes[name] = tuple(map(int, dims))
    return shapes


def images(n: int, height: int, width: int, seed: int) -> np.ndarray:
    """Smooth random images, float32 [n, 3, height, width], roughly zero mean and unit variance."""
    rng = np.random.default_rng([77, seed])
    coarse = rng.standard_normal((n, 3, height // 12, width // 12))
    return (np.kron(coarse, np.ones((1, 1, 12, 12))) + 0.3 * rng.standard_normal((n, 3, height, width))).astype(
        np.float32
    )
