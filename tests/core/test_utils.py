import json
import os
import pickle

import numpy as np
import pytest
import torch

from engine import checkpoint as checkpoints
from engine.logger import Logger
from utils import UserError, atomic_write, summary


def test_summary_is_numpys():
    values = np.random.default_rng(0).normal(57, 9, 600)
    result = summary(values.tolist())
    assert result["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert result["std"] == pytest.approx(values.std(), rel=1e-12)
    assert result["ci95"] == pytest.approx(1.96 * values.std() / np.sqrt(600), rel=1e-12)
    assert result["n"] == 600
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


def test_log_and_metrics_go_on_where_they_were(tmp_path):
    for k in range(2):
        logger = Logger(tmp_path, {})
        logger.info(f"line {k}")
        logger.event("train", episode=k, loss=0.1)
        logger.close()
    assert [
        line.split(" ", 2)[2] for line in (tmp_path / "console.log").read_text().splitlines()
    ] == ["line 0", "line 1"]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == [{"event": "train", "episode": k, "loss": 0.1} for k in range(2)]


def test_what_was_logged_beyond_a_snapshot_is_cut_off(tmp_path):
    logger = Logger(tmp_path, {})
    logger.info("kept")
    at = logger.position()
    logger.info("written by a process that was killed")
    logger.event("train", episode=1)
    logger.close()
    Logger(tmp_path, at).close()
    assert (tmp_path / "console.log").read_text().endswith(" kept\n")
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    (tmp_path / "console.log").write_text("")
    with pytest.raises(UserError, match=r"console\.log: 0 bytes"):
        Logger(tmp_path, at)


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    logger = Logger(tmp_path, {})
    logger.event("train", loss=float("nan"), accuracy=float("inf"), episode=1)
    logger.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"event": "train", "loss": None, "accuracy": None, "episode": 1}


def test_checkpoint_comes_back(tmp_path):
    content = {"episode": 3, "metalearner": {"a": torch.arange(3.0)}, "best": None}
    checkpoints.save(content, tmp_path / "a", tmp_path / "b")
    for name in "ab":
        loaded = checkpoints.load(tmp_path / name)
        assert loaded["episode"] == 3
        assert torch.equal(loaded["metalearner"]["a"], torch.arange(3.0))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
def test_a_checkpoint_that_would_run_a_command_is_refused(tmp_path, write):
    mark = tmp_path / "executed"
    write({"episode": 1, "metalearner": {}, "x": Hostile(mark)}, tmp_path / "ckpt")
    with pytest.raises(UserError, match="ckpt: "):
        checkpoints.load(tmp_path / "ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"episode": 1},
        {"episode": "1", "metalearner": {}},
        {"episode": 1, "metalearner": {"a": 3}},
        {"episode": 1, "metalearner": torch.zeros(3)},
    ],
)
def test_other_files_of_torch_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt")
    with pytest.raises(UserError, match="ckpt: "):
        checkpoints.load(tmp_path / "ckpt")
