"""Images embedded per second, from files, by PyTorch and by ONNX Runtime."""

import tempfile
from functools import partial

import numpy as np
from PIL import Image

from core.checkpoint import save_checkpoint
from model import GFMNet
from tools.benchmarks.measuring import alternate
from tools.embedder import Embedder
from utils import seed_everything


def bench_embed(args, device):
    """Images embedded from files: PyTorch in float32 and bf16, ONNX Runtime; the same as arrays, as a tracker has them;
    how far the features differ."""
    from tools import export  # only here: the other benchmarks need no ONNX

    with tempfile.TemporaryDirectory() as folder:
        paths, checkpoint = draw_images(args, folder), f"{folder}/net.t"
        seed_everything(0)
        net = GFMNet(num_classes=4, arch=args.arch)
        content = {"net": net.state_dict(), "options": net.options, "image_size": [args.img_h, args.img_w], "args": {}}
        save_checkpoint(content, checkpoint)
        (exported,) = export.main(["--resume", checkpoint, "--format=onnx", "--modality=visible", "--out", folder])
        embedder = partial(Embedder, gpu="cpu", batch=args.test_batch, workers=args.workers)
        embedders = {
            "PyTorch float32": embedder(checkpoint, amp="off"),
            "PyTorch bf16": embedder(checkpoint, amp="bf16"),
            "ONNX Runtime float32": embedder(exported["path"]),
        }
        runs = {name: partial(embed, paths, "visible") for name, embed in embedders.items()}
        crops = [np.asarray(Image.open(path)) for path in paths]
        runs["arrays, PyTorch bf16"] = partial(embedders["PyTorch bf16"].embed_crops, crops, "visible", "RGB")
        features, times = [run() for run in runs.values()], alternate([*runs.values()], args.repeats, device)
        results = {}
        for name, own, seconds in zip(runs, features, times, strict=True):
            cosine = float((own * features[0]).sum(axis=1).min())
            results[name] = {"images_per_second": len(paths) / seconds, "cosine": cosine}
            print(f"{name}: {len(paths) / seconds:.1f} images/s; smallest cosine to float32 {cosine:.4f}")
    return {"by_kind": results}


def draw_images(args, folder):
    """Write smooth random JPEGs of the network's size -> their paths."""
    rng, paths = np.random.default_rng(0), [f"{folder}/{number}.jpg" for number in range(args.images)]
    for path in paths:
        small = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
        small.resize((args.img_w, args.img_h), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths
