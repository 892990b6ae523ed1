"""Features of image files by a trained network: a checkpoint, or an ONNX file of tools.export."""

import json
import os
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from ChannelAug import normalise
from core.checkpoint import load_with_sha256
from core.files import is_regular
from core.formats import ImageSize, checked
from core.images import resized
from data_loader import ImageFiles, worker_options
from model import FEATURES, MODALITIES, load_network
from testing import engine
from utils import AMP, InputError, computes_bf16, progress, select_device


class ExportedFile(TypedDict):
    """What is read of the metadata of a file of tools.export."""

    image_size: ImageSize
    options: dict[str, bool | int | str]  # of the `GFMNet`
    modality: Literal[MODALITIES]
    feature: Literal[FEATURES]
    input: Literal["uint8", "normalised"]
    sha256: str  # of the checkpoint


class Embedder:
    """Features of image files by a checkpoint, or by an .onnx file of tools.export, which embeds one modality.

    feature: "FC" or "POOL"; gpu: number of the GPU, or "cpu" (ONNX files run on the CPU); batch: images per batch;
    workers: processes that decode images when there is more than one batch; amp: "off", "bf16", or None for bf16 where
    it is faster (not for ONNX files, which have their precision).

    Attributes: size (height, width) of the images, dim (C), feature, modalities, and sha256 of the checkpoint's file
    (of an ONNX file: of the checkpoint that it was made from). Raises InputError for files and values that cannot be
    used.
    """

    def __init__(self, path, feature="FC", gpu="0", batch=64, workers=4, amp=None):
        for name, value, known in (("feature", feature, FEATURES), ("amp", amp, (*AMP, None))):
            if value not in known:
                raise InputError(f"{name} {value!r}: pass one of {', '.join(map(repr, known))}")
        if batch < 1 or workers < 0:
            raise InputError(f"batch {batch}, workers {workers}: pass at least 1 image per batch and 0 workers")
        self.path, self.feature, self.batch, self.workers = Path(path), feature, batch, workers
        if not is_regular(self.path):
            raise InputError(f"{path}: no such file; pass a checkpoint or an .onnx file of tools.export")
        if self.path.suffix == ".safetensors":
            raise InputError(f"{path}: search cannot read .safetensors files; pass the checkpoint or an .onnx file")
        if self.path.suffix == ".onnx":
            self._load_onnx()
        else:
            self._load_checkpoint(gpu, amp)

    def _load_checkpoint(self, gpu, amp):
        device = select_device(str(gpu))
        amp = amp or ("bf16" if computes_bf16(device) else "off")
        checkpoint, self.sha256 = load_with_sha256(self.path)
        net, self.size = load_network(checkpoint, self.path)
        embed = engine.network_embedding(net.to(device, memory_format=torch.channels_last), device, normalise, amp)
        self._embed = lambda images, modality: embed(images, modality)[self.feature].cpu().numpy()
        self.dim, self.modalities = net.feature_widths[self.feature], MODALITIES

    def _load_onnx(self):
        import onnxruntime  # only here: a checkpoint does not need it

        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors, not warnings
            session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
            about = json.loads(session.get_modelmeta().custom_metadata_map["gfmnet"])
            about = checked(about, ExportedFile, self.path, "export it again")
            height, width = about["image_size"]
            prepare = {"uint8": lambda images: images, "normalised": normalise}[about["input"]]
            self.size, self.sha256, self.modalities = (height, width), about["sha256"], (about["modality"],)

            def embed(images, _):
                try:
                    values = session.run(["features"], {"images": prepare(images).contiguous().numpy()})[0]
                    if values.dtype != np.float32 or values.ndim != 2 or len(values) != len(images):
                        raise ValueError(f"{len(images)} images have features {values.dtype} {list(values.shape)}")
                except Exception as error:
                    raise self._not_exported(error) from error
                return values

            self._embed = embed
            self.dim = embed(torch.zeros(2, 3, height, width, dtype=torch.uint8), None).shape[1]
            feature = about["feature"]
        except InputError:
            raise
        except Exception as error:
            raise self._not_exported(error) from error
        if feature != self.feature:
            raise InputError(
                f"{self.path}: gives {feature} features, not {self.feature}; pass the file of {self.feature} features"
            )

    def _not_exported(self, error):
        """An InputError for what onnxruntime raises, which is anything, of files of others and damaged ones."""
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return InputError(f"{self.path}: not an ONNX file of tools.export ({reason}); export it again")

    def __call__(self, paths, modality):
        """Image files of one modality, "visible" or "infrared" -> float32 [N, C], of unit length.

        Raises InputError for a file that cannot be read.
        """
        files = (str, os.PathLike)
        paths = None if isinstance(paths, files) else [*paths]
        if paths is None or not all(isinstance(path, files) for path in paths):
            raise InputError("Embedder: takes a list of image files; embed_crops takes arrays")
        features = np.empty((len(paths), self.dim), np.float32)
        for path in paths:
            if not os.path.isfile(path):
                kind = "is a folder; pass its images" if os.path.isdir(path) else "no such image; pass an existing file"
                raise InputError(f"{path}: {kind}")
        for rows, values, unreadable in self.batches(paths, modality):
            if unreadable:
                raise InputError(unreadable[0])
            features[rows] = values
        return features

    @torch.inference_mode()
    def embed_crops(self, crops, modality, colours):
        """What a tracker cuts out: a list of uint8 arrays [H, W, 3] of any sizes, of one modality -> float32 [N, C], of
        unit length, as of the same images in files.

        colours: "RGB" or "BGR", the order of the channels (OpenCV and most trackers have BGR). Raises InputError for
        arrays of another kind.
        """
        self._check_modality(modality)
        if colours not in ("RGB", "BGR"):
            raise InputError(f"colours {colours!r}: pass 'RGB' or 'BGR', the order of the channels of the crops")
        crops, images = [*crops], []
        features = np.empty((len(crops), self.dim), np.float32)
        for row, crop in enumerate(crops):
            if not isinstance(crop, np.ndarray) or crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3:
                about = f"{crop.dtype} {list(crop.shape)}" if isinstance(crop, np.ndarray) else type(crop).__name__
                raise InputError(f"crop {row}: is {about}, not a uint8 array [H, W, 3]; convert it")
            if not crop.size:
                raise InputError(f"crop {row}: is empty, {crop.shape[0]} x {crop.shape[1]}; leave it out")
            crop = crop if colours == "RGB" else crop[:, :, ::-1]
            images.append(resized(Image.fromarray(np.ascontiguousarray(crop)), self.size))
        for start in range(0, len(images), self.batch):
            batch = torch.from_numpy(np.stack(images[start : start + self.batch])).permute(0, 3, 1, 2)
            features[start : start + self.batch] = self._finite(batch, modality)
        return features

    @torch.inference_mode()
    def batches(self, paths, modality):
        """Yields for each batch: rows [B], features float32 [B, C], and a line for each file that cannot be read."""
        self._check_modality(modality)
        # One batch is decoded here: starting a process takes longer, and threads of the web page must not fork.
        options = worker_options(self.workers if len(paths) > self.batch else 0)
        loader = DataLoader(_Images(paths, self.size), batch_size=self.batch, collate_fn=_collate, **options)
        with progress(total=len(paths), desc=f"embedding {modality}", unit="img", leave=False) as bar:
            for rows, images, unreadable in loader:
                features = self._finite(images, modality) if rows else np.empty((0, self.dim), np.float32)
                yield rows, features, unreadable
                bar.update(len(rows) + len(unreadable))

    def _check_modality(self, modality):
        if modality not in self.modalities:
            file = "the .onnx file of the same checkpoint for them" if modality in MODALITIES else "one of these names"
            raise InputError(
                f"{self.path}: embeds {' and '.join(self.modalities)} images, not {modality} ones; pass {file}"
            )

    def _finite(self, images, modality):
        features = self._embed(images, modality)
        if not np.isfinite(features).all():
            raise InputError(f"{self.path}: its {self.feature} features are not finite; train at a lower --lr")
        return features


class _Images(ImageFiles):
    """Image files; for one that cannot be read, the line that says so."""

    def __getitem__(self, index):
        try:
            return index, super().__getitem__(index)
        except InputError as error:
            return index, str(error)


def _collate(items):
    """-> (rows, uint8 [B, 3, H, W] or None, lines on files that cannot be read)."""
    readable = [(row, image) for row, image in items if not isinstance(image, str)]
    images = default_collate([image for _, image in readable]) if readable else None
    return [row for row, _ in readable], images, [line for _, line in items if isinstance(line, str)]
