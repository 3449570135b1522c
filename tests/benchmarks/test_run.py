"""benchmarks/run.py: its sections run on the CPU and report times."""

import pytest
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
