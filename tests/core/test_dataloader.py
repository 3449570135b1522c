import subprocess
import unicodedata

import numpy as np
import pytest
import torch
from conftest import CPU, DATASETS, dataset, photograph, same
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop

from dataloader import (
    MEAN,
    STD,
    Split,
    check_split,
    check_splits,
    draw_augmentation,
    draw_images,
    draw_order,
    episodes,
    eval_image,
    scan_split,
    to_input,
)
from imagefiles import images_below, load_image
from utils import UserError

PINNED = {
    "classes": [2, 0, 5, 4, 3],
    "images": [[0, 3, 2, 4], [2, 3, 5, 4], [0, 5, 1, 3], [6, 1, 3, 0], [0, 3, 4, 7]],
    "box": [[1, 7, 62, 53], [159, 30, 192, 176], [0, 130, 30, 40]],
    "flip": [True, True, True],
    "order": [[1, 3, 0, 2], [3, 1, 0, 2], [1, 3, 0, 2]],
    "jitter": [0.7532890033976217, 1.0110292056703787, 0.6268533608825444, -0.14045899455008767],
    "passes": [[4, 1, 3, 0, 2], [0, 3, 1, 2, 4]],
}


def test_shape_and_order_of_an_episode(backend, master):
    data = dataset(backend, master)
    episode = next(episodes(data, 0, 0, CPU, False))
    assert episode.support.shape == (6, 3, 16, 16)
    assert episode.query.shape == (9, 3, 16, 16)
    assert episode.support.dtype == torch.float32
    assert episode.support_y.tolist() == [0, 0, 1, 1, 2, 2]
    assert episode.query_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [sorted(row) for row in episode.order.tolist()] == [list(range(6))] * 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_same_episodes_for_any_number_of_workers(backend, master, n_workers):
    data = dataset(backend, master)
    alone = list(episodes(data, 0, 0, CPU, False))
    assert len(alone) == 6
    assert not same(alone[0], alone[1])
    assert all(
        same(a, b) for a, b in zip(alone, episodes(data, 0, n_workers, CPU, False), strict=True)
    )


def test_same_episodes_after_a_restart_and_for_a_longer_run(backend, master):
    alone = list(episodes(dataset(backend, master), 0, 0, CPU, False))
    later = list(episodes(dataset(backend, master, length=9), 4, 0, CPU, False))
    assert len(later) == 5
    assert all(same(a, b) for a, b in zip(alone[4:], later, strict=False))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_episodes_leave_the_global_random_state_alone(backend, master, n_workers):
    before = torch.get_rng_state()
    assert (
        len(list(episodes(dataset(backend, master, "val", length=2), 0, n_workers, CPU, False)))
        == 2
    )
    assert torch.equal(before, torch.get_rng_state())


def test_other_splits_and_seeds_give_other_episodes(master):
    drawn = [
        draw_images(seed, scan_split(master, split), k, 5, 8)[0].tolist()
        for seed, split, k in (
            (719, "train", 0),
            (719, "train", 1),
            (719, "val", 0),
            (53, "train", 0),
        )
    ]
    assert len({tuple(d) for d in drawn}) == 4


def test_classes_and_images_do_not_repeat(master):
    split = scan_split(master, "train")
    for k in range(50):
        classes, images = draw_images(1, split, k, 6, 8)
        assert sorted(classes) == list(range(6))
        assert all(sorted(row) == list(range(8)) for row in images)


def test_every_class_and_image_is_drawn_equally_often(master):
    split = scan_split(master, "train")
    drawn = [draw_images(1, split, k, 2, 3) for k in range(3000)]
    by_class = np.bincount(np.concatenate([c for c, _ in drawn]), minlength=6) / 3000
    by_image = np.bincount(np.concatenate([i.reshape(-1) for _, i in drawn]), minlength=8) / 6000
    assert np.abs(by_class - 2 / 6).max() < 0.04
    assert np.abs(by_image - 3 / 8).max() < 0.03


def test_the_same_on_another_machine(master):
    """Literal numbers: whatever changes them changes every published run."""
    classes, images = draw_images(719, scan_split(master, "train"), 31417, 5, 4)
    assert classes.tolist() == PINNED["classes"]
    assert images.tolist() == PINNED["images"]
    drawn = draw_augmentation(719, "train", 31417, np.array([[64, 64], [375, 500], [30, 300]]))
    assert drawn.box.tolist() == PINNED["box"]
    assert drawn.flip.tolist() == PINNED["flip"]
    assert drawn.order.tolist() == PINNED["order"]
    assert np.allclose(drawn.jitter[1], PINNED["jitter"], rtol=1e-12)
    assert draw_order(719, "train", 31417, 2, 5).tolist() == PINNED["passes"]


