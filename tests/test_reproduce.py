"""From a data set to a verdict: the rule, what is compared, and a whole run that is stopped and goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from conftest import exit_status, result_row
from tools import records, reproduce, sweep

ALL, REGDB = reproduce.ALL, reproduce.REGDB
COMMIT = "0123456789" * 4


def spread(mean, half):
    return {"mean": mean, "std": 1.0, "interval": [mean - half, mean + half], "count": 3}


def compared(published, seeds=3, **best):
    """What is missed, and the verdict, of Rank-1, mAP and mINP at the best epoch."""
    scores = {f"{ALL}; FC; {which} epoch": best for which in ("best", "last")}
    rows = reproduce.compare(scores, {ALL: published}, seeds)
    record = {"data": "SYSU-MM01", "seeds": [*range(seeds)]}
    return [row[-1] for row in rows], partial(reproduce.verdict, rows, record)


def test_a_value_is_reached_within_the_interval_or_above_it():
    values = {"Rank-1": spread(72.0, 1.5), "mAP": spread(71.0, 0.5), "mINP": spread(50.0, 3.0)}
    missed, verdict = compared((73.4, 69.7, 53.5), **values)
    assert missed == [0, 0, pytest.approx(3.5)]
    assert verdict(True, []) == f"Not reproduced. Missed: {ALL}: mINP by 3.50."
    missed, verdict = compared((73.4, 69.7), **values)
    assert missed == [0, 0, None]
    assert verdict(True, []) == "Reproduced: all published values are reached."


def test_when_there_is_no_verdict():
    values = {"Rank-1": spread(72.0, 1.5)}
    _, verdict = compared((70.0,), **values)
    assert verdict(False, []) == "No verdict: SYSU-MM01 is not the published data set, complete."
    for more in (["--epochs", "3"], ["--lr=1", "--workers", "2"]):
        flag = more[0].split("=")[0]
        assert verdict(True, more) == f"No verdict: {flag} is not left as in the method's recipe."
    assert verdict(True, ["--workers=8", "--square", "1"]) == "Reproduced: all published values are reached."
    missed, verdict = compared((), **values)
    assert (missed, verdict(True, [])) == ([None], "No verdict: nothing is published for this method on this data set.")
    missed, verdict = compared((70.0,), seeds=2, **values)
    assert (missed, verdict(True, [])) == ([None], "No verdict: it needs 3 seeds, not 2.")


def test_published_values_are_of_settings_that_tests_have(sysu_tree, regdb_tree, llcm_tree):
    known = set()
    for name, tree in (("sysu", sysu_tree), ("regdb", regdb_tree), ("llcm", llcm_tree)):
        spec = reproduce.DATASETS[name]
        options = {flag: spec.options[flag] for flag in ("mode", "protocol", "shots") if flag in spec.options}
        searches = spec.searches(tree, spec.directions, [1], **options).searches
        known |= {reproduce.search_title(search.setting) for search in searches}
    assert {setting for values in reproduce.PUBLISHED.values() for setting in values} <= known


def test_scores_are_means_over_trials_then_over_seeds(tmp_path):
    """Two trials of RegDB, two seeds: Rank-1 of 10 trial + seed, and of 5 more at the best epoch."""
    for trial in (1, 2):
        for seed in (0, 3):
            folder = tmp_path / f"trial_{trial}" / f"seed_{seed}"
            folder.mkdir(parents=True)
            for file, more in (("results.json", 0), ("results_best.json", 5)):
                mean = {"Rank-1": 10.0 * trial + seed + more, "mAP": 1.0, "mINP": 2.0}
                row = result_row(dataset="regdb", mode=None, direction="visible to thermal", protocol="standard")
                row |= {"shots": None, "trials": [trial], "mean": mean, "std": None, "curves": {"cmc": [1.0]}}
                row["per_trial"] = [{"queries": 3, "evaluated": 3, "gallery": 4}]
                other = row | {"feature": "POOL", "mean": dict.fromkeys(mean, 0.0)}
                (folder / file).write_text(json.dumps({"flags": {}, "results": [other, row]}))
    scores = reproduce.collect(tmp_path, [0, 3])
    assert [*scores] == [f"{REGDB[0]}; FC; {which} epoch" for which in ("best", "last")]
    best, last = (values["Rank-1"] for values in scores.values())
    assert (best["mean"], last["mean"]) == (21.5, 16.5)
    assert last["std"] == pytest.approx(4.5**0.5)  # of 15 and 18
    assert last["interval"] == pytest.approx([16.5 - 12.706 * 1.5, 16.5 + 12.706 * 1.5], abs=1e-2)


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
    records.commit = lambda: "{COMMIT}"
    cli(reproduce.main)
"""


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
    assert exit_status(reproduce, [*flags(sysu_tree, tmp_path), "--method=adp"]) == 2
    assert "-- --method: is set by this program; pass it before the --" in capsys.readouterr().err
    assert exit_status(reproduce, flags(tmp_path / "none", tmp_path)) == 2
    assert "none" in capsys.readouterr().err
    broken = tmp_path / "stub.py"
    broken.write_text("import sys; sys.exit('train_ext_test0.py: error: the disk is full')")
    monkeypatch.setattr(sweep, "PROGRAMS", {"train": broken, "test": broken})
    tree = tmp_path / "data"
    shutil.copytree(sysu_tree, tree)
    assert exit_status(reproduce, flags(tree, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "base, seed 0 failed: train_ext_test0.py: error: the disk is full" in error
    assert not [*tmp_path.glob("records/*.json")]
