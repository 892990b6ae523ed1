"""Query and gallery lists against the published draws, and file-list parsing."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

import data_manager
from data_manager import (
    llcm_test,
    process_gallery_llcm,
    process_gallery_sysu,
    process_query_llcm,
    process_query_sysu,
    process_test_regdb,
    regdb_test,
    sysu_test,
)
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


@pytest.fixture
def regdb(tmp_path):
    """Trial t lists identities in reverse order and starts at a different image."""
    (tmp_path / "idx").mkdir()
    for trial in (1, 2, 10):
        for modal, folder in (("visible", "Visible"), ("thermal", "Thermal")):
            lines = [f"{folder}/{pid}/{modal}_{trial}_{n}.bmp {pid}" for pid in (12, 7, 0) for n in range(2)]
            (tmp_path / "idx" / f"test_{modal}_{trial}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def relative(paths, root):
    return [Path(path).relative_to(root).as_posix() for path in paths]


def assert_ids_and_cameras_parse(paths, ids, cameras, root):
    """`cam3/0053/0001.jpg` is person 53 seen by camera 3."""
    parts = [path.split("/") for path in relative(paths, root)]
    assert [int(i) for i in ids] == [int(person) for _, person, _ in parts]
    assert [int(c) for c in cameras] == [int(camera.removeprefix("cam")) for camera, _, _ in parts]


@pytest.mark.parametrize("mode", MODES)
def test_query_golden(sysu, mode):
    paths, ids, cameras = process_query_sysu(str(sysu), mode=mode)
    assert relative(paths, sysu) == GOLDEN["query"][mode]
    assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
    assert set(cameras) == {3, 6}


@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("mode", MODES)
def test_gallery_golden(sysu, mode, trial):
    paths, ids, cameras = process_gallery_sysu(str(sysu), mode=mode, trial=trial)
    assert relative(paths, sysu) == GOLDEN["gallery"][f"{mode}/{trial}"]
    assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
    assert set(cameras) == GALLERY_CAMERAS[mode]
    assert len(set(zip(ids, cameras, strict=True))) == len(paths)  # one shot: one image per person and camera


def test_defaults_are_all_search_trial_0(sysu):
    assert relative(process_query_sysu(str(sysu))[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(str(sysu))[0], sysu) == GOLDEN["gallery"]["all/0"]


def test_trailing_slash_of_the_data_path(sysu):
    """The published default paths end in a slash."""
    assert relative(process_query_sysu(f"{sysu}/")[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(f"{sysu}/", trial=4)[0], sysu) == GOLDEN["gallery"]["all/4"]


@pytest.mark.parametrize("mode", MODES)
def test_global_generators_are_neither_used_nor_touched(sysu, mode):
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        python_state, numpy_state = random.getstate(), np.random.get_state()
        process_query_sysu(str(sysu), mode=mode)
        paths, _, _ = process_gallery_sysu(str(sysu), mode=mode, trial=3)
        assert relative(paths, sysu) == GOLDEN["gallery"][f"{mode}/3"]
        assert random.getstate() == python_state
        for now, before in zip(np.random.get_state(), numpy_state, strict=True):
            np.testing.assert_array_equal(now, before)


class Entries(list):
    """What os.scandir returns: an iterator that is also a context manager."""

    def __init__(self, entries):
        super().__init__(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass


def test_order_of_directory_listing_is_irrelevant(sysu, monkeypatch):
    """File systems list in any order; here always backwards."""
    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    monkeypatch.setattr(os, "scandir", lambda path=".": Entries(scandir(path)))
    assert relative(process_query_sysu(str(sysu))[0], sysu) == GOLDEN["query"]["all"]
    assert relative(process_gallery_sysu(str(sysu), trial=7)[0], sysu) == GOLDEN["gallery"]["all/7"]


def ten_or_all(count):
    return min(10, count)


@pytest.mark.parametrize("mode", MODES)
def test_seeded_multi_shot_draws_ten_or_all_without_repetition(sysu, mode):
    counts = GOLDEN["images_per_folder"]
    assert any(count < 10 for count in counts.values())
    galleries = []
    for trial in range(3):
        paths, ids, cameras = process_gallery_sysu(str(sysu), mode, trial, shots=10)
        assert_ids_and_cameras_parse(paths, ids, cameras, sysu)
        folders = [path.rpartition("/")[0] for path in relative(paths, sysu)]
        single = process_gallery_sysu(str(sysu), mode, trial)
        assert list(dict.fromkeys(folders)) == [path.rpartition("/")[0] for path in relative(single[0], sysu)]
        assert all(folders.count(folder) == ten_or_all(counts[folder]) for folder in folders)
        assert len(set(paths)) == len(paths)
        galleries.append(paths)
        assert paths == process_gallery_sysu(str(sysu), mode, trial, shots=10)[0]
    assert galleries[0] != galleries[1]


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


def permute(root, rng, trials=10):
    """Write a rand_perm_cam.mat for the golden tree; returns {(camera, id): rows}."""
    rows = {}
    cells = np.empty((6, 1), object)
    for camera in range(1, 7):
        cells[camera - 1, 0] = np.empty((700, 1), object)
        for identity in range(1, 701):
            count = GOLDEN["images_per_folder"].get(f"cam{camera}/{identity:04d}", 0)
            rows[camera, identity] = rng.permuted(np.tile(np.arange(1, count + 1, dtype=np.uint8), (trials, 1)), axis=1)
            cells[camera - 1, 0][identity - 1, 0] = rows[camera, identity]
    savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})
    return rows


@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("mode", MODES)
def test_official_gallery_is_the_first_of_each_permutation(tmp_path, mode, shots):
    build_sysu(tmp_path)
    rows = permute(tmp_path, np.random.default_rng(0))
    for trial in (0, 4, 9):
        expected = [
            f"cam{camera}/{identity:04d}/{number:04d}.jpg"
            for identity in sorted(int(i) for i in GOLDEN["test_id_txt"].split(","))
            for camera in sorted(GALLERY_CAMERAS[mode])
            for number in rows[camera, identity][trial][:shots]
        ]
        paths, ids, cameras = process_gallery_sysu(str(tmp_path), mode, trial, "official", shots)
        assert relative(paths, tmp_path) == expected
        assert_ids_and_cameras_parse(paths, ids, cameras, tmp_path)


def test_official_protocol_needs_its_file_and_the_images_it_was_made_for(sysu, tmp_path):
    with pytest.raises(ValueError, match=r"exp/rand_perm_cam\.mat: no such file.*github\.com/wuancong/SYSU-MM01"):
        process_gallery_sysu(str(sysu), protocol="official")
    build_sysu(tmp_path)
    permute(tmp_path, np.random.default_rng(0))
    victim = Path(process_gallery_sysu(str(tmp_path), protocol="official")[0][0])
    victim.unlink()
    with pytest.raises(ValueError, match=rf"{victim.parent}: \d+ images, but .*rand_perm_cam\.mat permutes \d+"):
        process_gallery_sysu(str(tmp_path), protocol="official")


@pytest.mark.parametrize(
    "content",
    [{"other": 1}, {"rand_perm_cam": 3}, {"rand_perm_cam": "text"}, {"rand_perm_cam": np.ones((6, 1))}, b"", b"MATLAB"],
)
def test_other_files_are_no_permutations(tmp_path, content):
    build_sysu(tmp_path)
    file = tmp_path / "exp" / "rand_perm_cam.mat"
    file.write_bytes(content) if isinstance(content, bytes) else savemat(file, content)
    with pytest.raises(ValueError, match=r"rand_perm_cam\.mat"):
        process_gallery_sysu(str(tmp_path), protocol="official")


@pytest.mark.parametrize("fault", ["nine trials", "a number twice"])
def test_permutations_must_be_whole(tmp_path, fault):
    build_sysu(tmp_path)
    permute(tmp_path, np.random.default_rng(0), trials=9 if fault == "nine trials" else 10)
    if fault == "a number twice":
        cells = loadmat(tmp_path / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
        rows = next(rows for people in cells[:, 0] for rows in people[:, 0] if rows.shape[1] > 1)
        rows[4, 0] = rows[4, 1]
        savemat(tmp_path / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})
    with pytest.raises(ValueError, match=r"rand_perm_cam\.mat: holds no permutations of 1 \.\. N for 10 trials"):
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


def test_searches_hold_every_image_once_and_rows_point_at_them(sysu):
    test = sysu_test(sysu, MODES, shots=(1, 10), trials=(0, 3))
    assert [(s.setting["mode"], s.setting["shots"], s.setting["trial"]) for s in test.searches] == [
        (mode, shots, trial) for mode in MODES for shots in (1, 10) for trial in (0, 3)
    ]
    for modality, paths in test.paths.items():
        assert len(set(paths)) == len(paths)
        used = {row for s in test.searches for images in s[1:] if images.modality == modality for row in images.rows}
        assert used == set(range(len(paths)))
    for search in test.searches:
        mode, shots, trial = (search.setting[name] for name in ("mode", "shots", "trial"))
        paths, ids, cameras = process_gallery_sysu(sysu, mode, trial, shots=shots)
        assert [test.paths["visible"][row] for row in search.gallery.rows] == paths
        assert [test.paths["infrared"][row] for row in search.query.rows] == process_query_sysu(sysu)[0]
        np.testing.assert_array_equal(search.gallery.ids, ids)
        np.testing.assert_array_equal(search.gallery.cameras, cameras)


def test_folders_are_listed_once_for_all_searches(sysu, monkeypatch):
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    sysu_test(sysu, ["all"], shots=(1, 10))
    assert len(listed) == len(set(listed))


def test_val_split_has_the_same_protocol(sysu, tmp_path):
    """The validation ids' lists are those of a tree whose test ids they are."""
    build_sysu(tmp_path)
    (tmp_path / "exp" / "test_id.txt").rename(tmp_path / "exp" / "val_id.txt")
    for process in (process_query_sysu, process_gallery_sysu):
        val, test = process(tmp_path, split="val"), process(sysu)
        assert relative(val[0], tmp_path) == relative(test[0], sysu)
        with pytest.raises(ValueError, match=r"test_id\.txt"):
            process(tmp_path)
    assert sysu_test(tmp_path, split="val").searches[0].setting["split"] == "val"


