"""Measure how fast things are here, beside the published recipe run plainly in the same process.

    python -m tools.bench metrics

data     preparing SYSU-MM01's arrays (time, peak memory), then one epoch of sampler, loader and augmentation
step     training steps against the published recipe run plainly; where a step's time goes
loss     the aligned local loss, forward and backward, against a walk sample by sample
metrics  Rank-k, mAP and mINP against Python lists query by query; memory of a search straight from features
test     SYSU-MM01's test from image files to the measures, both modes, against a pass over the files for each gallery
rerank   k-reciprocal re-ranking against plain loops over images
search   inverted lists against exact search: recall, and time a query
gpu      everything that is to be known of a GPU, tests first, into one file

Each comparison warms up, repeats, takes turns with its baseline, and gives medians. The baselines live here only.
"""

import contextlib
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from ChannelAug import ERASE_FILL, GRAY, MEAN, STD, TrainAugmentation, normalise
from core import engine, re_rank
from core.files import check_output, save_json
from data_loader import (
    CACHES,
    CachedBatches,
    IdentitySampler,
    TrainData,
    eval_loader,
    sysu_train,
    train_loader,
    write_images,
)
from data_manager import DATA_PATHS, SYSU_VISIBLE, read_ids, sysu_images, sysu_test
from eval_metrics import CosineDistances, eval_regdb, eval_sysu
from loss import AlignedLocalLoss, Losses, MethodLoss, SquaredTripletLoss
from model import ARCHS, GFMNet
from tools import index as image_index
from utils import ArgumentParser, InputError, autocast, bounded, cli, cores, progress, seed_everything, select_device

REPO = Path(__file__).parent.parent
SCALING_IMAGES, SCALING_REPEATS = 2000, 3  # prepared on all cores and on one
GPU_STAGES = ("tests", "step", "loss", "metrics", "rerank", "data", "train")


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="prepare the data set's arrays anew; one epoch of loading and augmenting")
    step = commands.add_parser("step", help="training steps, on random images, against the plain recipe")
    step.add_argument("--compile", action="store_true", help="compile the network's steps with torch.compile")
    step.add_argument("--steps", type=bounded(int, 1), default=10, help="steps of a turn")
    test = commands.add_parser("test", help="from image files to the measures, against ten extractions of a gallery")
    loss = commands.add_parser("loss", help="the aligned local loss against a walk sample by sample")
    metrics = commands.add_parser("metrics", help="the measures against Python lists query by query")
    metrics.add_argument("--queries", type=bounded(int, 1), default=20_000, help="of the search straight from features")
    metrics.add_argument(
        "--gallery", type=bounded(int, 1), default=200_000, help="of the search straight from features"
    )
    rerank = commands.add_parser("rerank", help="k-reciprocal re-ranking against plain loops over images")
    rerank.add_argument("--queries", type=bounded(int, 1), default=3803)
    rerank.add_argument("--gallery", type=bounded(int, 1), default=301)
    search = commands.add_parser("search", help="inverted lists against exact search, in made-up vectors")
    search.add_argument("--vectors", type=bounded(int, 1000), default=1_000_000)
    search.add_argument("--people", type=bounded(int, 1), default=20_000, help="clusters of the vectors")
    search.add_argument("--dim", type=bounded(int, 2), default=512)
    cosine = bounded(float, 0.01, 0.99)
    search.add_argument("--cosine", type=cosine, nargs="+", default=[0.3, 0.45, 0.6], help="of two vectors of a person")
    gpu = commands.add_parser("gpu", help="the GPU tests, then every measurement on the GPU, each as a process")
    gpu.add_argument("--out", required=True, metavar="FILE", help="write all figures to this file, after each stage")
    gpu.add_argument("--only", nargs="+", choices=GPU_STAGES, default=GPU_STAGES, help="these stages only")
    gpu.add_argument("--like", metavar="FILE", help="test at the full size of SYSU-MM01, by its rand_perm_cam.mat")
    gpu.add_argument("--timeout", type=bounded(int, 1), default=540, help="seconds after which a process is given up")
    gpu.add_argument("--gpu", default="0", help="number of the GPU")
    for command in (data, step):
        command.add_argument(
            "--cache", choices=CACHES, default="auto", help="where the images are kept, as in training"
        )
    for command in (data, test):
        command.add_argument("--data_path", default=DATA_PATHS["sysu"], help="folder of SYSU-MM01, or of demo data")
    for command in (step, test):
        command.add_argument("--arch", choices=ARCHS, default="resnet50")
        command.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision of the network")
    for command in (data, step, test):
        command.add_argument("--img_h", type=bounded(int, 48), default=288, help="image height, pixels")
        command.add_argument("--img_w", type=bounded(int, 16), default=144, help="image width, pixels")
        command.add_argument("--workers", type=bounded(int, 0), default=4, help="loading processes, at most one a core")
    images = "images of an identity and modality in a batch"
    for command in (data, step, loss):
        command.add_argument("--batch_size", type=bounded(int, 2), default=8, help="identities in a batch")
        command.add_argument("--num_pos", type=bounded(int, 1), default=4, help=images)
    for command in (data, step, loss, metrics, test, rerank):
        command.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    search.set_defaults(gpu="cpu")
    for command in (data, step, loss, metrics, test, rerank, search):
        command.add_argument("--json", metavar="FILE", help="write the figures to this file")
        if command is not data:
            command.add_argument("--repeats", type=bounded(int, 1), default=5)
    return parser


