"""One epoch of training."""

from core.meter import EpochMeter
from utils import progress

LOG_STEPS = 10  # steps between two readings of losses and health: each waits for the device


def train_epoch(step, optimizer, loader, desc="train", meter=None, saver=None, schedule=None, run_steps=(0, None)):
    """One pass over `loader`, or the rest of it -> `EpochMeter` of the whole epoch.

    step: a `step.TrainStep`, whose criterion.health(output, labels) -> a named tuple of scalars. meter: of the steps
    before `loader`'s first batch. saver: after each step, saver.due() says whether to call saver.save(meter).
    schedule(step) sets the learning rates before each step, counted from 0 in the epoch. run_steps: of the whole run,
    those before the epoch and all, for the bar.

    Raises Diverged when a loss or gradient is not finite. That is read every few steps, as it waits for the device, so
    that some more steps may follow; but a network with a weight that is not finite is never saved or returned.
    """
    net, device = step.net, step.device
    net.train()
    meter = meter or EpochMeter(device)
    meter.start_clock()
    before, total = run_steps
    with progress(loader, desc=desc, unit="step", leave=False, initial=before + meter.step, total=total) as bar:
        for batch in bar:
            if schedule is not None:
                schedule(meter.step)
            losses, output, labels = step(*(t.to(device, non_blocking=True) for t in batch))
            meter.add(losses, [p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
            meter.images += len(labels)
            if meter.step % LOG_STEPS == 0 or meter.step == 1:
                meter.read(step.criterion.health(output, labels))
                bar.set_postfix({name: f"{value:.3f}" for name, value in meter.means().items()})
                meter.check(desc)
            if saver is not None and saver.due():
                meter.stop_clock()  # saving is not training
                meter.check(desc, _weights(net))
                saver.save(meter)
                meter.start_clock()
    meter.stop_clock()
    meter.check(desc, _weights(net))
    return meter


def _weights(net):
    return [value for value in net.state_dict().values() if value.is_floating_point()]
