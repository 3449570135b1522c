import subprocess
import unicodedata
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, assert_same, dataset, photograph, same
from PIL import Image
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import center_crop, resize

from data.imagefiles import images_below, load_image
from data.layout import Split, check_sizes, check_splits, scan_split
from data.transforms import MEAN, STD, draw_augmentation, draw_flips, eval_image
from dataloader import AUGMENT, draw_images, draw_order, generator
from engine.stream import episodes
from utils import UserError


def listed(data, start=0, n_workers=0):
    return list(episodes(data, start, n_workers, CPU, False))


def test_shape_and_order_of_an_episode(backend, master):
    episode = listed(dataset(backend, master))[0]
    assert episode.support.shape == (6, 3, 16, 16)
    assert episode.query.shape == (9, 3, 16, 16)
    assert episode.support.dtype == torch.float32
    assert episode.support_y.tolist() == [0, 0, 1, 1, 2, 2]
    assert episode.query_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [sorted(row) for row in episode.order.tolist()] == [list(range(6))] * 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("n_workers", [0, 1, 2, 4])
def test_same_episodes_with_any_workers_from_any_start_for_any_length(backend, master, n_workers):
    """And the global random state stays as it is."""
    before = torch.get_rng_state()
    alone = listed(dataset(backend, master))
    assert len(alone) == 6
    assert not same(alone[0], alone[1])
    assert_same(alone, listed(dataset(backend, master), 0, n_workers))
    later = listed(dataset(backend, master, length=9), 4, n_workers)
    assert len(later) == 5
    assert_same(alone[4:], later[:2])
    assert torch.equal(before, torch.get_rng_state())


def test_other_splits_and_seeds_give_other_episodes(master):
    others = [(719, "train", 0), (719, "train", 1), (719, "val", 0), (53, "train", 0)]
    drawn = [draw_images(a, scan_split(master, split), k, 5, 8)[0] for a, split, k in others]
    assert len({tuple(classes) for classes in drawn}) == 4


def test_classes_and_images_do_not_repeat_and_are_drawn_equally_often(master):
    split = scan_split(master, "train")
    drawn = [draw_images(1, split, k, 2, 3) for k in range(3000)]
    for classes, images in drawn:
        assert [len(set(row)) for row in (classes, *images)] == [2, 3, 3]
    by_class = np.bincount(np.concatenate([c for c, _ in drawn]), minlength=6) / 3000
    by_image = np.bincount(np.concatenate([i.reshape(-1) for _, i in drawn]), minlength=8) / 6000
    assert np.abs(by_class - 2 / 6).max() < 0.04
    assert np.abs(by_image - 3 / 8).max() < 0.03


def test_the_same_on_another_machine(master):
    """Literal numbers: whatever changes them changes every published run."""
    classes, images = draw_images(719, scan_split(master, "train"), 31417, 5, 4)
    assert classes.tolist() == [2, 0, 5, 4, 3]
    rows = [[0, 3, 2, 4], [2, 3, 5, 4], [0, 5, 1, 3], [6, 1, 3, 0], [0, 3, 4, 7]]
    assert images.tolist() == rows
    sizes = np.array([[64, 64], [375, 500], [30, 300]])
    zoom, mild, drawn = (
        draw_augmentation(generator(719, "train", 31417, AUGMENT), sizes, how)
        for how in ("zoom", "mild", "port")
    )
    assert zoom.box.tolist() == [[0, 6, 63, 54], [109, 25, 249, 229], [0, 130, 30, 40]]
    assert mild.box.tolist() == [[5, 4, 49, 58], [12, 15, 362, 333], [0, 130, 30, 40]]
    assert drawn.box.tolist() == [[1, 7, 62, 53], [159, 30, 192, 176], [0, 130, 30, 40]]
    assert drawn.flip.all()
    assert drawn.order.tolist() == [[1, 3, 0, 2], [3, 1, 0, 2], [1, 3, 0, 2]]
    jitter = [0.7532890033976217, 1.0110292056703787, 0.6268533608825444, -0.14045899455008767]
    assert np.allclose(drawn.jitter[1], jitter, rtol=1e-12)
    assert draw_order(719, "train", 31417, 2, 5).tolist() == [[4, 1, 3, 0, 2], [0, 3, 1, 2, 4]]


