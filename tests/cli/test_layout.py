"""The house's rule: the root is the paper in plain PyTorch, fast/ is the same, faster, and around/
is everything else. Imports run one way, main -> around -> fast -> the root's four -> utils, and
without fast/ everything still works.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import main
from engine.backend import choose
from engine.flags import parse, settle
from utils import UserError

FOUR = {"learner", "metalearner", "episode", "dataloader"}
PACKAGES = ("fast", "around")


def modules():
    """Our modules by dotted name."""
    files = [
        *ROOT.glob("*.py"),
        *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")),
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imported(path, known):
    """Names of the modules that a file imports, inside functions, too: each that is in ``known`` in
    full, of others the first part.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or {node.module}
    return {name if name in known else name.split(".")[0] for name in found}


def graph():
    """Each of our modules with those of ours that it imports."""
    known = modules()
    return {name: imported(path, known.keys()) & known.keys() for name, path in known.items()}


def floor(name):
    """From the cellar to the roof."""
    package = name.split(".")[0]
    return (
        0
        if package == "utils"
        else 1
        if package in FOUR
        else {"fast": 2, "around": 3, "main": 4}[package]
    )


def test_the_root_holds_six_modules():
    assert {path.stem for path in ROOT.glob("*.py")} == {"main", "utils", *FOUR}


def test_imports_run_one_way():
    arrows = {(name, other) for name, others in graph().items() for other in others}
    assert {(name, other) for name, other in arrows if floor(other) > floor(name)} == set()
    assert not {other for name, other in arrows if name == "utils"}
    assert not {(name, other) for name, other in arrows if other == "main"}
    some = {
        ("main", "engine.run"),
        ("engine.backend", "fast.learner"),
        ("fast.learner", "learner"),
        ("dataloader", "episode"),
    }
    assert some <= arrows  # they are seen


def test_one_module_alone_chooses_the_fast_way():
    above = {name: others for name, others in graph().items() if floor(name) > 2}
    assert {
        name for name, others in above.items() if any(floor(other) == 2 for other in others)
    } == {"engine.backend"}


def test_no_module_imports_itself_through_others():
    reached = {name: set(others) for name, others in graph().items()}
    for _ in reached:
        reached = {
            name: others.union(*(reached[other] for other in others))
            for name, others in reached.items()
        }
    assert {name for name, others in reached.items() if name in others} == set()


def test_utils_needs_the_standard_library_only():
    assert imported(ROOT / "utils.py", modules().keys()) <= sys.stdlib_module_names


def test_the_checks_above_see_an_import_in_a_function(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    from fast import native, no_module\n    import engine.run, os.path\n"
    )
    assert imported(path, modules().keys()) == {"fast.native", "engine.run", "os"}


# ---- Without fast/ ----

SMALL = [
    "--cpu",
    "--image-size",
    "16",
    "--n-class",
    "3",
    "--n-shot",
    "1",
    "--n-eval",
    "2",
    "--epoch",
    "2",
]
SMALL += [
    "--hidden-size",
    "4",
    "--log-freq",
    "1",
    "--val-freq",
    "2",
    "--episode-val",
    "2",
    "--n-workers",
    "0",
]
SMALL += ["--plots", "false"]
TEST = ["--mode", "test", "--cpu", "--episode-test", "3", "--n-workers", "0"]


