"""Same person or not: error rates against scikit-learn and plain counts, and thresholds from a test to a search."""

import hashlib
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_curve

import testa
from conftest import exit_status, save_network, search_flags
from datasets import sysu_searches
from testing import verification
from tools.search import __main__ as search
from tools.search.finder import least_similarity_of
from utils import InputError


@pytest.fixture(scope="module")
def rated(sysu_tree):
    """(rates, similarities of the pairs that see each other, whether a pair is of one person), with many ties."""
    (test,) = [sysu_searches(sysu_tree, trials=[0])]
    (one,) = test.searches
    generator = torch.Generator().manual_seed(0)
    sizes = {modality: len(paths) for modality, paths in test.paths.items()}
    own = {m: torch.tensor([int(path.split("/")[-2]) for path in paths]) for m, paths in test.paths.items()}
    centres = torch.randint(-1, 2, (2000, 6), generator=generator).float() + 0.1
    features = {
        m: {"FC": F.normalize(centres[own[m]] + torch.randint(-2, 3, (n, 6), generator=generator))}
        for m, n in sizes.items()
    }
    values, same, hidden = [], [], 0
    pairs = product(zip(*one.query[1:], strict=True), zip(*one.gallery[1:], strict=True))
    for (row, identity, camera), (other_row, other, other_camera) in pairs:
        if (camera, other_camera) == (3, 2):
            hidden += 1
            continue
        similarity = features["infrared"]["FC"][row] @ features["visible"]["FC"][other_row]
        values.append(similarity.item())
        same.append(identity == other)
    assert hidden
    return verification.error_rates(features, one, "FC"), np.float32(values), np.array(same)


def test_rates_are_those_of_scikit_learn(rated):
    rates, values, same = rated
    assert (rates["same"], rates["different"]) == (same.sum(), (~same).sum())
    false, true, _ = roc_curve(same, np.round(values, 5), drop_intermediate=False)
    for share, positives in zip(rates["false_positives"], rates["true_positives"], strict=True):
        assert positives == pytest.approx(true[false <= share + 1e-9].max(), abs=1e-9)
    equal = np.abs(false - (1 - true)).argmin()
    assert rates["equal_error"] == pytest.approx((false[equal] + 1 - true[equal]) / 2, abs=1e-9)
    assert [rates["false_positives"][i] for i in (0, 10, 20, 30, 40)] == pytest.approx([1e-4, 1e-3, 0.01, 0.1, 1])
    assert rates["true_positives"][-1] == 1
    assert 0.02 < rates["equal_error"] < 0.48


def test_pairs_with_the_similarity_are_those_that_count(rated):
    rates, values, same = rated
    values = np.round(values, 5)
    for share, positives, least in zip(
        rates["false_positives"], rates["true_positives"], rates["similarity"], strict=True
    ):
        accepted = values >= least + 2e-5  # between ties, which are further apart: pairs at the limit do not count
        assert accepted[~same].mean() <= share + 1e-9
        assert accepted[same].mean() == pytest.approx(positives)


