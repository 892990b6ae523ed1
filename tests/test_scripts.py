"""The scripts from their flags to their files: training, resuming, testing, on the small demo trees."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import data_loader
import data_manager
import testa
import train_ext_test0
import utils
from ChannelAug import TrainAugmentation
from conftest import SIZE, flags, save_network
from core import engine, evaluation
from core.checkpoint import save_checkpoint
from loss import MethodLoss
from model import GFMNet
from tools import visualize
from utils import InputError

REPO = Path(utils.__file__).parent


@pytest.fixture(scope="module")
def trained(sysu_tree, tmp_path_factory):
    """A run of three epochs on the demo tree -> (main's result, its folder)."""
    out = tmp_path_factory.mktemp("run")
    return train_ext_test0.main(flags(sysu_tree, out, "--epochs", "3", "--eval_every", "2", "--save_epoch", "1")), out


def test_run_writes_what_it_promises(trained):
    result, out = trained
    name = "sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p2_n4_lr_0.01_seed_0_9_adam"
    assert sorted(file.name for file in (out / "models").glob("*.t")) == [
        f"{name}_{kind}.t" for kind in ("best", "epoch_1", "epoch_2", "last")
    ]
    entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
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


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_run_equals_the_uninterrupted_one(trained, sysu_tree, tmp_path, monkeypatch, workers):
    whole, _ = trained
    more = ("--epochs", "3", "--eval_every", "2", "--workers", workers)

    class Stopped(Exception):
        pass

    save = save_checkpoint

    def save_and_stop(checkpoint, path):
        save(checkpoint, path)
        if checkpoint["epoch"] == 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(train_ext_test0, "save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    last = next((tmp_path / "models").glob("*_last.t")).name
    resumed = train_ext_test0.main(flags(sysu_tree, tmp_path, *more, "--resume", last))

    a, b = torch.load(whole["last"]), torch.load(resumed["last"])
    assert all(torch.equal(a["net"][key], b["net"][key]) for key in a["net"])
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())
    assert a["best"] == b["best"]

    def entries(result):
        timing = ("seconds", "images_per_second")
        lines = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
        return [{key: value for key, value in entry.items() if key not in timing} for entry in lines]

    assert entries(whole) == entries(resumed)


@pytest.mark.parametrize("other", [("--share_net", "3"), ("--alpha", "3"), ("--optim", "sgd"), ("--seed", "1")])
def test_resume_refuses_other_flags(trained, sysu_tree, tmp_path, other):
    result, _ = trained
    with pytest.raises(InputError, match=rf"_last\.t.*{other[0]} \S+, not {other[1]}"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--resume", result["last"], *other))


def test_resumed_run_needs_no_weights_and_remembers_those_it_began_with(trained, sysu_tree, tmp_path):
    result, _ = trained
    more = ("--resume", result["last"], "--epochs", "4", "--weights", "absent.pth")
    assert torch.load(train_ext_test0.main(flags(sysu_tree, tmp_path, *more))["last"])["args"]["weights"] == "none"


def test_run_from_before_the_selection_flag_is_resumed(trained, sysu_tree, tmp_path):
    result, _ = trained
    checkpoint = torch.load(result["last"])
    del checkpoint["args"]["select"], checkpoint["selection"]
    torch.save(checkpoint, tmp_path / "old_last.t")
    more = ("--resume", str(tmp_path / "old_last.t"), "--epochs", "4")
    assert torch.load(train_ext_test0.main(flags(sysu_tree, tmp_path, *more))["last"])["epoch"] == 3
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", str(tmp_path / "old_last.t"), "--gpu", "cpu"])
    assert {row["selection"] for row in rows} == {"unknown"}


def test_resume_refuses_a_best_checkpoint(trained, sysu_tree, tmp_path):
    result, _ = trained
    with pytest.raises(InputError, match="no training state"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--resume", result["best"]))


def test_run_of_the_same_name_is_not_overwritten(trained, sysu_tree):
    _, out = trained
    before = {file: file.read_bytes() for file in (out / "models").glob("*.t")}
    for more in (["--alpha", "2"], ["--epochs", "1"]):
        with pytest.raises(InputError, match=r"_last\.t: is there already; go on with --resume"):
            train_ext_test0.main(flags(sysu_tree, out, *more))
    log = (out / "log" / "sysu_log").glob("*.jsonl")
    logged = {file: file.read_bytes() for file in log}
    with pytest.raises(InputError, match=r"\.jsonl: already contains another run's log; delete it or choose another"):
        train_ext_test0.main(flags(sysu_tree, out, "--model_path", str(out / "other")))
    assert logged == {file: file.read_bytes() for file in logged}
    assert before == {file: file.read_bytes() for file in (out / "models").glob("*.t")}


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "base", "--optim", "sgd", "--augc", "0", "--rande", "0"],
        ["--method", "agw", "--share_net", "1", "--amp", "bf16"],
        ["--method", "caj", "--square", "0", "--weighting", "published", "--mode", "indoor"],
        ["--method", "adp", "--share_net", "5", "--alpha", "2", "--gamma", "0.5", "--margin", "0.1"],
    ],
)
def test_every_method_trains_and_its_checkpoint_tests(sysu_tree, tmp_path, more):
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, "--epochs", "1", *more))
    (entry,) = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
    assert math.isfinite(entry["total"])
    assert (entry["local"] > 0) == ("adp" in more)
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", result["last"], "--gpu", "cpu", "--workers", "0"])
    assert len(rows) == 2


