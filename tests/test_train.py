"""train_ext_test0.py from its flags to its files."""

import argparse
import copy
import http.client
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import data_manager
import testa
import train_ext_test0
import training.engine
import utils
from ChannelAug import TrainAugmentation, normalise
from conftest import SIZE, TINY, flags, log_entries, parse, search_flags, tiny_flags
from data_loader import IdentitySampler, sysu_train, train_loader
from methods import METHODS, MethodLoss
from model import GFMNet
from tests.oracles import plain_batches, plain_training
from training import optim
from training.engine import train_epoch
from training.step import TrainStep
from utils import InputError

REPO = Path(utils.__file__).parent
# DNS's own schedule needs more epochs than these trainings have, and its rates the fourth stage.
BY_METHOD = [["--method", method, "--schedule", "step", "--stages", "4"] for method in METHODS]
OWN_STREAMS = ["--stages", "4", "--share_net", "5"]


@pytest.mark.slow
def test_run_writes_what_it_promises(trained):
    result, out = trained
    name = "sysu_adp_joint_co_nog_ch_nog_sq0_aug_G_erase_0.5_p2_n4_lr_0.01_seed_0_9_adam"
    assert sorted(file.name for file in (out / "models").glob("*.t")) == [
        f"{name}_{kind}.t" for kind in ("best", "epoch_1", "epoch_2", "last")
    ]
    entries = log_entries(result["log"])
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    for entry in entries:
        assert entry["total"] == pytest.approx(entry["identity"] + entry["triplet"] + 0.5 * entry["local"], rel=1e-5)
        assert entry["images_per_second"] > 0
        assert ("FC/Rank-1" in entry) == (entry["epoch"] != 1)
    assert entries[2]["total"] < entries[0]["total"]
    best = max((e for e in entries if "FC/Rank-1" in e), key=lambda e: (e["FC/Rank-1"], -e["epoch"]))
    assert result["metrics"]["epoch"] == best["epoch"]
    assert torch.load(result["best"])["epoch"] == best["epoch"]
    text = (out / "log" / "sysu_log" / f"{name}.txt").read_text()
    assert "TEST set" in text
    assert list((out / "log" / "sysu_log" / name).glob("events.*"))


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "base", "--optim", "sgd", "--augc", "0", "--rande", "0"],
        ["--method", "agw", "--share_net", "1", "--amp", "bf16", "--square", "1"],
        ["--method", "caj", "--square", "1", "--weighting", "published", "--mode", "indoor"],
        pytest.param(
            ["--method", "adp", *OWN_STREAMS, "--alpha", "2", "--gamma", "0.5", "--margin", "0.1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_method_trains_and_its_checkpoint_tests(tiny_tree, sysu_tree, tmp_path, more, capsys):
    # In bfloat16, tiny images are too narrow for some processors: see docs/training.md.
    tree, own_flags = (sysu_tree, flags) if "bf16" in more else (tiny_tree, tiny_flags)
    result = train_ext_test0.main(own_flags(tree, tmp_path, "--epochs", "1", *more))
    (entry,) = log_entries(result["log"])
    assert math.isfinite(entry["total"])
    assert (entry["local"] > 0) == ("adp" in more)
    text, printed = Path(result["log"]).with_suffix(".txt").read_text(), capsys.readouterr().out.splitlines()
    assert ("note: --method agw does not use --square" in text) == ("agw" in more)
    # The screen has the flags that differ from the method's recipe, the log all of them.
    assert re.match(rf"{Path(result['log']).stem}: the method's recipe, but --", printed[0])
    assert ("--square 1" in printed[0], "--margin 0.1" in printed[0]) == ("--square" in more, "--margin" in more)
    assert ('"margin": ' in text, '"margin": ' in "".join(printed)) == (True, False)
    assert printed[-1].endswith(f": {result['best']}")
    rows = testa.main(search_flags(tree, result["last"]))
    assert len(rows) == 2


@pytest.fixture
def float64():
    """In float32, what is rounded otherwise grows within a few steps to what a wrong step would do."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_training_is_that_of_the_formulas(float64, tiny_tree, tmp_path, monkeypatch):
    """Two epochs with a test after each, and a resumed one: network and its seed, batches, modes, losses, gradients,
    rates, momentum and running statistics. Only the augmented views are taken from it."""
    torch.set_num_threads(1)
    batches, views = [], []
    augment = TrainAugmentation.__call__

    def record(self, *batch):
        batches.append([values.clone() for values in batch])
        visible, infrared, labels = augment(self, *batch)
        views.append((visible.double(), infrared.double(), labels))
        return views[-1]

    monkeypatch.setattr(TrainAugmentation, "__call__", record)
    monkeypatch.setattr(train_ext_test0, "normalise", lambda images: normalise(images).double())
    more = ["--method", "base", "--optim", "sgd", "--eval_every", "1", "--save_epoch", "1", "--warmup", "2"]
    more += ["--seed", "3"]
    command = tiny_flags(tiny_tree, tmp_path, *more, "--resume", "auto", "--epochs")
    for epochs in ("2", "3"):
        torch.manual_seed(time.time_ns())  # what others have drawn
        result = train_ext_test0.main([*command, epochs])

    data = sysu_train(tiny_tree, TINY)
    expected = [batch for epoch in range(3) for batch in plain_batches(data, 4, 2, 3, epoch)]
    for batch, (visible, infrared, labels) in zip(batches, expected, strict=True):
        assert np.array_equal(batch[0].movedim(1, -1), visible)
        assert np.array_equal(batch[1].movedim(1, -1), infrared)
        assert batch[2].tolist() == labels.tolist()

    utils.seed_everything(3)
    net = GFMNet(data.num_classes, "resnet18", **METHODS["base"].network, stages=3)
    steps = len(views) // 3
    rates = [0.005] * steps + [0.01] * 2 * steps
    losses = plain_training(
        net,
        [(rate, *view) for rate, view in zip(rates, views, strict=True)],
        lambda name: 1 if name.startswith(("bottleneck.", "classifier.")) else 0.1,
    )
    logged = [entry["total"] for entry in log_entries(result["log"])]
    assert logged == pytest.approx(np.mean(np.reshape(losses, (3, steps)), axis=1), rel=1e-6)
    trained = torch.load(result["last"])["net"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6, msg=name)
    kept = {file.stem.rpartition("_")[2]: torch.load(file) for file in Path(result["last"]).parent.glob("*.t")}
    chosen_on = {kind: checkpoint["selection"] for kind, checkpoint in kept.items()}
    assert chosen_on == {"best": "test", "last": "none", "1": "none", "2": "none"}


class Recorder(argparse.Namespace):
    """Flags that record which of them are read."""

    def __getattribute__(self, name):
        flags = super().__getattribute__("__dict__")
        if name in flags:
            READ.add(name)
        return super().__getattribute__(name)


READ = set()


def test_a_run_says_what_its_test_lacks(tiny_tree, tmp_path, capsys):
    tree = shutil.copytree(tiny_tree, tmp_path / "tree", copy_function=os.link)
    shutil.rmtree(tree / "cam6")
    train_ext_test0.main(tiny_flags(tree, tmp_path, "--epochs", "1"))
    assert f"warning: {tree}: no test id has an image of camera 6\n" in capsys.readouterr().out


def test_every_flag_is_read(tiny_tree, tmp_path, monkeypatch):
    command = tiny_flags(tiny_tree, tmp_path, "--epochs", "1")
    flags, parse_args = set(vars(parse(*command))), utils.ArgumentParser.parse_args
    monkeypatch.setattr(utils.ArgumentParser, "parse_args", lambda self, argv: parse_args(self, argv, Recorder()))
    READ.clear()
    train_ext_test0.main(command)
    assert flags - READ == set()


@pytest.mark.parametrize(
    ("method", "unused"),
    [
        ("base", "--alpha --gamma --square --weighting"),
        ("agw", "--alpha --gamma --margin --square"),
        ("adp", ""),
        ("dns", "--alpha --square --weighting"),
        ("gfm2", "--margin"),
    ],
)
def test_flags_of_the_loss_that_a_method_does_not_use_are_named(method, unused):
    recipe = vars(parse("--method", method))
    square = 1 - recipe["square"]
    changed = ["--alpha", "2", "--gamma", "3", "--margin", "0.1", "--square", str(square), "--weighting", "exact"]
    assert train_ext_test0.unused_flags(parse("--method", method, *changed), recipe) == unused.split()
    assert train_ext_test0.unused_flags(parse("--method", method), recipe) == []
    without = parse("--method", "adp", "--local", "0", "--margin", "0.1")
    assert train_ext_test0.unused_flags(without, vars(parse())) == ["--margin"]


def test_defaults_are_the_paper_s_recipe_but_for_the_square():
    args = parse()
    name = "sysu_adp_joint_co_nog_ch_nog_sq{}_aug_G_erase_0.5_p4_n8_lr_0.1_seed_0_9"
    assert (train_ext_test0.run_name(args), args.weighting) == (name.format(0), "published")
    assert train_ext_test0.run_name(parse("--weighting", "published", "--square", "1")) == name.format(1)
    assert (parse("--method", "gfm2").weighting, parse("--method", "gfm2").square) == ("stable", 1)
    assert (args.arch, args.weights, args.share_net, args.epochs) == ("resnet50", "imagenet", 2, 101)
    assert (args.img_h, args.img_w, args.margin, args.alpha, args.gamma) == (288, 144, 0.3, 1, 1)


def test_default_schedule_is_the_published_one():
    args = parse()
    rates = [optim.learning_rate(e, args.lr, args.warmup, args.milestones) for e in range(args.epochs)]
    expected = [0.1 * (e + 1) / 10 for e in range(10)] + [0.1] * 10 + [0.01] * 30 + [0.001] * 51
    assert rates == pytest.approx(expected)
    assert [optim.learning_rate(e, 1.0, 0, []) for e in range(3)] == [1.0] * 3


@pytest.mark.parametrize(("flag", "part"), [("--afam", "attention"), ("--local", "local")])
def test_a_part_of_gfmnet_is_left_out(flag, part):
    args = parse(flag, "0", "--arch", "resnet18", "--weights", "none")
    train_ext_test0.check_flags(args)
    net = train_ext_test0.build_network(args, 4, torch.device("cpu"), pretrained=True)
    assert net.options | METHODS["adp"].network == net.options | {part: True}  # all its other parts are there
    assert not net.options[part]
    images, labels = torch.randn(4, 3, 48, 16), torch.arange(4).repeat(2)
    losses = MethodLoss("adp")(net(images, images), labels)
    assert losses.local.requires_grad == (part != "local")
    assert train_ext_test0.run_name(args).endswith(f"_9_no_{flag.strip('-')}")
    args.method = "agw"
    with pytest.raises(InputError, match=f"{flag} 0: --method agw has no such part"):
        train_ext_test0.check_flags(args)


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_head_learns_at_the_full_rate_and_the_rest_at_a_tenth(optim):
    net = GFMNet(5, arch="resnet18")
    optimizer = train_ext_test0.build_optimizer(net, optim, 0.1)
    rest, head = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(net.bottleneck.weight), id(net.classifier.weight)}
    assert (rest["lr_scale"], head["lr_scale"]) == (0.1, 1.0)
    assert len(rest["params"]) + len(head["params"]) == sum(p.requires_grad for p in net.parameters())
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_steps_are_those_of_the_formulas(optim):
    """Nesterov's momentum, or Adam's (Kingma and Ba, 2015), with weight decay in the gradient."""
    net = torch.nn.ModuleDict({name: torch.nn.Linear(3, 1, bias=False) for name in ("bottleneck", "classifier")})
    optimizer = train_ext_test0.build_optimizer(net, optim, 0.1)
    value, mean, square = torch.cat([p.detach() for p in net.parameters()]).double(), 0, 0
    for step, gradient in enumerate(torch.randn(4, 2, 3), 1):
        for parameter, row in zip(net.parameters(), gradient, strict=True):
            parameter.grad = row[None].clone()
        optimizer.step()
        gradient = gradient.double() + 5e-4 * value
        if optim == "sgd":
            mean = 0.9 * mean + gradient
            value = value - 0.1 * (gradient + 0.9 * mean)
        else:
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            value = value - 0.1 * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(torch.cat([*net.parameters()]).double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_epoch_chosen_by_the_validation_ids(tiny_tree, tmp_path):
    more = ["--select", "val", "--epochs", "2", "--eval_every", "1"]
    result = train_ext_test0.main(tiny_flags(tiny_tree, tmp_path, *more))
    assert result["best"].endswith("_val_best.t")
    checkpoint = torch.load(result["best"])
    assert checkpoint["options"]["num_classes"] == len(data_manager.read_ids(tiny_tree, "train"))
    entries = log_entries(result["log"])
    assert [entry["select"] for entry in entries] == ["val", "val"]
    text = Path(result["log"]).with_suffix(".txt").read_text()
    assert "trial 0 of the VALIDATION ids" in text

    # The logged numbers are those of a tree whose test ids are the validation ids.
    tree = shutil.copytree(tiny_tree, tmp_path / "tree")
    (tree / "exp" / "val_id.txt").rename(tree / "exp" / "test_id.txt")
    for file in tree.glob("train_*.npy"):  # of people who are in the test now
        file.unlink()
    rows = testa.main(search_flags(tree, result["last"]))
    assert rows[1]["per_trial"][0]["metrics"]["mAP"] == pytest.approx(entries[-1]["FC/mAP"])

    for kind, selection in (("best", "val"), ("last", "none")):
        rows = testa.main(search_flags(tiny_tree, result[kind]))
        assert {row["selection"] for row in rows} == {selection}


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), http.client.InvalidURL("of a proxy")])
def test_weights_that_cannot_be_downloaded_say_what_to_do(error, sysu_tree, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"https.*--weights FILE.*--weights none"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", "imagenet"])


@pytest.mark.slow
def test_training_and_embedding_share_the_compiled_parts():
    net = GFMNet(3, "resnet18")
    names, compiled = list(net.state_dict()), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    net.compile(backend=backend)
    assert list(net.state_dict()) == names
    net(torch.randn(2, 3, 48, 16), torch.randn(2, 3, 48, 16))
    in_training = len(compiled)
    assert in_training > 0
    with torch.inference_mode():
        net.eval().embed(torch.randn(2, 3, 48, 16), "infrared")
    assert len(compiled) > in_training


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_compiled_run_computes_the_same(trained, sysu_tree, tmp_path):
    plain, _ = trained
    more = ["--epochs", "1", "--compile", "--eval_every", "2"]
    compiled = train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    losses = [log_entries(run["log"])[0] for run in (plain, compiled)]
    for name in ("total", "identity", "triplet", "local"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.02)
    state = torch.load(compiled["last"])["net"]
    assert state.keys() == torch.load(plain["last"])["net"].keys()


@pytest.mark.slow
def test_compiler_that_fails_is_one_line(sysu_tree, tmp_path):
    command = [sys.executable, REPO / "train_ext_test0.py", *flags(sysu_tree, tmp_path), "--compile"]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("train_ext_test0.py: error: --compile: torch.compile failed (")


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["--cache", "disk", "--workers", "2"], ["--compile"], *BY_METHOD])
def test_training_on_the_gpu_under_bf16(sysu_tree, tmp_path, more):
    more = ["--gpu", "0", "--amp", "bf16", "--epochs", "2", *more]
    result = train_ext_test0.main([*flags(sysu_tree, tmp_path), *more])
    test = ["--data_path", str(sysu_tree), "--resume", result["best"]]
    rows = testa.main([*test, "--gpu", "0", "--features", str(tmp_path / "gpu.npz")])
    assert all(math.isfinite(value) for row in rows for value in row["mean"].values())
    testa.main([*test, "--gpu", "cpu", "--features", str(tmp_path / "cpu.npz")])
    gpu, cpu = (np.load(tmp_path / f"{device}.npz") for device in ("gpu", "cpu"))
    for name in [name for name in cpu if cpu[name].dtype == np.float32]:
        assert (gpu[name] * cpu[name]).sum(axis=1).min() > 0.999, name  # convolutions of the GPU are in TF32


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["0", "1"])
@pytest.mark.parametrize("method", BY_METHOD)
def test_steps_do_not_wait_for_the_gpu(sysu_tree, tmp_path, monkeypatch, method, graph):
    """But for the readings of the losses, which the first step and every tenth have, no step waits for the device."""
    device = torch.device("cuda")
    args = parse(*flags(sysu_tree, tmp_path, *method, "--amp", "bf16", "--graph", graph, "--lr", "1e-6"))
    data = sysu_train(sysu_tree, SIZE)
    sampler = IdentitySampler(data, 4, 2, 0)
    net = train_ext_test0.build_network(args, data.num_classes, device, pretrained=True)
    optimizer = train_ext_test0.build_optimizer(net, "sgd", args.lr, METHODS[args.method].rates)
    loader = train_loader(data, sampler, 0, device, "gpu")

    def loader_that_forbids():
        batches = iter(loader)
        first = next(batches)  # the epoch's draws go to the device before it
        torch.cuda.set_sync_debug_mode("error")
        yield first
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.engine, "LOG_STEPS", 10**9)
    run = partial(train_epoch, train_ext_test0.build_step(args, net, device), optimizer)
    meter = run(loader)
    try:
        run(loader_that_forbids(), meter=meter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.step == 2 * len(sampler)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", BY_METHOD)
def test_graph_of_a_step_computes_what_its_tasks_compute(sysu_tree, tmp_path, method, amp):
    """At each of some steps, with the same weights, statistics and random numbers."""
    device, data = torch.device("cuda"), sysu_train(sysu_tree, SIZE)
    args = parse(*flags(sysu_tree, tmp_path, *method, "--amp", amp))
    net = train_ext_test0.build_network(args, data.num_classes, device, pretrained=True)
    for parameter in net.parameters():  # DNS's followers are not, as at first, where they go to
        parameter.data *= parameter.requires_grad
    graphed = train_ext_test0.build_step(args, net, device)
    single = TrainStep(net, graphed.criterion, graphed.augment, device, amp)
    optimizer = train_ext_test0.build_optimizer(net, "sgd", 0.01, METHODS[args.method].rates)
    for batch in islice(train_loader(data, IdentitySampler(data, 4, 2, 0), 0, device, "gpu"), 4):
        state, random, found = copy.deepcopy(net.state_dict()), torch.cuda.get_rng_state(), []
        for step in (single, graphed):
            net.load_state_dict(state)
            torch.cuda.set_rng_state(random)
            losses, _, _ = step(*batch)
            gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            found.append({"losses": torch.stack(losses).detach(), "gradient": gradient, **net.state_dict()})
            found[-1] = {name: values.clone() for name, values in found[-1].items()}
        first, second = (values.pop("gradient") for values in found)
        assert (second - first).norm() < 0.02 * first.norm()
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        optimizer.step()
    assert graphed.graph is not None


@pytest.mark.gpu
def test_resumed_run_on_the_gpu_is_as_near_as_its_sums(sysu_tree, tmp_path):
    more = ["--gpu", "0", "--optim", "sgd", "--lr", "1e-4"]
    losses = []
    for folder, stops in ((tmp_path / "whole", ["3"]), (tmp_path / "resumed", ["1", "2", "3"])):
        for epochs in stops:
            command = flags(sysu_tree, folder, *more, "--epochs", epochs, "--eval_every", "9", "--resume", "auto")
            result = train_ext_test0.main(command)
        losses.append([entry["total"] for entry in log_entries(result["log"])])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---- what has to be installed

MINIMAL = """
import sys

class Finder:
    # Finds what another finder finds, but for some modules.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)


BLOCKED = set(sys.argv[1].split())
sys.meta_path = [Finder(finder) for finder in sys.meta_path]
import pre_process_sysu, testa, train_ext_test0, utils
tree, out, size = sys.argv[2], sys.argv[3], ["--img_h", "48", "--img_w", "16"]
pre_process_sysu.main(["--data_path", tree, *size])
common = ["--data_path", tree, "--gpu", "cpu", "--workers", "0"]
run = ["--model_path", out, "--log_path", out, "--arch", "resnet18", "--weights", "none", "--epochs", "1"]
flags = [*common, *size, *run, "--lr", "0.001"]
run = train_ext_test0.main(flags)
testa.main([*common, "--resume", run["last"]])
test = [*common, "--resume", run["last"], "--report", out]
for script, more in ((train_ext_test0, [*flags, "--figures"]), (testa, test)):
    try:
        sys.argv[1:] = more
        utils.cli(script.main)
    except SystemExit as stop:
        print(stop)
assert not BLOCKED & set(sys.modules)
"""


def names_of_other_packages(*needed):
    """Top-level modules of what is installed beside some distributions and what they require."""
    required, queue = set(), [*needed]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in required:
            continue
        required.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        queue += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & required
    }


@pytest.mark.slow
def test_prepare_train_and_test_need_few_packages(sysu_tree, tmp_path):
    """No TensorBoard, no Matplotlib, nothing that only the tools need."""
    others = names_of_other_packages("torch", "torchvision", "numpy", "pillow", "scipy", "tqdm", "msgspec")
    assert {"matplotlib", "tensorboard"} <= others
    assert not {"torch", "PIL", "numpy"} & others
    tree = shutil.copytree(sysu_tree, tmp_path / "tree")
    command = [sys.executable, "-c", MINIMAL, " ".join(others), str(tree), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "TensorBoard is not installed, so no scalars are written" in result.stdout
    assert result.stdout.count("in first place (Rank-1)") == 1
    remedy = "matplotlib: is not installed; run: python -m pip install -r tools/requirements.txt"
    assert [line.split("error: ")[1] for line in result.stderr.splitlines()] == 2 * [remedy]
    assert result.stdout.splitlines()[-2:] == ["2", "2"]