def test_a_threshold_is_just_above_the_first_pair_that_is_one_too_many(monkeypatch):
    distances = np.float32([0.2, 0.3, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
    monkeypatch.setattr(verification, "pair_distances", lambda *_: (np.float32([0.1, 0.3]), distances))
    rates = verification.error_rates(None, None, None)
    accepted = [int((1 - distances >= np.float32(least)).sum()) for least in rates["similarity"]]
    assert (accepted[0], accepted[30], accepted[34], accepted[36], accepted[40]) == (
        0,
        1,
        1,
        3,
        10,
    )  # 0.2512 and 0.3981
    assert (rates["true_positives"][30], rates["true_positives"][36]) == (0.5, 1)


def test_equal_error_by_hand(monkeypatch):
    """At 0.3, two of four pairs of two people are accepted, and one of three of one person is missed."""
    pairs = np.float32([0.5, 0.1, 0.3]), np.float32([0.9, 0.3, 0.7, 0.3])
    monkeypatch.setattr(verification, "pair_distances", lambda *_: pairs)
    rates = verification.error_rates(None, None, None)
    assert rates["equal_error"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert rates["equal_error_similarity"] == pytest.approx(0.7)
    assert rates["similarity"][-1] == -1


def test_what_is_said_and_saved():
    true, similarity = ([n / 40 for n in range(41)], [1 - n / 40 for n in range(41)])
    rates = {"false_positives": verification.RATES, "true_positives": true, "similarity": similarity}
    rates |= {"equal_error": 0.123, "equal_error_similarity": 0.4567}
    assert verification.describe(rates) == (
        "Pairs of one person that are recognised: 75.0 % at 10 % false positives (similarity 0.250), 50.0 % at 1 % "
        "false positives (similarity 0.500), 25.0 % at 0.1 % false positives (similarity 0.750); equal error rate "
        "12.3 % (0.457)."
    )
    setting = {"mode": "all", "direction": "infrared to visible", "protocol": "seeded", "shots": 1}
    saved = verification.calibration(Path("c.t"), "abc", "SYSU-MM01", setting, "FC", rates)
    about = {"checkpoint": "c.t", "sha256": "abc", "feature": "FC", "data": "SYSU-MM01"}
    assert saved == about | {"setting": "all-search, infrared to visible, seeded protocol, 1-shot"} | rates


def test_means_over_searches():
    """Of similarities the greatest: so no search has more false positives than the rate that it stands for."""
    several = [{"same": 2, "true_positives": [0.0, 1.0], "similarity": [0.9, 0.2]}]
    several.append({"same": 4, "true_positives": [0.5, 1.0], "similarity": [0.8, 0.4]})
    means = {"same": 3, "true_positives": [0.25, 1.0], "similarity": [0.9, 0.4]}
    assert verification.mean_rates(several) == means


@pytest.mark.slow
def test_from_a_test_to_a_search(sysu_tree, tmp_path, capsys):
    checkpoint, file, page = save_network(tmp_path / "net.t", 0, "sysu"), tmp_path / "c.json", tmp_path / "page"
    results = tmp_path / "r.json"
    flags = ["--calibrate", file, "--json", results, "--report", page]
    testa.main(search_flags(sysu_tree, checkpoint, *flags))
    line = capsys.readouterr().out.splitlines()[-1]
    content, rates = json.loads(file.read_text()), json.loads(results.read_text())["verification"]
    assert content["data"] == "demo data like SYSU-MM01"
    assert content["setting"] == "all-search, infrared to visible, seeded protocol, 1-shot"
    assert {name: content[name] for name in rates} == rates
    tenth = rates["false_positives"].index(pytest.approx(0.1))
    said = f"{100 * rates['true_positives'][tenth]:.1f} % at 10 % false positives"
    assert said in line
    assert f"equal error rate {100 * rates['equal_error']:.1f} %" in line
    assert f"equal error rate {100 * rates['equal_error']:.1f} %" in (page / "report.html").read_text()

    index = str(tmp_path / "i.db")
    queries = sorted(map(str, sysu_tree.glob("cam3/*/*.jpg")))[:2]
    program = ["--index", index, "--gpu", "cpu", "--workers", "0"]
    search.main(["index", f"{sysu_tree}/cam1", *program, "--resume", str(checkpoint), "--modality", "visible"])
    ask = ["query", *queries, *program, "--modality", "infrared", "--top", "100"]
    every = [image for result in search.main(ask) for image in result["found"]]
    least = rates["similarity"][tenth]
    assert min(image["similarity"] for image in every) < least < max(image["similarity"] for image in every)
    wanted = [image["path"] for image in every if image["similarity"] >= least]
    by_rate = search.main([*ask, "--false_positives", "0.11", "--calibration", str(file)])  # 0.1 is the next below
    by_value = search.main([*ask, "--min_similarity", str(least)])
    for found in (by_rate, by_value):
        assert [image["path"] for result in found for image in result["found"]] == wanted
    assert [result["found"] for result in search.main([*ask, "--min_similarity", "1"])] == [[], []]
    assert "none: no image has a similarity of 1.000" in capsys.readouterr().out

    other = save_network(tmp_path / "other.t", 1, "sysu")
    testa.main(search_flags(sysu_tree, other, "--calibrate", tmp_path / "o.json"))
    for more, text in (
        (["--false_positives", "0.1"], "belong together"),
        (["--calibration", str(file)], "belong together"),
        (["--false_positives", "0.1", "--calibration", f"{tmp_path}/o.json"], "is of another checkpoint"),
        (["--false_positives", "1e-6", "--calibration", str(file)], "begins at 0.0001; pass more"),
        (["--false_positives", "0.1", "--calibration", str(results)], "make it with testa.py --calibrate"),
    ):
        with pytest.raises(InputError, match=text):
            search.main([*ask, *more])


def test_a_checkpoint_that_is_replaced_during_the_test_is_not_calibrated(sysu_tree, tmp_path, monkeypatch):
    path = save_network(tmp_path / "net.t", 0)
    show = testa.results.print_results

    def replaced(*args):
        save_network(path, 1)
        show(*args)

    monkeypatch.setattr(testa.results, "print_results", replaced)
    flags = search_flags(sysu_tree, path, "--calibrate", tmp_path / "c.json")
    with pytest.raises(InputError, match="net.t: was replaced during the test"):
        testa.main(flags)
    assert not (tmp_path / "c.json").exists()
    monkeypatch.setattr(testa.results, "print_results", show)
    testa.main(flags)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "c.json").read_text())["sha256"] == sha256


def test_what_calibration_needs(tmp_path, capsys):
    for flags in (["--from_features", "f.npz"], ["--dataset", "regdb", "--resume", "x_{trial}.t"]):
        assert exit_status(testa, [*flags, "--gpu", "cpu", "--calibrate", tmp_path / "c.json"]) == 2
        assert "is of one checkpoint; pass one with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rates", "similarities", "words"),
    [
        ([0.01, 0.1, 1.0], [0.9, 0.7], "its rates and similarities do not fit"),
        ([0.01, 0.1], [0.9, 0.7, 0.1], "its rates and similarities do not fit"),
        ([0.01, 0.1], [0.7, 0.9], "its rates and similarities do not fit"),
        ([0.1, 0.01], [0.9, 0.7], "its rates and similarities do not fit"),
        ([0.01, 0.1], [5.0, 0.7], r"similarity\[0\]: expected float <= 1.001"),
        ([0.01, 0.1], [0.7, -5.0], r"similarity\[1\]: expected float >= -1.001"),
    ],
)
def test_a_calibration_that_contradicts_itself(rates, similarities, words, tmp_path):
    file = calibration(tmp_path / "c.json", rates, similarities)
    with pytest.raises(InputError, match=words):
        verification.least_similarity(file, 0.1, "s", "FC")


def test_the_similarity_that_flags_ask_for(tmp_path):
    file, about = calibration(tmp_path / "c.json", [0.01, 0.1, 1.0], [0.9, 0.7, -1.0]), {"sha256": "s", "feature": "FC"}
    for share, value, least in ((0.01, None, 0.9), (0.5, None, 0.7), (1, None, -1), (None, 0.3, 0.3), (None, None, -1)):
        args = SimpleNamespace(false_positives=share, calibration=share and file, min_similarity=value)
        assert least_similarity_of(args, about) == least
    for other in ({"sha256": "t"}, {"feature": "POOL"}):
        with pytest.raises(InputError, match="is of another checkpoint"):
            least_similarity_of(SimpleNamespace(false_positives=1, calibration=file), about | other)


def calibration(file, rates, similarities):
    about = {"checkpoint": "c.t", "feature": "FC", "data": "d", "setting": "x", "sha256": "s"}
    file.write_text(json.dumps(about | {"false_positives": rates, "similarity": similarities}))
    return file
