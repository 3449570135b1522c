import tarfile
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dataloader import (
    MEAN,
    STD,
    Augmentation,
    draw_augmentation,
    eval_image,
    load_image,
    train_image,
)
from fast import augment, native
from fast.augment import Windows
from fast.library import library

TINY64 = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tiny64.tar.gz"
PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def sources():
    """Parts of a real photograph in many sizes, and a greyscale one."""
    photograph = load_image(PHOTOGRAPH)
    sizes = [(64, 64), (84, 84), (168, 168), (168, 224), (250, 168), (40, 97), (64, 64), (84, 84)]
    images = [photograph.resize(size) for size in sizes]
    images += [photograph.crop((150 + 10 * k, 100, 150 + 10 * k + 84, 184)) for k in range(12)]
    return [*images, photograph.resize((84, 84)).convert("L").convert("RGB")]


def tiny64(n):
    """The first n photographs of a data set that some machines have beside the repository, read
    without unpacking it.
    """
    if not TINY64.is_file():
        pytest.skip(f"{TINY64} is not here")
    images = []
    with tarfile.open(TINY64) as archive:
        for member in archive:
            if member.isfile():
                with Image.open(archive.extractfile(member)) as image:
                    images.append(image.convert("RGB"))
            if len(images) == n:
                return images
    return images


def padded(images):
    sizes = np.array([(image.height, image.width) for image in images])
    pixels = torch.zeros(len(images), 3, *sizes.max(axis=0), dtype=torch.uint8)
    for k, image in enumerate(images):
        pixels[k, :, : image.height, : image.width] = torch.from_numpy(np.array(image)).permute(
            2, 0, 1
        )
    return pixels, sizes


def transform(pixels, windows, image_size, drawn=None):
    return augment.transform(pixels, torch.from_numpy(augment.table(windows, drawn)), image_size)


def idle(n, flip=False):
    """An augmentation that at most flips."""
    return Augmentation(
        np.zeros((n, 4)),
        np.full(n, flip),
        np.tile([1.0, 1, 1, 0], (n, 1)),
        np.tile(np.arange(4), (n, 1)),
    )


def grey_levels(x):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x * std + mean) * 255


def expected(images):
    return torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images]
    )


@pytest.mark.parametrize(
    ("source", "repeats"), [(sources, 6), (lambda: tiny64(300), 1)], ids=["photograph", "tiny64"]
)
def test_training_images_are_torchvisions(source, repeats):
    differences = []
    for index in range(repeats):
        images = source()
        pixels, sizes = padded(images)
        drawn = draw_augmentation(5, "train", index, sizes)
        ours = transform(pixels, Windows.crops(drawn.box, 84), 84, drawn)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        theirs = [train_image(image, drawn, k, 84) for k, image in enumerate(images)]
        differences.append((grey_levels(ours) - expected(theirs)).abs().mean((1, 2, 3)))
    differences = torch.cat(differences)
    assert differences.mean() < 1.5
    assert differences.max() < 4


@pytest.mark.parametrize("source", [sources, lambda: tiny64(300)], ids=["photograph", "tiny64"])
@pytest.mark.parametrize("image_size", [84, 32])
def test_evaluation_images_are_torchvisions(image_size, source):
    images = source()
    pixels, sizes = padded(images)
    ours = transform(pixels, Windows.centres(sizes, image_size), image_size)
    theirs = expected([eval_image(image, image_size, "port") for image in images])
    assert (grey_levels(ours) - theirs).abs().mean() < 0.5
    ours = transform(pixels, Windows.squashed(sizes, image_size), image_size)
    theirs = expected([eval_image(image, image_size, "none") for image in images])
    assert (grey_levels(ours) - theirs).abs().mean() < 0.5


def test_crop_that_changes_nothing_is_exact():
    """And so are colours that change nothing, but for a hue that is rounded to Pillow's steps."""
    images = [load_image(PHOTOGRAPH).resize((84, 84))]
    pixels, _ = padded(images)
    box = np.array([[0, 0, 84, 84]])
    for flip in (False, True):
        source = pixels.float().flip(3) if flip else pixels.float()
        with (
            mock.patch.object(augment, "_colour", lambda x, *_: x),
            mock.patch.object(native, "handles", return_value=False),
        ):
            ours = grey_levels(transform(pixels, Windows.crops(box, 84), 84, idle(1, flip)))
        assert (ours - source).abs().max() < 1e-3
    assert (grey_levels(transform(pixels, Windows.crops(box, 84), 84)) - pixels).abs().max() < 1e-3


@pytest.mark.parametrize(
    "colour", [augment._colour, augment._colour_together], ids=["apart", "together"]
)
def test_pytorchs_way_gives_the_kernels_images(colour):
    """Together is the GPU's way, apart that of a CPU without a compiler."""
    if not library().functions:
        pytest.skip(library().state)
    images = sources()
    pixels, sizes = padded(images)
    drawn = draw_augmentation(5, "train", 0, sizes)
    windows = Windows.crops(drawn.box, 84)
    coloured, resized = (transform(pixels, windows, 84, given) for given in (drawn, None))
    with (
        mock.patch.object(native, "handles", return_value=False),
        mock.patch.object(augment, "_colour", colour),
    ):
        assert (
            grey_levels(coloured) - grey_levels(transform(pixels, windows, 84, drawn))
        ).abs().mean() < 0.05
        assert (
            grey_levels(resized) - grey_levels(transform(pixels, windows, 84))
        ).abs().max() < 1e-2


def test_numbers_survive_their_way_to_the_device():
    """As float32, in one table."""
    sizes = np.tile([[16000, 15999]], (50, 1))
    drawn = draw_augmentation(5, "train", 0, sizes)
    windows = Windows.crops(drawn.box, 84)
    table = augment.table(windows, drawn).astype(np.float64)
    assert np.array_equal(table[:, :8].reshape(-1, 4, 2).transpose(1, 0, 2), np.stack(windows))
    assert np.array_equal(table[:, 8], drawn.flip)
    assert np.array_equal(table[:, 9:13], drawn.jitter.astype(np.float32))
    assert np.array_equal(table[:, 13:], drawn.order)
    assert augment.table(windows, None).shape == (50, 9)
