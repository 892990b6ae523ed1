"""Augmentation as batched tensor functions on any device (Ye et al., "Channel Augmented Joint Learning", ICCV 2021).

Images are [N, 3, H, W]. Functions of images return new ones and leave theirs as they were; random ones draw from
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
    """Images from 0 to 255 -> float32 with ImageNet's mean and deviation taken out."""
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
    inside = _rectangles(images, probability, area, aspect, tries, logarithmic)
    return torch.where(inside, _constant(ERASE_FILL, images.device) if fill is None else fill, images)


def _rectangles(images, probability, area=ERASE_AREA, aspect=(0.3, 10 / 3), tries=20, logarithmic=False):
    """What `random_erasing` fills: bool [N, 1, H, W]."""
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
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


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


def green_or_gray(images):
    """MSCMNet's first infrared view: the second channel repeated in half of the images, else, as likely, the luminance
    or what was there. Published as ChannelAdapGray with probability 0.5, whose other channels its code leaves out."""
    case = torch.randint(4, (len(images), 1, 1, 1), device=images.device)
    return torch.where(case < 2, images[:, 1:2], torch.where(case < 3, luminance(images), images))


def random_scale(images, probability=0.5):
    """MSCMNet's second infrared view: in an image with this probability, each channel is multiplied by its own draw
    from 0.02 to 1. Published as ChannelT, for normalised images."""
    factors = 0.02 + 0.98 * torch.rand(len(images), 3, 1, 1, device=images.device)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, factors * images, images)


