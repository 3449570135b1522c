"""``hubconf.py`` in other programs, and the notebook."""

import json
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, completed, photograph, run_cli, succeeded
from PIL import Image

import hubconf
import main
from data.imagefiles import to_rgb
from tools import predict
from utils import UserError

HEAD, LSTM = "miniImagenet-5s5c-pretrained-53", "miniImagenet-1s5c-authors-719"
FOREIGN = """
import sys
import main, utils, learner, tools
import torch
from PIL import Image

root, name, data, answer = sys.argv[1:]
theirs = {name: sys.modules[name] for name in ("main", "utils", "learner", "tools")}
state, path = torch.get_rng_state(), list(sys.path)
cudnn = torch.backends.cudnn
cudnn.benchmark = True
settings = lambda: [cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision]
before = settings()
model = torch.hub.load(root, "load_pretrained", name, "--cpu", source="local")
assert {name: sys.modules[name] for name in theirs} == theirs
assert torch.equal(torch.get_rng_state(), state) and sys.path == path
assert not {"episode", "engine", "fast"} & sys.modules.keys()
import tools.mine
again = torch.hub.load(root, name, "--cpu", source="local")
images = [Image.open(f"{data}/{c}/{k}.jpg") for c in "abcde" for k in range(2)]
again.adapt(images, [c for c in "abcde" for _ in range(2)])
model.adapt(images, [c for c in "abcde" for _ in range(2)])
assert torch.equal(again.features(images), model.features(images))
torch.save(model.predict(images), answer)
assert settings() == before != [False, True, "ieee"]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five classes of two images, one of which is turned by its EXIF data."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for c in "abcde":
        (root / c).mkdir()
        for k in range(2):
            exif = Image.Exif()
            exif[0x0112] = 6 if k else 1
            photograph(rng, 100, 90).save(root / c / f"{k}.jpg", exif=exif)
    return root


FEW = ("--tta-permutations", "1", "--epoch", "1")


def pictures(data):
    return [Image.open(path) for path in sorted(data.glob("*/*"))]


def adapted(name, data, *flags):
    model = hubconf.load_pretrained(name, "--cpu", *flags)
    model.adapt(pictures(data), [c for c in "abcde" for _ in "01"])
    return model


@pytest.mark.parametrize("name", [HEAD, LSTM])
def test_it_answers_as_the_command_to_the_bit(name, data, tmp_path, monkeypatch):
    flags = ("--tta-flip", "true", "--tta-permutations", "2", "--epoch", "2")
    found, table = [], predict.table  # the probabilities before they are rounded
    monkeypatch.setattr(predict, "table", lambda *a: (found.append(a[2]), table(*a))[1])
    argv = ["--mode", "predict", "--resume", ROOT / "results" / name, "--cpu", *flags]
    out = ["--support", data, "--query", *sorted(data.glob("*/*")), "--out", tmp_path / "answer"]
    succeeded(run_cli(*argv, *out))
    expected, model, images = (
        torch.from_numpy(found[0]),
        adapted(name, data, *flags),
        pictures(data),
    )
    assert model.classes == list("abcde")
    tensors = [torch.from_numpy(np.array(to_rgb(i))).permute(2, 0, 1) for i in images]
    for given in (images, iter(images), tensors, [t / 255 for t in tensors]):
        assert torch.equal(model.predict(given), expected)
    assert model.features(images).shape == (10, 800)
    assert model.predict([]).shape == (0, 5)


def test_modules_of_the_same_names_do_not_meet(data, tmp_path):
    """Neither those that are imported already nor those that come first on the path."""
    expected = adapted(HEAD, data).predict(pictures(data))
    for name in ("main", "utils", "learner", "episode", "fast", "tools/__init__", "tools/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("class Mine: pass\n")
    (tmp_path / "program.py").write_text(FOREIGN)
    command = [sys.executable, "program.py", ROOT, HEAD, data, tmp_path / "answer.pt"]
    succeeded(completed(command, cwd=tmp_path))
    assert torch.equal(torch.load(tmp_path / "answer.pt"), expected)


def test_a_programs_settings_change_no_bit(data, capsys):
    images = pictures(data)
    expected = adapted(LSTM, data, *FEW).predict(images)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    for setting in (autocast, torch.inference_mode(), torch.device("meta")):
        with setting:
            assert torch.equal(adapted(LSTM, data, *FEW).predict(images), expected)
    torch.set_default_dtype(torch.float64)
    try:
        found = adapted(LSTM, data, *FEW).predict(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert "10 support images here, 5 in training" in capsys.readouterr().out


def test_threads_do_not_mix_up_modules(monkeypatch):
    """Whatever they import meanwhile, at the end the program has its own again."""
    mine = types.ModuleType("utils")
    monkeypatch.setattr(main, "load_predictor", lambda _: time.sleep(0.1))
    monkeypatch.setitem(sys.modules, "utils", mine)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: hubconf.load_pretrained(HEAD, "--cpu"), range(3)))
    assert sys.modules["utils"] is mine


def test_labels_in_tensors(data):
    """Equal numbers are one class; tensors are equal to themselves only."""
    model, images = adapted(HEAD, data, *FEW), pictures(data)
    expected = model.predict(images)
    model.adapt(images, torch.arange(5).repeat_interleave(2))
    assert model.classes == list(range(5))
    assert torch.equal(model.predict(images), expected)
    with pytest.raises(UserError, match="3 classes"):
        model.adapt(images[:5], torch.tensor([0, 0, 1, 1, 2]))


def test_what_the_hub_lists():
    listed = {f for f in dir(hubconf) if callable(getattr(hubconf, f)) and f[0] != "_"}
    runs = {path.parent.name for path in (ROOT / "results").glob("*/meta-learner.pth.tar")}
    assert listed == {"load_pretrained"} | runs
    assert HEAD in runs


def test_what_cannot_be_is_refused(data):
    with pytest.raises(UserError, match="nowhere"):
        hubconf.load_pretrained("nowhere")
    model = hubconf.load_pretrained(LSTM, "--cpu")
    image = Image.new("RGB", (90, 90))
    for call in (model.predict, model.features):
        with pytest.raises(UserError, match="adapt"):
            call([image])
    with pytest.raises(UserError, match=r"2 images.*1 label"):
        model.adapt([image, image], ["a"])
    with pytest.raises(UserError, match="2 classes"):
        model.adapt([image, image], ["a", "b"])
    for wrong in (image, [Image.fromarray(np.full((9, 9), -1, dtype=np.float32))], []):
        with pytest.raises(UserError, match="image"):
            adapted(LSTM, data, *FEW).features(wrong)
    shapes = (torch.ones(90, 90), torch.ones(4, 9, 9), torch.ones(3, 0, 0))
    for wrong in (*shapes, torch.ones(3, 9, 9) * 2, np.ones((9, 9, 3)), "a.jpg"):
        with pytest.raises(UserError, match="tensor"):
            model.adapt([wrong], ["a"])


def test_the_notebook(monkeypatch):
    """Its cells run, without Jupyter, and most answers are right."""
    path = ROOT / "examples" / "predict.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    for cell in notebook["cells"]:
        assert cell.keys() >= {"cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["accuracy"] > 0.6
    assert names["features"].shape == (25, 800)
    assert isinstance(names["sheet"], Image.Image)
