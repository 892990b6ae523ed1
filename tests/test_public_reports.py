"""What users of re-identification tools, and of what these are built with, have reported, rebuilt with small inputs.

Mended: wrong, silent, refused, a traceback or unclear here as well; a test, here or in the place named, failed before.
Sentence: right, but no page said so. Held: right, or one clear line. Names are of repositories on GitHub, and issues if
not marked as pull requests; Baseline is mangye16/Cross-Modal-Re-ID-baseline, layumi is Person_reID_baseline_pytorch.

| report | situation here | result |
|---|---|---|
| ZYK100/LLCM#25 | `--tvsearch True`, as published | mended: another remedy (test_bad_input.py) |
| nanoGPT#325, OpenTAD#44, pytorch-lightning#20233 | `_orig_mod.`, `model.`; weights under `model` | mended: refused |
| deep-person-reid#207 (a table), LLCM#12 (lists) | backslashes, `./`, semicolons, tabs in --csv | mended: refused |
| the same | two rows of one image, with other labels | mended: the last one won in silence |
| ios_screenshots#1, ultralytics#4403, PR#24594 | `.heic`, no suffix in a folder | mended: left out in silence |
| CLIP-ReID#10, TransReID#64, boxmot#1288 | `Embedder` of arrays, PIL images, one path | mended: a TypeError |
| frigate#99, #771, #24289 | the zone changes between calls of `index` | mended: wrong times (test_search.py) |
| frigate's file names | seconds since 1970: `{time:%s}` | mended: "fits no image" (test_index.py) |
| VLM-R1#289, detectron2#91 | two `torchrun` on one machine | sentence: `--standalone` |
| VersReID#1, layumi#176, deep-person-reid#578 | which similarity is the same person? | sentence |
| layumi#138 | the query is in the gallery | sentence: it finds itself first |
| gluon-cv#878, layumi#178, #187, #407 | whole frames; crops of any shape | sentence |
| fast-reid#177, ReID-Survey#6 | arrays of OpenCV in an ONNX file | sentence: BGR is no error |
| Baseline#18, Hetero-center-loss#4 | the log and the table differ: ten trials | sentence |
| ProTrek#18, stable-diffusion-webui#2628 | the page of another machine | sentence: `ssh -L` |
| ultralytics#4728, Ultra-Fast-Lane-Detection#84 | labels from 1, with gaps | held; sentence |
| TransReID#62, SOLIDER-REID#12, deep-person-reid#509 | queries and gallery of one camera (LLCM) | held |
| fast-reid#147, deep-person-reid#585 | ONNX: alone, in a batch; floats, [B, H, W, 3] | held: equal; refused |
| CenterNet#649, LlamaFactory PR#10764 | prepare, train, index with spawn and forkserver | held |
| AlignedReID#50, layumi#266, deep-person-reid#455 | re-ranking of 9,500 images | held: 0.3 GB |
| deep-person-reid#270, fast-reid#131, #167 | the rate after a resume; other flags | held (test_crash.py, test_run.py) |
| Baseline#4, #19, DDAG#5, LLCM#19 | no such checkpoint; RegDB's trials and directions | held (test_regdb.py) |
| ReID-Survey#20, fast-reid#449 | a smaller batch on each GPU | held: `--batch_size` is the whole batch |
| no report found | `Thumbs.db` in a folder; file names of Market-1501 | held: named; a pattern reads them |
"""

import shutil

import numpy as np
import pytest
import torch

from conftest import exit_status, save_network
from core.checkpoint import load_checkpoint
from model import load_network
from tools.embedder import Embedder
from tools.search import __main__ as search
from tools.search.labels import read_labels
from utils import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "net.t", seed=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrapped_models_do_not_matter(prefix, checkpoint):
    content = load_checkpoint(checkpoint)
    wrapped = {prefix + name: value for name, value in content["net"].items()}
    net, _ = load_network(content | {"net": wrapped}, "x.t")
    assert all(torch.equal(value, content["net"][name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "text",
    [
        "path,camera\na\\b.jpg,3\n",
        "path,camera\n./a/b.jpg,3\n",
        "path;camera;time\na/b.jpg;3;\n",
        "\ufeffcamera\tpath\r\n3\ta\\b.jpg\r\n",
        "path, camera\na/b.jpg, 3\na/b.jpg, 3\n",
        "path,camera\na/b.jpg,3,,\n",
        "path , camera \na/b.jpg,3 \n",
        'path, camera\na/b.jpg, "3"\n',
        "note,path,camera,note\nx,a/b.jpg,3,y\n",
    ],
)
def test_tables_of_windows_and_of_spreadsheets(text, tmp_path):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
    assert read_labels(None, tmp_path / "labels.csv")("a/b.jpg") == {"camera": "3"}


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        ("path,camera\na.jpg,3\n./a.jpg,4\n", "utf-8", "line 3: a.jpg has other labels above; keep one"),
        ("path,track,camera,track\na.jpg,1,3,2\n", "utf-8", "has two columns track; keep one"),
        ("path,camera,path\na.jpg,3,b.jpg\n", "utf-8", "has two columns path; keep one"),
        ("path,person\nb.jpg,x\na.jpg,Doe, Ann\n", "utf-8", "line 3: has more fields than columns; put quotes"),
        ("path,camera\na.jpg,3\n", "utf-16", "cannot be read .*; save it as CSV in UTF-8"),
    ],
)
def test_tables_that_contradict_themselves_or_cannot_be_read(text, encoding, words, tmp_path):
    (tmp_path / "labels.csv").write_text(text, encoding)
    with pytest.raises(InputError, match=words):
        read_labels(None, tmp_path / "labels.csv")


def test_files_that_are_left_out_of_an_index_are_counted(sysu_tree, checkpoint, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = next(sysu_tree.glob("cam1/*/*.jpg"))
    for name in ("a.heic", "b.HEIC", "crop", ".DS_Store"):
        shutil.copy(image, folder / name)
    argv = ["index", str(folder), "--index", str(tmp_path / "index.db"), "--gpu", "cpu", "--workers", "0"]
    argv += ["--resume", str(checkpoint), "--modality", "visible"]
    assert exit_status(search, argv) == 2
    expected = f"{folder}: contains no image by its name (but .heic (2), no suffix (1); convert these, or give them a"
    assert expected in capsys.readouterr().err
    shutil.copy(image, folder / "c.jpg")
    assert search.main(argv)["images"] == 1
    assert "left out, as no images by their names: .heic (2), no suffix (1)\n" in capsys.readouterr().out


def test_the_library_says_that_it_takes_files(sysu_tree, checkpoint):
    embedder, image = Embedder(checkpoint, gpu="cpu"), next(sysu_tree.glob("cam1/*/*.jpg"))
    for wrong in ([np.zeros((96, 48, 3), np.uint8)], str(image), image, [image.open("rb")]):
        with pytest.raises(InputError, match="^Embedder: takes a list of image files; embed_crops takes arrays$"):
            embedder(wrong, "visible")
    features = embedder([image, str(image)], "visible")
    assert features.shape == (2, 256)
    np.testing.assert_array_equal(embedder((path for path in (image, str(image))), "visible"), features)
