"""Query and gallery lists against the published draws, and the files that name them."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

import data_manager
from data_manager import process_gallery_sysu, process_query_llcm, process_query_sysu, process_test_regdb
from eval_metrics import eval_sysu
from utils import InputError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sysu_protocol.json").read_text())
MODES = ("all", "indoor")
GALLERY_CAMERAS = {"all": {1, 2, 4, 5}, "indoor": {1, 2}}


def build_sysu(root):
    """The golden tree as empty files, created in shuffled order."""
    files = [
        root / folder / f"{n:04d}.jpg"
        for folder, count in GOLDEN["images_per_folder"].items()
        for n in range(1, count + 1)
    ]
    random.Random(0).shuffle(files)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (root / "exp").mkdir()
    (root / "exp" / "test_id.txt").write_text(GOLDEN["test_id_txt"] + "\n")


@pytest.fixture(scope="module")
def sysu(tmp_path_factory):
    # A parent folder that itself looks like a camera and a person: ids and cameras come from the end of a path.
    root = tmp_path_factory.mktemp("data") / "cam4" / "0666" / "SYSU-MM01"
    build_sysu(root)
    return root


def relative(paths, root):
    return [Path(path).relative_to(root).as_posix() for path in paths]


def assert_ids_and_cameras_parse(paths, ids, cameras, root):
    """`cam3/0053/0001.jpg` is person 53 seen by camera 3."""
    parts = [path.split("/") for path in relative(paths, root)]
    assert ids.tolist() == [int(person) for _, person, _ in parts]
    assert cameras.tolist() == [int(camera.removeprefix("cam")) for camera, _, _ in parts]


# --------------------------------------------------------------------------------------------------------- SYSU-MM01


@pytest.mark.parametrize("mode", MODES)
def test_golden_lists(sysu, mode):
    paths, ids, cameras = process_query_sysu(str(sysu), mode=mode)
    assert relative(paths, sysu) == GOLDEN["query"][mode]
    assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
    for trial in range(10):
        paths, ids, cameras = process_gallery_sysu(str(sysu), mode=mode, trial=trial)
        assert relative(paths, sysu) == GOLDEN["gallery"][f"{mode}/{trial}"]
        assert_ids_and_cameras_parse(paths, ids, cameras, sysu)


def test_global_generators_are_neither_used_nor_touched(sysu):
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        python_state, numpy_state = random.getstate(), np.random.get_state()
        process_query_sysu(str(sysu))
        assert relative(process_gallery_sysu(str(sysu), trial=3)[0], sysu) == GOLDEN["gallery"]["all/3"]
        assert random.getstate() == python_state
        for now, before in zip(np.random.get_state(), numpy_state, strict=True):
            np.testing.assert_array_equal(now, before)


def test_defaults_are_all_search_trial_0_in_any_order_of_listing(sysu, monkeypatch):
    """File systems list in any order; here always backwards. The published default paths have a slash at the end."""
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    assert relative(process_query_sysu(f"{sysu}/")[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(f"{sysu}/")[0], sysu) == GOLDEN["gallery"]["all/0"]


@pytest.mark.parametrize("mode", MODES)
def test_seeded_multi_shot_draws_ten_or_all_without_repetition(sysu, mode):
    counts, galleries = GOLDEN["images_per_folder"], []
    assert any(count < 10 for count in counts.values())
    for trial in range(2):
        paths, ids, cameras = process_gallery_sysu(str(sysu), mode, trial, shots=10)
        assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
        folders = [path.rpartition("/")[0] for path in relative(paths, sysu)]
        single = process_gallery_sysu(str(sysu), mode, trial)
        assert list(dict.fromkeys(folders)) == [path.rpartition("/")[0] for path in relative(single[0], sysu)]
        assert all(folders.count(folder) == min(10, counts[folder]) for folder in folders)
        assert len(set(paths)) == len(paths)
        galleries.append(paths)
    assert galleries[0] != galleries[1]
    assert paths == process_gallery_sysu(str(sysu), mode, 1, shots=10)[0]


def test_seeded_multi_shot_is_pinned(tmp_path):
    """By hand: random.Random(5).sample of twelve files, then, from the same generator, of three."""
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "test_id.txt").write_text("4")
    for camera, count in ((1, 12), (2, 3)):
        for number in range(1, count + 1):
            file = tmp_path / f"cam{camera}/0004/{number:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    drawn = [int(Path(path).stem) for path in process_gallery_sysu(tmp_path, "indoor", 5, shots=10)[0]]
    assert drawn == [10, 5, 6, 9, 1, 7, 4, 2, 8, 12, 1, 2, 3]


def permute(root, trials=10):
    """Write a rand_perm_cam.mat for the golden tree; returns {(camera, id): rows}."""
    rng, rows, cells = np.random.default_rng(0), {}, np.empty((6, 1), object)
    for camera in range(1, 7):
        cells[camera - 1, 0] = np.empty((700, 1), object)
        for identity in range(1, 701):
            count = GOLDEN["images_per_folder"].get(f"cam{camera}/{identity:04d}", 0)
            rows[camera, identity] = rng.permuted(np.tile(np.arange(1, count + 1, dtype=np.uint8), (trials, 1)), axis=1)
            cells[camera - 1, 0][identity - 1, 0] = rows[camera, identity]
    savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})
    return rows


def test_official_gallery_is_the_first_of_each_permutation(tmp_path):
    build_sysu(tmp_path)
    rows = permute(tmp_path)
    for mode, shots, trial in (("all", 1, 0), ("all", 10, 4), ("indoor", 1, 9), ("indoor", 10, 0)):
        expected = [
            f"cam{camera}/{identity:04d}/{number:04d}.jpg"
            for identity in sorted(int(i) for i in GOLDEN["test_id_txt"].split(","))
            for camera in sorted(GALLERY_CAMERAS[mode])
            for number in rows[camera, identity][trial][:shots]
        ]
        paths, ids, cameras = process_gallery_sysu(str(tmp_path), mode, trial, "official", shots)
        assert relative(paths, tmp_path) == expected
        assert_ids_and_cameras_parse(paths, ids, cameras, tmp_path)


def test_damaged_permutations_and_those_of_other_images_are_refused(tmp_path):
    build_sysu(tmp_path)
    file = tmp_path / "exp" / "rand_perm_cam.mat"

    def refused(words):
        with pytest.raises(InputError, match=rf"rand_perm_cam\.mat: {words}"):
            process_gallery_sysu(str(tmp_path), protocol="official")

    for content in ({"other": 1}, {"rand_perm_cam": 3}, {"rand_perm_cam": "text"}, {"rand_perm_cam": np.ones((6, 1))}):
        savemat(file, content)
        refused("")
    for content in (b"", b"MATLAB"):
        file.write_bytes(content)
        refused("is not a rand_perm_cam")
    permute(tmp_path, trials=9)
    refused(r"has no permutations of 1 \.\. N for 10 trials")
    permute(tmp_path)
    cells = loadmat(file)["rand_perm_cam"]
    rows = next(rows for people in cells[:, 0] for rows in people[:, 0] if rows.shape[1] > 1)
    rows[4, 0] = rows[4, 1]  # a number twice
    savemat(file, {"rand_perm_cam": cells})
    refused(r"has no permutations of 1 \.\. N for 10 trials")
    permute(tmp_path)
    (lost := Path(process_gallery_sysu(str(tmp_path), protocol="official")[0][0])).unlink()
    with pytest.raises(InputError, match=rf"{lost.parent}: \d+ images, but .*rand_perm_cam\.mat permutes \d+"):
        process_gallery_sysu(str(tmp_path), protocol="official")


def test_official_protocol_at_full_size(request, tmp_path):
    """Golden values of an independent evaluator, on features that are a formula of (id, camera, image). The draws are
    the data set's and not ours to ship: pytest tests/test_data_manager.py --rand_perm_cam FILE (test_id.mat beside it).
    """
    if not (file := request.config.getoption("--rand_perm_cam")):
        pytest.skip("needs --rand_perm_cam, the data set's own file")
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "rand_perm_cam.mat").write_bytes(Path(file).read_bytes())
    ids = loadmat(Path(file).with_name("test_id.mat"))["id"].ravel().tolist()
    (tmp_path / "exp" / "test_id.txt").write_text(",".join(map(str, ids)))
    for camera, people in enumerate(loadmat(file)["rand_perm_cam"].ravel(), 1):
        for identity in (i for i in ids if i <= len(people)):
            folder = tmp_path / f"cam{camera}" / f"{identity:04d}"
            folder.mkdir(parents=True)
            for number in range(1, people[identity - 1, 0].shape[1] + 1):
                (folder / f"{number:04d}.jpg").touch()

    def normal(*seed):
        return np.random.default_rng(seed).normal(size=16)

    def embed(paths, ids, cameras):
        numbers = [int(Path(path).stem) for path in paths]
        rows = zip(ids.tolist(), cameras.tolist(), numbers, strict=True)
        return np.stack([normal(1, p) + 0.8 * normal(1, 0, c) + 1.6 * normal(1, c, p, i) for p, c, i in rows])

    golden = json.loads((Path(__file__).parent / "golden" / "sysu_official.json").read_text())
    query = process_query_sysu(tmp_path)
    queries = embed(*query)
    for setting, expected in golden.items():
        mode, shots = setting.split("/")
        results = []
        for trial in range(10):
            gallery = process_gallery_sysu(tmp_path, mode, trial, "official", int(shots))
            images = embed(*gallery)
            distances = np.sqrt((queries**2).sum(axis=1)[:, None] + (images**2).sum(axis=1) - 2 * queries @ images.T)
            results.append(eval_sysu(distances, query[1], gallery[1], query[2], gallery[2]))
        assert distances.shape == (expected["queries"], expected["gallery"])
        cmc = np.mean([cmc for cmc, _, _ in results], axis=0)
        np.testing.assert_allclose(cmc[[0, 4, 9, 19]], expected["cmc_1_5_10_20"], rtol=0, atol=1e-6)
        assert np.mean([mean_ap for _, mean_ap, _ in results]) == pytest.approx(expected["mAP"], abs=1e-6)
        assert results[0][0][0] == pytest.approx(expected["trial0_cmc1"], abs=1e-6)
        assert results[9][1] == pytest.approx(expected["trial9_mAP"], abs=1e-6)


@pytest.mark.parametrize("process", [process_query_sysu, process_gallery_sysu])
def test_val_split_has_the_same_protocol(process, sysu, tmp_path):
    """The validation ids' lists are those of a tree whose test ids they are."""
    build_sysu(tmp_path)
    (tmp_path / "exp" / "test_id.txt").rename(tmp_path / "exp" / "val_id.txt")
    assert relative(process(tmp_path, split="val")[0], tmp_path) == relative(process(sysu)[0], sysu)
    with pytest.raises(InputError, match=r"test_id\.txt"):
        process(tmp_path)


