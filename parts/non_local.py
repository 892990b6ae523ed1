"""Non-local blocks (Wang et al., "Non-local Neural Networks", CVPR 2018): what they share, and that of AGW."""

import torch.nn as nn


class NonLocalParts(nn.Module):
    """The convolutions of a block that adds to `channels` what it reads from `low_channels`.

    inner: channels of g, theta and phi. The closing batch norm starts at zero, so the block starts as identity.
    """

    def __init__(self, channels, low_channels, inner):
        super().__init__()
        self.g = nn.Conv2d(low_channels, inner, 1)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(low_channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)


class NonLocal(NonLocalParts):
    """Non-local block, with one inner channel as AGW has it. [B, C, H, W] -> the same shape.

    The published block forms the affinity theta_i phi_j / N of all N = H W positions and applies it to g:
    y_i = sum_j theta_i phi_j g_j / N. theta_i leaves the sum, y_i = (sum_j g_j phi_j / N) theta_i: the same value by a
    matrix of the inner channels instead of the N x N positions; with one channel, by a number.
    """

    def __init__(self, channels, inner=1):
        super().__init__(channels, channels, inner)

    def forward(self, x):
        theta, phi, g = self.theta(x), self.phi(x), self.g(x)
        if g.shape[1] == 1:
            y = theta * (phi * g).mean(dim=(2, 3), keepdim=True)
        else:
            theta, phi, g = (part.flatten(2) for part in (theta, phi, g))
            y = ((g @ phi.mT / g.shape[2]) @ theta).unflatten(2, x.shape[2:])
        return x + self.norm(self.out(y))
