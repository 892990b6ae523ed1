"""Tests from the flags to the table: against plain loops over files, and every protocol from saved features."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentError, ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch

import testa
from conftest import save_network, search_flags
from data_manager import process_gallery_sysu, process_query_sysu
from datasets import DATASETS
from eval_metrics import eval_sysu
from model import load_network
from testing import evaluation, re_rank
from testing.features import load_features
from tests.oracles import plain_embedding

REPO = Path(testa.__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random network, saved with the words that its rows carry."""
    path = save_network(tmp_path_factory.mktemp("network") / "net.t", 0, "sysu", stages=4)
    torch.save(torch.load(path) | {"epoch": 3, "selection": "test"}, path)
    return str(path)


@pytest.fixture(scope="module")
def saved(checkpoint, sysu_tree, tmp_path_factory):
    """(the table of --all, its output, the flags that test the features that it saved)."""
    file, lines = tmp_path_factory.mktemp("features") / "features.npz", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: lines.append(" ".join(map(str, text))))
        table = testa.main(search_flags(sysu_tree, checkpoint, "--all", "--features", file))
    return table, "\n".join(lines), ["--gpu", "cpu", "--from_features", str(file)]


def copy_lists(sysu_tree, tree):
    """The tree's lists and empty images."""
    for file in sysu_tree.rglob("*"):
        if file.suffix in (".jpg", ".txt", ".mat"):
            (tree / file.relative_to(sysu_tree)).parent.mkdir(parents=True, exist_ok=True)
            (tree / file.relative_to(sysu_tree)).write_bytes(b"" if file.suffix == ".jpg" else file.read_bytes())
    return tree


def test_table_is_what_a_plain_loop_over_files_gives(checkpoint, sysu_tree, tmp_path, capsys):
    """The whole of testa against one image at a time, embedded and ranked in plain steps."""
    out = tmp_path / "results.json"
    more = ["--mode", "indoor", "--json", out, "--test_batch", "7", "--workers", "2", "--table", "full"]
    rows = testa.main(search_flags(sysu_tree, checkpoint, *more))
    assert json.loads(out.read_text())["results"] == rows
    assert [row["feature"] for row in rows] == ["POOL", "FC"]
    printed = capsys.readouterr().out
    assert "data: demo data like SYSU-MM01; mode: indoor; direction: infrared to visible; protocol: seeded" in printed
    assert f"checkpoint: {checkpoint} (adp, resnet18, 96x48, epoch 3)" in printed

    embed = plain_embedding(checkpoint)
    query, q_ids, q_cameras = process_query_sysu(sysu_tree)
    queries = np.stack([embed(path, "infrared") for path in query])
    for trial in (0, 9):
        gallery, g_ids, g_cameras = process_gallery_sysu(sysu_tree, "indoor", trial)
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


def test_every_protocol_alone_gives_its_rows_of_the_whole_table(saved, sysu_tree, tmp_path, capsys):
    """From features, with the images gone."""
    table, printed, features = saved
    assert len(table) == 16
    flags = [*features, "--data_path", str(copy_lists(sysu_tree, tmp_path / "lists"))]
    assert testa.main([*flags, "--all"]) == table
    for draws, shots, mode in (("seeded", 10, "all"), ("official", 1, "indoor")):
        setting = {"protocol": draws, "shots": shots, "mode": mode}
        capsys.readouterr()
        rows = testa.main([*flags, *(f"--{name}={value}" for name, value in setting.items())])
        assert rows == [row for row in table if all(row[name] == value for name, value in setting.items())]
        numbers = [f"{rows[1]['mean'][name]:.2f} ± {rows[1]['std'][name]:.2f}" for name in ("Rank-1", "mAP", "mINP")]
        assert re.search(r"\s+".join(numbers), capsys.readouterr().out)
        assert re.search(rf"^{mode} +{draws} +{shots} .*" + r"\s+".join(numbers), printed, re.M)