def test_wrong_arguments_are_named(sysu):
    for process in (process_query_sysu, process_gallery_sysu):
        with pytest.raises(ValueError, match="outdoor"):
            process(str(sysu), mode="outdoor")
    with pytest.raises(ValueError, match="offical"):
        process_gallery_sysu(str(sysu), protocol="offical")
    with pytest.raises(ValueError, match="infrared"):
        process_test_regdb(str(sysu), modal="infrared")


def test_folders_of_any_number_of_digits_are_read(sysu_tree, tmp_path):
    tree = shutil.copytree(sysu_tree, tmp_path / "tree")
    identity = next(i for i in data_manager.read_ids(tree, "train") if i < 100 and (tree / f"cam1/{i:04d}").is_dir())
    expected = data_manager.sysu_images(tree, [identity], (1, 2))
    folder = tree / f"cam1/{identity:04d}"
    for digits in (len(str(identity)), 3, 5):
        folder = folder.rename(tree / f"cam1/{identity:0{digits}d}")
        paths, ids, cameras = data_manager.sysu_images(tree, [identity], (1, 2))
        assert [re.sub(r"cam1/\d+", f"cam1/{identity:04d}", path) for path in paths] == expected[0]
        assert (ids.tolist(), cameras.tolist()) == (expected[1].tolist(), expected[2].tolist())
    (tree / f"cam1/{identity:04d}").mkdir()
    with pytest.raises(InputError, match=rf"cam1: has two folders of person {identity}, .*{identity:05d}.*; remove"):
        data_manager.sysu_images(tree, [identity], (1, 2))


