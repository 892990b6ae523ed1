"""From image files to batches: prepared arrays, the identity sampler, and the loaders of training and testing."""

import hashlib
import mmap
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from core.files import atomic
from data_manager import LLCM_NAMES, REGDB_CAMERAS, process_query_llcm, process_test_regdb, read_ids, read_list, relabel
from utils import (
    InputError,
    cores,
    end_with_the_main_process,
    leave_signals_to_the_main_process,
    process_count,
    process_index,
    progress,
)

# What cameras and data sets have. Pillow tells a file's format by its content, and would hand some, such as PostScript
# under the name of a JPEG, to other programs.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000")
PREPARE_CHUNK = 32  # images that a process decodes at a time
UPLOAD_BLOCK = 1024  # images that are copied to a device at a time


class TrainData(NamedTuple):
    """Training images of both modalities: uint8 [N, H, W, 3] (memory-mapped), and their labels, int64 [N].

    Labels are 0 .. K-1, or -1 for images that are left out.
    """

    visible: np.ndarray
    visible_labels: np.ndarray
    infrared: np.ndarray
    infrared_labels: np.ndarray

    @property
    def num_classes(self):
        return int(max(self.visible_labels.max(), self.infrared_labels.max())) + 1

    @property
    def num_images(self):
        """(visible, infrared) images to train on."""
        return int((self.visible_labels >= 0).sum()), int((self.infrared_labels >= 0).sum())


def read_image(path, size):
    """An image file -> uint8 [H, W, 3], resized to size = (height, width) with Lanczos, as published.

    Turned as its EXIF orientation says. Of images that are no RGB: gray is repeated, of 16 bits the upper 8 are taken,
    transparency is dropped. Raises InputError, which names the file, when it is missing or cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return np.array(_rgb(ImageOps.exif_transpose(image)).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    except FileNotFoundError as error:
        raise no_image(path) from error
    except Exception as error:  # the readers raise anything when a file is damaged
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def no_image(path):
    return InputError(f"{path}: no such image; check its name, or the list that names it and --data_path")


def _rgb(image):
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut them off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values, whose range is unknown")
    return image.convert("RGB")


def write_images(paths, size, out, desc, workers=None):
    """Decode images into one array file uint8 [N, H, W, 3], through a memory map, on all cores ->
    {index: InputError} of those that cannot be read; their places stay black.

    Memory stays that of some images a process, however many there are. Not atomic: `out` is a temporary of
    `files.atomic`. workers: processes (threads would wait for each other), by default one a core.
    """
    start = np.lib.format.open_memmap(out, "w+", np.uint8, (len(paths), *size, 3)).offset
    with open(out, "r+b") as file:  # takes the room now: a map that finds the disk full later kills the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        else:  # macOS, Windows
            file.seek(start)
            file.writelines(bytes(size[0] * size[1] * 3) for _ in paths)
    chunks = [(start, paths[start : start + PREPARE_CHUNK]) for start in range(0, len(paths), PREPARE_CHUNK)]
    unreadable = {}
    with (
        multiprocessing.Pool(workers or cores(), end_with_the_main_process) as pool,
        progress(total=len(paths), desc=desc, unit="img") as bar,
    ):
        for count, failed in pool.imap_unordered(partial(_write_chunk, out, size), chunks):
            unreadable |= failed
            bar.update(count)
    return dict(sorted(unreadable.items()))


def _write_chunk(out, size, chunk):
    start, paths = chunk
    array = np.load(out, mmap_mode="r+")  # mapped anew for each chunk: unmapping gives the written pages back
    unreadable = {}
    for i, path in enumerate(paths, start):
        try:
            array[i] = read_image(path, size)
        except InputError as error:
            unreadable[i] = error
    return len(paths), unreadable


def check_readable(unreadable, total, hint=""):
    """Raise InputError, ending with `hint`, for images that could not be read, a list of InputErrors, after printing
    all."""
    for error in unreadable:
        print(f"unreadable: {error}")
    if len(unreadable) == 1:
        raise InputError(f"{unreadable[0]}{hint}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {total} images cannot be read, listed above: {unreadable[0]}{hint}")


def sysu_train_files(data_path):
    """The four files that `pre_process_sysu.py` writes and training reads, in TrainData's order."""
    names = ("train_rgb_resized_img", "train_rgb_resized_label", "train_ir_resized_img", "train_ir_resized_label")
    return [Path(data_path) / f"{name}.npy" for name in names]


