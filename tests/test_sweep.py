"""The sweep: its grid, what happens to its runs, and its statistics."""

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import utils
from conftest import SMALL, result_row
from drawing import figures
from tools import sweep, sweep_tables
from utils import InputError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tools.sweep"])

# Stands in for both scripts. It notes that it was called, and by --margin it fails (6), is killed (7), or waits for
# SIGTERM (8) or a file (9). Two of them on one GPU fail. The test's Rank-1 is margin x (10 + seed^2).
STUB = """
import atexit, json, os, pathlib, signal, sys, time

flags = dict(zip(sys.argv[1:], sys.argv[2:])) | dict(arg.split("=", 1) for arg in sys.argv[1:] if "=" in arg)
script = "test" if "--json" in flags else "train"
path = pathlib.Path(flags["--json"] if script == "test" else flags["--model_path"])
folder = path.parent
margin, seed = float(folder.parent.name.split("=")[1]), int(folder.name.split("_")[1])
with open(os.environ["CALLS"], "a") as file:
    file.write(f"{script} {margin:g} {seed}\\n")
if flags["--gpu"] != "cpu":
    gpu = pathlib.Path(os.environ["CALLS"] + ".gpu" + flags["--gpu"])
    gpu.mkdir()
    atexit.register(gpu.rmdir)
    with open(os.environ["CALLS"] + ".gpus", "a") as file:
        file.write(flags["--gpu"])
    time.sleep(0.3)
if script == "train":
    if margin == 6:
        print("warning: odd")
        sys.exit("train_ext_test0.py: error: epoch 3: the loss is not finite: lower --lr")
    if margin == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if margin == 8:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        time.sleep(60)
    while margin == 9 and not pathlib.Path(os.environ["CALLS"] + ".go").exists():
        time.sleep(0.05)
    (folder / "log").mkdir(exist_ok=True)
    lines = [{"epoch": epoch, "seconds": 2 + seed, "identity": margin + seed - epoch} for epoch in (0, 1)]
    (folder / "log" / "run.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
else:
    labels = {"dataset": "sysu", "mode": "all", "direction": "infrared to visible", "protocol": "seeded", "shots": 1}
    labels |= {"model": "trained", "reranking": "none", "selection": "none", "demo": True, "trials": [0, 1]}
    mean = {"Rank-1": margin * (10 + seed**2), "mAP": 5, "mINP": 1}
    std = {"Rank-1": 1 + seed, "mAP": 0, "mINP": 0}
    row = labels | {"feature": "FC", "mean": mean, "std": std, "images": "/data"}
    row |= {"per_trial": [{"queries": 3, "evaluated": 3, "gallery": 4}], "curves": {"cmc": [5.0, 9.0]}}
    results = [row | {"feature": "POOL"}, row, row | {"model": "untrained"}]
    keep = {"dataset": "sysu", "resume": flags["--resume"], "all": "--all" in sys.argv}
    path.write_text(json.dumps({"flags": keep, "results": results}))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Both scripts are the stub, and there is data -> a function: what was called so far."""
    make_data(tmp_path / "data")
    stub, file = tmp_path / "stub.py", tmp_path / "calls"
    stub.write_text(STUB)
    file.touch()
    monkeypatch.setattr(sweep, "PROGRAMS", {"train": stub, "test": stub})
    monkeypatch.setenv("CALLS", str(file))
    return lambda: file.read_text().splitlines()


def make_data(tree, size=9):
    """A folder in SYSU-MM01's layout whose files of images have this size."""
    (tree / "exp").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test"), 1):
        (tree / "exp" / f"{split}_id.txt").write_text(str(number))
    for camera in (1, 3):
        (tree / f"cam{camera}" / "0003").mkdir(parents=True)
        (tree / f"cam{camera}" / "0003" / "0001.jpg").write_bytes(bytes(size))


def run(out, *arguments, margins="1,2", common=("--gpu", "cpu"), data="data"):
    where = ["--data_path", out.parent / data]
    return sweep.main(["--out", out, "--vary", f"margin={margins}", *arguments, "--", *map(str, where), *common])


def runs_of(*arguments):
    """The runs that a command plans."""
    split = arguments.index("--")
    args = sweep.get_args_parser().parse_args(["--out", "out", *arguments[:split]])
    return sweep.plan_runs(sweep.new_plan(args, [*arguments[split + 1 :]]), Path("out"))


