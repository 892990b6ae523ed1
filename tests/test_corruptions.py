"""Bad images: what is drawn, what it does to an image, and the rows and curves of `testa.py --corrupt`."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import testa
from conftest import SIZE, exit_status, save_network, search_flags
from core.images import read_image
from data_manager import process_gallery_sysu, process_query_sysu
from datasets import llcm_searches, regdb_searches, sysu_searches
from eval_metrics import eval_sysu
from testing import corruptions
from testing.features import load_features
from tests.oracles import plain_features, plain_network

pytest.importorskip("imagecorruptions", exc_type=ImportError)  # numba lags behind NumPy

RANDOM = np.random.RandomState


def draws(data_path, names, repetition):
    return [corruptions.draw(f"{data_path}/{name}", data_path, repetition)[:2] for name in names]


def test_draws_depend_on_the_name_in_the_data_set_and_on_the_repetition(tmp_path):
    """The first are written down: they must be the same everywhere, for ever."""
    names = [f"cam1/0001/{n}.jpg" for n in range(2000)]
    drawn = draws(tmp_path, names, 3)
    assert drawn == draws("/elsewhere/data/", names, 3)
    assert drawn != draws(tmp_path, names, 4)
    assert drawn[:4] == [("saturate", 4), ("motion_blur", 1), ("speckle_noise", 5), ("pixelate", 1)]
    for value, times in [(kind, 100) for kind in corruptions.KINDS] + [(level, 400) for level in range(1, 6)]:
        assert abs(sum(value in pair for pair in drawn) - times) < 4 * times**0.5  # standard deviations


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_each_kind_changes_an_image_more_by_each_level_and_always_alike(kind):
    image = np.random.default_rng(0).integers(60, 200, (12, 6, 3), np.uint8).repeat(7, axis=0).repeat(7, axis=1)
    before = image.copy()
    results = []
    for level in (1, 5):
        results.append(corruptions.apply(kind, image, level, RANDOM(7)))
        np.random.rand(3)
        again = corruptions.apply(kind, image, level, RANDOM(7))
        assert (results[-1].shape, results[-1].dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(results[-1], again)
    np.testing.assert_array_equal(image, before)
    changes = [np.abs(result - image.astype(float)).mean() for result in results]
    assert changes[1] > changes[0] > 1
    if kind in ("impulse_noise", "glass_blur", "rain", "snow", "fog", "frost", "motion_blur"):  # draw at random
        assert (corruptions.apply(kind, image, 5, RANDOM(8)) != results[1]).any()


def test_corrupting_leaves_the_global_generator_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    corruptions.apply("gaussian_noise", np.zeros((32, 32, 3), np.uint8), 3, RANDOM(0))
    assert np.random.rand() == expected


@pytest.mark.parametrize(
    ("level", "drops", "length"), [(1, 53, 10), (2, 69, 30), (3, 69, 30), (4, 82, 60), (5, 82, 60)]
)
def test_rain_darkens_and_draws_gray_drops(level, drops, length):
    """288 x 144 pixels. Drops of the image's own gray are not seen; on black, each is a line of length + 1 pixels."""
    darker = 255 * (0.05 + 0.05 * level)
    gray = corruptions.rain(np.full((288, 144, 3), 200, np.uint8), level, RANDOM(0))
    assert (gray == int(200 - darker)).all()
    dark = int(np.ceil(darker))
    rain = corruptions.rain(np.full((288, 144, 3), dark, np.uint8), level, RANDOM(0)).mean()
    whole = drops * (length + 1) * (200 - dark) / (288 * 144)
    assert 0.6 * whole < rain < 1.1 * whole
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cv2.line", lambda image, start, end, colour, width: lines.append((end[1] - start[1], colour)))
        corruptions.rain(np.zeros((288, 144, 3), np.uint8), level, RANDOM(0))
    assert lines == [(length, (200, 200, 200))] * drops


def test_drops_slant_to_either_side_and_end_in_the_image(monkeypatch):
    """As CIL draws them: to the left, they begin as far outside as they slant. The blur is 2 + level wide."""
    starts, ends, blurs = {}, [], set()

    def line(image, start, end, colour, width):
        starts.setdefault(end[0] - start[0], []).append(start)
        ends.append((end[1] - start[1], width))

    monkeypatch.setattr("cv2.line", line)
    monkeypatch.setattr("cv2.blur", lambda image, size: blurs.add(size) or image)
    for seed in range(200):
        corruptions.rain(np.zeros((770, 20, 3), np.uint8), 1, RANDOM(seed))
    assert sorted(starts) == [*range(-9, 10)]
    assert ({*ends}, blurs) == ({(10, 1)}, {(3, 3)})
    for slant, places in starts.items():
        columns, rows = zip(*places, strict=True)
        assert (min(columns), max(columns)) == (min(slant, 0), 20 - max(slant, 0)), slant
        assert min(rows) >= 0
        assert max(rows) <= 760
    rows = [row for places in starts.values() for _, row in places]
    assert (min(rows), max(rows)) == (0, 760)


