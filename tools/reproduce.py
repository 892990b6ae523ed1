"""From a data set and a GPU to an answer: was the paper's number reached?

    python -m tools.reproduce --dataset sysu --data_path ../data/SYSU-MM01/ --method adp dns --gpu 0

Checks the data (tools.check_data), prepares it, says how long it will take, trains and tests every method with several
seeds (tools.sweep), and writes a record (tools.records) and a page for each. Start the same command again to continue.
Flags after -- go to train_ext_test0.py. docs/reproduction.md has the rule of the verdict.
"""

import multiprocessing
import platform
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import chain, count, islice, product, repeat
from pathlib import Path

import torch
import torchvision

import pre_process_sysu
import train_ext_test0
from ChannelAug import normalise
from core.files import atomic, check_output, save_json
from core.formats import checked, read_json
from data_loader import IdentitySampler, eval_loader, sysu_train, train_loader
from data_manager import is_demo
from datasets import DATASETS, search_title
from methods import METHODS
from model import CLIP, is_intact
from testing import engine
from testing.results import METRICS
from tools import check_data, records, sweep
from tools.sweep_tables import markdown_table, network_rows, plus_minus, spread
from training.engine import train_epoch
from training.optim import build_optimizer
from utils import (
    ArgumentParser,
    InputError,
    bounded,
    cli,
    cores,
    end_with_the_main_process,
    one_line,
    result_of,
    select_device,
)

WARM_UP, MEASURED = 10, 30  # steps
SEEDS = 3  # for a verdict: the interval of fewer seeds is too wide to tell anything
WIDEST = 3.0  # half of an interval, in points, that still tells something
CHECKPOINTS = ("best", "last")
# They change nothing that is trained; and the square is published for GFMNet and CAJ, but not the default.
FREE_FLAGS = sweep.MAY_CHANGE["train"] | {"square"}
OWN_FLAGS = {"method", "dataset", "data_path", "gpu", "trial", "seed"}  # of training, that this program passes
# Rank-1, mAP and mINP of one gallery image an identity (and camera), without re-ranking, at the best epoch; of RegDB
# the mean of ten trials. adp, deen, rle: their papers; quad: the ablation of MDCRNet; agw, caj: the README of their
# code, which is in mangye16/Cross-Modal-Re-ID-baseline; dns: the notebook in its code, Joey623/DNS.
ALL, INDOOR = (f"{mode}-search, infrared to visible, seeded protocol, 1-shot" for mode in ("all", "indoor"))
REGDB = [f"{direction}, standard protocol" for direction in DATASETS["regdb"].directions]
LLCM = [f"{direction}, seeded protocol, 1-shot" for direction in DATASETS["llcm"].directions]
PUBLISHED = {
    "agw": {ALL: (47.50, 47.65, 35.30), REGDB[0]: (70.05, 66.37, 50.19)},
    "caj": {ALL: (69.88, 66.89, 53.61), REGDB[0]: (85.03, 79.14, 65.33)},
    "adp": {ALL: (73.04, 69.71, 56.62), REGDB[0]: (87.14, 80.65, 66.83)},
    "deen": {ALL: (74.7, 71.8)},
    "dns": {ALL: (77.27, 74.35, 62.43), INDOOR: (84.21, 86.83, 83.88)}
    | {REGDB[0]: (93.01, 88.56, 78.42), REGDB[1]: (93.49, 88.10)}
    | {LLCM[0]: (66.02, 68.60), LLCM[1]: (57.45, 64.11)},
    "rle": {ALL: (75.4, 72.4, 60.9), INDOOR: (84.7, 87.0), REGDB[0]: (92.8, 88.6), REGDB[1]: (91.0, 86.6)},
    "quad": {ALL: (76.29, 71.84), INDOOR: (81.55, 84.35)},
}


