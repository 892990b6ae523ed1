"""The scripts from their flags to their files: training, resuming, testing, on the small demo trees."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data_loader
import data_manager
import testa
import train_ext_test0
import utils
from ChannelAug import TrainAugmentation
from conftest import SIZE, flags, plain_embedding, save_network
from core import engine, evaluation, re_rank
from core import features as feature_store
from core.checkpoint import save_checkpoint
from eval_metrics import eval_sysu
from loss import MethodLoss
from model import GFMNet
from tools import visualize
from utils import InputError

REPO = Path(utils.__file__).parent


@pytest.fixture(scope="module")
def trained(sysu_tree, tmp_path_factory):
    """A run of three epochs on the demo tree -> (main's result, its folder)."""
    out = tmp_path_factory.mktemp("run")
    return train_ext_test0.main(flags(sysu_tree, out, "--epochs", "3", "--eval_every", "2", "--save_epoch", "1")), out


def test_run_writes_what_it_promises(trained):
    result, out = trained
    name = "sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p2_n4_lr_0.01_seed_0_9_adam"
    assert sorted(file.name for file in (out / "models").glob("*.t")) == [
        f"{name}_{kind}.t" for kind in ("best", "epoch_1", "epoch_2", "last")
    ]
    entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    for entry in entries:
        assert entry["total"] == pytest.approx(entry["identity"] + entry["triplet"] + 0.5 * entry["local"], rel=1e-5)
        assert entry["images_per_second"] > 0
        assert ("FC/Rank-1" in entry) == (entry["epoch"] != 1)
    assert entries[2]["total"] < entries[0]["total"]
    best = max((e for e in entries if "FC/Rank-1" in e), key=lambda e: (e["FC/Rank-1"], -e["epoch"]))
    assert result["metrics"]["epoch"] == best["epoch"]
    assert torch.load(result["best"])["epoch"] == best["epoch"]
    text = (out / "log" / "sysu_log" / f"{name}.txt").read_text()
    assert "TEST set" in text
    assert list((out / "log" / "sysu_log" / name).glob("events.*"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_run_equals_the_uninterrupted_one(trained, sysu_tree, tmp_path, monkeypatch, workers):
    whole, _ = trained
    more = ("--epochs", "3", "--eval_every", "2", "--workers", workers)

    class Stopped(Exception):
        pass

    save = save_checkpoint

    def save_and_stop(checkpoint, path):
        save(checkpoint, path)
        if checkpoint["epoch"] == 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(train_ext_test0, "save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    last = next((tmp_path / "models").glob("*_last.t")).name
    resumed = train_ext_test0.main(flags(sysu_tree, tmp_path, *more, "--resume", last))

    a, b = torch.load(whole["last"]), torch.load(resumed["last"])
    assert all(torch.equal(a["net"][key], b["net"][key]) for key in a["net"])
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())
    assert a["best"] == b["best"]

    def entries(result):
        timing = ("seconds", "images_per_second")
        lines = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
        return [{key: value for key, value in entry.items() if key not in timing} for entry in lines]

    assert entries(whole) == entries(resumed)


@pytest.mark.parametrize("other", [("--share_net", "3"), ("--alpha", "3"), ("--optim", "sgd"), ("--seed", "1")])
def test_resume_refuses_other_flags(trained, sysu_tree, tmp_path, other):
    result, _ = trained
    with pytest.raises(InputError, match=rf"_last\.t.*{other[0]} \S+, not {other[1]}"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--resume", result["last"], *other))


def test_resumed_run_needs_no_weights_and_remembers_those_it_began_with(trained, sysu_tree, tmp_path):
    result, _ = trained
    more = ("--resume", result["last"], "--epochs", "4", "--weights", "absent.pth")
    assert torch.load(train_ext_test0.main(flags(sysu_tree, tmp_path, *more))["last"])["args"]["weights"] == "none"


def test_run_from_before_the_selection_flag_is_resumed(trained, sysu_tree, tmp_path):
    result, _ = trained
    checkpoint = torch.load(result["last"])
    del checkpoint["args"]["select"], checkpoint["selection"]
    torch.save(checkpoint, tmp_path / "old_last.t")
    more = ("--resume", str(tmp_path / "old_last.t"), "--epochs", "4")
    assert torch.load(train_ext_test0.main(flags(sysu_tree, tmp_path, *more))["last"])["epoch"] == 3
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", str(tmp_path / "old_last.t"), "--gpu", "cpu"])
    assert {row["selection"] for row in rows} == {"unknown"}


def test_resume_refuses_a_best_checkpoint(trained, sysu_tree, tmp_path):
    result, _ = trained
    with pytest.raises(InputError, match="no training state"):
        train_ext_test0.main(flags(sysu_tree, tmp_path, "--resume", result["best"]))


def test_run_of_the_same_name_is_not_overwritten(trained, sysu_tree):
    _, out = trained
    before = {file: file.read_bytes() for file in (out / "models").glob("*.t")}
    for more in (["--alpha", "2"], ["--epochs", "1"]):
        with pytest.raises(InputError, match=r"_last\.t: is there already; go on with --resume"):
            train_ext_test0.main(flags(sysu_tree, out, *more))
    log = (out / "log" / "sysu_log").glob("*.jsonl")
    logged = {file: file.read_bytes() for file in log}
    with pytest.raises(InputError, match=r"\.jsonl: already contains another run's log; delete it or choose another"):
        train_ext_test0.main(flags(sysu_tree, out, "--model_path", str(out / "other")))
    assert logged == {file: file.read_bytes() for file in logged}
    assert before == {file: file.read_bytes() for file in (out / "models").glob("*.t")}


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "base", "--optim", "sgd", "--augc", "0", "--rande", "0"],
        ["--method", "agw", "--share_net", "1", "--amp", "bf16"],
        ["--method", "caj", "--square", "0", "--weighting", "published", "--mode", "indoor"],
        ["--method", "adp", "--share_net", "5", "--alpha", "2", "--gamma", "0.5", "--margin", "0.1"],
    ],
)
def test_every_method_trains_and_its_checkpoint_tests(sysu_tree, tmp_path, more):
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, "--epochs", "1", *more))
    (entry,) = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
    assert math.isfinite(entry["total"])
    assert (entry["local"] > 0) == ("adp" in more)
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", result["last"], "--gpu", "cpu", "--workers", "0"])
    assert len(rows) == 2