@pytest.mark.parametrize("process", [process_query_sysu, process_gallery_sysu])
def test_sysu_errors_name_what_is_wrong(process, sysu, tmp_path):
    with pytest.raises(ValueError, match="test_id.txt"):
        process(str(tmp_path))
    with pytest.raises(ValueError, match="outdoor"):
        process(str(sysu), mode="outdoor")
    with pytest.raises(ValueError, match="offical"):
        process_gallery_sysu(str(sysu), protocol="offical")


@pytest.mark.parametrize("trial", [1, 2, 10])
@pytest.mark.parametrize(("modal", "folder", "camera"), [("visible", "Visible", 1), ("thermal", "Thermal", 2)])
def test_regdb_lists(regdb, trial, modal, folder, camera):
    paths, ids, cameras = process_test_regdb(str(regdb), trial=trial, modal=modal)
    assert relative(paths, regdb) == [f"{folder}/{pid}/{modal}_{trial}_{n}.bmp" for pid in (12, 7, 0) for n in range(2)]
    assert [int(i) for i in ids] == [12, 12, 7, 7, 0, 0]
    assert [int(c) for c in cameras] == [camera] * 6


def test_regdb_defaults_are_trial_1_visible(regdb):
    assert relative(process_test_regdb(f"{regdb}/")[0], regdb)[0] == "Visible/12/visible_1_0.bmp"