@pytest.mark.parametrize(
    ("name", "mode", "close"),
    [
        ("x.png", "RGB", 0),
        ("x.jpg", "RGB", 4),
        ("x.webp", "RGB", 4),
        ("x.jpg", "CMYK", 4),
        ("x.png", "P", 0),
        ("x.gif", "P", 0),
        ("x.png", "L", 1),
        ("x.jpg", "L", 4),
        ("x.png", "RGBA", 0),
        ("x.png", "LA", 1),
        ("x.png", "I;16", 1),
        ("x.tif", "I;16", 1),
    ],
)
def test_the_same_picture_in_every_form(tmp_path, name, mode, close):
    """At most so many grey levels apart, on average."""
    picture = photograph(np.random.default_rng(2), 40, 30)
    if mode == "P":
        picture = picture.quantize(256).convert("RGB")
    grey = mode in ("L", "LA", "I;16")
    expected = np.asarray(picture.convert("L").convert("RGB") if grey else picture).astype(int)
    if mode == "I;16":
        saved = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        saved = picture.quantize(256) if mode == "P" else picture.convert(mode)
    saved.save(tmp_path / name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    loaded = load_image(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert loaded.mode == "RGB"
    assert loaded.size == picture.size
    assert np.abs(np.asarray(loaded) - expected).mean() <= close


def test_orientation_of_cameras_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == (20, 30)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (200, 200)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15000)  # Pillow refuses twice as many
    with pytest.raises(UserError, match=r"x\.png: not a readable image"):
        load_image(tmp_path / "x.png")


def distance(a, b):
    """Kolmogorov-Smirnov distance of two samples."""
    both = np.sort(np.concatenate((a, b)))
    below = [np.searchsorted(np.sort(v), both, "right") / len(v) for v in (a, b)]
    return np.abs(below[0] - below[1]).max()


@pytest.mark.parametrize("size", [(64, 64), (96, 300), (300, 100), (84, 112)])
def test_parameters_are_distributed_as_torchvision_draws_them(size):
    n = 4000
    ours = draw_augmentation(3, "train", 0, np.tile(size, (n, 1)))
    crop = RandomResizedCrop(84)
    image = torch.empty(3, *size)
    theirs = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(n)])
    for k in range(4):
        assert (
            distance(ours.box[:, k], theirs[:, k]) < 0.043
        )  # the 0.1 % point for two samples of 4,000
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.2)
    drawn = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(n)
    ]
    for k in range(4):
        assert distance(ours.jitter[:, k], np.array([d[k + 1] for d in drawn])) < 0.043
    first = [
        np.bincount([int(d[0][0]) for d in drawn], minlength=4),
        np.bincount(ours.order[:, 0], minlength=4),
    ]
    assert np.abs(first[0] - first[1]).max() / n < 0.04
    assert abs(ours.flip.mean() - 0.5) < 0.03


def test_too_few_classes_or_images(master, tmp_path):
    split = scan_split(master, "train")
    with pytest.raises(UserError, match=r"--n-class 7: the train split has only 6 classes"):
        check_split(split, 7, 1, 1)
    with pytest.raises(UserError, match=r"train/class 0: 8 images, .* 9 .*\b5 more"):
        check_split(split, 5, 4, 5)
    check_split(Split("train", ["a"], [[tmp_path] * 3], tmp_path), 1, 1, 2)


def test_a_class_with_too_few_images_is_left_out_by_the_command_in_the_error(data):
    for path in sorted((data / "train" / "class 2").iterdir())[3:]:
        path.unlink()
    with pytest.raises(UserError, match="class 2") as error:
        check_split(scan_split(data, "train"), 5, 2, 2)
    subprocess.run(str(error.value).rpartition(": ")[2], shell=True, check=True)
    check_split(scan_split(data, "train"), 5, 2, 2)


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
@pytest.mark.parametrize("name", ["twice", "déjà vu"])
def test_a_class_in_two_splits_is_refused(tmp_path, pair, name):
    """Also where one system has written its name as NFC and another as NFD."""
    for split in ("train", "val", "test"):
        (tmp_path / split / f"of {split}").mkdir(parents=True)
    check_splits(tmp_path)
    for split, form in zip(pair, ("NFC", "NFD"), strict=True):
        (tmp_path / split / unicodedata.normalize(form, name)).mkdir()
    with pytest.raises(UserError, match=name[-2:]):
        check_splits(tmp_path)