def test_every_flag_is_read():
    """Each flag's name stands in the script beside its declaration, or in the module whose flags it shares."""
    for script, shared in ((train_ext_test0, ""), (testa, evaluation.__file__), (visualize, evaluation.__file__)):
        source = "".join(Path(file).read_text() for file in (script.__file__, shared) if file)
        actions = script.get_args_parser()._actions
        for sub in actions[-1].choices.values() if isinstance(actions[-1].choices, dict) else []:
            actions = actions + sub._actions
        for action in actions:
            if action.dest != "help":
                assert f"args.{action.dest}" in source, action.dest


def test_defaults_are_the_paper_s_recipe():
    args = train_ext_test0.get_args_parser().parse_args([])
    assert train_ext_test0.run_name(args) + "_best.t" == (
        "sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p4_n8_lr_0.1_seed_0_9_best.t"
    )
    assert (args.arch, args.weights, args.share_net, args.epochs) == ("resnet50", "imagenet", 2, 101)
    assert (args.img_h, args.img_w, args.margin, args.alpha, args.gamma) == (288, 144, 0.3, 1, 1)


def test_default_schedule_is_the_published_one():
    args = train_ext_test0.get_args_parser().parse_args([])
    rates = [train_ext_test0.learning_rate(e, args.lr, args.warmup, args.milestones) for e in range(args.epochs)]
    expected = [0.1 * (e + 1) / 10 for e in range(10)] + [0.1] * 10 + [0.01] * 30 + [0.001] * 51
    assert rates == pytest.approx(expected)
    assert [train_ext_test0.learning_rate(e, 1.0, 0, []) for e in range(3)] == [1.0] * 3


