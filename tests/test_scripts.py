"""The scripts from their flags to their files: training, resuming, testing, on the small demo trees."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_manager
import pre_process_sysu
import testa
import train_ext_test0
import utils
from conftest import exit_status, flags, save_network
from core import engine, re_rank
from core import features as feature_store
from eval_metrics import eval_sysu
from tests.oracles import plain_embedding
from tools import report
from utils import InputError

REPO = Path(utils.__file__).parent


def test_table_is_what_a_plain_loop_over_files_gives(trained, sysu_tree, tmp_path, capsys):
    """The whole of testa against one image at a time, embedded and ranked in plain steps."""
    result, _ = trained
    out = tmp_path / "results.json"
    common = ["--data_path", str(sysu_tree), "--gpu", "cpu", "--test_batch", "7"]
    rows = testa.main(["--resume", result["best"], "--mode", "indoor", "--json", str(out), *common])
    assert json.loads(out.read_text())["results"] == rows
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    printed = capsys.readouterr().out
    assert "demo data like SYSU-MM01, indoor-search, infrared to visible, seeded protocol, 1-shot, 10 trials" in printed
    assert (
        f"Checkpoint: {result['best']} (adp, resnet18, 96x48, epoch {torch.load(result['best'])['epoch']})" in printed
    )

    embed = plain_embedding(result["best"])
    query, q_ids, q_cameras = data_manager.process_query_sysu(sysu_tree)
    queries = np.stack([embed(path, "infrared") for path in query])
    for trial in (0, 9):
        gallery, g_ids, g_cameras = data_manager.process_gallery_sysu(sysu_tree, "indoor", trial)
        distances = 1 - queries @ np.stack([embed(path, "visible") for path in gallery]).T
        cmc, mean_ap, mean_inp = eval_sysu(distances, q_ids, g_ids, q_cameras, g_cameras)
        found = rows[1]["per_trial"][trial]
        assert (found["queries"], found["gallery"]) == distances.shape
        seen = (q_ids[:, None] == g_ids) & ~((q_cameras[:, None] == 3) & (g_cameras == 2))
        assert found["evaluated"] == seen.any(axis=1).sum()
        assert found["metrics"]["Rank-1"] == pytest.approx(100 * cmc[0], abs=1e-6)
        assert found["metrics"]["Rank-20"] == pytest.approx(100 * cmc[19], abs=1e-6)
        assert found["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
        assert found["metrics"]["mINP"] == pytest.approx(100 * mean_inp, abs=1e-3)
    trials = [trial["metrics"]["mAP"] for trial in rows[1]["per_trial"]]
    assert rows[1]["mean"]["mAP"] == pytest.approx(np.mean(trials))
    assert rows[1]["std"]["mAP"] == pytest.approx(np.std(trials))


LABELS = ["dataset", "mode", "direction", "protocol", "shots", "trials", "feature", "flip_averaging", "reranking"]
LABELS += ["selection"]


def test_every_protocol_alone_gives_its_rows_of_the_whole_table(trained, sysu_tree, tmp_path, capsys):
    """And so do features saved once, with the images gone."""
    result, _ = trained
    common = ["--data_path", str(sysu_tree), "--gpu", "cpu"]
    saved = tmp_path / "features.npz"
    table = testa.main([*common, "--resume", result["best"], "--all", "--features", str(saved)])
    whole = capsys.readouterr().out
    assert len(table) == 16

    tree = tmp_path / "lists"
    for file in sysu_tree.rglob("*"):
        if file.suffix in (".jpg", ".txt", ".mat"):
            (tree / file.relative_to(sysu_tree)).parent.mkdir(parents=True, exist_ok=True)
            (tree / file.relative_to(sysu_tree)).write_bytes(b"" if file.suffix == ".jpg" else file.read_bytes())
    stored = ["--data_path", str(tree), "--gpu", "cpu", "--from_features", str(saved)]
    assert testa.main([*stored, "--all"]) == table
    for draws, shots, mode in (("seeded", 10, "all"), ("official", 1, "indoor"), ("official", 10, "all")):
        wanted = {"protocol": draws, "shots": shots, "mode": mode}
        capsys.readouterr()
        rows = testa.main([*stored, *(f"--{name}={value}" for name, value in wanted.items())])
        assert rows == [row for row in table if all(row[name] == value for name, value in wanted.items())]
        assert all(set(LABELS) <= set(row) for row in rows)
        title = f"SYSU-MM01, {mode}-search, infrared to visible, {draws} protocol, {shots}-shot, 10 trials"
        assert title in capsys.readouterr().out
        assert title in whole


def test_queries_without_a_match_are_not_counted_as_asked(trained, sysu_tree, tmp_path, capsys):
    result, _ = trained
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    _, ids, _ = data_manager.process_query_sysu(tree)
    for camera in (1, 2):
        shutil.rmtree(tree / f"cam{camera}" / f"{ids[0]:04d}", ignore_errors=True)
    common = ["--data_path", str(tree), "--gpu", "cpu", "--resume", result["best"]]
    (row, _) = testa.main([*common, "--mode", "indoor"])
    answered = len(ids) - (ids == ids[0]).sum()
    assert {(trial["queries"], trial["evaluated"]) for trial in row["per_trial"]} == {(len(ids), answered)}
    assert f"{len(ids)} queries ({answered} with a match), gallery of" in capsys.readouterr().out


def test_a_camera_without_images_is_named(trained, sysu_tree, tmp_path, capsys):
    result, _ = trained
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree, ignore=shutil.ignore_patterns("cam6", "cam5"))
    for mode, absent in (("all", "5, 6"), ("indoor", "6")):
        testa.main(["--data_path", str(tree), "--gpu", "cpu", "--resume", result["best"], "--mode", mode])
        assert f"no test id has an image of camera {absent}\n" in capsys.readouterr().out


def test_official_protocol_is_left_out_aloud(trained, sysu_tree, tmp_path, capsys):
    result, _ = trained
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    (tree / "exp" / "rand_perm_cam.mat").unlink()
    common = ["--data_path", str(tree), "--gpu", "cpu", "--resume", result["best"]]
    assert {row["protocol"] for row in testa.main([*common, "--all"])} == {"seeded"}
    assert "rand_perm_cam.mat, so without the official protocol" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"rand_perm_cam\.mat: no such file"):
        testa.main([*common, "--protocol", "official"])


def test_reranked_rows_stand_beside_the_plain_ones(trained, sysu_tree, tmp_path):
    result, _ = trained
    common = ["--data_path", str(sysu_tree), "--gpu", "cpu", "--resume", result["best"]]
    saved = tmp_path / "features.npz"
    plain = testa.main([*common, "--features", str(saved)])
    rows = testa.main([*common, "--rerank", "k_reciprocal", "random_walk"])
    assert [(row["feature"], row["reranking"]) for row in rows] == [
        (feature, reranking) for feature in ("POOL", "FC") for reranking in ("none", "k_reciprocal", "random_walk")
    ]
    assert rows[::3] == plain

    arrays = np.load(saved)
    query, q_ids, q_cameras = data_manager.process_query_sysu(sysu_tree)
    gallery, g_ids, g_cameras = data_manager.process_gallery_sysu(sysu_tree, trial=2)

    def features(paths, modality):
        row = {path: i for i, path in enumerate(arrays[f"{modality}/paths"])}
        rows = [row[Path(path).relative_to(sysu_tree).as_posix()] for path in paths]
        return arrays[f"{modality}/trained/FC"][rows]

    for row, measure in ((rows[4], re_rank.k_reciprocal), (rows[5], re_rank.random_walk)):
        distances = measure(features(query, "infrared"), features(gallery, "visible"))
        _, mean_ap, mean_inp = eval_sysu(distances, q_ids, g_ids, q_cameras, g_cameras)
        assert row["per_trial"][2]["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
        assert row["per_trial"][2]["metrics"]["mINP"] == pytest.approx(100 * mean_inp, abs=1e-3)


def test_features_of_another_project(sysu_tree, tmp_path):
    """Any model and feature names, any order, unnormalised, float16, more images than needed, no origin."""
    rng = np.random.default_rng(0)
    arrays, own = {}, {}
    for modality, cameras in (("visible", (1, 2, 4, 5)), ("infrared", (3, 6))):
        paths, ids, _ = data_manager.sysu_images(sysu_tree, data_manager.read_ids(sysu_tree, "test"), cameras)
        order = rng.permutation(len(paths))
        features = (np.eye(400)[ids] + 0.3 * rng.normal(size=(len(ids), 400))).astype(np.float16)
        arrays[f"{modality}/paths"] = np.array([str(Path(paths[i]).relative_to(sysu_tree)) for i in order])
        arrays[f"{modality}/mine/embedding"] = features[order]
        own |= dict(zip(paths, features, strict=True))
    file = tmp_path / "other.npz"
    np.savez(file, **arrays)
    (row,) = testa.main(["--data_path", str(sysu_tree), "--from_features", str(file), "--gpu", "cpu", "--mode=indoor"])
    assert (row["model"], row["feature"], row["flip_averaging"], row["selection"]) == (
        "mine",
        "embedding",
        None,
        "unknown",
    )
    query, q_ids, q_cameras = data_manager.process_query_sysu(sysu_tree)
    gallery, g_ids, g_cameras = data_manager.process_gallery_sysu(sysu_tree, "indoor", 6)
    one, other = (np.array([own[path] for path in paths], np.float64) for paths in (query, gallery))
    cosine = (one @ other.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    cmc, mean_ap, _ = eval_sysu(-cosine, q_ids, g_ids, q_cameras, g_cameras)
    assert row["per_trial"][6]["metrics"]["Rank-1"] == pytest.approx(100 * cmc[0])
    assert row["per_trial"][6]["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)

    def damaged(change):
        with np.load(file) as whole:
            copy = dict(whole)
        change(copy)
        np.savez(tmp_path / "bad.npz", **copy)
        with pytest.raises(InputError, match=r"bad\.npz") as error:
            testa.main(["--data_path", str(sysu_tree), "--from_features", str(tmp_path / "bad.npz"), "--gpu", "cpu"])
        return str(error.value)

    def last_image_gone(arrays):
        for name in ("infrared/paths", "infrared/mine/embedding"):
            arrays[name] = arrays[name][1:]

    def not_finite(arrays):
        arrays["visible/mine/embedding"][3, 2] = np.inf

    def an_image_twice(arrays):
        arrays["visible/paths"][5] = arrays["visible/paths"][2]

    def origin(**values):
        return lambda arrays: arrays.update(origin=np.array(json.dumps(values)))

    assert f"has {arrays['visible/paths'][2]} twice" in damaged(an_image_twice)
    assert "{'mine/embedding': 400}, of infrared {'mine/embedding': 7}" in damaged(
        lambda arrays: arrays.update({"infrared/mine/embedding": arrays["infrared/mine/embedding"][:, :7]})
    )
    for name in ("visible", "infrared"):
        arrays[f"{name}/mine/two\nlines"] = arrays[f"{name}/mine/embedding"]
    np.savez(file, **arrays)
    assert "'visible/mine/two\\nlines' is no visible/MODEL/FEATURE" in damaged(lambda arrays: None)
    for name in ("visible", "infrared"):
        del arrays[f"{name}/mine/two\nlines"]
    np.savez(file, **arrays)
    wrong = [{"flipped": "FC"}, {"selection": 3}, {"trial": "1"}, {"dataset": "market"}, {"data_path": []}]
    for said in (*wrong, {"selektion": "val"}):
        assert repr(next(iter(said))) in damaged(origin(**said))
    assert "origin is [1, 2]" in damaged(lambda arrays: arrays.update(origin=np.array("[1, 2]")))
    missing = arrays["infrared/paths"][0]
    assert f"no infrared features of {missing} (1 of" in damaged(last_image_gone)
    assert "row 3 of visible/mine/embedding is zero or not finite" in damaged(not_finite)
    assert "give the same of both" in damaged(lambda arrays: arrays.pop("visible/mine/embedding"))
    assert "no array visible/paths" in damaged(lambda arrays: arrays.pop("visible/paths"))
    assert "'weights' is no visible/MODEL/FEATURE" in damaged(lambda arrays: arrays.update(weights=np.ones(3)))
    assert "without pickles" in damaged(lambda arrays: arrays.update({"visible/paths": np.array([None, {}])}))
    for values in (arrays["visible/mine/embedding"][:-1], arrays["visible/mine/embedding"].astype(complex), np.ones(4)):
        assert "not numbers [" in damaged(
            lambda arrays, values=values: arrays.update({"visible/mine/embedding": values})
        )

    np.savez(file, **arrays, origin=np.array(json.dumps({"flipped": ["embedding"], "selection": "val"})))
    (row,) = testa.main(["--data_path", str(sysu_tree), "--from_features", str(file), "--gpu", "cpu"])
    assert (row["flip_averaging"], row["selection"], row["images"]) == (True, "val", "unknown")


def test_damaged_features_are_one_line(sysu_tree, tmp_path):
    """Whatever byte of a compressed file is damaged: refused, or, where it does not matter, read."""
    paths = np.array(["cam1/0001/0001.jpg"])
    names = {
        f"{m}/{name}": x for m in ("visible", "infrared") for name, x in (("paths", paths), ("a/b", np.ones((1, 5))))
    }
    np.savez_compressed(tmp_path / "whole.npz", **names)
    whole = (tmp_path / "whole.npz").read_bytes()
    read = 0
    for position in range(len(whole)):
        (tmp_path / "bad.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with contextlib.suppress(InputError):
            feature_store.load_features(tmp_path / "bad.npz")
            read += 1
    assert read < len(whole) / 2


def test_all_with_baselines_is_one_table(trained, sysu_tree):
    result, _ = trained
    rows = testa.main(
        ["--data_path", str(sysu_tree), "--resume", result["best"], "--all", "--baselines", "--gpu", "cpu"]
    )
    models = [("gray pixels", "pixels"), ("colour histogram", "colours")]
    models += [(model, feature) for model in ("untrained", "trained") for feature in ("POOL", "FC")]
    labels = ("protocol", "mode", "shots", "model", "feature")
    assert [tuple(row[label] for label in labels) for row in rows] == [
        (protocol, mode, shots, *model)
        for protocol in ("seeded", "official")
        for mode in ("all", "indoor")
        for shots in (1, 10)
        for model in models
    ]
    assert all(row["trials"] == list(range(10)) for row in rows)
    for row in rows:
        assert row["flip_averaging"] == (row["feature"] in ("POOL", "FC"))
        assert row["selection"] == ("test" if row["model"] == "trained" else None)


def test_baseline_features_against_plain_formulas():
    images = torch.randint(0, 256, (3, 3, 6, 4), dtype=torch.uint8)
    for image, pixels, colours in zip(
        images.numpy(), testa.gray_pixels(images), testa.colour_histogram(images), strict=True
    ):
        gray = (0.2989 * image[0] + 0.5870 * image[1] + 0.1140 * image[2]).ravel()
        gray = gray - gray.mean()
        np.testing.assert_allclose(pixels, gray / np.linalg.norm(gray), atol=1e-5)
        histogram, _ = np.histogramdd(image.reshape(3, -1).T, bins=8, range=[(0, 256)] * 3)
        np.testing.assert_allclose(colours, histogram.ravel() / np.linalg.norm(histogram), atol=1e-6)


def test_checkpoint_of_another_data_set_is_refused(trained, regdb_tree):
    result, _ = trained
    with pytest.raises(InputError, match="trained on sysu"):
        testa.main(["--dataset", "regdb", "--data_path", str(regdb_tree), "--resume", result["best"], "--gpu", "cpu"])


def test_damaged_weights_are_refused(trained, sysu_tree, tmp_path):
    result, _ = trained
    common = ["--data_path", str(sysu_tree), "--gpu", "cpu"]
    for damage, message in ((float("nan"), "not finite"), (None, "does not fit")):
        checkpoint = torch.load(result["best"])
        if damage is None:
            del checkpoint["net"]["bottleneck.weight"]
        else:
            checkpoint["net"]["bottleneck.weight"][3] = damage
        torch.save(checkpoint, tmp_path / "damaged.t")
        with pytest.raises(InputError, match=rf"damaged\.t.*{message}"):
            testa.main([*common, "--resume", str(tmp_path / "damaged.t")])


def test_published_checkpoint_is_tested(sysu_tree, tmp_path):
    """A checkpoint under the published names, with the NumPy metrics that the published code stores beside them."""
    sys.path.insert(0, str(REPO / "tests" / "golden"))
    from published_state import state

    net = {k: torch.from_numpy(v) for k, v in state(REPO / "tests" / "golden" / "published_shapes.txt", 1).items()}
    torch.save(
        {"net": net, "cmc": np.ones(20), "mAP": np.float64(0.5), "mINP": np.float64(0.5), "epoch": 1}, tmp_path / "p.t"
    )
    rows = testa.main(
        ["--data_path", str(sysu_tree), "--resume", str(tmp_path / "p.t"), "--gpu", "cpu", "--mode", "indoor"]
    )
    assert [row["feature"] for row in rows] == ["POOL", "FC"]


def test_results_file_is_checked_before_the_work(sysu_tree, tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        testa.main(["--data_path", str(sysu_tree), "--resume", "none.t", "--gpu", "cpu", "--json", str(tmp_path)])


@pytest.mark.parametrize("content", [{1: 2}, {"conv1.weight": 1.0}, {"net": [1]}, {"net": {"a": 1.0}, "options": {}}])
def test_files_without_weights_are_refused(sysu_tree, tmp_path, content):
    file = tmp_path / "odd.t"
    torch.save(content, file)
    with pytest.raises(InputError, match=r"odd\.t"):
        testa.main(["--data_path", str(sysu_tree), "--resume", str(file), "--gpu", "cpu"])
    with pytest.raises(InputError, match=r"odd\.t"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", str(file)])


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (testa, ["--resume", "none.t"], ["none.t"]),
        (testa, [], ["--resume", "--from_features"]),
        (testa, ["--from_features", "none.npz"], ["none.npz", "--features"]),
        (testa, ["--from_features", "x.npz", "--baselines"], ["--baselines", "--resume"]),
        (testa, ["--resume", "x.t", "--tvsearch"], ["--tvsearch", "SYSU-MM01"]),
        (testa, ["--resume", "x.t", "--dataset", "llcm", "--shots", "10"], ["--shots", "llcm"]),
        (testa, ["--resume", "x_{trial}.t", "--dataset", "regdb", "--features", "f"], ["--features f", "{trial}"]),
        (testa, ["--resume", "x.t", "--rerank", "magic"], ["--rerank", "magic"]),
        (testa, ["--resume", ""], ["no such file", "--model_path"]),
        (testa, ["--resume", "x.t", "--all", "--protocol", "official"], ["--all", "--protocol"]),
        (testa, ["--resume", "x.t", "--dataset", "regdb", "--mode", "indoor"], ["--mode", "regdb"]),
        (testa, ["--resume", "x.t", "--features", "f_{trial}.npz"], ["{trial}", "sysu"]),
        (testa, ["--resume", "x.t", "--features", "./x.t"], ["x.t, ./x.t", "twice"]),
        (train_ext_test0, ["--dataset", "llcm", "--mode", "indoor"], ["--mode indoor", "SYSU-MM01"]),
        (train_ext_test0, ["--trial", "2"], ["--trial 2", "RegDB"]),
        (testa, ["--resume", "x.t", "--features", "o", "--json", "o"], ["x.t, o, o", "twice"]),
        (testa, ["--resume", "x.t", "--trial", "2"], ["--trial", "RegDB"]),
        (
            train_ext_test0,
            ["--data_path", "nowhere"],
            ["nowhere/train_rgb_resized_img.npy", "pre_process_sysu.py"],
        ),
        (train_ext_test0, ["--dataset", "regdb", "--data_path", "nowhere"], ["nowhere: no such folder"]),
        (train_ext_test0, ["--lr", "nan"], ["--lr", "nan"]),
        (pre_process_sysu, ["--data_path", "nowhere"], ["nowhere: no such folder", "--data_path"]),
        (pre_process_sysu, ["--data_path", "."], ["exp/train_id.txt"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments, "--gpu", "cpu"] if script is not pre_process_sysu else arguments
    assert exit_status(script, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_table_can_be_cut_off_and_needs_no_unicode(trained, sysu_tree, tmp_path):
    result, _ = trained
    command = [sys.executable, REPO / "testa.py", "--data_path", sysu_tree, "--resume", result["best"], "--gpu", "cpu"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    whole = subprocess.run(command, capture_output=True, text=True, env=env)
    assert whole.returncode == 0
    assert whole.stderr == ""
    assert "Mean ? standard deviation" in whole.stdout

    reader = subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    cut = subprocess.Popen(
        [*command, "--json", tmp_path / "r.json"], stdout=reader.stdin, stderr=subprocess.PIPE, env=env
    )
    reader.stdin.close()
    assert cut.communicate()[1] == b""
    assert json.loads((tmp_path / "r.json").read_text())["results"]


def test_a_search_without_a_match_is_refused_before_the_training(sysu_tree, tmp_path):
    """Camera 3's queries do not see camera 2: with no other cameras there is nothing to find."""
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    for camera in (1, 4, 5, 6):
        shutil.rmtree(tree / f"cam{camera}")
    words = "no query has a match in the gallery that it sees .*not seen: camera 2 by queries of camera 3"
    with pytest.raises(InputError, match=words):
        train_ext_test0.main(flags(tree, tmp_path, "--epochs", "1"))
    assert not list((tmp_path / "models").glob("*.t"))
    checkpoint = save_network(tmp_path / "net.t", 0, "sysu")
    with pytest.raises(InputError, match=words):
        testa.main(["--data_path", str(tree), "--gpu", "cpu", "--resume", str(checkpoint)])


