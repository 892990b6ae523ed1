"""Size and speed of an index, and what the graph of a server misses."""

import contextlib
import os
import tempfile
import time
from datetime import datetime, timedelta

import numpy as np

from tools.benchmarks.measuring import PROC, PeakMemory, gib_text
from tools.search.address import open_index
from tools.search.file_index import FileIndex
from tools.search.index import Entry, Filter
from tools.search.labels import time_text
from tools.search.server_index import ServerIndex
from utils import InputError, progress

BATCH = 1000  # images per transaction


def bench_search(args, device):
    """People are random directions; a vector is its person's plus Gaussian noise, so that two vectors of a person have
    the mean cosine that `--cosine` gives. Queries are further vectors of the same people."""
    rng = np.random.default_rng(0)
    centres = _unit(rng.standard_normal((args.people, args.dim), np.float32))

    def draw(people):
        noise = np.float32(((1 / args.cosine - 1) / args.dim) ** 0.5)
        return _unit(centres[people] + noise * rng.standard_normal((len(people), args.dim), np.float32))

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = args.index or os.path.join(folder, "index.db")
        index = stack.enter_context(contextlib.closing(open_index(address, create=True)))
        if index.versions():
            raise InputError(f"--index {address}: is an index already; pass an empty database")
        version = index.begin("none", "0" * 64, "FC", args.dim)
        seconds, cpu = fill(index, version, args, draw)
        results = {"add_seconds": seconds, "add_cpu_seconds": cpu}
        rate = f"{args.vectors / seconds:.0f} vectors/s added, {args.vectors / cpu:.0f} in a second of a core"
        print(f"{args.vectors} x {args.dim}: {rate}")
        queries = draw(rng.integers(args.people, size=100))
        if isinstance(index, FileIndex):
            index.close()
            results["bytes"] = os.path.getsize(address)
            index = stack.enter_context(contextlib.closing(open_index(address)))  # as a search does
            with PeakMemory() as memory:
                start = time.perf_counter()
                index.search(version, queries[:1], 10)
                results["first_seconds"] = time.perf_counter() - start
            results["gib"] = memory.gib
            size = f"{results['bytes'] / 1e9:.2f} GB on disk, {gib_text(memory.gib)} in memory"
            print(f"{size}, {results['first_seconds']:.1f} s to read them and search")
        else:
            results["bytes"] = index.bytes()
            print(f"{results['bytes'] / 1e9:.3f} GB on disk")
        results["exact"], exact = measure(index, version, queries, args.repeats, "exact")
        if not isinstance(index, FileIndex):
            start = clocks(index)
            index.approximate(version, args.dim)
            results["graph_seconds"], cpu = np.subtract(clocks(index), start)
            print(f"graph made in {results['graph_seconds']:.0f} s, of which a core computes {cpu:.0f} s")
            print(f"{index.bytes() / 1e9:.3f} GB on disk with it")
            results["graph"], found = measure(index, version, queries, args.repeats, "graph")
            for name, ids in found.items():
                pairs = zip(ids, exact[name], strict=True)
                results["graph"][name]["recall"] = recall = np.mean([np.isin(b, a).mean() for a, b in pairs])
                print(f"graph, {name}: recall@10 {recall:.3f}")
    return results


def fill(index, version, args, draw):
    """Add images of ten cameras, one a second -> what `clocks` says that it took, without the drawing."""
    spent, begin = np.zeros(2), datetime(2026, 1, 1)
    for first in progress(range(0, args.vectors, BATCH), desc="adding", unit="batch", leave=False):
        rows = range(first, min(first + BATCH, args.vectors))
        vectors = draw(np.array(rows) % args.people)
        entries = [
            Entry(f"/{i}.jpg", "0 0", "visible", camera(i, args), None, time_text(begin + timedelta(seconds=i)))
            for i in rows
        ]
        start = clocks(index)
        index.add(version, entries, vectors)
        spent += np.subtract(clocks(index), start)
    return spent


def camera(image, args):
    """One of ten. Each sees every person."""
    return str((image + image // args.people) % 10)


def measure(index, version, queries, repeats, kind):
    """-> ({name: {"seconds": median of a query}}, {name: ids of the ten nearest of some queries})."""
    results, found = {}, {}
    cases = {
        "all images": (Filter(), 1),
        "one camera of ten": (Filter(cameras=("3",)), 1),
        "100 queries at once": (Filter(), 100),
    }
    for name, (where, count) in cases.items():
        parts, found[name] = np.split(queries, len(queries) // count), []
        times = []
        for part in parts[:repeats]:
            start = clocks(index)
            lists = index.search(version, part, 10, where)
            times.append(np.subtract(clocks(index), start) / count)
            found[name] += [[image["id"] for image in images] for images in lists]
        seconds, cpu = np.median(times, axis=0)
        results[name] = {"seconds": seconds, "cpu_seconds": cpu}
        # On a busy machine, the cores' time says more.
        print(f"{kind}, {name}: {1000 * seconds:.1f} ms a query, of which a core computes {1000 * cpu:.1f} ms")
    return results, found


def clocks(index):
    """-> (time, seconds of the cores that this process and its server have used, if that is on this machine)."""
    cpu = time.process_time()
    if isinstance(index, ServerIndex):
        with contextlib.suppress(OSError):
            fields = (PROC / str(index.connection.info.backend_pid) / "stat").read_text().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), cpu


def _unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
