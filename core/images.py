"""Image files: read, resize, and write many of them into one array file."""

import io
import os
import re
import warnings
from functools import partial

import numpy as np
from PIL import Image, ImageOps

from core.files import regular
from utils import InputError, cores, map_processes, one_line, progress, shortage

# What cameras and data sets produce. Pillow detects a format by a file's content and passes some formats, such as
# PostScript, to other programs.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
warnings.filterwarnings("ignore", module="PIL")  # of what a damaged file contains; the error says it in one line
MAX_BYTES = 2**28  # of an image file
MAX_READS = 2**20  # of its parts
MAX_EXIF = 3 * 2**15  # bytes; a part of a JPEG has 2^16. Pillow copies all for each part, and what each entry names
SPAN = 64  # of 256 gray levels, that an image of 16 bits must use
MAX_PIXELS = 2**26  # of an image file, 8192 x 8192: some formats take minutes to decode more
MAX_SIDE = 2**16  # pixels: of a longer side, Pillow keeps gigabytes of weights to resize it, or fails
Image.MAX_IMAGE_PIXELS = None  # of Pillow, which warns first and refuses later
MOST_SCANS, MOST_SCANNED = 100, 2**30  # of a JPEG, and its pixels in all of them; a progressive one has about ten
WHITE_IS_ZERO = 262  # a tag of TIFF, PhotometricInterpretation, if it is 0
SIGNED = 339  # a tag of TIFF, SampleFormat, if it is 2
PART_BYTES = (279, 325)  # tags of TIFF: the bytes of each strip, or of each tile
CHUNK = 64  # images that a process decodes at a time; starting one takes as long


def read_image(path, size):
    """An image file -> uint8 [H, W, 3], resized to size = (height, width) with Lanczos, as published.

    Its EXIF orientation is applied. Gray images are repeated, 16-bit images keep the upper 8 bits, and transparency is
    dropped. Raises InputError for a file that is missing or cannot be read, or that would keep too little of 16 bits.
    """
    try:
        # Of a path, Pillow would map some TIFF files with the height and width that they have after they are turned.
        # The file stays open while Pillow imports its readers: where descriptors run out, that error has the reason.
        with open(regular(path), "rb") as file, Image.open(_Content(content := _read(file)), formats=FORMATS) as image:
            _check_header(image, content)
            deep = _is_deep(image)
            image = _rgb(ImageOps.exif_transpose(image))
            if deep:
                _check_span(image)
            return resized(image, size)
    except FileNotFoundError as error:
        raise missing_image(path) from error
    except Exception as error:  # the readers raise anything when a file is damaged
        if shortage(error):  # the file may be good
            raise
        reason = re.sub(" <.*>", "", str(error))  # a name of `_Content`
        raise InputError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error


def image_suffixes():
    """How the names of images in FORMATS end, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _read(file):
    """The bytes of a file. ValueError if Pillow would spend minutes on it before it knows the size of the image."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    if content.startswith(b"\xff\xd8"):
        _check_exif(sum(int.from_bytes(length) for length in re.findall(rb"(?s)\xff\xe1(..)Exif\0", content)))
    return content


def _check_exif(size):
    if size > MAX_EXIF:
        raise ValueError(f"EXIF data of more than {MAX_EXIF >> 10} KiB; save it anew")


def _check_header(image, content):
    """Raise ValueError for the image of a file that Pillow reads wrongly, for minutes, or into gigabytes."""
    tags, (codec, values) = getattr(image, "tag_v2", {}), (image.tile[0][::3] if image.tile else ("", None))
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than 2^26")
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"a side of {max(image.size)} pixels is longer than 2^16")
    _check_exif(max(len(image.info.get(name, "")) for name in ("exif", "Raw profile type exif")))
    scans = content.count(b"\xff\xda") if codec == "jpeg" else 0  # over the whole image, however short they are
    if scans > MOST_SCANS or scans * pixels > MOST_SCANNED:
        raise ValueError(f"a JPEG of {scans} scans, which take too long; save it anew")
    if sum(map(sum, filter(None, map(tags.get, PART_BYTES)))) > len(content):  # one part again and again
        raise ValueError("more parts than an image has; save it anew")
    if codec == "bmp_rle":  # six bytes of one take gigabytes
        raise ValueError("a BMP in runs; convert it to PNG")
    if codec == "ppm_plain":  # some take minutes
        raise ValueError("its numbers are written as text; convert it to PNG")
    if codec == "ppm" and values == ("RGB", 2**16 - 1):
        raise ValueError("16-bit colours of a PPM, which Pillow rounds; convert it to PNG")
    if not _is_deep(image) and 2 in tags.get(SIGNED, ()):  # Pillow takes them for unsigned ones
        raise ValueError("signed values; convert it to PNG")
    if _is_deep(image) and tags.get(WHITE_IS_ZERO) == 0:  # Pillow turns 8 bits only
        raise ValueError("white is 0 in its 16 bits; convert it to PNG")


