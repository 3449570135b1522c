"""The shell scripts: which Python they find, what they install, and what they pass on. Nothing here touches the network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from options import HYPER_PARAMETERS, parse, settle

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RECIPES = ("train_5s_5c", "eval_5s_5c", "train_1s_5c", "eval_1s_5c")
USE = 'set -euo pipefail; source "$0"; use_python requirements.txt; echo "python: $PYTHON"'


@pytest.fixture
def repository(tmp_path):
    """A clone with the real scripts and nothing else, in a folder whose name needs quotes."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    (root / "data").mkdir()
    for name in ("requirements.txt", "requirements-dev.txt"):
        (root / name).write_text("numpy>=1.0\npillow>=2  # a module of another name\n")
    return root


def bash(*command, cwd="/", path=None, **env):
    """Run a command without an active environment unless ``env`` names one."""
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    clean.update(env, PIP_NO_INDEX="1", PATH=os.pathsep.join([str(path)] * (path is not None) + [os.environ["PATH"]]))
    command = ["bash", *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120, check=False)


def use_python(repository, **kwargs):
    return bash("-c", USE, repository / "scripts" / "env.sh", **kwargs)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def environment(prefix, before=""):
    """An environment whose Python is the running one, writes down its calls, and does first what ``before`` says."""
    log = prefix / "calls"
    executable(prefix / "bin" / "python", f'echo "$*" | head -1 >>"{log}"\n{before}\nexec "{sys.executable}" "$@"\n')
    log.touch()
    return log


def calls(log, *words):
    return [line for line in log.read_text().splitlines() if all(word in line for word in words)]


def one_line(run, *words):
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    for word in words:
        assert word in run.stderr


# ---- Which Python ----


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_and_left_as_it_is(repository, tmp_path, variable):
    log = environment(tmp_path / "active")
    before = sorted(tmp_path.rglob("*"))
    run = use_python(repository, **{variable: str(tmp_path / "active")})
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"python: {tmp_path}/active/bin/python\n"
    assert not calls(log, "pip")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["nosuchpackage>=1", "numpy>=999"])
def test_what_an_active_environment_lacks_is_installed_there(repository, tmp_path, line):
    (repository / "requirements.txt").write_text(f"pillow>=2\n{line}\n")
    log = environment(tmp_path / "active", 'case "$*" in "-m pip install"*) exit 0 ;; esac')
    run = use_python(repository, VIRTUAL_ENV=str(tmp_path / "active"))
    name = line.partition(">=")[0]
    assert f"which lacks {name} (" in run.stdout
    first, second = calls(log, "-m pip install")
    assert first.endswith(f"-r {repository}/requirements.txt")
    assert second.endswith(f"--force-reinstall --no-deps {name}")
    one_line(run, f"still lacks {name}")
    assert not (repository / ".venv").exists()


def test_when_pip_fails(repository, tmp_path):
    (repository / "requirements.txt").write_text("nosuchpackage>=1\n")
    environment(tmp_path / "active", 'case "$*" in "-m pip install"*) exit 1 ;; esac')
    one_line(use_python(repository, VIRTUAL_ENV=str(tmp_path / "active")), "pip could not install", "requirements.txt")
    environment(tmp_path / "bare", 'case "$*" in "-m pip"*) exit 1 ;; esac')
    one_line(use_python(repository, VIRTUAL_ENV=str(tmp_path / "bare")), "has no pip and lacks nosuchpackage")


def test_environments_that_cannot_serve(repository, tmp_path):
    one_line(use_python(repository, VIRTUAL_ENV=str(tmp_path / "gone")), f"{tmp_path}/gone", "no bin/python")
    environment(tmp_path / "old", 'case "$*" in *version_info*) exit 1 ;; esac')
    one_line(use_python(repository, CONDA_PREFIX=str(tmp_path / "old")), "old/bin/python is older than Python 3.10")


def test_no_python_to_make_an_environment_with(repository, tmp_path):
    old = executable(tmp_path / "old" / "python3", "exit 1").parent
    one_line(use_python(repository, path=old), "python3 is missing or older than 3.10")
    script = 'case "$*" in "-m venv"*) echo "The virtual environment was not created"; exit 1 ;; esac\n'
    script += f'exec "{sys.executable}" "$@"'
    without_venv = executable(tmp_path / "without" / "python3", script).parent
    run = use_python(repository, path=without_venv)
    one_line(run, f"python3 -m venv {repository}/.venv does not work", "python3-venv")
    assert run.stdout.splitlines() == [f"making a virtual environment in {repository}/.venv"]