def test_regdb_errors_name_what_is_wrong(regdb):
    with pytest.raises(ValueError, match="test_thermal_5.txt"):
        process_test_regdb(str(regdb), trial=5, modal="thermal")
    with pytest.raises(ValueError, match="infrared"):
        process_test_regdb(str(regdb), modal="infrared")


def test_regdb_directions_share_their_lists(regdb):
    test = regdb_test(regdb, 2, ["visible to thermal", "thermal to visible"])
    there, back = test.searches
    assert (there.query.modality, there.gallery.modality) == ("visible", "infrared")
    for one, other in ((there.query, back.gallery), (there.gallery, back.query)):
        assert one.modality == other.modality
        assert one.rows.tolist() == other.rows.tolist()


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
    listed = {
        (identity, camera): [
            f"{folder}/cam{camera}/{identity:04d}/{identity:04d}_c{camera}_{n}.jpg" for n in range(count)
        ]
        for (kind, camera, identity), count in LLCM_FILES.items()
        if kind == folder and identity != 99
    }
    paths, ids, cameras = process_query_llcm(llcm, modality)
    assert relative(paths, llcm) == [path for key in sorted(listed) for path in listed[key]]
    assert list(zip(ids, cameras, strict=True)) == [key for key in sorted(listed) for _ in listed[key]]
    for trial in (0, 7):
        random.seed(trial)  # as the data set's own code does it
        expected = [random.choice(listed[key]) for key in sorted(listed)]
        paths, ids, cameras = process_gallery_llcm(llcm, modality, trial)
        assert relative(paths, llcm) == expected
        assert list(zip(ids, cameras, strict=True)) == sorted(listed)


