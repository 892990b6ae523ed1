"""A training step: against the published recipe, where its time goes, and how fast it could be; and the local loss."""

import statistics
import time
from functools import partial
from itertools import islice, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import train_ext_test0
from data_loader import CachedBatches, IdentitySampler, TrainData, train_loader
from loss import AlignedLocalLoss
from model import GFMNet
from tools.benchmarks.measuring import PeakMemory, alternate, compare, compared, print_head
from tools.benchmarks.plain import PlainPairs, plain_aligned_loss, plain_loss, plain_step
from training.engine import train_epoch
from training.optim import build_optimizer
from training.step import TrainStep
from utils import autocast, cores, seed_everything

PEOPLE = 64  # identities of the random images, at least


class Training:
    """Our training steps and those of the published recipe, on the same random images.

    Learning rates are so low that random images do not make the networks diverge.
    """

    def __init__(self, args, device):
        self.args, self.device = args, device
        size, data = (args.img_h, args.img_w), random_data(args)
        sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
        self.loader = train_loader(data, sampler, args.workers, device, args.cache)
        self.batches = endless(self.loader)

        names = ("arch", "img_h", "img_w", "batch_size", "num_pos", "amp", "graph")
        argv = [f"--{name}={getattr(args, name)}" for name in names] + ["--compile"] * args.compile
        argv += ["--weights=none", "--square=1"]  # the published loss, as `plain_loss` has it
        recipe = train_ext_test0.get_args_parser().parse_args(argv)
        seed_everything(0)
        self.plain_net = GFMNet(data.num_classes, args.arch).to(device)
        self.net = train_ext_test0.build_network(recipe, data.num_classes, device, pretrained=True)
        self.step = train_ext_test0.build_step(recipe, self.net, device)
        self.optimizer = build_optimizer(self.net, "sgd", 1e-6)

        plain_loader = DataLoader(
            PlainPairs(data, sampler, size),
            args.batch_size * args.num_pos,
            num_workers=min(args.workers, cores()),
            persistent_workers=args.workers > 0,
            pin_memory=device.type == "cuda",
        )
        self.plain_batches = endless(plain_loader)
        sgd = torch.optim.SGD
        self.plain_optimizer = sgd(self.plain_net.parameters(), 1e-6, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def train(self, step=None):
        """`--steps` of our steps."""
        train_epoch(step or self.step, self.optimizer, islice(self.batches, self.args.steps))

    def train_plainly(self, criterion=plain_loss):
        """`--steps` of the published recipe's steps."""
        for batch in islice(self.plain_batches, self.args.steps):
            plain_step(self.plain_net, criterion, self.plain_optimizer, batch, self.device)

    def use_up_queues(self):
        """Discard the batches that loading processes have prepared during the other side's turn."""
        for batches in (self.batches, self.plain_batches):
            for _ in islice(batches, 2 * self.args.workers):
                pass


def bench_step(args, device):
    run = Training(args, device)
    criterion, augment = run.step.criterion, run.step.augment
    visible, infrared, labels = augment(*(x.to(device) for x in next(run.batches)))
    output = run.net(visible, infrared)
    for plain, ours in zip(plain_loss(output, labels), criterion(output, labels), strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)
    del output
    with PeakMemory(device) as memory:  # before a step is recorded: a graph's memory is not counted as allocated
        budget = step_budget(run)

    inputs = len(labels)
    name = f"{args.arch}, {inputs} images {args.img_h}x{args.img_w}, {args.amp}{', compiled' * args.compile}"
    sides = [run.train, run.train_plainly, partial(run.train_plainly, criterion)]
    turns = alternate(name, sides, args.repeats, device, run.use_up_queues)
    ours, plain, plain_with_our_loss = (turn / args.steps for turn in turns)
    print_head()
    results = compared(f"step: {name}", ours, plain)
    results["with_our_loss"] = compared("against the plain step with our loss", ours, plain_with_our_loss)
    results["images_per_second"] = inputs / ours
    print("where the time of a step goes if its tasks start one by one:")
    for part, seconds in budget.items():
        print(f"  {part:60}{1000 * seconds:10.2f} ms{seconds / sum(budget.values()):8.1%}")
    print("how fast a step could be, and its share of the time of ours:")
    floors = step_floors(GFMNet(**run.net.options).to(device), criterion, (visible, infrared), labels, args.amp)
    if device.type == "cuda":
        floors["seconds"]["the GPU's tasks alone"] = busy_seconds(run.train) / args.steps
    for part, seconds in floors["seconds"].items():
        print(f"  {part:60}{1000 * seconds:10.2f} ms{seconds / ours:8.1%}")
    if device.type == "cuda":
        cached = run.loader.images if isinstance(run.loader, CachedBatches) else ()
        results["peak_gib_without_cache"] = (memory.peak - sum(images.nbytes for images in cached)) / 2**30
        print(f"peak memory without the cached images: {results['peak_gib_without_cache']:.1f} GiB")
    return results | {"budget_seconds": budget, "floors": floors}


def random_data(args):
    """Eight random images of each identity and modality."""
    rng, people = np.random.default_rng(0), max(PEOPLE, args.batch_size)
    shape = (8 * people, args.img_h, args.img_w, 3)
    visible, infrared = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
    labels = np.arange(people).repeat(8)
    return TrainData(visible, labels, infrared, labels)


def endless(loader):
    while True:
        yield from loader


class Timed(torch.nn.Module):
    """Calls `mark` before and after each call of a module."""

    def __init__(self, inner, mark):
        super().__init__()
        self.inner, self.mark = inner, mark

    def forward(self, *inputs):
        self.mark()
        result = self.inner(*inputs)
        self.mark()
        return result


def step_budget(run):
    """Median seconds of each part of a step whose tasks start one by one.

    GPUs are timed on their own clock: a part ends when the device has finished it. Copying batches there is part of
    the loading.
    """
    marks = []

    def mark(*_):
        if run.device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    criterion = run.step.criterion
    step = TrainStep(Timed(run.net, mark), criterion, Timed(run.step.augment, mark), run.device, run.args.amp)
    run.train(step)  # to warm up
    marks.clear()
    hooks = [criterion.register_forward_pre_hook(mark), criterion.register_forward_hook(mark)]
    hooks += [run.optimizer.register_step_pre_hook(mark), run.optimizer.register_step_post_hook(mark)]
    run.train(step)
    for hook in hooks:
        hook.remove()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
        spans = [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
    else:
        spans = [b - a for a, b in pairwise(marks)]
    # Eight marks a step, and so eight spans, of which the last reaches to the next step.
    names = ("augmentation", None, "forward", None, "loss", "backward", "optimiser", "loading")
    medians = {name: statistics.median(spans[i::8]) for i, name in enumerate(names) if name and spans[i::8]}
    return {"loading": 0, **medians}


def busy_seconds(function):
    """Seconds in which the GPU computes during a function."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    busy, until = 0, spans[0][0]
    for begin, end in spans:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6


def step_floors(net, criterion, views, labels, amp):
    """Operations and memory traffic of a step, and the seconds they take at rates measured on the same device.

    Operations: floating-point ones of convolutions and matrix products, by PyTorch's counter. Traffic: each layer reads
    its input and writes its output once, its backward pass moves twice as much; fused layers move less.
    """
    device = labels.device
    dtype, values = torch.bfloat16 if amp == "bf16" else torch.float32, []
    layers = [module for module in net.modules() if not [*module.children()]]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: values.append(inputs[0].numel() + output.numel()))
        for layer in layers
    ]
    with FlopCounterMode(display=False) as counter, autocast(device, amp):
        criterion(net(*views), labels).total.backward()
    for hook in hooks:
        hook.remove()
    net.zero_grad()
    flop, size = counter.get_total_flops(), 3 * sum(values) * dtype.itemsize
    flop_rate, byte_rate = device_rates(device, dtype)
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


def device_rates(device, dtype):
    """Operations per second of a large matrix product, and bytes per second of a copy."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions
    source = a.repeat(4, 1)
    target = torch.empty_like(source)
    product, copy = alternate("rates", [lambda: a @ a, lambda: target.copy_(source)], 5, device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / product, 2 * source.nbytes / copy


def bench_loss(args, device):
    n = 3 * args.batch_size * args.num_pos
    labels = torch.arange(args.batch_size, device=device).repeat_interleave(args.num_pos).repeat(3)
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(n, 2048, device=device, generator=generator)
    local = F.normalize(torch.randn(n, 128, 6, device=device, generator=generator), dim=1).requires_grad_()

    def gradient(criterion):
        local.grad = None
        criterion(features, labels, local).backward()
        return local.grad

    ours, baseline = (partial(gradient, criterion) for criterion in (AlignedLocalLoss(), plain_aligned_loss))
    torch.testing.assert_close(ours(), baseline(), rtol=1e-4, atol=1e-6)
    print_head()
    return compare(f"aligned local loss, {n} images, 6 stripes", ours, baseline, args.repeats, device)