def _is_deep(image):
    """Whether a value has 16 bits in the file."""
    return image.mode.startswith("I") or ";16" in str(image.tile[:1])


class _Content(io.BytesIO):
    """A file in memory. ValueError after more reads than an image needs: of some files, Pillow reads single bytes or
    empty parts for minutes, or one part again and again."""

    def __init__(self, content):
        super().__init__(content)
        self.reads, self.bytes = MAX_READS, 2**24 + 8 * len(content)  # that are left

    def read(self, size=-1):
        content = super().read(size)
        self.reads, self.bytes = self.reads - 1, self.bytes - len(content)
        if min(self.reads, self.bytes) < 0:
            raise ValueError("more parts than an image has; save it anew")
        return content


def resized(image, size):
    """A Pillow image in RGB -> uint8 [H, W, 3] of size = (height, width)."""
    return np.array(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def missing_image(path):
    """The InputError for an image that `os.stat` does not find, or may not."""
    try:
        os.stat(path)
    except PermissionError as error:
        return InputError(f"{path}: cannot be looked at ({error.strerror}); correct the permissions of its folders")
    except OSError:
        pass
    return InputError(f"{path}: no such image; check its name, or the list that names it and --data_path")


def _rgb(image):
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values, whose range is unknown")
    return image.convert("RGB")


def _check_span(image):
    """Refuse what is left of 16 bits if it is a few gray levels: a camera of 14 bits, or a thermal one, uses a small
    part of the range. Which part is not known from one image, and stretching each by its own would make a person's
    warmth depend on what else is in the image."""
    low, high = np.percentile(image, (1, 99))
    if high - low < SPAN:
        raise ValueError(
            f"its 16 bits hold values from {256 * low:.0f} to {256 * high + 255:.0f} only, which would leave few gray "
            "levels: convert all images of its camera to 8 bits, from one range"
        )


def write_images(paths, size, out, desc, workers=None):
    """Decode images into one array file uint8 [N, H, W, 3] -> {index: InputError} of the unreadable ones.

    Unreadable images stay black. The file is a memory map, so memory stays at a few images a process. Not atomic: `out`
    is a temporary of `files.atomic`. workers: processes, by default one a core; a few images are decoded in this one.
    """
    offset = np.lib.format.open_memmap(out, "w+", np.uint8, (len(paths), *size, 3)).offset
    with open(out, "r+b") as file:  # reserves the space: a map that meets a full disk kills the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        else:  # macOS, Windows
            file.seek(offset)
            file.writelines(bytes(size[0] * size[1] * 3) for _ in paths)
    chunks = [(start, paths[start : start + CHUNK]) for start in range(0, len(paths), CHUNK)]
    unreadable: dict[int, InputError] = {}
    workers = (workers or cores()) if len(chunks) > 1 else 0
    decoded = map_processes(partial(_write_chunk, out, size), chunks, workers)
    with progress(total=len(paths), desc=desc, unit="img") as bar, decoded as done:
        for count, errors in done:
            unreadable |= errors
            bar.update(count)
    return unreadable


def _write_chunk(out, size, chunk):
    start, paths = chunk
    array = np.load(out, mmap_mode="r+")  # mapped again for each chunk: unmapping returns the written pages
    errors = {}
    for i, path in enumerate(paths, start):
        try:
            array[i] = read_image(path, size)
        except InputError as error:
            errors[i] = error
    return len(paths), errors


def check_readable(errors, total, hint=""):
    """Print and raise the InputErrors of unreadable images, if any. hint: ends the message."""
    for error in errors:
        print(one_line(f"unreadable: {error}"))
    if len(errors) == 1:
        raise InputError(f"{errors[0]}{hint}")
    if errors:
        raise InputError(f"{len(errors)} of {total} images cannot be read, listed above: {errors[0]}{hint}")