def test_every_flag_is_read():
    """Each flag's name stands in the script beside its declaration, or in the module whose flags it shares."""
    for script, shared in ((train_ext_test0, ""), (testa, evaluation.__file__), (visualize, evaluation.__file__)):
        source = "".join(Path(file).read_text() for file in (script.__file__, shared) if file)
        actions = script.get_args_parser()._actions
        for sub in actions[-1].choices.values() if isinstance(actions[-1].choices, dict) else []:
            actions = actions + sub._actions
        for action in actions:
            if action.dest != "help":
                assert f"args.{action.dest}" in source, action.dest


def test_defaults_are_the_paper_s_recipe():
    args = train_ext_test0.get_args_parser().parse_args([])
    assert train_ext_test0.run_name(args) + "_best.t" == (
        "sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p4_n8_lr_0.1_seed_0_9_best.t"
    )
    assert (args.arch, args.weights, args.share_net, args.epochs) == ("resnet50", "imagenet", 2, 101)
    assert (args.img_h, args.img_w, args.margin, args.alpha, args.gamma) == (288, 144, 0.3, 1, 1)


def test_default_schedule_is_the_published_one():
    args = train_ext_test0.get_args_parser().parse_args([])
    rates = [train_ext_test0.learning_rate(e, args.lr, args.warmup, args.milestones) for e in range(args.epochs)]
    expected = [0.1 * (e + 1) / 10 for e in range(10)] + [0.1] * 10 + [0.01] * 30 + [0.001] * 51
    assert rates == pytest.approx(expected)
    assert [train_ext_test0.learning_rate(e, 1.0, 0, []) for e in range(3)] == [1.0] * 3


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_head_learns_at_the_full_rate_and_the_rest_at_a_tenth(optim):
    net = GFMNet(5, arch="resnet18")
    optimizer = train_ext_test0.build_optimizer(net, optim, 0.1)
    rest, head = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(net.bottleneck.weight), id(net.classifier.weight)}
    assert (rest["lr_scale"], head["lr_scale"]) == (0.1, 1.0)
    assert len(rest["params"]) + len(head["params"]) == sum(p.requires_grad for p in net.parameters())
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)


