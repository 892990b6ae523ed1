"""Several ranks compute what one does: two gloo processes on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data_loader
import testa
import train_ext_test0
import utils
from conftest import SIZE, flags
from core import engine
from core.datasets import regdb_train
from core.distributed import leave_processes, sum_over_processes
from data_loader import IdentitySampler
from loss import MethodLoss
from model import GFMNet, method_options
from test_data_loader import toy_data
from test_training import Criterion, Net, batches, plain
from utils import InputError

REPO = Path(utils.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PEOPLE, SHOTS = 4, 2


def gradients(rank, ranks, method, file):
    """One step's gradients, with batch norm frozen; the batch's identities are shared by the ranks.

    In float64: in float32, batches of another size round otherwise, and that alone changes gradients by 4e-3.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = GFMNet(PEOPLE, "resnet18", **method_options(method)).train().double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.eval()
    images = {view: torch.randn(PEOPLE * SHOTS, 3, 96, 48).double() for view in ("plain", "exchanged", "infrared")}
    labels = torch.arange(PEOPLE).repeat_interleave(SHOTS)
    own = (labels % ranks) == rank
    visible = torch.cat([images["plain"][own], images["exchanged"][own]])
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=ranks)
    model = DistributedDataParallel(net) if ranks > 1 else net
    losses = MethodLoss(method)(model(visible, images["infrared"][own]), labels[own].repeat(3))
    losses.total.backward()
    total = sum_over_processes(losses.total.detach().clone()) / ranks
    if rank == 0:
        grads = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
        torch.save({"total": total, "correct": losses.correct, "grads": grads}, f"{file}.{ranks}")
    del model, losses
    leave_processes()


@pytest.mark.parametrize("method", ["adp", "base"])
def test_gradients_of_two_ranks_are_those_of_the_whole_batch(tmp_path, method):
    for ranks in (1, 2):
        torch.multiprocessing.spawn(gradients, (ranks, method, tmp_path / "grads"), nprocs=ranks)
    one, two = (torch.load(tmp_path / f"grads.{ranks}") for ranks in (1, 2))
    assert one["grads"].keys() == two["grads"].keys()
    torch.testing.assert_close(two["total"], one["total"], rtol=1e-10, atol=0)
    assert two["correct"] == one["correct"]
    for name, grad in one["grads"].items():
        assert (two["grads"][name] - grad).norm() <= 1e-9 * grad.norm(), name


