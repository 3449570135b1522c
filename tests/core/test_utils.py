import json
import math
import os

import numpy as np
import pytest

from engine.logger import Logger, result_line, summary
from utils import UserError, atomic_write


def test_summary_is_numpys():
    values = np.random.default_rng(0).normal(57, 9, 600)
    expected = {"mean": values.mean(), "std": values.std(), "n": 600}
    expected["ci95"] = 1.96 * values.std() / np.sqrt(600)
    assert summary(values.tolist()) == pytest.approx(expected, rel=1e-12)
    assert summary([3.0]) == {"mean": 3.0, "std": 0.0, "ci95": 0.0, "n": 1}


def test_whole_file_or_none(tmp_path):
    path = tmp_path / "new" / "x"
    with atomic_write(path) as file:
        file.write(b"first")
    assert path.read_bytes() == b"first"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"x" * (1 // 0))
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["x"]


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"), atomic_write(tmp_path / "file" / "x"):
        pass
    with pytest.raises(UserError, match="file"):
        Logger(tmp_path / "file" / "run", {})


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    logger = Logger(tmp_path, {})
    logger.event("train", loss=float("nan"), accuracy=float("inf"), episode=1)
    logger.event("val", loss=summary([1.0, math.inf]), accuracy=summary([50.0]), episode=1)
    logger.close()
    train, val = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train == {"event": "train", "loss": None, "accuracy": None, "episode": 1}
    assert val["loss"] == {"mean": None, "std": None, "ci95": None, "n": 2}
    assert result_line("val", [math.nan, 1.0], [50.0, 60.0]).endswith("loss nan")
