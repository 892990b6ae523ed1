"""Train GFMNet, or one of its forerunners, on SYSU-MM01, RegDB or LLCM, testing as it goes.

    python train_ext_test0.py --dataset sysu --gpu 1

The defaults are the paper's recipe. The best epoch is chosen by Rank-1 (FC) on trial 0 of the TEST set, as published;
--select val trains on fewer identities and chooses by the validation ids instead.
"""

import json
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ChannelAug import TrainAugmentation, normalise
from core import engine, results
from core.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from core.datasets import DATASETS, check_options, option_values, search_title
from core.distributed import (
    broadcast_buffers,
    generator_states,
    leave_processes,
    set_generators,
    start_processes,
    wait_for_processes,
)
from core.run import Pauses, RunLog, read_json_lines, run_lock
from data_loader import CACHES, IdentitySampler, eval_loader, train_loader
from loss import WEIGHTINGS, MethodLoss
from model import ARCHS, GFMNet, method_options
from tools import figures
from utils import (
    ArgumentParser,
    InputError,
    Stopped,
    check_device,
    cli,
    number,
    process_count,
    process_index,
    seed_everything,
)

FIGURE_QUERIES, FIGURE_IMAGES = 6, 10  # of a sheet of rankings

# Flags that a resumed run may give anew: where things are and how fast they go, not what is computed.
MAY_CHANGE = {
    "workers",
    "cache",
    "gpu",
    "compile",
    "epochs",
    "eval_every",
    "test_batch",
    "save_epoch",
    "save_minutes",
    "model_path",
    "log_path",
    "figures",
    "resume",
    "data_path",
}


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="sysu")
    data.add_argument("--data_path", help="folder of the data set (default: by --dataset)")
    data.add_argument("--trial", type=number(int, 1, 10), default=1, help="RegDB's trial to train on, 1 to 10")
    data.add_argument("--mode", choices=option_values("mode"), default="all", help="SYSU-MM01's search to test with")
    data.add_argument("--img_h", type=number(int, 48, 4096), default=288, help="image height, pixels")
    data.add_argument("--img_w", type=number(int, 16, 4096), default=144, help="image width, pixels")
    data.add_argument("--workers", type=number(int, 0, 1024), default=4, help="loading processes, at most one a core")
    data.add_argument(
        "--cache",
        choices=CACHES,
        default="auto",
        help="keep the training images on the GPU, in memory, or in their files (auto: gpu if a quarter of what is "
        "free there is enough; else disk)",
    )
    net = parser.add_argument_group("network and loss")
    net.add_argument("--method", choices=("base", "agw", "caj", "adp"), default="adp", help="adp is GFMNet")
    net.add_argument("--arch", choices=ARCHS, default="resnet50")
    net.add_argument(
        "--weights", default="imagenet", help="the backbone starts from: imagenet, a state-dict file, or none"
    )
    net.add_argument(
        "--share_net", type=number(int, 1, 5), default=2, help="stem and share_net - 1 stages per modality"
    )
    net.add_argument("--margin", type=number(float, 0), default=0.3, help="of the batch-hard and the local triplets")
    net.add_argument("--alpha", type=number(float, 0, above=True), default=1, help="sharpness of the triplet's weights")
    net.add_argument("--gamma", type=number(float, 0, above=True), default=1, help="scale of the triplet's exponent")
    net.add_argument("--square", type=int, choices=(0, 1), default=1, help="square the triplet's difference (caj, adp)")
    net.add_argument("--weighting", choices=WEIGHTINGS, default="published", help="softmax of the triplet's weights")
    fit = parser.add_argument_group("training")
    fit.add_argument("--optim", choices=("sgd", "adam"), default="sgd")
    fit.add_argument("--lr", type=number(float, 0, above=True), default=0.1, help="rate of the head; a tenth elsewhere")
    fit.add_argument("--batch_size", type=number(int, 2, 4096), default=8, help="identities in a batch")
    fit.add_argument(
        "--num_pos", type=number(int, 1, 1024), default=4, help="images of an identity and modality in a batch"
    )
    fit.add_argument("--augc", type=int, choices=(0, 1), default=1, help="channel augmentation")
    fit.add_argument("--rande", type=number(float, 0, 1), default=0.5, help="probability of random erasing")
    fit.add_argument("--epochs", type=number(int, 1), default=101)
    fit.add_argument("--warmup", type=number(int, 0), default=10, help="epochs of linear warm-up")
    fit.add_argument(
        "--milestones",
        type=number(int, 1),
        nargs="*",
        default=[20, 50],
        help="epochs from which on the rate is a tenth of the one before",
    )
    fit.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision of the network")
    fit.add_argument("--compile", action="store_true", help="compile the network's steps with torch.compile")
    fit.add_argument("--seed", type=number(int, 0), default=0)
    fit.add_argument("--gpu", default="0", help="number of the GPU, or cpu; under torchrun each process has its own")
    fit.add_argument(
        "--sync_bn", type=int, choices=(0, 1), default=1, help="batch norm over all processes (several, on GPUs)"
    )
    out = parser.add_argument_group("testing and output")
    out.add_argument(
        "--select",
        choices=("test", "val"),
        default="test",
        help="the epoch is chosen by the test set, as published, or by SYSU-MM01's val ids, left out of training",
    )
    out.add_argument("--eval_every", type=number(int, 1), default=2, help="epochs between two tests")
    out.add_argument("--test_batch", type=number(int, 1, 65536), default=64, help="images in a batch of testing")
    out.add_argument("--model_path", default="save_model/", help="folder of the checkpoints")
    out.add_argument(
        "--save_epoch", type=number(int, 1), default=20, help="epochs between two checkpoints kept for good"
    )
    out.add_argument(
        "--save_minutes",
        type=number(float, 0, above=True),
        default=15,
        help="minutes between two saves in an epoch",
    )
    out.add_argument("--log_path", default="log/", help="folder of the logs")
    out.add_argument(
        "--figures", action="store_true", help="after each test, draw curves and a sheet of rankings beside the log"
    )
    out.add_argument(
        "--resume", help="go on from a ..._last.t: a path, a name under --model_path, or auto: this run's, if any"
    )
    return parser


