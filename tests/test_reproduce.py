"""From a data set to a verdict: the rule, what is compared, and a whole run that is stopped and goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import model
from conftest import exit_status, result_row
from tools import check_data, records, reproduce, sweep, sweep_tables
from utils import InputError

ALL, REGDB = reproduce.ALL, reproduce.REGDB
COMMIT = "0123456789" * 4


def spread(mean, half):
    return {"mean": mean, "std": 1.0, "interval": [mean - half, mean + half], "count": 3}


def judged(published, seeds=3, changed=(), complete=True, **best):
    """The states, and the verdict, of Rank-1, mAP and mINP at the best epoch."""
    scores = {f"{ALL}; FC; {which} epoch": best for which in ("best", "last")}
    rows = reproduce.compare(scores, {ALL: published}, judged=seeds >= 3 and complete and not changed)
    record = {"data": "SYSU-MM01", "seeds": [*range(seeds)]}
    return [row[-1] for row in rows], reproduce.verdict(rows, record, complete, changed)


VALUES = {"Rank-1": spread(72.0, 1.5), "mAP": spread(71.0, 0.5), "mINP": spread(50.0, 3.0)}


@pytest.mark.parametrize(
    ("published", "states", "verdict"),
    [
        ((73.4, 69.7, 53.5), ["reached", "reached", "missed by 3.50"], f"Not reproduced: {ALL}, mINP missed by 3.50."),
        (
            (73.4, 69.7),
            ["reached", "reached", ""],
            "Reproduced: the 2 published values that are known here are reached.",
        ),
        ((73.5, 71.6), ["reached", "missed by 0.60", ""], f"Not reproduced: {ALL}, mAP missed by 0.60."),
        ((), ["", "", ""], "No verdict: tools/reproduce.py knows no published value of this method on this data set."),
    ],
)
def test_a_value_is_reached_within_the_interval_or_above_it(published, states, verdict):
    assert judged(published, **VALUES) == (states, verdict)


def test_seeds_that_differ_much_decide_nothing():
    """A collapsed seed makes the interval so wide that any published value lies within it."""
    wide = sweep_tables.spread([73.0, 72.9, 1.1])
    states, verdict = judged((73.04, 69.7), **(VALUES | {"Rank-1": wide}))
    assert states[0] == "undecided"
    assert verdict == f"No verdict: the seeds differ too much in {ALL}, Rank-1. Look at each, or take more seeds."
    assert judged((40.0,), **(VALUES | {"Rank-1": wide}))[0][0] == "reached"  # the mean is above it
    for half, state in ((2.9, "reached"), (3.1, "undecided")):
        assert judged((73.04,), **{"Rank-1": spread(72.0, half)})[0] == [state]
    states, verdict = judged((73.04, 72.0), **(VALUES | {"Rank-1": wide}))
    assert verdict == f"Not reproduced: {ALL}, mAP missed by 1.00."


def test_when_there_is_no_verdict():
    for more, text in (
        ({"complete": False}, "SYSU-MM01 is not the published data set, complete."),
        ({"changed": ["epochs", "lr"]}, "--epochs is not left as in the method's recipe."),
        ({"seeds": 2}, "it needs 3 seeds, not 2."),
    ):
        assert judged((70.0, 70.0), **VALUES, **more) == (["", "", ""], f"No verdict: {text}")


def test_published_values_are_those_of_the_page():
    """docs/models.md has them too, of all-search, indoor-search and RegDB from visible to thermal."""
    page = (Path(reproduce.__file__).parents[1] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$", page, re.MULTILINE)
    listed = {
        (method, setting): tuple(float(value) for value in re.findall(r"[\d.]+", cell))
        for method, *cells in rows
        for setting, cell in zip((ALL, reproduce.INDOOR, REGDB[0]), cells, strict=True)
        if cell.strip()
    }
    known = {(m, setting): values for m, of in reproduce.PUBLISHED.items() for setting, values in of.items()}
    assert {key: known[key] for key in listed} == listed
    others = {("dns", setting) for setting in (REGDB[1], *reproduce.LLCM)}  # of its notebook
    assert known.keys() - listed.keys() == others | {("rle", REGDB[1])}
    assert known["rle", REGDB[1]] == (91.0, 86.6)  # of its paper
    assert [known["dns", setting] for setting in (REGDB[1], *reproduce.LLCM)] == [
        (93.49, 88.1),
        (66.02, 68.6),
        (57.45, 64.11),
    ]


def test_drawn_data_with_the_published_counts_is_not_the_published_data(sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(check_data, "check_counts", lambda *_: "as published (demo data)")
    assert not reproduce.complete_as_published("sysu", sysu_tree)
    shutil.copytree(sysu_tree, tmp_path / "real", copy_function=os.link, ignore=shutil.ignore_patterns("demo.txt"))
    assert reproduce.complete_as_published("sysu", tmp_path / "real")
    monkeypatch.setattr(check_data, "check_counts", lambda *_: "note: 9 training ids, not 395 as published")
    assert not reproduce.complete_as_published("sysu", tmp_path / "real")


def test_the_page_says_what_the_record_says():
    record = {"row": "adp", "data": "SYSU-MM01", "verdict": "Not reproduced.", "date": "2026-01-02", "by": "me [x]"}
    record |= {"commit": COMMIT, "flags": "--method adp", "command": "a | b", "seeds": [0, 4], "hardware": "h"}
    rows = [(ALL, "mAP", 73.0, spread(70.0, 1.5), spread(69.0, 0.5), "missed by 3.00")]
    rows += [(ALL, "mINP", None, {"mean": 50.0, "std": None, "interval": None}, {"mean": 49.0, "std": None}, "")]
    text = reproduce.page(record | {"hours": 3.5}, rows)
    assert text.startswith("# adp on SYSU-MM01\n\n**Not reproduced.**\n")
    assert f"| {ALL} | mAP | 73.00 | 70.00 ± 1.00 [68.50, 71.50] | 69.00 ± 1.00 | missed by 3.00 |\n" in text
    assert f"| {ALL} | mINP |  | 50.00 | 49.00 |  |\n" in text
    for line in ("| seeds | 0, 4 |", "| by | me [x] |", "| command | a \\| b |", "| hours | 3.5 |"):
        assert f"{line}\n" in text


def test_all_gpus_are_used_at_a_time(regdb, monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce.sweep, "main", lambda argv: calls.append(argv) or {"failed": [], "settings": []})
    with pytest.raises(InputError, match="^base: 10 runs have not finished; mend that"):
        regdb("--method", "base", "--seeds", "4", "--gpu", "1", "3", "1")
    (argv,) = calls
    place = argv.index("--gpus")
    assert argv[place + 1 : place + 3] == ["1", "3"]
    assert not [word for word in argv if word.startswith("--gpu=")]
    assert argv[argv.index("--seeds") + 1] == "4"
    assert {"--checkpoint=last", "--all", "--retry", "--method=base"} <= {*argv}
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--row"] == [
        f"trial_{trial}: --trial {trial}" for trial in range(1, 11)
    ]


def test_flags_that_make_it_another_training(tmp_path, monkeypatch):
    args = reproduce.get_args_parser().parse_args([])
    changed = lambda *more: reproduce.changed_flags("adp", args, [*more])  # noqa: E731
    assert changed("--epochs", "3", "--lr=1", "--workers", "2") == ["epochs", "lr"]
    assert changed("--workers=8", "--square", "1", "--cache", "gpu", "--test_batch=9") == []
    assert changed("--epochs", "101", "--weights", "imagenet") == []  # as they are
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"some")
    assert changed("--weights", str(weights)) == ["weights"]
    monkeypatch.setattr(model, "file_sha256", lambda file: "0676ba61" + 56 * "0")  # of ImageNet's ResNet-50
    assert changed("--weights", str(weights)) == []
    assert changed("--weights", str(weights), "--arch=resnet18") == ["arch", "weights"]
    assert changed("--weights", str(weights), "--arch=clip_resnet50") == ["arch", "weights"]  # torchvision has none


def test_published_values_are_of_settings_that_tests_have(sysu_tree, regdb_tree, llcm_tree):
    known = set()
    for name, tree in (("sysu", sysu_tree), ("regdb", regdb_tree), ("llcm", llcm_tree)):
        spec = reproduce.DATASETS[name]
        options = {flag: spec.options[flag] for flag in ("mode", "protocol", "shots") if flag in spec.options}
        searches = spec.searches(tree, spec.directions, [1], **options).searches
        known |= {reproduce.search_title(search.setting) for search in searches}
    assert {setting for values in reproduce.PUBLISHED.values() for setting in values} <= known


# Stands in for both scripts. Of RegDB, Rank-1 is 10 x trial + seed, and 5 more at the best epoch and 100 more of agw;
# trial 3 of seed 9 fails.
STUB = """
import json, pathlib, sys