def test_epoch_chosen_by_the_validation_ids(sysu_tree, tmp_path):
    more = ["--select", "val", "--epochs", "2", "--eval_every", "1"]
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    assert result["best"].endswith("_val_best.t")
    checkpoint = torch.load(result["best"])
    assert checkpoint["options"]["num_classes"] == len(data_manager.read_ids(sysu_tree, "train"))
    entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
    assert [entry["select"] for entry in entries] == ["val", "val"]
    text = Path(result["log"]).with_suffix(".txt").read_text()
    assert "trial 0 of the VALIDATION ids" in text

    # The logged numbers are those of a tree whose test ids are the validation ids.
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    (tree / "exp" / "val_id.txt").rename(tree / "exp" / "test_id.txt")
    common = ["--gpu", "cpu", "--workers", "0"]
    rows = testa.main(["--data_path", str(tree), "--resume", result["last"], *common])
    assert rows[1]["per_trial"][0]["metrics"]["mAP"] == pytest.approx(entries[-1]["FC/mAP"])

    for kind, selection in (("best", "val"), ("last", "none")):
        rows = testa.main(["--data_path", str(sysu_tree), "--resume", result[kind], *common])
        assert {row["selection"] for row in rows} == {selection}
    with pytest.raises(InputError, match="--select val: is an option of SYSU-MM01"):
        train_ext_test0.main(["--dataset", "regdb", "--select", "val"])