def get_args_parser():
    usage = "%(prog)s --dataset NAME --method NAME ... [-- flags of training]"
    parser = ArgumentParser(description=__doc__, usage=usage)
    flag = parser.add_argument
    flag("--dataset", choices=DATASETS, default="sysu", help="data set")
    flag("--data_path", help="folder of the data set (default: by --dataset)")
    flag("--method", nargs="+", choices=METHODS, default=["adp"], help="methods, one after the other")
    flag("--seeds", nargs="+", type=bounded(int, 0), default=[0, 1, 2], help=f"seeds; a verdict needs {SEEDS}")
    flag("--gpu", nargs="+", default=["0"], metavar="N", help="numbers of the GPUs, a run at a time on each; or cpu")
    flag("--runs", type=Path, default=Path("sweep"), help="folder of the runs: checkpoints, logs, results")
    flag("--out", type=Path, default=Path("records"), help="folder of the records and their pages")
    flag("--by", help="who measures, for the record (default: git's user.name)")
    return parser


def main(argv=None):
    """Returns the records. Raises InputError, before anything is trained, for data that is wrong or code that no record
    can name; and after it, for runs that failed."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    split = argv.index("--") if "--" in argv else len(argv)
    args, more = get_args_parser().parse_args(argv[:split]), argv[split + 1 :]
    check_flags(args, more)
    spec, commit, found, failed = DATASETS[args.dataset], records.commit(), [], []
    args.data_path = args.data_path or spec.path
    check_output(args.out / "record.json")
    data = [f"--dataset={args.dataset}", f"--data_path={args.data_path}"]
    device = ["--gpu=cpu"] if args.gpu == ["cpu"] else []
    flags = {method: [f"--method={method}", *data, *more, *device] for method in args.method}
    trainings = {method: sweep.parse("train", flags[method], [], method) for method in args.method}
    arch = trainings[args.method[0]].arch
    in_a_process(check_data.main, [*data, f"--gpu={args.gpu[0]}", f"--model_path={args.runs}", f"--arch={arch}"])
    for method in args.method:
        folder = args.runs / f"{args.dataset}_{method}"
        rows = {f"trial_{trial}": f"--trial {trial}" for trial in spec.options.get("trial", ())} or {method: ""}
        runs = {(row, seed): folder / row / f"seed_{seed}" for row in rows for seed in args.seeds}
        if any(missing(runs, checkpoint) for checkpoint in CHECKPOINTS):
            prepare(trainings[method])
        if left := len(missing(runs, "last")):
            announce(args, method, trainings[method], left)
        common = [f"--out={folder}", *chain(*(("--row", f"{row}: {own}") for row, own in rows.items()))]
        common += ["--seeds", *map(str, args.seeds), *([] if device else ["--gpus", *args.gpu]), "--retry"]
        for checkpoint in reversed(CHECKPOINTS):  # the tables that stay are those of the published way
            try:
                table = sweep.main([*common, f"--checkpoint={checkpoint}", "--test", "--all", "--", *flags[method]])
                unfinished = missing(runs, checkpoint)
                reasons = [f"{run['row']}, seed {run['seed']} failed: {run['line']}" for run in table["failed"]]
            except InputError as reason:  # none has finished, or other runs are there
                unfinished, reasons = missing(runs, checkpoint), [str(reason).replace("--out", "--runs")]
            if unfinished or reasons:
                count = [f"{len(unfinished)} runs have not finished"] if unfinished else []
                failed.append(f"{method}: {'; '.join([*count, *reasons[:1]])}")
                print(failed[-1])
                break
        else:
            found.append(write(args, method, more, list(runs.values()), table, commit))
    if failed:
        raise InputError(f"{'; '.join(failed)}; mend that, and start the same command again")
    return found


def check_flags(args, more):
    """Raise InputError for flags that do not go together; each seed and GPU counts once."""
    if own := sorted(sweep.flag_names(more) & OWN_FLAGS):
        raise InputError(f"-- --{own[0]}: is set by this program; pass it before the --, or leave it out")
    args.by = (records.git("config", "user.name") if args.by is None else args.by).strip()
    if not args.by:
        raise InputError("--by: is empty; pass who measures")
    args.seeds, args.gpu = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.gpu))
    if wrong := [gpu for gpu in args.gpu if gpu != "cpu" and not gpu.isdecimal()]:
        raise InputError(f"--gpu {wrong[0]}: give the number of a GPU, or cpu")
    if "cpu" in args.gpu and len(args.gpu) > 1:
        raise InputError(f"--gpu {' '.join(args.gpu)}: pass numbers of GPUs, or cpu alone")


def missing(runs, checkpoint):
    """Of {run: folder}, the runs whose checkpoint is not tested."""
    return [run for run, folder in runs.items() if not (folder / sweep.RESULTS[checkpoint]).exists()]


def in_a_process(function, *arguments):
    """The result of a function that uses a GPU, from a process of its own, which gives the GPU's memory back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_the_main_process) as pool:
        future = pool.submit(_stoppable, function, *arguments)
        try:
            return result_of(pool, future)
        finally:
            if not future.done():  # a signal does not wait for the result
                for process in multiprocessing.active_children():
                    process.terminate()


