"""The examples of docs/extending.md do what the page says, without any other change."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import ChannelAug
import datasets
import model
from methods import METHODS, MethodLoss

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def example(words, module):
    """The names that the block of code with these words defines at the end of a module."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if words in block]
    namespace = dict(vars(module))
    exec(block, namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "function"), [("regnet_y_400mf", "regnet"), ("vit_b_16", "vit")])
def test_backbone(arch, function, monkeypatch, tmp_path):
    monkeypatch.setitem(model.ARCHS, arch, example(f"def {function}(", model)[function])
    weights = torchvision.models.get_model(arch).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    net = model.GFMNet(5, arch, weights=tmp_path / "w.pt")
    assert (
        len({value.data_ptr() for value in net.state_dict().values()} & {v.data_ptr() for v in weights.values()}) == 0
    )
    output = net(torch.randn(2, 3, 96, 48), torch.randn(1, 3, 96, 48))
    assert output.pooled.shape == (3, net.feature_widths["POOL"])
    assert output.local.shape == (3, 128, 2)  # 6 rows: a sixteenth of the height
    model.GFMNet(**net.options).load_state_dict(net.state_dict())


@pytest.mark.slow
def test_the_transformer_computes_what_torchvision_s_does():
    """All but the class token, which no other token sees here."""
    network = torchvision.models.vit_b_16().eval()
    backbone = example("def vit(", model)["vit"](network)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = network._process_input(images) + network.encoder.pos_embedding[:, 1:]
        expected = network.encoder.ln(network.encoder.layers(tokens))
        maps = backbone.stem["patches"](images)
        for stage in backbone.stages:
            for block in stage:
                maps = block(maps)
    torch.testing.assert_close(maps.flatten(2).mT, expected)


# Before anything else is imported, as flags and formats take the names of data sets from the table.
MINE = """
import contextlib, sys
import datasets
file, tree, out = sys.argv[1:]
exec(open(file).read(), vars(datasets))
import testa, train_ext_test0, utils
from tools import check_data
known = ["--dataset", "mine", "--data_path", tree, "--gpu", "cpu", "--workers", "0"]
small = ["--arch", "resnet18", "--weights", "none", "--img_h", "48", "--img_w", "16", "--epochs", "1", "--lr", "0.001"]
folders = ["--model_path", out, "--log_path", out]
result = train_ext_test0.main([*known, *small, *folders])
for more in ([], ["--tvsearch"]):
    row, *_ = testa.main([*known, "--resume", result["last"], *more])
    print("", row["direction"] + " " + row["protocol"], sep="\\n")
with contextlib.suppress(utils.InputError):
    check_data.main(known)
"""


@pytest.mark.slow
def test_data_set(llcm_tree, tmp_path):
    """Images of another layout in lists of the page's: trained, tested in both directions, and checked."""
    tree, lists = shutil.copytree(llcm_tree, tmp_path / "own"), {}
    (tree / "demo.txt").unlink()
    test = datasets.DATASETS["llcm"].searches(tree, trials=[0])
    training = datasets.DATASETS["llcm"].training(tree).values()
    for name, (paths, ids) in zip(("visible", "infrared"), training, strict=True):
        lists[f"train_{name}"] = zip(paths, ids, strict=True)
    for images in test.searches[0].query, test.searches[0].gallery:
        paths = [test.paths[images.modality][row] for row in images.rows]
        lists[f"test_{images.modality}"] = zip(paths, images.ids, strict=True)
    for name, rows in lists.items():
        lines = [f"{Path(path).relative_to(tree)} {label}" for path, label in rows]
        (tree / "idx" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (functions, entry) = re.findall(r"```python\n( *\"mine\": .*?|def mine_.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.py").write_text(f"{functions}\nDATASETS |= {{{entry}}}\nTRAINING_SETS |= DATASETS\n")
    out = subprocess.run(
        [sys.executable, "-c", MINE, tmp_path / "mine.py", tree, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr
    assert "training ids, not 300 as published" in out.stdout
    assert out.stdout.count("\ninfrared to visible fixed\n") == out.stdout.count("\nvisible to infrared fixed\n") == 1
    assert "WRONG counts" in out.stdout


def test_augmentation_and_method(monkeypatch):
    monkeypatch.setattr(ChannelAug, "AUGMENTATIONS", dict(ChannelAug.AUGMENTATIONS))
    example("random_gamma", ChannelAug)
    monkeypatch.setitem(METHODS, "adp_gamma", METHODS["adp"]._replace(augmentation="gamma"))
    images = torch.full((2, 4, 3, 48, 16), 64, dtype=torch.uint8)
    augment = ChannelAug.TrainAugmentation(rande=0, padding=0, name=METHODS["adp_gamma"].augmentation)
    visible, infrared, labels = augment(*images, torch.tensor([0, 0, 1, 1]))
    low, high = (ChannelAug.normalise(torch.full((1, 3, 1, 1), value)) for value in (255 * 0.25**2, 255 * 0.25**0.5))
    for views in (visible, infrared):
        assert low.min() - 0.05 < views.min() < views.max() < high.max() + 0.05
    assert (visible[4:] == visible[4:, :1]).all()  # one channel repeated, as GFMNet's
    net = model.GFMNet(2, "resnet18", **METHODS["adp_gamma"].network)
    losses = MethodLoss("adp_gamma")(net(visible, infrared), labels)
    assert len(visible) == 8
    assert losses.total.isfinite()
