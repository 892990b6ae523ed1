"""Prepared arrays, the identity sampler and the loaders."""

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
import data_manager
import pre_process_sysu
from conftest import SIZE
from core.images import read_image
from data_loader import IdentitySampler, TrainData, eval_loader, sysu_train, train_loader
from datasets import DATASETS, sysu_searches
from utils import InputError


def toy_data(visible_per_id=(5, 7, 2, 9), infrared_per_id=(3, 4, 6, 1)):
    """Arrays whose every pixel tells the image's label and index."""

    def arrays(counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        images = np.zeros((len(labels), 4, 2, 3), np.uint8)
        images[..., 0] = labels[:, None, None]
        images[..., 1] = np.arange(len(labels))[:, None, None]
        return images, labels

    return TrainData(*arrays(visible_per_id), *arrays(infrared_per_id))


def test_prepared_arrays_are_the_images(sysu_tree):
    data = sysu_train(sysu_tree, SIZE)
    ids = sorted(data_manager.read_ids(sysu_tree, "train") + data_manager.read_ids(sysu_tree, "val"))
    for cameras, images, labels in (
        ((1, 2, 4, 5), data.visible, data.visible_labels),
        ((3, 6), data.infrared, data.infrared_labels),
    ):
        files = [
            (label, file)
            for label, identity in enumerate(ids)
            for camera in cameras
            for file in sorted((sysu_tree / f"cam{camera}" / f"{identity:04d}").glob("*.jpg"))
        ]
        assert images.dtype == np.uint8
        assert labels.tolist() == [label for label, _ in files]
        for i in (0, len(files) // 2, len(files) - 1):
            with Image.open(files[i][1]) as image:
                expected = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
            assert np.array_equal(images[i], np.asarray(expected))
    assert data.num_classes == len(ids)


def test_preparing_counts_each_split_and_camera(sysu_tree, capsys):
    counts = pre_process_sysu.main(["--data_path", str(sysu_tree), "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])])
    for split in ("train", "val"):
        for camera in range(1, 7):
            folders = [sysu_tree / f"cam{camera}" / f"{i:04d}" for i in data_manager.read_ids(sysu_tree, split)]
            assert counts[split][camera] == sum(len(list(folder.glob("*.jpg"))) for folder in folders)
    assert str(sum(counts["train"].values())) in capsys.readouterr().out


def test_loading_processes_map_the_arrays_themselves(sysu_tree):
    """Where they are not forked, as on macOS and Windows: they get the file's name, not its contents."""
    data = sysu_train(sysu_tree, SIZE)
    batches = data_loader.TrainBatches(data)
    sent = pickle.dumps(batches)
    assert len(sent) < data.infrared.nbytes / 10
    indices = np.array([3, 1]), np.array([0, 2])
    for one, other in zip(batches[indices], pickle.loads(sent)[indices], strict=True):
        assert np.array_equal(one, other)
    part = data_loader.TrainBatches(data._replace(visible=data.visible[5:]))
    assert np.array_equal(pickle.loads(pickle.dumps(part))[indices][0], part[indices][0])


@pytest.mark.parametrize("renames", range(10))
def test_crash_among_the_renames_leaves_no_mixed_set_and_loses_nothing(sysu_tree, tmp_path, monkeypatch, renames):
    """Five files cannot be renamed at once: when the process dies between two of them, training must not start."""
    tree = shutil.copytree(sysu_tree, tmp_path / "tree")
    before = {file: file.read_bytes() for file in data_loader.sysu_train_files(tree)}
    ids = tree / "exp" / "train_id.txt"
    ids.write_text(ids.read_text().split(",", 1)[1])
    command = ["--data_path", str(tree), "--img_h", str(SIZE[0]), "--img_w", str(SIZE[1])]
    rename, renamed = os.replace, []

    def die_after_some(source, target):
        if len(renamed) == renames:
            raise KeyboardInterrupt
        renamed.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_after_some)
        with pytest.raises(KeyboardInterrupt):
            pre_process_sysu.main(command)
    if renames:
        with pytest.raises(InputError, match="cannot be read as a prepared array"):
            sysu_train(tree, SIZE)
    for file, content in before.items():
        old = file.with_suffix(".npy.old")
        assert (old if old.exists() else file).read_bytes() == content
    pre_process_sysu.main(command)
    sysu_train(tree, SIZE)
    assert not list(tree.glob("*.old"))


def test_regdb_labels_agree_between_lists_with_different_ids(regdb_tree, tmp_path):
    tree = shutil.copytree(regdb_tree, tmp_path / "regdb")
    listing = tree / "idx" / "train_thermal_3.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(line for line in lines if not line.endswith(" 0")))
    data = DATASETS["regdb"].train(tree, (32, 16), trial=3)
    assert set(data.visible_labels) == set(range(6))
    assert set(data.infrared_labels) == set(range(1, 6))


def test_regdb_is_decoded_once_and_again_when_a_file_changes(regdb_tree, tmp_path, monkeypatch):
    tree = shutil.copytree(regdb_tree, tmp_path / "regdb")
    first = DATASETS["regdb"].train(tree, (32, 16), trial=3)
    paths, ids = data_manager.read_list(tree, "train_thermal_3")
    assert len(first.infrared) == len(paths)
    assert first.infrared_labels.tolist() == ids.tolist()
    assert np.array_equal(first.infrared[4], read_image(paths[4], (32, 16)))

    with monkeypatch.context() as patch:
        patch.setattr(data_loader, "write_images", lambda *_, **__: pytest.fail("decoded again"))
        DATASETS["regdb"].train(tree, (32, 16), trial=3)
    (kept,) = (tree / "cache").glob("train_thermal_3_*")
    whole = np.load(kept)
    for other in (whole[1:], whole[:, 1:]):
        np.save(kept, other)
        with pytest.raises(InputError, match=rf"{kept.name}: has images .*; remove it, and run again"):
            DATASETS["regdb"].train(tree, (32, 16), trial=3)
    Image.new("RGB", (64, 128), "red").save(paths[4])
    changed = DATASETS["regdb"].train(tree, (32, 16), trial=3)
    assert changed.infrared[4, 0, 0].tolist() == [255, 0, 0]
    assert len(list((tree / "cache").glob("*_3_*"))) == 2  # the outdated array is gone
    DATASETS["regdb"].train(tree, (16, 16), trial=3)
    assert len(list((tree / "cache").glob("*_3_*"))) == 4  # those of another size, which a run may have mapped, are not


def test_val_selection_trains_on_the_train_ids_only(sysu_tree):
    whole, part = sysu_train(sysu_tree, SIZE), sysu_train(sysu_tree, SIZE, select="val")
    train, val = (sorted(data_manager.read_ids(sysu_tree, split)) for split in ("train", "val"))
    everybody = sorted(train + val)
    assert part.num_classes == len(train)
    for labels, ranks in ((part.visible_labels, whole.visible_labels), (part.infrared_labels, whole.infrared_labels)):
        ids = np.array(everybody)[ranks]
        assert labels.tolist() == [train.index(i) if i in train else -1 for i in ids]
    kept = sum(len(list(sysu_tree.glob(f"cam{camera}/{i:04d}/*"))) for i in train for camera in (1, 2, 4, 5))
    assert part.num_images[0] == kept < len(part.visible)
    assert part.num_images[1] == sum(len(list(sysu_tree.glob(f"cam{c}/{i:04d}/*"))) for i in train for c in (3, 6))

    sampler = IdentitySampler(part, 4, 2, seed=0)
    assert len(sampler) == max(part.num_images) // 8 + 1
    drawn = [part.visible_labels[visible] for _ in range(20) for visible, _ in sampler]
    assert set(np.concatenate(drawn)) == set(range(len(train)))


@pytest.fixture
def own_tree(sysu_tree, tmp_path):
    return shutil.copytree(sysu_tree, tmp_path / "sysu", copy_function=os.link)


def rewrite(tree, **lists):
    """Replace lists of ids, {split: ids}."""
    for split, ids in lists.items():
        (tree / "exp" / f"{split}_id.txt").unlink()  # a link to the original
        (tree / "exp" / f"{split}_id.txt").write_text(",".join(map(str, ids)))


def edited(tree, change):
    """The lists of ids after a change, and the id that it is about."""
    train, val, test = (data_manager.read_ids(tree, split) for split in ("train", "val", "test"))
    if change == "moved to test":
        return {"train": train[1:], "test": [*test, train[0]]}, train[0]
    if change == "exchanged with a test id":
        return {"train": [*train[1:], test[0]], "test": [*test[1:], train[0]]}, train[0]
    if change == "also a test id":
        return {"test": [*test, val[0]]}, val[0]
    if change == "taken out":
        return {"val": val[1:]}, val[0]
    return {"train": [*train, test[0]], "test": test[1:]}, test[0]  # moved from test


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("moved to test", "id {} is a test id now, but was prepared for training"),
        ("exchanged with a test id", "id {} is a test id now, but was prepared for training"),
        ("also a test id", r"id {} is in exp/val_id\.txt and in exp/test_id\.txt; remove it from one"),
        ("taken out", r"id {} was prepared for training, but is now in none of the lists exp/\*_id\.txt"),
        ("moved from test", r"id {} is in exp/train_id\.txt or val_id\.txt now, but was not prepared"),
    ],
)
@pytest.mark.parametrize("use", ["training", "choosing by val ids", "testing"])
def test_arrays_of_other_people_than_the_lists_have_are_refused(own_tree, change, words, use):
    lists, identity = edited(own_tree, change)
    rewrite(own_tree, **lists)
    uses = {
        "training": lambda: sysu_train(own_tree, SIZE),
        "choosing by val ids": lambda: sysu_train(own_tree, SIZE, "val"),
        "testing": lambda: sysu_searches(own_tree),
    }
    with pytest.raises(InputError, match=words.format(identity)) as refused:
        uses[use]()
    if use == "testing" and change != "also a test id":
        command = str(refused.value).partition("; run: python pre_process_sysu.py ")[2].split()
        pre_process_sysu.main(command)
        assert sysu_train(own_tree, SIZE).num_classes == sum(
            len(data_manager.read_ids(own_tree, split)) for split in ("train", "val")
        )
        sysu_searches(own_tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("moved to test", "arrays of 10 ids are prepared, but exp/train_id.txt and val_id.txt list 9"),
        ("exchanged with a test id", "id .* has .* images in cameras .*, but .* were prepared under its number"),
    ],
)
def test_older_arrays_do_not_name_their_people_but_their_counts_must_agree(own_tree, change, words):
    (own_tree / "train_ids.npy").unlink()
    lists, _ = edited(own_tree, change)
    before = sysu_train(own_tree, SIZE)
    sysu_searches(own_tree)
    rewrite(own_tree, **lists)
    for use in (lambda: sysu_train(own_tree, SIZE), lambda: sysu_searches(own_tree)):
        with pytest.raises(InputError, match=f"{words}; run: python pre_process_sysu.py"):
            use()
    for camera in range(1, 7):  # without folders, the number of ids must do
        (own_tree / f"cam{camera}").rename(own_tree / f"gone{camera}")
    if change == "exchanged with a test id":
        assert sysu_train(own_tree, SIZE).num_images == before.num_images
    with pytest.raises(InputError, match="none: no such folder; pass the data set's folder"):
        sysu_train(own_tree / "none", SIZE)


