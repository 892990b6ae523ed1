"""What a training does when it goes wrong, and how long it can go on."""

import copy
import math
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tqdm import tqdm

import train_ext_test0
import training.engine
from ChannelAug import TrainAugmentation
from conftest import SIZE, flags, log_entries, parse
from core import meter as meter_module
from core.meter import Diverged, EpochMeter, EpochSums
from data_loader import CachedBatches, IdentitySampler, TrainData, sysu_train
from loss import SquaredTripletLoss, _weighted_triplet
from methods import METHODS, Health, Losses, MethodLoss
from model import GFMNet, Output
from training.engine import train_epoch
from training.log import RunLog, log_epoch, warnings
from training.step import TrainStep

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    """A network small enough to follow, with batch norm, whose statistics a step changes too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1, bias=False)

    def forward(self, visible, infrared):
        return self.linear(self.norm(torch.cat([visible, infrared]).float().mean(dim=(2, 3))) + 1)


class Criterion:
    """A loss that is not finite, or has no finite gradient, in the steps that are named."""

    def __init__(self, **bad):
        self.bad, self.step, self.read = bad, 0, []

    def __call__(self, output, labels):
        self.step += 1
        value = output.mean()
        if self.step in self.bad.get("loss", ()):
            value = value * math.inf
        if self.step in self.bad.get("gradient", ()):
            value = value + (output.mean() * 0).sqrt()  # 0, with an infinite slope
        return Losses(*[value] * len(Losses._fields))

    def health(self, output, labels):
        self.read.append(self.step)
        return Losses(*[torch.tensor(float(self.step))] * len(Losses._fields))


def batches(steps):
    images = np.random.default_rng(0).integers(1, 256, (8, 4, 2, 3), np.uint8)
    data = TrainData(images, np.arange(8) // 2, images, np.arange(8) // 2)
    sampler = IdentitySampler(data, 2, 2, 0)
    sampler.steps = steps
    return CachedBatches(data, sampler, CPU)


def plain(visible, infrared, labels):
    return visible / 255, infrared / 255, labels.repeat(2)


class Saver:
    """Saves after some steps, as a run does."""

    def __init__(self, meter, *steps):
        self.meter, self.steps, self.saved = meter, steps, []

    def due(self):
        return self.meter.step in self.steps

    def save(self, meter):
        self.saved.append(copy.deepcopy(meter.to_checkpoint()))


@pytest.mark.parametrize(
    ("bad", "saves", "first", "last"),
    [
        ({"loss": [1]}, (), 1, 1),
        ({"loss": [5]}, (), 5, 10),
        ({"gradient": [5]}, (3, 7), 5, 7),
        ({"gradient": [18], "loss": [15]}, (), 15, 20),
        ({"loss": [23]}, (), 23, 23),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run(bad, saves, first, last):
    """At the next reading, and before anything is saved."""
    loader, net, criterion, meter = batches(23), Net(), Criterion(**bad), EpochMeter(CPU)
    optimizer, saver = torch.optim.Adam(net.parameters()), Saver(meter, *saves)
    with pytest.raises(Diverged, match=f"^epoch 3/9: the loss.* is not finite from step {first} on; lower --lr"):
        train_epoch(TrainStep(net, criterion, plain, CPU), optimizer, loader, "epoch 3/9", meter, saver)
    assert meter.step == last
    assert [state["step"] for state in saver.saved] == [step for step in saves if step < first]


@pytest.mark.parametrize("broken", ["linear.weight", "norm.running_var"])
def test_a_network_with_a_weight_that_is_not_finite_is_not_returned(broken):
    """Though its losses and gradients were finite."""
    net = Net()

    def augment(*batch):
        net.state_dict()[broken].fill_(math.inf)
        return plain(*batch)

    class Blind(Criterion):
        def __call__(self, output, labels):
            return Losses(*[torch.zeros((), requires_grad=True)] * len(Losses._fields))

    with pytest.raises(Diverged, match="is not finite from step 3 on"):
        train_epoch(TrainStep(net, Blind(), augment, CPU), torch.optim.Adam(net.parameters()), batches(3))


def test_the_bar_counts_the_steps_of_the_whole_run(monkeypatch):
    """Also in an epoch that is resumed."""
    bars, step = [], TrainStep(Net(), Criterion(), plain, CPU)
    monkeypatch.setattr(
        training.engine, "progress", lambda loader, **bar: bars.append(tqdm(loader, disable=True, **bar)) or bars[0]
    )
    meter = EpochMeter.from_checkpoint({"step": 4}, CPU)
    train_epoch(step, torch.optim.Adam(step.net.parameters()), batches(6), meter=meter, run_steps=(20, 50))
    assert (bars[0].n, bars[0].total) == (24, 50)


def test_an_epoch_goes_on_from_any_checkpoint_of_its_meter():
    loader, net, criterion, meter = batches(25), Net(), Criterion(), EpochMeter(CPU)
    optimizer, saver = torch.optim.Adam(net.parameters(), lr=0), Saver(meter, 3, 10, 17, 25)
    step = TrainStep(net, criterion, plain, CPU)
    whole = train_epoch(step, optimizer, loader, meter=meter, saver=saver).summary()
    assert criterion.read == [1, 10, 20]
    assert whole["total"] == pytest.approx(31 / 3)  # of the readings, whose names are those of the losses here
    assert whole["images_per_second"] == pytest.approx(25 * 8 / meter.seconds, abs=0.06)
    for state in saver.saved:
        assert list(state) == list(EpochSums.__annotations__)
        older = {name: value for name, value in state.items() if name != "first_bad"} | {"skipped": torch.zeros(())}
        resumed, rest = EpochMeter.from_checkpoint(older, CPU), Criterion()
        rest.step = state["step"]
        loader.sampler.set_epoch(0, state["step"])
        train_epoch(TrainStep(net, rest, plain, CPU), optimizer, loader, meter=resumed)
        for name, value in resumed.summary().items():
            if "second" not in name:
                assert value == pytest.approx(whole[name]), name


def test_an_epoch_is_a_plain_loop():
    net, other = Net().eval(), Net()
    optimizer, step = torch.optim.SGD(net.parameters(), lr=0), TrainStep(net, Criterion(), plain, CPU)
    train_epoch(
        step, optimizer, batches(3), schedule=lambda step: optimizer.param_groups[0].update(lr=0.1 * (step + 1))
    )
    for number, (visible, infrared, _) in enumerate(batches(3), 1):
        gradients = torch.autograd.grad(other(visible / 255, infrared / 255).mean(), other.parameters())
        for parameter, gradient in zip(other.parameters(), gradients, strict=True):
            parameter.data -= 0.1 * number * gradient
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_saving_is_no_training_time(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: next(now))
    meter, net = EpochMeter(CPU), Net()
    saver = Saver(meter, 2, 3)
    monkeypatch.setattr(saver, "save", lambda meter: [next(now) for _ in range(50)])
    optimizer, step = torch.optim.Adam(net.parameters()), TrainStep(net, Criterion(), plain, CPU)
    train_epoch(step, optimizer, batches(4), meter=meter, saver=saver)
    assert meter.seconds == 3  # of the clock that ticks each time it is read: from the start to a save, to the next ...


def test_values_of_a_checkpoint_with_fewer_are_not_mixed_with_today_s():
    old = {"health_names": ["a"], "health": torch.tensor([5.0]), "readings": 2, "step": 3}
    old |= {"names": ["total", "b"], "losses": torch.tensor([6.0, 9.0]), "seconds": 1.0, "images": 8}
    meter = EpochMeter.from_checkpoint(old, CPU)
    assert meter.means() == {"total": 2, "b": 3}  # all that it was, if no step follows
    before = EpochMeter.from_checkpoint({name: old[name] for name in ("names", "losses", "step", "images")}, CPU)
    assert before.summary()["b"] == 3
    assert list(before.summary()) == ["total", "b", "seconds", "images_per_second"]  # before there was any health
    assert vars(EpochMeter.from_checkpoint({"step": 0}, CPU)) == vars(EpochMeter(CPU))
    meter.read(Health(*torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert (meter.health_names, meter.readings, meter.health.tolist()) == ([*Health._fields], 1, [1.0, 2.0, 3.0, 4.0])
    for value in (1.0, 3.0):
        meter.add(Losses(*torch.full((len(Losses._fields),), value)), [torch.ones(1)])
    assert meter.means() == dict.fromkeys(Losses._fields, 2)
    assert EpochMeter.from_checkpoint(meter.to_checkpoint(), CPU).means() == meter.means()


def test_health_by_hand():
    """Four people on a line, at 0 and 2, at 3 and 3.0005, at 50 and 50.4, and (alone) at 50."""
    places = torch.tensor([0.0, 2.0, 3.0, 3.0005, 50.0, 50.4, 50.0])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    features = torch.stack([places, torch.zeros(7)], dim=1)
    health = MethodLoss("base").health(Output(features, None, None), labels)
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = [abs(places[i] - places[j]).item() for i, j in pairs if labels[i] == labels[j]]
    across = [abs(places[i] - places[j]).item() for i, j in pairs if labels[i] != labels[j]]
    assert health.distance_within.item() == pytest.approx(np.mean(within), rel=1e-4)
    assert health.distance_across.item() == pytest.approx(np.mean(across), rel=1e-4)
    assert health.at_ln2.item() == health.beyond_clamp.item() == 0  # a squared difference's only
    # Both images at 50, and the one at 50.4, have d+ and d- below 0.25; the others differ by 0.99 or more.
    for more, share in (({}, 3 / 7), ({"square": 0}, 0), ({"weighting": "exact"}, 3 / 7), ({"weighting": "stable"}, 0)):
        health = MethodLoss("caj", **more).health(Output(features, None, None), labels)
        assert health.at_ln2.item() == pytest.approx(share)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_beyond_the_clamp_the_published_loss_has_no_gradient(gamma):
    torch.manual_seed(0)
    features = (4 * torch.randn(24, 8)).requires_grad_()
    labels = torch.arange(24) // 4
    triplet = SquaredTripletLoss(gamma=gamma, weighting="published")
    beyond, _ = triplet.without_gradient(features, labels)
    assert 0 < beyond.sum() < 24
    for anchor, gap in enumerate(torch.sub(*_weighted_triplet(features, labels, 1.0, "published"))):
        (slope,) = torch.autograd.grad((gamma * gap**2).clamp_max(44), features, retain_graph=True)
        assert beyond[anchor] == bool((gap > 0) & (slope == 0).all())
    output = Output(features, None, None)
    assert MethodLoss("caj", gamma=gamma, weighting="published").health(output, labels).beyond_clamp == pytest.approx(
        beyond.float().mean().item()
    )
    assert MethodLoss("caj", gamma=gamma, square=0, weighting="published").health(output, labels).beyond_clamp == 0


@pytest.fixture(scope="module")
def far_apart(tmp_path_factory):
    """Weights of a ResNet-18 whose features lie at distances far above 20."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    for name in ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"):
        state[f"{name}.weight"] *= 4
    file = tmp_path_factory.mktemp("weights") / "far_apart.pth"
    torch.save(state, file)
    return file


