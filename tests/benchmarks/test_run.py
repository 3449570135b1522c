"""benchmarks/run.py: its sections run on the CPU and report times."""

import pytest
import torch
from helpers import run

from engine.flags import DEFAULTS

SLOW = [pytest.param(section, marks=pytest.mark.slow) for section in ("end-to-end", "scaling")]


@pytest.mark.parametrize("section", ["parts", *SLOW])
def test_a_section(section, master, tmp_path, monkeypatch, capsys):
    for name, value in {"n_eval": 3, "image_size": 16, "epoch": 2}.items():
        monkeypatch.setitem(DEFAULTS, name, value)
    monkeypatch.setattr(run, "VARIANTS", [{}, {"n_shot": 1}])
    monkeypatch.setattr(run, "TURN", 1)
    out = tmp_path / "table.md"
    argv = ["--data-root", str(master), "--rounds", "1", "--n-workers", "0", "--cpu"]
    assert run.main([*argv, "--sections", section, "--out", str(out)]) == 0
    assert out.read_text() in capsys.readouterr().out


def test_it_computes_as_training_does():
    """Without TF32, and deterministically: not PyTorch's defaults on a GPU."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.conv.fp32_precision, cudnn.deterministic = "tf32", False  # until the next test
    run.Timed(torch.device("cpu"), plain=False)
    assert {cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision} == {"ieee"}
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)


@pytest.mark.gpu
def test_it_counts_kernels():
    lines = run.kernels(None, torch.device("cuda")).splitlines()[2:]
    *rows, total = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = {"_convolve", "_filters_backward", "_meta_forward", "_meta_backward"}
    assert names <= {name for name, *_ in rows}
    assert int(total[1]) >= sum(int(launches) for _, launches, _ in rows)
