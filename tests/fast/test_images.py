"""Episodes from decoded images: the cache, and batched augmentation against torchvision's."""

import errno
import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import CPU, dataset, photograph, same
from PIL import Image
from torchvision.transforms.functional import adjust_hue, pil_to_tensor

import utils
from data.imagefiles import load_image
from data.layout import scan_split
from data.transforms import PIXELS
from engine.stream import episodes
from fast import augment, images, native
from fast.images import FOLDER, DecodedSplit, decoded, reduced_size
from fast.library import library
from utils import UserError

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def files(root):
    return scan_split(root, "train").images


def build(root, image_size=16, cache_dir=None):
    return decoded(scan_split(root, "train"), image_size, cache_dir)


def folders(root):
    return sorted(p.name for p in (root / FOLDER).iterdir() if p.name != "lock")


def test_small_images_are_kept_to_the_pixel(data):
    split = build(data, image_size=84)
    paths = files(data)
    assert len(split.sizes) == 48
    for k in (0, 7, 47):
        assert (split.image(k).transpose(1, 2, 0) == np.asarray(load_image(paths[k]))).all()


def test_large_images_are_downscaled_once(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    shutil.copy(PHOTOGRAPH, tmp_path / "train" / "a")
    split = build(tmp_path, image_size=84)
    width, height = Image.open(PHOTOGRAPH).size
    assert min(width, height) > 168
    assert tuple(split.sizes[0][::-1]) == reduced_size(width, height, 84)
    assert split.sizes[0].min() == 168


@pytest.mark.parametrize("change", ["touched", "new", "removed", "setting"])
def test_rebuilt_when_what_it_depends_on_changes(data, change):
    build(data)
    before, path, size = folders(data), data / "train" / "class 0" / "0.jpg", 16
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "new":
        shutil.copy(path, path.with_name("new.jpg"))
    elif change == "removed":
        path.unlink()
    else:
        size = 20
    split = build(data, size)
    assert len(split.sizes) == {"new": 49, "removed": 47}.get(change, 48)
    assert folders(data) != before
    assert len(folders(data)) == (2 if change == "setting" else 1)


@pytest.mark.parametrize("name", ["pixels.bin", "index.npz"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_noticed_and_mended(data, name, damage):
    good = build(data).image(3).copy()
    folder = data / FOLDER / folders(data)[0]
    content = bytearray((folder / name).read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF if damage == "flip" else 0
    (folder / name).unlink()
    if damage != "gone":
        damaged = {"flip": content, "cut": content[:middle], "empty": b""}
        (folder / name).write_bytes(damaged[damage])
    assert (build(data).image(3) == good).all()
    assert (DecodedSplit(folder).image(3) == good).all()


@pytest.mark.parametrize("other", ["data2", "elsewhere/data", "é" * 120])
def test_data_sets_share_a_cache_dir(data, tmp_path, monkeypatch, other):
    """Neither removes what the other has decoded; each still removes what is stale of its own."""
    place, second = tmp_path / "caches", tmp_path / other
    shutil.copytree(data, second)
    for root in (data, second):
        os.utime(root / "train" / "class 0" / "0.jpg", ns=(len(str(root)), 1))
        build(root, cache_dir=place)
    assert len(list(place.rglob("train-*"))) == 2
    assert not (data / FOLDER).exists()
    with monkeypatch.context() as patch:
        patch.setattr(images, "_build", lambda *_: pytest.fail("built again"))
        patch.chdir(data)
        for root in (data, second, Path("../data")):  # however it is written
            build(root, cache_dir=place)
    for n in range(3):
        os.utime(second / "train" / "class 1" / "0.jpg", ns=(n, n))
        build(second, cache_dir=place)
    assert len(list(place.rglob("train-*"))) == 2


def test_others_may_read_the_cache_as_the_umask_says(data):
    before = os.umask(0o027)
    try:
        build(data)
    finally:
        os.umask(before)
    (folder,) = (p for p in (data / FOLDER).iterdir() if p.is_dir())
    assert folder.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_cache_that_cannot_be_read_is_not_built_again(data, monkeypatch, number):
    build(data)
    (folder,) = (p for p in (data / FOLDER).iterdir() if p.is_dir())

    def refuse(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(np, "load", refuse)  # root may read everything
    why = rf"{folder.name}/index\.npz.*{os.strerror(number)}.*--cache-dir"
    with pytest.raises(UserError, match=why):
        build(data)
    assert folder.is_dir()


def test_a_damaged_offset_is_built_again(data, monkeypatch, capsys):
    build(data)
    load, error = np.load, OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    monkeypatch.setattr(np, "load", mock.Mock(side_effect=[error, error, mock.DEFAULT], wraps=load))
    build(data)
    assert "building it again" in capsys.readouterr().out


@pytest.mark.skipif(utils.fcntl is None, reason="no locks")
def test_who_is_waited_for(tmp_path, capsys):
    lock = tmp_path / "lock"
    with lock.open("w") as other:
        other.write("process 7")
        other.flush()
        utils.fcntl.flock(other, utils.fcntl.LOCK_EX)
        threading.Timer(0.3, other.close).start()
        with utils.file_lock(lock, wait=True):
            assert "process 7" in capsys.readouterr().out


def test_broken_image_leaves_nothing_behind(data):
    (data / "train" / "class 2" / "4.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"class 2/4\.jpg: not a readable image"):
        build(data)
    assert folders(data) == []


# ---- Episodes from decoded images ----


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Parts of a real photograph in many sizes, and a greyscale one, as the three classes."""
    root, whole = tmp_path_factory.mktemp("photographs"), load_image(PHOTOGRAPH)
    sizes = [(64, 64), (84, 84), (168, 168), (168, 224), (250, 168), (40, 97)]
    parts = [whole.resize(size) for size in sizes]
    parts += [whole.crop((150 + 10 * k, 100, 150 + 10 * k + 84, 184)) for k in range(8)]
    parts.append(whole.resize((84, 84)).convert("L"))
    for split in ("train", "val", "test"):
        for k, image in enumerate(parts):
            (root / split / f"{k % 3}").mkdir(parents=True, exist_ok=True)
            image.save(root / split / f"{k % 3}" / f"{k}.png")
    return root


def grey_levels(x, pixels="imagenet"):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in PIXELS[pixels])
    return (x * std + mean) * 255


@pytest.mark.parametrize(
    ("split", "augment", "mean_difference"),
    [("train", "port", 1.5), ("train", "none", 0.5), ("val", "port", 0.5), ("test", "none", 0.5)],
)
@pytest.mark.parametrize(("root", "pixels"), [("master", "unit"), ("photographs", "imagenet")])
def test_episodes_match_plain_ones(request, root, pixels, split, augment, mean_difference):
    """But for Pillow's rounding, in grey levels."""
    root, size = request.getfixturevalue(root), 32 if root == "master" else 84
    how = dict(image_size=size, augment=augment, pixels=pixels, length=3)
    both = [dataset(way, root, split, **how) for way in ("plain", "fast")]
    assert both[0].split.fingerprint == both[1].split.fingerprint
    differences = []
    for expected, found in zip(*(episodes(d, 0, 0, CPU, False) for d in both), strict=True):
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert found.query.is_contiguous(memory_format=torch.channels_last)
        assert same(found[1::2] + found[4:], expected[1::2] + expected[4:])  # labels and order
        x, y = (grey_levels(torch.cat((e.support, e.query)), pixels) for e in (expected, found))
        differences.append((x - y).abs().mean((1, 2, 3)))
    differences = torch.cat(differences)
    assert differences.mean() < mean_difference
    assert differences.max() < (4 if augment == "port" and split == "train" else 1)


@pytest.mark.parametrize("turns", [0.2, -0.2, 0.05])
def test_hue_wraps_as_pillows(turns):
    """Mean error in grey levels: what Pillow's rounding leaves, also where the hue wraps."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    x = pil_to_tensor(image).float().unsqueeze(0)
    found = augment._shift_hue(x, torch.tensor(turns).view(1, 1, 1, 1))
    difference = (found[0] - pil_to_tensor(adjust_hue(image, turns))).abs()
    assert difference.mean() < 0.25
    assert difference.max() < 8


@pytest.mark.skipif(not library().functions, reason="no compiled kernels")
def test_pytorch_agrees_with_the_kernel(photographs):
    data = dataset("fast", photographs, image_size=84)
    with mock.patch.object(native, "handles", return_value=False):
        expected = grey_levels(data[0].query)
    assert (grey_levels(data[0].query) - expected).abs().mean() < 0.05


def test_a_pickled_data_set_holds_no_pixels_and_no_stream(master):
    """What workers get that are not forked."""
    data = dataset("fast", master)
    data.stream = threading.Lock()  # cannot be pickled, as a GPU's stream
    content = pickle.dumps(data)
    assert len(content) < data._decoded._pixels.size / 4
    assert same(pickle.loads(content)[1], data[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_are_spawned(master):
    before, data = multiprocessing.get_start_method(), dataset("fast", master, length=2)
    try:
        multiprocessing.set_start_method("spawn", force=True)
        spawned = list(episodes(data, 0, 1, CPU, False))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert all(same(a, data[k]) for k, a in enumerate(spawned))
    assert len(spawned) == 2


@pytest.mark.parametrize("augment", ["port", "none"])
def test_panoramas_take_memory_by_their_pixels(tmp_path, augment, monkeypatch):
    """And come to the same bits as if all images were padded to one size."""
    for c, size in enumerate([(40, 1000), (1000, 40), (50, 30)]):
        (tmp_path / "train" / f"{c}").mkdir(parents=True)
        for k in range(5):
            image = photograph(np.random.default_rng(k), *size)
            image.save(tmp_path / "train" / f"{c}" / f"{k}.png")
    data = dataset("fast", tmp_path, image_size=20, augment=augment)
    pixels = 3 * data._decoded.sizes.prod(axis=1).sum()
    assert data.draw(0).buffer.numel() < images.PADDING * pixels + 5000
    grouped = data[0]
    monkeypatch.setattr(images, "PADDING", 1 << 20)
    assert data.draw(0).buffer.numel() > 10 * pixels
    assert same(grouped, data[0])