def test_other_modules_in_the_working_directory_do_no_harm(repository, tmp_path):
    environment(tmp_path / "active")
    for name in ("zipfile", "csv", "email", "numpy", "pip"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    run = use_python(repository, cwd=tmp_path, VIRTUAL_ENV=str(tmp_path / "active"))
    assert run.returncode == 0, run.stdout + run.stderr


def wheel(folder, version):
    """A package that pip can install without a network."""
    folder.mkdir(exist_ok=True)
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as file:
        file.writestr("tiny/__init__.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"tiny/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_the_life_of_an_own_environment(repository, tmp_path):
    """Made once, used again, brought up to date, and mended after a death at whichever moment."""
    base = executable(tmp_path / "bin" / "python3", f'exec "{sys._base_executable}" "$@"\n').parent
    wheels, venv, wanted = tmp_path / "wheels", repository / ".venv", repository / "requirements.txt"
    wheel(wheels, "1.0")
    wanted.write_text("tiny>=1\n")
    venv.mkdir()  # killed before there was more
    (venv / "pyvenv.cfg").touch()

    def use():
        run = use_python(repository, path=base, PIP_FIND_LINKS=str(wheels))
        assert run.returncode == 0, run.stderr
        *said, last = run.stdout.splitlines()
        assert last == f"python: {venv}/bin/python"
        assert subprocess.run([venv / "bin" / "python", "-c", "import tiny"], cwd="/", check=False).returncode == 0
        return [line.split()[0] for line in said]

    assert use() == ["making", "installing"]
    assert use() == []
    site = next(venv.glob("lib/python*/site-packages"))
    shutil.rmtree(site / "tiny")  # its metadata is still there
    assert use() == ["installing"]
    for metadata in site.glob("tiny-*.dist-info"):  # pip was killed before it wrote this
        shutil.rmtree(metadata)
    assert use() == ["installing"]
    wheel(wheels, "2.0")
    assert use() == []
    wanted.write_text("tiny>=2\n")
    assert use() == ["installing"]
    for package in [site / "pip", *site.glob("pip-*.dist-info")]:  # killed while pip came into the environment
        shutil.rmtree(package)
    assert use() == []
    assert (site / "pip").is_dir()
    shutil.rmtree(site / "pip")  # only half of it was there
    assert use() == ["making", "installing"]


# ---- What is passed on ----


def stub(repository, name="main.py", then=""):
    """A program in the clone's place of ``name`` that writes down where and how it was called."""
    log = repository / "called"
    text = f"import os, sys\nprint(os.getcwd(), *sys.argv[1:], sep='\\t', file=open({str(log)!r}, 'a'))\n"
    (repository / name).write_text(text + then)
    return log


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_pass_everything_on_from_any_directory(repository, tmp_path, recipe):
    """Flags come last, with their spaces; relative paths stay the caller's, who also gets the run folder. CDPATH, which makes
    cd talk, changes nothing."""
    log = stub(repository)
    environment(tmp_path / "active")
    script = Path("a clone", "scripts", f"{recipe}.sh")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a clone").symlink_to(repository)
    flags = ["--data-root", "my images", "--seed", "53"]
    env = {"VIRTUAL_ENV": str(tmp_path / "active"), "CDPATH": str(tmp_path / "here")}
    run = bash(script, *flags, cwd=tmp_path / "here", **env)
    assert run.returncode == 0, run.stderr
    where, *argv = log.read_text().rstrip("\n").split("\t")
    assert where == str(tmp_path / "here")
    assert argv[-4:] == flags
    assert vars(settle(*parse(argv)))["seed"] == 53
    (repository / "main.py").write_text("raise SystemExit(7)")
    assert bash(script, cwd=tmp_path / "here", **env).returncode == 7


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_show_every_hyper_parameter_on_a_line_of_its_own(recipe):
    _, _, command = (ROOT / "scripts" / f"{recipe}.sh").read_text().partition("main.py")
    lines = re.findall(r"^  (--[a-z-]+)", command, re.MULTILINE)
    assert {f"--{name.replace('_', '-')}" for name in HYPER_PARAMETERS} <= set(lines)
    assert ["--mode", *lines] == re.findall(r" (--[a-z-]+)", command)
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("shots", ["5s_5c", "1s_5c"])
def test_what_is_trained_is_what_is_tested(repository, tmp_path, shots):
    log = stub(repository)
    environment(tmp_path / "active")
    for what in ("train", "eval"):
        assert bash(repository / "scripts" / f"{what}_{shots}.sh", VIRTUAL_ENV=str(tmp_path / "active")).returncode == 0
    train, test = (vars(settle(*parse(line.split("\t")[1:]))) for line in log.read_text().splitlines())
    shared = (*HYPER_PARAMETERS, "save", "seed", "data_root")
    assert {k: train[k] for k in shared} == {k: test[k] for k in shared}


def test_the_two_recipes_do_not_share_a_run_folder():
    saves = {re.search(r"--save (\S+)", (ROOT / "scripts" / f"{recipe}.sh").read_text())[1] for recipe in RECIPES}
    assert len(saves) == 2


def test_quickstart_twice(repository, tmp_path):
    """Data, training, test; all of it inside the clone. The second time it says that it goes on with what is there."""
    log = stub(repository, then="os.makedirs(sys.argv[sys.argv.index('--save') + 1] + '-719/ckpts', exist_ok=True)\n")
    stub(repository, "data/glyphs.py")
    environment(tmp_path / "active")
    (tmp_path / "here").mkdir()
    said = []
    for _ in range(2):
        run = bash(repository / "scripts" / "quickstart.sh", cwd=tmp_path / "here", VIRTUAL_ENV=str(tmp_path / "active"))
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert said[0] == ""
    assert said[1].startswith(f"{repository}/logs-quickstart-719 is there")
    argv = [line.split("\t")[1:] for line in log.read_text().splitlines()]
    assert argv[:3] == argv[3:]
    assert argv[0] == ["--dest", f"{repository}/data/glyphs"]
    train, test = (settle(*parse(a)) for a in argv[1:3])
    assert (train.mode, test.mode) == ("train", "test")
    assert train.resume == "auto"
    assert train.data_root == test.data_root == repository / "data" / "glyphs"
    assert train.save == test.save
    assert not list((tmp_path / "here").iterdir())


def test_quickstart_stops_where_something_fails(repository, tmp_path):
    log = stub(repository)
    stub(repository, "data/glyphs.py", "sys.exit(2)")
    environment(tmp_path / "active")
    assert bash(repository / "scripts" / "quickstart.sh", VIRTUAL_ENV=str(tmp_path / "active")).returncode == 2
    assert len(log.read_text().splitlines()) == 1


LINT_AND_TESTS = 'case "$2" in ruff) exit {} ;; pytest) exit {} ;; esac'


def test_the_test_script(repository, tmp_path):
    log = environment(tmp_path / "active", LINT_AND_TESTS.format(0, 3))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "test_x.py").touch()
    arguments = ["-k", "golden", "test_x.py", "test_x.py::test_y", "tests/test_cli.py", "/abs/test_z.py"]
    run = bash(repository / "scripts" / "test.sh", *arguments, cwd=tmp_path / "here", VIRTUAL_ENV=str(tmp_path / "active"))
    assert run.returncode == 3
    here = tmp_path / "here"
    expected = f"-m pytest -k golden {here}/test_x.py {here}/test_x.py::test_y tests/test_cli.py /abs/test_z.py"
    assert log.read_text().splitlines()[-2:] == ["-m ruff check .", expected]


def test_lint_that_fails_stops_the_test_script(repository, tmp_path):
    log = environment(tmp_path / "active", LINT_AND_TESTS.format(1, 0))
    assert bash(repository / "scripts" / "test.sh", VIRTUAL_ENV=str(tmp_path / "active")).returncode == 1
    assert not calls(log, "pytest")


def test_continuous_integration_runs_the_test_script(repository, tmp_path):
    log = environment(tmp_path / "active", LINT_AND_TESTS.format(0, 0))
    assert bash(repository / ".ci" / "run", VIRTUAL_ENV=str(tmp_path / "active")).returncode == 0
    assert log.read_text().splitlines()[-2:] == ["-m ruff check .", "-m pytest"]


# ---- What they look like ----


def test_scripts_fail_at_the_first_error():
    assert len(SCRIPTS) >= 8
    for path in [*SCRIPTS, ROOT / ".ci" / "run"]:
        text = path.read_text()
        assert bash("-n", path).returncode == 0
        assert path.name == "env.sh" or re.search(r"^set -euo pipefail$", text, re.MULTILINE), path
        assert path.name == "env.sh" or os.access(path, os.X_OK), path


def test_requirements_are_lines_that_the_scripts_can_read():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"(-r \S+|[A-Za-z0-9_.-]+>=[0-9.]+)\s*(#.*)?", line), f"{path.name}: {line}"
