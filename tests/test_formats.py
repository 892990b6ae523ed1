"""Files with one thing wrong, of every format that this project writes: one line that names the file, or an answer."""

import contextlib
import copy
import itertools
import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import warnings
from datetime import datetime

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import training.run
from conftest import parse, result_row, train_data
from core.checkpoint import load_checkpoint
from core.formats import Flags, Numbers, checked, read_json
from data_loader import sysu_train
from data_manager import read_list
from drawing import figures
from methods import Losses
from model import GFMNet, load_network
from testing.evaluation import checkpoint_origin
from testing.features import load_features, save_features, select_features
from testing.results import read_results
from tools import sweep
from tools.search.address import open_index
from tools.search.index import Entry, Filter, track_key
from training.optim import build_optimizer, load_moments
from training.run import Run
from utils import InputError

CPU = torch.device("cpu")
WRONG = [None, True, -1, 0, 1, 3.5, 10**20, math.nan, math.inf, -1e308, "", "x" * 20_000, "a\nb", "../x", [], [[]], {}]
WRONG_TENSORS = [
    torch.zeros(2),
    torch.zeros(3, device="meta"),
    torch.zeros(2, 2).to_sparse(),
    torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8),
    torch.zeros(2, dtype=torch.float8_e4m3fn),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(1).expand(10**12),
    torch.zeros(1).expand(3),  # of which PyTorch would write three values into the place of one
    torch.full((3,), torch.nan),
    {1: torch.zeros(1)},
]


def places(value, path=()):
    """The paths of all parts of nested dicts and lists, of long lists only the first ones."""
    parts = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def with_one_wrong(good, wrong):
    """A strategy of copies of `good` of which one part is replaced, left out or joined by another."""

    @st.composite
    def damaged(draw):
        value = copy.deepcopy(good)
        *path, key = draw(st.sampled_from(list(places(good))))
        holder = value
        for part in path:
            holder = holder[part]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            holder[key] = draw(st.sampled_from(wrong))
        elif kind == "remove" and path != ["optimizer", "state"]:  # a parameter that is not used has no moments
            del holder[key]
        elif isinstance(holder, dict):
            holder["another"] = draw(st.sampled_from(wrong))
        else:
            holder.append(draw(st.sampled_from(wrong)))
        return value

    return damaged()


def with_wrong_bytes(content):
    """A strategy of copies of bytes that are cut, or of which some are others."""
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    def change(pairs):
        other = bytearray(content)
        for i, byte in pairs:
            other[i] = byte
        return bytes(other)

    return changes.map(change) | st.integers(0, len(content) - 1).map(lambda size: content[:size])


def try_all(strategy, write, use, names, examples):
    """`use` of what `write` has written gives an answer, or an InputError of one line with one of `names` in it."""
    refused, codes = [], []

    @settings(max_examples=examples, deadline=60_000, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(strategy)
    def one(value):
        write(value)
        try:
            use()
        except InputError as error:
            refused.append(str(error))
        except SystemExit as stop:  # a flag of a plan that no program has
            codes.append(stop.code)
        for line in refused[-1:]:
            assert any(name in line for name in names), line[:300]
            assert line.isprintable()
            assert len(line) < 2000

    one()
    assert set(codes) <= {2}
    return refused


MANY = pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])


def test_a_value_is_what_its_type_says():
    assert checked({"a": [1, "b", None], "c": True}, Flags, "f", "r") == {"a": [1, "b", None], "c": True}
    assert checked({"epoch": 3, "mAP": 2.0}, Numbers, "f", "r") == {"epoch": 3, "mAP": 2.0}
    for value, words in (
        ({"a": {}}, r"f: the file\[\.\.\.\]: expected .*, got object; r"),
        ({1: 2}, "f: a name in the file: expected str, got int; r"),
        ({"a": math.nan}, "f: .*expected float"),
        ([], "f: expected object, got array; r"),
    ):
        with pytest.raises(InputError, match=words):
            checked(value, Flags, "f", "r")