def test_identities_of_a_batch_are_shared_without_repetition(monkeypatch):
    data = toy_data()
    whole = list(IdentitySampler(data, 4, 2, seed=0))
    shares = []
    monkeypatch.setattr(data_loader, "process_count", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(data_loader, "process_index", lambda rank=rank: rank)
        shares.append(list(IdentitySampler(data, 4, 2, seed=0)))
    for batch, first, second in zip(whole, *shares, strict=True):
        for images, one, other in zip(batch, first, second, strict=True):
            by_identity = images.reshape(4, 2)
            np.testing.assert_array_equal(one.reshape(2, 2), by_identity[::2])
            np.testing.assert_array_equal(other.reshape(2, 2), by_identity[1::2])
    with pytest.raises(InputError, match="--batch_size 3: 2 processes cannot share it evenly"):
        IdentitySampler(data, 3, 2, seed=0)


def test_images_are_decoded_before_the_ranks_start(regdb_tree, tmp_path, monkeypatch):
    """The others wait for the file, not in a collective operation, which has a time limit."""
    tree = tmp_path / "regdb"
    shutil.copytree(regdb_tree, tree)
    monkeypatch.setattr(train_ext_test0, "start_processes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    command = flags(tree, tmp_path, "--dataset", "regdb")
    with pytest.raises(KeyboardInterrupt):
        train_ext_test0.main(command)
    arrays = list((tree / "cache").iterdir())
    assert len(arrays) == 2
    for array in arrays:
        array.rename(tmp_path / array.name)
    monkeypatch.setattr(data_loader, "process_index", lambda: 1)
    monkeypatch.setattr(data_loader, "write_images", lambda *_: pytest.fail("decoded by another rank"))
    monkeypatch.setattr(data_loader.time, "sleep", lambda _: [(tmp_path / a.name).rename(a) for a in arrays])
    assert len(regdb_train(tree, SIZE, 1).visible)


def launch(tree, out, *more, **options):
    command = [*TORCHRUN, str(REPO / "train_ext_test0.py"), *flags(tree, out, *more)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)


@pytest.mark.slow
def test_two_ranks_train_and_test_as_one_run(sysu_tree, tmp_path):
    run = launch(sysu_tree, tmp_path, "--epochs", "2", "--eval_every", "1", "--test_batch", "5")
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    (log,) = (tmp_path / "log" / "sysu_log").glob("*.jsonl")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert text.count("epoch 1/1") == 1
    assert "on cpu x 2" in text
    assert entries[1]["total"] < entries[0]["total"]
    (last,) = (tmp_path / "models").glob("*_last.t")

    with pytest.raises(InputError, match="is of a run on 2 ranks, not 1"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--epochs", "3", "--eval_every", "1", "--resume", str(last)))

    # One process on the same images in the same batches: the same numbers, to the last digit.
    torch.set_num_threads(1)
    common = ["--data_path", str(sysu_tree), "--gpu", "cpu", "--workers", "0", "--test_batch", "5"]
    rows = testa.main([*common, "--resume", str(last)])
    for row in rows:
        for metric, value in row["per_trial"][0]["metrics"].items():
            assert entries[1][f"{row['feature']}/{metric}"] == value


@pytest.mark.slow
def test_two_ranks_that_are_stopped_go_on_where_they_were(sysu_tree, tmp_path):
    """Both ranks leave an epoch after the same step, and the weights end as those of ranks that nothing stopped."""
    states = []
    for folder, stopped in ((tmp_path / "whole", False), (tmp_path / "stopped", True)):
        more = ["--epochs", "4", "--eval_every", "9", "--resume", "auto"]
        run = launch(sysu_tree, folder, *more)
        if stopped:
            for line in run.stdout:
                if line.startswith("epoch 0/"):
                    break
            run.terminate()
            assert "stopped by SIGTERM in epoch" in run.stdout.read()
            assert run.wait(timeout=120) != 0
            (last,) = (folder / "models").glob("*_last.t")
            assert torch.load(last)["sums"]["step"] > 0
            assert len(torch.load(last)["within"]["generators"]) == 2
            run = launch(sysu_tree, folder, *more)
        text, _ = run.communicate(timeout=300)
        assert run.returncode == 0, text
        (last,) = (folder / "models").glob("*_last.t")
        states.append(torch.load(last)["net"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(sysu_tree, tmp_path):
    run = launch(sysu_tree, tmp_path, "--epochs", "1000", start_new_session=True)
    try:
        for line in run.stdout:
            if line.startswith("epoch 0/"):
                break
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        start = time.monotonic()
        rest = run.stdout.read()
        assert run.wait(timeout=120) != 0
        assert time.monotonic() - start < 120
        assert "SIGKILL" in rest or "Signal 9" in rest
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def diverging_epoch(rank, ranks, file):
    """An epoch whose loss is not finite in one step of the last rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=ranks)
    criterion = Criterion(loss=[3] if rank == ranks - 1 else [])
    model, epoch = DistributedDataParallel(Net()), engine.Epoch(torch.device("cpu"))
    try:
        engine.train_epoch(
            model, criterion, torch.optim.Adam(model.parameters()), batches(25), plain, epoch.losses.device, epoch=epoch
        )
    except engine.Diverged as error:
        Path(f"{file}.{rank}").write_text(f"{epoch.step} {error}")
    del model, criterion
    leave_processes()


def test_ranks_stop_together_where_one_of_them_diverges(tmp_path):
    torch.multiprocessing.spawn(diverging_epoch, (2, tmp_path / "said"), nprocs=2)
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("10 train: the loss, its gradient or a weight is not finite from step 3 on")