flags = dict(arg.split("=", 1) for arg in sys.argv[1:] if "=" in arg)
if "--json" not in flags:
    folder = pathlib.Path(flags["--log_path"])
    (folder / "x").mkdir(parents=True, exist_ok=True)
    (folder / "x" / "run.jsonl").write_text(json.dumps({"epoch": 0, "seconds": 36.0}))
    if "trial_3" in str(folder) and flags["--seed"] == "9":
        sys.exit("train_ext_test0.py: error: the loss is not finite")
else:
    path = pathlib.Path(flags["--json"])
    trial, seed = (int(path.parents[i].name.split("_")[1]) for i in (1, 0))
    value = 10.0 * trial + seed + 5 * ("_best.t" in flags["--resume"]) + 100 * ("agw" in str(path))
    row = json.loads(ROW) | {"mean": {"Rank-1": value, "mAP": 1.0, "mINP": 2.0}, "trials": [trial]}
    rows = [row | {"direction": d, "feature": f} for d in DIRECTIONS for f in ("POOL", "FC")]
    keep = {"dataset": "regdb", "resume": flags["--resume"], "all": "--all" in sys.argv}
    path.write_text(json.dumps({"flags": keep, "results": rows}))
"""


@pytest.fixture
def regdb(regdb_tree, tmp_path, monkeypatch):
    """A call for RegDB, whose trainings and tests are the stub's, with more flags -> the records."""
    row = result_row(dataset="regdb", mode=None, protocol="standard", shots=None, std=None, curves={"cmc": [1.0]})
    row["per_trial"] = [{"queries": 3, "evaluated": 3, "gallery": 4}]
    stub = tmp_path / "stub.py"
    directions = ["visible to thermal", "thermal to visible"]
    stub.write_text(f"ROW = {json.dumps(row | {'demo': True})!r}\nDIRECTIONS = {directions}\n{STUB}")
    monkeypatch.setattr(sweep, "PROGRAMS", {"train": stub, "test": stub})
    monkeypatch.setattr(records, "commit", lambda: COMMIT)
    monkeypatch.setattr(records, "git", lambda *_: COMMIT)
    measured = {"main": [], "measure": (0.1, 0.01, 5, 9)}
    monkeypatch.setattr(reproduce, "in_a_process", lambda function, *_: measured[function.__name__])
    argv = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", f"--runs={tmp_path}/runs"]
    argv += [f"--out={tmp_path}/records", "--by", "somebody"]
    return lambda *more: reproduce.main([*argv, *more])


