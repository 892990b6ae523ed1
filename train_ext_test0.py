"""Train GFMNet, one of its forerunners, DEEN, DNS, RLE, quad or gfm2 on a data set, testing as it goes.

    python train_ext_test0.py --dataset sysu --gpu 1

The defaults are GFMNet's published recipe but for --square (docs/reproduction.md says why); deen, dns, rle, quad and
gfm2 have their own. The best epoch is chosen by Rank-1 (FC) on trial 0 (RegDB: --trial) of the TEST set, as published;
--select val (SYSU-MM01) trains on fewer identities and chooses by the validation ids.
"""

import importlib
import math
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from ChannelAug import ERASE_AREA, PADDING, TrainAugmentation, normalise
from core.distributed import broadcast_buffers, leave_processes, start_processes
from data_loader import CACHES, IdentitySampler, eval_loader, train_loader
from data_manager import is_demo
from datasets import TRAINING_SETS, check_options, difference, option_values, search_title, training_counts
from loss import WEIGHTINGS
from methods import METHODS, MethodLoss
from model import ARCHS, GFMNet
from testing import engine, results
from training.engine import train_epoch
from training.log import log_epoch
from training.optim import build_optimizer, set_rates
from training.run import Run
from training.step import GraphedStep, TrainStep
from utils import AMP, ArgumentParser, InputError, bounded, check_device, cli, process_count, seed_everything

# Flags that a resumed run may give anew: where things are and how fast they go, not what is computed; and the epochs
# that are trained and tested.
MAY_CHANGE = {"workers", "cache", "gpu", "compile", "epochs", "eval_every", "test_batch", "save_epoch", "save_minutes"}
MAY_CHANGE |= {"model_path", "log_path", "figures", "resume", "data_path", "graph"}
SWITCH = {"type": int, "choices": (0, 1), "default": 1}


class TrainParser(ArgumentParser):
    """The flags of training. Parsing sets the defaults to the recipe of --method on --dataset, so it parses once."""

    def parse_known_args(self, args=None, namespace=None):
        chooser = ArgumentParser(add_help=False)
        for flag in ("method", "dataset"):
            chooser.add_argument(f"--{flag}", default=self.get_default(flag))
        chosen, _ = chooser.parse_known_args(args)
        if method := METHODS.get(chosen.method):
            self.set_defaults(**method.recipe | method.recipes.get(chosen.dataset, {}))
        return super().parse_known_args(args, namespace)


