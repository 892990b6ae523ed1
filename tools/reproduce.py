"""From a data set and a GPU to an answer: was the paper's number reached?

    python -m tools.reproduce --dataset sysu --data_path ../data/SYSU-MM01/ --method adp dns --gpu 0

Checks the data (tools.check_data), prepares it, says how long it will take, trains and tests every method with several
seeds (tools.sweep), and writes a record (tools.records) and a page for each. Start the same command again to continue.
Flags after -- go to train_ext_test0.py. docs/reproduction.md has the rule of the verdict.
"""

import multiprocessing
import platform
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import chain, islice, repeat
from pathlib import Path

import torch

import pre_process_sysu
import train_ext_test0
from core.files import atomic, check_output, save_json
from core.formats import checked
from data_loader import IdentitySampler, eval_loader, sysu_train, train_loader
from data_manager import is_demo
from datasets import DATASETS, search_title
from methods import METHODS
from testing import engine
from testing.results import METRICS
from tools import check_data, records, sweep
from tools.sweep_tables import markdown_table, network_rows, plus_minus, spread
from training.engine import train_epoch
from training.optim import build_optimizer
from utils import ArgumentParser, InputError, bounded, cli, cores, end_with_the_main_process, one_line, select_device

WARM_UP, MEASURED = 10, 30  # steps
SEEDS = 3  # for a verdict: the interval of fewer seeds is too wide to tell anything
CHECKPOINTS = ("best", "last")
# They change nothing that is trained; and the square is published for GFMNet and CAJ, but not the default.
FREE_FLAGS = sweep.MAY_CHANGE["train"] | {"square"}
OWN_FLAGS = {"method", "dataset", "data_path", "gpu", "trial", "seed"}  # of training, that this program passes
# Rank-1, mAP and mINP of one gallery image an identity (and camera), without re-ranking, at the best epoch; of RegDB
# the mean of ten trials. adp, deen: their papers; agw, caj: the README of their code, which is in
# mangye16/Cross-Modal-Re-ID-baseline; dns: the notebook in its code, Joey623/DNS.
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
}


def get_args_parser():
    usage = "%(prog)s --dataset NAME --method NAME ... [-- flags of training]"
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    flag = parser.add_argument
    flag("--dataset", choices=DATASETS, default="sysu", help="data set")
    flag("--data_path", help="folder of the data set (default: by --dataset)")
    flag("--method", nargs="+", choices=METHODS, default=["adp"], help="methods, one after the other")
    flag("--seeds", nargs="+", type=bounded(int, 0), default=[0, 1, 2], help=f"seeds; a verdict needs {SEEDS}")
    flag("--gpu", nargs="+", default=["0"], metavar="N", help="numbers of the GPUs, a run at a time on each; or cpu")
    flag("--runs", type=Path, default=Path("sweep"), help="folder of the runs: checkpoints, logs, results")
    flag("--out", type=Path, default=Path("records"), help="folder of the records and their pages")
    flag("--by", default=records.git("config", "user.name") or "unknown", help="who measures, for the record")
    return parser