def test_a_kind_without_a_value_leaves_the_image(monkeypatch):
    import imagecorruptions.corruptions

    image = np.full((32, 16, 3), 77, np.uint8)
    some = np.where(np.arange(16)[None, :, None] < 8, np.nan, 9.0) + np.zeros((32, 16, 3))
    monkeypatch.setattr(imagecorruptions.corruptions, "spatter", lambda image, level: some)
    result = corruptions.apply("spatter", image, 1, RANDOM(0))
    assert {*result[:, :8].flat} == {77}
    assert {*result[:, 8:].flat} == {9}


def average_precision(similarity, same):
    """By the definition, for one query."""
    order, hits, precisions = np.argsort(-similarity, kind="stable"), 0, []
    for rank, position in enumerate(order, 1):
        if same[position]:
            hits += 1
            precisions.append(hits / rank)
    return 100 * np.mean(precisions)


def test_curves_of_regdb_are_of_one_trial(regdb_tree):
    """Each of its lists numbers its own people."""
    both = regdb_searches(regdb_tree, trials=(3, 1))
    generator, curves = torch.Generator().manual_seed(0), []
    of = {m: {path: torch.randn(8, generator=generator) for path in paths} for m, paths in both.paths.items()}
    for test in (both, regdb_searches(regdb_tree, trials=(3,))):
        features = {m: {"FC": F.normalize(torch.stack([of[m][p] for p in paths]))} for m, paths in test.paths.items()}
        curves.append({})
        corruptions.add_by_kind(curves[-1], test, "FC", regdb_tree, features)
    assert len(both.paths["visible"]) > len(test.paths["visible"])
    assert curves[0] == curves[1]


@pytest.mark.parametrize("direction", ["visible to infrared", "infrared to visible"])
def test_curves_by_kind_in_either_direction(llcm_tree, direction):
    """LLCM: one modality's images are queries, the other's in one of the drawn galleries; nobody sees himself in his
    own camera."""
    test = llcm_searches(llcm_tree, [direction], trials=(0, 1))
    generator, values = torch.Generator().manual_seed(0), {}
    for modality, paths in test.paths.items():
        values[modality] = {"FC": F.normalize(torch.randn(len(paths), 8, generator=generator))}
    found = {}
    corruptions.add_by_kind(found, test, "FC", llcm_tree, values)
    expected, of_infrared = [], [Path(path).parts[-3:-1] for path in test.paths["infrared"]]
    assert len(of_infrared) > len(test.searches[0].gallery.ids) or direction.startswith("infrared")
    similarities = values["visible"]["FC"] @ values["infrared"]["FC"].T
    for path, similarity in zip(test.paths["visible"], similarities.numpy(), strict=True):
        camera, identity = Path(path).parts[-3:-1]
        seen = np.array([(camera, identity) != other for other in of_infrared])
        same = np.array([identity == other for _, other in of_infrared])[seen]
        if same.any():
            expected.append(average_precision(similarity[seen], same) / 100)
    assert sorted(found[None, 0]) == pytest.approx(sorted(expected), abs=1e-6)