def get_args_parser():
    parser = TrainParser(description=__doc__)
    flag = parser.add_argument_group("data").add_argument
    flag("--dataset", choices=TRAINING_SETS, default="sysu", help="data set to train on, or several")
    flag("--data_path", help="folder of the data set (default: see docs/data.md)")
    flag("--trial", type=bounded(int, 1, 10), default=1, help="RegDB: trial to train on, 1 to 10")
    flag("--mode", choices=option_values("mode"), default="all", help="SYSU-MM01: search that tests use")
    flag("--img_h", type=bounded(int, 48, 4096), default=288, help="image height in pixels")
    flag("--img_w", type=bounded(int, 16, 4096), default=144, help="image width in pixels")
    flag("--workers", type=bounded(int, 0, 1024), default=4, help="loading processes, at most one per core")
    text = "where to keep the training images: gpu, ram, or disk (memory-mapped); auto takes the GPU if it has plenty "
    flag("--cache", choices=CACHES, default="auto", help=text + "of free memory, else the disk")
    flag = parser.add_argument_group("network").add_argument
    text = "network, loss and recipe: base (two-stream baseline), agw, caj, adp (GFMNet), deen, dns, rle, quad (four "
    text += "streams of MSCMNet), or gfm2 (GFMNet without colour)"
    flag("--method", choices=METHODS, default="adp", help=text)
    flag("--arch", choices=ARCHS, default="resnet50", help="backbone")
    text = "start of the backbone: imagenet (torchvision's V1), another of its names (IMAGENET1K_V2), none, or a file"
    flag("--weights", default="imagenet", help=text)
    text = "first shared stage: each modality has its own stem and stages before it"
    flag("--share_net", type=bounded(int, 1, 5), default=2, help=text)
    flag("--stages", type=int, choices=(3, 4), default=4, help="stages of the backbone: 3 leaves out the last")
    flag("--afam", **SWITCH, help="0 leaves out GFMNet's attention (adp, gfm2)")
    flag("--local", **SWITCH, help="0 leaves out GFMNet's local branch and its loss (adp)")
    flag = parser.add_argument_group("loss").add_argument
    text = "weights of the triplet's distances (agw, caj, adp, gfm2): published (the paper's softmax, which ignores "
    text += "large distances), exact (a true softmax; from a start with large distances it may collapse at ln 2), or "
    text += "stable (a true softmax of distances divided by their mean, so that the loss does not depend on scale)"
    flag("--weighting", choices=WEIGHTINGS, default="published", help=text)
    text = "1 squares the triplet's difference of distances (caj, adp, gfm2), as published: see docs/reproduction.md"
    flag("--square", type=int, choices=(0, 1), default=0, help=text)
    text = "margin of the hard (base, deen, rle) and local (adp) triplets, of QCT (quad), and of the circle loss (dns)"
    flag("--margin", type=bounded(float, 0), default=0.3, help=text)
    text = "sharpness of the triplet's weights (caj, adp, gfm2)"
    flag("--alpha", type=bounded(float, 0, above=True), default=1, help=text)
    text = "scale of the triplet's exponent (caj, adp, gfm2), and of the circle loss (dns)"
    flag("--gamma", type=bounded(float, 0, above=True), default=1, help=text)
    flag = parser.add_argument_group("training").add_argument
    flag("--optim", choices=("sgd", "adam"), default="sgd", help="optimiser")
    flag("--lr", type=bounded(float, 0, above=True), default=0.1, help="learning rate of the head; less elsewhere")
    text = "of the learning rate: step (falls at the milestones), or triangle (falls to 0 from the warm-up on)"
    flag("--schedule", choices=("step", "triangle"), default="step", help=text)
    flag("--epochs", type=bounded(int, 1), default=101, help="epochs to train in all")
    flag("--warmup", type=bounded(int, 0), default=10, help="epochs of linear warm-up")
    text = "epochs at which the learning rate falls to a tenth"
    flag("--milestones", type=bounded(int, 1), nargs="*", default=[20, 50], help=text)
    flag("--batch_size", type=bounded(int, 2, 4096), default=8, help="identities per batch")
    flag("--num_pos", type=bounded(int, 1, 1024), default=4, help="images per identity and modality in a batch")
    flag("--augc", **SWITCH, help="the method's augmentation of colours")
    flag("--rande", type=bounded(float, 0, 1), default=0.5, help="probability of random erasing")
    area, text = bounded(float, 0, 1), "bounds of the share that random erasing fills (not dns's first)"
    flag("--erase_area", type=area, nargs=2, metavar=("LOW", "HIGH"), default=[*ERASE_AREA], help=text)
    text = "pixels of black around an image before a random crop; choose fewer for images smaller than 288x144"
    flag("--padding", type=bounded(int, 0, 4096), default=PADDING, help=text)
    flag("--seed", type=bounded(int, 0), default=0, help="seed of weights, batches and augmentation")
    flag = parser.add_argument_group("device").add_argument
    flag("--gpu", default="0", help="number of the GPU, or cpu; under torchrun, each process takes its own GPU")
    flag("--amp", choices=AMP, default="off", help="mixed precision: bf16 runs the network in bfloat16")
    flag("--compile", action="store_true", help="compile the network with torch.compile")
    text = "1 records a training step as a CUDA graph (on one GPU, without --compile); 0 starts its tasks one by one"
    flag("--graph", **SWITCH, help=text)
    flag("--sync_bn", **SWITCH, help="batch norm over the images of all processes (with several GPUs)")
    flag = parser.add_argument_group("testing").add_argument
    text = "what chooses the best epoch: test (the test set, as published) or val (SYSU-MM01: the val ids, which are "
    flag("--select", choices=("test", "val"), default="test", help=text + "then left out of training)")
    flag("--eval_every", type=bounded(int, 1), default=2, help="epochs from one test to the next")
    flag("--test_batch", type=bounded(int, 1, 65536), default=64, help="images per batch in a test")
    flag = parser.add_argument_group("output").add_argument
    flag("--model_path", default="save_model/", help="folder for checkpoints")
    flag("--log_path", default="log/", help="folder for logs")
    flag("--save_epoch", type=bounded(int, 1), default=20, help="epochs from one checkpoint that is kept to the next")
    text = "minutes from one save within an epoch to the next"
    flag("--save_minutes", type=bounded(float, 0, above=True), default=15, help=text)
    flag("--figures", action="store_true", help="draw curves and rankings after each test")
    text = "continue a run: auto (this run, if it has a checkpoint), or a ..._last.t, as a path or a name in "
    flag("--resume", help=text + "--model_path")
    return parser