def random_brightness(images, change=0.5):
    """Values of 0 to 255 times a draw from 1 - change to 1 + change for each image, in whole steps; as torchvision's
    `ColorJitter(brightness=change)`."""
    factors = 1 - change + 2 * change * torch.rand(len(images), 1, 1, 1, device=images.device)
    return (factors * images).floor().clamp_max(255)


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
    """Images from 0 to 255 -> float32 ones in the same range, made gray with this probability, in whole steps."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, luminance(images).round(), images)


def random_mix(images):
    """Replace all three channels of each image by one mixture of them, with weights drawn uniformly from those that add
    up to 1."""
    draws = torch.rand(len(images), 3, 1, 1, device=images.device)
    weights = draws.clamp_min(torch.finfo(draws.dtype).tiny).log()  # once in 2^24 times, a draw is 0
    return (images * (weights / weights.sum(dim=1, keepdim=True))).sum(dim=1, keepdim=True).expand_as(images)


def moderate_rle(images, probability=0.5, beta=0.3):
    """RLE's moderate half (Tan et al., NeurIPS 2024): an image with this probability becomes one mixture of its
    channels in all three, with weights of Beta(beta, beta), divided by their sum."""
    weights = _beta(images, beta)
    mixed = (images * (weights / weights.sum(dim=1, keepdim=True))).sum(dim=1, keepdim=True)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, mixed, images)


def radical_rle(images, probability=0.5, beta=0.4, least=0.1, rectangles=12):
    """RLE's radical half: in an image with this probability, each channel of a random rectangle is multiplied by its
    own factor, a draw of Beta(beta, beta) over the largest value in it; and so on with other rectangles, until some
    value has been multiplied by less than `least` in all.

    Values are 0 to 255. A black rectangle stays black; the published code makes it NaN. Published: up to 100
    rectangles; fewer than 1 image in 10,000, bright or dark, needs more than 12.
    """
    active = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    total = torch.ones_like(images)
    for _ in range(rectangles):
        inside = _rectangles(images, 1.0) & active
        largest = images.masked_fill(~inside, 0).amax(dim=(2, 3), keepdim=True).clamp_min(1e-2)
        factors = torch.where(inside, _beta(images, beta) * 255 / largest, 1)
        images, total = images * factors, total * factors
        active = active & (total.amin(dim=(1, 2, 3), keepdim=True) >= least)
    return images


def _beta(images, beta):
    """Draws of Beta(beta, beta) for each channel: [N, 3, 1, 1]."""
    parameter = torch.full((len(images), 3, 1, 1), beta, device=images.device)
    return torch.distributions.Beta(parameter, parameter, validate_args=False).sample()


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


# ----------------------------------------------------------------------------------------- from batches to views
# A step is a function of the images of a batch, float32 [N, 3, H, W] from 0 to 255 or normalised: first the visible
# views, then the infrared ones. It also gets the `TrainAugmentation`, whose flags it obeys, and how many images a view
# has.


def colour(function, part="all"):
    """A step that `--augc 0` leaves out: other colours in "all" images, in the "visible" or "infrared" ones, or in one
    view of theirs, such as the "second visible"."""

    def rows(views, count):
        view, _, modality = part.rpartition(" ")
        first, number = (0, views[0]) if modality == "visible" else (views[0], views[1])
        if view:
            first, number = first + ("first", "second").index(view), 1
        return slice(first * count, (first + number) * count)

    def step(images, flags, count):
        if not flags.augc:
            return images
        if part == "all":
            return function(images)
        some = images[rows(flags.views, count)]
        some.copy_(function(some))  # in place: joined anew, the views would lose their memory order
        return images

    return step


def erase(fill, area=None, **rectangles):
    """A step: `random_erasing` with the probability of `--rande`, of a share `area` of an image (`--erase_area`)."""

    def step(images, flags, _):
        return random_erasing(images, flags.rande, _constant(fill, images.device), area or flags.area, **rectangles)

    return step


def erase_as_published(images, flags, count):
    """Of normalised images. The plain views get the fill that they would have if they were normalised after it."""
    fill = _constant(ERASE_FILL, images.device).repeat(len(images), 1, 1, 1)
    fill[:count] = normalise(fill[:count] * 255)
    return random_erasing(images, flags.rande, fill, flags.area)


def to_input(images, *_):
    return normalise(images)


_FILL = [255 * value for value in ERASE_FILL]
_EARLY = erase(_FILL, (0.02, 0.33), aspect=(0.3, 3.3), tries=10, logarithmic=True)
_LATE = erase(ERASE_FILL)
_EXCHANGE = colour(partial(random_exchange, gray=False), "visible")
_RLE = [colour(moderate_rle), colour(radical_rle), erase(_FILL)]
# name: (views of each visible and of each infrared image, steps after `random_crop` and `random_flip`)
AUGMENTATIONS = {
    # Of AGW, CAJ and GFMNet: a plain view, and a second one with exchanged channels.
    "exchange": (
        (2, 1),
        [to_input, erase_as_published, colour(channel_exchange, "second visible"), colour(channel_or_gray, "infrared")],
    ),
    # DEEN (Zhang and Wang, CVPR 2023). As in its code, ImageNet's mean fills images that are normalised already.
    "gray": ((1, 1), [colour(random_gray), to_input, erase(MEAN)]),
    # DNS (Jiang et al., ECCV 2024). The first erasing is torchvision's.
    "shift": ((1, 1), [colour(random_hue, "infrared"), _EARLY, to_input, _LATE, colour(random_exchange, "visible")]),
    "shift_regdb": ((1, 1), [_EARLY, to_input, _EXCHANGE]),
    "shift_llcm": ((1, 1), [colour(random_hue, "infrared"), to_input, _LATE, _EXCHANGE]),
    # RLE (Tan et al., NeurIPS 2024), which fills images before they are normalised.
    "rle": ((1, 1), [*_RLE, to_input]),
    "rle_gray": ((1, 1), [colour(random_gray), *_RLE, to_input]),
    # MSCMNet (Hua et al., Pattern Recognition 2025): two views of each image, erased after they are normalised.
    "mscmnet": (
        (2, 2),
        [
            *(colour(random_gray, "first visible"), colour(random_brightness, "second infrared"), to_input, _LATE),
            *(colour(channel_exchange, "second visible"), colour(green_or_gray, "first infrared")),
            colour(random_scale, "second infrared"),
        ],
    ),
    # gfm2: only shape and texture tell people apart.
    "curve": ((1, 1), [colour(random_mix, "visible"), colour(random_curve), to_input, _LATE]),
}


class TrainAugmentation:
    """One of AUGMENTATIONS with the flags `--augc`, `--rande`, `--padding`, `--erase_area`: uint8 batches -> the
    network's float32 inputs, and labels.

    __call__(visible [A, 3, H, W], infrared [A, 3, H, W], labels [A]) -> (visible [V A, 3, H, W], infrared
    [I A, 3, H, W], labels [(V + I) A]): V views of the visible images, one after the other, and I of the infrared ones.
    Image i of either modality shows identity labels[i].
    augc: 0 leaves the colours alone. rande: probability of random erasing. padding: see `random_crop`. area: see
    `random_erasing`. All views are cropped, mirrored and erased independently.
    """

    def __init__(self, augc=1, rande=0.5, padding=PADDING, area=ERASE_AREA, name="exchange"):
        self.augc, self.rande, self.padding, self.area = augc, rande, padding, area
        self.views, self.steps = AUGMENTATIONS[name]

    def __call__(self, visible, infrared, labels):
        first, second = self.views
        images = random_flip(random_crop(torch.cat([visible] * first + [infrared] * second), self.padding)).float()
        for step in self.steps:
            images = step(images, self, len(infrared))
        visible, infrared = images.tensor_split([first * len(visible)])
        return visible, infrared, labels.repeat(first + second)
