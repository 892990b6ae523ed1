"""Measure how fast things are here, beside the published recipe run plainly in the same process.

    python bench.py metrics

data     preparing SYSU-MM01's arrays (time, peak memory), then one epoch of sampler, loader and augmentation
loss     the aligned local loss, forward and backward, against a walk sample by sample
metrics  Rank-k, mAP and mINP against Python lists query by query; memory of a search straight from features
rerank   k-reciprocal re-ranking against plain loops over images

Each comparison warms up, repeats, takes turns with its baseline, and gives medians. The baselines live here only.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import re_rank
from ChannelAug import TrainAugmentation
from data_loader import IdentitySampler, sysu_train, train_loader
from data_manager import DATA_PATHS
from eval_metrics import CosineDistances, eval_regdb, eval_sysu
from loss import AlignedLocalLoss
from utils import ArgumentParser, InputError, check_output, cli, number, progress, save_json, select_device

REPO = Path(__file__).parent


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="prepare the data set's arrays anew; one epoch of loading and augmenting")
    data.add_argument("--data_path", default=DATA_PATHS["sysu"], help="folder of SYSU-MM01, or of demo data like it")
    data.add_argument("--img_h", type=number(int, 1), default=288, help="image height, pixels")
    data.add_argument("--img_w", type=number(int, 1), default=144, help="image width, pixels")
    data.add_argument("--workers", type=number(int, 0), default=4, help="loading processes, at most one a core")
    loss = commands.add_parser("loss", help="the aligned local loss against a walk sample by sample")
    metrics = commands.add_parser("metrics", help="the measures against Python lists query by query")
    metrics.add_argument("--queries", type=number(int, 1), default=20_000, help="of the search straight from features")
    metrics.add_argument("--gallery", type=number(int, 1), default=200_000, help="of the search straight from features")
    rerank = commands.add_parser("rerank", help="k-reciprocal re-ranking against plain loops over images")
    rerank.add_argument("--queries", type=number(int, 1), default=3803)
    rerank.add_argument("--gallery", type=number(int, 1), default=301)
    images = "images of an identity and modality in a batch"
    for command in (data, loss):
        command.add_argument("--batch_size", type=number(int, 2), default=8, help="identities in a batch")
        command.add_argument("--num_pos", type=number(int, 1), default=4, help=images)
    for command in (data, loss, metrics, rerank):
        command.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
        command.add_argument("--json", metavar="FILE", help="write the figures to this file")
        if command is not data:
            command.add_argument("--repeats", type=number(int, 1), default=5)
    return parser


def main(argv=None):
    """Returns the figures, a dict."""
    args = get_args_parser().parse_args(argv)
    if args.json:
        check_output(args.json)
    device = select_device(args.gpu)
    bench = {"data": bench_data, "loss": bench_loss, "metrics": bench_metrics, "rerank": bench_rerank}[args.command]
    figures = bench(args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": name, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    figures |= {"flags": vars(args), **machine}
    if args.json:
        save_json(figures, args.json)
    return figures


# ----------------------------------------------------------------------------------------------------------- measuring


def compare(name, ours, baseline, repeats, device):
    """Time both by turns -> {"name", "ours_seconds", "baseline_seconds", "ratio"}, medians; prints them.

    A turn is as many calls in a row as fill 50 ms, after two to warm up.
    """

    def seconds(function, calls):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    runs = []
    for function in (ours, baseline):
        seconds(function, 1)
        runs.append((function, max(1, int(0.05 / seconds(function, 1)))))
    turns = [[seconds(*run) for run in runs] for _ in progress(range(repeats), desc=name, unit="turn", leave=False)]
    mine, plain = (statistics.median(times) for times in zip(*turns, strict=True))
    print(f"{name:52}{1000 * plain:12.1f} ms{1000 * mine:12.2f} ms{plain / mine:9.1f} x")
    return {"name": name, "ours_seconds": mine, "baseline_seconds": plain, "ratio": plain / mine}


def print_head():
    print(f"{'':52}{'baseline':>15}{'ours':>15}{'ratio':>11}")


def peak_memory(process="self"):
    """Most memory that a process has held since it started, or since `reset_peak_memory`, in bytes; 0 if it has ended.

    From Linux's /proc: what `wait4` reports of a child is at least the memory of the process that started it.
    """
    high = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(high[1]) * 1024 if high else 0


def reset_peak_memory():
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


# ---------------------------------------------------------------------------------------------------------------- data


def bench_data(args, device):
    _, imported = run_measured("-c", "import pre_process_sysu")
    sizes = ["--img_h", str(args.img_h), "--img_w", str(args.img_w)]
    seconds, peak = run_measured("pre_process_sysu.py", "--data_path", os.path.abspath(args.data_path), *sizes)
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    images = sum(data.num_images)
    figures = {
        "prepared_images": images,
        "prepare_seconds": seconds,
        "prepare_images_per_second": images / seconds,
        "prepare_peak_gib": peak / 2**30,
        "prepare_peak_above_imports_gib": (peak - imported) / 2**30,
    }
    print(
        f"prepared {images} images in {seconds:.1f} s, {images / seconds:.0f} images/s; peak memory {peak / 2**30:.2f} "
        f"GiB, {(peak - imported) / 2**30:.2f} above the interpreter with its imports"
    )

    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    augment = TrainAugmentation(1, 0.5)
    loaded, start = 0, time.perf_counter()
    for visible, infrared, _ in progress(train_loader(data, sampler, args.workers), desc="epoch", unit="step"):
        views = augment(visible.to(device, non_blocking=True), infrared.to(device, non_blocking=True))
        loaded += sum(len(view) for view in views)
    float(views[0].sum())  # waits for the device
    seconds = time.perf_counter() - start
    print(f"an epoch: {len(sampler)} steps, {loaded} network inputs, {seconds:.1f} s, {loaded / seconds:.0f} a second")
    return {**figures, "epoch_steps": len(sampler), "epoch_inputs": loaded, "epoch_seconds": seconds}


def run_measured(*arguments):
    """Run Python with these arguments in the repo -> (seconds, peak memory in bytes)."""
    need_proc()
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPO)
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return time.perf_counter() - start, peak


# ---------------------------------------------------------------------------------------------------------------- loss


def bench_loss(args, device):
    n = 3 * args.batch_size * args.num_pos
    labels = torch.arange(args.batch_size, device=device).repeat_interleave(args.num_pos).repeat(3)
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(n, 2048, device=device, generator=generator)
    local = F.normalize(torch.randn(n, 128, 6, device=device, generator=generator), dim=1).requires_grad_()
    criterion = AlignedLocalLoss()

    def ours():
        local.grad = None
        criterion(features, labels, local).backward()

    def baseline():
        local.grad = None
        plain_aligned_loss(features, labels, local).backward()

    ours()
    expected = local.grad.clone()
    baseline()
    torch.testing.assert_close(local.grad, expected, rtol=1e-4, atol=1e-6)
    print_head()
    return compare(f"aligned local loss, {n} images, 6 stripes", ours, baseline, args.repeats, device)


def plain_aligned_loss(features, labels, local, margin=0.3):
    """The aligned local loss anchor by anchor, each walk step by step."""
    distances = torch.cdist(features, features)
    stripes, losses = local.transpose(1, 2), []
    for i in range(len(labels)):
        same = labels == labels[i]
        positive = distances[i].masked_fill(~same, -1).argmax()
        negative = distances[i].masked_fill(same, torch.inf).argmin()
        near, far = (plain_aligned_distance(stripes[i], stripes[j]) for j in (positive, negative))
        losses.append(F.relu(margin + near - far))
    return torch.stack(losses).mean()


def plain_aligned_distance(x, y):
    """x, y [P, C]."""
    local = torch.tanh((x[:, None] - y[None]).square().sum(dim=2).clamp_min(1e-12).sqrt() / 2)
    j = k = jumps = 0
    last = len(local) - 1
    total = local[0, 0]
    while (j, k) != (last, last):
        right = min(((local[j, m].item(), m) for m in range(k + 1, last + 1)), default=(torch.inf, 0))
        below = min(((local[m, k].item(), m) for m in range(j + 1, last + 1)), default=(torch.inf, 0))
        j, k = (j, right[1]) if right[0] <= below[0] else (below[1], k)
        total = total + local[j, k]
        jumps += 1
    return total / jumps


# ------------------------------------------------------------------------------------------------------------- metrics


def bench_metrics(args, device):
    need_proc()
    print_head()
    rows = []
    for queries, images, people, evaluate in (
        (3803, 301, 96, eval_sysu),
        (2060, 2060, 206, eval_regdb),
        (3803, 3010, 96, eval_sysu),
    ):
        rng = np.random.default_rng(0)
        distances = rng.normal(size=(queries, images)).astype(np.float32)
        labels = [np.sort(rng.integers(0, people, n)) for n in (queries, images)]
        if evaluate is eval_sysu:
            labels += [rng.choice([3, 6], queries), rng.choice([1, 2, 4, 5], images)]
        there = torch.from_numpy(distances).to(device)
        for name, plain in (("Python lists", plain_metrics), ("a lean loop", lean_metrics)):
            for mine, theirs in zip(evaluate(there, *labels), plain(distances, *labels), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-9)
            title = f"{evaluate.__name__}, {queries} x {images}, against {name}"
            run = partial(evaluate, there, *labels), partial(plain, distances, *labels)
            rows.append(compare(title, *run, args.repeats, device))

    rng = torch.Generator(device).manual_seed(0)
    query, gallery = (
        F.normalize(torch.randn(n, 512, device=device, generator=rng)) for n in (args.queries, args.gallery)
    )
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, args.gallery // 100 + 1, n) for n in (args.queries, args.gallery)]
    cameras = draw.choice([3, 6], args.queries), draw.choice([1, 2, 4, 5], args.gallery)
    before, start = reset_peak_memory(), time.perf_counter()
    eval_sysu(CosineDistances(query, gallery), *ids, *cameras)
    seconds, above = time.perf_counter() - start, (peak_memory() - before) / 2**30
    print(f"straight from features, {args.queries} x {args.gallery} x 512: {seconds:.1f} s, {above:.2f} GiB above them")
    return {"comparisons": rows, "from_features_seconds": seconds, "from_features_gib_above_inputs": above}


def plain_metrics(distances, q_pids, g_pids, q_camids=None, g_camids=None, max_rank=20):
    """Query by query, on Python lists of the whole ranked gallery, as the published code goes about it.

    With cameras SYSU-MM01's measure, without them RegDB's. They differ in two ways: SYSU-MM01 hides camera 2
    from queries of camera 3, and its CMC counts identities, of which only the first image takes a rank.
    """
    curves, precisions, penalties = [], [], []
    for q, order in enumerate(np.argsort(distances, axis=1, kind="stable")):
        if q_camids is not None:
            order = [g for g in order if not (q_camids[q] == 3 and g_camids[g] == 2)]
        ranked = [g_pids[g] for g in order]
        if q_pids[q] not in ranked:
            continue
        candidates = ranked if q_camids is None else list(dict.fromkeys(ranked))
        found = np.cumsum([pid == q_pids[q] for pid in candidates])[:max_rank].clip(max=1)
        curves.append(np.append(found, [found[-1]] * (max_rank - len(found))))
        match = np.array([pid == q_pids[q] for pid in ranked])
        precision = np.array([hits / (i + 1) for i, hits in enumerate(match.cumsum())])
        precisions.append((precision * match).sum() / match.sum())
        penalties.append(match.sum() / (np.flatnonzero(match).max() + 1))
    return np.mean(curves, axis=0), np.mean(precisions), np.mean(penalties)


def lean_metrics(distances, q_pids, g_pids, q_camids=None, g_camids=None, max_rank=20):
    """Query by query, on NumPy arrays, with no more work than a query needs."""
    curve, precisions, penalties = np.zeros(max_rank), [], []
    for q, row in enumerate(distances):
        order = np.argsort(row, kind="stable")
        if q_camids is not None and q_camids[q] == 3:
            order = order[g_camids[order] != 2]
        ranked = g_pids[order]
        at = np.flatnonzero(ranked == q_pids[q])
        if not len(at):
            continue
        first = at[0] if q_camids is None else len(np.unique(ranked[: at[0]]))
        curve[first:] += 1
        precisions.append((np.arange(1, len(at) + 1) / (at + 1)).mean())
        penalties.append(len(at) / (at[-1] + 1))
    return curve / len(precisions), np.mean(precisions), np.mean(penalties)


# -------------------------------------------------------------------------------------------------------------- rerank


def bench_rerank(args, device):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(96, 512, generator=generator)

    def draw(n):
        people = torch.arange(n) * 96 // n
        return F.normalize(centres[people] + 1.5 * torch.randn(n, 512, generator=generator))

    query, gallery = draw(args.queries), draw(args.gallery)
    there = query.to(device), gallery.to(device)
    expected = plain_k_reciprocal(query.numpy(), gallery.numpy())
    np.testing.assert_allclose(re_rank.k_reciprocal(*there).cpu(), expected, rtol=0, atol=1e-5)
    print_head()
    return compare(
        f"k-reciprocal, {args.queries} + {args.gallery}",
        lambda: re_rank.k_reciprocal(*there),
        lambda: plain_k_reciprocal(query.numpy(), gallery.numpy()),
        args.repeats,
        device,
    )


def plain_k_reciprocal(query, gallery, k1=20, k2=6, lambda_value=0.3):
    """Zhong et al.'s re-ranking image by image on dense arrays, as the published code goes about it."""
    features = np.concatenate([query, gallery])
    total, queries = len(features), len(query)
    norms = (features**2).sum(axis=1)
    distances = np.maximum(norms[:, None] + norms - 2 * features @ features.T, 0)
    distances /= distances.max(axis=1, keepdims=True)
    ranked = np.argsort(distances, axis=1)

    def reciprocal(i, k):
        forward = ranked[i, : k + 1]
        return forward[(ranked[forward, : k + 1] == i).any(axis=1)]

    codes = np.zeros((total, total), np.float32)
    for i in range(total):
        near = expanded = reciprocal(i, k1)
        for j in near:
            theirs = reciprocal(j, round(k1 / 2))
            if len(np.intersect1d(theirs, near)) > 2 / 3 * len(theirs):
                expanded = np.append(expanded, theirs)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[i, expanded])
        codes[i, expanded] = weights / weights.sum()
    codes = np.stack([codes[ranked[i, :k2]].mean(axis=0) for i in range(total)])

    having = [np.flatnonzero(codes[:, n]) for n in range(total)]
    result = np.empty((queries, total - queries), np.float32)
    for i in range(queries):
        least = np.zeros(total, np.float32)
        for n in np.flatnonzero(codes[i]):
            least[having[n]] += np.minimum(codes[i, n], codes[having[n], n])
        result[i] = 1 - (least / (2 - least))[queries:]
    return (1 - lambda_value) * result + lambda_value * distances[:queries, queries:]


def need_proc():
    if not Path("/proc/self/status").exists():
        raise InputError(f"{sys.platform}: has no /proc to read the peak memory from; run this on Linux")


if __name__ == "__main__":
    cli(main)