def main(argv=None):
    """Returns the figures, a dict."""
    args = get_args_parser().parse_args(argv)
    if args.command == "gpu":
        return bench_gpu(args)
    if args.json:
        check_output(args.json)
    device = select_device(args.gpu, getattr(args, "amp", "off"))
    figures = {
        "data": bench_data,
        "step": bench_step,
        "loss": bench_loss,
        "metrics": bench_metrics,
        "test": bench_test,
        "rerank": bench_rerank,
        "search": bench_search,
    }[args.command](args, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": name, "cores": cores(), "python": platform.python_version(), "torch": torch.__version__}
    figures |= {"flags": vars(args), **machine}
    if args.json:
        save_json(figures, args.json)
    return figures


# ----------------------------------------------------------------------------------------------------------- measuring


def median_seconds(function, device, calls, repeats=5):
    """Of one of `calls` in a row, after two such rows to warm up."""
    return statistics.median([seconds(function, calls, device) for _ in range(repeats + 2)][2:])


def seconds(function, calls, device):
    """Seconds of one of several calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def compare(name, ours, baseline, repeats, device, per=1, before=lambda: None):
    """Time both by turns -> {"name", "ours_seconds", "baseline_seconds", "ratio"}, medians; prints them.

    per: what one call does so many times; the seconds are of one. before: called, untimed, before each turn.

    A turn is as many calls in a row as fill 50 ms, after two to warm up (one, if that takes a second).
    """

    runs = []
    for function in (ours, baseline):
        calls = 1
        if seconds(function, 1, device) < 1:
            calls = max(1, int(0.05 / seconds(function, 1, device)))
        runs.append((function, calls, device))

    def turn(run):
        before()
        return seconds(*run)

    turns = [[turn(run) for run in runs] for _ in progress(range(repeats), desc=name, unit="turn", leave=False)]
    mine, plain = (statistics.median(times) / per for times in zip(*turns, strict=True))
    print(f"{name:52}{1000 * plain:12.1f} ms{1000 * mine:12.2f} ms{plain / mine:9.1f} x")
    return {"name": name, "ours_seconds": mine, "baseline_seconds": plain, "ratio": plain / mine}


def print_head():
    print(f"{'':52}{'baseline':>15}{'ours':>15}{'ratio':>11}")


CPU = torch.device("cpu")


def reset_peak_memory(device=CPU):
    """-> the memory that is held now, in bytes: by this process, or on a GPU by PyTorch's tensors."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device=CPU):
    """The most memory that was held since `reset_peak_memory`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def tree_memory(process):
    """What a process and those that it started hold now, in bytes; pages that some share count once among them."""
    folder, total = Path(f"/proc/{process}"), 0
    with contextlib.suppress(OSError):  # it may end while it is looked at
        total = 1024 * int(re.search(r"Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text())[1])
        children = " ".join(file.read_text() for file in folder.glob("task/*/children"))
        total += sum(tree_memory(child) for child in children.split())
    return total


# ---------------------------------------------------------------------------------------------------------------- data


def bench_data(args, device):
    _, imported = run_measured("-c", "import pre_process_sysu")
    sizes = ["--img_h", str(args.img_h), "--img_w", str(args.img_w)]
    taken, peak = run_measured("pre_process_sysu.py", "--data_path", os.path.abspath(args.data_path), *sizes)
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    images = sum(data.num_images)
    figures = {
        "prepared_images": images,
        "prepare_seconds": taken,
        "prepare_images_per_second": images / taken,
        "prepare_peak_gib": peak / 2**30,
        "prepare_peak_above_imports_gib": (peak - imported) / 2**30,
    }
    print(
        f"prepared {images} images in {taken:.1f} s, {images / taken:.0f} images/s; peak memory {peak / 2**30:.2f} "
        f"GiB, {(peak - imported) / 2**30:.2f} above the interpreter with its imports"
    )
    ids = [identity for split in ("train", "val") for identity in read_ids(args.data_path, split)]
    paths = sysu_images(args.data_path, ids, SYSU_VISIBLE["all"])[0][:SCALING_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        out, size = Path(folder) / "images.npy", (args.img_h, args.img_w)
        runs = [partial(write_images, paths, size, out, "preparing", count) for count in (cores(), 1)]
        print_head()
        row = compare(f"preparing {len(paths)} images, all cores, one core", *runs, SCALING_REPEATS, device)
    figures["prepare_scaling"] = row

    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    augment = TrainAugmentation(1, 0.5)
    loader = train_loader(data, sampler, args.workers, device, args.cache)
    next(iter(loader))  # starts the loading processes
    loaded, start = 0, time.perf_counter()
    for batch in progress(loader, desc="epoch", unit="step"):
        visible, _, labels = augment(*(x.to(device, non_blocking=True) for x in batch))
        loaded += len(labels)
    float(visible.sum())  # waits for the device
    taken = time.perf_counter() - start
    print(f"an epoch: {len(sampler)} steps, {loaded} network inputs, {taken:.1f} s, {loaded / taken:.0f} a second")
    return {**figures, "epoch_steps": len(sampler), "epoch_inputs": loaded, "epoch_seconds": taken}


def run_measured(*arguments):
    """Run Python with these arguments in the repo -> (seconds, peak memory in bytes, of all its processes)."""
    need_proc()
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPO)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return time.perf_counter() - start, peak


# ---------------------------------------------------------------------------------------------------------------- step


def bench_step(args, device):
    size, people = (args.img_h, args.img_w), max(64, args.batch_size)
    rng = np.random.default_rng(0)
    visible, infrared = (rng.integers(0, 256, (8 * people, *size, 3), np.uint8) for _ in range(2))
    labels = np.arange(people).repeat(8)
    data = TrainData(visible, labels, infrared, labels)
    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    seed_everything(0)
    net, plain_net = (GFMNet(people, args.arch).to(device) for _ in range(2))
    # Rates so low that random images do not make the networks diverge.
    sgd = partial(torch.optim.SGD, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4)

    loader = train_loader(data, sampler, args.workers, device, args.cache)
    batches = endless(loader)
    net.to(memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    criterion, augment = MethodLoss("adp"), TrainAugmentation(1, 0.5)
    optimizer = sgd(net.parameters(), fused=True)

    def train(model=net, augment=augment):
        steps = islice(batches, args.steps)
        engine.train_epoch(model, criterion, optimizer, steps, augment, device, args.amp)

    plain_batches = endless(
        DataLoader(
            PlainPairs(data, sampler, size),
            args.batch_size * args.num_pos,
            num_workers=min(args.workers, cores()),
            persistent_workers=args.workers > 0,
            pin_memory=device.type == "cuda",
        )
    )
    plain_optimizer = sgd(plain_net.parameters())

    def train_plainly(criterion=plain_loss):
        for batch in islice(plain_batches, args.steps):
            plain_step(plain_net, criterion, plain_optimizer, batch, device)

    def use_up_queues():
        """Loading processes work ahead while the other side has its turn."""
        for waiting in (batches, plain_batches):
            for _ in islice(waiting, 2 * args.workers):
                pass

    visible, infrared, labels = augment(*(x.to(device) for x in next(batches)))
    output = net(visible, infrared)
    for plain, mine in zip(plain_loss(output, labels), criterion(output, labels), strict=True):
        torch.testing.assert_close(plain, mine, rtol=1e-4, atol=1e-6)
    print_head()
    inputs = 3 * args.batch_size * args.num_pos
    name = f"{args.arch}, {inputs} images {size[0]}x{size[1]}, {args.amp}{', compiled' * args.compile}"
    turns = {"repeats": args.repeats, "device": device, "per": args.steps, "before": use_up_queues}
    figures = compare(f"step: {name}", train, train_plainly, **turns)
    figures["images_per_second"] = inputs / figures["ours_seconds"]
    figures["with_our_loss"] = compare(
        "against the plain step with our loss", train, partial(train_plainly, criterion), **turns
    )
    if device.type == "cuda":
        del plain_net, plain_optimizer, output
        torch.cuda.empty_cache()
        reset_peak_memory(device)
        train()
        cached = sum(x.nbytes for x in loader.images) if isinstance(loader, CachedBatches) else 0
        figures["peak_gib_without_cache"] = (peak_memory(device) - cached) / 2**30
        print(f"peak memory without the cached images: {figures['peak_gib_without_cache']:.1f} GiB")
    budget = step_budget(train, net, criterion, augment, optimizer, device)
    uncompiled = GFMNet(people, args.arch).to(device)
    floors = step_floors(uncompiled, criterion, (visible, infrared), labels, args.amp)
    if device.type == "cuda":
        budget["gaps, the device waiting (part of the above)"] = device_gaps(train) / args.steps
    print("where a step's time goes, and how fast it could be:")
    for part, seconds in (budget | floors["seconds"]).items():
        print(f"  {part:60}{1000 * seconds:10.2f} ms{seconds / figures['ours_seconds']:8.1%}")
    return figures | {"budget_seconds": budget, "floors": floors}


def endless(loader):
    while True:
        yield from loader


class PlainPairs(Dataset):
    """The sampler's images pair by pair, each augmented on its own, by torchvision."""

    def __init__(self, data, sampler, size):
        self.data, self.pairs = data, np.concatenate([np.stack(batch, axis=1) for batch in sampler])
        moved = [
            transforms.ToPILImage(),
            transforms.Pad(10),
            transforms.RandomCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
        normalised = transforms.Normalize(MEAN, STD)
        erased = transforms.RandomErasing(0.5, (0.02, 0.4), (0.3, 10 / 3), ERASE_FILL)
        self.augment_plain = transforms.Compose([*moved, erased, normalised])
        self.augment = transforms.Compose([*moved, normalised, erased])

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        visible, infrared = self.pairs[index]
        plain, second = (augment(self.data.visible[visible]) for augment in (self.augment_plain, self.augment))
        other = self.augment(self.data.infrared[infrared])
        case = random.randrange(8)
        if case < 6:
            other = other[[case // 2] * 3]
        elif case == 6:
            other = (other * torch.tensor(GRAY).view(3, 1, 1)).sum(dim=0).expand(3, -1, -1)
        return plain, second[[random.randrange(3)] * 3], other, self.data.visible_labels[visible]


def plain_step(net, criterion, optimizer, batch, device):
    """In float32 (on a GPU, PyTorch runs its convolutions in TF32), reading the loss as published."""
    plain, second, infrared, labels = (x.to(device) for x in batch)
    loss = criterion(net(torch.cat([plain, second]), infrared), labels.repeat(3)).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def plain_loss(output, labels):
    """GFMNet's whole loss, the local part of it anchor by anchor."""
    identity = F.cross_entropy(output.logits, labels)
    triplet, correct = SquaredTripletLoss()(output.pooled, labels)
    local = plain_aligned_loss(output.pooled, labels, output.local)
    return Losses(identity + triplet + 0.5 * local, identity, triplet, local, correct / len(labels))


class Timed(torch.nn.Module):
    """Marks the time before and after each call."""

    def __init__(self, inner, mark):
        super().__init__()
        self.inner, self.mark = inner, mark

    def forward(self, *inputs):
        self.mark()
        result = self.inner(*inputs)
        self.mark()
        return result


def step_budget(train, model, criterion, augment, optimizer, device):
    """Median seconds of each part of the steps that `train(model, augment)` makes.

    On a GPU, on its own clock: a part ends when the device has done it. Copying batches there is part of the loading.
    """
    marks = []

    def mark(*_):
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    hooks = [criterion.register_forward_pre_hook(mark), criterion.register_forward_hook(mark)]
    hooks += [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    train(Timed(model, mark), Timed(augment, mark))
    for hook in hooks:
        hook.remove()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        spans = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    else:
        spans = [b - a for a, b in pairwise(marks)]
    # Eight marks a step, and so eight spans, of which the last reaches to the next step.
    parts = [statistics.median(spans[i::8]) for i in range(8) if spans[i::8]]
    augmentation, _, forward, _, loss, backward, step, *loading = parts
    return {
        "loading": sum(loading),
        "augmentation": augmentation,
        "forward": forward,
        "loss": loss,
        "backward": backward,
        "optimiser": step,
    }


def device_gaps(function):
    """Seconds during which the GPU does nothing, between the first and the last thing that a function has it do."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    idle, busy_until = 0, spans[0][1]
    for begin, end in spans:
        idle += max(0, begin - busy_until)
        busy_until = max(busy_until, end)
    return idle / 1e6


def step_floors(net, criterion, views, labels, amp):
    """What a step computes and moves, and the seconds that this takes at the rates measured on the same device.

    Floating-point operations of convolutions and products, by PyTorch's counter. Moved: each layer reads its input and
    writes its output once, and its backward twice as much; where layers are fused, it is less.
    """
    device = labels.device
    dtype, moved = torch.bfloat16 if amp == "bf16" else torch.float32, []
    layers = [module for module in net.modules() if not [*module.children()]]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: moved.append(inputs[0].numel() + output.numel()))
        for layer in layers
    ]
    with FlopCounterMode(display=False) as counter, autocast(device, amp):
        criterion(net(*views), labels).total.backward()
    for hook in hooks:
        hook.remove()
    net.zero_grad()
    flop, size = counter.get_total_flops(), 3 * sum(moved) * dtype.itemsize

    side, calls = (8192, 20) if device.type == "cuda" else (2048, 2)
    a = torch.randn(side, side, device=device, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions
    flop_rate = 2 * side**3 / median_seconds(lambda: a @ a, device, calls)
    torch.backends.cuda.matmul.allow_tf32 = before
    copy = a.repeat(4, 1)
    other = torch.empty_like(copy)
    byte_rate = 2 * copy.nbytes / median_seconds(lambda: other.copy_(copy), device, calls)
    return {
        "flop": flop,
        "gflop_per_image": flop / len(labels) / 1e9,
        "flop_per_second": flop_rate,
        "bytes": size,
        "bytes_per_second": byte_rate,
        "seconds": {
            f"arithmetic alone: {flop / 1e12:.2f} TFLOP at {flop_rate / 1e12:.1f} TFLOP/s": flop / flop_rate,
            f"memory alone, unfused: {size / 1e9:.1f} GB at {byte_rate / 1e9:.0f} GB/s": size / byte_rate,
        },
    }


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
    if device.type == "cpu":
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
    before, start = reset_peak_memory(device), time.perf_counter()
    eval_sysu(CosineDistances(query, gallery), *ids, *cameras)
    taken, above = time.perf_counter() - start, (peak_memory(device) - before) / 2**30
    print(f"straight from features, {args.queries} x {args.gallery} x 512: {taken:.1f} s, {above:.2f} GiB above them")
    return {"comparisons": rows, "from_features_seconds": taken, "from_features_gib_above_inputs": above}


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


# ---------------------------------------------------------------------------------------------------------------- test


def bench_test(args, device):
    size = (args.img_h, args.img_w)
    seed_everything(0)
    net, plain_net = (GFMNet(395, args.arch).to(device).eval() for _ in range(2))
    plain_net.load_state_dict(net.state_dict())
    net.to(memory_format=torch.channels_last)
    embed = engine.network_embedding(net, device, normalise, args.amp)

    def ours():
        test = sysu_test(args.data_path, SYSU_VISIBLE)
        loaders = {m: eval_loader(paths, size, 64, args.workers) for m, paths in test.paths.items()}
        features = {m: engine.extract(embed, loader, m, f"embedding {m}") for m, loader in loaders.items()}
        return test, features, [engine.scores(engine.run_search(features, s)["FC", "none"]) for s in test.searches]

    def baseline():
        return plain_test(plain_net, sysu_test(args.data_path, SYSU_VISIBLE), size, args.workers, device)

    test, features, scores = ours()
    images = {modality: len(paths) for modality, paths in test.paths.items()}
    first = eval_loader(test.paths["infrared"][:64], size, 64, 0)
    expected = plain_extract(plain_net, "infrared", first, device)
    if args.amp == "off":
        np.testing.assert_allclose(features["infrared"]["FC"][:64].cpu().numpy(), expected, rtol=0, atol=1e-3)
    name = f"test: {images['infrared']} queries, {images['visible']} images in {len(scores)} galleries, {args.amp}"
    print_head()
    figures = compare(name, ours, baseline, args.repeats, device)
    return figures | {"images": images, "images_per_second": sum(images.values()) / figures["ours_seconds"]}


def plain_test(net, test, size, workers, device):
    """Queries once a mode, the gallery anew for each trial, both from the files; then query by query."""
    mode, query, results = None, None, []
    for search in test.searches:
        if search.setting["mode"] != mode:
            mode, query = search.setting["mode"], plain_features(net, test, search.query, size, workers, device)
        gallery = plain_features(net, test, search.gallery, size, workers, device)
        (_, _, q_ids, q_cameras), (_, _, g_ids, g_cameras) = search.query, search.gallery
        results.append(plain_metrics(-query @ gallery.T, q_ids, g_ids, q_cameras, g_cameras))
    return results


def plain_features(net, test, images, size, workers, device):
    paths = [test.paths[images.modality][row] for row in images.rows]
    return plain_extract(net, images.modality, eval_loader(paths, size, 64, workers), device)


@torch.no_grad()
def plain_extract(net, modality, loader, device):
    features = []
    for images in loader:
        images = normalise(images.to(device)).contiguous()
        views = [net.embed(view, modality)[1] for view in (images, images.flip(3))]
        features.append(F.normalize(views[0] + views[1]).cpu())
    return torch.cat(features).numpy()


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


# -------------------------------------------------------------------------------------------------------------- search


def bench_search(args, device):  # FAISS's build for CPUs
    """People are random directions; each vector is its person's plus Gaussian noise, so that two of a person have the
    cosine asked for on average. Queries are further vectors of the same people."""
    need_proc()
    generator, figures = torch.Generator().manual_seed(0), {}
    centres = F.normalize(torch.randn(args.people, args.dim, generator=generator))

    def draw(people, cosine):
        noise = ((1 / cosine - 1) / args.dim) ** 0.5
        return F.normalize(centres[people] + noise * torch.randn(len(people), args.dim, generator=generator)).numpy()

    for cosine in args.cosine:
        queries, before = draw(torch.randint(args.people, (1000,), generator=generator), cosine), reset_peak_memory()
        exact = faiss.IndexFlatIP(args.dim)
        people = (torch.arange(args.vectors) % args.people).split(image_index.BLOCK)
        for block in progress(people, desc="drawing", unit="block", leave=False):
            exact.add(draw(block, cosine))
        start = time.perf_counter()
        inverted = image_index.arrange(exact)
        arranged, peak = time.perf_counter() - start, (peak_memory() - before) / 2**30
        print(
            f"cosine {cosine}: {args.vectors} x {args.dim}, {args.people} people, {inverted.nlist} lists, "
            f"{inverted.nprobe} probed; arranged in {arranged:.0f} s; at most {peak:.2f} GiB, with both"
        )
        pairs = [[index.search(part, 10)[1] for index in (inverted, exact)] for part in np.split(queries, 10)]
        found, wanted = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
        recall = {
            k: np.mean([np.isin(*row).mean() for row in zip(found[:, :k], wanted[:, :k], strict=True)]) for k in (1, 10)
        }
        print(", ".join(f"recall@{k} {value:.4f}" for k, value in recall.items()))
        print_head()
        rows = []
        for count in (1, 100):
            blocks = [itertools.cycle(np.split(queries, 1000 // count)) for _ in range(2)]
            runs = [
                lambda index=index, blocks=mine: index.search(next(blocks), 10)
                for index, mine in zip((inverted, exact), blocks, strict=True)
            ]
            rows.append(compare(f"{count} at once: exact, inverted", *runs, args.repeats, CPU))
        figures[cosine] = {"rows": rows, "arrange_seconds": arranged, "peak_gib": peak, "recall": recall}
    return {"by_cosine": figures}


# ----------------------------------------------------------------------------------------------------------------- gpu


def bench_gpu(args):
    """Each measurement as a process of its own, so that one which fails leaves the others.

    `--out` keeps the stages of earlier calls: several calls with `--only` make one file where time is short. Ends with
    status 1 if anything failed.
    """
    out = Path(args.out)
    check_output(out)
    if not torch.cuda.is_available():
        raise InputError("gpu: PyTorch sees no CUDA device here; run it where there is one")
    if args.like and not Path(args.like).is_file():
        raise InputError(f"--like {args.like}: no such file; give SYSU-MM01's rand_perm_cam.mat, or leave it out")
    results = json.loads(out.read_text()) if out.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        for name, commands, files in gpu_runs(args, work):
            results[name] = {"runs": []}
            for command in commands:
                results[name]["runs"].append(run_recorded(command, args.timeout))
                kept = {pattern: [file.read_text() for file in sorted(Path(work).glob(pattern))] for pattern in files}
                results[name]["files"] = kept
                save_json(results, out)
    if any(run["status"] for result in results.values() for run in result["runs"]):
        sys.exit(1)
    return results


def run_recorded(command, timeout):
    """Run Python with these arguments in the repo -> {"command", "seconds", "status", "stdout", "stderr"}."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True, timeout=timeout)
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        status, (stdout, stderr) = "timeout", ((text or b"").decode() for text in (late.stdout, late.stderr))
    taken = round(time.perf_counter() - start, 1)
    print(f"{' '.join(command)}: status {status} after {taken} s\n{stdout[-800:]}{stderr[-800:]}", flush=True)
    return {
        "command": command,
        "seconds": taken,
        "status": status,
        "stdout": stdout[-30000:],
        "stderr": stderr[-30000:],
    }


def gpu_runs(args, work):
    """(name, commands, files in `work` to keep) of the stages that are asked for."""
    tree, large, gpu = f"{work}/demo", f"{work}/large", ["--gpu", args.gpu]
    demo = ["-m", "tools.demo_data", "--out", tree, "--layout", "sysu", "--ids", "100", "--images", "4"]
    small = ["--img_h", "96", "--img_w", "48"]
    runs = {
        "tests": [("tests", [["-m", "pytest", "-q", "-m", "gpu"]], [])],
        "step": [
            (name, [["-m", "tools.bench", "step", *flags, *gpu, "--json", f"{work}/{name}.json"]], [f"{name}.json"])
            for name, flags in {
                "step float32": ["--amp", "off"],
                "step bf16": ["--amp", "bf16"],
                "step bf16 from loading processes": ["--amp", "bf16", "--cache", "disk", "--workers", "16"],
                "step bf16 compiled": ["--amp", "bf16", "--compile"],
            }.items()
        ],
        "data": [
            (
                "data",
                [
                    [
                        "-m",
                        "tools.demo_data",
                        "--out",
                        large,
                        *(["--like", os.path.abspath(args.like)] if args.like else demo[3:]),
                    ],
                    ["-m", "tools.bench", "data", "--data_path", large, *gpu, "--json", f"{work}/data.json"],
                ],
                ["data.json"],
            ),
            (
                "test",
                [
                    [
                        "-m",
                        "tools.bench",
                        "test",
                        "--data_path",
                        large,
                        "--amp",
                        "bf16",
                        "--workers",
                        "16",
                        "--repeats",
                        "1",
                    ]
                    + [*gpu, "--json", f"{work}/test.json"]
                ],
                ["test.json"],
            ),
        ],
        "train": [("demo data", [demo, ["pre_process_sysu.py", "--data_path", tree, *small]], [])]
        + [
            (
                f"train {amp} seed {seed}",
                [
                    ["train_ext_test0.py", "--data_path", tree, "--arch", "resnet18", "--weights", "none", *small, *gpu]
                    + ["--square", "0", "--rande", "0.2", "--optim", "adam", "--lr", "0.01", "--epochs", "11"]
                    + ["--warmup", "1", "--milestones", "8", "--eval_every", "5", "--amp", amp, "--seed", str(seed)]
                    + ["--model_path", f"{work}/{amp}{seed}", "--log_path", f"{work}/{amp}{seed}"]
                ],
                [f"{amp}{seed}/sysu_log/*.jsonl"],
            )
            for seed in range(3)
            for amp in ("off", "bf16")
        ],
    }
    runs |= {
        stage: [(stage, [["-m", "tools.bench", stage, *gpu, "--json", f"{work}/{stage}.json"]], [f"{stage}.json"])]
        for stage in ("loss", "metrics", "rerank")
    }
    return [run for stage in args.only for run in runs[stage]]


def need_proc():
    """Raise InputError, before the work, where the peak memory cannot be read."""
    try:
        reset_peak_memory()
        Path("/proc/self/smaps_rollup").read_text()
    except OSError as error:
        raise InputError(f"{error.filename}: cannot read the peak memory from there; run this on Linux") from error


if __name__ == "__main__":
    cli(main)
