"""Reading image files, and writing many into one array. Kinds of images: see test_bad_input.py."""

import errno
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import types
import zlib
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from core import images
from data_manager import process_query_sysu
from utils import InputError


def test_chunks_processes_and_the_system_do_not_change_the_array(sysu_tree, tmp_path, monkeypatch):
    """macOS has no call that takes room."""
    paths, _, _ = process_query_sysu(sysu_tree)
    images.write_images(paths, (16, 8), tmp_path / "whole.npy", "whole", workers=1)
    monkeypatch.setattr(images, "CHUNK", 7)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    images.write_images(paths, (16, 8), tmp_path / "chunks.npy", "chunks", workers=3)
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "chunks.npy").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_room_is_taken_before_the_work_without_a_call_for_it(sysu_tree, tmp_path, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("the room is taken before the work")

    paths, _, _ = process_query_sysu(sysu_tree)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(images, "map_processes", refuse)
    (tmp_path / "full.npy").symlink_to("/dev/full")
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_: types.SimpleNamespace(offset=0))
    with pytest.raises(OSError, match="No space left"):
        images.write_images(paths, (16, 8), tmp_path / "full.npy", "full", workers=1)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs fork")
def test_a_killed_process_is_an_error(sysu_tree, tmp_path, monkeypatch):
    """As the kernel does when memory runs out. The processes are forked, with the changed function."""
    paths, _, _ = process_query_sysu(sysu_tree)
    monkeypatch.setattr(images, "CHUNK", 7)
    monkeypatch.setattr(images, "read_image", lambda path, size: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BrokenProcessPool):  # `cli` gives the line: tests/test_shortages.py
        images.write_images(paths, (16, 8), tmp_path / "a.npy", "infrared", workers=2)


def test_unreadable_names_write_nothing_on_the_terminal(capsys):
    with pytest.raises(InputError, match="2 of 2 images"):
        images.check_readable([InputError("a\x1b[2J.jpg: is damaged"), InputError("b: is damaged")], 2)
    assert capsys.readouterr().out == "unreadable: a?[2J.jpg: is damaged\nunreadable: b: is damaged\n"


def test_a_file_may_be_read_eight_times_and_16_mib_more(monkeypatch):
    file = images._Content(bytes(2**20))
    for _ in range(8 + 16):
        file.seek(0)
        assert len(file.read()) == 2**20
    file.seek(0)
    with pytest.raises(ValueError, match="more parts than an image has; save it anew"):
        file.read()
    monkeypatch.setattr(images, "MAX_READS", 3)
    file = images._Content(b"")
    assert [file.read(9) for _ in range(3)] == [b""] * 3
    with pytest.raises(ValueError, match="more parts"):
        file.read(9)


def encoded(kind):
    with io.BytesIO() as file:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)).save(file, kind)
        return file.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def tiff(tags, content):
    """A gray TIFF file of 24 x 40 pixels: tags (number, type, count, value), and `content` from byte 8 on."""
    tags = sorted([(256, 3, 1, 24), (257, 3, 1, 40), (258, 3, 1, 8), (262, 3, 1, 1), *tags])
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory


def tags_of_one_place(number, size):
    """With private tags, whose values are the same bytes."""
    own = [(1000 + tag, 7, size, 8) for tag in range(number)]
    return tiff([(273, 4, 1, 8), (279, 4, 1, 960), *own], bytes(size))


def strips(places):
    """With a row in each strip."""
    numbers = struct.pack("<40I", *places) + struct.pack("<40I", *[24] * 40)
    pixels = np.random.default_rng(0).integers(0, 256, 24 * 40, np.uint8).tobytes()[: max(places) + 24 - 8]
    return tiff([(273, 4, 40, 8 + len(pixels)), (278, 3, 1, 1), (279, 4, 40, 168 + len(pixels))], pixels + numbers)


def tiles_of_one_place():
    """Six of 16 x 16 pixels."""
    numbers = struct.pack("<6I", *[8] * 6) + struct.pack("<6I", *[256] * 6)
    return tiff([(322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 6, 264), (325, 4, 6, 288)], bytes(256) + numbers)


def png_with(kind, content):
    """A PNG file with one part more."""
    part = len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
    return PNG[:33] + part + PNG[33:]


def bmp_in_runs():
    header = struct.pack("<IiiHHIIiiII", 40, 24, 40, 1, 8, 1, 6, 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 20 + len(header), 0, 0, 14 + len(header)) + header + b"\0\2\0\x20\0\1"


