"""The shell scripts: which Python they use, what they install, what they pass on. No network."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, completed, refused

from engine.flags import DEFAULTS, parse, resolve

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RECIPES = [path.stem.removeprefix("eval_") for path in SCRIPTS if path.stem.startswith("eval_")]
# what the script of the port of 2019 lists, in its order; the data set's folder is that of --data
PORT = "n-shot n-eval n-class input-size hidden-size lr episode episode-val epoch batch-size "
PORT += "image-size grad-clip bn-momentum bn-eps data pin-mem log-freq val-freq"
HEAD = 'source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh" || exit 2\n'
USE = 'set -euo pipefail; source "$0"; use_python requirements.txt; echo "python: $PYTHON"'


@pytest.fixture
def repository(tmp_path):
    """A clone with the real scripts and nothing else, in a folder whose name needs quotes."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    (root / "data").mkdir()
    (root / "requirements.txt").write_text("numpy>=1.0\npillow>=2  # a comment\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\npytest>=1\n")
    return root


def bash(*command, cwd="/", path=None, **env):
    """Run a command without an active environment unless ``env`` names one."""
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if k not in active}
    clean |= {**env, "PIP_NO_INDEX": "1"}
    if path is not None:
        clean["PATH"] = os.pathsep.join([str(path), clean["PATH"]])
    return completed(["bash", *command], cwd=cwd, env=clean)


def use_python(repository, **kwargs):
    return bash("-c", USE, repository / "scripts" / "env.sh", **kwargs)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def environment(prefix, before=""):
    """An environment whose Python is the running one, logs its calls, and does ``before`` first."""
    log = prefix / "calls"
    lines = [f'echo "$*" | head -1 >>"{log}"', before, f'exec "{sys.executable}" "$@"\n']
    executable(prefix / "bin" / "python", "\n".join(lines))
    log.touch()
    return log


@pytest.fixture
def active(tmp_path):
    """The variable of an active environment that has all packages."""
    environment(tmp_path / "active")
    return {"VIRTUAL_ENV": str(tmp_path / "active")}


# ---- Which Python ----


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_complete_active_environment_is_used_without_pip(repository, tmp_path, variable):
    """Modules in the working directory that shadow real ones do no harm."""
    log = environment(tmp_path / "active")
    here = tmp_path / "here"
    (here / "pip").mkdir(parents=True)
    for name in ("zipfile", "csv", "email", "numpy", "pip/__init__"):
        (here / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    before = sorted(tmp_path.rglob("*"))
    run = use_python(repository, cwd=here, **{variable: str(tmp_path / "active")})
    expected = f"python: {tmp_path}/active/bin/python\n"
    assert (run.returncode, run.stdout) == (0, expected), run.stderr
    assert "-m pip" not in log.read_text()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "status"), [("nosuchpackage>=1", 0), ("numpy>=999", 1), ("-r more.txt", 0)]
)
def test_an_active_environment_that_lacks_something(repository, tmp_path, line, status):
    (repository / "requirements.txt").write_text(f"pillow>=2\n{line}\n")
    (repository / "more.txt").write_text("nosuchpackage>=1\n")
    log = environment(tmp_path / "active", f'case "$*" in "-m pip install"*) exit {status} ;; esac')
    run = use_python(repository, VIRTUAL_ENV=str(tmp_path / "active"))
    assert run.stdout.startswith(f"installing requirements.txt into {tmp_path}/active (")
    calls = [line for line in log.read_text().splitlines() if line.startswith("-m pip")]
    assert calls == ["-m pip -V", "-m pip install -r requirements.txt"]
    assert not (repository / ".venv").exists()
    assert run.returncode == 2 * status, run.stderr
    if status:
        refused(run, "pip could not install requirements.txt")


@pytest.mark.parametrize(
    ("python", "fails", "culprit"),
    [
        (None, "", "env/bin/python"),
        ("env/bin/python", "*version_info*", "env/bin/python"),
        ("env/bin/python", "*importlib.metadata* | *pip*", "uv pip install"),  # as uv makes them
        ("bin/python3", "*", "3.10"),
        ("bin/python3", '"-m venv"*', "python3-venv"),
    ],
)
def test_pythons_that_cannot_serve(repository, tmp_path, python, fails, culprit):
    if python:
        cases = f'case "$*" in {fails}) exit 1 ;; esac\n'
        executable(tmp_path / python, f'{cases}exec "{sys.executable}" "$@"')
    env = {} if python == "bin/python3" else {"VIRTUAL_ENV": str(tmp_path / "env")}
    refused(use_python(repository, path=tmp_path / "bin", **env), culprit)


