"""heat_share.py: shares against hand-worked maps, and the whole command on drawn people."""

import json

import numpy as np
import pytest
import torch

import ChannelAug
import testa
from conftest import save_network
from core.images import read_image
from tools import demo_data, heat_share
from utils import InputError


def test_share_of_hand_worked_maps():
    mask = np.zeros((32, 32), np.float32)
    mask[:16] = 1  # the upper half
    assert heat_share.share(np.ones((2, 2), np.float32), mask) == pytest.approx(0.5)
    assert heat_share.share(mask, mask) == pytest.approx(1)
    assert heat_share.share(1 - mask, mask) == pytest.approx(0)
    assert heat_share.share(np.zeros((2, 2), np.float32), mask) == pytest.approx(0.5)
    # Three parts above, one below; interpolated linearly, rows run 3 (8 times), then down to 1, then 1 (8 times).
    rows = np.concatenate([np.full(8, 3), 3 - (np.arange(16) + 0.5) / 8, np.full(8, 1)])
    heat = np.array([[3, 3], [1, 1]], np.float32)
    assert heat_share.share(heat, mask) == pytest.approx(rows[:16].sum() / rows.sum())


def test_whole_command(tmp_path):
    tree, out = tmp_path / "people", tmp_path / "heat.json"
    demo_data.main(["--out", str(tree), "--ids", "8", "--images", "1", "--masks"])
    checkpoint = save_network(tmp_path / "net.t", seed=1)
    flags = ["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint), "--queries", "2"]
    found = heat_share.main([*flags, "--json", str(out), "--workers", "0"])
    rows, rank_1 = found["shares"], found["Rank-1"]
    assert {name: json.loads(out.read_text())[name] for name in found} == found
    names = {(row["network"], row["map"]) for row in rows}
    maps = {(network, name) for network in ("untrained", "trained") for name in ("similarity", "attention")}
    assert names == maps | {("-", "area"), ("-", "coarse mask")}
    shares = {(row["map"], row["modality"]): row["mean"] for row in rows if row["network"] == "-"}
    for modality in ("visible", "infrared"):
        assert 5 < shares["area", modality] < shares["coarse mask", modality] < 100
    assert all(row["images"] == 2 and 0 < row["mean"] < 100 for row in rows)
    test = ["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint), "--workers", "0"]
    (row,) = [row for row in testa.main(test) if row["feature"] == "FC"]
    assert rank_1["image"] == pytest.approx(row["per_trial"][0]["metrics"]["Rank-1"])
    assert {*rank_1} == {"image", "person", "background"}


def test_masked_images_hide_what_they_should(tmp_path, monkeypatch):
    """What the network sees: a pixel of the person or of the background, or the mean colour."""
    tree = tmp_path / "people"
    demo_data.main(["--out", str(tree), "--ids", "8", "--images", "1", "--masks"])
    checkpoint = save_network(tmp_path / "net.t", seed=1)
    seen = []

    def embedding(*_):
        def embed(images, modality):
            seen.append(images.float().mean(dim=1))
            return {name: torch.ones(len(images), 2) for name in ("POOL", "FC")}

        return embed

    flags = ["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint), "--queries", "1", "--workers", "0"]
    args = heat_share.get_args_parser().parse_args(flags)
    tested = heat_share.embed_test(args, args.resume)
    monkeypatch.setattr(heat_share.engine, "network_embedding", embedding)
    pictures = {}
    for shown in ("person", "background"):
        seen.clear()
        heat_share.masked_features(tested, args, shown)
        pictures[shown] = torch.cat(seen)
    paths = [path for paths in tested.paths.values() for path in paths]
    pictures["image"] = torch.stack([torch.from_numpy(read_image(p, tested.size)).float().mean(dim=2) for p in paths])
    mean = 255 * sum(ChannelAug.MEAN) / 3
    torch.testing.assert_close(pictures["person"] + pictures["background"], pictures["image"] + mean, atol=1.5, rtol=0)
    assert (pictures["person"] - mean).abs().lt(1).float().mean() > 0.4  # most of an image is background


def test_data_without_masks_is_refused(tmp_path):
    tree = tmp_path / "people"
    demo_data.main(["--out", str(tree), "--ids", "8", "--images", "1"])
    checkpoint = save_network(tmp_path / "net.t", seed=1)
    with pytest.raises(InputError, match="masks.*--masks"):
        heat_share.main(["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint), "--workers", "0"])