@pytest.fixture(scope="module")
def without_fast(tmp_path_factory):
    """A copy of the repository's code without fast/."""
    place = tmp_path_factory.mktemp("without fast")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, place)
    for folder in ("around", "data/splits"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def results(folder):
    """What a run leaves, without what depends on the clock or the place."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    checkpoint = torch.load(folder / "ckpts" / "meta-learner-last.pth.tar", weights_only=True)
    tests = json.loads((folder / "results.json").read_text())["tests"]
    tests = [{k: v for k, v in test.items() if k != "about"} for test in tests]
    known = [checkpoint[name] for name in ("hyper_parameters", "metalearner", "optim")]
    return lines, tests, checkpoint["run"]["data"], *known


def test_without_fast_all_works_and_is_what_plain_gives(
    master, without_fast, tmp_path, monkeypatch, capsys
):
    """Training, resuming and testing: the same numbers, bit for bit."""
    train = ["--mode", "train", "--data-root", str(master), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def in_the_copy(*argv):
        command = [sys.executable, str(without_fast / "main.py"), *argv]
        how = {
            "cwd": without_fast,
            "env": environment,
            "capture_output": True,
            "text": True,
            "timeout": 120,
        }
        done = subprocess.run(command, check=False, **how)
        assert done.returncode == 0, done.stderr
        assert "plain PyTorch (there is no folder fast/)" in done.stdout
        return done.stdout

    in_the_copy(*train, "--episode", "2")
    assert "resuming after episode 2 of 4" in in_the_copy(
        *train, "--episode", "4", "--resume", "auto"
    )
    in_the_copy(*TEST)
    monkeypatch.chdir(tmp_path)
    assert main.run([*train, "--episode", "4", "--plain"]) == 0
    assert main.run([*TEST, "--plain"]) == 0
    assert capsys.readouterr().out.count("plain PyTorch (--plain)") == 2
    *here, weights, adam = results(tmp_path / "logs-719")
    *there, other_weights, other_adam = results(without_fast / "logs-719")
    assert here == there
    assert len(here[0]) == 4 + 2
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    moments = [
        [t for state in optim["state"].values() for t in state.values()]
        for optim in (adam, other_adam)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


@pytest.mark.parametrize(
    ("plain", "why"),
    [(True, "which --plain leaves out"), (False, "but there is no folder fast/")],
    ids=["plain", "no folder"],
)
def test_without_fast_bfloat16_is_refused(monkeypatch, plain, why):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = settle({"cpu": True, "precision": "bf16", "plain": plain}, parse([])[1])
    with pytest.raises(
        UserError, match=f"--precision bf16: needs fast/, {why}; give --precision fp32"
    ):
        choose(args)


def test_without_triton_fast_works():
    """As with PyTorch for a CPU alone, which does not bring it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fast import augment, gpu, learner, metalearner\n"
        "assert not gpu.works(None, None, 0, torch.ones(1), None)\n"
        "print(*learner.FastConv4(16, 1e-3, 0.9, 3)(torch.ones(2, 3, 16, 16)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("2 3\n", 0), done.stderr


def test_plain_decodes_nothing_in_advance(data, tmp_path):
    flags = [
        "--mode",
        "train",
        "--data-root",
        str(data),
        *SMALL,
        "--episode",
        "1",
        "--save",
        str(tmp_path / "logs"),
    ]
    assert main.run([*flags, "--plain"]) == 0
    assert sorted(path.name for path in data.iterdir()) == ["test", "train", "val"]


def test_a_run_can_change_its_way(master, tmp_path):
    """A checkpoint knows nothing of plain or fast: begun with one, continued with the other, equal
    to rounding.
    """
    found = {}
    for first, second in (("plain", "fast"), ("fast", "plain"), ("plain", "plain")):
        flags = [
            "--mode",
            "train",
            "--data-root",
            str(master),
            *SMALL,
            "--save",
            str(tmp_path / f"{first}-{second}"),
        ]
        for n, way in ((1, first), (2, second)):
            assert (
                main.run(
                    [
                        *flags,
                        "--episode",
                        str(n),
                        "--resume",
                        "auto",
                        *(["--plain"] if way == "plain" else []),
                    ]
                )
                == 0
            )
        lines = (tmp_path / f"{first}-{second}-719" / "metrics.jsonl").read_text().splitlines()
        found[first, second] = [e["loss"] for e in map(json.loads, lines) if e["event"] == "train"]
    assert all(
        losses == pytest.approx(found["plain", "plain"], rel=0.02) for losses in found.values()
    )
