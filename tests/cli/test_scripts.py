"""The shell scripts: which Python they use, what they install, what they pass on. No network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from engine.flags import DEFAULTS, parse, resolve

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RECIPES = [path.stem.removeprefix("eval_") for path in SCRIPTS if path.stem.startswith("eval_")]
# what the script of the port of 2019 lists, in its order; the data set's folder is that of --data
PORT = "mode n-shot n-eval n-class input-size hidden-size lr episode episode-val epoch batch-size "
PORT += "image-size grad-clip bn-momentum bn-eps data pin-mem log-freq val-freq"
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
    how = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(["bash", *map(str, command)], cwd=cwd, env=clean, **how)


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


def one_line(run, words):
    assert run.returncode == 2, run.stderr
    assert re.fullmatch(r"error: .*\n", run.stderr)
    assert words in run.stderr


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
    if status == 0:
        assert run.returncode == 0, run.stderr
    else:
        one_line(run, "pip could not install requirements.txt")


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
    one_line(use_python(repository, path=tmp_path / "bin", **env), culprit)


def wheel(folder, version):
    """A package that pip can install without a network."""
    folder.mkdir(exist_ok=True)
    info = f"tiny-{version}.dist-info"
    about = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"tiny/__init__.py": "", f"{info}/WHEEL": about}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as file:
        for name, text in files.items():
            file.writestr(name, text)


@pytest.mark.slow
def test_the_life_of_an_own_environment(repository, tmp_path):
    """Made once, used again, brought up to date, and mended after an interruption at any moment."""
    base = executable(tmp_path / "bin" / "python3", f'exec "{sys._base_executable}" "$@"\n').parent
    wheels, venv = tmp_path / "wheels", repository / ".venv"
    wanted = repository / "requirements.txt"
    wheel(wheels, "1.0")
    wanted.write_text("tiny>=1\n")
    venv.mkdir()  # interrupted when nothing else was there
    (venv / "pyvenv.cfg").touch()

    def installs():
        run = use_python(repository, path=base, PIP_FIND_LINKS=str(wheels))
        assert run.returncode == 0, run.stderr
        assert run.stdout.endswith(f"python: {venv}/bin/python\n")
        command = [venv / "bin" / "python", "-c", "import tiny"]
        assert subprocess.run(command, cwd="/", check=False).returncode == 0
        return run.stdout.startswith("installing")

    assert installs()
    assert not installs()
    site = next(venv.glob("lib/python*/site-packages"))
    for metadata in site.glob("tiny-*.dist-info"):  # pip was interrupted: it writes this last
        shutil.rmtree(metadata)
    assert installs()
    wheel(wheels, "2.0")
    assert not installs()
    wanted.write_text("tiny>=2\n")
    # interrupted while pip was installed
    for package in [site / "pip" / "_internal", *site.glob("pip-*.dist-info")]:
        shutil.rmtree(package)
    assert installs()
    assert not installs()
    (venv / "bin" / "python").unlink()  # or a link to a Python that is gone
    assert installs()


# ---- What is passed on ----


def stub(repository, name="main.py", then=""):
    """A program in the clone's place of ``name`` that logs where and how it was called."""
    log = repository / "called"
    text = "import os, sys\nprint(os.getcwd(), *sys.argv[1:], sep='\\t', file=open({!r}, 'a'))\n"
    (repository / name).write_text(text.format(str(log)) + then)
    return log


@pytest.mark.parametrize("script", ["pretrain", *(f"eval_{recipe}" for recipe in RECIPES)])
def test_scripts_pass_everything_on_from_any_directory(repository, tmp_path, active, script):
    """Flags come last, with their spaces; relative paths stay the caller's, whatever CDPATH is."""
    log, here = stub(repository), tmp_path / "here"
    here.mkdir()
    (here / "a clone").symlink_to(repository)
    flags = ["--data-root", "my images", "--seed", "53"]
    for name in {script, script.replace("eval", "train")}:
        path = Path("a clone", "scripts", f"{name}.sh")
        run = bash(path, *flags, cwd=here, CDPATH=str(here), **active)
        assert run.returncode == 0, run.stderr
        where, *argv = log.read_text().splitlines()[-1].split("\t")
        assert where == str(here)
        assert argv[-4:] == flags
        assert resolve(parse(argv)).seed == 53
    (repository / "main.py").write_text("raise SystemExit(7)")
    assert bash(path, cwd=here, **active).returncode == 7


def flags_of(script):
    """A script's flags for main.py, each on a line of its own, each once."""
    _, _, command = (ROOT / "scripts" / f"{script}.sh").read_text().partition("run_main ")
    lines = re.findall(r"^(?:  )?(--\S+) (.*) \\$", command, re.MULTILINE)
    assert [name for name, _ in lines] == re.findall(r"(?<= )--[a-z-]+|^--[a-z-]+", command)
    assert len(dict(lines)) == len(lines)
    return dict(lines)


