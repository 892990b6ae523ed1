"""Export the embedding network of a checkpoint, one file per modality, as ONNX or safetensors.

    python -m tools.export --resume save_model/..._best.t

An ONNX file needs nothing of this repo. Its input "images" is [B, 3, H, W], with the network's H and W and any B; its
output "features" is [B, C], float32, of unit length: the features that testa.py tests, averaged over image and mirror.
Resize images before, as RESIZE does. A safetensors file holds weights under GFMNet's names; `load_embedding` reads it.

Each file contains JSON named "gfmnet" (in metadata_props or metadata): modality, feature, input, and what
`checkpoint_metadata` gives. It takes its name only after it has been loaded and its features agree with the
checkpoint's.
"""

import copy
import json
import logging
import os
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ChannelAug import MEAN, STD, normalise
from core.checkpoint import find_checkpoint, load_with_sha256
from core.files import atomic, check_output, save_json
from core.formats import checked
from model import FEATURES, MODALITIES, GFMNet, load_network
from testing import engine
from tools.embedder import ExportedFile
from utils import ArgumentParser, InputError, cli, progress

UPRIGHT = 'ImageOps.exif_transpose(Image.open(FILE)).convert("RGB")'
RESIZE = f"np.asarray({UPRIGHT}.resize(({{1}}, {{0}}), Image.Resampling.LANCZOS)).transpose(2, 0, 1)"
OPSET = 18  # the exporter writes this one without a conversion
COSINE = 0.9999  # smallest allowed cosine between a file's features and the checkpoint's
BATCHES = (1, 5)  # sizes of the batches that verify a file


def get_args_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--resume", required=True, help="checkpoint: a path, or a name under --model_path")
    parser.add_argument("--model_path", default="save_model/", help="folder of the checkpoints")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="file format")
    parser.add_argument("--modality", nargs="+", choices=MODALITIES, default=MODALITIES, help="one file for each")
    parser.add_argument("--feature", choices=FEATURES, default="FC", help="after the bottleneck, or before (POOL)")
    text = "bytes, or float32: (bytes / 255 - mean) / std of ImageNet"
    parser.add_argument("--input", choices=("uint8", "normalised"), default="uint8", help=text)
    parser.add_argument("--out", default="exported/", help="folder of the files")
    parser.add_argument("--json", metavar="FILE", help="write the results of the verification to this file")
    return parser


def main(argv=None):
    """Returns the verification: a list of {"path", "modality", "cosine" (smallest), "difference" (largest)}."""
    args = get_args_parser().parse_args(argv)
    source = find_checkpoint(args.resume, args.model_path)
    suffix, to_bytes, load = FORMATS[args.format]
    outputs = {m: Path(args.out, f"{source.stem}_{m}_{args.feature}{suffix}") for m in args.modality}
    for output in outputs.values():
        check_output(output)
    if args.json:
        if os.path.realpath(args.json) in map(os.path.realpath, (source, *outputs.values())):
            raise InputError(f"--json {args.json}: is an input or output already; choose another file")
        check_output(args.json)
    checkpoint, sha256 = load_with_sha256(source)
    net, size = load_network(checkpoint, source)
    embed = engine.network_embedding(net, torch.device("cpu"), normalise)
    shared = checkpoint_metadata(checkpoint, net, size) | {"sha256": sha256}
    shared |= {"feature": args.feature, "input": args.input}

    results = []
    for modality, output in progress(outputs.items(), desc="exporting", unit="file", leave=False):
        about = shared | {"modality": modality}
        text = json.dumps(about)
        pairs = expected(embed, about)
        with atomic(output) as temporary, warnings.catch_warnings(action="ignore"):  # PyTorch's, about future changes
            temporary.write_bytes(to_bytes(Embedding(net, about), pairs[-1][0], text))
            cosine, difference = agreement(load(temporary), pairs)
            if not cosine >= COSINE:  # NaN is not
                raise InputError(
                    f"{output}: not written, because its features differ from the checkpoint's (cosine {cosine:.6f}, "
                    f"below {COSINE}); use another --format, and report this"
                )
        results.append({"path": str(output), "modality": modality, "cosine": cosine, "difference": difference})
    if args.json:
        save_json({"flags": vars(args), "torch": torch.__version__, "results": results}, args.json)
    for result in results:
        print(
            f"{result['path']}: {os.path.getsize(result['path']) / 1e6:.1f} MB, {result['modality']}, {args.feature}; "
            f"against the checkpoint, in batches of {' and '.join(map(str, BATCHES))}: smallest cosine "
            f"{result['cosine']:.7f}, largest difference {result['difference']:.1e}"
        )
    print(f"input: {args.input} [B, 3, {size[0]}, {size[1]}]; resize an 8-bit image before: {RESIZE.format(*size)}")
    return results


