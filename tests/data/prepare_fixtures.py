"""Fixtures of the tests of prepare.py."""

import prepare_formats as formats
import pytest


@pytest.fixture
def run(capsys, tmp_path):
    """Run the command, by default with --dest tmp_path/out: (exit code, stdout, stderr)."""

    def run(*argv):
        dest = () if {"--dest", "--check"} & set(argv) else ("--dest", tmp_path / "out")
        code = formats.prepare(*argv, *dest)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run the command, which must refuse in one line and change nothing: returns the line."""

    def refused(*argv, dest=None):
        before = formats.tree(tmp_path)
        code, _, err = run(*argv, *(("--dest", dest) if dest else ()))
        assert (code, err[:7], err.count("\n")) == (2, "error: ", 1)
        assert formats.tree(tmp_path) == before
        assert not list(tmp_path.rglob("*.part"))
        return err

    return refused
