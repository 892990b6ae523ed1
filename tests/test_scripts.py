"""The scripts from their flags to their files: training, resuming, testing, on the small demo trees."""

import shutil

import pytest
import torch

import pre_process_sysu
import testa
import train_ext_test0
from conftest import exit_status, flags, save_network
from utils import InputError


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
            ["--data_path", "."],
            ["train_rgb_resized_img.npy", "pre_process_sysu.py"],
        ),
        (train_ext_test0, ["--data_path", "nowhere"], ["nowhere: no such folder", "--data_path"]),
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
