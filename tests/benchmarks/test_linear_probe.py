"""benchmarks/linear_probe.py: simple classifiers on pre-trained features."""

import numpy as np
import pytest
import torch
from conftest import photograph, succeeded, train
from helpers import linear_probe, table
from PIL import Image
from torch.nn.functional import cross_entropy

from utils import UserError


def test_gradient_descent_is_that_of_an_empty_linear_layer():
    support, query = torch.rand(5, 2, 7), torch.rand(9, 7)
    found, layer = linear_probe.gradient_descent(support, query, 0.7), torch.nn.Linear(7, 5)
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.7)
    for _ in range(8):
        sgd.zero_grad()
        cross_entropy(layer(support.flatten(0, 1)), torch.arange(5).repeat_interleave(2)).backward()
        sgd.step()
    assert torch.allclose(found, layer(query), atol=1e-5)


def test_the_nearest_mean_looks_at_directions_only():
    support, query = torch.rand(5, 3, 7), torch.rand(9, 7)
    scores = linear_probe.nearest_mean(support, query)
    scaled = linear_probe.nearest_mean(support * torch.rand(5, 3, 1), query * 5)
    assert torch.allclose(scaled, scores, atol=1e-6)
    own = linear_probe.nearest_mean(support[:, :1], support[:, 0])
    assert torch.allclose(own.diagonal(), torch.ones(5))


@pytest.fixture
def classes(tmp_path):
    """Five classes of 20 images a split: in each, one picture with some noise."""
    rng = np.random.default_rng(3)
    for folder in (tmp_path / "data" / s / f"{s} {c}" for s in ("train", "val") for c in range(5)):
        folder.mkdir(parents=True)
        picture = np.asarray(photograph(rng, 16, 16)).astype(int)
        for k in range(20):
            noisy = np.clip(picture + rng.integers(-20, 20, picture.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "data"


def test_a_table_of_runs(classes, tmp_path, capsys):
    save = tmp_path / "logs"
    flags = ("--n-class", "5", "--lr", "1e-2", "--episode", "20", "--mode", "pretrain")
    succeeded(train(classes, save, *flags))
    flags = ["--data-root", classes, "--episodes", "5"]
    rows = table(linear_probe, capsys, f"{save}-719", *flags)
    keys = [(row["run"], row["shots"], row["shift"]) for row in rows]
    assert keys == [("logs-719", shots, shift) for shift in ("0", "0.3") for shots in "51"]
    few, many = (int(rows[k]["not zero, %"]) for k in (0, 2))
    assert 0 < few < many <= 100  # a higher shift brings features back
    assert all(float(row["nearest mean, %"].split()[0]) > 60 for row in rows)
    assert [row["difference"] != "" for row in rows] == [False, False, True, True]
    with pytest.raises(UserError, match="none"):
        linear_probe.main(["none", *map(str, flags)])
