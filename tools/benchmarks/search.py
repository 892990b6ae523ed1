"""Size and speed of an index, and what the graph of a server misses."""

import os
import tempfile
import time
from contextlib import closing
from functools import partial

import numpy as np

from tools.benchmarks.measuring import seconds
from tools.search.address import open_index
from tools.search.file_index import FileIndex
from tools.search.index import Entry, Filter
from utils import InputError, progress

BATCH = 1000  # images per transaction
COSINE = 0.45  # mean of two vectors of a person, which are the person's own and Gaussian noise
CASES = {  # what is seen, and queries at a time
    "all images": (Filter(), 1),
    "one camera of ten": (Filter(cameras=("3",)), 1),
    "100 queries at once": (Filter(), 100),
}


def bench_search(args, _):
    """An index of random vectors: size, rate, time per query; of a server's graph also the recall."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((args.people, args.dim), np.float32)

    def draw(people):
        noise = np.float32((1 / COSINE - 1) ** 0.5)
        vectors = centres[people] + noise * rng.standard_normal((len(people), args.dim), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    with tempfile.TemporaryDirectory() as folder:
        address = args.index or os.path.join(folder, "index.db")
        with closing(open_index(address, create=True)) as index:
            if index.versions():
                raise InputError(f"--index {address}: is an index already; pass an empty database")
            version = index.begin("none", "0" * 64, "FC", args.dim)
            spent = fill(index, version, args, draw)
        print(f"{args.vectors} x {args.dim}: {args.vectors / spent:.0f} vectors/s added")
        queries = draw(rng.integers(args.people, size=100))
        with closing(open_index(address)) as index:
            in_file = isinstance(index, FileIndex)
            size = os.path.getsize(address) if in_file else index.bytes()
            first = seconds(lambda: index.search(version, queries[:1], 10))  # reads a file into memory
            print(f"{size / 1e9:.2f} GB on disk; {first:.1f} s to the end of the first search")
            results = {"add_seconds": spent, "bytes": size, "first_seconds": first}
            results["exact"], nearest = measure(index, version, queries, args.repeats)
            if not in_file:
                results["graph_seconds"] = seconds(lambda: index.approximate(version, args.dim))
                print(f"graph made in {results['graph_seconds']:.0f} s; {index.bytes() / 1e9:.2f} GB on disk with it")
                results["graph"], found = measure(index, version, queries, args.repeats)
                for case, ids in found.items():
                    recall = np.mean([np.isin(*pair).mean() for pair in zip(nearest[case], ids, strict=True)])
                    results["graph"][case]["recall"] = recall
                    print(f"{case}: recall@10 {recall:.3f}")
    return results


def fill(index, version, args, draw):
    """Add images of ten cameras, each of which sees every person -> the seconds that it took, without the drawing."""
    spent = 0
    for first in progress(range(0, args.vectors, BATCH), desc="adding", unit="batch", leave=False):
        rows = range(first, min(first + BATCH, args.vectors))
        cameras = {i: str((i + i // args.people) % 10) for i in rows}
        entries = [Entry(f"/{i}.jpg", "0 0", "visible", cameras[i], None, "2026-01-01 00:00:00") for i in rows]
        spent += seconds(partial(index.add, version, entries, draw(np.array(rows) % args.people)))
    return spent


def measure(index, version, queries, repeats):
    """-> ({case: {"seconds": median of a query}}, {case: ids of the ten nearest of some queries})."""
    results, found = {}, {}
    for case, (where, count) in CASES.items():
        times, found[case] = [], []
        for part in np.split(queries, len(queries) // count)[:repeats]:
            start = time.perf_counter()
            lists = index.search(version, part, 10, where)
            times.append((time.perf_counter() - start) / count)
            found[case] += [[image["id"] for image in images] for images in lists]
        results[case] = {"seconds": np.median(times)}
        print(f"{case}: {1000 * np.median(times):.1f} ms a query")
    return results, found
