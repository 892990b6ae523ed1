"""Preparing the arrays of a data set, and loading an epoch."""

import pre_process_sysu
from ChannelAug import TrainAugmentation
from data_loader import IdentitySampler, sysu_train, train_loader
from tools.benchmarks.measuring import seconds
from utils import progress


def bench_data(args, device):
    """Prepare the arrays of a data set anew; load and augment one epoch."""
    flags = ["--data_path", args.data_path, "--img_h", str(args.img_h), "--img_w", str(args.img_w)]
    spent = seconds(lambda: pre_process_sysu.main(flags))
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    images = sum(data.num_images)
    print(f"prepared {images} images in {spent:.1f} s, {images / spent:.0f} images/s")

    sampler = IdentitySampler(data, args.batch_size, args.num_pos, seed=0)
    augment = TrainAugmentation()
    loader = train_loader(data, sampler, args.workers, device, args.cache)
    next(iter(loader))  # starts the loading processes

    def load():
        for batch in progress(loader, desc="epoch", unit="step"):
            augment(*(x.to(device, non_blocking=True) for x in batch))

    epoch, inputs = seconds(load, device), len(sampler) * 3 * args.batch_size * args.num_pos
    print(f"an epoch: {len(sampler)} steps, {inputs} network inputs, {epoch:.1f} s, {inputs / epoch:.0f} a second")
    results = {"prepared_images": images, "prepare_seconds": spent, "epoch_steps": len(sampler)}
    return results | {"epoch_inputs": inputs, "epoch_seconds": epoch}