def _stoppable(function, *arguments):
    """The function, which SIGTERM ends in order: what its own processes share would otherwise be reported as leaked."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return function(*arguments)


def prepare(args):
    """Prepare SYSU-MM01's arrays unless they are there, in the size of these flags of training."""
    if args.dataset == "sysu":
        try:
            sysu_train(args.data_path, (args.img_h, args.img_w))
        except InputError as reason:
            print(f"preparing, as {reason}")
            pre_process_sysu.main([f"--data_path={args.data_path}", f"--img_h={args.img_h}", f"--img_w={args.img_w}"])


def announce(args, method, training, left):
    """Measure, and say how long it will take."""
    training.gpu = args.gpu[0]
    step, image, steps, images = in_a_process(measure, training)
    tests = len({*range(0, training.epochs, training.eval_every), training.epochs - 1}) + len(CHECKPOINTS)
    hours = (training.epochs * steps * step + tests * images * image) / 3600
    print(
        f"{method}: runs: {left}; each {training.epochs} epochs of {steps} steps of {step:.2f} s, and {tests} tests of"
    )
    print(f"{images:,} images: about {hours:.1f} h a run, {hours * -(-left // len(args.gpu)):.1f} h in all.")
    print("Stop it when you like: the same command continues.", flush=True)


def measure(args):
    """-> seconds of a step of training, and of embedding a test image; the steps of an epoch, the images of a test."""
    data, test = train_ext_test0.load_data(args)
    device = select_device(args.gpu, args.amp)
    sampler = IdentitySampler(data, args.batch_size, args.num_pos, args.seed)
    batches = chain.from_iterable(repeat(train_loader(data, sampler, args.workers, device, args.cache)))
    net = train_ext_test0.build_network(args, data.num_classes, device, pretrained=False)
    step = train_ext_test0.build_step(args, net, device)
    optimizer = build_optimizer(net, args.optim, 1e-6, METHODS[args.method].rates)

    def seconds(function):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    train_epoch(step, optimizer, islice(batches, WARM_UP))
    of_steps = seconds(lambda: train_epoch(step, optimizer, islice(batches, MEASURED)))
    size, paths = (args.img_h, args.img_w), test.paths["visible"][: args.test_batch]
    embed = engine.network_embedding(net, device, normalise, args.amp)
    of_batch = min(
        seconds(lambda: engine.extract(embed, eval_loader(paths, size, args.test_batch, 0), "visible", "a test batch"))
        for _ in range(2)
    )
    images = sum(len(paths) for paths in test.paths.values())
    return of_steps / MEASURED, of_batch / len(paths), sampler.steps, images