def test_hidden_files_are_left_out(tmp_path):
    """macOS writes them."""
    place = tmp_path / "cam1" / "0007"
    place.mkdir(parents=True)
    for name in ("0002.jpg", ".DS_Store", "._0002.jpg", "0001.jpg"):
        (place / name).touch()
    (tmp_path / "cam1" / ".Trash").mkdir()
    folders = data_manager.list_folders(tmp_path, [7], [1])
    assert folders == {str(place): (7, 1, [f"{place}/0001.jpg", f"{place}/0002.jpg"])}


def test_folders_that_are_no_ids_are_named(tmp_path):
    for camera, name in ((1, "p0007"), (2, "p0008")):
        (tmp_path / f"cam{camera}" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"none of the 1 listed ids .* cam1, cam2, .*\(there are p0007, p0008\)"):
        data_manager.sysu_images(tmp_path, [7], (1, 2))


@pytest.mark.parametrize("name", ["0007 (1)", "0007-copy", "0000000007"])
def test_a_folder_whose_name_begins_as_a_number_is_told(name, tmp_path):
    """It is a person's, whose images would silently be fewer. Others, and files, are no matter."""
    for folder in ("0007", "@eaDir"):
        (tmp_path / "cam1" / folder).mkdir(parents=True)
        (tmp_path / "cam1" / folder / "1.jpg").touch()
    (tmp_path / "cam1" / "1.txt").touch()
    assert len(data_manager.sysu_images(tmp_path, [7], [1])[0]) == 1
    (tmp_path / "cam1" / name).mkdir()
    with pytest.raises(
        InputError, match=rf"cam1: folder {re.escape(name)} is named by no number of at most 9 digits; rename it"
    ):
        data_manager.sysu_images(tmp_path, [7], [1])


