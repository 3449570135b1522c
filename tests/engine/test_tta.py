"""Test-time augmentation, and evaluation with and without it."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import new_episode
from torch import nn

from baselines.linear_head import LinearHead
from data.layout import scan_split
from engine.backend import dataset, select_backend
from engine.distributed import SINGLE_PROCESS
from engine.evaluation import Evaluator, is_mini_imagenet, run_test, schedule
from engine.flags import ROOT, parse, resolve
from engine.model import Model
from engine.tta import class_permutations, evaluate_tta
from episode import evaluate_episode

SMALL = "--cpu --image-size 16 --n-class 3 --n-shot 2 --n-eval 2 --epoch 2 --hidden-size 4 "
SMALL += "--n-workers 0 --bi-init -2 -1"
METHODS = pytest.mark.parametrize("method", ["lstm", "linear-head"])


class Pool(nn.Module):
    """A backbone that knows left from right."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


def make_args(*flags):
    return resolve(parse([*SMALL.split(), *flags]))


def make_model(method, args):
    backend = select_backend(args)
    torch.manual_seed(0)
    if method == "linear-head":
        learner, backbone = LinearHead(48, 3), Pool()
        nn.init.normal_(learner.cls.weight, std=0.1)
    else:
        learner, backbone = backend.learner(16, 1e-3, 0.95, 3), None
    meta = backend.metalearner(4, 4, learner.size(), (-2.0, -1.0))
    meta.init_cI(learner.get_flat_params())
    return Model(meta, (learner, copy.deepcopy(learner)), backbone)


@pytest.fixture(params=["plain", "fast", "linear-head"])
def setup(request):
    """An episode and a model, as arguments of ``evaluate_tta``."""
    if request.param == "fast":
        pytest.importorskip("fast")
    model = make_model(request.param, make_args(*["--plain"] * (request.param == "plain")))
    return new_episode(), *model.learners, model, 100


def flipped(x):
    return x.flip(3).contiguous(memory_format=torch.channels_last)


def plain(episode, w_grad, wo_grad, model, batch_size, transductive=False):
    """``evaluate_episode`` of an episode of images."""
    pair = (w_grad, wo_grad, model.metalearner)
    return evaluate_episode(model.embed(episode), *pair, batch_size, transductive)