def test_the_life_of_an_own_environment(repository, tmp_path):
    """Made once, used again, and mended after an interruption at any moment."""
    venv, broken = repository / ".venv", tmp_path / "broken"
    cases = f"""if [ -e "{broken}" ]; then
  case "$*" in "-m ensurepip") rm "{broken}"; exit ;; "-m pip"*) exit 1 ;; esac
fi
case "$*" in "-m pip install"*) exit ;; esac"""
    log = environment(tmp_path / "made", cases)
    make = f'case "$*" in "-m venv --clear"*) mkdir -p "$4/bin" && cp "{log.parent}/bin/python" '
    make += f'"$4/bin" ;; *) exec "{sys.executable}" "$@" ;; esac'
    executable(tmp_path / "bin" / "python3", make)

    def calls(requirement):
        log.write_text("")
        (repository / "requirements.txt").write_text(f"{requirement}\n")
        run = use_python(repository, path=tmp_path / "bin")
        assert run.returncode == 0, run.stderr
        assert run.stdout.endswith(f"python: {venv}/bin/python\n")
        return [line for line in log.read_text().splitlines() if line.startswith("-m")]

    install = ["-m pip -V", "-m pip install -r requirements.txt"]
    venv.mkdir()  # interrupted when nothing else was there
    (venv / "pyvenv.cfg").touch()
    assert calls("nosuchpackage>=1") == install
    assert calls("numpy>=1") == []
    broken.touch()  # interrupted while pip was installed
    assert calls("numpy>=999") == ["-m pip -V", "-m ensurepip", *install]
    (venv / "bin" / "python").unlink()  # or a link to a Python that is gone
    assert calls("numpy>=1") == install


# ---- What is passed on ----


def stub(repository, name="main.py", then=""):
    """A program in the clone's place of ``name`` that logs where and how it was called."""
    log = repository / "called"
    text = "import os, sys\nprint(os.getcwd(), *sys.argv[1:], sep='\\t', file=open({!r}, 'a'))\n"
    (repository / name).write_text(text.format(str(log)) + then)
    return log


def test_scripts_pass_everything_on_from_any_directory(repository, tmp_path, active):
    """Flags come last, with their spaces; relative paths stay the caller's, whatever CDPATH is.
    ``flags_of`` sees that all scripts are alike.
    """
    log, here = stub(repository), tmp_path / "here"
    here.mkdir()
    (here / "a clone").symlink_to(repository)
    path, flags = Path("a clone/scripts/train_5s_5c.sh"), ["--data-root", "my images"]
    run = bash(path, *flags, cwd=here, CDPATH=str(here), **active)
    assert run.returncode == 0, run.stderr
    where, *argv = log.read_text().splitlines()[-1].split("\t")
    assert where == str(here)
    own = [word for pair in flags_of("train_5s_5c").items() for word in pair]
    assert argv == own + flags
    (repository / "main.py").write_text("raise SystemExit(7)")
    assert bash(path, cwd=here, **active).returncode == 7


def flags_of(script):
    """A script's flags for main.py, each on a line of its own, each once, before the user's."""
    text = (ROOT / "scripts" / f"{script}.sh").read_text()
    head, command = text.split("\nrun_main ")
    assert HEAD in head
    lines = re.findall(r"^(?:  )?(--[a-z-]+) ((?!.* --).*) \\\n", command, re.MULTILINE)
    own = [f"{name} {value} \\\n" for name, value in lines]
    assert command == "  ".join([*own, '"$@"\n'])
    assert len(dict(lines)) == len(lines)
    return dict(lines)


