"""What the tests of benchmarks/ share, the scripts included."""

import importlib
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
SCRIPTS = ("compare_runs", "counts", "curves", "dead_filters", "gates", "run", "validate")
compare_runs, counts, curves, dead_filters, gates, run, validate = map(
    importlib.import_module, SCRIPTS
)


def table(script, capsys, *argv):
    """The rows of the table that a script prints, each as a dict by heading."""
    capsys.readouterr()
    assert script.main([str(word) for word in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("|") for line in lines)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]