# ------------------------------------------------------------------------------------------------------- checkpoints


def tiny_weights(net):
    """The shapes of its state dict, in a file of some kilobytes."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in net.state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint():
    net = GFMNet(4, "resnet18")
    args = {"dataset": "sysu", "method": "adp", "trial": None, "afam": 1, "milestones": [20, 50]}
    content = {"version": 2, "net": tiny_weights(net), "options": net.options, "image_size": [96, 48], "args": args}
    content |= {"epoch": 3, "best": {"epoch": 2, "Rank-1": 50.0, "mAP": 40.0}, "selection": "test", "processes": 1}
    return content | {
        "num_images": [5, 6],
        "data_digest": train_data(5, 6).digest,
        "optimizer": {"state": {}},
        "sums": {"step": 2},
        "within": {"generators": []},
    }


def use_checkpoint(path, tree):
    content = load_checkpoint(path)
    net, size = load_network(content, path)
    origin = checkpoint_origin(path, content, net, size, tree)
    assert {type(value) for value in origin.values()} <= {str, int, bool, list, dict, type(None)}
    assert len(size) == 2


@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_checkpoints(checkpoint, tmp_path, examples):
    path = tmp_path / "c.t"
    few = checkpoint | {"net": dict(list(checkpoint["net"].items())[:2])}
    others = {name: value for name, value in checkpoint.items() if name != "net"}
    strategy = with_one_wrong(others, WRONG + WRONG_TENSORS).map(lambda value: {"net": checkpoint["net"]} | value)
    strategy |= with_one_wrong(few, WRONG + WRONG_TENSORS)
    strategy |= with_one_wrong({"net": checkpoint["net"]}, WRONG_TENSORS).map(lambda value: others | value)

    def write(value):
        torch.save(value, path)

    assert try_all(strategy, write, lambda: use_checkpoint(path, tmp_path), ["c.t"], examples)


@pytest.mark.parametrize("field", ["version", "options", "image_size", "args", "epoch", "best", "selection", "sums"])
def test_a_tensor_is_no_field(checkpoint, tmp_path, field):
    """It passes for a dict, a list and a number, until somebody looks into it."""
    for value in (torch.zeros(2), torch.ones(()), torch.zeros(3, device="meta")):
        torch.save(checkpoint | {field: value}, tmp_path / "c.t")
        refused = pytest.raises(InputError, match=rf"c\.t: ({field}|a tensor stands where fields belong)")
        with refused, warnings.catch_warnings(record=True) as told:
            load_checkpoint(tmp_path / "c.t")
        assert not told


def test_a_network_of_no_class_is_one_line(checkpoint, tmp_path):
    torch.save(checkpoint | {"options": checkpoint["options"] | {"num_classes": 0}}, tmp_path / "c.t")
    with pytest.raises(InputError, match=r"c\.t: "), warnings.catch_warnings(action="error"):
        use_checkpoint(tmp_path / "c.t", tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to("meta"),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to(torch.float8_e4m3fn),
        lambda weight: torch.quantize_per_tensor(weight, 1.0, 0, torch.quint8),
    ],
    ids=["sparse", "meta", "complex", "float8", "quantised"],
)
def test_other_kinds_of_tensors_are_no_weights(checkpoint, tmp_path, kind):
    net = checkpoint["net"]
    torch.save(checkpoint | {"net": net | {"classifier.weight": kind(torch.zeros(4, 512))}}, tmp_path / "c.t")
    with pytest.raises(InputError, match=r"c\.t: 'classifier.weight' holds torch.* values; save it as a dense float32"):
        use_checkpoint(tmp_path / "c.t", tmp_path)


def test_a_program_is_no_checkpoint_and_nothing_else_is_said(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "c.t")
    refused = pytest.raises(InputError, match="c.t: cannot be loaded safely")
    with warnings.catch_warnings(record=True, action="always") as said, refused:
        load_checkpoint(tmp_path / "c.t")
    assert said == []


def test_a_tensor_that_is_larger_than_its_file_is_no_weight(checkpoint, tmp_path):
    large = torch.zeros(1, 512).expand(10**8, -1)
    torch.save(checkpoint | {"net": checkpoint["net"] | {"classifier.weight": large}}, tmp_path / "c.t")
    with pytest.raises(InputError, match=r"c\.t: 'classifier.weight' repeats its values; save it as a dense float32"):
        use_checkpoint(tmp_path / "c.t", tmp_path)


@MANY
def test_bytes_of_a_checkpoint(checkpoint, tmp_path, examples):
    path = tmp_path / "c.t"
    torch.save(checkpoint, path)
    use_checkpoint(path, tmp_path)
    strategy = with_wrong_bytes(path.read_bytes()) | st.binary(max_size=200) | st.text(max_size=200).map(str.encode)
    assert try_all(strategy, path.write_bytes, lambda: use_checkpoint(path, tmp_path), ["c.t"], examples)


class Tiny(torch.nn.Module):
    """A network with one layer and the options of its class."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.classifier = torch.nn.Linear(2, num_classes)
        self.bottleneck = torch.nn.BatchNorm1d(2)
        self.options = {"num_classes": num_classes}