def test_one_name_written_in_two_ways_is_refused(data):
    for form in ("NFC", "NFD"):
        (data / "train" / unicodedata.normalize(form, "déjà vu")).mkdir()
    with pytest.raises(UserError, match="second class of this name"):
        scan_split(data, "train")


def test_a_class_that_the_checkpoint_was_trained_on_is_no_test_class(tmp_path):
    (tmp_path / "test" / "cat").mkdir(parents=True)
    check_splits(tmp_path, ["dog", "ca"])
    with pytest.raises(UserError, match="cat"):
        check_splits(tmp_path, ["dog", "cat"])


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


def test_linked_folders_are_followed_but_not_in_circles(data, tmp_path):
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
    assert len(images_below(data / "train", without=(data / "elsewhere").iterdir())) == 5 * 8


def test_no_augmentation_squashes_every_split_alike(backend, master):
    data = dataset(backend, master, "train", augment="none")
    assert data.augmentation(0, np.array([[20, 30]])) is None
    support = next(episodes(data, 0, 0, CPU, False)).support
    assert support.shape == (6, 3, 16, 16)
    for x, number in zip(support, data.numbers(0), strict=False):
        squashed = load_image(data.files[number]).resize((16, 16), Image.Resampling.BILINEAR)
        whole = (x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).permute(
            1, 2, 0
        ) * 255
        # the fast way reduces the largest of these images twice, to 32 px first
        assert np.abs(whole.numpy() - np.asarray(squashed)).mean() < (
            0.01 if backend == "plain" else 1.5
        )


def test_one_order_an_episode_as_the_authors_have_it():
    order = draw_order(719, "train", 3, 4, 25, "episode")
    assert (order == draw_order(719, "train", 3, 1, 25)[0]).all()
    assert order.shape == (4, 25)
    assert sorted(order[0]) == list(range(25))


def test_pixels_from_zero_to_one(backend, master):
    kinds = [dataset(backend, master, "val", pixels=pixels) for pixels in ("unit", "imagenet")]
    unit, normalised = (next(episodes(data, 0, 0, CPU, False)).query for data in kinds)
    assert 0 <= unit.min() < unit.max() <= 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose((unit - mean) / std, normalised, atol=1e-5)


def test_training_images_are_flipped_at_random(backend, master):
    ours = dataset(backend, master, augment="flip", pixels="unit")
    plain = dataset(backend, master, augment="none", pixels="unit")
    same_side = []
    for a, b in zip(
        episodes(ours, 0, 0, CPU, False), episodes(plain, 0, 0, CPU, False), strict=True
    ):
        for x, y in zip(
            torch.cat((a.support, a.query)), torch.cat((b.support, b.query)), strict=True
        ):
            same_side.append((x - y).abs().max() < 1e-6)
            assert same_side[-1] or (x - y.flip(2)).abs().max() < 1e-2  # Pillow rounds
    assert 0.3 < np.mean(same_side) < 0.7
    for split in ("val", "test"):
        a, b = (
            next(episodes(dataset(backend, master, split, augment=how), 0, 0, CPU, False))
            for how in ("flip", "none")
        )
        assert same(a, b)


def test_both_ways_flip_the_same_images(master):
    found = [
        next(episodes(dataset(backend, master, augment="flip"), 0, 0, CPU, False))
        for backend in DATASETS
    ]
    assert all(
        (a - b).abs().mean() < 0.02 for a, b in zip(found[0][:1], found[-1][:1], strict=True)
    )


def test_evaluation_squashes(master):
    path = scan_split(master, "val").files[0][0]
    a, b = (to_input([eval_image(load_image(path), 16, how)], "unit") for how in ("flip", "none"))
    assert torch.equal(a, b)


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


def test_depths_are_scaled_or_refused(tmp_path):
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    for name, values in (("float.tif", ramp), ("int.tif", (ramp * 65535).astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_image(tmp_path / name))
        assert (pixels[0, 0, 0], pixels[3, 3, 0]) == (0, 255)
    Image.fromarray(ramp * 9).save(tmp_path / "wide.tif")
    with pytest.raises(UserError, match=r"wide\.tif"):
        load_image(tmp_path / "wide.tif")


def test_a_damaged_exif_block_is_ignored(tmp_path):
    Image.new("RGB", (4, 6), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage!")
    assert load_image(tmp_path / "a.jpg").size == (4, 6)
