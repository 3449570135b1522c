"""benchmarks/run.py: each section runs on the CPU and reports its times."""

import helpers  # noqa: F401  (makes benchmarks/ importable)
import pytest
import run


@pytest.mark.parametrize("section", ["end-to-end", "parts", "scaling", "start"])
def test_a_section(section, master, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.resolve.__globals__["DEFAULTS"], "n_eval", 3)
    monkeypatch.setattr(run, "VARIANTS", [{}, {"n_shot": 1}])
    monkeypatch.setattr(run, "TURN", 1)
    out = tmp_path / "table.md"
    argv = ["--data-root", str(master), "--rounds", "1", "--n-workers", "0", "--cpu"]
    assert run.main([*argv, "--sections", section, "--out", str(out)]) == 0
    assert out.read_text() in capsys.readouterr().out
