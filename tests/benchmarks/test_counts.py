"""benchmarks/counts.py: launches and host copies of a training episode, counted without a GPU."""

import pytest
import torch
from helpers import counts

pytest.importorskip("triton")


# Nodes of the CUDA graph, by shots; where a change makes them fewer, lower the number here.
LAUNCHES = {5: 408, 1: 560}
SECOND_ORDER = {5: 800, 1: 1148}


@pytest.mark.parametrize("n_shot", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_launches_and_host_copies_of_a_training_episode(n_shot, tmp_path):
    parts = counts.parts(n_shot, tmp_path)
    episode = counts.count(parts[counts.EPISODE], triton=True)
    assert (episode.launches, episode.copies) == (LAUNCHES[n_shot], 0)
    episode = counts.count(parts[counts.SECOND_ORDER], triton=True)
    assert (episode.launches, episode.copies) == (SECOND_ORDER[n_shot], 0)
    assert counts.count(parts[counts.AUGMENTATION], triton=True).copies == 1


def test_what_counts():
    x = torch.zeros(3, device="meta")
    counted = counts.count(lambda: (x + 1, x.view(3, 1)))
    assert (counted.launches, counted.bytes, counted.copies) == (1, 24, 0)
    assert counts.count(lambda: torch.ones(3).to("meta")).copies == 1
    assert counts.count(lambda: x.copy_(torch.ones(3))).copies == 1