def tiny_run(folder, optim, resume=None, save=False):
    """One step and the end of an epoch of a run; save: within the epoch."""
    args = parse("--model_path", folder / "models", "--log_path", folder / "log", "--gpu", "cpu", "--optim", optim)
    args.resume = resume
    net = Tiny()
    optimizer = build_optimizer(net, optim, 0.1)
    with Run("run", args, {"lr": 0.1, "weights": "imagenet"}) as run:
        run.start(net, optimizer, CPU, train_data(5, 6), 9)
        meter = run.begin_epoch(run.first_epoch)
        net.classifier(net.bottleneck(torch.rand(4, 2))).sum().backward()
        optimizer.step()
        meter.add(Losses(*torch.ones(len(Losses._fields))), [torch.ones(1)])
        if save:
            run.save(meter)
        else:
            run.end_epoch(
                {"epoch": run.first_epoch, "seconds": 1.0, "FC/Rank-1": 50.0, "FC/mAP": 40.0, **meter.summary()}
            )
            run.finish()


SUMS = {"step": 2, "names": ["total"], "losses": torch.ones(1), "summed": 2, "first_bad": torch.full((), torch.inf)}
WRONG_STATES = {
    "more steps than an epoch has": {"sums": SUMS | {"step": 99, "summed": 99}},
    "sums over no step": {"sums": SUMS | {"summed": 0}},
    "sums of nothing": {"sums": {"step": 2}},
    "fewer sums than names": {"sums": SUMS | {"names": ["total", "b"]}},
    "sums in float64": {"sums": SUMS | {"losses": torch.ones(1, dtype=torch.float64)}},
    "two first steps": {"sums": SUMS | {"first_bad": torch.ones(2)}},
    "readings of nothing": {"sums": SUMS | {"readings": 2}},
    "no generator": {"within": {"generators": [[]]}},
    "half a generator": {"within": {"generators": [[torch.zeros(9, dtype=torch.uint8)]]}},
    "a moment of another shape": {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(9)}}}},
    "a sparse moment": {"optimizer": {"state": {1: {"momentum_buffer": torch.zeros(3).to_sparse()}}}},
    "moments of another optimiser": {"optimizer": {"state": {1: {"exp_avg": torch.zeros(3)}}}},
    "a complex moment": {"optimizer": {"state": {1: {"momentum_buffer": torch.zeros(3) + 1j}}}},
    "moments of nobody": {"optimizer": {"state": {99: {"momentum_buffer": torch.zeros(3)}}}},
}


