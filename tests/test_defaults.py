"""The published commands as they stand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils

REPO = Path(utils.__file__).parent


@pytest.mark.slow
def test_commands_work_with_their_defaults_at_the_default_path(sysu_tree, tmp_path):
    """`train_ext_test0.py --dataset sysu --gpu 1` and `testa.py --mode all --resume PATH`, shortened to one step.

    The tree lies at ../data/SYSU-MM01, prepared at the default 288x144; the only other flags shorten the run. The
    weights are a state dict of torchvision's ResNet-50, as `--weights imagenet` would fetch.
    """
    import torchvision

    data = tmp_path / "data" / "SYSU-MM01"
    shutil.copytree(
        sysu_tree, data, ignore=lambda _, names: {n for n in names if n.endswith((".npy", "2.jpg", "3.jpg"))}
    )
    work = tmp_path / "work"
    work.mkdir()
    # Residual branches start at zero: features of a tame size, as ImageNet's weights have them.
    torch.save(torchvision.models.resnet50(zero_init_residual=True).state_dict(), work / "resnet50.pth")

    def run(script, *arguments):
        options = {"capture_output": True, "text": True, "cwd": work, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}
        return subprocess.run([sys.executable, REPO / script, *arguments], **options)

    def succeed(*command):
        result = run(*command)
        assert result.returncode == 0, result.stderr
        return result.stdout

    succeed("pre_process_sysu.py")
    train = ["train_ext_test0.py", "--dataset", "sysu", "--gpu", "1", "--weights", "resnet50.pth", "--epochs", "1"]
    refused = run(*train)  # `--gpu 1` means the second of two GPUs, and here there is none
    assert refused.returncode == 2
    assert "--gpu 1: PyTorch sees no CUDA device here; pass --gpu cpu" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (work / "save_model").exists()
    succeed(*train, "--gpu", "cpu")
    name = "sysu_adp_joint_co_nog_ch_nog_sq0_aug_G_erase_0.5_p4_n8_lr_0.1_seed_0_9_best.t"
    out = succeed("testa.py", "--mode", "all", "--resume", f"save_model/{name}", "--gpu", "cpu")
    assert "queries have an image of their person in first place" in out