def test_one_order_an_episode_as_the_authors_have_it():
    order = draw_order(719, "train", 3, 4, 25, "episode")
    assert (order == draw_order(719, "train", 3, 1, 25)[0]).all()
    assert order.shape == (4, 25)
    assert sorted(order[0]) == list(range(25))


# ---- Images ----


FORMS = [("x.png", "RGB", 0), ("x.jpg", "RGB", 4), ("x.webp", "RGB", 4), ("x.jpg", "CMYK", 4)]
FORMS += [("x.png", "P", 0), ("x.gif", "P", 0), ("x.png", "L", 1), ("x.jpg", "L", 4)]
FORMS += [("x.png", "RGBA", 0), ("x.png", "LA", 1), ("x.png", "I;16", 1), ("x.tif", "I;16", 1)]


@pytest.mark.parametrize(("name", "mode", "close"), FORMS)
def test_the_same_picture_in_every_form(tmp_path, name, mode, close):
    """At most so many grey levels apart, on average."""
    picture = photograph(np.random.default_rng(2), 40, 30)
    if mode == "P":
        picture = picture.quantize(256).convert("RGB")
    if mode in ("L", "LA", "I;16"):
        picture = picture.convert("L")
    if mode == "I;16":
        saved = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    else:
        saved = picture.quantize(256) if mode == "P" else picture.convert(mode)
    saved.save(tmp_path / name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    loaded, expected = load_image(tmp_path / name), picture.convert("RGB")
    assert Image.open(tmp_path / name).mode == mode
    assert (loaded.mode, loaded.size) == ("RGB", picture.size)
    assert np.abs(np.asarray(loaded) - np.asarray(expected).astype(int)).mean() <= close


def test_exhausted_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for place in ("open", "Image.getexif"):
        monkeypatch.setattr(f"PIL.Image.{place}", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            load_image(tmp_path / "x.png")
        monkeypatch.undo()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """Whatever colour lies under them."""
    images = []
    for k, hidden in enumerate((10, 200)):
        pixels = np.full((4, 4, 4), 60, dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[:2] = (hidden, hidden, hidden, 0)
        image = Image.fromarray(pixels)
        image = image.quantize(4) if mode == "P" else image.convert(mode)
        image.save(tmp_path / f"{k}.png")
        images.append(np.asarray(load_image(tmp_path / f"{k}.png")))
    assert (images[0] == images[1]).all()
    assert images[0][0, 0].tolist() == [255, 255, 255]


def test_transparent_grey_of_16_bits_is_white(tmp_path):
    values = np.full((4, 4), 40000, dtype=np.uint16)
    values[:2] = 7
    Image.fromarray(values).save(tmp_path / "x.png", transparency=7)
    pixels = np.asarray(load_image(tmp_path / "x.png"))
    assert (pixels[0, 0, 0], pixels[3, 3, 0]) == (255, 40000 >> 8)


def test_depths_are_scaled_or_refused(tmp_path):
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    deep = (ramp * 65535).astype(np.uint16)
    for name in ("float.tif", "int.tif", "int.png", "int.pgm"):
        Image.fromarray(ramp if name == "float.tif" else deep).save(tmp_path / name)
        pixels = np.asarray(load_image(tmp_path / name))
        assert (pixels[0, 0, 0], pixels[3, 3, 0]) == (0, 255)
    for name, values in (("wide.tif", ramp * 9), ("32.tif", (ramp * 255).astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UserError, match=name):
            load_image(tmp_path / name)


def test_orientation_of_cameras_is_followed_unless_it_is_damaged(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for block, size in ((exif, (20, 30)), (b"Exif\0\0garbage!", (30, 20))):
        Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=block)
        assert load_image(tmp_path / "x.jpg").size == size


def test_a_long_strip_costs_little_memory():
    """And gives what scaling it whole gives."""
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 255, (2, 333, 3), dtype=np.uint8))
    whole = resize(strip, [96], InterpolationMode.BILINEAR)
    found, expected = (
        np.asarray(x, float) for x in (eval_image(strip, 84, "port"), center_crop(whole, [84, 84]))
    )
    assert np.abs(found - expected).mean() < 2
    assert eval_image(Image.new("RGB", (1, 9_000_000)), 84, "port").size == (84, 84)


# ---- Augmentation ----


def distance(a, b):
    """Kolmogorov-Smirnov distance of two samples."""
    both = np.sort(np.concatenate((a, b)))
    below = [np.searchsorted(np.sort(v), both, "right") / len(v) for v in (a, b)]
    return np.abs(below[0] - below[1]).max()


@pytest.mark.parametrize("size", [(64, 64), (96, 300), (300, 100), (84, 112)])
def test_parameters_are_distributed_as_torchvision_draws_them(size):
    n, image = 4000, torch.empty(3, *size)
    ours = draw_augmentation(generator(3, "train", 0, AUGMENT), np.tile(size, (n, 1)))
    crop, jitter = RandomResizedCrop(84), ColorJitter(0.4, 0.4, 0.4, 0.2)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    boxes = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)])
    orders, *factors = zip(*(jitter.get_params(*ranges) for _ in range(n)), strict=True)
    for k in range(4):  # the 0.1 % point for two samples of 4,000
        assert distance(ours.box[:, k], boxes[:, k]) < 0.043
        assert distance(ours.jitter[:, k], np.array(factors[k])) < 0.043
    firsts = ours.order[:, 0], np.array([int(order[0]) for order in orders])
    counts = [np.bincount(first, minlength=4) for first in firsts]
    assert np.abs(counts[0] - counts[1]).max() / n < 0.04
    assert abs(ours.flip.mean() - 0.5) < 0.03