def main(argv=None):
    """Returns {"best", "last", "log": paths; "metrics": the best epoch's}. Under `torchrun`, all processes run it."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    check_device(args.gpu)
    name = run_name(args)
    checkpoints = {kind: Path(args.model_path) / f"{name}_{kind}.t" for kind in ("best", "last")}
    log_folder = Path(args.log_path) / f"{args.dataset}_log"
    with run_lock(Path(args.model_path) / name), run_lock(log_folder / name):
        resumed_path = resumed_checkpoint(args, checkpoints["last"], log_folder / f"{name}.jsonl")
        # Before CUDA and the other processes start: the first rank may have to decode images, for long and by processes
        # that it forks.
        data, test = load_data(args)
        device = start_processes(args.gpu, args.amp)
        with Pauses(args.save_minutes, device) as pauses:
            return train(args, data, test, device, pauses, name, checkpoints, log_folder, resumed_path)


def load_data(args):
    """-> (`data_loader.TrainData`, `datasets.Searches` of one search)."""
    dataset, size = DATASETS[args.dataset], (args.img_h, args.img_w)
    data_path = args.data_path or dataset.path
    data = dataset.train(data_path, size, **dataset.own(trial=args.trial, select=args.select))
    trials = [args.trial] if "trial" in dataset.options else dataset.trials[:1]
    options = dataset.own(mode=[args.mode], select=args.select)
    return data, dataset.searches(data_path, dataset.directions[:1], trials, **options)


def train(args, data, test, device, pauses, name, checkpoints, log_folder, resumed_path):
    """`main`, once nobody else writes these files and signals wait for a step to end."""
    size = (args.img_h, args.img_w)
    seed_everything(args.seed)
    (search,) = test.searches
    search.check_matches()
    sampler = IdentitySampler(data, args.batch_size, args.num_pos, args.seed)
    loader = train_loader(data, sampler, args.workers, device, args.cache)
    eval_loaders = {
        modality: eval_loader(paths, size, args.test_batch, args.workers) for modality, paths in test.paths.items()
    }

    parts = method_options(args.method)
    weights = None if args.weights == "none" or resumed_path else args.weights
    net = GFMNet(data.num_classes, args.arch, args.share_net, **parts, weights=weights)
    if args.sync_bn and process_count() > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    model = net
    if process_count() > 1:  # the first rank's statistics are shared where they are needed: in `test_epoch`
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(net, devices, broadcast_buffers=False)
    criterion = MethodLoss(args.method, args.margin, args.alpha, args.gamma, args.square, args.weighting)
    augment = TrainAugmentation(args.augc, args.rande)
    optimizer = build_optimizer(net, args.optim, args.lr)

    first_epoch, best, sums, within = 0, {"Rank-1": -1.0}, {}, {}
    if resumed_path:
        first_epoch, best, sums, within = resume(resumed_path, args, net, optimizer, data.num_images)
    log = RunLog(log_folder, name, resumed_epoch=first_epoch - 1)
    log.text(f"{name}\n{json.dumps(vars(args))}")
    log.text(
        f"{data.num_classes} identities, {data.num_images[0]} visible and {data.num_images[1]} infrared images, "
        f"{len(sampler)} steps an epoch, on {device.type} x {process_count()} (PyTorch {torch.__version__})"
    )
    chosen_on = {
        "test": f"trial {search.setting['trial']} of the TEST set, as published: an optimistic choice",
        "val": f"trial {search.setting['trial']} of the VALIDATION ids, which are not trained on",
    }[args.select]
    if args.resume:
        begun = f", after step {sums['step']} of {sampler.steps}" if within else ""
        done = f"finished: all {args.epochs} epochs" if first_epoch >= args.epochs else f"epoch {first_epoch}{begun}"
        log.text(f"resumed {resumed_path}: {done}" if resumed_path else "no checkpoint to resume yet: from the start")
    log.text(f"The best epoch is chosen by Rank-1 (FC), {search_title(search.setting)}, on {chosen_on}.")

    def checkpoint(epoch, **more):
        weights = {"net": net.state_dict(), "options": net.options, "image_size": size, "args": vars(args)}
        weights |= {"ranks": process_count(), "epoch": epoch, "best": best, "selection": "none"}
        return weights | {"num_images": list(data.num_images), **more}

    def save_within(epoch, sums):
        """Save within an epoch, of which `sums` are done; end the run if a signal asked for it."""
        kept = {"sums": vars(sums.over_processes()), "within": {"generators": generator_states(device)}}
        save_checkpoint(checkpoint(epoch - 1, optimizer=optimizer.state_dict(), **kept), checkpoints["last"])
        if pauses.stop:
            log.close()
            wait_for_processes()
            where = f"in epoch {epoch}, after step {sums.step} of {sampler.steps}"
            raise Stopped(pauses.stop, f" {where}; {checkpoints['last']} is saved: go on with --resume auto")

    if not resumed_path:
        # A run has a checkpoint before its log has an entry: a log without one is another run's, and is not erased.
        save_checkpoint(checkpoint(-1, optimizer=optimizer.state_dict()), checkpoints["last"])
    pauses.hold = True
    for epoch in range(first_epoch, args.epochs):
        # Seeded anew each epoch (the plain seed was the network's), so that a resumed run draws as an unbroken one.
        # Each rank augments by draws of its own.
        seed_everything(args.seed, epoch + 1, process_index())
        lr = learning_rate(epoch, args.lr, args.warmup, args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        desc = f"epoch {epoch}/{args.epochs - 1}"
        sums = engine.Epoch(device, sums)
        if within:
            set_generators(within["generators"], device)
            within = {}
        while sums.step < sampler.steps:
            sampler.set_epoch(epoch, sums.step)
            try:
                engine.train_epoch(
                    model, criterion, optimizer, loader, augment, device, args.amp, desc, sums, pauses.due
                )
            except engine.Diverged as error:
                raise InputError(f"{error} ({checkpoints['last']} is intact: --resume auto goes on from it)") from error
            if sums.step < sampler.steps or pauses.stop:
                save_within(epoch, sums)
        entry = {"epoch": epoch, "lr": lr, "select": args.select, **sums.over_processes().summary()}
        line = f"{desc}  lr {lr:.4g}" + "".join(
            f"  {key} {entry[key]:.3f}" for key in ("total", "identity", "triplet", "local", "correct")
        )
        improved = False
        if epoch % args.eval_every == 0 or epoch == args.epochs - 1:
            try:
                with pauses.at_once():
                    found, features = test_epoch(net, eval_loaders, search, device, args.amp)
            except Stopped as stopped:
                pauses.stop = stopped.number
                save_within(epoch, sums)
            scores = {feature: results.scores(ranks) for feature, ranks in found.items()}
            entry |= {f"{feature}/{metric}": value for feature, s in scores.items() for metric, value in s.items()}
            line += "".join(f"  {metric} {scores['FC'][metric]:.2f}" for metric in ("Rank-1", "mAP", "mINP"))
            improved = scores["FC"]["Rank-1"] > best["Rank-1"]
            best = {"epoch": epoch, **scores["FC"]} if improved else best
        log.text(f"{line}  {entry['images_per_second']:.0f} img/s")
        for warning in warnings(entry, args):
            log.text(warning)
        log.epoch(entry)

        if improved:
            save_checkpoint(checkpoint(epoch, selection=args.select), checkpoints["best"])
        if epoch > 0 and epoch % args.save_epoch == 0:
            save_checkpoint(checkpoint(epoch), Path(args.model_path) / f"{name}_epoch_{epoch}.t")
        # After the others, so that a run which is killed before this line repeats the epoch, and so the files above.
        sums = {}
        save_checkpoint(checkpoint(epoch, optimizer=optimizer.state_dict()), checkpoints["last"])
        if args.figures and "FC/Rank-1" in entry:
            draw(log, desc, features, test, found["FC"])
    log.text(f"best: epoch {best['epoch']}, Rank-1 {best['Rank-1']:.2f}, mAP {best['mAP']:.2f}, {checkpoints['best']}")
    log.close()
    del model
    leave_processes()
    return {
        "best": str(checkpoints["best"]),
        "last": str(checkpoints["last"]),
        "log": str(log.json_path),
        "metrics": best,
    }


def test_epoch(net, eval_loaders, search, device, amp):
    """One search -> ({feature: `eval_metrics.MatchRanks`}, the features of all images)."""
    broadcast_buffers(net)
    embed = engine.network_embedding(net, device, normalise, amp)
    features = {m: engine.extract(embed, loader, m, f"test {m}") for m, loader in eval_loaders.items()}
    return {feature: found for (feature, _), found in engine.run_search(features, search).items()}, features


def draw(log, desc, features, test, found):
    """Draw the run's curves, and of the epoch that was logged last some queries, the same after each epoch, with the
    images nearest to them by FC. found: the FC feature's `eval_metrics.MatchRanks`."""
    if process_index() > 0:
        return
    entries, (search,) = read_json_lines(log.json_path), test.searches
    curves = figures.epoch_curves({log.json_path.stem: entries}, ["total", "correct", "FC/Rank-1", "FC/mAP"])
    chosen = results.choose_queries(found, search, "random", FIGURE_QUERIES)
    ranked = results.rank_images(features, test.paths, search, "FC", found, chosen, FIGURE_IMAGES)
    ids = {"test": "test ids", "val": "VALIDATION ids"}[search.setting["split"]]
    title = f"{desc}: {ids}, {search_title(search.setting)}, trial {search.setting['trial']}; FC"
    sheet = figures.ranking_sheet(figures.ranking_tiles(ranked), title)
    epoch, folder = entries[-1]["epoch"], log.json_path.with_suffix("")
    for tag, figure, name in (("curves", curves, "curves"), ("ranking", sheet, f"ranking_epoch_{epoch}")):
        figures.save(figure, folder / f"{name}.png")
        log.image(tag, folder / f"{name}.png", epoch)


