"""Recall and speed of an index with inverted lists."""

import itertools
import time

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from tools import index as image_index
from tools.benchmarks.measuring import PeakMemory, compare, gib_text, print_head
from utils import progress


def bench_search(args, device):
    """People are random directions; a vector is its person's plus Gaussian noise, so that two vectors of a person have
    the mean cosine that `--cosine` gives. Queries are further vectors of the same people."""
    generator, results = torch.Generator().manual_seed(0), {}
    centres = F.normalize(torch.randn(args.people, args.dim, generator=generator))

    def draw(people, cosine):
        noise = ((1 / cosine - 1) / args.dim) ** 0.5
        return F.normalize(centres[people] + noise * torch.randn(len(people), args.dim, generator=generator)).numpy()

    for cosine in args.cosine:
        queries = draw(torch.randint(args.people, (1000,), generator=generator), cosine)
        with PeakMemory() as memory:
            exact = faiss.IndexFlatIP(args.dim)
            people = (torch.arange(args.vectors) % args.people).split(image_index.BLOCK)
            for block in progress(people, desc="drawing", unit="block", leave=False):
                exact.add(draw(block, cosine))
            start = time.perf_counter()
            inverted = image_index.arrange(exact)
            seconds = time.perf_counter() - start
        print(
            f"cosine {cosine}: {args.vectors} x {args.dim}, {args.people} people, {inverted.nlist} lists, "
            f"{inverted.nprobe} probed; arranged in {seconds:.0f} s; at most {gib_text(memory.gib)}, with both"
        )
        recall = recalls(inverted, exact, queries)
        print(", ".join(f"recall@{k} {value:.4f}" for k, value in recall.items()))
        print_head()
        rows = [compare_queries(inverted, exact, queries, count, args.repeats, device) for count in (1, 100)]
        results[cosine] = {"rows": rows, "arrange_seconds": seconds, "peak_gib": memory.gib, "recall": recall}
    return {"by_cosine": results}


def recalls(inverted, exact, queries):
    """{k: share of the k nearest vectors that inverted lists find}."""
    pairs = [[index.search(part, 10)[1] for index in (inverted, exact)] for part in np.split(queries, 10)]
    rows = [np.concatenate(part) for part in zip(*pairs, strict=True)]
    return {k: np.mean([np.isin(*row).mean() for row in zip(*(r[:, :k] for r in rows), strict=True)]) for k in (1, 10)}


def compare_queries(inverted, exact, queries, count, repeats, device):
    def searching(index):
        blocks = itertools.cycle(np.split(queries, len(queries) // count))
        return lambda: index.search(next(blocks), 10)

    return compare(f"{count} at once: exact, inverted", searching(inverted), searching(exact), repeats, device)
