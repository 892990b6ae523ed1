"""Augmentation as batched tensor functions on any device (Ye et al., "Channel Augmented Joint Learning", ICCV 2021).

Images are [N, 3, H, W]. Every function returns new images and leaves its input as it was; random ones draw from
PyTorch's global generator of the images' device, independently for each image.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

MEAN = (0.485, 0.456, 0.406)  # ImageNet, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
ERASE_FILL = (0.4914, 0.4822, 0.4465)
ERASE_AREA = (0.02, 0.4)  # bounds of the erased share of an image
GRAY = (0.2989, 0.5870, 0.1140)  # luminance weights of R, G, B
PADDING = 10  # pixels of black around an image before it is cropped


def normalise(images):
    """uint8 images -> float32 with ImageNet's mean and deviation taken out."""
    return (images - _constant(MEAN, images.device) * 255) / (_constant(STD, images.device) * 255)


def without_colour(images):
    """Normalised images -> normalised images of their luminance."""
    mean, std = _constant(MEAN, images.device), _constant(STD, images.device)
    return (luminance(images * std + mean) - mean) / std


def _constant(values, device):
    """[3, 1, 1], filled in on the device, as a copy from the CPU would wait for it. Not cached: a tensor made while
    torch.export traces would be a fake one."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


def random_crop(images, padding=PADDING):
    """Pad with zeros on all sides and cut the image's size back out at a random place."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top = torch.randint(2 * padding + 1, (n, 1), device=images.device)
    left = torch.randint(2 * padding + 1, (n, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    sample = torch.arange(n, device=images.device)
    # Indexing with the channel last gives [N, H, W, 3]: the memory order that convolutions like best.
    return padded.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images):
    """Mirror every image left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def random_erasing(
    images, probability=0.5, fill=None, area=ERASE_AREA, aspect=(0.3, 10 / 3), tries=20, logarithmic=False
):
    """Fill a random rectangle (Zhong et al., AAAI 2020), in an image with the given probability.

    fill: a tensor that broadcasts to the images, [3, 1, 1] or [N, 3, 1, 1]; by default ERASE_FILL.
    area: bounds of the rectangle's share of the image; aspect: bounds of height / width; both drawn uniformly
    (logarithmic: the logarithm of the aspect is), again until the rectangle fits into the image (published: 100 times;
    `tries` draws at once, the first that fits counts).
    """
    n, _, height, width = images.shape

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, device=images.device)

    size = uniform(*area, n, tries) * height * width
    low, high = (math.log(bound) for bound in aspect)
    ratio = uniform(low, high, n, tries).exp() if logarithmic else uniform(*aspect, n, tries)
    h, w = (size * ratio).sqrt().round(), (size / ratio).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    erase = fits.any(dim=1) & (torch.rand(n, device=images.device) < probability)
    h, w = h.gather(1, first), w.gather(1, first)
    top = (uniform(0, 1, n, 1) * (height - h + 1)).floor()
    left = (uniform(0, 1, n, 1) * (width - w + 1)).floor()
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    in_rows = (row >= top) & (row < top + h) & erase[:, None]
    in_columns = (column >= left) & (column < left + w)
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    return torch.where(inside, _constant(ERASE_FILL, images.device) if fill is None else fill, images)


def channel_exchange(images):
    """Repeat one channel of each image, drawn at random, in all three."""
    return _repeat_channel(images, torch.randint(3, (len(images),), device=images.device))


def channel_or_gray(images):
    """Infrared view: each channel repeated in 1/4 of the images; of the last 1/4, half is gray and half unchanged.

    Published as ChannelAdapGray with probability 0.5.
    """
    draw = torch.rand(len(images), device=images.device) * 8
    repeated = _repeat_channel(images, (draw / 2).long().clamp_max(2))
    case = draw[:, None, None, None]
    return torch.where(case < 6, repeated, torch.where(case < 7, luminance(images), images))


def random_exchange(images, probability=2 / 3, gray=True):
    """DNS's visible view: with this probability, all three channels become one of them or, with `gray`, possibly the
    luminance; all choices are equally likely."""
    draw = torch.randint(3 + gray, (len(images), 1, 1, 1), device=images.device)
    repeated = _repeat_channel(images, draw.flatten().clamp_max(2))
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, torch.where(draw < 3, repeated, luminance(images)), images)


def random_hue(images, shift=0.5):
    """Turn the hue of each image by its own share of the circle, up to `shift` in either direction: [N, 3, H, W]."""
    value, channel = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    red, green, blue = images.unbind(dim=1)
    sixths = torch.stack([green - blue, blue - red, red - green]) / chroma.clamp_min(1e-12)
    hue = sixths.gather(0, channel[None])[0] + 2 * channel  # in sixths of the circle
    hue = hue + 6 * shift * (2 * torch.rand(len(images), 1, 1, device=images.device) - 1)
    k = (_constant((5.0, 3.0, 1.0), images.device) + hue[:, None]).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def luminance(images):
    """Luminance [N, 1, H, W], in the range of the images."""
    return (images * _constant(GRAY, images.device)).sum(dim=1, keepdim=True)


def _repeat_channel(images, channel):
    sample = torch.arange(len(images), device=images.device)
    return images[sample, channel][:, None].expand_as(images)


def random_gray(images, probability=0.5):
    """uint8 images -> float32 ones in the same range, made gray with this probability, in whole steps."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, luminance(images).round(), images)


def random_mix(images):
    """Replace all three channels of each image by one mixture of them, with weights drawn uniformly from those that add
    up to 1."""
    draws = torch.rand(len(images), 3, 1, 1, device=images.device)
    weights = draws.clamp_min(torch.finfo(draws.dtype).tiny).log()  # once in 2^24 times, a draw is 0
    return (images * (weights / weights.sum(dim=1, keepdim=True))).sum(dim=1, keepdim=True).expand_as(images)


def random_curve(images, probability=0.7, pieces=4):
    """Send the values, 0 to 255, of an image with this probability through a random curve: its values at the ends of
    `pieces` equal parts of the range are drawn uniformly, and it is linear between them. Dark may become bright."""
    heights = 255 * torch.rand(len(images), pieces + 1, device=images.device)
    place = images.flatten(1) * (pieces / 255)
    piece = place.long().clamp_max(pieces - 1)
    low, high = heights.gather(1, piece), heights.gather(1, piece + 1)
    curved = (low + (high - low) * (place - piece)).view_as(images)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, curved, images)


class TrainAugmentation:
    """GFMNet's recipe of `--augc`, `--rande`, `--padding`, `--erase_area`: uint8 batches -> the network's float32
    inputs, and labels.

    __call__(visible [A, 3, H, W], infrared [A, 3, H, W], labels [A]) -> (visible [2A, 3, H, W], infrared [A, 3, H, W],
    labels [3A]): the plain visible views, second views of the same images, which are channel-exchanged with `augc`,
    and the infrared views. Image i of either modality shows identity labels[i].
    rande: probability of random erasing. padding: see `random_crop`. area: see `random_erasing`. All views are cropped,
    mirrored and erased independently. As published, the plain views are erased before they are normalised, the others
    after it.
    """

    def __init__(self, augc=1, rande=0.5, padding=PADDING, area=ERASE_AREA):
        self.augc, self.rande, self.padding, self.area = augc, rande, padding, area

    def __call__(self, visible, infrared, labels):
        views = normalise(random_flip(random_crop(torch.cat([visible, visible, infrared]), self.padding)))
        count = len(visible)
        fill = _constant(ERASE_FILL, views.device).repeat(len(views), 1, 1, 1)
        fill[:count] = normalise(fill[:count] * 255)  # the same as to erase the plain views before they are normalised
        views = random_erasing(views, self.rande, fill, self.area)
        if self.augc:  # in place: joined anew, the views would lose their memory order
            views[count : 2 * count] = channel_exchange(views[count : 2 * count])
            views[2 * count :] = channel_or_gray(views[2 * count :])
        return views[: 2 * count], views[2 * count :], labels.repeat(3)


class GrayAugmentation(TrainAugmentation):
    """DEEN's recipe (Zhang and Wang, CVPR 2023), of the same flags: as `TrainAugmentation`, but with one visible view,
    and labels [2A].

    With `augc`, half of the images of both modalities are made gray. They are erased after they are normalised, with
    ImageNet's mean as it stands, as published.
    """

    def __call__(self, visible, infrared, labels):
        views = random_flip(random_crop(torch.cat([visible, infrared]), self.padding))
        views = normalise(random_gray(views) if self.augc else views)
        views = random_erasing(views, self.rande, _constant(MEAN, views.device), self.area)
        return *views.split(len(visible)), labels.repeat(2)


class ShiftAugmentation(TrainAugmentation):
    """DNS's recipe (Jiang et al., ECCV 2024), of the same flags: one visible view, and labels [2A].

    With `augc`, see `random_exchange` for the visible images, with `gray` or without, and `random_hue` for the infrared
    ones, with `hue`. early: images are erased before they are normalised, as torchvision does it; late: after it, with
    `area`; both with the probability `rande`.
    """

    EARLY = {"area": (0.02, 0.33), "aspect": (0.3, 3.3), "tries": 10, "logarithmic": True}

    def __init__(self, augc=1, rande=0.5, padding=PADDING, area=ERASE_AREA, hue=True, early=True, late=True, gray=True):
        super().__init__(augc, rande, padding, area)
        self.hue, self.early, self.late, self.gray = hue, early, late, gray

    def __call__(self, visible, infrared, labels):
        views = random_flip(random_crop(torch.cat([visible, infrared]), self.padding)).float()
        count = len(visible)
        if self.augc and self.hue:
            views[count:] = random_hue(views[count:])
        if self.early:
            views = random_erasing(views, self.rande, 255 * _constant(ERASE_FILL, views.device), **self.EARLY)
        views = normalise(views)
        if self.late:
            views = random_erasing(views, self.rande, area=self.area)
        if self.augc:
            views[:count] = random_exchange(views[:count], gray=self.gray)
        return views[:count], views[count:], labels.repeat(2)


class CurveAugmentation(TrainAugmentation):
    """The recipe of gfm2, of the same flags: one visible view, and labels [2A].

    With `augc`, the channels of the visible images are mixed, and the brightness of images of both modalities is
    changed by random curves, so that only shape and texture tell people apart. Images are erased after it.
    """

    def __call__(self, visible, infrared, labels):
        views, count = random_flip(random_crop(torch.cat([visible, infrared]), self.padding)).float(), len(visible)
        if self.augc:
            views[:count] = random_mix(views[:count])
            views = random_curve(views)
        views = random_erasing(normalise(views), self.rande, area=self.area)
        return *views.split(count), labels.repeat(2)


AUGMENTATIONS = {
    "curve": CurveAugmentation,
    "exchange": TrainAugmentation,
    "gray": GrayAugmentation,
    "shift": ShiftAugmentation,
    "shift_regdb": partial(ShiftAugmentation, hue=False, late=False, gray=False),
    "shift_llcm": partial(ShiftAugmentation, early=False, gray=False),
}