def warnings(entry, args):
    """What an epoch's entry of the log shows to be wrong, each with the flag that helps."""
    distances = f"distances within identities {entry['distance_within']:.3g}, across {entry['distance_across']:.3g}"
    if entry["beyond_clamp"] > 0.5 and args.weighting == "published":
        yield (
            f"warning: {entry['beyond_clamp']:.0%} of the anchors are beyond the triplet's clamp and get no gradient "
            f"from it ({distances}): if the identity loss does not fall either, use --weighting stable"
        )
    if entry["at_ln2"] > 0.5:
        yield (
            f"warning: {entry['at_ln2']:.0%} of the anchors are at ln 2, as near to other people as to their own, "
            f"where the squared triplet has no gradient ({distances}): use --weighting stable"
        )


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    check_options(args)


def build_optimizer(net, optim, lr):
    """Bottleneck and classifier learn at the full rate, everything else at a tenth of it (`lr_scale` of the groups)."""
    head = [p for module in (net.bottleneck, net.classifier) for p in module.parameters() if p.requires_grad]
    in_head = {id(p) for p in head}
    rest = [p for p in net.parameters() if id(p) not in in_head and p.requires_grad]
    groups = [{"params": rest, "lr_scale": 0.1}, {"params": head, "lr_scale": 1.0}]
    if optim == "adam":
        return torch.optim.Adam(groups, lr, weight_decay=5e-4, fused=True)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def learning_rate(epoch, lr, warmup, milestones):
    """Linear warm-up to `lr` over the first `warmup` epochs, then a tenth of the rate from each milestone on."""
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)