@pytest.mark.parametrize("recipe", ["omniglot", *RECIPES])
def test_training_shows_what_a_user_edits(recipe):
    """The port's list, in its order, then what differs from the defaults, then the run's folder."""
    flags = flags_of(f"train_{recipe}")
    listed = [f"--{name}" for name in PORT.split()] + ["--seed"]
    assert list(flags)[: len(listed)] == listed
    assert list(flags)[-2:] == ["--save", "--resume"]
    more = [word for pair in list(flags.items())[len(listed) : -2] for word in pair]
    values = parse(" ".join(more).split())
    assert not {name: value for name, value in values.items() if value == DEFAULTS[name]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_testing_leaves_seed_and_hyper_parameters_to_the_checkpoint(recipe):
    train, test = flags_of(f"train_{recipe}"), flags_of(f"eval_{recipe}")
    tta = {"--tta-flip": "true"} if "pretrained" in recipe else {}
    expected = {"--mode": "test", "--save": train["--save"], "--episode-test": "100 250 600"}
    assert test == expected | tta


def test_recipes_fit_together():
    """No two share a run's folder; those that start from pre-training find it, and fit."""
    scripts = ["pretrain", *(path.stem for path in SCRIPTS if path.stem.startswith("train_"))]
    assert len({flags_of(script)["--save"] for script in scripts}) == len(scripts)
    before, shape = flags_of("pretrain"), ("--image-size", "--pixels", "--data", "--seed")
    for shots in (1, 5):
        after = flags_of(f"train_{shots}s_5c_pretrained")
        assert after["--init-from"] == before["--save"]
        assert {name: before[name] for name in shape} == {name: after[name] for name in shape}


TABLES = "<!-- results -->\nold\n<!-- /results -->\n"


def test_results_are_written_between_two_markers(repository, tmp_path, active):
    log = stub(repository, then="print('| a \\\\1 |\\n| b |')\n")
    (repository / "results" / "a-719").mkdir(parents=True)
    (repository / "results" / "a-719" / "results.json").touch()
    (repository / "results" / "trials").mkdir()  # not tested
    page = tmp_path / "page.md"
    page.write_text(f"before\n{TABLES}after\n")

    def write(name):
        script = repository / "scripts" / "results.sh"
        return bash(script, "--write", name, cwd=tmp_path, **active)

    for _ in range(2):
        run = write("page.md")
        assert (run.returncode, run.stdout) == (0, ""), run.stderr
        written = TABLES.replace("old", "| a \\1 |\n| b |")
        assert page.read_text() == f"before\n{written}after\n"
    argv = log.read_text().splitlines()[0].split("\t")[1:]
    assert argv == ["--mode", "results", "--runs", f"{repository}/results/a-719"]
    page.write_text("no markers")
    one_line(write("page.md"), "page.md")
    assert page.read_text() == "no markers"
    one_line(write("gone.md"), "gone.md")


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
    stub(repository, "data/glyphs.py", "sys.exit(2)")  # it stops where something fails
    assert bash(script, **active).returncode == 2
    assert len(log.read_text().splitlines()) == 7


def tools(**status):
    """What the linters and pytest of an environment end with; 0 unless it is said."""
    cases = "".join(f"{name}) exit {code} ;; " for name, code in status.items())
    return f'case "$2" in {cases}ruff|mypy|pytest) exit 0 ;; esac'


def test_the_test_script(repository, tmp_path):
    log, here = environment(tmp_path / "active", tools(pytest=3)), tmp_path / "here"
    here.mkdir()
    (here / "test_x.py").touch()

    def last_calls(n, *arguments):
        script, active = repository / "scripts" / "test.sh", str(tmp_path / "active")
        run = bash(script, *arguments, cwd=here, VIRTUAL_ENV=active)
        assert run.returncode == 3, run.stderr
        return log.read_text().splitlines()[-n:]

    lint = ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    everyday = "-m pytest -m not slow and not gpu -n 2 --dist loadfile"
    assert last_calls(4) == [*lint, everyday]
    assert last_calls(4, "--all") == [*lint, everyday.replace("not slow and ", "")]
    given = ["-k", "golden", "test_x.py", "test_x.py::test_y", "tests/test_z.py", "/abs/test_z.py"]
    expected = f"-k golden {here}/test_x.py {here}/test_x.py::test_y tests/test_z.py /abs/test_z.py"
    assert last_calls(1, *given) == [f"-m pytest {expected}"]
    assert last_calls(1, "--all", *given) == [f"-m pytest {expected}"]


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_lint_that_fails_stops_the_test_script(repository, tmp_path, tool):
    """Continuous integration runs the same script."""
    log = environment(tmp_path / "active", tools(**{tool: 1}))
    active = str(tmp_path / "active")
    assert bash(repository / ".ci" / "run", VIRTUAL_ENV=active).returncode == 1
    assert "pytest" not in log.read_text()


# ---- What they look like ----


def test_scripts_fail_at_the_first_error():
    assert len(SCRIPTS) >= 8
    for path in [*SCRIPTS, ROOT / ".ci" / "run"]:
        assert bash("-n", path).returncode == 0
        if path.name != "env.sh":
            strict = r'^(set -euo pipefail|source .*/env\.sh")$'  # env.sh sets it, too
            assert re.search(strict, path.read_text(), re.MULTILINE), path
            assert os.access(path, os.X_OK), path


def test_requirements_are_lines_that_the_scripts_can_read():
    """And constraints.txt has exact versions of the same packages, none older."""
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            known = re.fullmatch(r"(-r \S+|[A-Za-z0-9_.-]+>=[0-9.]+)\s*(#.*)?", line)
            assert known, f"{path.name}: {line}"
    line = r"^([\w-]+)(?:==|>=)([\d.]+)"
    exact, least = (
        dict(re.findall(line, (ROOT / name).read_text(), re.MULTILINE))
        for name in ("constraints.txt", "requirements.txt")
    )
    assert len(exact) == 5
    for name, version in exact.items():
        assert [int(n) for n in version.split(".")] >= [int(n) for n in least[name].split(".")]