def write(args, method, more, folders, table, commit):
    """Write the record of a method, whose runs are in these folders, and its page -> the record."""
    spec, demo, but = DATASETS[args.dataset], is_demo(args.data_path), shlex.join(more)
    complete, changed = complete_as_published(args.dataset, args.data_path), changed_flags(method, args, more)
    judged = complete and not changed and len(args.seeds) >= SEEDS
    scores = collect(folders)
    rows = compare(scores, PUBLISHED.get(method, {}) if complete else {}, judged)
    seconds = {row["row"]: row["seconds"]["mean"] for s in table["settings"] for row in s["rows"] if row["seeds"]}
    began = [read_json(folder / "flags.json", sweep.Record, sweep.REMEDY).get("commit") for folder in folders]
    day = date.fromtimestamp(max((folder / sweep.RESULTS["best"]).stat().st_mtime for folder in folders))
    command = ["--dataset", args.dataset, "--method", method, "--seeds", *map(str, args.seeds)]
    command += ["--", *more] if more else []
    record = {
        "date": str(day),
        "commit": next(filter(None, began), commit),
        "data": spec.name if complete else spec.title(demo, None),
        "real": not demo,
        "row": method + (f", but {but}" if more else ""),
        "flags": f"--method {method} --dataset {args.dataset} {but}".strip(),
        "command": f"python -m tools.reproduce {shlex.join(command)}",
        "scores": scores,
        "seeds": sorted(args.seeds),
        "hardware": processor() if args.gpu == ["cpu"] else in_a_process(graphics, args.gpu),
        "hours": round(sum(seconds.values()) / 3600, 3),
        "by": args.by,
    }
    record["verdict"] = verdict(rows, record, complete, changed)
    if len({*filter(None, began)}) > 1:
        record["verdict"] += " The runs began with several commits."
    checked(record, records.Record, str(folders[0]), "report it as a fault of this program")
    stem = args.out / f"{day}_reproduce_{args.dataset}_{method}"
    names = chain([stem], (stem.with_name(f"{stem.name}_{number}") for number in count(2)))
    name = next(name for name in names if is_free(name.with_suffix(".json"), record))
    save_json(record, name.with_suffix(".json"))
    with atomic(name.with_suffix(".md")) as temporary:
        temporary.write_text(page(record, rows), encoding="utf-8", errors="replace")
    print(f"{record['verdict']}\n{name}.md and .json")
    return record


def is_free(file, record):
    """Whether there is no such file, or an older state of the same record."""
    same = ("command", "commit", "data", "by")
    return not file.exists() or all(read_json(file, records.Record, records.REMEDY)[key] == record[key] for key in same)


def changed_flags(method, args, more):
    """Flags after the -- that make it another training than the method's recipe."""
    method_flags = [f"--method={method}", f"--dataset={args.dataset}"]
    recipe, own = (vars(train_ext_test0.get_args_parser().parse_args([*method_flags, *f])) for f in ([], more))
    changed = {flag for flag in recipe if own[flag] != recipe[flag]} - FREE_FLAGS
    sources = {} if own["arch"].startswith(CLIP) else torchvision.models.get_model_weights(own["arch"]).__members__
    if sources and is_intact(own["weights"], sources["IMAGENET1K_V1"]):
        changed -= {"weights"}
    return sorted(changed)


def collect(folders):
    """{"setting; FC; best epoch" or "... last epoch": {metric: `spread` over the seeds}}, the best first. The value
    of a seed is the mean over its networks (of RegDB ten, one for each trial) and galleries."""
    values = {}
    for checkpoint, folder in product(CHECKPOINTS, folders):
        for row in network_rows(folder / sweep.RESULTS[checkpoint]):
            key = f"{search_title(row)}; FC; {checkpoint} epoch"
            values.setdefault(key, {}).setdefault(folder.name, []).append(row["mean"])
    return {
        key: {
            metric: spread([sum(mean[metric] for mean in means) / len(means) for means in of_seeds.values()])
            for metric in METRICS
        }
        for key, of_seeds in values.items()
    }