def main(argv=None):
    """Returns {"best", "last", "log": paths; "metrics": the best epoch's}. Under `torchrun`, all processes run it."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(args)
    check_device(args.gpu)
    may_change = MAY_CHANGE - {"epochs"} if args.schedule == "triangle" else MAY_CHANGE
    recipe = {flag: parser.get_default(flag) for flag in vars(args).keys() - may_change}
    with Run(run_name(args), args, recipe) as run:
        # Before CUDA and the other processes start: the main process may have to decode images, for long and by
        # processes that it forks.
        data, test = load_data(args)
        device = start_processes(args.gpu, args.amp)
        result = train(args, run, data, test, device)
        leave_processes()
        return result


def load_data(args):
    """-> (`data_loader.TrainData`, `datasets.Searches` of one search)."""
    dataset, size = TRAINING_SETS[args.dataset], (args.img_h, args.img_w)
    data_path = args.data_path or dataset.path
    data = dataset.train(data_path, size, **dataset.own(trial=args.trial, select=args.select))
    trials = [args.trial] if "trial" in dataset.options else dataset.trials[:1]
    options = dataset.own(mode=[args.mode], select=args.select)
    return data, dataset.searches(data_path, dataset.directions[:1], trials, **options)


def train(args, run, data, test, device):
    """`main`, once the data is there and the processes have joined."""
    seed_everything(args.seed)
    (search,) = test.searches
    search.check_matches()
    sampler = IdentitySampler(data, args.batch_size, args.num_pos, args.seed)
    loader = train_loader(data, sampler, args.workers, device, args.cache)
    size = (args.img_h, args.img_w)
    eval_loaders = {m: eval_loader(paths, size, args.test_batch, args.workers) for m, paths in test.paths.items()}

    net = build_network(args, data.num_classes, device, pretrained=not run.resumed)
    step = build_step(args, net, device)
    optimizer = build_optimizer(net, args.optim, args.lr, METHODS[args.method].rates)

    run.start(net, optimizer, device, data, sampler.steps)
    run.log.text("\n".join([describe(args, data, test, sampler.steps, device), *test.notes]))
    if unused := unused_flags(args, run.recipe):
        run.log.text(f"note: --method {args.method} does not use {' '.join(unused)}")
    if args.figures:
        from drawing import figures  # slow to import
    for epoch in range(run.first_epoch, args.epochs):
        meter = run.begin_epoch(epoch)
        sampler.set_epoch(epoch, meter.step)
        schedule = partial(set_rates, optimizer, args, epoch, sampler.steps)
        title = f"epoch {epoch}/{args.epochs - 1}"
        run_steps = epoch * sampler.steps, args.epochs * sampler.steps
        train_epoch(step, optimizer, loader, title, meter, run, schedule, run_steps)
        lr = schedule(sampler.steps - 1)
        entry, tested = {"epoch": epoch, "lr": lr, "select": args.select, **meter.summary()}, None
        if epoch % args.eval_every == 0 or epoch == args.epochs - 1:
            with run.testing(meter):
                tested = test_epoch(net, eval_loaders, search, device, args.amp)
            entry |= tested.metrics() if tested else {}
        log_epoch(run.log, title, entry, args, sampler.steps)
        run.end_epoch(entry)
        if args.figures and tested:
            figures.draw_epoch(run.log, title, tested, test)
    return run.finish()


def build_network(args, num_classes, device, pretrained):
    """pretrained: begin from `--weights`; a resumed run needs none."""
    weights = args.weights if pretrained and args.weights != "none" else None
    parts = dict(METHODS[args.method].network)
    parts["attention"] &= bool(args.afam)
    parts["local"] &= bool(args.local)
    net = GFMNet(num_classes, args.arch, args.share_net, **parts, stages=args.stages, weights=weights)
    if args.sync_bn and process_count() > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    return net


def build_step(args, net, device):
    """A step of training by the flags; each of several processes computes its share of it."""
    method = METHODS[args.method]
    criterion = MethodLoss(args.method, args.margin, args.alpha, args.gamma, args.square, args.weighting)
    augmentation = method.augmentations.get(args.dataset, method.augmentation)
    augment = TrainAugmentation(args.augc, args.rande, args.padding, args.erase_area, augmentation)
    if method.network["twins"] and augment.views != (2, 2):
        raise InputError(
            f"--method {args.method}: has two streams for each modality; choose an augmentation of two views"
        )
    if process_count() > 1:
        # The main process's running statistics are shared where they are needed: in `test_epoch`.
        net = DistributedDataParallel(net, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    graphed = args.graph and device.type == "cuda" and process_count() == 1 and not args.compile
    return (GraphedStep if graphed else TrainStep)(net, criterion, augment, device, args.amp)


def unused_flags(args, recipe):
    """Flags of the loss that were changed from the method's recipe, but that none of its losses takes."""
    method = METHODS[args.method]
    losses = [method.triplet, method.local if args.local else None]
    taken = {name for loss in losses if loss for name in signature(loss).parameters}
    flags = signature(MethodLoss).parameters.keys() - taken - {"method"}
    return [f"--{flag}" for flag in sorted(flags) if getattr(args, flag) != recipe[flag]]