@pytest.mark.parametrize("dataset", ["sysu", "llcm", "regdb"])
def test_matches_against_a_plain_loop(dataset):
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        images = [
            data_manager.Images(modality, np.arange(2), rng.integers(1, 3, 2), rng.choice(cameras, 2))
            for modality, cameras in (("infrared", [3, 6]), ("visible", [2, 3] if dataset == "sysu" else [3, 6]))
        ]
        setting = {"dataset": dataset, "mode": None, "direction": "", "protocol": "", "shots": 1, "unseen": None}
        query, gallery = (list(zip(x.ids.tolist(), x.cameras.tolist(), strict=True)) for x in images)
        hidden = {
            "sysu": lambda q, g: q[1] == 3 and g[1] == 2,
            "llcm": lambda q, g: q == g,
            "regdb": lambda q, g: False,
        }[dataset]
        found.append(any(q[0] == g[0] and not hidden(q, g) for q in query for g in gallery))
        search = data_manager.Search(setting, *images)
        if found[-1]:
            engine.check_matches(search)
        else:
            with pytest.raises(InputError, match="no query has a match"):
                engine.check_matches(search)
    assert 5 < sum(found) < 195


@pytest.mark.parametrize("args", [["--lr", 1], {3: 4}, "flags"])
def test_a_checkpoint_whose_flags_are_none_is_named(args, sysu_tree, tmp_path):
    path = save_network(tmp_path / "net.t", 0, "sysu")
    torch.save(torch.load(path) | {"args": args}, path)
    with pytest.raises(InputError, match=r"net\.t: its 'args' are not training flags"):
        testa.main(["--data_path", str(sysu_tree), "--gpu", "cpu", "--resume", str(path)])