def test_one_permutation_is_the_ordinary_evaluation(setup):
    """And a probability of 0 has a finite loss."""
    found = evaluate_tta(*setup, class_permutations(3, 1, 0), False)
    for a, b in zip(found, plain(*setup), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    setup[3].metalearner.metalstm.cI.data.mul_(1e4)
    loss, _ = evaluate_tta(*setup, class_permutations(3, 1, 0), False)
    assert 10 < float(loss) < 90  # -log of the smallest float32 is 87


def test_probabilities_are_the_mean_over_the_views(setup):
    episode, _, wo_grad, model, _ = setup
    found = []
    for support in (episode.support, flipped(episode.support)):
        for query in (episode.query, flipped(episode.query)):
            plain(episode._replace(support=support, query=query), *setup[1:])
            with torch.no_grad():
                found.append(wo_grad(model.inputs(query)).softmax(1))
    rows = torch.stack(found).mean(0)
    loss, percent = evaluate_tta(*setup, class_permutations(3, 1, 0), True)
    expected = -rows[range(6), episode.query_y].log().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    right = (rows.argmax(1) == episode.query_y).float().mean()
    assert float(percent) == pytest.approx(100 * float(right))


def test_with_all_permutations_the_classes_order_is_nothing(setup):
    episode, places = setup[0], torch.tensor([2, 0, 1])
    other = episode._replace(support_y=places[episode.support_y], query_y=places[episode.query_y])

    for n, alike in ((6, True), (1, False)):
        views = class_permutations(3, n, 0), False
        losses = [float(evaluate_tta(e, *setup[1:], *views)[0]) for e in (episode, other)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) == alike


@pytest.mark.parametrize("setup", ["plain", "fast"], indirect=True)
def test_transductive_uses_the_query_sets_statistics(setup):
    episode, _, wo_grad, *_ = setup
    one = class_permutations(3, 1, 0), False
    losses = []
    for transductive in (True, False):
        loss, _ = plain(*setup, transductive=transductive)
        augmented, _ = evaluate_tta(*setup, *one, transductive)
        wo_grad.train(transductive)
        with torch.no_grad():
            expected = F.cross_entropy(wo_grad(episode.query), episode.query_y)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert float(augmented) == pytest.approx(float(expected), rel=1e-5)
        losses.append(float(loss))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_class_permutations_are_balanced_and_distinct():
    found = class_permutations(5, 120, 719)
    assert len({tuple(row) for row in found.tolist()}) == len(found) == 120
    assert found[0].tolist() == [0, 1, 2, 3, 4]
    for start in range(0, 120, 5):
        columns = found[start : start + 5].t().tolist()
        assert all(sorted(column) == [0, 1, 2, 3, 4] for column in columns)
    assert len(class_permutations(4, 1000, 719)) == math.factorial(4)
    assert class_permutations(30, 7, 719).shape == (7, 30)
    assert torch.equal(class_permutations(6, 20, 3), class_permutations(6, 100, 3)[:20])


# ---- Many episodes ----


def run_small(master, *flags, method="lstm", trained_on=2):
    args = make_args("--mode", "test", "--data-root", str(master), *flags)
    backend = select_backend(args)
    return run_test(args, backend, make_model(method, args), trained_on, SINGLE_PROCESS)


@METHODS
def test_evaluator_equals_one_episode_at_a_time(master, method):
    args = make_args("--data-root", str(master))
    backend, model = select_backend(args), make_model(method, args)
    episodes = dataset(args, backend, scan_split(master, "val"), 3)
    calls = []
    found = Evaluator(args, backend, model)(episodes, lambda: calls.append(1))
    expected = [plain(episodes[k], *model.learners, model, 25) for k in range(3)]
    for values, of in zip(found, zip(*expected, strict=True), strict=True):
        assert values == pytest.approx([float(x) for x in of], rel=1e-4)
    assert len(calls) == 3


@METHODS
def test_a_test_says_of_what_it_is(master, method, capsys):
    """All counts are of the same episodes."""
    tta = ("--tta-permutations", "3", "--tta-flip", "true")
    flags = ("--episode-test", "6", "3", "--shots", "2", "1", *tta)
    (one,) = run_small(master, "--episode-test", "3", method=method)
    same, other = run_small(master, *flags, method=method)
    out = capsys.readouterr().out
    assert "3 episodes" in out
    assert "6 episodes" in out
    assert (one["counts"], same["counts"]) == ([3], [3, 6])
    assert one["tta"] == {"permutations": 1, "flip": False}
    assert same["tta"] == {"permutations": 3, "flip": True}
    assert one["losses"] != same["losses"][:3]
    assert (one["fingerprint"], one["mini_imagenet"]) == (same["fingerprint"], False)
    schedules = [(t["n_shot"], t["epoch"], t["batch_size"]) for t in (one, same, other)]
    assert schedules == [(2, 2, 25), (2, 2, 25), (1, 2, 3)]
    (again,) = run_small(master, "--episode-test", "3", *tta, method=method)
    assert again["losses"] == same["losses"][:3]


def test_other_shots_keep_the_size_of_a_step(master, capsys):
    losses = [
        run_small(master, "--episode-test", "2", "--n-shot", "1", *flags)[0]["losses"]
        for flags in ((), ("--grad-divisor", "6"), ("--grad-divisor", "3"))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert capsys.readouterr().out.count("note: ") == 3


def test_the_schedule_for_other_numbers_of_examples(capsys):
    """Training with 3 x 2 images in one minibatch, or in two; with 3 x 5 in four."""
    one, two = make_args("--batch-size", "25"), make_args("--batch-size", "3")
    assert [schedule(one, 2, n) for n in (3, 6, 12)] == [(3, 6), (25, 0), (12, 6)]
    assert [schedule(two, 2, n) for n in (3, 6, 12)] == [(2, 3), (3, 0), (6, 3)]
    assert capsys.readouterr().out.count("stay as in training") == 4
    assert schedule(make_args("--batch-size", "4"), 5, 6) == (2, 4)
    assert "3 updates a pass, 4 in training" in capsys.readouterr().out


def test_the_classes_decide_what_is_mini_imagenet():
    lists = json.loads((ROOT / "data" / "splits" / "mini-imagenet.json").read_text())
    assert is_mini_imagenet(lists["test"][::-1])
    assert not is_mini_imagenet(lists["test"][1:])
    assert not is_mini_imagenet(lists["val"])