@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_head_learns_at_the_full_rate_and_the_rest_at_a_tenth(optim):
    net = GFMNet(5, arch="resnet18")
    optimizer = train_ext_test0.build_optimizer(net, optim, 0.1)
    rest, head = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(net.bottleneck.weight), id(net.classifier.weight)}
    assert (rest["lr_scale"], head["lr_scale"]) == (0.1, 1.0)
    assert len(rest["params"]) + len(head["params"]) == sum(p.requires_grad for p in net.parameters())
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)


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

    assert f"lists {arrays['visible/paths'][2]} twice" in damaged(an_image_twice)
    assert "{'mine/embedding': 400}, infrared {'mine/embedding': 7}" in damaged(
        lambda arrays: arrays.update({"infrared/mine/embedding": arrays["infrared/mine/embedding"][:, :7]})
    )
    for name in ("visible", "infrared"):
        arrays[f"{name}/mine/two\nlines"] = arrays[f"{name}/mine/embedding"]
    np.savez(file, **arrays)
    assert "'visible/mine/two\\nlines' is not visible/MODEL/FEATURE" in damaged(lambda arrays: None)
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
    assert "save the same for both" in damaged(lambda arrays: arrays.pop("visible/mine/embedding"))
    assert "no array visible/paths" in damaged(lambda arrays: arrays.pop("visible/paths"))
    assert "'weights' is not visible/MODEL/FEATURE" in damaged(lambda arrays: arrays.update(weights=np.ones(3)))
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


