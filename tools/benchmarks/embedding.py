"""Images embedded per second, from files, by PyTorch and by ONNX Runtime."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.checkpoint import save_checkpoint
from model import GFMNet
from tools.embedder import Embedder


def bench_embed(args, _):
    """A random network embeds smooth random images; int8 is calibrated on the first 32 of them."""
    from tools import export  # only here: the other benchmarks need no ONNX

    with tempfile.TemporaryDirectory() as folder:
        paths = draw_images(args, folder)
        torch.manual_seed(0)
        net = GFMNet(num_classes=4, arch=args.arch)
        content = {"net": net.state_dict(), "options": net.options, "image_size": [args.img_h, args.img_w], "args": {}}
        save_checkpoint(content, f"{folder}/net.t")
        flags = ["--resume", f"{folder}/net.t", "--format", "onnx", "--modality", "visible", "--out", folder]
        (exported,) = export.main(flags)
        quantised = f"{folder}/int8.onnx"
        quantise(exported["path"], quantised, paths[:32])
        options = {"gpu": args.gpu, "batch": args.batch, "workers": args.workers}
        runs = {
            "PyTorch float32": Embedder(f"{folder}/net.t", amp="off", **options),
            "PyTorch bf16": Embedder(f"{folder}/net.t", amp="bf16", **options),
            "ONNX Runtime float32": Embedder(exported["path"], **options),
            "ONNX Runtime int8": Embedder(quantised, **options),
        }
        times, features = {name: [] for name in runs}, {}
        for _ in range(args.repeats):
            for name, embedder in runs.items():  # by turns
                start = time.perf_counter(), time.process_time()
                features[name] = embedder(paths, "visible")
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    results = {}
    for name, turns in times.items():
        seconds, cpu = np.median(turns, axis=0) / len(paths)
        cosine = float((features[name] * features["PyTorch float32"]).sum(axis=1).min())
        results[name] = {"seconds": seconds, "cpu_seconds": cpu, "cosine": cosine}
        rate = f"{1 / seconds:.1f} images/s, {1 / cpu:.1f} per second of a core"
        print(f"{name}: {rate}; smallest cosine with float32 {cosine:.4f}")
    return {"by_kind": results}


def draw_images(args, folder):
    """Write smooth random JPEGs of the network's size -> their paths."""
    rng, paths = np.random.default_rng(0), []
    for number in range(args.images):
        small = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
        paths.append(str(Path(folder, f"{number}.jpg")))
        small.resize((args.img_w, args.img_h), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def quantise(source, target, paths):
    """Write an ONNX file of tools.export with weights and activations in int8, calibrated on images."""
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            arrays = (np.asarray(Image.open(path)).transpose(2, 0, 1)[None] for path in paths)
            self.inputs = ({"images": array} for array in arrays)

        def get_next(self):
            return next(self.inputs, None)

    quantization.quantize_static(source, target, Images(), per_channel=True)
    model = onnx.load(target)
    if not model.metadata_props:
        model.metadata_props.extend(onnx.load(source).metadata_props)
        onnx.save(model, target)