def test_other_images_or_labels_have_another_digest():
    """Wherever they differ among labels, and among few images; of many images some are compared."""
    rng = np.random.default_rng(0)
    data = TrainData(*(x for n in (40, 90) for x in (rng.integers(0, 256, (n, 4, 2, 3), np.uint8), np.arange(n) // 9)))
    assert data.digest == 3420615099, "that of checkpoints"
    found = {data.digest}
    for field, index in ((0, 0), (0, 21), (0, 39), (2, 0), (2, 89), (1, 7), (1, 39), (3, 50)):
        other = TrainData(*(array.copy() for array in data))
        other[field][index] += 1
        found.add(other.digest)
    found.add(TrainData(*data[2:], *data[:2]).digest)
    assert len(found) == 10
    reordered = np.asfortranarray(data.visible), data.visible_labels.astype(np.int32), *data[2:]
    assert TrainData(*reordered).digest == data.digest


def test_older_arrays_may_have_people_whose_folders_are_gone(own_tree):
    (own_tree / "train_ids.npy").unlink()
    before = sysu_train(own_tree, SIZE).num_images
    last = max(data_manager.read_ids(own_tree, "train") + data_manager.read_ids(own_tree, "val"))
    one, *more = sorted(own_tree.glob(f"cam[1245]/{last:04d}/*"))
    for image in more:
        image.unlink()
    with pytest.raises(InputError, match=f"id {last} has 1 images in cameras 1, 2, 4, 5, but {len(more) + 1} were"):
        sysu_train(own_tree, SIZE)
    for folder in own_tree.glob(f"cam*/{last:04d}"):
        shutil.rmtree(folder)
    assert sysu_train(own_tree, SIZE).num_images == before


@pytest.mark.parametrize("kind", ["rgb", "ir"])
def test_older_arrays_have_as_many_images_of_each_id_as_its_folders(kind, own_tree):
    (own_tree / "train_ids.npy").unlink()
    file = own_tree / f"train_{kind}_resized_label.npy"
    labels = np.load(file)
    labels[np.flatnonzero(labels == 0)[0]] = 1
    file.unlink()  # it may be a link
    np.save(file, labels)
    cameras = {"rgb": "1, 2, 4, 5", "ir": "3, 6"}[kind]
    with pytest.raises(InputError, match=rf"id \d+ has \d+ images in cameras {cameras}, but \d+ were prepared"):
        sysu_train(own_tree, SIZE)


def test_batches_hold_distinct_identities_with_agreeing_labels():
    data = toy_data()
    sampler = IdentitySampler(data, batch_size=3, num_pos=2, seed=0)
    assert len(sampler) == 23 // 6 + 1
    batches = list(sampler)
    assert len(batches) == len(sampler)
    sampler.set_epoch(0, start=1)
    assert len(list(sampler)) == len(sampler) == 23 // 6
    for visible, infrared in batches:
        labels = data.visible_labels[visible]
        assert labels.tolist() == data.infrared_labels[infrared].tolist()
        assert len(set(labels)) == 3
        assert np.array_equal(labels[::2], labels[1::2])


def test_an_epoch_of_sysu_has_696_batches():
    images = (22258, 11909)  # SYSU-MM01's, visible and infrared
    labels = [np.arange(count) % 395 for count in images]
    data = TrainData(np.empty(images[0]), labels[0], np.empty(images[1]), labels[1])
    assert len(list(IdentitySampler(data, batch_size=8, num_pos=4, seed=0))) == 696


def test_sampler_draws_every_image_equally_often():
    data = toy_data()
    sampler = IdentitySampler(data, batch_size=2, num_pos=4, seed=0)
    sampler.steps = 6000
    counts = np.zeros(len(data.visible))
    for visible, _ in sampler:
        np.add.at(counts, visible, 1)
    # Each of 4 identities is in half of the batches with 4 draws, spread over its images.
    expected = 6000 * 0.5 * 4 / np.bincount(data.visible_labels)[data.visible_labels]
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) * 1.2)


def test_sampler_repeats_an_epoch_and_changes_with_epoch_and_seed():
    def draws(seed, epoch):
        sampler = IdentitySampler(toy_data(), 2, 2, seed)
        sampler.set_epoch(epoch)
        return [np.concatenate(batch).tolist() for batch in sampler]

    assert np.concatenate(next(iter(IdentitySampler(toy_data(), 2, 2, 0)))).tolist() == draws(0, 0)[0]
    assert draws(0, 3) == draws(0, 3)
    assert draws(0, 3) != draws(0, 4)
    assert draws(0, 3) != draws(1, 3)


def test_identities_seen_in_one_modality_only_are_not_drawn():
    data = toy_data(infrared_per_id=(3, 0, 6, 1))
    sampler = IdentitySampler(data, 3, 1, 0)
    assert {label for visible, _ in sampler for label in data.visible_labels[visible]} == {0, 2, 3}
    with pytest.raises(InputError, match="--batch_size 4: only 3"):
        IdentitySampler(data, 4, 1, 0)


@pytest.mark.parametrize(("workers", "cache"), [(0, "auto"), (2, "disk"), (0, "ram"), (0, "gpu")])
def test_train_batches_carry_the_sampler_s_images_and_their_labels(workers, cache, monkeypatch):
    data = toy_data()
    sampler = IdentitySampler(data, 3, 2, 0)
    if cache == "gpu":  # the same steps on any device
        monkeypatch.setattr(data_loader, "UPLOAD_BLOCK", 3)
        loader = data_loader.CachedBatches(data, sampler, "cpu")
    else:
        loader = train_loader(data, sampler, workers, cache=cache)
        # In memory, not in a file; and the processes last: starting them takes seconds.
        images = (loader.dataset.data.visible, loader.dataset.data.infrared)
        assert [kept is own for kept, own in zip(images, (data.visible, data.infrared), strict=True)] == [
            cache != "ram"
        ] * 2
        assert train_loader(data, sampler, 1).persistent_workers
    assert len(loader) == len(sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (visible, infrared, labels), (rows, heat_rows) in zip(loader, list(sampler), strict=True):
            assert visible.shape == (6, 3, 4, 2)
            assert visible.dtype == torch.uint8
            assert visible[:, 1, 0, 0].tolist() == rows.tolist()
            assert infrared[:, 1, 3, 1].tolist() == heat_rows.tolist()
            assert labels.tolist() == visible[:, 0, 0, 0].tolist() == infrared[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("cache", "free", "kept"),
    [
        ("auto", 2400, "CachedBatches"),
        ("auto", 2399, "DataLoader"),
        ("gpu", 1200, "CachedBatches"),
        ("gpu", 1199, None),
    ],
)
def test_images_are_kept_on_the_gpu_if_they_fit(monkeypatch, cache, free, kept):
    data = toy_data((5, 7, 2, 1), (3, 3, 3, 1))  # 25 images of 24 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(data_loader, "CachedBatches", type("CachedBatches", (), {"__init__": lambda self, *_: None}))
    make = partial(train_loader, data, IdentitySampler(data, 3, 2, 0), 0, "cuda", cache)
    if kept:
        assert type(make()).__name__ == kept
    else:
        with pytest.raises(
            InputError, match="--cache gpu: .* GiB, more than half of the .* free on cuda; use --cache disk"
        ):
            make()


def test_images_are_not_kept_on_the_gpu_of_a_training_on_the_cpu():
    data = toy_data()
    with pytest.raises(InputError, match="^--cache gpu: the training runs on the CPU; use --cache ram or disk"):
        train_loader(data, IdentitySampler(data, 3, 2, 0), 0, cache="gpu")


class Harmful:
    """Pickled, it is a command to make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["prepared", "cached"])
def test_a_pickle_in_the_place_of_an_array_is_not_run(kind, own_tree, regdb_tree, tmp_path):
    tree, read = own_tree, sysu_train
    if kind == "cached":
        tree, read = shutil.copytree(regdb_tree, tmp_path / "regdb"), partial(DATASETS["regdb"].train, trial=1)
        read(tree, SIZE)
    for array in tree.rglob("*.npy"):
        array.unlink()
        array.write_bytes(pickle.dumps(Harmful(tmp_path / "made")))
    with pytest.raises((InputError, ValueError)):
        read(tree, SIZE)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_come_in_order(sysu_tree, workers):
    paths, _, _ = data_manager.process_query_sysu(sysu_tree)
    images = torch.cat(list(eval_loader(paths, (20, 10), 5, workers)))
    assert images.shape == (len(paths), 3, 20, 10)
    for i in (0, len(paths) - 1):
        expected = read_image(paths[i], (20, 10))
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("images", "ranks"), [(9, 4), (3, 4), (64, 9), (13, 2)])
def test_ranks_share_the_test_batches_of_one_process(sysu_tree, monkeypatch, images, ranks):
    paths = data_manager.process_query_sysu(sysu_tree)[0]
    paths = (paths * 10)[:images]
    whole = list(eval_loader(paths, (20, 10), 4, 0).batch_sampler)
    monkeypatch.setattr(data_loader, "process_count", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(data_loader, "process_index", lambda rank=rank: rank)
        loader = eval_loader(paths, (20, 10), 4, 0)
        shares.append(loader.rows)
        assert list(loader.batch_sampler) == (whole[rank::ranks] or [[0]])
    assert sorted(sum(shares, [])) == list(range(images))
