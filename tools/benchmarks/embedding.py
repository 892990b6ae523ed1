"""Images embedded per second, from files, by PyTorch and by ONNX Runtime; of a trained network also the Rank-1."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.checkpoint import save_checkpoint
from data_loader import ImageFiles
from datasets import sysu_searches
from model import GFMNet
from testing import engine
from testing.results import scores
from tools.embedder import Embedder

CALIBRATION = 32  # images of each modality


def bench_embed(args, _):
    """A random network embeds smooth random images; with --resume, a trained one those of its data's test.

    int8 is calibrated on the first images of each modality.
    """
    with tempfile.TemporaryDirectory() as folder:
        if args.resume:
            checkpoint, test = args.resume, sysu_searches(args.data_path)
            paths, searches = test.paths, test.searches
        else:
            checkpoint, paths, searches = save_random(args, folder), {"visible": draw_images(args, folder)}, []
        kinds = embedders(args, checkpoint, paths, folder)
        times, features = {name: [] for name in kinds}, {}
        for _ in range(args.repeats):
            for name, by_modality in kinds.items():  # by turns
                start = time.perf_counter(), time.process_time()
                features[name] = {m: embedder(paths[m], m) for m, embedder in by_modality.items()}
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    results, images = {}, sum(map(len, paths.values()))
    for name, turns in times.items():
        seconds, cpu = np.median(turns, axis=0) / images
        exact = features["PyTorch float32"]
        cosine = min(float((values * exact[m]).sum(axis=1).min()) for m, values in features[name].items())
        results[name] = {"seconds": seconds, "cpu_seconds": cpu, "cosine": cosine}
        rate = f"{1 / seconds:.1f} images/s, {1 / cpu:.1f} per second of a core"
        print(f"{name}: {rate}; smallest cosine with float32 {cosine:.4f}")
        if searches:
            results[name]["Rank-1"] = rank_1(features[name], searches)
            print(f"{name}: Rank-1 {results[name]['Rank-1']:.2f}")
    return {"by_kind": results}


def rank_1(features, searches):
    """The mean over searches, in percent."""
    features = {modality: {"FC": torch.from_numpy(values)} for modality, values in features.items()}
    return float(np.mean([scores(engine.run_search(features, s)["FC", "none"])["Rank-1"] for s in searches]))


def embedders(args, checkpoint, paths, folder):
    """-> {name: {modality: Embedder}}."""
    from tools import export  # only here: the other benchmarks need no ONNX

    options = {"gpu": args.gpu, "batch": args.batch, "workers": args.workers}
    float32, bf16 = (Embedder(checkpoint, amp=amp, **options) for amp in ("off", "bf16"))
    exact, quantised = {}, {}
    for file in export.main(["--resume", checkpoint, "--format", "onnx", "--modality", *paths, "--out", folder]):
        modality, int8 = file["modality"], f"{folder}/{file['modality']}_int8.onnx"
        quantise(file["path"], int8, ImageFiles(paths[modality][:CALIBRATION], float32.size))
        exact[modality], quantised[modality] = Embedder(file["path"], **options), Embedder(int8, **options)
    return {
        "PyTorch float32": dict.fromkeys(paths, float32),
        "PyTorch bf16": dict.fromkeys(paths, bf16),
        "ONNX Runtime float32": exact,
        "ONNX Runtime int8": quantised,
    }


def save_random(args, folder):
    """Write a checkpoint of an untrained network -> its path."""
    torch.manual_seed(0)
    net = GFMNet(num_classes=4, arch=args.arch)
    content = {"net": net.state_dict(), "options": net.options, "image_size": [args.img_h, args.img_w], "args": {}}
    save_checkpoint(content, f"{folder}/net.t")
    return f"{folder}/net.t"


def draw_images(args, folder):
    """Write smooth random JPEGs of the network's size -> their paths."""
    rng, paths = np.random.default_rng(0), []
    for number in range(args.images):
        small = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
        paths.append(str(Path(folder, f"{number}.jpg")))
        small.resize((args.img_w, args.img_h), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def quantise(source, target, images):
    """Write an ONNX file of tools.export with weights and activations in int8, calibrated on uint8 images [3, H, W]."""
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self.inputs = ({"images": images[i][None].numpy()} for i in range(len(images)))

        def get_next(self):
            return next(self.inputs, None)

    quantization.quantize_static(source, target, Images(), per_channel=True)
    model = onnx.load(target)
    if not model.metadata_props:
        model.metadata_props.extend(onnx.load(source).metadata_props)
        onnx.save(model, target)