@pytest.fixture
def good_run(tmp_path, monkeypatch):
    """A run that was stopped within its second epoch -> (its folder, its training state)."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tiny_run(tmp_path / "good", "sgd")
    tiny_run(tmp_path / "good", "sgd", resume="auto", save=True)
    return tmp_path / "good", torch.load(tmp_path / "good" / "models" / "run_last.t")


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_training_state_is_refused(good_run, name):
    folder, state = good_run
    torch.save(state | WRONG_STATES[name], folder / "models" / "run_last.t")
    with pytest.raises(InputError, match=r"run_last\.t: is not a complete \.\.\._last\.t"):
        tiny_run(folder, "sgd", resume="auto")


def test_a_signal_waits_until_the_first_checkpoint_is_written(tmp_path, monkeypatch):
    """PyTorch's writer would replace the exception."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    saved, save = [], training.run.save_checkpoint

    def save_with_signal(content, path):
        if not saved:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(path.name)
        save(content, path)

    monkeypatch.setattr(training.run, "save_checkpoint", save_with_signal)
    tiny_run(tmp_path, "sgd", save=True)
    assert saved == ["run_last.t"] * 2


def test_complex_weights_are_not_resumed(good_run):
    folder, state = good_run
    name, weight = next(iter(state["net"].items()))
    torch.save(state | {"net": state["net"] | {name: weight + 1j}}, folder / "models" / "run_last.t")
    with pytest.raises(InputError, match=r"run_last\.t: is not a complete \.\.\._last\.t"):
        tiny_run(folder, "sgd", resume="auto")


def test_moments_that_share_one_place_are_taken_apart(good_run):
    """PyTorch would write three values into the place of one."""
    folder, state = good_run
    state["optimizer"]["state"][1]["momentum_buffer"] = torch.ones(1).expand(3)
    optimizer = build_optimizer(Tiny(), "sgd", 0.1)
    load_moments(optimizer, state["optimizer"])
    shapes = [moments["momentum_buffer"].untyped_storage().nbytes() for moments in optimizer.state.values()]
    assert shapes == [4 * parameter.numel() for parameter in optimizer.state]
    torch.save(state, folder / "models" / "run_last.t")
    tiny_run(folder, "sgd", resume="auto")


@pytest.mark.parametrize("optim", ["sgd", "adam"])
@MANY
def test_a_run_goes_on_or_refuses(optim, examples, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tiny_run(tmp_path / "good", optim)
    tiny_run(tmp_path / "good", optim, resume="auto", save=True)
    good = torch.load(tmp_path / "good" / "models" / "run_last.t")
    assert good["optimizer"]["state"]
    assert good["within"]

    def write(value):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "other")
        torch.save(value, tmp_path / "other" / "models" / "run_last.t")

    def use():
        tiny_run(tmp_path / "other", optim, resume="auto")

    write(good)
    use()
    assert try_all(with_one_wrong(good, WRONG + WRONG_TENSORS), write, use, ["run_last.t", "run_best.t"], examples)


# -------------------------------------------------------------------------------------------------- results and sweeps


def results():
    row = result_row(mean={"Rank-1": 50.0, "mAP": 40.0, "mINP": 30.0}, std=None, curves={"cmc": [50.0, 60.0]})
    row["per_trial"] = [{"queries": 9, "evaluated": 9, "gallery": 8}]
    return {
        "flags": {"dataset": "sysu", "resume": "run_last.t"},
        "results": [row, row | {"model": "HOG", "std": row["mean"]}],
    }


@MANY
def test_results(tmp_path, examples):
    path = tmp_path / "r.json"

    def use():
        figures.result_curves({"a": read_results(path)["results"]}, "cmc")

    strategy = with_one_wrong(results(), WRONG).map(json.dumps) | with_wrong_bytes(json.dumps(results()).encode())
    write = lambda text: path.write_bytes(text if isinstance(text, bytes) else text.encode())  # noqa: E731
    assert try_all(strategy, write, use, ["r.json", "two rows of results have the same name"], examples)


@pytest.mark.parametrize("name", ["sweep.json", "flags.json", "results.json", "failed.json", "run.jsonl"])
@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_sweeps(name, examples, tmp_path, monkeypatch, capsys):
    plan = {"rows": [["a", ["--margin=1"]], ["b", ["--margin=2"]]], "seeds": [0], "flags": ["--gpu=cpu"], "test": []}
    plan |= {"checkpoint": "last", "data": {"sysu": "1"}}
    files = {
        "sweep.json": plan,
        "a/seed_0/flags.json": {"row": "a", "seed": 0, "flags": {"dataset": "sysu", "gpu": "cpu"}, "data": "1"},
        "a/seed_0/results.json": results(),
        "a/seed_0/log/run.jsonl": {"epoch": 0, "seconds": 2.0, "identity": 3.0, "FC/Rank-1": 50.0, "select": "test"},
        "b/seed_0/failed.json": {"script": "train", "status": 2, "line": "x"},
    }
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    (damaged,) = [file for file in files if file.endswith(f"/{name}") or file == name]
    monkeypatch.setattr(figures, "save", lambda figure, path: None)

    def use():
        sweep.main(["--out", tmp_path, "--table"])
        capsys.readouterr()

    def write(text):
        (tmp_path / damaged).write_bytes(text if isinstance(text, bytes) else text.encode())

    use()
    strategy = with_one_wrong(files[damaged], WRONG).map(json.dumps) | with_wrong_bytes(
        json.dumps(files[damaged]).encode()
    )
    refused = try_all(strategy, write, use, [name, "row", "no run has finished", "--"], examples)
    assert bool(refused) == (name != "run.jsonl")  # of a log, what cannot be read is left out


# --------------------------------------------------------------------------------------------------------------- arrays


@MANY
def test_features(tmp_path, examples):
    path, names = tmp_path / "f.npz", {"visible": ["a.jpg", "b.jpg"], "infrared": ["c.jpg"]}
    images = {modality: [tmp_path / name for name in files] for modality, files in names.items()}
    for image in images["visible"] + images["infrared"]:
        image.write_bytes(b"image")
    values = {m: {("net", "FC"): torch.ones(len(files), 3)} for m, files in images.items()}
    save_features(path, values, images, tmp_path, {"dataset": "sysu", "flags": {"lr": 0.1}})
    whole = dict(np.load(path))

    def use():
        select_features(path, load_features(path)[0], images, tmp_path, CPU)

    use()
    others = [
        np.zeros(0),
        np.zeros((2, 3), complex),
        np.array(["x"]),
        np.array([b"\xff"]),
        np.zeros(2, "V4"),
        np.ones(3),
    ]
    others += [np.array(json.dumps(value)) for value in ([], {"trial": 99}, {"flags": {"a": {}}}, {"demo": "x"})]
    others += [np.full((2, 3), value) for value in (0.0, np.nan, 1e300)]
    strategy = with_one_wrong(whole, others) | with_wrong_bytes(path.read_bytes())
    write = lambda value: path.write_bytes(value) if isinstance(value, bytes) else np.savez(path, **value)  # noqa: E731
    assert try_all(strategy, write, use, ["f.npz"], examples)


@MANY
def test_prepared_arrays(sysu_tree, tmp_path, examples):
    tree = shutil.copytree(sysu_tree, tmp_path / "sysu", ignore=shutil.ignore_patterns("cam*", "cache"))
    files = sorted(tree.glob("*.npy"))
    content = {file: file.read_bytes() for file in files}
    heads = {
        file: with_wrong_bytes(whole[:300]).map(lambda head, whole=whole: head + whole[300:])
        for file, whole in content.items()
    }
    others = [
        np.zeros(0),
        np.zeros((3, 3), complex),
        np.zeros(3, "V4"),
        np.array(["x"]),
        np.ones(3),
        np.ones((3, 4, 5, 3)),
    ]

    def write(damaged):
        file, value = damaged
        for other, whole in content.items():
            other.write_bytes(whole)
        file.write_bytes(value) if isinstance(value, bytes) else np.save(file, value)

    def use():
        data = sysu_train(tree, (96, 48))
        assert len(data.visible) == len(data.visible_labels)

    strategy = st.one_of(
        *[(heads[file] | st.sampled_from(others)).map(lambda value, file=file: (file, value)) for file in files]
    )
    assert try_all(strategy, write, use, [tree.name], examples)