def test_curves_may_be_of_any_method_s_terms():
    args, _ = sweep.get_args_parser().parse_known_args(
        ["--out", "x", "--table", "--curves", "alignment", "centre", "triplet"]
    )
    assert args.curves == ["alignment", "centre", "triplet"]


def test_rows_of_the_network_are_compared_under_what_they_are(tmp_path):
    """Not those of baselines; corrupted images, and a test on other data, are settings of their own."""
    models = ["HOG", "untrained", "trained", "trained, visible images corrupted", "trained on LLCM"]
    per_trial = [{"queries": 3, "evaluated": 3, "gallery": 4}]
    more = {"mean": dict.fromkeys(sweep_tables.METRICS, 1.0), "std": None, "curves": {"cmc": [1.0]}}
    rows = [
        result_row(model=name, feature=f, **more) | {"per_trial": per_trial} for name in models for f in ("POOL", "FC")
    ]
    (tmp_path / "r.json").write_text(json.dumps({"flags": {}, "results": rows}))
    found = sweep_tables.network_rows(tmp_path / "r.json")
    assert [(row["model"], row["feature"]) for row in found] == [(name, "FC") for name in models[2:]]
    plain, *others = map(sweep_tables.setting_text, found)
    start, end = plain.split("FC; epoch ")
    assert others == [f"{start}{name}; FC; epoch {end}" for name in models[3:]]


def test_a_union_is_tested_on_one_data_set():
    common = ["--row", "a: --method base", "--seeds", "0"]
    with pytest.raises(InputError, match=r"--dataset sysu\+llcm: name one data set to test on, such as --test '"):
        runs_of(*common, "--", "--dataset", "sysu+llcm", "--gpu=cpu")
    (one,) = runs_of(*common, "--test=--dataset regdb --cross_data", "--", "--dataset", "sysu+llcm", "--gpu=cpu")
    assert (one.train.dataset, one.test.dataset, one.test.cross_data) == ("sysu+llcm", "regdb", True)
    assert (one.data, one.test_data) == (("sysu+llcm", "../data/"), ("regdb", "../data/RegDB/"))


def test_grid_is_the_product_of_flags_and_seeds():
    runs = runs_of(
        "--vary", "method=base,adp", "lr=0.1,1", "--vary", "milestones=5 9", "--seeds", "3", "4", "--", "--gpu=cpu"
    )
    assert [run.seed for run in runs] == [3] * 4 + [4] * 4
    assert [run.row for run in runs[:4]] == [
        f"method={method},lr={lr},milestones=5 9" for method in ("base", "adp") for lr in ("0.1", "1")
    ]
    for run in runs:
        assert f"method={run.train.method},lr={run.train.lr:g},milestones=5 9" == run.row
        assert (run.train.seed, run.train.milestones, run.train.gpu) == (run.seed, [5, 9], "cpu")
        assert run.test.gpu == "cpu"
        assert run.test.resume.startswith(f"{run.train.model_path}/sysu_{run.train.method}_")
        assert run.test.resume.endswith(f"_seed_{run.seed}_9_last.t")
    assert len({run.folder for run in runs}) == 8
    assert runs[0].folder == Path("out/method=base,lr=0.1,milestones=5_9/seed_3")