def test_epoch_chosen_by_the_validation_ids(sysu_tree, tmp_path):
    more = ["--select", "val", "--epochs", "2", "--eval_every", "1"]
    result = train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    assert result["best"].endswith("_val_best.t")
    checkpoint = torch.load(result["best"])
    assert checkpoint["options"]["num_classes"] == len(data_manager.read_ids(sysu_tree, "train"))
    entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
    assert [entry["select"] for entry in entries] == ["val", "val"]
    text = Path(result["log"]).with_suffix(".txt").read_text()
    assert "trial 0 of the VALIDATION ids" in text

    # The logged numbers are those of a tree whose test ids are the validation ids.
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    (tree / "exp" / "val_id.txt").rename(tree / "exp" / "test_id.txt")
    common = ["--gpu", "cpu", "--workers", "0"]
    rows = testa.main(["--data_path", str(tree), "--resume", result["last"], *common])
    assert rows[1]["per_trial"][0]["metrics"]["mAP"] == pytest.approx(entries[-1]["FC/mAP"])

    for kind, selection in (("best", "val"), ("last", "none")):
        rows = testa.main(["--data_path", str(sysu_tree), "--resume", result[kind], *common])
        assert {row["selection"] for row in rows} == {selection}
    with pytest.raises(InputError, match="--select val: is an option of SYSU-MM01"):
        train_ext_test0.main(["--dataset", "regdb", "--select", "val"])


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
        ("testa.py", ["--resume", "none.t"], ["none.t"]),
        ("testa.py", [], ["--resume", "--from_features"]),
        ("testa.py", ["--from_features", "none.npz"], ["none.npz", "--features"]),
        ("testa.py", ["--from_features", "x.npz", "--baselines"], ["--baselines", "--resume"]),
        ("testa.py", ["--resume", "x.t", "--tvsearch"], ["--tvsearch", "SYSU-MM01"]),
        ("testa.py", ["--resume", "x.t", "--dataset", "llcm", "--shots", "10"], ["--shots", "llcm"]),
        ("testa.py", ["--resume", "x_{trial}.t", "--dataset", "regdb", "--features", "f"], ["--features f", "{trial}"]),
        ("testa.py", ["--resume", "x.t", "--rerank", "magic"], ["--rerank", "magic"]),
        ("testa.py", ["--resume", ""], ["no such file", "--model_path"]),
        ("testa.py", ["--resume", "x.t", "--all", "--protocol", "official"], ["--all", "--protocol"]),
        ("testa.py", ["--resume", "x.t", "--dataset", "regdb", "--mode", "indoor"], ["--mode", "regdb"]),
        ("testa.py", ["--resume", "x.t", "--features", "f_{trial}.npz"], ["{trial}", "sysu"]),
        ("testa.py", ["--resume", "x.t", "--features", "./x.t"], ["x.t, ./x.t", "twice"]),
        ("train_ext_test0.py", ["--dataset", "llcm", "--mode", "indoor"], ["--mode indoor", "SYSU-MM01"]),
        ("train_ext_test0.py", ["--trial", "2"], ["--trial 2", "RegDB"]),
        ("testa.py", ["--resume", "x.t", "--features", "o", "--json", "o"], ["x.t, o, o", "twice"]),
        ("testa.py", ["--resume", "x.t", "--trial", "2"], ["--trial", "RegDB"]),
        (
            "train_ext_test0.py",
            ["--data_path", "nowhere"],
            ["nowhere/train_rgb_resized_img.npy", "pre_process_sysu.py"],
        ),
        ("train_ext_test0.py", ["--dataset", "regdb", "--data_path", "nowhere"], ["nowhere: no such folder"]),
        ("train_ext_test0.py", ["--lr", "nan"], ["--lr", "nan"]),
        ("pre_process_sysu.py", ["--data_path", "nowhere"], ["nowhere: no such folder", "--data_path"]),
        ("pre_process_sysu.py", ["--data_path", "."], ["exp/train_id.txt"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, arguments, words, tmp_path):
    command = [sys.executable, REPO / script, *arguments]
    command += ["--gpu", "cpu"] if script in ("testa.py", "train_ext_test0.py") else []
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
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


def test_weights_that_cannot_be_had_say_what_to_do(sysu_tree, tmp_path, monkeypatch):
    import urllib.error

    import torchvision

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"https.*--weights FILE.*--weights none"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", "imagenet"])
    with pytest.raises(InputError, match=r"absent\.pth"):
        train_ext_test0.main([*flags(sysu_tree, tmp_path), "--weights", "absent.pth"])
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(InputError, match=r"resnet34\.pth.*resnet50"):
        train_ext_test0.main(
            [*flags(sysu_tree, tmp_path), "--arch", "resnet50", "--weights", str(tmp_path / "resnet34.pth")]
        )


def test_training_and_embedding_share_the_compiled_parts():
    net = GFMNet(3, "resnet18")
    names, compiled = list(net.state_dict()), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    net.compile(backend=backend)
    assert list(net.state_dict()) == names
    net(torch.randn(2, 3, 48, 16), torch.randn(2, 3, 48, 16))
    in_training = len(compiled)
    assert in_training > 0
    with torch.inference_mode():
        net.eval().embed(torch.randn(2, 3, 48, 16), "infrared")
    assert len(compiled) > in_training


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_compiled_run_computes_the_same(trained, sysu_tree, tmp_path):
    plain, _ = trained
    more = ["--epochs", "1", "--compile", "--eval_every", "2"]
    compiled = train_ext_test0.main(flags(sysu_tree, tmp_path, *more))
    losses = [json.loads(Path(run["log"]).read_text().splitlines()[0]) for run in (plain, compiled)]
    for name in ("total", "identity", "triplet", "local"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.02)
    state = torch.load(compiled["last"])["net"]
    assert state.keys() == torch.load(plain["last"])["net"].keys()


def test_compiler_that_fails_is_one_line(sysu_tree, tmp_path):
    command = [sys.executable, REPO / "train_ext_test0.py", *flags(sysu_tree, tmp_path), "--compile"]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("train_ext_test0.py: error: --compile: torch.compile failed (")


def test_optimiser_of_a_gpu_goes_on_without_one():
    """A GPU's optimiser is fused, a CPU's is not; the state of either loads into the other."""
    states = []
    for fused in (True, False):
        net = GFMNet(5, "resnet18")
        optimizer = train_ext_test0.build_optimizer(net, "adam", 0.1)
        for group in optimizer.param_groups:
            group["fused"] = fused
        sum(parameter.sum() for parameter in net.parameters()).backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    for state in states:
        net = GFMNet(5, "resnet18")
        optimizer = train_ext_test0.build_optimizer(net, "adam", 0.1)
        optimizer.load_state_dict(state)
        sum(parameter.sum() for parameter in net.parameters()).backward()
        before = net.classifier.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - net.classifier.weight, torch.full_like(before, 0.1), rtol=0.05, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["--cache", "gpu"], ["--cache", "disk", "--workers", "2"], ["--compile"]])