def run_name(args):
    """The published code's name of a run for the same flags; `--weighting` and `--select`, flags of ours, are added."""
    name = f"{args.dataset}_{args.method}"
    if args.method == "adp":
        name += f"_joint_co_nog_ch_nog_sq{args.square}"
    if args.augc:
        name += "_aug_G"
    if args.rande > 0:
        name += f"_erase_{args.rande}"
    name += f"_p{args.num_pos}_n{args.batch_size}_lr_{args.lr}_seed_{args.seed}_9"  # 9: so published, a constant
    if args.optim != "sgd":
        name += f"_{args.optim}"
    if args.dataset == "regdb":
        name += f"_trial_{args.trial}"
    if args.weighting != "published":
        name += f"_{args.weighting}"
    if args.select != "test":
        name += f"_{args.select}"
    return name


def resumed_checkpoint(args, last, log):
    """The checkpoint that `--resume` names, or None. `last` and `log` are where this run's own lie or will lie; raises
    InputError where that would overwrite those of another run."""
    if args.resume == "auto":
        path = last if last.exists() else None
    else:
        path = find_checkpoint(args.resume, args.model_path) if args.resume else None
    if last.exists() and not (path and last.samefile(path)):
        raise InputError(
            f"{last}: is there already; go on with --resume auto, choose another --model_path and --log_path, or "
            "remove it"
        )
    if read_json_lines(log) and not path:
        raise InputError(f"{log}: already contains another run's log; delete it or choose another --log_path")
    return path


