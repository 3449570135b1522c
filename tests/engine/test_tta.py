"""Answers averaged over orders of the classes and mirror images, and a learning rate that decays."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import WAYS
from test_cli import do_test, expect, metrics, tensors, train
from test_episode import make
from test_resume import assert_same

import main
from engine.tta import class_orders, evaluate_averaged, mirrored
from episode import evaluate_episode


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("averaging") / "logs"
    assert train(master, save, "--lr-decay", "0.5", "--lr", "0.01") == 0
    return save


# ---- Averaging ----


def test_one_order_is_the_ordinary_evaluation(way):
    episode, *models = make(way)
    ordinary = evaluate_episode(episode, *models, 100)
    averaged = evaluate_averaged(episode, *models, 100, class_orders(3, 1, 0), False)
    for a, b in zip(averaged, ordinary, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_the_probability_is_the_mean_of_each_view(way):
    episode, *models = make(way)
    flipped = episode._replace(support=mirrored(episode.support))
    found = []
    for support, query in ((0, 0), (0, 1), (1, 0), (1, 1)):
        shown = (flipped if support else episode)._replace(
            query=mirrored(episode.query) if query else episode.query
        )
        evaluate_episode(shown, *models, 100)
        with torch.no_grad():
            found.append(models[1](shown.query).softmax(1))
    rows = torch.stack(found).mean(0)
    loss, percent = evaluate_averaged(episode, *models, 100, class_orders(3, 1, 0), True)
    assert float(loss) == pytest.approx(
        -float(rows[range(6), episode.query_y].log().mean()), rel=1e-5
    )
    assert float(percent) == pytest.approx(
        100 * float((rows.argmax(1) == episode.query_y).float().mean())
    )


def test_an_answer_of_probability_0_is_not_an_infinite_loss(way):
    episode, *models = make(way)
    models[2].metalstm.cI.data.mul_(1e4)
    orders = class_orders(3, 1, 0)
    loss, _ = evaluate_averaged(episode, *models, 100, orders, False)
    assert 50 < float(loss) < 90  # -log of the smallest float32 is 87


def test_over_all_orders_no_class_has_a_place_of_its_own(way):
    episode, *models = make(way)
    places = torch.tensor([2, 0, 1])
    other = episode._replace(support_y=places[episode.support_y], query_y=places[episode.query_y])
    all_orders = partial(evaluate_averaged, orders=class_orders(3, 6, 0), mirror=False)
    for evaluate, alike in ((all_orders, True), (evaluate_episode, False)):
        losses = [float(evaluate(shown, *models, 100)[0]) for shown in (episode, other)]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) == alike


def test_with_mirror_images_left_and_right_are_alike(way):
    episode, *models = make(way)
    other = episode._replace(support=mirrored(episode.support), query=mirrored(episode.query))
    both = partial(evaluate_averaged, orders=class_orders(3, 1, 0), mirror=True)
    assert float(both(episode, *models, 100)[0]) == pytest.approx(
        float(both(other, *models, 100)[0]), rel=1e-5
    )


def test_transductive_answers_are_normalised_by_the_query_images_themselves(way):
    episode, *models = make(way)
    few = episode._replace(query=episode.query[:4], query_y=episode.query_y[:4])
    for averaged in (False, True):
        how = {"orders": class_orders(3, 1, 0), "mirror": False} if averaged else {}
        evaluate = partial(evaluate_averaged if averaged else evaluate_episode, **how)
        loss, _ = evaluate(episode, *models, 100, transductive=True)
        models[1].train()
        with torch.no_grad():
            assert float(loss) == pytest.approx(
                float(F.cross_entropy(models[1](episode.query), episode.query_y)), rel=1e-5
            )
        for transductive in (True, False):
            evaluate(episode, *models, 100, transductive=transductive)
            answers = [models[1](shown.query).detach()[:4] for shown in (episode, few)]
            assert torch.allclose(*answers, atol=1e-6) != transductive
        assert float(evaluate(episode, *models, 100)[0]) != pytest.approx(float(loss), rel=1e-3)


def test_results_say_so_and_keep_both(trained, capsys):
    flags = ("--episode-test", "4")
    assert do_test(None, trained, *flags) == 0
    assert do_test(None, trained, *flags, "--orders", "3", "--mirror", "true") == 0
    table = capsys.readouterr().out.split("written to")[-1]
    tests = json.loads((trained.with_name("logs-719") / "results.json").read_text())["tests"]
    assert [test["averaged"] for test in tests] == [
        {"orders": 1, "mirror": False},
        {"orders": 3, "mirror": True},
    ]
    assert tests[0]["losses"] != tests[1]["losses"]
    assert table.count("averaged over 3 orders of the classes and mirror images") == 1
    assert do_test(None, trained, *flags, "--transductive", "true") == 0
    table = capsys.readouterr().out.split("written to")[-1]
    assert table.count(", transductive |") == 1
    assert (
        len(json.loads((trained.with_name("logs-719") / "results.json").read_text())["tests"]) == 3
    )
    assert (
        do_test(None, trained, *flags, "--orders", "3", "--mirror", "true") == 0
    )  # replaces its like
    assert (
        len(json.loads((trained.with_name("logs-719") / "results.json").read_text())["tests"]) == 3
    )


def test_refusals(trained, capsys):
    expect(capsys, do_test(None, trained, "--orders", "0"), "--orders", "from 1 to 1000")
    expect(capsys, do_test(None, trained, "--mirror", "perhaps"), "--mirror", "true or false")
    code = do_test(None, trained, "--transductive", "true", "--adapt", "classifier")
    expect(capsys, code, "--transductive true", "--adapt all only")
    expect(
        capsys,
        main.run(["--mode", "predict", "--transductive", "true"]),
        "--transductive true",
        "for tests",
    )


# ---- The learning rate ----


def test_it_falls_evenly_at_the_end(master, tmp_path, monkeypatch):
    rates, original = [], main.train_episode

    def watched(episode, w_grad, wo_grad, meta, optimizer, *rest):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        return original(episode, w_grad, wo_grad, meta, optimizer, *rest)

    monkeypatch.setattr(main, "train_episode", watched)
    assert train(master, tmp_path / "logs", "--lr-decay", "0.5", "--lr", "0.01", val_freq=0) == 0
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.005])
    rates.clear()
    assert train(master, tmp_path / "constant", "--lr", "0.01", val_freq=0) == 0
    assert rates == [0.01] * 4


def test_adam_takes_it(master, trained, tmp_path):
    """The first three updates are those of a constant rate, to the bit; the fourth is not."""
    assert train(master, tmp_path / "logs", "--lr", "0.01") == 0
    assert metrics(trained, "train") == metrics(tmp_path / "logs", "train")
    name = "meta-learner-2.pth.tar"
    assert_same(
        tensors(trained, name)["metalearner"], tensors(tmp_path / "logs", name)["metalearner"]
    )
    found, constant = (
        tensors(save)["metalearner"]["metalstm.cI"] for save in (trained, tmp_path / "logs")
    )
    middle = tensors(trained, name)["metalearner"]["metalstm.cI"]
    assert 0 < (found - middle).norm() < (constant - middle).norm()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_continues_where_it_was(master, tmp_path, way):
    flags = ("--lr-decay", "0.5", "--meta-batch", "2", *(["--plain"] if way == "plain" else []))
    assert train(master, tmp_path / "whole", *flags, episode=8, val_freq=4) == 0
    middle = tmp_path / "whole-719" / "ckpts" / "meta-learner-4.pth.tar"
    assert (
        train(master, tmp_path / "rest", *flags, "--resume", str(middle), episode=8, val_freq=4)
        == 0
    )
    whole, rest = (tensors(tmp_path / name) for name in ("whole", "rest"))
    assert_same(whole["metalearner"], rest["metalearner"])
    assert_same(whole["optim"], rest["optim"])


def test_a_checkpoint_that_does_not_say_has_a_constant_rate(master, tmp_path, capsys):
    save = tmp_path / "logs"
    assert train(master, save) == 0
    content = tensors(save)
    del content["hyper_parameters"]["lr_decay"]
    torch.save(content, tmp_path / "logs-719" / "ckpts" / "meta-learner-last.pth.tar")
    code = train(master, save, "--lr-decay", "0.5", "--resume", "auto", episode=6)
    expect(capsys, code, "--lr-decay 0.5", "was begun with --lr-decay 0.0")
