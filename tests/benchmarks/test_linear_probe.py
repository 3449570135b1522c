"""benchmarks/features.py: what pre-trained features are worth."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, benchmark, photograph, refused, rows_printed
from PIL import Image
from test_pretrain import pretrain
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(ROOT / "benchmarks"))

from features import descent, nearest_mean


def test_descent_is_that_of_an_empty_classifier():
    support, query = torch.rand(5, 2, 7, dtype=torch.float64), torch.rand(9, 7, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        found, layer = descent(support, query, 0.7), torch.nn.Linear(7, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.7)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    for _ in range(8):
        sgd.zero_grad()
        cross_entropy(layer(support.flatten(0, 1)), torch.arange(5).repeat_interleave(2)).backward()
        sgd.step()
    assert torch.allclose(found, layer(query), rtol=1e-9)


def test_the_nearest_mean_looks_at_directions_only():
    support, query = torch.rand(5, 3, 7), torch.rand(9, 7)
    scores = nearest_mean(support, query)
    assert torch.allclose(nearest_mean(support * torch.rand(5, 3, 1), query * 5), scores, atol=1e-6)
    own = nearest_mean(support[:, :1], support[:, 0])
    assert torch.allclose(own.diagonal(), torch.ones(5))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Five classes of 20 images a split: in each, one picture with some noise."""
    root, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(3)
    for split in ("train", "val"):
        for c in range(5):
            folder, picture = (
                root / split / f"{split} {c}",
                np.asarray(photograph(rng, 16, 16)).astype(int),
            )
            folder.mkdir(parents=True)
            for k in range(20):
                noisy = np.clip(picture + rng.integers(-20, 20, picture.shape), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(noisy).save(folder / f"{k}.jpg", quality=95)
    return root


def test_a_table_of_runs(classes, tmp_path):
    save = tmp_path / "logs"
    assert pretrain(classes, save, "--lr", "1e-2", episode=20) == 0
    flags = ("--data-root", classes, "--episodes", "5")
    rows = [
        list(row.values()) for row in rows_printed(benchmark("features.py", f"{save}-719", *flags))
    ]
    assert [row[:3] for row in rows] == [
        ["logs-719", shots, shift] for shift in ("0", "0.3") for shots in ("5", "1")
    ]
    few, many = (int(rows[k][3]) for k in (0, 2))
    assert 0 < few < many <= 100  # a higher shift brings features back
    assert all(float(row[4].split()[0]) > 60 for row in rows)  # noise does not hide the picture
    assert "(" not in rows[0][5]
    assert "(" in rows[2][5]
    assert "none: there is neither" in refused(benchmark("features.py", tmp_path / "none", *flags))
