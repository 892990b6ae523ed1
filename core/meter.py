"""What an epoch of training has measured so far: losses, health, speed, and the first step that is not finite."""

import math
import time
from typing import Required, TypedDict

import torch
from torch.nn.utils import get_total_norm

from core.distributed import min_over_processes, sum_over_processes
from core.formats import Count, Number
from utils import InputError, process_count


class Diverged(InputError):
    """A loss, its gradient or a weight is not finite."""


class EpochSums(TypedDict, total=False):
    """What an `EpochMeter` has measured, in a checkpoint. What older ones lack is as at the start of an epoch."""

    step: Required[Count]  # how many there were
    images: Count  # in this process
    seconds: Number  # training time
    names: list[str]  # of the losses
    losses: torch.Tensor  # their sums over `summed` steps, the later ones, if a loss was added to the code in the epoch
    summed: Count
    health_names: list[str]
    health: torch.Tensor  # their sums over `readings` steps
    readings: Count
    first_bad: torch.Tensor  # the first step that is not finite, or infinity


class EpochMeter:
    """Sums over the steps of an epoch, with the fields of `EpochSums`. They stay on the device: only reading them waits
    for it."""

    def __init__(self, device):
        self.step, self.seconds, self.images, self.readings = 0, 0.0, 0, 0
        self.names, self.summed, self.losses = [], 0, torch.zeros((), device=device)
        self.health_names, self.health = [], torch.zeros((), device=device)
        self.first_bad = torch.full((), torch.inf, device=device)

    def to_checkpoint(self):
        """The epoch so far, as `from_checkpoint` takes it; losses are means over all processes, which must all call."""
        return {name: getattr(self, name) for name in EpochSums.__annotations__} | {
            "losses": self._mean_over_processes()
        }

    @classmethod
    def from_checkpoint(cls, state, device):
        """state: `EpochSums`. Raises ValueError for sums that do not belong to their names."""
        meter = cls(device)
        meter.summed = state["step"]
        for name, value in state.items():
            setattr(meter, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        if meter.readings and not meter.health_names:
            raise ValueError(f"{meter.readings} readings of nothing")
        sums = {"losses": (meter.names, meter.losses), "health": (meter.health_names, meter.health)}
        sums["first_bad"] = [], meter.first_bad
        for part, (names, values) in sums.items():
            if values.shape != ((len(names),) if names else ()) or values.dtype != torch.float32:
                raise ValueError(f"{part}: {values.dtype} {list(values.shape)}")
        return meter

    def start_clock(self):
        self._since = time.perf_counter() - self.seconds

    def stop_clock(self):
        self.seconds = time.perf_counter() - self._since

    def add(self, losses, grads):
        """Count a step: its losses, a named tuple of scalars, and the gradients of `losses.total`."""
        self.step += 1
        if self.names != list(losses._fields):  # the first step, or a checkpoint from before one of them
            self.names, self.summed = list(losses._fields), 0
            self.losses = torch.zeros((), device=self.losses.device)
        self.summed += 1
        self.losses = self.losses + torch.stack([loss.detach() for loss in losses])
        finite = torch.isfinite(losses.total.detach()) & torch.isfinite(get_total_norm(grads))
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp_max(self.step))

    def read(self, health):
        """Count a reading of the features' health, a named tuple of scalars."""
        if self.health_names != list(health._fields):  # the first reading, or a checkpoint from before one of them
            self.health_names, self.readings = list(health._fields), 0
            self.health = torch.zeros((), device=self.losses.device)
        self.health = self.health + torch.stack(health)
        self.readings += 1

    def check(self, desc, weights=()):
        """Raise Diverged on all processes if any of them had a step that is not finite, or has such `weights`."""
        bad = self.first_bad
        if weights:
            largest = get_total_norm(weights, math.inf)
            bad = torch.where(torch.isfinite(largest), bad, bad.clamp_max(self.step))
        if (step := min_over_processes(bad.clone()).item()) <= self.step:
            raise Diverged(
                f"{desc}: the loss, its gradient or a weight is not finite from step {int(step)} on; lower --lr"
            )

    def means(self):
        """{name: mean} of this process's losses."""
        return dict(zip(self.names, (self.losses / self.summed).tolist(), strict=True))

    def summary(self):
        """The epoch's entry in the log: mean losses of all processes, which must all call; mean health; `seconds`; and
        `images_per_second`, the views that all processes trained on."""
        losses = dict(zip(self.names, (self._mean_over_processes() / self.summed).tolist(), strict=True))
        health = {}
        if self.readings:
            health = dict(zip(self.health_names, (self.health / self.readings).tolist(), strict=True))
        seconds = max(self.seconds, 1e-9)
        speed = {"seconds": round(seconds, 3), "images_per_second": round(process_count() * self.images / seconds, 1)}
        return {**losses, **health, **speed}

    def _mean_over_processes(self):
        return sum_over_processes(self.losses.clone()) / process_count()
