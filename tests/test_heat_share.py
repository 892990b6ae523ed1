"""heat_share.py: shares against hand-worked maps, and the whole command on drawn people."""

import json

import numpy as np
import pytest
import torch

import ChannelAug
import testa
from conftest import save_network, search_flags
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


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The flags that test a random network on people with masks."""
    folder = tmp_path_factory.mktemp("masked")
    demo_data.main(["--out", str(folder / "people"), "--ids", "8", "--images", "1", "--masks"])
    return search_flags(folder / "people", save_network(folder / "net.t", seed=1))


def test_whole_command(command, tmp_path):
    out = tmp_path / "heat.json"
    found = heat_share.main([*command, "--queries", "2", "--json", str(out)])
    rows, rank_1 = found["shares"], found["Rank-1"]
    assert {name: json.loads(out.read_text())[name] for name in found} == found
    names = {(row["network"], row["map"]) for row in rows}
    maps = {(network, name) for network in ("untrained", "trained") for name in ("similarity", "attention")}
    assert names == maps | {("-", "area"), ("-", "coarse mask")}
    shares = {(row["map"], row["modality"]): row["mean"] for row in rows if row["network"] == "-"}
    for modality in ("visible", "infrared"):
        assert 5 < shares["area", modality] < shares["coarse mask", modality] < 100
    assert all(row["images"] == 2 and 0 < row["mean"] < 100 for row in rows)
    (row,) = [row for row in testa.main(command) if row["feature"] == "FC"]
    assert rank_1["image"] == pytest.approx(row["per_trial"][0]["metrics"]["Rank-1"])
    assert {*rank_1} == {"image", "person"}


def test_masked_images_hide_what_they_should(command, monkeypatch):
    """What the network sees: the image where the person is, and the mean colour elsewhere."""
    seen = []

    def embedding(*_):
        def embed(images, modality):
            seen.append(images.float().mean(dim=1))
            return {name: torch.ones(len(images), 2) for name in ("POOL", "FC")}

        return embed

    args = heat_share.get_args_parser().parse_args(command)
    tested = heat_share.embed_test(args, args.resume)
    monkeypatch.setattr(heat_share.engine, "network_embedding", embedding)
    heat_share.person_features(tested, args)
    shown, paths = torch.cat(seen), [path for paths in tested.paths.values() for path in paths]
    images = torch.stack([torch.from_numpy(read_image(p, tested.size)).float().mean(dim=2) for p in paths])
    masks = torch.stack([torch.from_numpy(heat_share.read_mask(args.data_path, p, tested.size)) for p in paths])
    mean = 255 * sum(ChannelAug.MEAN) / 3
    torch.testing.assert_close(shown[masks == 1], images[masks == 1])
    assert (shown[masks == 0] - mean).abs().max() < 1
    assert all((masks == value).float().mean() > 0.1 for value in (0, 1))


def test_data_without_masks_is_refused(sysu_tree, tmp_path):
    with pytest.raises(InputError, match="masks.*--masks"):
        heat_share.main(search_flags(sysu_tree, save_network(tmp_path / "net.t", seed=1)))
