"""Several processes compute what one does: two gloo processes on the CPU."""

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
from ChannelAug import AUGMENTATIONS
from conftest import SIZE, flags, log_entries, search_flags, tiny_flags
from core import distributed
from core.distributed import leave_processes, sum_over_processes
from core.meter import Diverged, EpochMeter
from data_loader import IdentitySampler
from datasets import DATASETS
from methods import METHODS, MethodLoss
from model import GFMNet
from test_data_loader import toy_data
from test_training import Criterion, Net, batches, plain
from testing import engine
from training.engine import train_epoch
from training.run import SaveTimer
from training.step import TrainStep
from utils import InputError

REPO = Path(utils.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PEOPLE, SHOTS = 4, 2


def gradients(index, count, method, file):
    """One step's gradients, with frozen batch norm and no dropout; the processes share the identities of the batch.

    In float64: in float32, batches of another size round otherwise, and that alone changes gradients by 4e-3.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = GFMNet(PEOPLE, "resnet18", **METHODS[method].network).train().double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.Dropout):
            module.eval()
    views = AUGMENTATIONS[METHODS[method].augmentation][0]
    images = [torch.randn(number, PEOPLE * SHOTS, 3, 96, 48).double() for number in views]
    labels = torch.arange(PEOPLE).repeat_interleave(SHOTS)
    own = (labels % count) == index
    visible, infrared = (some[:, own].flatten(0, 1) for some in images)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=index, world_size=count)
    model = DistributedDataParallel(net) if count > 1 else net
    losses = MethodLoss(method)(model(visible, infrared), labels[own].repeat(sum(views)))
    losses.total.backward()
    total = sum_over_processes(losses.total.detach().clone()) / count
    if index == 0:
        grads = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
        torch.save({"total": total, "correct": losses.correct, "grads": grads}, f"{file}.{count}")
    del model, losses
    leave_processes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adp", "base", "deen", "dns", "rle", "quad"])
def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path, method):
    for count in (1, 2):
        torch.multiprocessing.spawn(gradients, (count, method, tmp_path / "grads"), nprocs=count)
    one, two = (torch.load(tmp_path / f"grads.{count}") for count in (1, 2))
    assert one["grads"].keys() == two["grads"].keys()
    torch.testing.assert_close(two["total"], one["total"], rtol=1e-10, atol=0)
    assert two["correct"] == one["correct"]
    for name, grad in one["grads"].items():
        assert (two["grads"][name] - grad).norm() <= 1e-9 * grad.norm(), name


def test_a_gathered_row_has_the_sum_of_its_gradients(monkeypatch):
    """As the second of two processes; what the other one would send is made up."""
    own, other, slopes = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2), torch.randn(2, 6, 2)
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(
        dist, "all_gather", lambda parts, rows: [p.copy_(r) for p, r in zip(parts, (other, rows), strict=True)]
    )
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: gradient.add_(slopes[0]))
    rows = distributed.gather(own)
    assert torch.equal(rows, torch.cat([other, own]))
    (rows * slopes[1]).sum().backward()
    torch.testing.assert_close(own.grad, slopes.sum(dim=0)[3:])


def test_sums_and_minima_are_over_all_processes(monkeypatch):
    own, other = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])
    reduce = {dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MIN: torch.minimum}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x, op=dist.ReduceOp.SUM: x.copy_(reduce[op](x, other)))
    assert distributed.sum_over_processes(own.clone()).tolist() == [4, 7]
    assert distributed.min_over_processes(own.clone()).tolist() == [1, 2]


def test_each_process_goes_on_with_its_own_draws(monkeypatch):
    cpu, (first, second) = torch.device("cpu"), (torch.Generator().manual_seed(seed) for seed in (1, 2))
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda all, own: all.__setitem__(slice(2), [own, [second.get_state()]])
    )
    torch.set_rng_state(first.get_state())
    states = distributed.generator_states(cpu)
    for index, generator in enumerate((first, second)):
        monkeypatch.setattr(distributed, "process_index", lambda index=index: index)
        distributed.set_generators(states, cpu)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=generator))


class Part(list):
    """A loader of some rows of five images; a process without any gets the first image."""

    def __init__(self, *rows):
        super().__init__(torch.eye(5)[[row]] for row in rows or [0])
        self.rows, self.dataset = [*rows], range(5)


def test_features_of_all_processes_stand_in_their_rows(monkeypatch):
    parts = []
    monkeypatch.setattr(engine, "process_count", lambda: 2)
    monkeypatch.setattr(engine, "sum_over_processes", parts.append)
    for loader in (Part(0, 3), Part(4, 1, 2), Part()):
        features = engine.extract(lambda images, modality: {"FC": 2 * images}, loader, "visible", "")
        assert features["FC"] is parts[-1]
    assert torch.equal(sum(parts), 2 * torch.eye(5))


def test_identities_of_a_batch_are_shared_without_repetition(monkeypatch):
    data = toy_data()
    whole = list(IdentitySampler(data, 4, 2, seed=0))
    shares = []
    monkeypatch.setattr(data_loader, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(data_loader, "process_index", lambda index=index: index)
        shares.append(list(IdentitySampler(data, 4, 2, seed=0)))
    for batch, first, second in zip(whole, *shares, strict=True):
        for images, one, other in zip(batch, first, second, strict=True):
            by_identity = images.reshape(4, 2)
            np.testing.assert_array_equal(one.reshape(2, 2), by_identity[::2])
            np.testing.assert_array_equal(other.reshape(2, 2), by_identity[1::2])
    with pytest.raises(InputError, match="--batch_size 3: take a multiple of 2, one for each process"):
        IdentitySampler(data, 3, 2, seed=0)


def test_images_are_decoded_before_the_processes_start(regdb_tree, tmp_path, monkeypatch):
    """The others wait for the file, not in a collective operation, which has a time limit."""
    tree = shutil.copytree(regdb_tree, tmp_path / "regdb")
    monkeypatch.setattr(train_ext_test0, "start_processes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    command = flags(tree, tmp_path, "--dataset", "regdb")
    with pytest.raises(KeyboardInterrupt):
        train_ext_test0.main(command)
    arrays = list((tree / "cache").iterdir())
    assert len(arrays) == 2
    for array in arrays:
        array.rename(tmp_path / array.name)
    monkeypatch.setattr(data_loader, "process_index", lambda: 1)
    monkeypatch.setattr(data_loader, "write_images", lambda *_: pytest.fail("decoded by another process"))
    monkeypatch.setattr(data_loader.time, "sleep", lambda _: [(tmp_path / a.name).rename(a) for a in arrays])
    assert len(DATASETS["regdb"].train(tree, SIZE, trial=1).visible)


def test_a_signal_ends_a_process_that_waits_for_the_others_to_begin(monkeypatch):
    """Python's own handler would run once they have come, which may be never."""
    numbers, within = (signal.SIGINT, signal.SIGTERM), []
    before = [*map(signal.getsignal, numbers)]
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: within.extend(map(signal.getsignal, numbers)))
    distributed.start_processes("cpu")
    assert (within, [*map(signal.getsignal, numbers)]) == ([signal.SIG_DFL] * 2, before)


