"""Pretrain a backbone on visible images of demo data, for `--weights FILE` where ImageNet weights are not available.

    python -m tools.pretrain --data_path people/ --img_h 64 --img_w 32 --padding 4 --triplet 34.5 --out start.pt

Pretrain on other people than those of the training: draw them with another seed (tools.demo_data --seed). `--triplet`
rescales only the last stage, so that the first batches of a training have that triplet loss (published, not squared).
The triplet losses depend on this scale. From ImageNet's weights, public logs on real images begin at 33 to 36.
"""

from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn

from ChannelAug import PADDING, TrainAugmentation, normalise, random_crop, random_flip
from core.files import atomic, check_output
from data_loader import IdentitySampler, sysu_train, train_loader
from datasets import DATASETS
from loss import SquaredTripletLoss
from model import ARCHS, GFMNet, backbone
from utils import ArgumentParser, InputError, bounded, cli, progress, seed_everything, select_device

BATCH = 64  # images per step
PEOPLE = 8  # in a batch of the published recipe
RATE = 1e-3  # learning rate of Adam


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="prepared folder in the layout of SYSU-MM01")
    parser.add_argument("--out", required=True, metavar="FILE", help="state dict of torchvision's ResNet to write")
    group = parser.add_argument_group("training")
    group.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    group.add_argument("--img_h", type=bounded(int, 48, 4096), default=288, help="image height in pixels")
    group.add_argument("--img_w", type=bounded(int, 16, 4096), default=144, help="image width in pixels")
    group.add_argument("--steps", type=bounded(int, 1), default=220, help="training steps")
    text = "pixels of black around an image before a random crop; choose fewer for images smaller than 288x144"
    group.add_argument("--padding", type=bounded(int, 0, 4096), default=PADDING, help=text)
    text = "triplet loss (published, not squared) at the start of a training, after rescaling (default: no rescaling)"
    group.add_argument("--triplet", type=bounded(float, 1, 1000), help=text)
    group.add_argument("--seed", type=bounded(int, 0), default=0, help="seed of the training")
    group.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    return parser


def main(argv=None):
    """Returns the triplet loss (published, not squared) of the first batches of a training from the saved weights."""
    args = get_args_parser().parse_args(argv)
    check_output(args.out)
    DATASETS["sysu"].check_not_data(args.out, args.data_path)
    device = select_device(args.gpu)
    seed_everything(args.seed)
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    if data.num_classes < PEOPLE:
        raise InputError(f"--data_path {args.data_path}: has {data.num_classes} people; draw at least {PEOPLE}")
    resnet = pretrain(backbone(args.arch).network, data, args.steps, args.padding, device)
    with atomic(args.out) as temporary:
        save(resnet, temporary)
        batches = first_batches(temporary, args.arch, data, args.padding, device)
        factor = 1.0
        if args.triplet:
            try:
                factor = brentq(lambda scale: first_triplet(batches, scale) - args.triplet, 1e-3, 1e3, xtol=1e-4)
            except ValueError as error:  # it is beyond all scales, or not finite
                raise InputError(
                    f"--triplet {args.triplet}: no scale gives it; pass another, or leave it out"
                ) from error
            scale_last_stage(resnet, factor)
            save(resnet, temporary)
    triplet = first_triplet(batches, factor)
    print(f"{args.out}: a training begins with a triplet loss of {triplet:.1f} (published, not squared)")
    return triplet


def save(resnet, path):
    with open(path, "wb") as file:  # of a file that Python has opened, a full disk is an OSError
        torch.save(resnet.state_dict(), file)


def pretrain(resnet, data, steps, padding, device):
    """Train a ResNet of torchvision's to classify the visible images of `data` -> the network, on the CPU."""
    resnet.fc = nn.Linear(resnet.fc.in_features, data.num_classes)
    resnet.to(device).train()
    images, labels = torch.from_numpy(np.array(data.visible)).movedim(-1, 1), torch.from_numpy(data.visible_labels)
    optimizer = torch.optim.Adam(resnet.parameters(), RATE, weight_decay=5e-4)
    for _ in (bar := progress(range(steps), desc="pretraining", unit="step", leave=False)):
        rows = torch.randint(len(images), (BATCH,))
        views = normalise(random_flip(random_crop(images[rows].to(device), padding)))
        loss = F.cross_entropy(resnet(views), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return resnet.cpu()


@torch.no_grad()
def first_batches(weights, arch, data, padding, device, count=10):
    """The first batches of a training from a file of weights, by the published recipe: (pooled [N, C], labels [N])."""
    net = GFMNet(data.num_classes, arch, weights=weights).to(device).train()
    augment = TrainAugmentation(padding=padding)
    loader = train_loader(data, IdentitySampler(data, batch_size=PEOPLE, num_pos=4, seed=0), workers=0)
    batches = []
    for batch in islice(loader, count):
        visible, infrared, labels = augment(*(values.to(device) for values in batch))
        batches.append((net(visible, infrared).pooled, labels))
    return batches


def first_triplet(batches, factor):
    """Mean triplet loss (published, not squared) of pooled features that are multiplied by `factor`."""
    criterion = SquaredTripletLoss(square=0)
    return float(np.mean([criterion(factor * pooled, labels)[0].item() for pooled, labels in batches]))


def scale_last_stage(resnet, factor):
    """Multiply the output of a ResNet's last stage by `factor`, in training and evaluation, and change nothing else.

    Each block ends with batch norm, a sum and a ReLU: scaled affine parameters scale its output. The first batch norm
    of the next block removes the scale again, so only its running statistics must be scaled.
    """
    with torch.no_grad():
        for i, block in enumerate(resnet.layer4):
            norms = [m for m in block.children() if isinstance(m, nn.BatchNorm2d)]
            last = [norms[-1]] + ([block.downsample[1]] if block.downsample else [])
            for norm in last:
                norm.weight *= factor
                norm.bias *= factor
            if i > 0:
                norms[0].running_mean *= factor
                norms[0].running_var *= factor**2


if __name__ == "__main__":
    cli(main)
