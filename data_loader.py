"""From image files to batches: training arrays, the identity sampler, and the loaders of training and testing."""

import hashlib
import mmap
import os
import shlex
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from core.files import atomic, regular
from core.images import check_readable, missing_image, read_image, write_images
from data_manager import SYSU_INFRARED, SYSU_VISIBLE, check_data_folder, read_splits, sysu_images
from utils import InputError, begin_loading, cores, process_count, process_index, progress

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

    @property
    def digest(self):
        """A checksum of all labels and of 64 images of each modality, evenly spaced: tells other images from these."""
        value = 0
        for images, labels in (self[:2], self[2:]):
            some = images[np.linspace(0, len(images) - 1, 64).astype(int)]
            value = zlib.crc32(some.tobytes(), zlib.crc32(labels.astype(np.int64).tobytes(), value))
        return value


def sysu_train_files(data_path):
    """The files that `pre_process_sysu.py` writes and training reads: four arrays in TrainData's order, and the ids
    that the labels number."""
    names = ("train_rgb_resized_img", "train_rgb_resized_label", "train_ir_resized_img", "train_ir_resized_label")
    return [Path(data_path) / f"{name}.npy" for name in (*names, "train_ids")]


def sysu_train(data_path, size, select="test"):
    """SYSU-MM01's prepared training arrays, at size = (height, width).

    They hold train and val ids. With select="val", where the val ids choose the epoch, images of val ids are left out.
    Arrays of other people than the lists have now are an InputError.
    """
    check_data_folder(data_path)
    remedy = _prepare_again(data_path, *size)
    *files, ids_file = sysu_train_files(data_path)
    visible, visible_labels, infrared, infrared_labels = _prepared_arrays(files, size, remedy)
    splits = read_splits(data_path)
    identities = np.array(sorted(splits["train"] | splits["val"]))
    if ids_file.exists():
        _check_ids(_load_prepared(ids_file, remedy), splits, data_path, remedy)
    if (count := len(np.union1d(visible_labels, infrared_labels))) != len(identities):
        raise InputError(
            f"{data_path}: arrays of {count} ids are prepared, but exp/train_id.txt and val_id.txt list "
            f"{len(identities)}; {remedy}"
        )
    if not ids_file.exists():  # of an older version, or of the published script: the numbers of images must do
        _check_images(visible_labels, identities, SYSU_VISIBLE["all"], data_path, remedy)
        _check_images(infrared_labels, identities, SYSU_INFRARED, data_path, remedy)
    if select == "val":
        # Labels number the train and val ids. Number the train ids anew.
        trained = np.isin(identities, [*splits["train"]])
        label = np.where(trained, trained.cumsum() - 1, -1)
        visible_labels, infrared_labels = label[visible_labels], label[infrared_labels]
    return TrainData(visible, visible_labels, infrared, infrared_labels)


def check_prepared(data_path):
    """Before a test: raise InputError for arrays, if there are any, that `sysu_train` would refuse: networks that were
    trained on them may know people who are now in the test."""
    *files, _ = sysu_train_files(data_path)
    if all(file.exists() for file in files):
        sysu_train(data_path, _load_prepared(files[0], _prepare_again(data_path), images=True).shape[1:3])


def _prepare_again(data_path, *size):
    """A remedy, for the shell. size: height, width, if they are known."""
    sizes = [text for flag, pixels in zip(("--img_h", "--img_w"), size, strict=False) for text in (flag, str(pixels))]
    return f"run: {shlex.join(['python', 'pre_process_sysu.py', '--data_path', str(data_path), *sizes])}"


def _check_ids(prepared, splits, data_path, remedy):
    """Raise InputError unless the prepared ids are those of the lists."""
    prepared, listed = set(prepared.ravel().tolist()), splits["train"] | splits["val"]
    if other := prepared & splits["test"]:
        problem = f"id {min(other)} is a test id now, but was prepared for training"
    elif other := prepared - listed:
        problem = f"id {min(other)} was prepared for training, but is now in none of the lists exp/*_id.txt"
    elif other := listed - prepared:
        problem = f"id {min(other)} is in exp/train_id.txt or val_id.txt now, but was not prepared"
    else:
        return
    raise InputError(f"{data_path}: {problem}; {remedy}")