def test_queries_without_a_match_are_not_counted(saved, sysu_tree, tmp_path, capsys):
    tree = copy_lists(sysu_tree, tmp_path / "tree")
    _, ids, _ = process_query_sysu(tree)
    for camera in (1, 2):
        shutil.rmtree(tree / f"cam{camera}" / f"{ids[0]:04d}", ignore_errors=True)
    (row, _) = testa.main([*saved[2], "--data_path", str(tree), "--mode", "indoor"])
    answered = len(ids) - (ids == ids[0]).sum()
    assert {(trial["queries"], trial["evaluated"]) for trial in row["per_trial"]} == {(len(ids), answered)}
    assert f"% of {answered} infrared queries have" in capsys.readouterr().out


def test_what_is_missing_is_named(saved, sysu_tree, tmp_path, capsys):
    """Cameras, and the official protocol's file."""
    tree = copy_lists(sysu_tree, tmp_path / "tree")
    for camera in (5, 6):
        shutil.rmtree(tree / f"cam{camera}")
    (tree / "exp" / "rand_perm_cam.mat").unlink()
    flags = [*saved[2], "--data_path", str(tree)]
    testa.main([*flags, "--mode", "indoor"])
    assert "no test id has an image of camera 6\n" in capsys.readouterr().out
    (note,) = DATASETS["sysu"].searches(tree, select="val").notes
    assert note.endswith("no val id has an image of camera 5, 6")
    assert {row["protocol"] for row in testa.main([*flags, "--all"])} == {"seeded"}
    printed = capsys.readouterr().out
    assert "no test id has an image of camera 5, 6\n" in printed
    assert "rand_perm_cam.mat, so without the official protocol" in printed


def test_reranked_rows_stand_beside_the_plain_ones(saved, sysu_tree):
    flags = [*saved[2], "--data_path", str(sysu_tree)]
    rows = testa.main([*flags, "--rerank", "k_reciprocal", "random_walk"])
    assert [(row["feature"], row["reranking"]) for row in rows] == [
        (feature, reranking) for feature in ("POOL", "FC") for reranking in ("none", "k_reciprocal", "random_walk")
    ]
    assert rows[::3] == saved[0][:2]

    arrays = np.load(flags[3])
    query, q_ids, q_cameras = process_query_sysu(sysu_tree)
    gallery, g_ids, g_cameras = process_gallery_sysu(sysu_tree, trial=2)

    def features(paths, modality):
        row = {path: i for i, path in enumerate(arrays[f"{modality}/paths"])}
        rows = [row[Path(path).relative_to(sysu_tree).as_posix()] for path in paths]
        return arrays[f"{modality}/trained/FC"][rows]

    for row, measure in ((rows[4], re_rank.k_reciprocal), (rows[5], re_rank.random_walk)):
        distances = measure(features(query, "infrared"), features(gallery, "visible"))
        _, mean_ap, mean_inp = eval_sysu(distances, q_ids, g_ids, q_cameras, g_cameras)
        assert row["per_trial"][2]["metrics"]["mAP"] == pytest.approx(100 * mean_ap, abs=1e-3)
        assert row["per_trial"][2]["metrics"]["mINP"] == pytest.approx(100 * mean_inp, abs=1e-3)


def test_all_with_baselines_is_one_table(checkpoint, sysu_tree):
    rows = testa.main(search_flags(sysu_tree, checkpoint, "--all", "--baselines"))
    models = [("gray pixels", "pixels"), ("colour histogram", "colours"), ("HOG", "gradients")]
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


def test_gradient_histograms_see_shape_not_tone():
    images = torch.zeros(3, 3, 128, 64, dtype=torch.uint8)
    images[:2, :, 40:90, 20:44] = 200  # a box, its negative, and stripes
    images[1] = 255 - images[1]
    images[2, :, ::16] = 200
    box, negative, stripes = testa.gradient_histograms(images)
    torch.testing.assert_close(box, negative, atol=0.02, rtol=0)
    assert box @ stripes < 0.5
    torch.testing.assert_close(stripes.norm(), torch.tensor(1.0))


@pytest.mark.slow
def test_table_can_be_cut_off_and_needs_no_unicode(saved, sysu_tree, tmp_path):
    command = [sys.executable, REPO / "testa.py", *saved[2], "--data_path", sysu_tree]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    whole = subprocess.run(command, capture_output=True, text=True, env=env)
    assert whole.returncode == 0
    assert whole.stderr == ""
    assert " ? " in whole.stdout

    reader = subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    cut = subprocess.Popen(
        [*command, "--json", tmp_path / "r.json"], stdout=reader.stdin, stderr=subprocess.PIPE, env=env
    )
    reader.stdin.close()
    assert cut.communicate()[1] == b""
    assert json.loads((tmp_path / "r.json").read_text())["results"]


