"""Provenance, class names, Markdown, metrics and recipes."""

import importlib.metadata
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import CPU

from engine import provenance as provenance_module
from engine.flags import DEFAULTS, HYPER_PARAMETERS, METHODS, flag_name
from engine.provenance import commit, cpu_name, provenance
from tools import recipes as recipes_module
from tools.recipes import recipe_name, recipes, starts_from
from tools.words import markdown_table
from utils import UserError

PORT = {k: DEFAULTS[k] for k in HYPER_PARAMETERS}


def test_provenance_names_code_and_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py", "--data-root", "/images/x y", "--cpu"])
    about = provenance(CPU)
    assert about["command"] == "python main.py --data-root 'x y' --cpu"
    assert about["versions"].keys() == {"python", "torch", "torchvision", "numpy", "pillow"}
    assert cpu_name() in about["device"]
    assert "processes" not in about
    assert provenance(CPU, 2)["processes"] == 2


def test_what_is_missing_is_unknown(monkeypatch):
    for how in ({"side_effect": importlib.metadata.PackageNotFoundError}, {"return_value": None}):
        monkeypatch.setattr(importlib.metadata, "version", Mock(**how))
        assert provenance(CPU)["versions"]["torchvision"] == "unknown"
    gone = Mock(side_effect=FileNotFoundError)
    monkeypatch.setattr(subprocess, "run", gone)
    assert commit() == "unknown"
    monkeypatch.setattr(provenance_module, "open", gone, raising=False)
    assert isinstance(cpu_name(), str)


def test_markdown_cells_keep_their_columns():
    text = markdown_table(["a", "b"], [["x|y", 1], ["two\nlines", ""]])
    assert text.splitlines() == ["| a | b |", "|-|-|", r"| x\|y | 1 |", "| two lines |  |"]


# ---- Recipes ----


def test_each_script_is_a_recipe_of_its_own():
    found = recipes()
    assert {name for name, _ in found} >= {"port", "authors", "pretrained", "matching-fce"}
    assert {values["method"] for values in found.values()} == set(METHODS)
    assert {shots for _, shots in found} == {1, 5}
    assert found["port", 5] == PORT
    for (name, shots), values in found.items():
        assert values["n_shot"] == shots
        assert recipe_name(values | {"seed": 3}) == name
    assert found["pretrained", 5]["method"] == "linear-head"
    assert starts_from("pretrained", 5)
    assert not starts_from("port", 5)


def test_baselines_are_named_after_their_method():
    hyper = recipes()["protonet", 5]
    assert recipe_name(hyper | {"n_shot": 1, "lr": 0.5}) == "protonet, but lr 0.5"
    assert recipe_name(recipes()["sgd", 5] | {"method": "lstm"}).startswith(("port", "authors"))
    assert starts_from("nearest", 1)


def test_differences_from_a_recipe_are_named():
    assert recipe_name({}) == "unknown"
    assert recipe_name(PORT | {"augment": "none"}) == "port, but augment none"
    assert recipe_name(recipes()["authors", 5] | {"bn_scale": "one"}) == "authors, but bn-scale one"
    changed = PORT | {"bi_init": [0.0, 0.5], "image_size": 32}
    assert recipe_name(changed) == "port, but image-size 32, bi-init 0 0.5"
    late = recipe_name(PORT | {"lr_decay": 0.2}, ["lr_decay", "epoch"], 2000)
    assert "lr-decay 0.2 only after 2,000 episodes" in late
    assert "epoch 8 only after 2,000 episodes" in late


def test_every_hyper_parameter_is_part_of_the_name():
    other = recipe_name(dict.fromkeys(HYPER_PARAMETERS, "x"))
    for name in set(HYPER_PARAMETERS) - {"n_class", "n_shot", "seed", "input_size"}:
        assert f"{flag_name(name)[2:]} x" in other


def test_a_script_with_an_unknown_flag_is_named(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "train_5s_5c_mine.sh"
    monkeypatch.setattr(recipes_module, "ROOT", tmp_path)
    monkeypatch.setattr(recipes_module, "scripts", recipes_module.scripts.__wrapped__)
    script.write_text('run_main --mode train --lrr 3 \\\n  "$@"\n')
    with pytest.raises(UserError, match=r"train_5s_5c_mine\.sh"):
        recipes()
    script.write_text('run_main --mode train --lr 0.5 \\\n  # why\n  "$@"\n')
    assert recipes()["mine", 5]["lr"] == 0.5