@pytest.mark.parametrize("recipe", ["omniglot", *RECIPES])
def test_training_shows_what_a_user_edits(recipe):
    """The port's list, in its order, then what differs from the defaults, then the run's folder."""
    flags = flags_of(f"train_{recipe}")
    listed = ["--mode", *(f"--{name}" for name in PORT.split()), "--seed"]
    assert list(flags)[: len(listed)] == listed
    assert list(flags)[-2:] == ["--save", "--resume"]
    more = [word for pair in list(flags.items())[len(listed) : -2] for word in pair]
    values = parse(" ".join(more).split())
    assert not {name: value for name, value in values.items() if value == DEFAULTS[name]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_testing_leaves_seed_and_hyper_parameters_to_the_checkpoint(recipe):
    tta = {"--tta-flip": "true"} if "pretrained" in recipe else {}
    expected = {"--mode": "test", "--save": flags_of(f"train_{recipe}")["--save"]}
    expected["--episode-test"] = "100 250 600"
    assert flags_of(f"eval_{recipe}") == expected | tta


def test_recipes_fit_together():
    """No two share a run's folder; those that start from pre-training find it, and fit."""
    scripts = [path.stem for path in SCRIPTS if re.match("train_|baseline_|pretrain", path.stem)]
    assert len({flags_of(script)["--save"] for script in scripts}) == len(scripts)
    before, shape = flags_of("pretrain"), ("--image-size", "--pixels", "--data", "--seed")
    for shots in (1, 5):
        after = flags_of(f"train_{shots}s_5c_pretrained")
        assert after["--init-from"] == before["--save"]
        assert {name: before[name] for name in shape} == {name: after[name] for name in shape}


def test_results_are_written_between_two_markers(repository, tmp_path, active):
    log = stub(repository, then="print('| a \\\\1 |\\n| b |')\n")
    shutil.copytree(ROOT / "engine", repository / "engine")
    shutil.copy(ROOT / "utils.py", repository)
    run = repository / "results" / "a-719"
    (run.parent / "trials").mkdir(parents=True)  # not tested
    run.mkdir()
    (run / "results.json").touch()
    page, tables = tmp_path / "page.md", "before\n<!-- results -->\n{}\n<!-- /results -->\nafter\n"
    page.write_text(tables.format("old"))

    def write(name):
        script = repository / "scripts" / "results.sh"
        return bash(script, "--write", name, cwd=tmp_path, **active)

    for _ in range(2):
        done = write("page.md")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert page.read_text() == tables.format("| a \\1 |\n| b |")
    argv = log.read_text().splitlines()[0].split("\t")[1:]
    assert argv == ["--mode", "results", "--runs", str(run)]
    for content in (b"no markers", tables.format("\xe9").encode("latin-1")):
        page.write_bytes(content)
        for name in ("page.md", "gone.md"):
            refused(write(name), name)
        assert page.read_bytes() == content


def test_quickstart_twice(repository, tmp_path, active):
    """Data, training, test; all of it inside the clone. The second call says that it continues."""
    then = "os.makedirs(sys.argv[sys.argv.index('--save') + 1] + '-719/ckpts', exist_ok=True)\n"
    log, script = stub(repository, then=then), repository / "scripts" / "quickstart.sh"
    stub(repository, "data/glyphs.py")
    (tmp_path / "here").mkdir()
    first, second = (bash(script, cwd=tmp_path / "here", **active) for _ in range(2))
    assert (first.returncode, first.stdout) == (0, ""), first.stderr
    assert second.stdout.startswith(f"{repository}/logs-quickstart-719 exists: ")
    argv = [line.split("\t")[1:] for line in log.read_text().splitlines()]
    assert argv[:3] == argv[3:]
    assert argv[0] == ["--dest", f"{repository}/data/glyphs"]
    train, test = (resolve(parse(a)) for a in argv[1:3])
    assert (train.mode, test.mode, train.resume) == ("train", "test", "auto")
    assert train.data_root == test.data_root == repository / "data" / "glyphs"
    assert train.save == test.save
    assert not list((tmp_path / "here").iterdir())
    refused(bash(script, "--help", **active), "--help")  # which must not start the work
    stub(repository, "data/glyphs.py", "sys.exit(2)")  # it stops where something fails
    assert bash(script, **active).returncode == 2
    assert len(log.read_text().splitlines()) == 7


def test_the_test_script(repository, tmp_path):
    """Continuous integration runs all of it."""
    cases = 'case "$2" in pytest) exit 3 ;; ruff|mypy) exit 0 ;; esac'
    log, here = environment(tmp_path / "active", cases), tmp_path / "here"
    here.mkdir()
    (here / "test_x.py").touch()

    def last_calls(n, *words, script="scripts/test.sh"):
        run = bash(repository / script, *words, cwd=here, VIRTUAL_ENV=str(tmp_path / "active"))
        assert run.returncode == 3, run.stderr
        return log.read_text().splitlines()[-n:]

    lint = ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    everyday = "-m pytest -m not slow and not gpu -n 2 --dist loadfile"
    assert last_calls(4) == [*lint, everyday]
    everything = [*lint, everyday.replace("not slow and ", "")]
    assert last_calls(4, "--all") == last_calls(4, script=".ci/run") == everything
    given = ["-k", "golden", "test_x.py", "test_x.py::test_y", "tests/test_z.py", "/abs/test_z.py"]
    expected = f"-k golden {here}/test_x.py {here}/test_x.py::test_y tests/test_z.py /abs/test_z.py"
    for flags in ([], ["--all"]):
        assert last_calls(1, *flags, *given) == [f"-m pytest {expected}"]


# ---- What they look like ----


def test_scripts_fail_at_the_first_error():
    assert len(SCRIPTS) >= 8
    for path in [*SCRIPTS, ROOT / ".ci" / "run"]:
        assert bash("-n", path).returncode == 0
        if path.name != "env.sh":
            strict = r'^(set -euo pipefail|source .*/env\.sh" \|\| exit 2)$'  # env.sh sets it, too
            assert re.search(strict, path.read_text(), re.MULTILINE), path
            assert os.access(path, os.X_OK), path


def test_requirements_are_lines_that_the_scripts_can_read():
    """And constraints.txt has exact versions of the same packages, none older."""
    versions = {}
    for path in (*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt"):
        versions[path.stem] = {}
        for line in filter(None, path.read_text().splitlines()):
            known = re.fullmatch(r"(?:-r \S+|([A-Za-z0-9_.-]+)[>=]=([0-9.]+))?\s*(#.*)?", line)
            assert known, f"{path.name}: {line}"
            if known[1]:
                versions[path.stem][known[1]] = [int(n) for n in known[2].split(".")]
    exact, least = versions["constraints"], versions["requirements"]
    assert len(exact) == 5
    assert all(exact[name] >= least[name] for name in exact)