def test_training_on_the_gpu_under_bf16(sysu_tree, tmp_path, more):
    more = ["--gpu", "0", "--amp", "bf16", "--epochs", "2", *more]
    result = train_ext_test0.main([*flags(sysu_tree, tmp_path), *more])
    rows = testa.main(["--data_path", str(sysu_tree), "--resume", result["best"], "--gpu", "0"])
    assert all(math.isfinite(value) for row in rows for value in row["mean"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_steps_do_not_wait_for_the_gpu(sysu_tree, monkeypatch, amp):
    """But for the readings of the losses, which the first step and every tenth have, no step waits for the device."""
    device = torch.device("cuda")
    data = data_loader.sysu_train(sysu_tree, SIZE)
    sampler = data_loader.IdentitySampler(data, 4, 2, 0)
    net = GFMNet(data.num_classes, "resnet18").to(device, memory_format=torch.channels_last)
    optimizer = train_ext_test0.build_optimizer(net, "sgd", 1e-6)
    loader = data_loader.train_loader(data, sampler, 0, device, "gpu")

    def loader_that_forbids():
        batches = iter(loader)
        first = next(batches)  # the epoch's draws go to the device before it
        torch.cuda.set_sync_debug_mode("error")
        yield first
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "LOG_STEPS", 10**9)
    run = partial(engine.train_epoch, net, MethodLoss(), optimizer, augment=TrainAugmentation(), device=device, amp=amp)
    epoch = run(loader)
    try:
        run(loader_that_forbids(), epoch=epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert epoch.step == 2 * len(sampler)


@pytest.mark.gpu
def test_resumed_run_on_the_gpu_is_as_near_as_its_sums(sysu_tree, tmp_path):
    more = ["--gpu", "0", "--optim", "sgd", "--lr", "1e-4"]
    losses = []
    for folder, stops in ((tmp_path / "whole", ["3"]), (tmp_path / "resumed", ["1", "2", "3"])):
        for epochs in stops:
            command = flags(sysu_tree, folder, *more, "--epochs", epochs, "--eval_every", "9", "--resume", "auto")
            result = train_ext_test0.main(command)
        entries = [json.loads(line) for line in Path(result["log"]).read_text().splitlines()]
        losses.append([entry["total"] for entry in entries])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


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


@pytest.mark.parametrize("args", [["--lr", 1], {3: 4}, "flags"])
def test_a_checkpoint_whose_flags_are_none_is_named(args, sysu_tree, tmp_path):
    path = save_network(tmp_path / "net.t", 0, "sysu")
    torch.save(torch.load(path) | {"args": args}, path)
    with pytest.raises(InputError, match=r"net\.t: its 'args' are no training flags"):
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
        patch.setattr(testa.results, "summarise", lambda rows: results)
        patch.setattr(testa.report, "write_page", lambda *page: drawn.append(page[5]))
        testa.main([*argv, "--resume", str(tmp_path / "net_1.t"), "--report", str(tmp_path)])
    (pictures,) = drawn
    cmc = [figure for caption, figure in pictures.items() if caption.startswith("CMC")]
    labels = [[line.get_label() for line in figure.axes[0].lines] for figure in cmc]
    assert labels == [["trained, FC, chosen on test", "trained, FC, chosen on none"]] * 2  # of each direction
