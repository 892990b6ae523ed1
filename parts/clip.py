"""The ResNets of CLIP's visual tower (Radford et al., ICML 2021), without its attention pooling."""

from collections import OrderedDict

import torch.nn as nn
import torch.nn.functional as F


class PooledConv2d(nn.Conv2d):
    """A 1x1 convolution of the means of squares as wide as its stride. An odd last row or column counts by itself, so
    that maps have the sizes that strides give; CLIP's own are even."""

    def forward(self, x):
        return F.conv2d(F.avg_pool2d(x, self.stride, ceil_mode=True), self.weight)


def clip_resnet(network):
    """torchvision's ResNet-50 or 101 -> the same as CLIP has it, under CLIP's names: a stem of three convolutions, and
    means before convolutions instead of strides. The last stage, whose stride GFMNet takes out, keeps torchvision's."""
    for stage in (network.layer2, network.layer3):
        block = stage[0]
        block.conv2.stride = (1, 1)
        block.conv3, block.downsample[0] = _pooled(block.conv3), _pooled(block.downsample[0])
    stem = OrderedDict()
    for i, (channels, width, stride) in enumerate(((3, 32, 2), (32, 32, 1), (32, 64, 1)), 1):
        stem[f"conv{i}"] = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        stem[f"bn{i}"] = nn.BatchNorm2d(width)
        stem[f"relu{i}"] = nn.ReLU(inplace=True)
    stem["avgpool"] = nn.AvgPool2d(2, ceil_mode=True)
    stages = [(f"layer{i}", getattr(network, f"layer{i}")) for i in range(1, 5)]
    end = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", network.fc)]
    return nn.Sequential(OrderedDict([*stem.items(), *stages, *end]))


def _pooled(convolution):
    return PooledConv2d(convolution.in_channels, convolution.out_channels, 1, stride=2, bias=False)