@pytest.mark.parametrize("lost", ["cam1", "cam1/0007"])
def test_folders_that_cannot_be_listed_are_named(lost, tmp_path, monkeypatch):
    """Not left out, which would only be seen in the counts."""
    for name in ("cam1/0007/1.jpg", "cam2/0007/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()

    def denied(call, folder, **more):
        if Path(folder) == tmp_path / lost:
            raise PermissionError(errno.EACCES, "Permission denied")
        return call(folder, **more)

    for name in ("listdir", "lstat"):  # as where a folder above may not be entered
        monkeypatch.setattr(os, name, partial(denied, getattr(os, name)))
    with pytest.raises(InputError, match=rf"{lost}: cannot be listed \(Permission denied\); .*permissions"):
        data_manager.sysu_images(tmp_path, [7], (1, 2))
    monkeypatch.undo()
    (folder := tmp_path / lost).rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf"{lost}: cannot be listed \(No such file"):
        data_manager.sysu_images(tmp_path, [7], (1, 2))


# ------------------------------------------------------------------------------------------------------ RegDB, LLCM


def test_regdb_lists(tmp_path):
    """In the order of the list, here by descending identity."""
    (tmp_path / "idx").mkdir()
    for modal, trial, camera in (("visible", 1, 1), ("thermal", 10, 2)):
        names = [f"{modal}/{pid}/{trial}_{n}.bmp" for pid in (12, 7, 0) for n in range(2)]
        lines = [f"{name} {name.split('/')[1]}" for name in names]
        (tmp_path / "idx" / f"test_{modal}_{trial}.txt").write_text("\n".join(lines) + "\n")
        paths, ids, cameras = process_test_regdb(f"{tmp_path}/", trial, modal)
        assert relative(paths, tmp_path) == names
        assert ids.tolist() == [12, 12, 7, 7, 0, 0]
        assert cameras.tolist() == [camera] * 6
    assert process_test_regdb(tmp_path)[0] == process_test_regdb(tmp_path, 1, "visible")[0]


LLCM_FILES = {  # (folder, camera, id) -> images
    **{
        ("test_vis", camera, identity): 1 + (camera * identity) % 4 for camera in (1, 4, 9) for identity in (3, 12, 700)
    },
    **{("test_nir", camera, identity): 2 + (camera + identity) % 3 for camera in (1, 2, 9) for identity in (3, 12)},
    ("test_vis", 5, 99): 2,  # no test id
}


@pytest.fixture
def llcm(tmp_path):
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "test_id.txt").write_text("700,12,3\n")
    for (folder, camera, identity), count in LLCM_FILES.items():
        for number in range(count):
            file = tmp_path / folder / f"cam{camera}" / f"{identity:04d}" / f"{identity:04d}_c{camera}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return tmp_path


@pytest.mark.parametrize(("modality", "folder"), [("visible", "test_vis"), ("infrared", "test_nir")])
def test_llcm_lists_against_a_plain_loop(llcm, modality, folder):
    names = {
        (identity, camera): [
            f"{folder}/cam{camera}/{identity:04d}/{identity:04d}_c{camera}_{n}.jpg" for n in range(count)
        ]
        for (kind, camera, identity), count in LLCM_FILES.items()
        if kind == folder and identity != 99
    }
    paths, ids, cameras = process_query_llcm(llcm, modality)
    assert relative(paths, llcm) == [path for key in sorted(names) for path in names[key]]
    assert list(zip(ids, cameras, strict=True)) == [key for key in sorted(names) for _ in names[key]]
    folders = data_manager.llcm_folders(llcm, modality)
    for trial in (0, 7):
        random.seed(trial)  # as the data set's own code does it
        expected = [random.choice(names[key]) for key in sorted(names)]
        paths, ids, cameras = data_manager.draw_gallery(folders, trial)
        assert relative(paths, llcm) == expected
        assert list(zip(ids, cameras, strict=True)) == sorted(names)


def end_this_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs fork")
def test_permutations_that_end_the_process_of_their_reader_are_one_line(tmp_path, monkeypatch):
    """One flipped byte in a .mat is enough."""
    (tmp_path / "rand_perm_cam.mat").write_bytes(b"x")
    monkeypatch.setattr(data_manager, "_read_mat", end_this_process)
    with pytest.raises(InputError, match=r"is not a rand_perm_cam.mat \(BrokenProcessPool\); download it again"):
        data_manager.load_permutations(tmp_path / "rand_perm_cam.mat")