@pytest.mark.slow
def test_the_clamp_is_told(far_apart, sysu_tree, tmp_path, capsys):
    more = ["--weights", str(far_apart), "--stages", "4", "--square", "1", "--epochs", "1"]
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    (entry,) = log_entries(result["log"])
    assert entry["distance_across"] > 20
    assert entry["beyond_clamp"] > 0.95
    assert entry["triplet"] == pytest.approx(44, abs=0.5)
    assert "of the anchors are beyond the triplet's clamp and get no gradient" in capsys.readouterr().out


def test_accuracy_is_the_share_of_images_whose_identity_has_the_largest_logit():
    labels = torch.tensor([0, 1, 2, 2])
    logits = torch.eye(3)[[0, 2, 2, 1]] - 5.0
    output = Output(torch.randn(4, 8), logits, None)
    assert MethodLoss("base")(output, labels).accuracy == 0.5
    assert MethodLoss("base")(output._replace(pooled=torch.ones(4, 8)), labels).correct == 1
    three_embeddings = Output(torch.randn(12, 8), torch.cat([logits, logits, torch.eye(3)[labels]]), None)
    assert MethodLoss("base")(three_embeddings, labels).accuracy == pytest.approx(8 / 12)


@pytest.mark.parametrize("method", ["base", "adp", "gfm2", "deen", "rle", "quad"])
def test_a_further_term_of_any_method_sees_pairs_of_the_first_views(method, monkeypatch):
    """Whatever the number of views and of embeddings; its weighted value is part of the total."""
    seen = []
    term = lambda batch: seen.append(batch) or batch.embeddings.sum()  # noqa: E731
    spec = METHODS[method]
    monkeypatch.setitem(METHODS, "more", spec._replace(terms=spec.terms | {"sum": (0.25, term)}))
    labels = torch.tensor([0, 0, 1, 1])
    images = torch.randint(256, (2, 4, 3, 64, 16), dtype=torch.uint8)
    net = GFMNet(2, "resnet18", share_net=1, **spec.network)
    visible, infrared, all_labels = TrainAugmentation(rande=0, name=spec.augmentation)(*images, labels)
    output = net(visible, infrared)
    with_term, without = MethodLoss("more")(output, all_labels), MethodLoss(method)(output, all_labels)
    rows = output.pooled.view(-1, len(all_labels), output.pooled.shape[1])  # of each embedding, of all views
    pairs = len(infrared)
    expected = torch.stack([rows[:, :pairs], rows[:, -pairs:]]).permute(2, 1, 0, 3)
    torch.testing.assert_close(seen[0].embeddings, expected, rtol=0, atol=0)
    assert seen[0].identities.tolist() == all_labels[-pairs:].tolist()
    assert with_term.sum.item() == pytest.approx(0.25 * expected.sum().item(), rel=1e-5)
    assert with_term.total.item() == pytest.approx(without.total.item() + with_term.sum.item(), rel=1e-5)