@pytest.mark.parametrize("content", [{1: 2}, {"conv1.weight": 1.0}, {"net": [1]}, {"net": {"a": 1.0}, "options": {}}])
def test_files_without_weights_are_refused(sysu_tree, tmp_path, content):
    file = tmp_path / "odd.t"
    torch.save(content, file)
    with pytest.raises(InputError, match=r"odd\.t"):
        testa.main(["--data_path", str(sysu_tree), "--resume", str(file), "--gpu", "cpu"])
    with pytest.raises(InputError, match=r"odd\.t"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", str(file)])


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("testa.py", ["--resume", "none.t"], ["none.t"]),
        ("testa.py", [], ["--resume", "--from_features"]),
        ("train_ext_test0.py", ["--dataset", "llcm", "--mode", "indoor"], ["--mode indoor", "SYSU-MM01"]),
        ("train_ext_test0.py", ["--trial", "2"], ["--trial 2", "RegDB"]),
        (
            "train_ext_test0.py",
            ["--data_path", "nowhere"],
            ["nowhere/train_rgb_resized_img.npy", "pre_process_sysu.py"],
        ),
        ("train_ext_test0.py", ["--dataset", "regdb", "--data_path", "nowhere"], ["nowhere: no such folder"]),
        ("train_ext_test0.py", ["--lr", "nan"], ["--lr", "nan"]),
        ("pre_process_sysu.py", ["--data_path", "nowhere"], ["nowhere: no such folder", "--data_path"]),
        ("pre_process_sysu.py", ["--data_path", "."], ["exp/train_id.txt"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, arguments, words, tmp_path):
    command = [sys.executable, REPO / script, *arguments]
    command += ["--gpu", "cpu"] if script in ("testa.py", "train_ext_test0.py") else []
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_weights_that_cannot_be_had_say_what_to_do(sysu_tree, tmp_path, monkeypatch):
    import urllib.error

    import torchvision

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"https.*--weights FILE.*--weights none"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", "imagenet"])
    with pytest.raises(InputError, match=r"absent\.pth"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", "absent.pth"])
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(InputError, match=r"resnet34\.pth.*resnet50"):
        train_ext_test0.main(
            [*flags(sysu_tree, tmp_path), "--arch", "resnet50", "--weights", str(tmp_path / "resnet34.pth")]
        )


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
    losses = [json.loads(Path(run["log"]).read_text().splitlines()[0]) for run in (plain, compiled)]
    for name in ("total", "identity", "triplet", "local"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.02)
    state = torch.load(compiled["last"])["net"]
    assert state.keys() == torch.load(plain["last"])["net"].keys()


def test_compiler_that_fails_is_one_line(sysu_tree, tmp_path):
    command = [sys.executable, REPO / "train_ext_test0.py", *flags(sysu_tree, tmp_path), "--compile"]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("train_ext_test0.py: error: --compile: torch.compile failed (")


def test_optimiser_of_a_gpu_goes_on_without_one():
    """A GPU's optimiser is fused, a CPU's is not; the state of either loads into the other."""
    states = []
    for fused in (True, False):
        net = GFMNet(5, "resnet18")
        optimizer = train_ext_test0.build_optimizer(net, "adam", 0.1)
        for group in optimizer.param_groups:
            group["fused"] = fused
        sum(parameter.sum() for parameter in net.parameters()).backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    for state in states:
        net = GFMNet(5, "resnet18")
        optimizer = train_ext_test0.build_optimizer(net, "adam", 0.1)
        optimizer.load_state_dict(state)
        sum(parameter.sum() for parameter in net.parameters()).backward()
        before = net.classifier.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - net.classifier.weight, torch.full_like(before, 0.1), rtol=0.05, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["--cache", "gpu"], ["--cache", "disk", "--workers", "2"], ["--compile"]])
def test_training_on_the_gpu_under_bf16(sysu_tree, tmp_path, more):
    more = ["--gpu", "0", "--amp", "bf16", "--epochs", "2", *more]
    result = train_ext_test0.main([*flags(sysu_tree, tmp_path), *more])
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", result["best"], "--gpu", "0"])
    assert all(math.isfinite(value) for row in rows for value in row["mean"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_steps_do_not_wait_for_the_gpu(sysu_tree, monkeypatch, amp):
    """But for the readings of the losses, which the first step and every tenth have, no step waits for the device."""
    device = torch.device("cuda")
    data = data_loader.sysu_train(sysu_tree, SIZE)
    sampler = data_loader.IdentitySampler(data, 4, 2, 0)
    net = GFMNet(data.num_classes, "resnet18").to(device, memory_format=torch.channels_last)
    optimizer = train_ext_test0.build_optimizer(net, "sgd", 1e-6)
    loader = data_loader.train_loader(data, sampler, 0, device, "gpu")

    def loader_that_forbids():
        batches = iter(loader)
        first = next(batches)  # the epoch's draws go to the device before it
        torch.cuda.set_sync_debug_mode("error")
        yield first
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "LOG_STEPS", 10**9)
    run = partial(engine.train_epoch, net, MethodLoss(), optimizer, augment=TrainAugmentation(), device=device, amp=amp)
    epoch = run(loader)
    try:
        run(loader_that_forbids(), epoch=epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert epoch.step == 2 * len(sampler)


@pytest.mark.gpu
def test_resumed_run_on_the_gpu_is_as_near_as_its_sums(sysu_tree, tmp_path):
    more = ["--gpu", "0", "--optim", "sgd", "--lr", "1e-4"]
    losses = []
    for folder, stops in ((tmp_path / "whole", ["3"]), (tmp_path / "resumed", ["1", "2", "3"])):
        for epochs in stops:
            command = flags(sysu_tree, folder, *more, "--epochs", epochs, "--eval_every", "9", "--resume", "auto")
            result = train_ext_test0.main(command)
        entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
        losses.append([entry["total"] for entry in entries])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_search_without_a_match_is_refused_before_the_training(sysu_tree, tmp_path):
    """Camera 3's queries do not see camera 2: with no other cameras there is nothing to find."""
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    for camera in (1, 4, 5, 6):
        shutil.rmtree(tree / f"cam{camera}")
    words = "no query has a match in the gallery that it sees .*not seen: camera 2 by queries of camera 3"
    with pytest.raises(InputError, match=words):
        train_ext_test0.main(flags(tree, tmp_path, "--epochs", "1"))
    assert not list((tmp_path / "models").glob("*.t"))
    checkpoint = save_network(tmp_path / "net.t", 0, "sysu")
    with pytest.raises(InputError, match=words):
        testa.main(["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint)])