def test_llcm_asks_all_images_of_one_modality_in_a_drawn_gallery_of_the_other(llcm):
    test = llcm_test(llcm, ["visible to infrared", "infrared to visible"], trials=(2, 5))
    for search in test.searches:
        asked, searched = search.setting["direction"].split(" to ")
        assert (search.query.modality, search.gallery.modality) == (asked, searched)
        for images, listed in (
            (search.query, process_query_llcm(llcm, asked)),
            (search.gallery, process_gallery_llcm(llcm, searched, search.setting["trial"])),
        ):
            assert [test.paths[images.modality][row] for row in images.rows] == listed[0]


def test_llcm_errors_name_what_is_wrong(llcm, tmp_path_factory):
    with pytest.raises(ValueError, match=r"idx/test_id\.txt"):
        process_query_llcm(tmp_path_factory.mktemp("empty"))
    (llcm / "idx" / "test_id.txt").write_text("5")
    with pytest.raises(ValueError, match="test_vis: none of the 1 listed ids has an image under cam1, "):
        process_query_llcm(llcm)
    with pytest.raises(ValueError, match="test_nir: none of the 1 listed ids has an image under cam1, "):
        process_gallery_llcm(llcm)


def test_folders_without_leading_zeros_are_named(sysu_tree, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree, tree)
    identity = next(i for i in data_manager.read_ids(tree, "train") if i < 100 and (tree / f"cam1/{i:04d}").is_dir())
    for digits in (len(str(identity)), 3):
        (tree / f"cam1/{identity:04d}").rename(short := tree / f"cam1/{identity:0{digits}d}")
        with pytest.raises(InputError, match=rf"cam1/{short.name}: people's folders .*; name it {identity:04d}"):
            data_manager.sysu_images(tree, [identity], (1, 2))
        short.rename(tree / f"cam1/{identity:04d}")
    assert data_manager.sysu_images(tree, [identity], (1, 2))[0]


def test_names_are_those_of_data_sets_of_their_size():
    assert data_manager.data_name("sysu", None, 3803) == "SYSU-MM01"
    assert data_manager.data_name("sysu", False, 3802) == "data like SYSU-MM01"
    assert data_manager.data_name("sysu", True, 3803) == "demo data like SYSU-MM01"
    assert data_manager.data_name("regdb", False, 2060) == "RegDB"
    assert {data_manager.data_name("llcm", False, count) for count in (8680, 7166)} == {"LLCM"}
