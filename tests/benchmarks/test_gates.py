"""benchmarks/gates.py: other rules in the LSTM's place, on the same episodes."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make, new_episode, run_test, succeeded
from helpers import gates

from engine.flags import parse
from engine.model import Model
from episode import adapt
from utils import UserError


def test_the_mean_of_constant_gates_is_the_rule_itself(monkeypatch):
    _, w_grad, wo_grad, meta = make("plain", dtype=torch.float64)
    with torch.no_grad():
        meta.metalstm.WF.zero_()
        meta.metalstm.WI.zero_()
    drawn = [new_episode(dtype=torch.float64) for _ in range(3)]
    monkeypatch.setattr(gates, "episodes", lambda episodes, *_: episodes)
    f, i = gates.mean_gates(Model(meta, (w_grad, wo_grad)), drawn, 3, "cpu")
    assert f.shape == i.shape == (4, w_grad.size(), 1)  # 2 passes of 2 minibatches
    assert torch.allclose(i, meta.metalstm.bI.sigmoid().double().expand_as(i))
    with torch.no_grad():
        expected = adapt(drawn[0], w_grad, meta, 3)[0]
        for slices in (slice(None), slice(1)):
            rule = gates.FixedGates(meta, f[slices], i[slices])
            assert torch.allclose(adapt(drawn[0], w_grad, rule, 3)[0], expected, rtol=1e-12)


def test_means_are_taken_over_a_tensor_not_over_all(monkeypatch):
    _, w_grad, wo_grad, meta = make("plain", dtype=torch.float64)
    drawn = [new_episode(dtype=torch.float64)]
    monkeypatch.setattr(gates, "episodes", lambda episodes, *_: episodes)
    _, i = gates.mean_gates(Model(meta, (w_grad, wo_grad)), drawn, 6, "cpu")
    with torch.no_grad():
        steps = list(gates.updates(drawn[0], w_grad, meta, 6))
    for t, (_, state) in enumerate(steps):
        values = w_grad.slices(state.i.sigmoid())
        for mean, part in zip(w_grad.slices(i[t]), values, strict=True):
            assert torch.allclose(mean, part.mean().expand_as(mean))


def test_climbing_ends_at_the_best_steps():
    def score(steps):
        return -sum(abs(math.log2(s / best)) for s, best in zip(steps, (8, 0.5, 1), strict=True))

    assert gates.climb(score, [1.0, 1.0, 1.0], [[0], [1], [2]]) == [8.0, 0.5, 1.0]
    assert gates.climb(lambda steps: -abs(steps[0] - 0.25), [1.0, 1.0], [[0, 1]]) == [0.25, 0.25]


def test_rows_and_picture_of_a_run(own, tmp_path, capsys):
    flags = ["--cpu", "--n-workers", "0", "--episode-val", "2", "--episode-test", "3"]
    assert gates.main([f"{own}-719", "--out", str(tmp_path / "out"), *flags]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    assert (tmp_path / "out.md").read_text().strip() == printed.strip()
    assert (tmp_path / "out.png").stat().st_size > 1000
    succeeded(run_test(None, own, "--episode-test", 3))
    test = json.loads(Path(f"{own}-719/results.json").read_text())["tests"][-1]
    first, *others = rows
    mean = sum(test["accuracies"]) / 3
    assert float(first[1].split()[0]) == pytest.approx(mean, abs=0.01)
    for row in others:
        apart = float(row[1].split()[0]) - mean
        assert float(row[2].split()[0]) == pytest.approx(apart, abs=0.02)


def test_classes_that_training_has_seen_are_refused(data, trained, tmp_path):
    (data / "train" / "class 0").rename(data / "test" / "class 0")
    flags = ("--cpu", "--data-root", str(data), "--out", f"{tmp_path}/gates")
    with pytest.raises(UserError, match="class 0"):
        gates.main([f"{trained}-719", *flags])


def test_other_shots_are_adapted_to_as_in_a_test(master, own, capsys):
    """On more images in as many updates, with the steps of training."""
    flags = ["--n-shot", "3", "--episode-test", "2", "--n-workers", "0", "--data-root", str(master)]
    tested = run_test(None, own, *flags, "--batch-size", "2", "--grad-divisor", "0")
    ours = ["--cpu", "--episode-val", "2", "--batch-size", "2", "--grad-divisor", "0"]
    _, found = gates.compare(f"{own}-719", parse([*flags, *ours]))
    mean = sum(found[0][1]) / 2
    assert f"accuracy {mean:.2f} " in succeeded(tested)
    assert "9 support images here, 3 in training" in capsys.readouterr().out
