"""Metrics, re-ranking, and a whole test from image files."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ChannelAug import normalise
from datasets import sysu_searches
from eval_metrics import eval_regdb, eval_sysu
from model import GFMNet
from testing import engine, evaluation, re_rank
from testing.results import scores
from tools.benchmarks.measuring import compare
from tools.benchmarks.plain import lean_metrics, plain_extract, plain_k_reciprocal, plain_metrics, plain_test
from utils import seed_everything

PROBLEMS = ((3803, 301, 96, eval_sysu), (2060, 2060, 206, eval_regdb), (3803, 3010, 96, eval_sysu))


def bench_metrics(args, device):
    """The metrics against Python lists query by query, and against a lean loop."""
    rows = []
    for queries, images, people, evaluate in PROBLEMS:
        rng = np.random.default_rng(0)
        distances = rng.normal(size=(queries, images)).astype(np.float32)
        labels = [np.sort(rng.integers(0, people, n)) for n in (queries, images)]
        if evaluate is eval_sysu:
            labels += [rng.choice([3, 6], queries), rng.choice([1, 2, 4, 5], images)]
        run = partial(evaluate, torch.from_numpy(distances).to(device), *labels)
        for name, baseline in (("Python lists", plain_metrics), ("a lean loop", lean_metrics)):
            baseline = partial(baseline, distances, *labels)
            for ours, plain in zip(run(), baseline(), strict=True):
                np.testing.assert_allclose(ours, plain, rtol=1e-9)
            title = f"{evaluate.__name__}, {queries} x {images}, against {name}"
            rows.append(compare(title, run, baseline, args.repeats, device))
    return {"comparisons": rows}


def bench_test(args, device):
    """From image files to metrics, against reading the files again for each gallery."""
    test, size = sysu_searches(args.data_path, mode=("all", "indoor")), (args.img_h, args.img_w)
    seed_everything(0)
    net, plain_net = (GFMNet(395, args.arch).to(device).eval() for _ in range(2))
    plain_net.load_state_dict(net.state_dict())
    net.to(memory_format=torch.channels_last)
    embed = engine.network_embedding(net, device, normalise, args.amp)

    def ours():
        features = evaluation.embed_images(embed, test.paths, size, args)
        return features, [scores(engine.run_search(features, s)["FC", "none"]) for s in test.searches]

    features, metrics = ours()
    images = {modality: len(paths) for modality, paths in test.paths.items()}
    if args.amp == "off":
        expected = plain_extract(plain_net, test.paths["infrared"][:64], "infrared", size, 0, device)
        np.testing.assert_allclose(features["infrared"]["FC"][:64].cpu().numpy(), expected, rtol=0, atol=1e-3)
    name = f"test: {images['infrared']} queries, {images['visible']} images in {len(metrics)} galleries, {args.amp}"
    baseline = partial(plain_test, plain_net, test, size, args.workers, device)
    results = compare(name, ours, baseline, args.repeats, device)
    return results | {"images": images, "images_per_second": sum(images.values()) / results["ours_seconds"]}


def bench_rerank(args, device):
    """k-reciprocal re-ranking against loops over images."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(96, 512, generator=generator)

    def draw(n):
        people = torch.arange(n) * 96 // n
        return F.normalize(centres[people] + 1.5 * torch.randn(n, 512, generator=generator))

    features = draw(args.queries), draw(args.gallery)
    ours = partial(re_rank.k_reciprocal, *(x.to(device) for x in features))
    baseline = partial(plain_k_reciprocal, *(x.numpy() for x in features))
    np.testing.assert_allclose(ours().cpu(), baseline(), rtol=0, atol=1e-5)
    return compare(f"k-reciprocal, {args.queries} + {args.gallery}", ours, baseline, args.repeats, device)