def test_rows_by_name():
    first, second = runs_of(
        "--row", "paper:", "--row", "all/exact: --method agw --weighting exact", "--seeds", "1", "--checkpoint", "best",
        "--", "--method", "caj", "--mode", "indoor",
    )  # fmt: skip
    assert (first.row, first.train.method, first.folder) == ("paper", "caj", Path("out/paper/seed_1"))
    assert (second.row, second.train.method, second.folder) == ("all/exact", "agw", Path("out/all_exact/seed_1"))
    assert second.train.weighting == "exact"
    assert second.test.mode == "indoor"
    assert second.test.resume.endswith("_best.t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the arguments --vary --row --table is required"),
        (("--vary", "method"), "'method' is not FLAG=VALUE,VALUE"),
        (("--vary", "method=base,"), "'method=base,' is not FLAG=VALUE,VALUE"),
        (("--vary", "method=base,gan"), "row method=gan: error: argument --method: invalid choice: 'gan'"),
        (("--vary", "method=base", "--epochs", "9"), "arguments: --epochs 9; flags of training follow after --"),
        (("--vary", "methods=base"), "row methods=base: error: unrecognized arguments: --methods base"),
        (("--vary", "lr=1", "--vary", "num-pos=2", "lr=2"), "--vary lr: is there twice; give all"),
        (("--vary", "method=base,base"), "rows need different names"),
        (("--vary", *(f"{flag}={','.join('1' * 59)}" for flag in "abcdef")), "are more than 1000 runs; take fewer"),
        (("--vary", "method=base,adp", "--seeds", *map(str, range(501))), "are more than 1000 runs; take fewer"),
        (("--row", "--method adp"), "is not 'NAME: FLAGS'"),
        (("--row", "a: --method 'adp"), "No closing quotation"),
        (("--row", "table.json: --lr 0.1"), "names a file of the table, or has a line break; choose another"),
        (("--row", "a\nb: --lr 0.1"), "names a file of the table, or has a line break; choose another"),
        (("--row", "..: --method adp"), "rows need different names that can be folders, not .."),
        (("--vary", "seed=1,2"), "row seed=1: the sweep sets --seed; leave it out"),
        (("--vary", "method=adp", "--", "--model-path", "x"), "row method=adp: the sweep sets --model_path"),
        (("--vary", "method=adp", "--", "--epochs", "0"), "row method=adp: error: argument --epochs: '0' is not"),
        (
            ("--vary", "method=adp", "--", "--dataset", "llcm", "--select", "val"),
            "--select val: is an option of SYSU-MM01",
        ),
        (("--vary", "method=adp", "--test", "--some"), "unrecognized arguments: --some"),
        (("--vary", "method=adp", "--test", "--json x"), "row method=adp: the sweep sets --json"),
        (("--vary", "method=adp", "--test", "--calibrate x"), "row method=adp: the sweep sets --calibrate"),
        (("--vary", "method=adp", "--gpus", "0", "--", "--gpu", "1"), "--gpus sets --gpu for each run"),
        (("--vary", "method=adp", "--curves", "loss"), "argument --curves: invalid choice: 'loss'"),
        (("--table",), "sweep.json: cannot be read"),
        (("--table", "--seeds", "1"), "pass only --out and --curves with it"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_runs(arguments, message, calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    with pytest.raises(SystemExit) as stopped:
        utils.cli(functools.partial(sweep.main, ["--out", tmp_path / "out", *arguments]))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sweep.py")
    assert message in line
    assert not calls()
    assert not (tmp_path / "out").exists()


def test_each_run_is_trained_and_tested_once(calls, tmp_path):
    out = tmp_path / "out"
    run(out, "--seeds", "0", "1")
    assert calls() == [f"{s} {margin} {seed}" for seed in (0, 1) for margin in (1, 2) for s in ("train", "test")]
    before = len(calls())
    table = run(out, "--seeds", "0", "1", "2", "--jobs", "3", margins="2,1,3")
    assert sorted(calls()[before:]) == sorted(
        f"{script} {name}" for name in ("1 2", "2 2", "3 0", "3 1", "3 2") for script in ("train", "test")
    )
    assert sweep.main(["--out", out, "--table"]) == table
    assert len(calls()) == before + 10


def test_each_gpu_has_one_run_at_a_time(calls, tmp_path):
    run(tmp_path / "out", "--gpus", "0", "3", "--seeds", "0", "1", common=())
    assert len(list(tmp_path.glob("out/*/*/results.json"))) == 4
    used = (tmp_path / "calls.gpus").read_text()
    assert len(used) == 8  # four runs, each trained and tested
    assert set(used) == {"0", "3"}


ODD = r"~\{^}&%$#"  # the name of a row
SPECIAL = {ODD: r"\textasciitilde{}\textbackslash{}\{\textasciicircum{}\}\&\%\$\#"}  # in LaTeX
SPECIAL |= {"; ": " & ", "_": r"\_", "±": r"$\pm$", "–": "--"}


@pytest.fixture
def ended(monkeypatch):
    """Runs of two seeds: of two rows, both have finished, and one was tested in two settings; of the third row, the
    first seed has failed, of the fourth both."""
    monkeypatch.setattr(sweep_tables, "read_results", lambda results: {"results": results.rows})
    failure = SimpleNamespace(exists=lambda: True)  # of a finished run: at first

    def run(row, seed, rank=None, log=(), *settings):
        rows = [{"mean": {"Rank-1": rank, "mAP": rank / 2, "mINP": 1.0}, "std": None}, *settings] if rank else []
        rows = [result_row(**row) for row in rows]
        results = SimpleNamespace(exists=lambda: rank, rows=rows)
        failed = {"failure": failure, "failed": lambda: {"line": "no memory"}}
        return SimpleNamespace(row=row, seed=seed, results=results, log=lambda: log, **failed)

    other = {"mean": {"Rank-1": 70.0, "mAP": 35.0, "mINP": 1.0}, "std": {"Rank-1": 2.0, "mAP": 0.5, "mINP": 0.0}}
    other |= {"reranking": "random_walk", "selection": "none", "trials": [0, 1]}
    log = [{"epoch": 1, "identity": 4.0, "seconds": 10}, {"epoch": 0, "identity": 6.0, "seconds": 0.25}, {"epoch": 2}]
    runs = [run("a_b", 0, 50, log), run("c|d", 0, 52), run(ODD, 0), run("e", 0)]
    runs += [run("a_b", 1, 60, [{"epoch": 0, "identity": 9.0, "seconds": 20}])]
    runs += [run("c|d", 1, 63, [{"epoch": 0, "identity": 2.0, "seconds": 7}], other)]
    return [*runs, run(ODD, 1, 58), run("e", 1)]


def test_no_difference_is_minus_zero():
    assert sweep_tables.signed({"mean": -0.004, "interval": (-0.01, -0.001)}) == "+0.00 [-0.01, +0.00]"


def test_written_tables(ended, tmp_path, monkeypatch, capsys):
    """Against tables worked out by hand. Of 50 and 60, the deviation is 10 / sqrt(2); of the differences 2 and 3 to it,
    the interval is 2.5 ± 12.7062 / 2, by a table of Student's t. A row is paired with its own seed."""
    head, none = "row; seeds; Rank-1; mAP; mINP; training, s", "e; 0 of 2, 2 failed; –; –; –; –"
    first = [head, "a_b; 2 of 2; 55.00 ± 7.07; 27.50 ± 3.54; 1.00 ± 0.00; 15.1 ± 6.9"]
    first += ["c|d; 2 of 2; 57.50 ± 7.78; 28.75 ± 3.89; 1.00 ± 0.00; 3.5 ± 4.9"]
    first += ["  minus a_b; 2 pairs; +2.50 [-3.85, +8.85]; +1.25 [-1.93, +4.43]; +0.00 [+0.00, +0.00]; "]
    first += [f"{ODD}; 1 of 2, 1 failed; 58.00; 29.00; 1.00; 0.0", "  minus a_b; 1 pair; -2.00; -1.00; +0.00; ", none]
    second = [head, "c|d; 1 of 2; 70.00 (2.00); 35.00 (0.50); 1.00 (0.00); 7.0", none]
    title = "SYSU-MM01, all-search, infrared to visible, seeded protocol, 1-shot, "
    titles = [f"{title}trial 0; FC; epoch chosen on test ids"]
    titles += [f"{title}2 trials; FC, re-ranked by random_walk; epoch fixed"]
    failures = [f"{run}, seed {seed} failed: no memory" for run, seed in ((ODD, 0), ("e", 0), ("e", 1))]

    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    plan = {"rows": [[row, []] for row in ("a_b", "c|d", ODD, "e")], "seeds": [0, 1]}
    table = sweep_tables.tabulate(ended, plan)
    sweep_tables.write(table, ended, ["identity", "triplet"], tmp_path)
    screen, (markdown, latex) = [""], ([], [])
    for title, rows in zip(titles, (first, second), strict=True):
        screen += [title, *rows, ""]
        lines = ["| " + row.replace("|", r"\|").replace("; ", " | ") + " |" for row in rows]
        markdown += [f"**{title}**", "", lines[0], "| --- | ---: | ---: | ---: | ---: | ---: |", *lines[1:], ""]
        lines = [re.sub("|".join(map(re.escape, SPECIAL)), lambda m: SPECIAL[m[0]], row) + r" \\" for row in rows]
        latex += [f"% {title}", r"\begin{tabular}{lrrrrr}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
        latex += [r"\bottomrule", r"\end{tabular}", ""]
    markdown += [sweep_tables.NOTE, *(f"- {line}" for line in failures), ""]
    latex += [*(f"% {line}" for line in (sweep_tables.NOTE, *failures)), ""]
    for name, lines in (("md", markdown), ("tex", latex)):
        assert (tmp_path / f"table.{name}").read_text(encoding="utf-8").split("\n") == lines
    text = capsys.readouterr().out
    shown, _, rest = text.partition("\nMean ± standard")
    lines = [re.sub("(?<=[^ ])  +", "; ", line) for line in shown.split("\n")]
    assert lines == [row.removesuffix("; ") for row in screen]
    assert (
        "\na_b                    2 of 2          55.00 ± 7.07          27.50 ± 3.54           1.00 ± 0.00   " in text
    )
    files = f"{tmp_path}/table.md, .tex, .json and .png"
    end = "The folder of a failed run contains its full output; --retry continues it."
    assert rest.split("\n")[2:] == [*failures, "", f"{files}; {tmp_path}/curves.png", end, ""]
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert [part.get_suptitle().replace("\n", " ") for part in drawn["table.png"].subfigs] == titles
    (panel,) = drawn["curves.png"].axes
    assert (panel.get_title(), panel.get_xlabel()) == ("identity", "epoch")
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[0, 7.5], [1, 4]], [[0, 2]]]
    edges = [{*map(tuple, band.get_paths()[0].vertices.round(2).tolist())} for band in panel.collections]
    assert edges == [{(0, 5.38), (0, 9.62), (1, 4)}, {(0, 2)}]  # 7.5 ± 1.5 sqrt(2); in epoch 1, there is one seed
    title = drawn["curves.png"].get_suptitle()
    assert title == "mean over the seeds ± their standard deviation; scores: of the first trial of the test"
    sweep_tables.write(table | {"failed": []}, ended, ["local"], tmp_path)
    assert capsys.readouterr().out.endswith(f"\n\n{files}\n")  # no log has this value


@pytest.mark.slow
def test_failed_runs_are_told_and_others_go_on(calls, tmp_path, capsys):
    out = tmp_path / "out"
    line = "train_ext_test0.py: error: epoch 3: the loss is not finite: lower --lr"
    table = run(out, "--seeds", "0", "1", margins="1,6,7")
    assert calls() == [f"{s} {seed}" for seed in (0, 1) for s in ("train 1", "test 1", "train 6", "train 7")]
    assert [row["failed"] for row in table["settings"][0]["rows"]] == [[], [0, 1], [0, 1]]
    text = capsys.readouterr().out
    assert f"margin=6, seed 1 failed: {line}" in text
    assert "margin=7, seed 0 failed: exit status -9 without a message" in text

    run(out, "--seeds", "0", "1", margins="1,6,7")
    assert len(calls()) == 8
    run(out, "--seeds", "0", "1", "--retry", margins="1,6,7")
    assert calls()[8:] == ["train 6 0", "train 7 0", "train 6 1", "train 7 1"]
    with pytest.raises(InputError, match=f"no run has finished; margin=6, seed 0 failed: {line}"):
        run(tmp_path / "other", "--seeds", "0", margins="6")


@pytest.mark.parametrize("name", [".lock", "train.txt", "train_errors.txt", "test.txt", "test_errors.txt"])
def test_a_pipe_in_the_folder_of_a_run_is_told(name, calls, tmp_path):
    """It would wait for its reader."""
    folder = tmp_path / "out" / "margin=1" / "seed_0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"seed_0/{name}: is no regular file; name another"):
        run(tmp_path / "out", "--seeds", "0")
    assert not calls()


def test_other_flags_are_refused(calls, tmp_path):
    out = tmp_path / "out"
    run(out, "--seeds", "0", common=("--epochs", "5", "--gpu", "cpu"))
    run(out, "--seeds", "0", common=("--epochs", "5", "--gpu", "0", "--workers", "1"))
    with pytest.raises(
        InputError,
        match=r"margin=1/seed_0: was run with --epochs 5, but this sweep uses --epochs 6; .* or remove this folder$",
    ):
        run(out, "--seeds", "0", common=("--epochs", "6"))
    with pytest.raises(InputError, match=r"with --alpha 1 --epochs 5, but this sweep uses --alpha 2.0 --epochs 6; "):
        run(out, "--seeds", "0", common=("--epochs", "6", "--alpha", "2"))
    with pytest.raises(
        InputError, match=r"with --all False, but this sweep uses --all True; .* or remove results.json to test again$"
    ):
        run(out, "--seeds", "0", "--test", "--all", common=("--epochs", "5"))
    assert len(calls()) == 4
    # Another checkpoint of the same runs is tested beside the first.
    run(out, "--seeds", "0", "--checkpoint", "best", common=("--epochs", "5", "--gpu", "cpu"))
    assert [call.split()[0] for call in calls()[4:]] == ["train", "test"] * 2
    tested = {name: json.loads((out / "margin=1" / "seed_0" / name).read_text()) for name in sweep.RESULTS.values()}
    assert [Path(content["flags"]["resume"]).name[-7:] for content in tested.values()] == ["_last.t", "_best.t"]
    run(out, "--seeds", "0", common=("--epochs", "5"))
    assert len(calls()) == 8


def test_data_may_move_but_not_change(calls, tmp_path, capsys):
    out = tmp_path / "out"
    table = run(out, "--seeds", "0")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    table = {**run(out, "--seeds", "0", data="moved"), "settings": table["settings"]}
    assert sweep.main(["--out", out, "--table"]) == table
    assert len(calls()) == 4
    make_data(tmp_path / "images", size=8)
    shutil.copytree(tmp_path / "moved", tmp_path / "lists")
    (tmp_path / "lists" / "exp" / "train_id.txt").write_text("4")
    for data in ("images", "lists"):
        for margins in ("1,2", "2,5"):  # finished runs, and a new one beside them
            words = r"out/margin=\d/seed_0: has other data than .*/(images|lists); pass the --data_path of"
            with pytest.raises(InputError, match=words):
                run(out, "--seeds", "0", margins=margins, data=data)
    assert len(calls()) == 4

    test = ["--seeds", "0", "--test", f"--data_path {tmp_path}/images"]
    other = tmp_path / "other"
    run(other, *test, data="moved")
    shutil.move(tmp_path / "images", tmp_path / "images_moved")
    make_data(tmp_path / "images", size=7)
    with pytest.raises(InputError, match=r"other/sweep.json: has other data than .*/images; pass the --data_path"):
        run(other, *test, "--seeds", "0", "1", data="moved")
    assert len(calls()) == 8

    record = out / "margin=2" / "seed_0" / "flags.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"data": "0"}))  # as a sweep of an earlier version could
    with pytest.raises(
        InputError, match=r"margin=2/seed_0: has other data than .*margin=1/seed_0; pass the --data_path"
    ):
        sweep.main(["--out", out, "--table"])
    del content["data"]
    record.write_text(json.dumps(content))
    capsys.readouterr()
    assert sweep.main(["--out", out, "--table"]) == table
    assert capsys.readouterr().out.count("margin=2/seed_0 is older and does not record its data") == 1


def test_failed_runs_do_not_bind_the_data(calls, tmp_path):
    """What they failed for may have been an image that is mended now."""
    make_data(tmp_path / "mended", size=8)
    out, failed = tmp_path / "out", r"no run has finished; margin=6, seed 0 failed"
    for data in ("data", "mended"):
        with pytest.raises(InputError, match=failed):
            run(out, "--seeds", "0", "--retry", margins="6", data=data)
    run(out, "--seeds", "0", "--retry", margins="6,1", data="mended")
    assert calls() == [*["train 6 0"] * 3, "train 1 0", "test 1 0"]
    for margins in ("6,1", "6"):  # one has finished now
        with pytest.raises(InputError, match="has other data than .*/data; pass"):
            run(out, "--seeds", "0", "--retry", margins=margins, data="data")


def test_two_data_sets_of_one_name_are_no_rows_of_one_sweep(calls, tmp_path):
    make_data(tmp_path / "other", size=8)
    rows = ("--row", f"a: --data_path {tmp_path}/data", "--row", f"b: --data_path {tmp_path}/other")
    with pytest.raises(InputError, match="has other data than"):
        sweep.main(["--out", tmp_path / "out", *rows, "--", "--gpu", "cpu"])
    assert not calls()


# ------------------------------------------------------------------------------------------------------ stops and kills


def start(programs, out, *arguments, margins):
    """The sweep in a process of its own; its stderr goes to {out}.errors."""
    command = ["--out", out, "--vary", f"margin={margins}", "--seeds", "0", *arguments, "--", "--gpu", "cpu"]
    command += ["--data_path", str(out.parent / "data")]
    process = PROCESSES.Process(target=_start, args=(programs, command, dict(os.environ), f"{out}.errors"))
    process.start()
    return process


def _start(programs, command, environment, errors):
    for stream, file in ((sys.stdout, os.devnull), (sys.stderr, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(environment)
    sweep.PROGRAMS = programs
    sys.argv = ["sweep.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore Ctrl-C
    utils.cli(functools.partial(sweep.main, command))


def wait_for(condition):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_sweep_stops_its_runs_and_goes_on(number, calls, tmp_path):
    out = tmp_path / "out"
    process = start(sweep.PROGRAMS, out, "--jobs", "2", margins="1,8,2,3")
    wait_for(lambda: "train 8 0" in calls() and "train 2 0" in calls())
    os.kill(process.pid, number)
    process.join(300)
    assert process.exitcode == 128 + number
    (line,) = Path(f"{out}.errors").read_text().split("\n")[1:-1]
    assert line.startswith(f"sweep.py: stopped by {number.name}; ")
    assert line.endswith(" of 4 runs are finished; start the same command to continue")
    assert not (out / "margin=8" / "seed_0" / "failed.json").exists()
    assert "test 8 0" not in calls()
    finished = [name for name in calls() if name.startswith("test")]
    programs = {**sweep.PROGRAMS, "train": tmp_path / "train.py"}
    programs["train"].write_text(STUB.replace("margin == 8", "False"))
    process = start(programs, out, "--jobs", "2", margins="1,8,2,3")
    process.join(300)
    assert process.exitcode == 0
    assert sorted(name for name in calls() if name.startswith("test")) == [f"test {n} 0" for n in (1, 2, 3, 8)]
    for name in finished:
        assert calls().count(name.replace("test", "train")) == 1


@pytest.mark.slow
def test_killed_sweep_goes_on_when_what_outlived_it_has_ended(calls, tmp_path):
    out = tmp_path / "out"
    process = start(sweep.PROGRAMS, out, margins="1,9,2")
    wait_for(lambda: "train 9 0" in calls())
    process.kill()
    process.join(300)
    process = start(sweep.PROGRAMS, out, "--jobs", "2", margins="1,9,2")
    wait_for(lambda: "test 2 0" in calls())
    assert calls().count("train 9 0") == 1  # still the first
    (tmp_path / "calls.go").touch()
    process.join(300)
    assert process.exitcode == 0
    assert sorted(calls()) == sorted(
        ["train 1 0", "test 1 0", "train 9 0", "train 9 0", "test 9 0", "train 2 0", "test 2 0"]
    )


@pytest.mark.slow
def test_sweep_of_real_runs(sysu_tree, tmp_path):
    out = tmp_path / "out"
    command = ["--out", out, "--vary", "method=base,adp", "--seeds", "0", "--jobs", "2", "--test", "--all"]
    command += ["--", *SMALL, "--data_path", sysu_tree, "--epochs", "1"]
    table = sweep.main(command)
    for setting in table["settings"]:
        for row in setting["rows"]:
            assert [*row["seeds"]] == ["0"]
            for seed, value in row["seeds"].items():
                results = json.loads((out / row["row"] / f"seed_{seed}" / "results.json").read_text())["results"]
                assert value["mean"] in [result["mean"] for result in results if result["feature"] == "FC"]
                assert value["seconds"] > 0
    modes = {part for setting in table["settings"] for part in setting["setting"].split(", ") if "-search" in part}
    assert modes == {"all-search", "indoor-search"}
    files = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    assert sweep.main(command) == table
    assert {path: path.stat().st_mtime_ns for path in out.rglob("results.json")} == files