def test_no_augmentation_squashes(backend, master):
    data = dataset(backend, master, augment="none", pixels="unit")
    assert data.augmentation(0, np.array([[20, 30]])) is None
    support = listed(data)[0].support
    assert support.shape == (6, 3, 16, 16)
    for x, number in zip(support, data.indices(0), strict=False):
        squashed = load_image(data.files[number]).resize((16, 16), Image.Resampling.BILINEAR)
        levels = 255 * x.permute(1, 2, 0).numpy()
        # the fast way reduces the largest of these images twice, to 32 px first
        close = 0.01 if backend == "plain" else 1.5
        assert np.abs(levels - np.asarray(squashed)).mean() < close


def test_pixels_from_zero_to_one(backend, master):
    kinds = [dataset(backend, master, "val", pixels=pixels) for pixels in ("unit", "imagenet")]
    unit, normalised = (listed(data)[0].query for data in kinds)
    assert 0 <= unit.min() < unit.max() <= 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose((unit - mean) / std, normalised, atol=1e-5)


def test_training_images_are_flipped_as_drawn(backend, master):
    data = [dataset(backend, master, augment=how, pixels="unit") for how in ("flip", "none")]
    flips = [draw_flips(generator(719, "train", k, AUGMENT), 15).flip for k in range(6)]
    for flip, *pair in zip(flips, *map(listed, data), strict=True):
        found, whole = (torch.cat((e.support, e.query)) for e in pair)
        whole[flip] = whole[flip].flip(3)
        assert (found - whole).abs().max() < 1e-2  # Pillow rounds
    assert 0.3 < np.mean(flips) < 0.7
    for split in ("val", "test"):
        flip, none = (dataset(backend, master, split, augment=how) for how in ("flip", "none"))
        assert_same(listed(flip), listed(none))


