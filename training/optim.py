"""The optimiser: which parts of the network learn at which rate, and how the rate changes."""

import numpy as np
import torch

from utils import InputError


def build_optimizer(net, optim, lr, rates=()):
    """Bottleneck and classifier learn at the full rate, the parts in `rates` at their share of it, everything else at a
    tenth. The groups have their share as `lr_scale` and stand in rising order of it."""
    rates = {"bottleneck": 1.0, "classifier": 1.0} | dict(rates)
    names, scaled = [name for name, _ in net.named_parameters()], {}
    for part in rates:
        if not any(name.startswith(f"{part}.") for name in names):
            raise InputError(
                f"{part}: has a rate of its own, but is not in this network; reduce --share_net, or use --stages 4"
            )
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            scale = next((rate for part, rate in rates.items() if name.startswith(f"{part}.")), 0.1)
            scaled.setdefault(scale, []).append(parameter)
    groups = [{"params": scaled[scale], "lr_scale": scale} for scale in sorted(scaled)]
    if optim == "adam":
        return torch.optim.Adam(groups, lr, weight_decay=5e-4, fused=True)
    return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def load_moments(optimizer, saved):
    """Give an optimiser the moments in a state dict of another one of its kind; rates and the like follow from the
    flags. Raises an exception of some kind for moments that do not belong to its parameters."""
    if any(value.is_complex() for moments in saved["state"].values() for value in moments.values()):
        raise ValueError("complex moments, of which PyTorch would take the real part")
    optimizer.load_state_dict(optimizer.state_dict() | saved)
    adam = isinstance(optimizer, torch.optim.Adam)
    wanted = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape != (() if name == "step" else parameter.shape) or value.layout != torch.strided:
                raise ValueError(f"{name} has the shape {list(value.shape)}")
            moments[name] = value.clone()  # so that all its values have places of their own
        if moments.keys() != wanted:
            raise ValueError(f"moments {', '.join(moments)}")


def set_rates(optimizer, args, epoch, steps, step):
    """Set the learning rates of a step of an epoch -> that of the head."""
    if args.schedule == "triangle":
        lr = triangle_rate(epoch, step, steps, args.lr, args.warmup, args.epochs)
    else:
        lr = learning_rate(epoch, args.lr, args.warmup, args.milestones)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def triangle_rate(epoch, step, steps, lr, warmup, epochs):
    """Linear from lr / 10000 to `lr` over the first `warmup` epochs, then to 0 at the last one's end, step by step.

    As published, the rates lag by one step: a step has the rate due at the one before, and step 0 that of the last but
    one.
    """
    start, end = np.interp([epoch, epoch + 1], [0, min(warmup, epochs), epochs], [1e-4 * lr, lr, 0.0])
    counted = max(steps - 1, 1)
    return float(start + (end - start) * ((step - 1) % counted) / counted)


def learning_rate(epoch, lr, warmup, milestones):
    """Linear warm-up to `lr` over the first `warmup` epochs, then a tenth of the rate from each milestone on."""
    if epoch < warmup:
        return lr * (epoch + 1) / warmup
    return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