def sysu_train(data_path, size, select="test"):
    """SYSU-MM01's prepared training arrays, at size = (height, width): train and val ids, or with select="val", where
    the val ids choose the epoch, the train ids only."""
    files = sysu_train_files(data_path)
    prepare = f"run: python pre_process_sysu.py --data_path {data_path} --img_h {size[0]} --img_w {size[1]}"
    arrays = []
    for file in files:
        try:
            arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: no whole prepared array ({type(error).__name__}); {prepare}") from error
    for (file, images), labels in zip(zip(files[::2], arrays[::2], strict=True), arrays[1::2], strict=True):
        if images.shape[1:] != (*size, 3) or images.dtype != np.uint8:
            raise InputError(f"{file}: holds {images.dtype} {images.shape[1:]}, not uint8 {(*size, 3)}; {prepare}")
        if labels.shape != images.shape[:1] or not len(images):
            raise InputError(f"{file}: {len(images)} images, but {labels.size} labels beside it; {prepare}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"{file}: the labels beside it are {labels.dtype}, no integers; {prepare}")
    visible, visible_labels, infrared, infrared_labels = arrays
    # The published script stores labels of other integer types.
    visible_labels, infrared_labels = visible_labels.astype(np.int64), infrared_labels.astype(np.int64)
    there = np.union1d(visible_labels, infrared_labels)
    if absent := set(range(min(there[-1], len(there)) + 1)).symmetric_difference(there.tolist()):
        raise InputError(f"{files[1]}: label {min(absent)} breaks the row 0, 1, 2, ... of labels; {prepare}")
    if select == "val":
        # Labels are ranks among train and val ids. Rank the train ids among themselves.
        train = read_ids(data_path, "train")
        identities = np.union1d(train, read_ids(data_path, "val"))
        if max(visible_labels.max(), infrared_labels.max()) >= len(identities):
            raise InputError(f"{files[1]}: has labels past the {len(identities)} train and val ids; {prepare}")
        label = np.where(np.isin(identities, train), np.isin(identities, train).cumsum() - 1, -1)
        visible_labels, infrared_labels = label[visible_labels], label[infrared_labels]
    return TrainData(visible, visible_labels, infrared, infrared_labels)


def regdb_train(data_path, trial, size):
    """RegDB's training images of one trial, decoded once and kept in `{data_path}/cache/`."""
    names = [f"train_{modal}_{trial}" for modal in ("visible", "thermal")]
    return _listed_train(data_path, names, size, [process_test_regdb(data_path, trial, m) for m in REGDB_CAMERAS])


def llcm_train(data_path, size):
    """LLCM's training images, decoded once and kept in `{data_path}/cache/`."""
    names = ["train_vis", "train_nir"]
    return _listed_train(data_path, names, size, [process_query_llcm(data_path, m) for m in LLCM_NAMES])


def _listed_train(data_path, names, size, test):
    """names: of the visible and the infrared list; test: (paths, ids, cameras) of all test images of each modality,
    which must not be among them."""
    lists = [read_list(data_path, name) for name in names]
    tested = {path for paths, _, _ in test for path in paths}
    for name, (paths, _) in zip(names, lists, strict=True):
        if both := tested.intersection(paths):
            raise InputError(f"{data_path}: {min(both)} is in idx/{name}.txt and a test image; remove it from one")
    visible, infrared = (
        _cached_images(data_path, name, paths, size) for name, (paths, _) in zip(names, lists, strict=True)
    )
    ids = [ids for _, ids in lists]
    # Ranked together: an id that is in one of the lists only must not shift the labels of the other.
    visible_labels, infrared_labels = np.split(relabel(np.concatenate(ids)), [len(ids[0])])
    return TrainData(visible, visible_labels, infrared, infrared_labels)


def _cached_images(data_path, name, paths, size):
    """`write_images` once per list of files: the file's name carries a digest of them; an outdated one of the same size
    is removed."""
    folder = Path(data_path) / "cache"
    digest = hashlib.sha256(repr(size).encode())
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise no_image(path) from error
        digest.update(f"{Path(path).relative_to(data_path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    name = f"{name}_{size[0]}x{size[1]}"
    file = folder / f"{name}_{digest.hexdigest()[:16]}.npy"
    if process_index() == 0 and not file.exists():
        with atomic(file) as temporary:
            unreadable = write_images(paths, size, temporary, desc=f"decoding {name}")
            check_readable([*unreadable.values()], len(paths))
        for other in folder.glob(f"{name}_*.npy"):
            if other != file:
                other.unlink()
    while not file.exists():  # the other processes wait here: in a barrier, their patience would end after some minutes
        time.sleep(0.5)
    return np.load(file, mmap_mode="r", allow_pickle=False)


class IdentitySampler(Sampler):
    """Batches of identities: of each, `num_pos` visible and `num_pos` infrared images, drawn with replacement.

    Yields (visible indices, infrared indices), two int64 arrays [batch_size * num_pos] whose labels agree position by
    position. A batch's identities differ. An epoch has max(visible, infrared) // (batch_size * num_pos) + 1 batches: on
    SYSU-MM01 696, one more than the published progress line shows, but as many as the published sampler yields. Its
    draws depend on the seed and on `set_epoch` only. All processes draw the same batches; each yields only its own
    identities.

    Raises InputError when fewer than `batch_size` identities have images of both modalities, or when the processes
    cannot share them evenly.
    """

    def __init__(self, data, batch_size, num_pos, seed):
        if batch_size % process_count():
            raise InputError(
                f"--batch_size {batch_size}: {process_count()} processes cannot share it evenly; take a multiple"
            )
        both = np.intersect1d(data.visible_labels, data.infrared_labels)
        both = both[both >= 0]
        if len(both) < batch_size:
            raise InputError(
                f"--batch_size {batch_size}: only {len(both)} training identities have images of both modalities; "
                "that many fit into a batch at most"
            )
        self.visible = [np.flatnonzero(data.visible_labels == label) for label in both]
        self.infrared = [np.flatnonzero(data.infrared_labels == label) for label in both]
        self.batch_size, self.num_pos, self.seed, self.epoch, self.start = batch_size, num_pos, seed, 0, 0
        self.steps = max(data.num_images) // (batch_size * num_pos) + 1

    def set_epoch(self, epoch, start=0):
        """start: steps of the epoch that are done already."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        for step in range(self.steps):
            chosen = rng.choice(len(self.visible), self.batch_size, replace=False)
            batch = tuple(
                np.concatenate(
                    [rng.choice(images[i], self.num_pos) for i in chosen][process_index() :: process_count()]
                )
                for images in (self.visible, self.infrared)
            )
            if step >= self.start:
                yield batch


class TrainBatches(Dataset):
    """Maps a pair of index arrays of `IdentitySampler` to (visible uint8 [A, 3, H, W], infrared uint8 [A, 3, H, W],
    labels [A] of both)."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        # A memory map is pickled as its contents: loading processes that are not forked map the file themselves.
        return _mapped_batches, tuple(
            array.filename if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else array
            for array in self.data
        )

    def __getitem__(self, indices):
        visible, infrared = indices
        images = _channels_first(self.data.visible[visible]), _channels_first(self.data.infrared[infrared])
        return *images, self.data.visible_labels[visible]


def _mapped_batches(*arrays):
    return TrainBatches(TrainData(*(a if isinstance(a, np.ndarray) else np.load(a, mmap_mode="r") for a in arrays)))


class ImageFiles(Dataset):
    """Test images, decoded and resized as they are asked for: uint8 [3, H, W]."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return _channels_first(read_image(self.paths[index], self.size))


class CachedBatches:
    """The batches of `TrainBatches`, in the sampler's order, from arrays that lie on a device as uint8."""

    def __init__(self, data, sampler, device):
        self.sampler, self.device = sampler, device
        self.images = [_on_device(array, device) for array in (data.visible, data.infrared)]
        self.labels = torch.from_numpy(data.visible_labels).to(device)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        # The whole epoch's draws in one copy: one for each batch would wait for the device.
        for indices in torch.from_numpy(np.array([*self.sampler])).to(self.device):
            visible, infrared = (images[i].movedim(-1, -3) for images, i in zip(self.images, indices, strict=True))
            yield visible, infrared, self.labels[indices[0]]


def _on_device(array, device):
    """A memory-mapped array on a device, copied in blocks: not all of it is in the host's memory at once."""
    there = torch.empty(array.shape, dtype=torch.uint8, device=device)
    for start in progress(range(0, len(array), UPLOAD_BLOCK), desc=f"images to {device}", leave=False):
        block = slice(start, start + UPLOAD_BLOCK)
        there[block] = torch.from_numpy(np.array(array[block])).to(device)
    return there


CACHES = ("auto", "gpu", "ram", "disk")


def train_loader(data, sampler, workers, device="cpu", cache="disk"):
    """Batches of an epoch, in the sampler's order; iterate over it once an epoch.

    cache: where the images are kept. "disk": in their files, memory-mapped; "ram": in memory. From both, `workers`
    loading processes, which stay from epoch to epoch, make the batches. "gpu": on the device, without processes.
    "auto": "gpu" if the device is a CUDA device and they take at most a quarter of its free memory, else "disk".

    Raises InputError when they are to be kept on a GPU that is none, or would take more than half of its free memory:
    the rest is for the training.
    """
    device, size = torch.device(device), data.visible.nbytes + data.infrared.nbytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if cache == "gpu" and device.type == "cpu":
        raise InputError("--cache gpu: the training runs on the CPU; use --cache ram or disk")
    if cache == "gpu" and size > free / 2:
        raise InputError(
            f"--cache gpu: the training images take {size / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} "
            f"free on {device}; use --cache disk or ram"
        )
    if cache == "gpu" or (cache == "auto" and size <= free / 4):
        return CachedBatches(data, sampler, device)
    if cache == "ram":
        data = data._replace(visible=np.array(data.visible), infrared=np.array(data.infrared))
    options = worker_options(workers)
    # batch_size=None: the sampler's items are whole batches already.
    return DataLoader(
        TrainBatches(data),
        sampler=sampler,
        batch_size=None,
        persistent_workers=options["num_workers"] > 0,
        # Starting the processes draws a number; the global generator is for augmentation, whose draws must not depend
        # on when, and whether, processes start.
        generator=torch.Generator(),
        **options,
    )


def eval_loader(paths, size, batch_size, workers):
    """Batches uint8 [B, 3, H, W] of the files, in their order. The processes take turns; `loader.rows` are this one's.
    A process that has none embeds the first image, for the sake of the features' shape.

    Raises InputError, before the first batch, for a file that is not there."""
    for path in paths:
        if not os.path.isfile(path):
            raise no_image(path)
    batches = [
        batch.tolist() for batch in torch.arange(len(paths)).split(batch_size)[process_index() :: process_count()]
    ]
    loader = DataLoader(ImageFiles(paths, size), batch_sampler=batches or [[0]], **worker_options(workers))
    loader.rows = [row for batch in batches for row in batch]
    return loader


def worker_options(workers):
    """What a DataLoader with so many loading processes is given."""
    workers = min(workers, cores())  # more than cores only get in each other's way
    # A GPU that was chosen (`utils.select_device`) has been initialised; where there is one but --gpu cpu, it has not.
    options = {"num_workers": workers, "pin_memory": torch.cuda.is_initialized()}
    return options | {"worker_init_fn": leave_signals_to_the_main_process}


def _channels_first(array):
    """uint8 [..., H, W, 3] -> tensor [..., 3, H, W], a view in the memory order of channels_last."""
    return torch.from_numpy(array).movedim(-1, -3)