def test_flags_of_any_plain_value_stand_in_the_saved_features_and_on_the_page(sysu_tree, tmp_path):
    path = save_network(tmp_path / "net.t", 0, "sysu")
    torch.save(torch.load(path) | {"args": {"dataset": "sysu", "weights": torch.zeros(2), "lr": 0.1}}, path)
    argv = ["--data_path", str(sysu_tree), "--gpu", "cpu", "--workers", "0", "--resume", str(path)]
    testa.main([*argv, "--features", str(tmp_path / "f.npz"), "--report", str(tmp_path)])
    _, origin = feature_store.load_features(tmp_path / "f.npz")
    assert origin["flags"] == {"dataset": "sysu", "weights": "tensor([0., 0.])", "lr": 0.1}
    assert "tensor([0., 0.])" in (tmp_path / "report.html").read_text()


def test_every_row_of_ten_trials_is_on_the_page(regdb_tree, tmp_path):
    """Trials whose epochs were chosen in two ways are two settings, which come apart in the list of results."""
    for trial, selection in ((1, "test"), (2, "none")):
        path = save_network(tmp_path / f"net_{trial}.t", trial, "regdb")
        content = torch.load(path)
        content["args"]["trial"] = trial
        torch.save(content | {"selection": selection}, path)
    argv = ["--dataset", "regdb", "--data_path", str(regdb_tree), "--gpu", "cpu", "--workers", "0", "--all"]
    results = []
    for trial in (1, 2):
        results += testa.main([*argv, "--resume", str(tmp_path / f"net_{trial}.t")])
    results = [row | {"trials": [1]} for row in results]  # or the two would differ in that, too
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testa.engine, "summarise", lambda rows: results)
        patch.setattr(report, "write_page", lambda *page: drawn.append(page[5]))
        testa.main([*argv, "--resume", str(tmp_path / "net_1.t"), "--report", str(tmp_path)])
    (pictures,) = drawn
    cmc = [figure for caption, figure in pictures.items() if caption.startswith("CMC")]
    labels = [[line.get_label() for line in figure.axes[0].lines] for figure in cmc]
    assert labels == [["trained, FC, chosen on test", "trained, FC, chosen on none"]] * 2  # of each direction