def _check_images(labels, identities, cameras, data_path, remedy):
    """Raise InputError unless labels number as many images of each id as its folders have, where they still exist."""
    try:
        _, ids, _ = sysu_images(data_path, identities, cameras)
    except InputError:
        return
    prepared, images = (np.bincount(n, minlength=len(identities)) for n in (labels, np.searchsorted(identities, ids)))
    for i in np.flatnonzero((images > 0) & (images != prepared)):
        raise InputError(
            f"{data_path}: id {identities[i]} has {images[i]} images in cameras {', '.join(map(str, cameras))}, but "
            f"{prepared[i]} were prepared under its number; {remedy}"
        )


def _load_prepared(file, remedy, images=False):
    """An array of images, or of labels or ids; remedy: how InputErrors end."""
    try:
        array = np.load(regular(file), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the reader raises anything when a file is damaged
        raise InputError(f"{file}: cannot be read as a prepared array ({type(error).__name__}); {remedy}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{file}: holds several arrays; {remedy}")
    whole = array.dtype == np.uint8 and array.ndim == 4 if images else array.dtype.kind in "iu" and array.ndim == 1
    if not whole:
        wanted = "uint8 [N, H, W, 3]" if images else "integers [N]"
        raise InputError(f"{file}: has {array.dtype} {list(array.shape)}, not {wanted}; {remedy}")
    return array


def _prepared_arrays(files, size, remedy):
    """The four arrays of `sysu_train_files`, checked; remedy: how InputErrors end."""
    arrays = [_load_prepared(file, remedy, images=not i % 2) for i, file in enumerate(files)]
    for (file, images), labels in zip(zip(files[::2], arrays[::2], strict=True), arrays[1::2], strict=True):
        if images.shape[1:] != (*size, 3):
            raise InputError(f"{file}: has images {images.shape[1:]}, not {(*size, 3)}; {remedy}")
        if len(labels) != len(images) or not len(images):
            raise InputError(f"{file}: has {len(images)} images, and {len(labels)} labels; {remedy}")
    arrays[1::2] = (labels.astype(np.int64) for labels in arrays[1::2])  # the published script stores other integers
    labels = np.union1d(*arrays[1::2])
    if gaps := set(range(min(labels[-1], len(labels)) + 1)).symmetric_difference(labels.tolist()):
        raise InputError(f"{files[1]}: labels are not 0, 1, 2, ... without a gap ({min(gaps)}); {remedy}")
    return arrays


def listed_train(data_path, lists, size, test):
    """Training images of two lists, decoded once and kept in `{data_path}/cache/`.

    lists: {name in the cache: (paths, ids)}, of the visible and of the infrared images. test: lists of the test images'
    paths, which must not be among them.
    """
    test = {path for paths in test for path in paths}
    for paths, _ in lists.values():
        if both := test.intersection(paths):
            raise InputError(f"{min(both)}: is listed for training and for the test; take it out of one")
    visible, infrared = (_cached_images(data_path, name, paths, size) for name, (paths, _) in lists.items())
    ids = [ids for _, ids in lists.values()]
    # Numbered together: an id in only one of the lists must not shift the labels of the other.
    labels = np.unique(np.concatenate(ids), return_inverse=True)[1]
    visible_labels, infrared_labels = np.split(labels, [len(ids[0])])
    return TrainData(visible, visible_labels, infrared, infrared_labels)


def _cached_images(data_path, name, paths, size):
    """`write_images` once for each list of files. A digest of them is part of the array's name; outdated arrays of the
    same size are removed."""
    folder = Path(data_path) / "cache"
    digest = hashlib.sha256(repr(size).encode())
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise missing_image(path) from error
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
    array = _load_prepared(file, "remove it, and run again", images=True)
    if array.shape != (len(paths), *size, 3):
        raise InputError(f"{file}: has images {array.shape}, not {(len(paths), *size, 3)}; remove it, and run again")
    return array


class IdentitySampler(Sampler):
    """Batches of identities: of each, `num_pos` visible and `num_pos` infrared images, drawn with replacement.

    Yields (visible indices, infrared indices), two int64 arrays [batch_size * num_pos] whose labels agree position by
    position. A batch's identities differ. An epoch has max(visible, infrared) // (batch_size * num_pos) + 1 batches, on
    SYSU-MM01 696, as the published sampler yields (the published progress line shows one less). Its draws depend on the
    seed and on `set_epoch` only. All processes draw the same batches; each yields only its own identities.

    Raises InputError when fewer than `batch_size` identities have images of both modalities, or when the processes
    cannot share them evenly.
    """

    def __init__(self, data, batch_size, num_pos, seed):
        if batch_size % process_count():
            raise InputError(f"--batch_size {batch_size}: take a multiple of {process_count()}, one for each process")
        both = np.intersect1d(data.visible_labels, data.infrared_labels)
        both = both[both >= 0]
        if len(both) < batch_size:
            raise InputError(
                f"--batch_size {batch_size}: only {len(both)} training identities have images of both modalities; use "
                "a smaller batch"
            )
        self.visible = [np.flatnonzero(data.visible_labels == label) for label in both]
        self.infrared = [np.flatnonzero(data.infrared_labels == label) for label in both]
        self.batch_size, self.num_pos, self.seed, self.epoch, self.start = batch_size, num_pos, seed, 0, 0
        self.steps = max(data.num_images) // (batch_size * num_pos) + 1

    def set_epoch(self, epoch, start=0):
        """start: number of steps of the epoch that are done."""
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
        batch = [*images, torch.from_numpy(self.data.visible_labels[visible])]
        # When PyTorch moves them there, to send them, the main process does not learn of an error.
        return [tensor.share_memory_() for tensor in batch] if get_worker_info() else batch


def _mapped_batches(*arrays):
    return TrainBatches(TrainData(*(a if isinstance(a, np.ndarray) else np.load(a, mmap_mode="r") for a in arrays)))


class ImageFiles(Dataset):
    """Test images, decoded and resized on access: uint8 [3, H, W]. change: a function (uint8 [H, W, 3], path) -> the
    image to take instead."""

    def __init__(self, paths, size, change=None):
        self.paths, self.size, self.change = paths, size, change

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        image = read_image(path, self.size)
        return _channels_first(self.change(image, path) if self.change else image)


class CachedBatches:
    """The batches of `TrainBatches`, in the sampler's order, from uint8 arrays on a device."""

    def __init__(self, data, sampler, device):
        self.sampler, self.device = sampler, device
        self.images = [_on_device(array, device) for array in (data.visible, data.infrared)]
        self.labels = torch.from_numpy(data.visible_labels).to(device)

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        # The draws of the whole epoch in one copy: a copy for each batch would wait for the device.
        for indices in torch.from_numpy(np.array([*self.sampler])).to(self.device):
            visible, infrared = (images[i].movedim(-1, -3) for images, i in zip(self.images, indices, strict=True))
            yield visible, infrared, self.labels[indices[0]]


def _on_device(array, device):
    """Copy a memory-mapped array to a device in blocks, so that the host's memory never holds all of it."""
    copy = torch.empty(array.shape, dtype=torch.uint8, device=device)
    for start in progress(range(0, len(array), UPLOAD_BLOCK), desc=f"images to {device}", leave=False):
        block = slice(start, start + UPLOAD_BLOCK)
        copy[block] = torch.from_numpy(np.array(array[block])).to(device)
    return copy


CACHES = ("auto", "gpu", "ram", "disk")


def train_loader(data, sampler, workers, device="cpu", cache="disk"):
    """Batches of an epoch, in the sampler's order; iterate over it once an epoch.

    cache: where the images are kept. "disk": in their files, memory-mapped; "ram": in memory; for both, `workers`
    persistent loading processes make the batches. "gpu": on the device, without processes. "auto": "gpu" if the images
    take at most a quarter of the free memory of a CUDA device, else "disk".

    Raises InputError for "gpu" without a GPU, or for images that take more than half of its free memory: the rest is
    for the training.
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
        # Starting the processes draws a number. The global generator is for augmentation only, whose draws must not
        # depend on when, or whether, processes start.
        generator=torch.Generator(),
        **options,
    )


def eval_loader(paths, size, batch_size, workers, change=None):
    """Batches uint8 [B, 3, H, W] of the files, in their order. change: of `ImageFiles`.

    Processes take turns; `loader.rows` are those of this one. A process without a batch gets the first image, so that
    its features have the right shape. Raises InputError for a missing file, before the first batch.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise missing_image(path)
    every = torch.arange(len(paths)).split(batch_size)
    batches = [rows.tolist() for rows in every[process_index() :: process_count()]]
    loader = DataLoader(ImageFiles(paths, size, change), batch_sampler=batches or [[0]], **worker_options(workers))
    loader.rows = [row for batch in batches for row in batch]
    return loader


def worker_options(workers):
    """The options of a DataLoader with this many loading processes, at most one a core."""
    on_gpu = torch.cuda.is_initialized()  # by `utils.select_device`, unless --gpu is cpu
    return {"num_workers": min(workers, cores()), "pin_memory": on_gpu, "worker_init_fn": begin_loading}


def _channels_first(array):
    """uint8 [..., H, W, 3] -> tensor [..., 3, H, W], a view in the memory order of channels_last."""
    return torch.from_numpy(array).movedim(-1, -3)
