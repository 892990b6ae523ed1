"""Exported networks: their features against plain steps, what the files hold, and which are refused."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

from conftest import SIZE
from core.images import read_image
from data_manager import process_query_sysu
from methods import METHODS
from model import GFMNet
from tests.oracles import plain_embedding, plain_network
from tools import export
from tools.benchmarks.plain import plain_features
from utils import InputError

REPO = Path(export.__file__).parent.parent
FLAGS = {"dataset": "sysu", "method": "adp", "lr": 0.1, "milestones": [20, 50]}
VARIANTS = [
    pytest.param(file, *variant, marks=pytest.mark.slow if file == "onnx" else [])
    for file in export.FORMATS
    for variant in (("uint8", "FC"), ("normalised", "POOL"))
]


def busy(net):
    """A network all of whose parts change the features: batch norms have seen data, non-local blocks do something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_mean") or (".norm." in name and values.is_floating_point()):
                values.normal_(0, 0.3)
            if name.endswith("running_var"):
                values.uniform_(0.5, 1.5)
    return net.eval()


def save(path, **options):
    net = busy(GFMNet(1000, "resnet18", **options))
    content = {"net": net.state_dict(), "options": net.options, "image_size": SIZE, "args": FLAGS, "epoch": 7}
    torch.save(content, path)
    return path


def random_images(count, size=SIZE):
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def normalised(image):
    return functional.normalize(image.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def run(path, images):
    """The features of a file, in the way of its users."""
    if path.endswith(".onnx"):
        (features,) = onnxruntime.InferenceSession(path).run(["features"], {"images": images.numpy()})
        return torch.from_numpy(features)
    return export.load_embedding(path)(images)


def assert_features(path, net, modality, size=SIZE):
    """A file gives the FC features of a network."""
    images = random_images(2, size)
    torch.testing.assert_close(run(path, images), plain_features(net, images, modality), rtol=0, atol=2e-5)


def metadata(path):
    if path.endswith(".onnx"):
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["gfmnet"])
    with safetensors.safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["gfmnet"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "adp_lr_0.1_best.t")


@pytest.fixture(scope="module")
def net(checkpoint):
    return plain_network(checkpoint)[0]


@pytest.fixture(scope="module")
def command_line(checkpoint, tmp_path_factory):
    """The defaults as ONNX, by a process that has not met the network before: (file of --json, what it printed)."""
    out = tmp_path_factory.mktemp("command_line")
    command = ["-m", "tools.export", "--resume", checkpoint, "--format", "onnx", "--out", out, "--json", out / "r.json"]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert len([*out.iterdir()]) == 3
    return out / "r.json", result.stdout


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory, request):
    """exported(format, input, feature) -> what `main` returns: both modalities for bytes, infrared for normalised."""
    out = tmp_path_factory.mktemp("exported")

    @functools.cache
    def results(file, inputs, feature):
        if (file, inputs) == ("onnx", "uint8"):
            return json.loads(request.getfixturevalue("command_line")[0].read_text())["results"]
        argv = ["--resume", str(checkpoint), "--format", file, "--input", inputs, "--feature", feature]
        modality = [] if inputs == "uint8" else ["--modality", "infrared"]
        return export.main([*argv, *modality, "--out", str(out / inputs)])

    return results


@pytest.mark.parametrize(("file", "inputs", "feature"), VARIANTS)
def test_features_are_those_of_plain_steps(exported, net, file, inputs, feature):
    images = random_images(7)
    taken = torch.stack([normalised(image) for image in images]) if inputs == "normalised" else images
    found = {}
    for result in exported(file, inputs, feature):
        expected = plain_features(net, images, result["modality"], feature)
        for count in (1, 2, 7):
            features = run(result["path"], taken[:count])
            assert features.dtype == torch.float32
            torch.testing.assert_close(features, expected[:count], rtol=0, atol=2e-5)
        assert result["cosine"] > 0.999999
        assert 0 <= result["difference"] < 2e-5
        found[result["modality"]] = features
    assert [*found] == (["visible", "infrared"] if inputs == "uint8" else ["infrared"])
    if inputs == "uint8":  # each modality has a stem of its own
        assert (found["visible"] - found["infrared"]).abs().max() > 1e-3