# ---- Folders ----


def test_too_few_classes_or_images(master, tmp_path):
    split = scan_split(master, "train")
    with pytest.raises(UserError, match=r"--n-class 7: the train split has only 6 classes"):
        check_sizes(split, 7, 1, 1)
    with pytest.raises(UserError, match=r"train/class 0: 8 images, .* 9 .*\b5 more"):
        check_sizes(split, 5, 4, 5)
    check_sizes(Split("train", ["a"], [[tmp_path] * 3], tmp_path), 1, 1, 2)


def test_a_class_with_too_few_images_is_left_out_by_the_command_in_the_error(data):
    for path in sorted((data / "train" / "class 2").iterdir())[3:]:
        path.unlink()
    with pytest.raises(UserError, match="class 2") as error:
        check_sizes(scan_split(data, "train"), 5, 2, 2)
    subprocess.run(str(error.value).rpartition(": ")[2], shell=True, check=True)
    check_sizes(scan_split(data, "train"), 5, 2, 2)


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
@pytest.mark.parametrize("names", [("Déjà vu", "Déjà vu"), ("a", "link")])
def test_a_class_in_two_splits_is_refused(tmp_path, pair, names):
    """Also where its name is written in another way, or one folder is a link to the other."""
    for split in ("train", "val", "test"):
        (tmp_path / split / f"of {split}").mkdir(parents=True)
    check_splits(tmp_path)
    first, second = (
        tmp_path / split / unicodedata.normalize(form, name)
        for split, form, name in zip(pair, ("NFC", "NFD"), names, strict=True)
    )
    first.mkdir()
    second.symlink_to(first) if names[1] == "link" else second.mkdir()
    with pytest.raises(UserError, match=f"{pair[0]}/{first.name} and {pair[1]}/{second.name}"):
        check_splits(tmp_path)


def test_one_name_written_in_two_ways_is_refused(data):
    for form in ("NFC", "NFD"):
        (data / "train" / unicodedata.normalize(form, "déjà vu")).mkdir()
    with pytest.raises(UserError, match="second class of this name"):
        scan_split(data, "train")


def test_one_folder_under_two_names_is_refused(data):
    (data / "train" / "link").symlink_to(data / "train" / "class 0")
    with pytest.raises(UserError, match="train/link"):
        scan_split(data, "train")


def test_unknown_formats_and_litter_are_left_out_with_one_note(data, capsys):
    cls = data / "train" / "class 0"
    names = ("a.HEIC", "b.heic", "notes", ".ipynb_checkpoints/c.jpg", "@eaDir/d.jpg")
    for name in (*names, "__MACOSX/e.jpg", "Thumbs.db"):
        (cls / name).parent.mkdir(exist_ok=True)
        (cls / name).write_bytes(b"x")
    assert list(map(len, scan_split(data, "train").files)) == [8] * 6
    scan_split(data, "train")
    (line,) = capsys.readouterr().out.splitlines()
    assert all(part in line for part in (str(data / "train"), "3 files", ".heic", "no suffix"))


def test_linked_folders_are_followed_but_not_in_circles(data, tmp_path, capsys):
    (tmp_path / "linked").symlink_to(data)
    cls = data / "train" / "class 0"
    cls.rename(data / "elsewhere")
    cls.symlink_to(data / "elsewhere")
    (data / "val" / "loop").symlink_to(data)
    (data / "val" / "self.jpg").symlink_to("self.jpg")
    assert len(scan_split(tmp_path / "linked", "train").files[0]) == 8
    found = images_below(tmp_path / "linked")
    assert sum(path.parent.name == "class 0" for path in found) == 8
    assert len({path.resolve() for path in found}) == 3 * 6 * 8
    assert "2 links" in capsys.readouterr().out
    assert len(images_below(data / "train", without=(data / "elsewhere").iterdir())) == 5 * 8