STUCK = {"at_ln2": 0.6}
CLAMPED = {"beyond_clamp": 0.6}
FALLEN = {"accuracy": 0.71}


@pytest.mark.parametrize(
    ("change", "before", "flags", "words"),
    [
        (STUCK, {}, "--square 1", "60% of the anchors are at ln 2.*: start anew with --square 0$"),
        (STUCK, {"at_ln2": 0.5}, "", "60% of the anchors are at ln 2"),
        (STUCK, {"at_ln2": 0.51}, "", None),
        (CLAMPED, {}, "--weighting published --square 1", "60% of the anchors are beyond the.*clamp.*--square 0"),
        (CLAMPED, CLAMPED, "--weighting published --square 1", None),
        (CLAMPED, {}, "--weighting exact", None),
        ({"at_ln2": 0.5, "beyond_clamp": 0.5}, {}, "--weighting published", None),
        (FALLEN, {"accuracy": 0.9}, "", "the classifier finds 71.0% of the images, after 90.0% in the epoch before"),
        (FALLEN, {"accuracy": 0.9}, "", ".*the run is collapsing; start anew with --weighting stable$"),
        (FALLEN, {"accuracy": 0.9}, "--method agw --square 1", ".*start anew with --weighting stable$"),
        (FALLEN, {"accuracy": 0.9}, "--method gfm2", ".*the run is collapsing; lower --lr$"),
        (FALLEN, {"accuracy": 0.88}, "", None),
        ({"epoch": 3, "triplet": 2.1}, {"triplet": 9.0}, "", "the triplet loss is 2.1; after 300 steps, a run that"),
        ({"epoch": 3, "triplet": 1.9}, {"triplet": 9.0}, "", None),
        ({"epoch": 3, "triplet": 2.1}, {}, "--method base", None),
        ({"triplet": 9.0}, {}, "", None),  # the epoch begins after 100 steps
        ({"epoch": 4, "triplet": 9.0, "FC/Rank-1": 3.0}, {"triplet": 9.0}, "", None),  # was said in epoch 3
        ({"epoch": 1}, {}, "", None),
        ({"epoch": 2}, {}, "", "no test result for epoch 2: the features are not finite in evaluation"),
        ({"epoch": 101}, {}, "--epochs 102", "no test result for epoch 101"),  # the last
        ({"epoch": 2, "FC/Rank-1": 3.0}, {}, "", None),
    ],
)
def test_warnings(change, before, flags, words):
    health = dict.fromkeys(("beyond_clamp", "at_ln2", "accuracy", "triplet"), 0.0)
    entry = health | {"epoch": 1, "distance_within": 1.0, "distance_across": 1.0} | change
    told = list(warnings(entry, before, parse(*flags.split()), steps=100))
    assert len(told) == bool(words)
    assert re.match(words or "", "".join(told))


