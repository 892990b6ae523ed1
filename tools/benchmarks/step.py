"""A training step, against the published recipe, and where its time goes; and the local loss."""

import time
from functools import partial
from itertools import chain, islice, repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import train_ext_test0
from data_loader import IdentitySampler, TrainData, train_loader, worker_options
from loss import AlignedLocalLoss
from methods import METHODS
from model import GFMNet
from tools.benchmarks.measuring import alternate, compare, compared
from tools.benchmarks.plain import PlainPairs, plain_aligned_loss, plain_loss, plain_step
from training.engine import train_epoch
from training.optim import build_optimizer
from training.step import TrainStep
from utils import seed_everything

PARTS = ("loading", "augmentation", "forward", "loss", "backward", "optimiser")
PEOPLE = 64  # identities of the random images, at least
RATE = 1e-6  # so low that random images do not make the networks diverge


def build_training(args, people, device, *flags):
    """-> (flags of training, a step as a training with them has it, its optimiser)."""
    argv = [f"--{name}={getattr(args, name)}" for name in ("arch", "img_h", "img_w", "amp", "graph")]
    recipe = train_ext_test0.get_args_parser().parse_args([*argv, *flags, "--weights=none"])
    seed_everything(0)
    net = train_ext_test0.build_network(recipe, people, device, pretrained=True)
    optimizer = build_optimizer(net, recipe.optim, RATE, METHODS[recipe.method].rates)
    return recipe, train_ext_test0.build_step(recipe, net, device), optimizer


class Training:
    """`--steps` of our training steps, and of those of the published recipe, on the same random images."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        labels = np.arange(max(PEOPLE, args.batch_size)).repeat(8)  # eight images of each identity and modality
        shape = (2, len(labels), args.img_h, args.img_w, 3)
        visible, infrared = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data = TrainData(visible, labels, infrared, labels)
        sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
        loader = train_loader(data, sampler, args.workers, device, args.cache)
        self.batches = chain.from_iterable(repeat(loader))
        # The published loss, as `plain_loss` has it.
        _, self.step, self.optimizer = build_training(args, data.num_classes, device, "--square=1")
        self.net = self.step.net

        options = worker_options(args.workers) | {"persistent_workers": args.workers > 0}
        pairs = PlainPairs(data, sampler, (args.img_h, args.img_w))
        loader = DataLoader(pairs, args.batch_size * args.num_pos, **options)
        self.plain_batches = chain.from_iterable(repeat(loader))
        self.plain_net = GFMNet(data.num_classes, args.arch).to(device)
        sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
        self.plain_optimizer = torch.optim.SGD(self.plain_net.parameters(), RATE, **sgd)

    def train(self):
        train_epoch(self.step, self.optimizer, islice(self.batches, self.args.steps))

    def train_plainly(self, criterion=plain_loss):
        for batch in islice(self.plain_batches, self.args.steps):
            plain_step(self.plain_net, criterion, self.plain_optimizer, batch, self.device)

    def use_up_queues(self):
        """Discard the batches that loading processes have prepared during the other side's turn."""
        for batches in (self.batches, self.plain_batches):
            for _ in islice(batches, 2 * self.args.workers):
                pass


def bench_step(args, device):
    """Training steps against the published recipe; where the time of a step goes."""
    run = Training(args, device)
    criterion = run.step.criterion
    visible, infrared, labels = run.step.augment(*(x.to(device) for x in next(run.batches)))
    output = run.net(visible, infrared)
    for plain, ours in zip(plain_loss(output, labels), criterion(output, labels), strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)
    del output
    results = {"budget_seconds": step_budget(run)}

    sides = [run.train, run.train_plainly, partial(run.train_plainly, criterion)]
    turns = alternate(sides, args.repeats, device, run.use_up_queues)
    ours, plain, plain_with_our_loss = (turn / args.steps for turn in turns)
    name = f"{args.arch}, {len(labels)} images {args.img_h}x{args.img_w}, {args.amp}"
    results |= compared(f"step: {name}", ours, plain)
    return results | {"with_our_loss": compared("against the plain step with our loss", ours, plain_with_our_loss)}


def step_budget(run):
    """Print the median seconds of each part of a step -> them. Its tasks start one by one, and each part waits for the
    device."""
    step, marks = TrainStep(run.net, run.step.criterion, run.step.augment, run.device, run.args.amp), []

    def mark(*_):
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        marks.append(time.perf_counter())

    hooks = [run.net.register_forward_pre_hook(mark), run.net.register_forward_hook(mark)]
    hooks += [step.criterion.register_forward_hook(mark)]
    mark()
    for batch in islice(run.batches, 2 * run.args.steps):
        batch = [values.to(run.device) for values in batch]
        mark()
        step(*batch)
        mark()
        run.optimizer.step()
        mark()
    for hook in hooks:
        hook.remove()
    spans = np.diff(marks).reshape(-1, len(PARTS))[run.args.steps :]  # the first steps warm up
    budget = dict(zip(PARTS, np.median(spans, axis=0).tolist(), strict=True))
    print("where the time of a step goes if its tasks start one by one:")
    for part, seconds in budget.items():
        print(f"  {part:20}{1000 * seconds:10.2f} ms{seconds / sum(budget.values()):8.1%}")
    return budget


def bench_loss(args, device):
    """The aligned local loss against a walk sample by sample."""
    n = 3 * args.batch_size * args.num_pos
    labels = torch.arange(args.batch_size, device=device).repeat_interleave(args.num_pos).repeat(3)
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(n, 2048, device=device, generator=generator)
    local = F.normalize(torch.randn(n, 128, 6, device=device, generator=generator), dim=1).requires_grad_()

    def gradient(criterion):
        return torch.autograd.grad(criterion(features, labels, local), local)[0]

    ours, baseline = (partial(gradient, criterion) for criterion in (AlignedLocalLoss(), plain_aligned_loss))
    torch.testing.assert_close(ours(), baseline(), rtol=1e-4, atol=1e-6)
    return compare(f"aligned local loss, {n} images, 6 stripes", ours, baseline, args.repeats, device)
