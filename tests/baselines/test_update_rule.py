"""The example of an own update rule, and frozen features that several threads share."""

import runpy

import pytest
import torch
from conftest import LEARNERS, ROOT
from torch import nn


def test_the_example_of_an_own_update_rule_learns(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / "own_update_rule.py"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[4]) > 70


@pytest.mark.skipif("fast" not in LEARNERS, reason="plain PyTorch keeps nothing between calls")
def test_a_network_that_threads_share_returns_each_its_own_images(monkeypatch):
    network = LEARNERS["fast"](16, 1e-3, 0.95, 3).eval()
    mine, others = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    store, came = nn.Module.__setattr__, []

    def interrupted(self, name, value):
        store(self, name, value)
        if name == "_last" and not came:  # here another thread takes its turn
            came.append(network.block(1, others))

    monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
    found = network.block(1, mine)
    monkeypatch.undo()
    assert torch.equal(found, network.block(1, mine))
    assert torch.equal(came[0], network.block(1, others))
