"""The packages: main -> tools, baselines -> engine -> fast -> root, which works without fast/."""

import ast
import graphlib
import json
import re
import shlex
import shutil
import sys

import pytest
from conftest import assert_same, completed, metrics, run_test, succeeded, tensors, train, training

import learner
import metalearner
from engine import backend, flags
from engine.backend import select_backend
from engine.flags import ROOT
from utils import UserError

FLOORS = dict.fromkeys(("utils", "data"), 0)
FLOORS |= dict.fromkeys(("learner", "metalearner", "episode", "dataloader"), 1)
FLOORS |= {"fast": 2, "engine": 3, "tools": 4, "baselines": 4, "main": 5, "hubconf": 6}
PACKAGES = ("fast", "engine", "tools", "baselines")


def modules():
    """Our modules by dotted name."""
    # the rest of data/ are commands, which nothing imports
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "data" / f"{name}.py" for name in ("imagefiles", "layout", "transforms")),
    ]
    files += (p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


def graph():
    """Each of our modules with those of ours that it imports."""
    known, found = modules(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & known.keys()
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
                found[name] |= inner or {node.module} & known.keys()
    return found


# ---- Imports ----


def test_imports_run_one_way():
    assert {path.stem for path in ROOT.glob("*.py")} == FLOORS.keys() - {"data", *PACKAGES}
    height = {name: FLOORS[name.split(".")[0]] for name in modules()}
    arrows = {(name, other) for name, others in graph().items() for other in others}
    assert {(a, b) for a, b in arrows if height[b] > height[a]} == set()
    assert {a for a, b in arrows if a == "utils" or b == "main"} == {"hubconf"}
    sides = {(a, b) for a, b in arrows if {a.split(".")[0], b.split(".")[0]} == {*PACKAGES[2:]}}
    assert sides == set()  # neither of tools and baselines needs the other
    assert {a for a, b in arrows if height[b] == 2 < height[a]} == {"engine.backend"}
    assert {("engine.backend", "fast.learner"), ("main", "engine.run")} <= arrows  # they are seen


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(graph()).prepare()


def test_flags_repeat_what_they_must_not_import():
    assert flags.MIN_IMAGE_SIZE == learner.MIN_IMAGE_SIZE
    assert flags.INPUT_SIZE == metalearner.INPUT_SIZE


# ---- Flags and texts ----


def test_each_flag_is_read_somewhere():
    read = set()
    above = ("main", "engine", "tools", "baselines")
    for name, path in modules().items():
        tree = ast.parse(path.read_text() if name.split(".")[0] in above else "")
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if name != "engine.flags":
            read |= {node.value for node in ast.walk(tree) if type(node) is ast.Constant}
    assert flags.DEFAULTS.keys() - read == set()


def documents():
    folders = (".", "benchmarks", "data", "docs", "fast", "results", "results/trials")
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}/*.md")]
    return {path: path.read_text() for path in paths}


def test_links_of_the_documents_lead_somewhere():
    texts = documents()
    headings = {
        path: {re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in lines}
        for path, text in texts.items()
        if (lines := re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    }
    for path, text in texts.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            to = (path.parent / target).resolve() if target else path
            assert to.exists(), (path, target)
            assert not anchor or anchor in headings[to], (path, target, anchor)


def test_the_commands_of_the_documents_exist():
    text = "".join(documents().values()).replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert len(commands) > 5
    for words in commands:
        if words[0] in ("bash", "sbatch", "python") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words
        own = words[1:2] == ["main.py"] or re.match(r"scripts/(train|eval|pretrain)", words[1])
        if own and "--help" not in words:
            flags.check(words[2:])


def test_git_ignores_what_the_readme_makes():
    made = ["logs-authors-719/", "short-719/", "predictions.csv", "predictions.png", "exported/"]
    done = completed(["git", "check-ignore", "--stdin"], cwd=ROOT, input="\n".join(made))
    assert done.returncode == 128 or done.stdout.splitlines() == made  # or it is no repository


# ---- Without fast/ ----


@pytest.mark.slow
def test_without_fast_all_works_and_is_what_plain_gives(master, tmp_path):
    """Training, resuming and testing: the same numbers, bit for bit."""
    place = tmp_path / "without fast"
    (place / "data").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")):
        shutil.copy(path, place / path.relative_to(ROOT))
    for folder in ("engine", "tools", "baselines", "data/splits"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import json, sys, main; assert not any(map(main.main, json.loads(sys.argv[1])))"
    begin, resume = (training(master, "logs", "--resume", "auto", episode=n) for n in (2, 4))
    test = ["--mode", "test", "--cpu", "--episode-test", "3", "--n-workers", "0"]
    command = [sys.executable, "-c", code, json.dumps([begin, resume, test])]
    assert succeeded(completed(command, cwd=place)).count("plain PyTorch") == 3
    succeeded(train(master, tmp_path / "logs", "--plain"))
    succeeded(run_test(master, tmp_path / "logs", "--plain", "--episode-test", 3))
    assert metrics(place / "logs") == metrics(tmp_path / "logs")
    assert_same(tensors(place / "logs"), tensors(tmp_path / "logs"))
    paths = [where / "logs-719" / "results.json" for where in (place, tmp_path)]
    here, there = (json.loads(path.read_text())["tests"][0]["accuracies"] for path in paths)
    assert here == there


@pytest.mark.parametrize("plain", [True, False, None], ids=["--plain", "no folder", "CPU"])
def test_without_fast_or_a_gpu_bfloat16_is_refused(monkeypatch, tmp_path, plain):
    if plain is not None:
        monkeypatch.setattr(backend, "ROOT", tmp_path)
    args = flags.resolve({"cpu": True, "precision": "bf16", "plain": bool(plain)})
    with pytest.raises(UserError, match="--precision bf16"):
        select_backend(args)


@pytest.mark.slow
def test_without_triton_fast_works():
    """As with PyTorch for a CPU alone, which does not bring it."""
    code = "import sys; sys.modules['triton'] = None\n"
    code += "import torch; from fast import augment, gpu, learner, metalearner\n"
    code += "assert not gpu.works(None, None, 0, torch.ones(1), None)\n"
    code += "learner.FastConv4(16, 1e-3, 0.9, 3)(torch.ones(2, 3, 16, 16))"
    succeeded(completed([sys.executable, "-c", code], cwd=ROOT))


@pytest.mark.parametrize("order", [("--plain", "--cpu"), ("--cpu", "--plain")])
def test_a_run_can_change_its_backend(master, tmp_path, order):
    """A checkpoint knows nothing of it; the numbers are equal to rounding."""
    for save, backends in (("a", order), ("b", ("--plain", "--plain"))):
        for n, flag in enumerate(backends, start=1):
            how = (flag, "--resume", "auto", "--hidden-size", 4)
            succeeded(train(master, tmp_path / save, *how, episode=n))
    here, there = ([m["loss"] for m in metrics(tmp_path / s, "train")] for s in "ab")
    assert here == pytest.approx(there, rel=0.02)