def test_the_check_knows_the_backbone(regdb, monkeypatch):
    checked = []

    def in_a_process(function, flags):
        checked.append(check_data.get_args_parser().parse_args(flags))
        raise InputError("enough")

    monkeypatch.setattr(reproduce, "in_a_process", in_a_process)
    with pytest.raises(InputError, match="^enough$"):
        regdb("--method", "base", "--", "--arch=resnet18")
    assert [(args.dataset, args.arch) for args in checked] == [("regdb", "resnet18")]


@pytest.mark.slow
def test_scores_are_means_over_trials_then_over_seeds(regdb, tmp_path, monkeypatch):
    first, second = regdb("--method", "base", "agw", "--seeds", "0", "3", "0")
    for record, more in ((first, 0), (second, 100)):
        scores = record["scores"]
        keys = [f"{direction}; FC; {which} epoch" for which in ("best", "last") for direction in REGDB]
        assert [*scores] == keys
        for key, mean in zip(keys, (61.5 + more, 61.5 + more, 56.5 + more, 56.5 + more), strict=True):  # 55 + 1.5 + 5
            assert scores[key]["Rank-1"]["mean"] == mean
            assert scores[key]["Rank-1"]["std"] == pytest.approx(4.5**0.5)  # of 55 and 58
            half = 12.706 * 1.5
            assert scores[key]["Rank-1"]["interval"] == pytest.approx([mean - half, mean + half], abs=1e-2)
        assert (record["seeds"], record["hours"], record["commit"]) == ([0, 3], 0.1, COMMIT)
        assert (record["real"], record["data"]) == (False, "demo data like RegDB")
    assert second["command"] == "python -m tools.reproduce --dataset regdb --method agw --seeds 0 3"
    files = sorted(path.name[10:] for path in (tmp_path / "records").iterdir())
    assert files == [f"_reproduce_regdb_{m}.{end}" for m in ("agw", "base") for end in ("json", "md")]

    # Results of other runs do not count, another record does not take the first one's place, and the same one does.
    shutil.copytree(tmp_path / "runs/regdb_base/trial_1/seed_0", tmp_path / "runs/regdb_base/lr_1/seed_0")
    assert regdb("--method", "base", "--seeds", "0", "3")[0]["scores"] == first["scores"]
    regdb("--method", "base", "--seeds", "0")
    kept = {path.name[10:]: json.loads(path.read_text()) for path in (tmp_path / "records").glob("*base*.json")}
    assert {name: record["seeds"] for name, record in kept.items()} == {
        "_reproduce_regdb_base.json": [0, 3],
        "_reproduce_regdb_base_2.json": [0],
    }

    # The commit is the one with which the runs began.
    monkeypatch.setattr(records, "commit", lambda: "f" * 40)
    monkeypatch.setattr(records, "git", lambda *_: "f" * 40)
    prepared = []
    monkeypatch.setattr(reproduce, "prepare", lambda training: prepared.append(training.method))
    (tmp_path / "runs/regdb_base/trial_1/seed_0/results_best.json").unlink()  # tested, but not trained again
    assert regdb("--method", "base", "--seeds", "0", "3")[0]["commit"] == COMMIT
    assert prepared == ["base"]  # another method may have prepared another size since
    (later,) = regdb("--method", "base", "--seeds", "0", "4")
    assert later["verdict"].endswith(" The runs began with several commits.")