def describe(args, data, test, steps, device):
    """Lines of the log: what is trained on, and what chooses the best epoch."""
    visible, infrared = data.num_images
    (search,) = test.searches
    counts = training_counts(data.num_classes, visible, infrared) | test.counts()
    known = "without the validation ids" if args.select == "val" else difference(args.dataset, counts)
    spec = TRAINING_SETS[args.dataset]
    demo = "demo data, " if any(map(is_demo, spec.folders(args.data_path or spec.path))) else ""
    chosen_on = {
        "test": f"trial {search.setting['trial']} of the TEST set, as published: an optimistic choice",
        "val": f"trial {search.setting['trial']} of the VALIDATION ids, which are not trained on",
    }[args.select]
    return (
        f"{data.num_classes} identities, {visible} visible and {infrared} infrared images, {args.epochs} epochs of "
        f"{steps} steps, on {device.type} x {process_count()} (PyTorch {torch.__version__})\n"
        f"data: {demo}{known or 'complete as published'}\n"
        f"The best epoch is chosen by Rank-1 (FC), {search_title(search.setting)}, on {chosen_on}."
    )


class TestResult(NamedTuple):
    """One search. matches: {feature: `eval_metrics.MatchRanks`}; features: those of all images."""

    matches: dict
    features: dict

    def metrics(self):
        """{"FC/Rank-1": percent, ...}"""
        scores = {feature: results.scores(matches) for feature, matches in self.matches.items()}
        return {f"{feature}/{metric}": value for feature, s in scores.items() for metric, value in s.items()}


def test_epoch(net, eval_loaders, search, device, amp):
    """One search -> TestResult, or None if the network's features are not finite in evaluation."""
    broadcast_buffers(net)
    embed = engine.network_embedding(net, device, normalise, amp)
    try:
        features = {m: engine.extract(embed, loader, m, f"test {m}") for m, loader in eval_loaders.items()}
    except engine.FeaturesNotFinite:
        return None
    matches = engine.run_search(features, search)
    return TestResult({feature: found for (feature, _), found in matches.items()}, features)


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    check_options(args)
    if args.figures:
        importlib.import_module("drawing.figures")  # fails now, before a run has begun
    low, high = args.erase_area
    if low > high:
        raise InputError(f"--erase_area {low} {high}: the first is larger than the second; exchange them")
    if args.schedule == "triangle" and args.warmup >= args.epochs:
        raise InputError(f"--warmup {args.warmup}: the rate must fall within --epochs {args.epochs}; reduce --warmup")
    # DEEN aggregates the maps of all stages but the last; the first has a quarter of the image's height and width.
    maps = [math.ceil(args.img_h / 2**n) * math.ceil(args.img_w / 2**n) for n in range(2, args.stages + 1)]
    if METHODS[args.method].network["expansion"] and any(positions % 2 for positions in maps):
        raise InputError(
            f"--method {args.method}: images of {args.img_h}x{args.img_w} have a feature map with an odd number of "
            "positions; choose an --img_h that is a multiple of 32"
        )
    for flag, part in (("afam", "attention"), ("local", "local")):
        if not (getattr(args, flag) or METHODS[args.method].network[part]):
            raise InputError(f"--{flag} 0: --method {args.method} has no such part; leave it out, or use --method adp")


def run_name(args):
    """The published code's name of a run for the same flags; some of our own flags are added."""
    parts = [
        (args.method == "adp", f"joint_co_nog_ch_nog_sq{args.square}"),
        (args.augc, "aug_G"),
        (args.rande > 0, f"erase_{args.rande}"),
        (True, f"p{args.num_pos}_n{args.batch_size}_lr_{args.lr}_seed_{args.seed}_9"),  # 9: so published, a constant
        (args.optim != "sgd", args.optim),
        ("trial" in TRAINING_SETS[args.dataset].options, f"trial_{args.trial}"),
        (not args.afam, "no_afam"),
        (not args.local, "no_local"),
        (args.weighting != "published", args.weighting),
        (args.select != "test", args.select),
    ]
    return "_".join([args.dataset, args.method, *(part for named, part in parts if named)])


if __name__ == "__main__":
    cli(main)