@pytest.mark.parametrize(("file", "inputs", "feature"), VARIANTS)
def test_files_say_what_they_hold(exported, checkpoint, net, file, inputs, feature):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for result in exported(file, inputs, feature):
        assert Path(result["path"]).name == f"adp_lr_0.1_best_{result['modality']}_{feature}.{file}"
        about = metadata(result["path"])
        options = about.pop("options")
        assert GFMNet(**options).options == options
        assert about == {
            "modality": result["modality"],
            "feature": feature,
            "input": inputs,
            "image_size": [*SIZE],
            "num_classes": 1000,
            "dataset": "sysu",
            "sha256": digest,
            "flags": FLAGS,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "epoch": 7,
        }

        # One stream and nothing else: the other one is 0.6 MB, the classifier 2 MB, the local branch 0.3 MB.
        needed = (result["modality"], "attention", "shared", *["bottleneck"] * (feature == "FC"))
        state = {name: values for name, values in net.state_dict().items() if name.startswith(needed)}
        size = sum(values.numel() for values in state.values() if values.is_floating_point()) * 4
        assert 0.99 * size < Path(result["path"]).stat().st_size < size + 200_000  # batch norms may be folded away
        if file == "safetensors":
            with safetensors.safe_open(result["path"], "pt") as content:
                assert set(content.keys()) == set(state)


@pytest.mark.slow
def test_onnx_graph(exported):
    for inputs, feature, kind in (("uint8", "FC", onnx.TensorProto.UINT8), ("normalised", "POOL", 1)):
        path = exported("onnx", inputs, feature)[0]["path"]
        model = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", export.OPSET)]
        (images,), (features,) = model.graph.input, model.graph.output
        assert (images.name, images.type.tensor_type.elem_type, features.name) == ("images", kind, "features")
        shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
        assert shape == ["batch", 3, *SIZE]
        assert str(REPO).encode() not in Path(path).read_bytes()
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(path, torch.zeros(1, 3, SIZE[0] + 16, SIZE[1]))


def test_safetensors_load_into_a_whole_network(exported):
    """Without `load_embedding`."""
    result = exported("safetensors", "uint8", "FC")[1]
    with safetensors.safe_open(result["path"], "pt") as file:
        options, state = json.loads(file.metadata()["gfmnet"])["options"], {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    net = GFMNet(**options).eval()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"visible", "classifier"}
    assert_features(result["path"], net, "infrared")