def resume(path, args, net, optimizer, num_images):
    """Load a `..._last.t` of the same run into net and optimizer -> (next epoch, best so far, sums for that epoch,
    and if it has begun, the state within it)."""
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise InputError(f"{path}: holds no training state; resume from a ..._last.t")
    try:
        flags = {"select": "test", "sync_bn": 1, **checkpoint["args"]}  # runs from before these flags
        args.weights = flags.get("weights", args.weights)  # what the run started from; not read again
        for flag in sorted(set(vars(args)) - MAY_CHANGE):
            if (there := flags.get(flag)) != getattr(args, flag):
                raise InputError(
                    f"{path}: is of a run with --{flag} {there}, not {getattr(args, flag)}; give the same flags"
                )
        if (there := checkpoint.get("ranks", 1)) != process_count():
            raise InputError(
                f"{path}: is of a run on {there} processes, not {process_count()}; go on with --nproc_per_node={there}"
            )
        for option, value in net.options.items():
            if (there := checkpoint["options"].get(option)) != value:
                raise InputError(f"{path}: has {option} {there}, not {value}; it was trained on other data")
        if (there := checkpoint.get("num_images", [*num_images])) != [*num_images]:
            raise InputError(f"{path}: was trained on {there} images, not {[*num_images]}; prepare the same ones")
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["epoch"] + 1, checkpoint["best"], checkpoint.get("sums", {}), checkpoint.get("within", {})
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: is no whole ..._last.t ({type(error).__name__}); resume from another") from error


if __name__ == "__main__":
    cli(main)