def test_flags_of_any_plain_value_stand_in_the_saved_features_and_on_the_page(sysu_tree, tmp_path):
    path, flags = save_network(tmp_path / "net.t", 0, "sysu"), {"dataset": "sysu", "milestones": [20, 50], "lr": 0.1}
    torch.save(torch.load(path) | {"args": flags}, path)
    testa.main(search_flags(sysu_tree, path, "--features", tmp_path / "f.npz", "--report", tmp_path))
    _, origin = load_features(tmp_path / "f.npz")
    assert origin["flags"] == flags
    assert "[20, 50]" in (tmp_path / "report.html").read_text()


def test_every_row_of_ten_trials_is_on_the_page(regdb_tree, tmp_path):
    """Trials whose epochs were chosen in two ways are two settings, which come apart in the list of results."""
    for trial, selection in ((1, "test"), (2, "none")):
        path = save_network(tmp_path / f"net_{trial}.t", trial, "regdb")
        content = torch.load(path)
        content["args"]["trial"] = trial
        torch.save(content | {"selection": selection}, path)
    results, more = [], ["--dataset", "regdb", "--all"]
    for trial in (1, 2):
        results += testa.main(search_flags(regdb_tree, tmp_path / f"net_{trial}.t", *more))
    results = [row | {"trials": [1]} for row in results]  # or the two would differ in that, too
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testa.results, "summarise", lambda rows: results)
        patch.setattr("drawing.report.write_page", lambda *page: drawn.append(page[5]))
        testa.main(search_flags(regdb_tree, tmp_path / "net_1.t", *more, "--report", tmp_path))
    (pictures,) = drawn
    cmc = [figure for caption, figure in pictures.items() if caption.startswith("CMC")]
    labels = [[line.get_label() for line in figure.axes[0].lines] for figure in cmc]
    assert labels == [["trained, FC, chosen on test", "trained, FC, chosen on none"]] * 2  # of each direction


def test_flags_of_a_test_and_their_values():
    parser = ArgumentParser(exit_on_error=False)
    evaluation.add_flags(parser)
    assert vars(parser.parse_args([])) == {
        **{"dataset": "sysu", "data_path": None, "model_path": "save_model/", "mode": "all", "protocol": "seeded"},
        **{"shots": 1, "trial": None, "tvsearch": False, "test_batch": 64, "workers": 4, "amp": "off", "gpu": "0"},
    }
    right = "--mode indoor --protocol official --shots 10 --amp bf16 --amp off --trial 1 --trial 10 --test_batch 1"
    parser.parse_args(f"{right} --test_batch 65536 --workers 0 --workers 1024".split())
    wrong = "dataset=market mode=out protocol=own shots=2 trial=0 trial=11 test_batch=0 test_batch=65537 workers=-1"
    for flag in f"{wrong} workers=1025 amp=fp16".split():
        with pytest.raises(ArgumentError, match=flag.split("=")[0]):
            parser.parse_args([f"--{flag}"])


def test_a_table_says_what_its_network_is(tmp_path):
    path, flags = save_network(tmp_path / "net.t", 0), {"dataset": "regdb", "trial": 3}
    content = torch.load(path) | {"args": {}}
    for more, words in (
        ({}, "adp, resnet18, 96x48, epoch unknown"),
        ({"args": {"method": "caj", "afam": 1, "local": 0}, "epoch": 3}, "caj without local, resnet18, 96x48, epoch 3"),
        ({"args": flags | {"afam": 0, "local": 0}, "selection": "val", "epoch": 3, "sums": {"step": 7}}, ""),
    ):
        origin = evaluation.checkpoint_origin(path, content | more, *load_network(content, path), "data")
        assert words in (origin["network"], "")
        assert (origin["flags"], origin["checkpoint"]) == (more.get("args", {}), str(path))
    assert origin["network"] == "adp without afam without local, resnet18, 96x48, epoch 4, 7 steps of it"
    assert [origin[name] for name in ("dataset", "trial", "selection")] == ["regdb", 3, "val"]