@pytest.mark.parametrize(
    ("method", "share_net", "file"),
    [pytest.param("base", 1, "onnx", marks=pytest.mark.slow), ("agw", 3, "safetensors"), ("adp", 5, "safetensors")],
)
def test_every_method_and_share_net(method, share_net, file, tmp_path):
    path = save(tmp_path / "a.t", share_net=share_net, **METHODS[method].network)
    argv = ["--resume", str(path), "--format", file, "--modality", "infrared", "--out", str(tmp_path)]
    (result,) = export.main([*argv, "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["results"] == [result]
    assert_features(result["path"], plain_network(path)[0], "infrared")


@pytest.mark.parametrize(
    ("file", "factor"), [pytest.param("onnx", 3.0, marks=pytest.mark.slow), ("safetensors", float("nan"))]
)
def test_a_file_of_other_features_does_not_take_its_name(checkpoint, tmp_path, monkeypatch, file, factor):
    class Spoiled(export.Embedding):
        def __init__(self, *args):
            super().__init__(*args)
            self.net.bottleneck.weight[:50] *= factor  # of 512

    monkeypatch.setattr(export, "Embedding", Spoiled)
    path = tmp_path / f"adp_lr_0.1_best_visible_FC.{file}"
    path.write_bytes(b"older")
    argv = ["--resume", str(checkpoint), "--format", file, "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]
    with pytest.raises(InputError, match=rf"{path.name}: not written, .*\(cosine (0\.|nan)"):
        export.main(argv)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"older"


@pytest.mark.slow
def test_a_file_without_pytorch(checkpoint, command_line, sysu_tree, tmp_path):
    """In a process that has ONNX Runtime, NumPy and Pillow only, with the line that was printed."""
    *written, line = command_line[1].splitlines()
    path = command_line[0].parent / "adp_lr_0.1_best_infrared_FC.onnx"
    assert written[1].startswith(f"{path}: 44.")
    resize = line.partition("before: ")[2]
    images = process_query_sysu(sysu_tree)[0][:3]
    code = f"""
import sys, numpy as np, onnxruntime
from PIL import Image, ImageOps
images = [{resize} for FILE in {[str(image) for image in images]}]
features = onnxruntime.InferenceSession("{path}").run(None, {{"images": np.stack(images)}})[0]
assert "torch" not in sys.modules and not any("{REPO}" == folder for folder in sys.path)
np.save("features.npy", features)
"""
    silent = {"ORT_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=silent, check=True, timeout=120)
    embed = plain_embedding(checkpoint)
    expected = np.stack([embed(image, "infrared") for image in images])
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, rtol=0, atol=2e-5)


def test_the_documented_lines_give_the_features_of_a_turned_photograph(
    checkpoint, net, sysu_tree, tmp_path, monkeypatch
):
    """Those that testa.py tests, by the snippet of the handbook and the line that the program prints."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for name, path in zip(("a.jpg", "b.jpg"), process_query_sysu(sysu_tree)[0], strict=False):
        with Image.open(path) as image:
            image.rotate(90, expand=True).save(name, exif=exif)
    images = torch.from_numpy(np.stack([read_image(name, SIZE) for name in ("a.jpg", "b.jpg")])).movedim(3, 1)
    embedding = export.Embedding(net, {"image_size": SIZE, "modality": "infrared", "feature": "FC", "input": "uint8"})
    about = types.SimpleNamespace(custom_metadata_map={"gfmnet": json.dumps({"image_size": SIZE})})
    session = types.SimpleNamespace(
        get_modelmeta=lambda: about, run=lambda _, inputs: [embedding(torch.from_numpy(inputs["images"])).numpy()]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _: session)
    names = {}
    exec(re.search(r"```python\n(import json.*?)```", (REPO / "docs/export.md").read_text(), re.S)[1], names)
    np.testing.assert_allclose(names["features"], plain_features(net, images, "infrared"), rtol=0, atol=2e-5)
    line = eval(export.RESIZE.format(*SIZE), {"FILE": "a.jpg", "Image": Image, "ImageOps": ImageOps, "np": np})
    np.testing.assert_array_equal(line, images[0])


def test_bad_input(checkpoint, tmp_path):
    text = tmp_path / "text.t"
    text.write_text("no checkpoint")
    (tmp_path / "adp_lr_0.1_best_infrared_FC.onnx").mkdir()
    cases = [
        ("absent.t", tmp_path, "absent.t: no such file"),
        (checkpoint, text / "out", "cannot write there"),
        (checkpoint, tmp_path, "infrared_FC.onnx: is a folder"),
    ]
    for source, out, words in cases:
        with pytest.raises(InputError, match=words):
            export.main(["--format", "onnx", "--resume", str(source), "--out", str(out)])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [text]


def test_json_does_not_replace_what_is_read_or_written(checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    for name in (checkpoint, tmp_path / "adp_lr_0.1_best_visible_FC.safetensors"):
        argv = ["--resume", str(checkpoint), "--format", "safetensors", "--out", str(tmp_path), "--json", str(name)]
        with pytest.raises(InputError, match="is an input or output already"):
            export.main(argv)
    assert checkpoint.read_bytes() == before
    assert not [*tmp_path.iterdir()]


def test_load_embedding_refuses_other_files(tmp_path):
    (tmp_path / "a").write_text("text")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "b")
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "c", {"gfmnet": "{}"})
    for name in "abcd":
        with pytest.raises(InputError, match=f"{name}: not a safetensors file of tools.export"):
            export.load_embedding(tmp_path / name)


def test_onnx_runtime_reports_nothing(tmp_path):
    """It would begin with the number that it gives the machine, in a file. In CI, it reports nothing anyway."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    code = "import tools.embedder, onnxruntime; onnxruntime.get_device()"
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"), str(tmp_path))
    subprocess.run([sys.executable, "-c", code], env=environment | places, check=True)
    assert not [file for file in tmp_path.rglob("*") if re.search("(?i)microsoft|onnx|device", str(file))]


def test_images_of_another_kind_are_refused():
    net, shape = GFMNet(4, "resnet18", local=False), (1, 3, 32, 16)
    for kind, good, bad in (("uint8", torch.uint8, torch.float32), ("normalised", torch.float32, torch.uint8)):
        about = {"image_size": [32, 16], "modality": "visible", "feature": "FC", "input": kind}
        embedding, images = export.Embedding(net, about), torch.zeros(shape, dtype=good)
        assert embedding(images).shape == (1, embedding.net.feature_widths["FC"])
        for wrong in (images.to(bad), images.numpy(), images[:, :1], images[0], images.mT, images[..., :8]):
            about = re.escape(
                f"images of {wrong.dtype} {list(wrong.shape)}: the file takes a tensor, {good} [B, 3, 32, 16]"
            )
            with pytest.raises(ValueError, match=about):
                embedding(wrong)


def test_options_that_ask_for_a_million_classes_take_no_memory(exported, tmp_path):
    """Their 10 TB are never asked for: a safetensors file has no classifier."""
    result = exported("safetensors", "uint8", "FC")[1]
    with safetensors.safe_open(result["path"], "pt") as file:
        about, state = json.loads(file.metadata()["gfmnet"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about["options"]["num_classes"] = 10**10
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {"gfmnet": json.dumps(about)})
    assert torch.equal(run(str(tmp_path / "a.safetensors"), images := random_images(2)), run(result["path"], images))


def test_the_default_format_is_onnx():
    assert export.get_args_parser().parse_args(["--resume", "a.t"]).format == "onnx"