def test_curves_by_kind_against_a_plain_loop(sysu_tree):
    test = sysu_searches(sysu_tree, trials=(0, 1, 2))
    generator = torch.Generator().manual_seed(0)

    def features():
        sizes = {modality: len(paths) for modality, paths in test.paths.items()}
        return {m: {"FC": F.normalize(torch.randn(n, 8, generator=generator))} for m, n in sizes.items()}

    found, of_repetition = {}, {r: features() for r in (None, 0, 1)}
    for repetition, values in of_repetition.items():
        corruptions.add_by_kind(found, test, "FC", sysu_tree, values, repetition)

    def camera_and_id(path):
        *_, camera, identity, _ = Path(path).parts
        return int(camera[3:]), int(identity)

    expected, infrared = {}, [camera_and_id(path) for path in test.paths["infrared"]]
    hidden = 0
    for repetition, values in of_repetition.items():
        for row, path in enumerate(test.paths["visible"]):
            camera, identity = camera_and_id(path)
            seen = np.array([not (camera == 2 and other == 3) for other, _ in infrared])
            hidden += (~seen).sum()
            similarity = (values["visible"]["FC"][row] @ values["infrared"]["FC"].T).numpy()[seen]
            same = np.array([other == identity for _, other in infrared])[seen]
            drawn = (None, 0) if repetition is None else corruptions.draw(path, sysu_tree, repetition)[:2]
            if same.any():
                expected.setdefault(drawn, []).append(average_precision(similarity, same))
    assert hidden
    table = corruptions.table(found)
    assert [*table] == [*corruptions.KINDS]
    for kind, values in table.items():
        wanted = [expected.get((None, 0)), *(expected.get((kind, level)) for level in range(1, 6))]
        assert values == [None if w is None else pytest.approx(np.mean(w), abs=1e-4) for w in wanted]
    assert any(None in values for values in table.values())  # no image, no value


@pytest.mark.slow
def test_rows_of_corrupted_images_against_plain_steps(sysu_tree, tmp_path, monkeypatch, capsys):
    """Repetition r is in the gallery of trial r. The other rows, and what --features saves, are as without it."""
    assert corruptions.REPETITIONS == 10
    monkeypatch.setattr(corruptions, "REPETITIONS", 3)
    checkpoint, saved, page = (tmp_path / name for name in ("net.t", "f.npz", "page"))
    save_network(checkpoint, 0, "sysu", stages=4)
    flags = search_flags(sysu_tree, checkpoint, "--workers", "2", "--json", tmp_path / "r.json")
    rows = testa.main([*flags, "--corrupt", "--features", str(saved), "--report", str(page)])
    assert "visible images corrupted " in capsys.readouterr().out
    names = {(row["model"], row["feature"]): row for row in rows}
    assert [name for name, _ in names] == ["trained"] * 2 + ["trained, visible images corrupted"] * 2
    assert rows[:2] == testa.main([*flags[:-1], str(tmp_path / "plain.json")])
    assert testa.main(["--data_path", str(sysu_tree), "--gpu", "cpu", "--from_features", str(saved)]) == rows[:2]
    row = names["trained, visible images corrupted", "FC"]
    assert row["trials"] == [0, 1, 2]

    net, _ = plain_network(checkpoint)
    stored, _ = load_features(saved)
    paths, ids, cameras = process_query_sysu(sysu_tree)
    relative = [Path(path).relative_to(sysu_tree).as_posix() for path in paths]
    query = stored["infrared"]["trained", "FC"][[stored["infrared"]["row"][path] for path in relative]]
    for repetition in (0, 2):
        images, g_ids, g_cameras = process_gallery_sysu(sysu_tree, trial=repetition)
        gallery = []
        for path in images:
            kind, level, random = corruptions.draw(path, sysu_tree, repetition)
            changed = corruptions.apply(kind, read_image(path, SIZE), level, random)
            gallery.append(plain_features(net, torch.from_numpy(changed).permute(2, 0, 1)[None], "visible")[0])
        similarity = F.normalize(query).numpy() @ torch.stack(gallery).numpy().T
        cmc, mean_ap, _ = eval_sysu(-similarity, ids, g_ids, cameras, g_cameras)
        metrics = row["per_trial"][repetition]["metrics"]
        assert (metrics["Rank-1"], metrics["mAP"]) == pytest.approx((100 * cmc[0], 100 * mean_ap), abs=0.5)
    by_kind = json.loads((tmp_path / "r.json").read_text())["corruption"]
    assert [*by_kind] == [*corruptions.KINDS]
    assert len({values[0] for values in by_kind.values()}) == 1
    text = (page / "report.html").read_text()
    assert "each corrupted, as queries, by kind and level" in text
    assert re.search(r"<figure class=wide>(?:(?!</figure>).)*by kind and level", text, re.DOTALL)  # many panels
    for kind in corruptions.KINDS:
        assert kind.replace("_", " ") in text


def test_what_corruption_needs(tmp_path, monkeypatch, capsys):
    assert exit_status(testa, ["--from_features", "f.npz", "--corrupt"]) == 2
    assert "--corrupt and --features need images: use them with --resume" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert exit_status(testa, ["--resume", "x.t", "--gpu", "cpu", "--corrupt"]) == 2
    remedy = "run: python -m pip install --no-deps -r tools/corruption_requirements.txt"
    assert capsys.readouterr().err == f"testa.py: error: imagecorruptions: is not installed; {remedy}\n"