@pytest.mark.slow
def test_a_method_whose_runs_fail_has_no_record_and_stops_no_other(regdb, tmp_path, capsys):
    with pytest.raises(
        InputError, match=r"^base: 1 runs have not finished; trial_3, seed 9 failed: train.* the loss is"
    ):
        regdb("--method", "base", "agw", "--seeds", "0", "9")
    assert not [*tmp_path.glob("records/*")]
    for name in ("trial_1", "trial_2"):  # a run that is stopped leaves no word of a failure
        (tmp_path / "runs/regdb_base" / name / "seed_0/results_best.json").unlink(missing_ok=True)
    regdb("--method", "base", "--seeds", "0")
    stub = (tmp_path / "stub.py").read_text()
    (tmp_path / "stub.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    for name in ("trial_1", "trial_2"):
        (tmp_path / "runs/regdb_base" / name / "seed_0/results_best.json").unlink()
    with pytest.raises(
        InputError, match=r"^base: 2 runs have not finished; mend that, and start the same command again$"
    ):
        regdb("--method", "base", "--seeds", "0")
    (tmp_path / "stub.py").write_text(stub)
    regdb("--method", "base", "--seeds", "0")
    with pytest.raises(InputError, match="^base: /.*/seed_0: was run with --lr 0.1, but this sweep uses --lr"):
        regdb("--method", "base", "--seeds", "0", "--", "--lr", "0.2")


def test_flags_that_do_not_go_together(regdb, tmp_path):
    for flags, text in (
        (["--gpu", "cpu", "0"], "--gpu cpu 0: pass numbers of GPUs, or cpu alone"),
        (["--gpu", "0", "99x"], "--gpu 99x: give the number of a GPU, or cpu"),
        (["--by", " "], "--by: is empty"),
        (["--", "--method=adp"], "-- --method: is set by this program"),
        (["--", "--trial", "2"], "-- --trial: is set by this program"),
        (["--method", "adp", "base", "--", "--afam", "0"], "--afam 0: --method base has no such part"),
    ):
        with pytest.raises(InputError, match=text):
            regdb(*flags)
    assert not (tmp_path / "runs").exists()  # not even of the first method


def flags(tree, out, *more):
    small = ["--arch=resnet18", "--weights=none", "--img_h=48", "--img_w=16", "--padding=2", "--workers=0"]
    small += ["--epochs=2", "--eval_every=1", "--warmup=0", "--batch_size=4", "--num_pos=1"]
    argv = [f"--data_path={tree}", "--method", "base", "--seeds", "0", "--gpu", "cpu", f"--runs={out}/runs"]
    return [*argv, f"--out={out}/records", "--by", "somebody", *more, "--", *small]


PROGRAM = f"""
import sys
from tools import records, reproduce
from utils import cli

if __name__ == "__main__":
    records.commit = records.git = lambda *_: "{COMMIT}"
    cli(reproduce.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_a_process_of_its_own_it_ends_with_one_line(stop, sysu_tree, tmp_path):
    """Of two processes below that one, too, which `check_data` starts."""
    tree, program = tmp_path / "data", tmp_path / "program.py"
    shutil.copytree(sysu_tree, tree)
    image = next(tree.glob("cam1/*/*.jpg"))
    for number in range(20_000):  # which take seconds to read
        os.link(image, image.with_name(f"{number}.jpg"))
    program.write_text(PROGRAM)
    command = [sys.executable, program, *flags(tree, tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background, it is ignored
    with subprocess.Popen(command, **pipes) as process:
        while "ok" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)
        process.send_signal(stop)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + stop
    assert error.strip() == f"program.py: stopped by {stop.name}"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_a_record_and_a_page(sysu_tree, tmp_path, capsys):
    """Its arrays are prepared first, in another size than those that are there."""
    tree, program = tmp_path / "data", tmp_path / "program.py"
    shutil.copytree(sysu_tree, tree)
    program.write_text(PROGRAM)
    command = [sys.executable, program, *flags(tree, tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        saved = tmp_path / "runs/sysu_base/base/seed_0/models"
        while process.poll() is None and not any(saved.glob("*_last.t")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "preparing, as " in text
    said = r"base: runs: 1; each 2 epochs of \d+ steps of [\d.]+ s, and 4 tests of\n\d+ images: about 0.0 h a run"
    assert re.search(said, text)

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "preparing" not in done.stdout
    (file,) = (tmp_path / "records").glob("*_reproduce_sysu_base.json")
    record, page = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert (record["commit"], record["by"], record["seeds"], record["real"]) == (COMMIT, "somebody", [0], False)
    assert record["row"].startswith("base, but --arch=resnet18 ")
    (last,) = (tmp_path / "runs").glob("*/*/seed_0/results.json")
    (best,) = (tmp_path / "runs").glob("*/*/seed_0/results_best.json")
    for which, path in (("best", best), ("last", last)):
        rows = json.loads(path.read_text())["results"]
        assert f"_{which}.t" in rows[0]["per_trial"][0]["checkpoint"]
        of_protocols = {reproduce.search_title(row): row["mean"] for row in rows if row["feature"] == "FC"}
        assert len(of_protocols) == 8
        for setting, mean in of_protocols.items():
            scores = record["scores"][f"{setting}; FC; {which} epoch"]
            assert {metric: values["mean"] for metric, values in scores.items()} == {m: mean[m] for m in scores}
    entries = [json.loads(line) for path in (tmp_path / "runs").rglob("*.jsonl") for line in path.open()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    verdict = "No verdict: demo data like SYSU-MM01 is not the published data set, complete."
    assert record["verdict"] == verdict
    assert f"**{verdict}**" in page
    assert done.stdout.splitlines()[-2] == verdict
    assert f"| {ALL} | mAP |" in page

    table = ["--folder", str(file.parent), "--page", str(tmp_path / "page.md")]
    (kept,) = records.main(table).values()
    assert kept["verdict"] == verdict
    times = {path: path.stat().st_mtime_ns for path in (last, best)}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert "base: runs:" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in times} == times


CHECK = """
from tools import check_data, reproduce
from utils import cli

if __name__ == "__main__":
    cli(lambda: reproduce.in_a_process(check_data.main, ["--gpu=x", "--data_path={}"]))
"""


@pytest.mark.slow
def test_an_error_of_its_process_is_one_line(sysu_tree, tmp_path):
    """Bars have a lock, of which Python tells if a process is ended before its end."""
    (tmp_path / "check.py").write_text(CHECK.format(sysu_tree))
    command, environment = [sys.executable, tmp_path / "check.py"], os.environ | {"PYTHONPATH": str(records.ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (2, f"check.py: error: {sysu_tree}: device: see the lines above\n")


@pytest.mark.slow
def test_what_stops_it_is_one_line_and_leaves_no_record(sysu_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "git", lambda *command: " M loss.py" if command[0] == "status" else "")
    assert exit_status(reproduce, flags(sysu_tree, tmp_path)) == 2
    assert capsys.readouterr().err == (
        "reproduce.py: error: loss.py: differs from the last commit, which a record names; commit first\n"
    )
    monkeypatch.setattr(records, "git", lambda *_: "")
    assert exit_status(reproduce, flags(sysu_tree, tmp_path)) == 2
    assert "is no git repository, and a record names its commit; clone the code with git" in capsys.readouterr().err
    monkeypatch.setattr(records, "commit", lambda: COMMIT)
    assert exit_status(reproduce, flags(tmp_path / "none", tmp_path)) == 2
    assert "none" in capsys.readouterr().err