def launch(tree, out, *more):
    command = [*TORCHRUN, str(REPO / "train_ext_test0.py"), *tiny_flags(tree, out, *MORE, *more)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


MORE = ["--epochs", "2", "--eval_every", "1", "--test_batch", "5"]


@pytest.mark.slow
def test_two_processes_train_and_test_as_one_run(tiny_tree, tmp_path):
    """And a run that has lost a process within an epoch ends, and goes on where it was."""
    states = []
    for folder, killed in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        run = launch(tiny_tree, folder, *["--save_minutes", "0.00001"] * killed)
        if killed:
            kill_a_process_within_an_epoch(run, folder / "models")
            run = launch(tiny_tree, folder, "--resume", "auto")
        text, _ = run.communicate(timeout=300)
        assert run.returncode == 0, text
        assert text.count("epoch 1/1") == 1
        assert "on cpu x 2" in text
        (last,) = (folder / "models").glob("*_last.t")
        states.append(torch.load(last))
    assert all(torch.equal(states[0]["net"][name], states[1]["net"][name]) for name in states[0]["net"])
    assert states[0]["processes"] == 2
    entries = log_entries(next(folder.glob("log/sysu_log/*.jsonl")))
    assert [entry["epoch"] for entry in entries] == [0, 1]

    with pytest.raises(InputError, match="was saved by 2 processes, but this run has 1; resume"):
        train_ext_test0.main(tiny_flags(tiny_tree, folder, *MORE, "--resume", str(last)))

    # One process on the same images in the same batches: the same numbers, to the last digit.
    torch.set_num_threads(1)
    rows = testa.main(search_flags(tiny_tree, last, "--test_batch", "5"))
    for row in rows:
        for metric, value in row["per_trial"][0]["metrics"].items():
            assert entries[1][f"{row['feature']}/{metric}"] == value


def kill_a_process_within_an_epoch(run, models):
    try:
        end = time.monotonic() + 120
        while not any("within" in torch.load(file) for file in models.glob("*_last.t")):
            assert time.monotonic() < end
            assert run.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        text, _ = run.communicate(timeout=120)
        assert run.returncode != 0
        assert "SIGKILL" in text or "Signal 9" in text
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def stopping_epoch(index, count, file):
    """A loop of steps of which the last process, alone, is asked to stop after the third."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=index, world_size=count)
    with SaveTimer(60, torch.device("cpu")) as timer:
        timer.hold, step = True, 1
        while not timer.due():
            step += 1
            if step == 3 and index == count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        Path(f"{file}.{index}").write_text(f"{step} {timer.stop}")
    leave_processes()


def diverging_epoch(index, count, file):
    """An epoch whose loss is not finite in one step of the last process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=index, world_size=count)
    criterion = Criterion(loss=[3] if index == count - 1 else [])
    model, meter = DistributedDataParallel(Net()), EpochMeter(torch.device("cpu"))
    try:
        step = TrainStep(model, criterion, plain, meter.losses.device)
        train_epoch(step, torch.optim.Adam(model.parameters()), batches(25), meter=meter)
    except Diverged as error:
        Path(f"{file}.{index}").write_text(f"{meter.step} {error}")
    del model, criterion, step
    leave_processes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epoch", "said"),
    [
        (stopping_epoch, "3 15"),
        (diverging_epoch, "10 train: the loss, its gradient or a weight is not finite from step 3 on"),
    ],
)
def test_processes_stop_together_where_one_of_them_has_to(epoch, said, tmp_path):
    torch.multiprocessing.spawn(epoch, (2, tmp_path / "said"), nprocs=2)
    first, second = ((tmp_path / f"said.{index}").read_text() for index in range(2))
    assert first == second
    assert first.startswith(said)
