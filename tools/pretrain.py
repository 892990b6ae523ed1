"""Pretrain a backbone on visible images of demo data, for `--weights FILE` where ImageNet weights are not available.

    python -m tools.pretrain --data_path people/ --img_h 64 --img_w 32 --distance 20 --out start.pt

Pretrain on other people than those of the training: draw them with another seed (tools.demo_data --seed). `--distance`
rescales only the last stage, so that the pooled features of two people have that mean distance. The triplet losses
depend on this scale, and ImageNet weights have their own.
"""

from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ChannelAug import normalise, random_crop, random_flip
from core.files import atomic, check_output
from data_loader import IdentitySampler, sysu_train, train_loader
from loss import MethodLoss
from model import ARCHS, GFMNet, backbone
from utils import ArgumentParser, bounded, cli, progress, seed_everything, select_device

BATCH = 64  # images per step
RATE = 1e-3  # learning rate of Adam


def get_args_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="prepared folder in the layout of SYSU-MM01")
    parser.add_argument("--out", required=True, metavar="FILE", help="state dict of torchvision's ResNet to write")
    group = parser.add_argument_group("training")
    group.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    group.add_argument("--img_h", type=bounded(int, 48, 4096), default=288, help="image height in pixels")
    group.add_argument("--img_w", type=bounded(int, 16, 4096), default=144, help="image width in pixels")
    group.add_argument("--steps", type=bounded(int, 1), default=220, help="training steps")
    text = "mean distance of the pooled features of two people after rescaling (default: no rescaling)"
    group.add_argument("--distance", type=bounded(float, 0, above=True), help=text)
    group.add_argument("--seed", type=bounded(int, 0), default=0, help="seed of the training")
    group.add_argument("--gpu", default="0", help="number of the GPU, or cpu")
    return parser


def main(argv=None):
    """Returns the mean distances of pooled features in a batch with the saved weights: (within, across) identities."""
    args = get_args_parser().parse_args(argv)
    check_output(args.out)
    device = select_device(args.gpu)
    seed_everything(args.seed)
    data = sysu_train(args.data_path, (args.img_h, args.img_w))
    resnet = pretrain(backbone(args.arch).network, data, args.steps, device)
    with atomic(args.out) as temporary:
        torch.save(resnet.state_dict(), temporary)
        within, across = pooled_distances(temporary, args.arch, data, device)
        if args.distance:
            factor = args.distance / across
            scale_last_stage(resnet, factor)
            torch.save(resnet.state_dict(), temporary)
            within, across = within * factor, across * factor
    print(f"{args.out}: pooled distances {within:.1f} within identities, {across:.1f} across")
    return within, across


def pretrain(resnet, data, steps, device):
    """Train a ResNet of torchvision's to classify the visible images of `data` -> the network, on the CPU."""
    resnet.fc = nn.Linear(resnet.fc.in_features, data.num_classes)
    resnet.to(device).train()
    images, labels = torch.from_numpy(np.array(data.visible)).movedim(-1, 1), torch.from_numpy(data.visible_labels)
    optimizer = torch.optim.Adam(resnet.parameters(), RATE, weight_decay=5e-4)
    for _ in (bar := progress(range(steps), desc="pretraining", unit="step", leave=False)):
        rows = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(resnet(augment(images[rows].to(device))), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return resnet.cpu()


def augment(images):
    return normalise(random_flip(random_crop(images)))


def pooled_distances(weights, arch, data, device, batches=10):
    """Mean distances (within, across) at the start of a training from a file of weights."""
    net = GFMNet(data.num_classes, arch, weights=weights).to(device).train()
    criterion, distances = MethodLoss(), []
    sampler = IdentitySampler(data, batch_size=8, num_pos=4, seed=0)
    with torch.no_grad():
        for visible, infrared, labels in islice(train_loader(data, sampler, workers=0), batches):
            visible = augment(torch.cat([visible, visible]).to(device))
            health = criterion.health(net(visible, augment(infrared.to(device))), labels.repeat(3).to(device))
            distances.append((health.distance_within.item(), health.distance_across.item()))
    return tuple(np.mean(distances, axis=0).tolist())


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