def compare(scores, published, judged):
    """[(setting, metric, published or None, `spread` at the best epoch, at the last, the state in words)]

    judged: whether to state anything. The rule is in docs/reproduction.md.
    """
    rows, end = [], "; FC; best epoch"
    for setting in (key.removesuffix(end) for key in scores if key.endswith(end)):
        paper = dict(zip(METRICS, published.get(setting, ()), strict=False))
        for metric, best in scores[setting + end].items():
            state = state_of(paper[metric], best) if judged and metric in paper else ""
            last = scores[f"{setting}; FC; last epoch"][metric]
            rows.append((setting, metric, paper.get(metric), best, last, state))
    return rows


def state_of(published, measured):
    """Of a published value, beside a `spread` over seeds."""
    if published <= measured["mean"]:
        return "reached"
    if measured["interval"][1] - measured["mean"] > WIDEST:
        return "undecided"
    return "reached" if published <= measured["interval"][1] else f"missed by {published - measured['mean']:.2f}"


def verdict(rows, record, complete, changed):
    """In one line."""
    known = [(f"{setting}, {metric}", state) for setting, metric, paper, *_, state in rows if paper is not None]
    if not complete:
        return f"No verdict: {record['data']} is not the published data set, complete."
    if changed:
        return f"No verdict: --{changed[0]} is not left as in the method's recipe."
    if not known:
        return "No verdict: tools/reproduce.py knows no published value of this method on this data set."
    if len(record["seeds"]) < SEEDS:
        return f"No verdict: it needs {SEEDS} seeds, not {len(record['seeds'])}."
    if missed := [f"{name} {state}" for name, state in known if state.startswith("missed")]:
        return f"Not reproduced: {'; '.join(missed)}."
    if open_ := [name for name, state in known if state == "undecided"]:
        return f"No verdict: the seeds differ too much in {'; '.join(open_)}. Look at each, or take more seeds."
    return f"Reproduced: the {len(known)} published values that are known here are reached."


PAGE = """# {row} on {data}

**{verdict}**

{values}

Values are in %, of the feature FC by cosine similarity, without re-ranking. ± is the standard deviation over the
seeds; brackets have the 95 % interval of their mean. The best epoch is chosen on the test set, as published. The rule
of the verdict is in docs/reproduction.md.

{facts}
"""


def page(record, rows):
    """The page of a record, in Markdown."""
    values = [["setting", "metric", "published", "best epoch", "last epoch", ""]]
    for setting, metric, paper, best, last, state in rows:
        interval = " [{:.2f}, {:.2f}]".format(*best["interval"]) if best["interval"] else ""
        paper = "" if paper is None else f"{paper:.2f}"
        values.append([setting, metric, paper, plus_minus(best, 2) + interval, plus_minus(last, 2), state])
    shown = ("date", "by", "commit", "data", "flags", "command", "seeds", "hardware", "hours")
    texts = {**record, "seeds": ", ".join(map(str, record["seeds"]))}
    facts = [["", ""], *([name, one_line(str(texts[name]))] for name in shown)]
    tables = {"values": "\n".join(markdown_table(values)), "facts": "\n".join(markdown_table(facts))}
    return PAGE.format(**{name: one_line(record[name]) for name in ("row", "data", "verdict")}, **tables)


def complete_as_published(dataset, data_path):
    """Whether a data set has all that was published, and is real."""
    listed = check_data.read_lists(dataset, data_path)
    return not is_demo(data_path) and not check_data.check_counts(dataset, data_path, listed).startswith("note: ")


def graphics(gpus):
    return f"{len(gpus)} x {torch.cuda.get_device_name(int(gpus[0]))}"


def processor():
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {names[0] if names else platform.machine()}"


if __name__ == "__main__":
    cli(main)