def checkpoint_metadata(checkpoint, net, size):
    """The metadata that all files of a checkpoint share. A published checkpoint has no flags; mean and std are of
    values in [0, 1]."""
    flags = checkpoint.get("args", {})
    return {
        "image_size": list(size),  # height, width
        "num_classes": net.options["num_classes"],
        "options": net.options | {"local": False},
        "dataset": flags.get("dataset"),
        "epoch": checkpoint.get("epoch"),
        "flags": flags,
        "mean": MEAN,
        "std": STD,
    }


class Embedding(nn.Module):
    """A copy of one stream of a GFMNet without unused parts, as a network of images [B, 3, H, W].

    about: {"image_size", "modality", "feature", "input"}. Gives the features of `engine.network_embedding`.
    """

    def __init__(self, net, about):
        super().__init__()
        self.net, self.modality = copy.deepcopy(net), about["modality"]
        self.dtype = torch.uint8 if about["input"] == "uint8" else torch.float32
        self.size = tuple(about["image_size"])
        self.row = FEATURES.index(about["feature"])
        (other,) = set(MODALITIES) - {self.modality}
        for name in (other, "classifier", "local", "domain"):
            setattr(self.net, name, None)
        if self.net.twins is not None:
            del self.net.twins[other]
        thirds = self.net.thirds
        if thirds is not None:
            thirds.classifiers = None
        if about["feature"] == "POOL":
            self.net.bottleneck = nn.Identity()
            if thirds is not None:
                thirds.bottlenecks = nn.ModuleList(nn.Identity() for _ in thirds.bottlenecks)
        self.eval().requires_grad_(False)

    def forward(self, images):
        if (images.dtype, images.shape[1:]) != (self.dtype, (3, *self.size)):
            wanted = f"a tensor, {self.dtype} [B, 3, {self.size[0]}, {self.size[1]}]"
            raise ValueError(f"images of {images.dtype} {list(images.shape)}: the file takes {wanted}")
        images = normalise(images) if self.dtype == torch.uint8 else images
        # Image and mirror in one batch: with two passes, the graph would contain the network twice.
        both = self.net.embed(torch.cat([images, images.flip(3)]), self.modality)[self.row]
        return F.normalize(both.unflatten(0, (2, -1)).sum(dim=0))


def to_onnx(embedding, images, about):
    """-> bytes of an ONNX file. images: a batch of more than one, otherwise the exporter fixes its size."""
    import onnx  # this and others only where they are needed, as not everybody has them

    # PyTorch 2.6 warns of what it guesses about the batch; `agreement` checks two sizes of it.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    program = torch.onnx.export(
        embedding,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props["gfmnet"] = about
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"  # PyTorch 2.6 names it anew
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def load_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def to_safetensors(embedding, _, about):
    """-> bytes of a safetensors file. Its weights also load into the GFMNet of `options`, with strict=False."""
    from safetensors.torch import save

    return save(embedding.net.state_dict(), {"gfmnet": about})


def load_embedding(path):
    """A safetensors file of this program -> its `Embedding`. Raises InputError for any other file."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            about = checked(json.loads(file.metadata()["gfmnet"]), ExportedFile, path, "export it again")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        with torch.device("meta"):  # the options may ask for a million classes
            embedding = Embedding(GFMNet(**about["options"], weights=None), about)
        embedding.to_empty(device="cpu").net.load_state_dict(state)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a safetensors file of tools.export ({error}); export it again") from error
    return embedding


FORMATS = {"onnx": (".onnx", to_onnx, load_onnx), "safetensors": (".safetensors", to_safetensors, load_embedding)}


@torch.inference_mode()
def expected(embed, about):
    """Batches of random bytes and of smooth random images, as a file takes them, with their features [B, C]."""
    pairs, generator = [], torch.Generator().manual_seed(0)
    for count in BATCHES:
        noise = torch.randint(256, (count, 3, *about["image_size"]), dtype=torch.uint8, generator=generator)
        smooth = F.interpolate(noise[..., :8, :4].float(), about["image_size"], mode="bilinear").byte()
        for images in (noise, smooth):
            features = embed(images, about["modality"])[about["feature"]]
            pairs.append((images if about["input"] == "uint8" else normalise(images), features))
    return pairs


@torch.inference_mode()
def agreement(run, pairs):
    """run: images -> features. -> (smallest cosine of an image's two features, largest difference of two values)."""
    actual = torch.cat([run(images) for images, _ in pairs])
    features = torch.cat([features for _, features in pairs])
    return F.cosine_similarity(actual, features).min().item(), (actual - features).abs().max().item()


if __name__ == "__main__":
    cli(main)