def main(argv=None):
    """Returns the records. Raises InputError, before anything is trained, for data that is wrong or code that no record
    can name; and after it, for runs that failed."""
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    split = argv.index("--") if "--" in argv else len(argv)
    args, more = get_args_parser().parse_args(argv[:split]), argv[split + 1 :]
    if own := sorted(sweep.flag_names(more) & OWN_FLAGS):
        raise InputError(f"-- --{own[0]}: is set by this program; pass it before the --, or leave it out")
    spec, commit, found = DATASETS[args.dataset], records.commit(), []
    args.seeds = list(dict.fromkeys(args.seeds))
    args.data_path = args.data_path or spec.path
    check_output(args.out / "record.json")
    checks = [f"--dataset={args.dataset}", f"--data_path={args.data_path}", f"--gpu={args.gpu[0]}"]
    in_a_process(check_data.main, [*checks, f"--model_path={args.runs}"])
    for method in args.method:
        flags = [f"--method={method}", f"--dataset={args.dataset}", f"--data_path={args.data_path}", *more]
        folder = args.runs / f"{args.dataset}_{method}"
        trials = spec.options.get("trial", (None,))
        rows = [f"trial {trial}: --trial {trial}" if trial else f"{method}:" for trial in trials]
        runs = len(rows) * len(args.seeds)
        if left := runs - len(results(folder, args.seeds, "last")):
            announce(args, method, prepare(flags), left)
        gpus = ["--gpus", *args.gpu] if args.gpu != ["cpu"] else []
        common = [f"--out={folder}", *chain(*(("--row", row) for row in rows)), "--seeds", *map(str, args.seeds)]
        for checkpoint in reversed(CHECKPOINTS):  # the tables that stay are those of the published way
            device = [] if gpus else ["--gpu=cpu"]
            test = ["--retry", f"--checkpoint={checkpoint}", "--test", "--all"]
            table = sweep.main([*common, *gpus, *test, "--", *flags, *device])
            for run in table["failed"]:
                failed = f"{run['row']}, seed {run['seed']} failed: {run['line']}"
                raise InputError(f"{folder}: {failed}; mend that, and start the same command again")
        found.append(write(args, method, more, folder, table, commit))
    return found


def in_a_process(function, *arguments):
    """The result of a function that uses a GPU, from a process of its own, which gives the GPU's memory back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_the_main_process) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BaseException:  # a signal, too, which must not wait for the result
            for process in multiprocessing.active_children():
                process.terminate()
            raise


# --------------------------------------------------------------------------------------------------------------- before


def prepare(flags):
    """Prepare SYSU-MM01's arrays unless they are there, in the size of these flags of training -> the flags, parsed."""
    args = train_ext_test0.get_args_parser().parse_args(flags)
    train_ext_test0.check_flags(args)
    if args.dataset == "sysu":
        try:
            sysu_train(args.data_path, (args.img_h, args.img_w))
        except InputError as reason:
            print(f"preparing, as {reason}")
            pre_process_sysu.main([f"--data_path={args.data_path}", f"--img_h={args.img_h}", f"--img_w={args.img_w}"])
    return args


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
    embed = engine.network_embedding(net, device, train_ext_test0.normalise, args.amp)
    of_batch = min(
        seconds(lambda: engine.extract(embed, eval_loader(paths, size, args.test_batch, 0), "visible", "a test batch"))
        for _ in range(2)
    )
    images = sum(len(paths) for paths in test.paths.values())
    return of_steps / MEASURED, of_batch / len(paths), sampler.steps, images


# ---------------------------------------------------------------------------------------------------------------- after


def write(args, method, more, folder, table, commit):
    """Write the record of a method and its page -> the record."""
    spec, demo = DATASETS[args.dataset], is_demo(args.data_path)
    scores = collect(folder, args.seeds)
    complete = complete_as_published(args.dataset, args.data_path)
    published = PUBLISHED.get(method, {}) if complete else {}
    seconds = {row["row"]: row["seconds"]["mean"] for s in table["settings"] for row in s["rows"] if row["seeds"]}
    files, but = results(folder, args.seeds, "best"), shlex.join(more)
    record = {
        "date": str(date.fromtimestamp(max(file.stat().st_mtime for file in files))),
        "commit": commit,
        "data": spec.name if complete else spec.title(demo, None),
        "real": not demo,
        "row": method + (f", but {but}" if more else ""),
        "flags": f"--method {method} --dataset {args.dataset} {but}".strip(),
        "command": f"python -m tools.reproduce --dataset {args.dataset} --method {method}"
        + (f" -- {but}" if more else ""),
        "scores": scores,
        "seeds": sorted(args.seeds),
        "hardware": processor() if args.gpu == ["cpu"] else in_a_process(graphics, args.gpu),
        "hours": round(sum(seconds.values()) / 3600, 3),
        "by": args.by,
    }
    rows = compare(scores, published, len(record["seeds"]))
    record["verdict"] = verdict(rows, record, complete, more)
    checked(record, records.Record, str(folder), "report it as a fault of this program")
    name = args.out / f"{record['date']}_reproduce_{args.dataset}_{method}"
    save_json(record, name.with_suffix(".json"))
    with atomic(name.with_suffix(".md")) as temporary:
        temporary.write_text(page(record, rows), encoding="utf-8", errors="replace")
    print(f"{record['verdict']}\n{name}.md and .json")
    return record


def collect(folder, seeds):
    """{"setting; FC; best epoch" or "... last epoch": {metric: `spread` over the seeds}}, the best first. The value
    of a seed is the mean over its networks (of RegDB ten, one for each trial) and galleries."""
    values = {}
    for checkpoint in CHECKPOINTS:
        for seed in seeds:
            for file in results(folder, [seed], checkpoint):
                for row in network_rows(file):
                    key = f"{search_title(row)}; FC; {checkpoint} epoch"
                    values.setdefault(key, {}).setdefault(seed, []).append(row["mean"])
    return {
        key: {
            metric: spread([sum(mean[metric] for mean in means) / len(means) for means in of_seeds.values()])
            for metric in METRICS
        }
        for key, of_seeds in values.items()
    }


def results(folder, seeds, checkpoint):
    """The files of results of some seeds in a folder of runs."""
    return sorted(file for seed in seeds for file in folder.glob(f"*/seed_{seed}/{sweep.RESULTS[checkpoint]}"))


def compare(scores, published, seeds):
    """[(setting, metric, published or None, `spread` at the best epoch, at the last, by how much it is missed or None)]

    Missed by 0: the published value lies within the 95 % interval of the mean over the seeds, or is exceeded.
    """
    rows, end = [], "; FC; best epoch"
    for setting in (key.removesuffix(end) for key in scores if key.endswith(end)):
        paper = dict(zip(METRICS, published.get(setting, ()), strict=False))
        for metric, best in scores[setting + end].items():
            missed = None
            if metric in paper and seeds >= SEEDS:
                missed = paper[metric] - best["mean"] if paper[metric] > best["interval"][1] else 0
            last = scores[f"{setting}; FC; last epoch"][metric]
            rows.append((setting, metric, paper.get(metric), best, last, missed))
    return rows


def verdict(rows, record, complete, more):
    """In one line, by the rule of docs/reproduction.md."""
    missed = [f"{setting}: {metric} by {gap:.2f}" for setting, metric, *_, gap in rows if gap]
    if not complete:
        return f"No verdict: {record['data']} is not the published data set, complete."
    if other := sorted(sweep.flag_names(more) - FREE_FLAGS):
        return f"No verdict: --{other[0]} is not left as in the method's recipe."
    if all(paper is None for _, _, paper, *_ in rows):
        return "No verdict: nothing is published for this method on this data set."
    if len(record["seeds"]) < SEEDS:
        return f"No verdict: it needs {SEEDS} seeds, not {len(record['seeds'])}."
    return (
        f"Not reproduced. Missed: {'; '.join(missed)}." if missed else "Reproduced: all published values are reached."
    )


PAGE = """# {row} on {data}

**{verdict}**

{values}

Values are in %, of the feature FC by cosine similarity, without re-ranking. ± is the standard deviation over the
seeds; brackets have the 95 % interval of their mean. The best epoch is chosen on the test set, as published. A value is
reached if the published one lies within the interval of the best epoch, or is exceeded.

{facts}
"""


def page(record, rows):
    """The page of a record, in Markdown."""
    values = [["setting", "metric", "published", "best epoch", "last epoch", ""]]
    for setting, metric, paper, best, last, missed in rows:
        interval = " [{:.2f}, {:.2f}]".format(*best["interval"]) if best["interval"] else ""
        state = "" if missed is None else f"missed by {missed:.2f}" if missed else "reached"
        paper = "" if paper is None else f"{paper:.2f}"
        values.append([setting, metric, paper, plus_minus(best, 2) + interval, plus_minus(last, 2), state])
    shown = ("date", "by", "commit", "data", "flags", "command", "seeds", "hardware", "hours")
    facts = [["", ""], *([name, one_line(str(record[name]).strip("[]"))] for name in shown)]
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