def test_an_epoch_is_compared_with_the_one_that_was_logged_before(tmp_path, capsys):
    log, args = RunLog(tmp_path, "run"), parse()
    for epoch, accuracy in enumerate((0.2, 0.9, 0.5, 0.49)):
        entry = dict.fromkeys((*Losses._fields, *Health._fields, "lr", "images_per_second"), 0.0)
        entry |= {"epoch": epoch, "accuracy": accuracy, "FC/Rank-1": 1.0, "FC/mAP": 1.0, "FC/mINP": 1.0}
        log_epoch(log, f"epoch {epoch}", entry, args, steps=300)
        log.epoch(entry)
    log.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch", "warning"))]
    assert [line.split()[0] for line in lines] == ["epoch", "epoch", "epoch", "warning:", "epoch"]
    zeros = "  ".join(f"{name} 0.000" for name in ("total", "identity", "triplet", "local", "correct"))
    scores = "  ".join(f"{name} 1.00" for name in ("Rank-1", "mAP", "mINP"))
    assert lines[1] == f"epoch 1  lr 0  {zeros}  accuracy 0.900  {scores}  0 img/s"
    assert "finds 50.0% of the images, after 90.0% in the epoch before" in lines[3]


class SmallNet(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 128, 4, stride=4)
        self.classifier = torch.nn.Linear(128, num_classes)

    def forward(self, visible, infrared):
        x = self.conv(torch.cat([visible, infrared])).relu()
        pooled = x.mean(dim=(2, 3))
        return Output(pooled, self.classifier(pooled), torch.nn.functional.normalize(x.mean(dim=3), dim=1))


@pytest.mark.slow
def test_two_thousand_steps_take_no_more_memory_than_a_hundred(sysu_tree):
    """Resident memory, open files and processes over 20 epochs of 100 steps, with loading processes."""
    data = sysu_train(sysu_tree, SIZE)
    tiny = data._replace(visible=data.visible[:, :24, :16], infrared=data.infrared[:, :24, :16])
    sampler = IdentitySampler(tiny, 4, 2, 0)
    sampler.steps = 100
    loader = train_ext_test0.train_loader(tiny, sampler, 2)
    net = SmallNet(data.num_classes)
    optimizer, augment = torch.optim.Adam(net.parameters(), fused=True), TrainAugmentation()

    def held():
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return memory, len(os.listdir("/proc/self/fd")), len(children)

    measured = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        train_epoch(TrainStep(net, MethodLoss(), augment, CPU), optimizer, loader)
        measured.append(held())
    memory, files, children = zip(*measured, strict=True)
    # In MiB. A batch has 0.02 as bytes and 0.2 as network inputs: kept, they would be 300.
    assert np.median(memory[-6:]) - np.median(memory[2:8]) < 10
    assert max(files) == files[0]
    assert max(children) == children[0]
