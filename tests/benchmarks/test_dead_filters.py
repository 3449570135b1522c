"""benchmarks/dead_filters.py: filters that no image activates."""

import pytest
import torch
from conftest import succeeded, train
from helpers import dead_filters, table

from engine.checkpoint import LAST
from learner import Conv4
from utils import UserError


def test_dead_filters_are_counted_in_their_block(master, tmp_path, capsys):
    flags = ["--bn-scale", "one", "--filters", "8"]
    succeeded(train(master, tmp_path / "run", *flags, episode=2))
    path = tmp_path / "run-719" / "ckpts" / LAST
    content = torch.load(path, weights_only=True)
    net = Conv4(16, 1e-3, 0.95, n_classes=3, n_filters=8)
    net.copy_flat_params(content["metalearner"]["metalstm.cI"])
    with torch.no_grad():
        net.norm2.weight[:3], net.norm2.bias[:3] = 0.01, -1
        net.norm4.weight[1], net.norm4.bias[1] = 0, 0
        net.norm3.bias[5] = -0.01  # activated by some pixels
    content["metalearner"]["metalstm.cI"] = net.get_flat_params().unsqueeze(1)
    torch.save(content, path)
    (row,) = table(dead_filters, capsys, path, "--episode-val", 3, "--n-workers", 0, "--cpu")
    assert [row[f"dead in block {b}"] for b in (1, 2, 3, 4)] == ["0", "3", "0", "1"]
    assert (row["bn-scale"], row["episode"]) == ("one", "2")


def test_a_method_without_an_inner_loop_is_refused(master, tmp_path):
    succeeded(train(master, tmp_path / "run", "--method", "protonet", episode=2))
    with pytest.raises(UserError, match="run-719"):
        dead_filters.main([str(tmp_path / "run-719"), "--n-workers", "0", "--cpu"])
