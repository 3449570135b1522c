"""Batched augmentation against torchvision, and PyTorch's code against the kernel."""

from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch

from data.imagefiles import load_image
from dataloader import MEAN, STD, draw_augmentation, eval_image, train_image
from fast import augment, native
from fast.augment import Windows
from fast.library import library

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def photographs():
    """Parts of a real photograph in many sizes, and a greyscale one."""
    photograph = load_image(PHOTOGRAPH)
    sizes = [(64, 64), (84, 84), (168, 168), (168, 224), (250, 168), (40, 97), (64, 64), (84, 84)]
    images = [photograph.resize(size) for size in sizes]
    images += [photograph.crop((150 + 10 * k, 100, 150 + 10 * k + 84, 184)) for k in range(12)]
    return [*images, photograph.resize((84, 84)).convert("L").convert("RGB")]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def padded(images):
    sizes = np.array([(image.height, image.width) for image in images])
    pixels = torch.zeros(len(images), 3, *sizes.max(axis=0), dtype=torch.uint8)
    for k, image in enumerate(images):
        pixels[k, :, : image.height, : image.width] = to_tensor(image)
    return pixels, sizes


def transform(pixels, windows, size, drawn=None):
    """``augment.transform``, in grey levels."""
    x = augment.transform(pixels, torch.from_numpy(augment.table(windows, drawn)), size)
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x * std + mean) * 255


def without_kernels():
    return mock.patch.object(native, "handles", return_value=False)


def test_training_images_are_torchvisions():
    images, differences = photographs(), []
    pixels, sizes = padded(images)
    for index in range(3):
        drawn = draw_augmentation(5, "train", index, sizes)
        x = transform(pixels, Windows.crops(drawn.box, 84), 84, drawn)
        plain = [to_tensor(train_image(image, drawn, k, 84)) for k, image in enumerate(images)]
        differences.append((x - torch.stack(plain)).abs().mean((1, 2, 3)))
    differences = torch.cat(differences)
    assert differences.mean() < 1.5
    assert differences.max() < 4


@pytest.mark.parametrize("size", [84, 32])
@pytest.mark.parametrize(("kind", "setting"), [("centres", "port"), ("squashed", "none")])
def test_evaluation_images_are_torchvisions(kind, setting, size):
    images = photographs()
    pixels, sizes = padded(images)
    x = transform(pixels, getattr(Windows, kind)(sizes, size), size)
    plain = torch.stack([to_tensor(eval_image(image, size, setting)) for image in images])
    assert (x - plain).abs().mean() < 0.5


@pytest.mark.skipif(not library().functions, reason="no compiled kernels")
def test_pytorch_agrees_with_the_kernel():
    pixels, sizes = padded(photographs())
    drawn = draw_augmentation(5, "train", 0, sizes)
    windows = Windows.crops(drawn.box, 84)
    coloured, resized = (transform(pixels, windows, 84, d) for d in (drawn, None))
    with without_kernels():
        assert (coloured - transform(pixels, windows, 84, drawn)).abs().mean() < 0.05
        assert (resized - transform(pixels, windows, 84)).abs().max() < 1e-2


def test_table_holds_all_parameters_exactly():
    sizes = np.tile([[16000, 15999]], (50, 1))
    drawn = draw_augmentation(5, "train", 0, sizes)
    windows = Windows.crops(drawn.box, 84)
    table = augment.table(windows, drawn).astype(np.float64)
    assert np.array_equal(table[:, :8].reshape(-1, 4, 2).transpose(1, 0, 2), np.stack(windows))
    assert np.array_equal(table[:, 8], drawn.flip)
    assert np.array_equal(table[:, 9:13], drawn.jitter.astype(np.float32))
    assert np.array_equal(table[:, 13:], drawn.order)
    assert augment.table(windows, None).shape == (50, 9)