EXIF = b"\xff\xe1\xff\xffExif\0\0" + b"II*\0\x08\0\0\0" + bytes(2**16 - 17)
HOSTILE = {
    "empty parts": (PNG[:33] + (b"\0\0\0\0teSt" + zlib.crc32(b"teSt").to_bytes(4)) * 1000 + PNG[33:], "more parts"),
    "no end": (JPEG[:300] + bytes(2000), "more parts than an image has; save it anew"),
    "one place again and again": (tags_of_one_place(3000, 100_000), "more parts"),
    "EXIF in a full part": (JPEG[:2] + EXIF + JPEG[2:], None),
    "other parts": (JPEG[:2] + b"\xff\xe1\0\x08http\0\0" * 200 + JPEG[2:], None),
    "EXIF in two full parts": (JPEG[:2] + EXIF * 2 + JPEG[2:], "EXIF data of more than 96 KiB; save it anew"),
    "EXIF in many": (JPEG[:2] + b"\xff\xe1\0\x08Exif\0\0" * (3 * 2**12 + 1) + JPEG[2:], "EXIF data of more than"),
    "numbers as text": (b"P3\n2 1\n255\n1 2 3\n4 5 6\n", "its numbers are written as text; convert it to PNG"),
    "GIF": (encoded("GIF"), "cannot identify image file"),
    "JPEG 2000": (encoded("JPEG2000"), "cannot identify image file"),
    "a strip for each row": (strips(range(8, 968, 24)), None),
    "scans of no JPEG": (png_with(b"teSt", b"\xff\xda" * 101), None),
    "one tile again and again": (tiles_of_one_place(), "more parts than an image has; save it anew"),
    "one strip again and again": (strips([8] * 40), "more parts than an image has; save it anew"),
    "EXIF of 96 KiB": (png_with(b"eXIf", b"II*\0\x08\0\0\0" + bytes(3 * 2**15 - 14)), None),
    "more EXIF": (png_with(b"eXIf", b"II*\0\x08\0\0\0" + bytes(3 * 2**15 - 13)), "EXIF data of more than 96 KiB"),
    "EXIF as text": (png_with(b"tEXt", b"Raw profile type exif\0" + b"0" * 99_000), "EXIF data of more than 96 KiB"),
    "a BMP in runs": (bmp_in_runs(), "a BMP in runs; convert it to PNG"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_on_which_pillow_would_spend_minutes_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_READS", 1000)
    content, words = HOSTILE[name]
    (tmp_path / "a.jpg").write_bytes(content)
    if not words:
        assert images.read_image(tmp_path / "a.jpg", (40, 24)).any()
        return
    with pytest.raises(InputError, match=rf"a\.jpg: cannot be read as an image \({words}.*\); replace or remove it"):
        images.read_image(tmp_path / "a.jpg", (40, 24))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_honest_files_are_far_from_the_limits(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_READS", 400)
    (tmp_path / "a.jpg").write_bytes(encoded(kind))
    assert images.read_image(tmp_path / "a.jpg", (40, 24)).any()


@pytest.mark.parametrize(
    ("value", "words"), [(2**16, "more than 16 bits"), (-1, "more than 16 bits"), (0.5, "floating-point values")]
)
def test_values_of_other_ranges_are_refused(value, words, tmp_path):
    values = np.full((40, 24), value, np.float32 if isinstance(value, float) else np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=words):
        images.read_image(tmp_path / "a.tif", (40, 24))


def test_what_pillow_warns_of_is_not_on_the_terminal():
    """pytest has filters of its own."""
    warn = "warnings.warn_explicit('many', UserWarning, 'x.py', 1, 'PIL.TiffImagePlugin')"
    for program, warned in ((f"import warnings; {warn}", True), (f"import core.images, warnings; {warn}", False)):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (result.returncode, "many" in result.stderr) == (0, warned)


def test_an_image_that_may_not_be_looked_at_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    for path in (tmp_path / "b.png", tmp_path / "a" / "b.png"):
        assert "b.png: no such image; check its name" in str(images.missing_image(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied")))
        error = images.missing_image(tmp_path / "b.png")
    assert "b.png: cannot be looked at (denied); correct the permissions of its folders" in str(error)


def test_pixels_are_limited(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 40)
    images.read_image(tmp_path / "a.png", (40, 24))
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 40 - 1)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(24 x 40 pixels are more than"):
        images.read_image(tmp_path / "a.png", (40, 24))


@pytest.mark.parametrize("size", [(2**16, 1), (1, 2**16 + 1), (2**26, 1)])
def test_a_side_is_limited(size, tmp_path):
    """Of 2^26 pixels in a row, 65 kB in a file, Pillow wants more memory to resize it than it can ask for."""
    Image.new("L", size).save(tmp_path / "a.png")
    if max(size) <= 2**16:
        assert not images.read_image(tmp_path / "a.png", (2, 2)).any()
        return
    words = rf"a\.png: cannot be read as an image \(a side of {max(size)} pixels is longer than 2\^16\); replace"
    with pytest.raises(InputError, match=words):
        images.read_image(tmp_path / "a.png", (2, 2))


def test_a_file_is_read_up_to_its_limit(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(JPEG)
        file.truncate(2**28 + 1)  # takes no room
    with pytest.raises(InputError, match=r"a\.jpg: cannot be read as an image \(more than 256 MiB\)"):
        images.read_image(tmp_path / "a.jpg", (40, 24))


def test_scans_of_a_jpeg_are_limited(tmp_path, monkeypatch):
    """The last one again and again, of some 95 bytes: each is decoded over the whole image."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24), np.uint8)
    for number in (1, 100, 101):
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, "JPEG", progressive=True)
            content = file.getvalue()
        last, scans = content[content.rindex(b"\xff\xda") : -2], content.count(b"\xff\xda")
        (tmp_path / "a.jpg").write_bytes(content[:-2] + last * (number - scans) + content[-2:])
        if number <= 100:
            with Image.open(tmp_path / "a.jpg") as image:
                expected = np.asarray(image.convert("RGB"))
            assert (images.read_image(tmp_path / "a.jpg", (40, 24)) == expected).all()
    words = r"a\.jpg: cannot be read .*\(a JPEG of %d scans, which take too long; save it anew\)"
    with pytest.raises(InputError, match=words % 101):
        images.read_image(tmp_path / "a.jpg", (40, 24))
    (tmp_path / "a.jpg").write_bytes(content)
    monkeypatch.setattr(images, "MOST_SCANNED", scans * 40 * 24)
    images.read_image(tmp_path / "a.jpg", (40, 24))
    monkeypatch.setattr(images, "MOST_SCANNED", scans * 40 * 24 - 1)
    with pytest.raises(InputError, match=words % scans):
        images.read_image(tmp_path / "a.jpg", (40, 24))
