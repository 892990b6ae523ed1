"""Bad images: the protocol of CIL (Chen et al., NeurIPS 2021, data sets and benchmarks; Zoky-2020/CIL-CrossModal).

Ten times, each visible test image is corrupted by a kind and a level that are drawn for it; infrared images stay as
they are. 19 kinds are those of the package imagecorruptions, rain is CIL's own. They need
tools/corruption_requirements.txt.
"""

import os
import zlib
from inspect import signature

import numpy as np
from PIL import Image

from datasets import DATASETS, Images
from eval_metrics import CosineDistances, match_ranks

KINDS = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "glass_blur", "motion_blur")
KINDS += ("zoom_blur", "gaussian_blur", "snow", "frost", "fog", "rain", "spatter", "brightness", "contrast", "saturate")
KINDS += ("elastic_transform", "pixelate", "jpeg_compression")
LEVELS = range(1, 6)
REPETITIONS = 10
# Of rain, by level: pixels of the image to a drop, length of a drop in pixels. The blur is 2 + level wide, and the
# image darker by 0.05 + 0.05 level of the full range.
RAIN = {1: (770, 10), 2: (600, 30), 3: (600, 30), 4: (500, 60), 5: (500, 60)}


def draw(path, data_path, repetition):
    """The kind and the level of a visible image, and NumPy's old generator, whose draws never change, behind them.

    They depend on the path below the data set's folder and on the repetition only.
    """
    name = os.path.relpath(path, data_path).replace(os.sep, "/")
    random = np.random.RandomState([repetition, zlib.crc32(os.fsencode(name))])
    return KINDS[random.randint(len(KINDS))], int(random.choice(LEVELS)), random


def corrupt(image, path, data_path, repetition):
    """uint8 [H, W, 3] -> the same image, corrupted as `draw` says."""
    kind, level, random = draw(path, data_path, repetition)
    return apply(kind, image, level, random)


def prepare():
    """Compile, before loading processes are forked, what each of them would compile for itself, for seconds."""
    apply("glass_blur", np.zeros((32, 32, 3), np.uint8), 1, np.random.RandomState(0))


def apply(kind, image, level, random):
    """One of KINDS on a uint8 image [H, W, 3]."""
    import imagecorruptions.corruptions  # in an own list of requirements

    if kind == "rain":
        return rain(image, level, random)
    function, state = getattr(imagecorruptions.corruptions, kind), np.random.get_state()
    own = {"seed": random.randint(2**31)} if "seed" in signature(function).parameters else {}
    np.random.seed(random.randint(2**31))  # the package draws from the global generator
    try:
        with np.errstate(invalid="ignore"):
            values = np.array(function(Image.fromarray(image), level, **own))
    finally:
        np.random.set_state(state)
    # Of a small image, spatter may draw no drop, and divide by the greatest of none.
    return np.where(np.isfinite(values), values, image).astype(np.uint8)


def rain(image, level, random):
    """Slanted gray drops, a blur, and less light: what CIL makes by albumentations 0.5.2."""
    import cv2

    image, (height, width, _), slant = image.copy(), image.shape, int(random.uniform(-10, 10))
    area, length = RAIN[level]
    for _ in range(height * width // area):
        x = random.randint(min(slant, 0), width - max(slant, 0) + 1)
        y = random.randint(0, max(height - length, 0) + 1)  # CIL's images are never shorter than a drop
        cv2.line(image, (x, y), (x + slant, y + length), (200, 200, 200), 1)
    image = cv2.blur(image, (2 + level, 2 + level))
    return np.uint8(np.clip(image - 255 * (0.05 + 0.05 * level), 0, 255))


def add_by_kind(found, test, name, data_path, features, repetition=None):
    """Add to `found`, {(kind, level): [average precision]}, that of all visible test images, each of which searches all
    infrared ones; without corruption, the kind is None and the level 0.

    A search from infrared to visible images measures a gallery of all kinds; here each image counts by itself. A pair
    that does not see each other there does not do so here.

    test: a `datasets.Searches`; what its first search hides is hidden here. name: of the feature. features: as
    `engine.run_search` has them, of a repetition, or without corruption.
    """
    first = test.searches[0]
    visible, infrared, rules = _images(test, "visible"), _images(test, "infrared"), first.rules
    if rules.not_seen and first.query.modality == "infrared":
        rules = rules._replace(not_seen=lambda *labels: first.rules.not_seen(*labels[2:], *labels[:2]))
    distances = CosineDistances(*(features[side.modality][name][side.rows] for side in (visible, infrared)))
    matches = match_ranks(rules, distances, visible.ids, infrared.ids, visible.cameras, infrared.cameras)
    paths = test.paths["visible"]
    for position, value in zip(matches.rows.tolist(), matches.average_precision().tolist(), strict=True):
        kind, level = None, 0
        if repetition is not None:
            kind, level, _ = draw(paths[visible.rows[position]], data_path, repetition)
        found.setdefault((kind, level), []).append(value)


def table(found):
    """found: of `add_by_kind` -> {kind: [mAP in percent without corruption, then of levels 1 to 5, None where no image
    has it]}."""

    def mean(values):
        return 100 * float(np.mean(values)) if values else None

    clean = mean(found[None, 0])
    return {kind: [clean, *(mean(found.get((kind, level))) for level in LEVELS)] for kind in KINDS}


def _images(test, modality):
    """All images of `datasets.Searches` of a modality, once: `datasets.Images`. Of RegDB, those of the first search's
    trial: each trial numbers its own people."""
    searches, trial = test.searches, test.searches[0].setting["trial"]
    if "trial" in DATASETS[test.dataset].options:
        searches = [search for search in searches if search.setting["trial"] == trial]
    sides = [side for search in searches for side in (search.query, search.gallery) if side.modality == modality]
    rows, ids, cameras = (np.concatenate(parts) for parts in list(zip(*sides, strict=True))[1:])
    _, first = np.unique(rows, return_index=True)
    return Images(modality, rows[first], ids[first], cameras[first])