# ---------------------------------------------------------------------------------------------------------------- index


def use_index(path):
    index = open_index(str(path))
    try:
        for version in index.versions():
            index.entries(version["version"])
            index.counts(version["version"], "camera")
            tracks = index.search_tracks(version["version"], np.eye(2, 4, dtype=np.float32), 2)
            index.members(version["version"], [*map(track_key, itertools.chain(*tracks))], Filter())
            for found in [*tracks, *index.search(version["version"], np.eye(2, 4, dtype=np.float32), 2)]:
                index.vectors([image["id"] for image in found])
                for image in found:
                    assert image["modality"] in ("visible", "infrared")
                    assert image["path"]
                    assert "\0" not in image["path"]
                    datetime.fromisoformat(image["time"])
    finally:
        index.close()


@MANY
def test_rows_and_bytes_of_an_index(tmp_path, examples):
    good, path = tmp_path / "good.db", tmp_path / "i.db"
    index = open_index(str(good), create=True)
    images = [Entry(f"/{i}.jpg", "1 2", "visible", "1", None, "2026-11-20 10:00:00") for i in range(3)]
    index.add(index.begin("net.t", "a" * 64, "FC", 4), images, np.eye(3, 4, dtype=np.float32))
    index.close()
    columns = [("images", name) for name in (*Entry._fields, "vector", "version")]
    columns += [("versions", name) for name in ("checkpoint", "sha256", "feature", "dim")]
    values = [
        "",
        "x",
        "2026",
        "2026-13-05 09:09:09",
        "2026-11-20 25:09:09",
        "/a\0b.jpg",
        "\0",
        -5,
        3,
        10**18,
        b"abc",
        np.ones(3, "<f4").tobytes(),
        np.full(4, np.nan, "<f4").tobytes(),
        None,
    ]

    def write(damage):
        shutil.copy(good, path)
        for other in tmp_path.glob("i.db-*"):
            other.unlink(missing_ok=True)
        if isinstance(damage, bytes):
            path.write_bytes(damage)
            return
        (table, column), value = damage
        connection = sqlite3.connect(path, isolation_level=None)
        with contextlib.suppress(sqlite3.Error):  # the table itself refuses some values
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = 1", (value,))
        connection.close()

    write(good.read_bytes())
    use_index(path)
    for damage in itertools.product(columns, values) if examples < 100 else ():
        write(damage)
        with contextlib.suppress(InputError):
            use_index(path)
    assert try_all(with_wrong_bytes(good.read_bytes()), write, lambda: use_index(path), ["i.db"], examples)


def test_a_text_that_no_memory_holds_is_not_read(tmp_path):
    """A file with a hole: it takes no room on the disk."""
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="large.json: has more than 512 MiB, the most that is read; pass another"):
        read_json(path, dict, "r")
    (tmp_path / "idx").mkdir()
    path.rename(tmp_path / "idx" / "a.txt")
    with pytest.raises(InputError, match="a.txt: has more than 512 MiB"):
        read_list(tmp_path, "a")


def test_json_of_windows_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', "utf-8-sig")
    assert read_json(tmp_path / "a.json", dict, "r") == {"a": 1}
    (tmp_path / "a.json").write_text('{"a": "\\ud800"}')  # half a character, which cannot be written anywhere
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(tmp_path / "a.json", dict, "r")
