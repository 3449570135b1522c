"""The methods besides the paper's: each against its formula in float64, each trains, resumes to the
same bits, and is tested; what cannot be is refused by name.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    SMALL,
    assert_same,
    dataset,
    metrics,
    new_episode,
    pretrain,
    refused,
    run_cli,
    run_test,
    succeeded,
    tensors,
    train,
)
from torch.nn.functional import cosine_similarity, cross_entropy

from baselines import finetune, methods
from engine.backend import select_backend
from engine.flags import METHODS, PRETRAINED, parse, resolve
from engine.stream import episodes
from episode import adapt
from learner import Conv4

FLAGS = {"finetune": ("--epoch", 3, "--batch-size", 3), "linear-head": ("--bn-shift", 0.5)}


def settings(method, *flags):
    return resolve(parse([*SMALL, "--method", method, *map(str, flags)]))


def made(method, *flags):
    """A method's model in float64 with random weights everywhere, batch norm's statistics too."""
    args = settings(method, *flags, "--plain")
    model = methods.BUILDERS[method](args, select_backend(args))
    for module in (*model.saved.values(), *model.learners):
        module.double()
        for name, value in module.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif "running_mean" in name or "context" in name:
                value.normal_(0, 0.3)
    return args, model


def episode_of(args):
    torch.manual_seed(5)
    shape = (args.n_class, args.n_shot, args.n_eval, args.epoch, args.image_size)
    return new_episode(*shape, dtype=torch.float64)


def embedded(episode, network):
    """Features of the support and query images, by a network of the root in eval mode."""
    ordinary = Conv4(16, 1e-3, 0.95, 3).double()
    missing, _ = ordinary.load_state_dict(network.state_dict(), strict=False)
    assert all(name.startswith("cls.") for name in missing)
    with torch.no_grad():
        return [ordinary.eval().features(x) for x in (episode.support, episode.query)]


@pytest.fixture(scope="module")
def pretrained(master, tmp_path_factory):
    """A network with a linear classifier of the training classes."""
    save = tmp_path_factory.mktemp("pretrained") / "logs"
    succeeded(pretrain(master, save, "--classifier", "linear", "--val-freq", 0, episode=2))
    return save


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    """Fine-tuning tries a few of its pairs only, for time."""
    monkeypatch.setattr(finetune, "GRID", finetune.GRID[3:24:7])


def flags_of(method):
    return "--method", method, *FLAGS.get(method, ())


def begin(method, pretrained):
    """The flags with which a training begins."""
    init = ("--init-from", f"{pretrained}-719") if method in PRETRAINED else ()
    return *flags_of(method), *init


@pytest.fixture(scope="module")
def head(master, pretrained, tmp_path_factory):
    save = tmp_path_factory.mktemp("head") / "logs"
    succeeded(train(master, save, *begin("linear-head", pretrained)))
    return save


# ---- Formulas ----


def in_context(support, query, weights):
    """Full context embeddings, one image after another."""

    def step(name, x, h, c, suffix=""):
        names = (f"{kind}_{of}{suffix}" for kind in ("weight", "bias") for of in ("ih", "hh"))
        part = (weights[f"{name}.{n}"] for n in names)
        h, c = torch.lstm_cell(x[None], (h[None], c[None]), *part)
        return h[0], c[0]

    zero, new, queries = torch.zeros_like(support[0]), support.clone(), []
    for suffix, places in (
        ("_l0", range(len(support))),
        ("_l0_reverse", range(len(support))[::-1]),
    ):
        h = c = zero
        for k in places:
            h, c = step("support_lstm", support[k], h, c, suffix)
            new[k] += h
    for x in query:
        h, c, read = zero, zero, new.mean(0)
        for _ in range(3):
            h, c = step("query_lstm", torch.cat((x, read)), h, c)
            h = h + x
            read = (new @ h).softmax(0) @ new
        queries.append(h)
    return new, torch.stack(queries)


@pytest.mark.parametrize("method", ["protonet", "matching", "matching-fce", "nearest"])
def test_logits(method):
    """The distance to a class's mean; the sum or the largest of the cosines to its images."""
    args, model = made(method, "--n-shot", 3)
    episode, network = episode_of(args), model.metalearner
    order = episode.order[0] if method.startswith("matching") else slice(None)
    features = embedded(episode, network.network if method == "nearest" else network.embedding)
    support, query, labels = features[0][order], features[1], episode.support_y[order]
    if method == "matching-fce":
        support, query = in_context(support, query, network.context.state_dict())
    expected = torch.empty(len(query), 3, dtype=torch.float64)
    for c in range(3):
        of_class = support[labels == c]
        cosines = cosine_similarity(query[:, None], of_class, dim=2)
        if method == "protonet":
            expected[:, c] = -(query - of_class.mean(0)).square().sum(1)
        else:
            expected[:, c] = cosines.amax(1) if method == "nearest" else cosines.sum(1)
    assert torch.allclose(network.eval()(episode), expected, rtol=1e-8)
    loss, percent = model.evaluate(args, episode)
    assert float(loss) == pytest.approx(float(cross_entropy(expected, episode.query_y)), rel=1e-8)
    right = (expected.argmax(1) == episode.query_y).double().mean()
    assert float(percent) == pytest.approx(100 * float(right))


def test_full_context_starts_as_none():
    args = settings("matching-fce")
    model = methods.BUILDERS["matching-fce"](args, select_backend(args))
    network, episode = model.metalearner.eval(), new_episode(n_shot=1)
    found, network.context = network(episode), None
    assert torch.allclose(found, network(episode), atol=1e-6)


@pytest.mark.parametrize("batch_size", [6, 4])
def test_fine_tuning_is_sgd(batch_size):
    flags = ("--n-shot", 2, "--epoch", 5, "--batch-size", batch_size, "--bn-momentum", 0.1)
    args, model = made("finetune", *flags)
    episode, pair = episode_of(args), (0.1, 0.5)
    network = copy.deepcopy(model.metalearner.network).requires_grad_().train()
    sgd = torch.optim.SGD(network.parameters(), lr=pair[0])
    slower = torch.optim.lr_scheduler.LambdaLR(sgd, lambda n: 1 / (1 + n * pair[1]))
    for order in episode.order:
        for k in order.split(4) if batch_size == 4 else [torch.arange(6)]:
            sgd.zero_grad()
            cross_entropy(network(episode.support[k]), episode.support_y[k]).backward()
            sgd.step()
            slower.step()
    with torch.no_grad():
        expected = network.eval()(episode.query)
        (learner,), (rate, decay) = model.learners, torch.tensor(pair, dtype=torch.float64)
        found = model.tuned(args, episode, learner, (rate, decay))
    assert torch.allclose(found, expected, rtol=1e-7)


def test_fine_tuning_takes_the_pair_that_was_best_in_all_episodes():
    args, model = made("finetune", "--n-shot", 2, "--n-eval", 4, "--epoch", 6)
    drawn, (learner,) = [episode_of(args) for _ in range(2)], model.learners
    drawn[1] = drawn[1]._replace(query=drawn[1].support.repeat_interleave(2, 0))
    totals = np.zeros(len(finetune.GRID))
    for episode in drawn:
        gradient, *_ = model.gradient(args, episode, learner)
        assert len(gradient) == 0
        for k, (rate, decay) in enumerate(finetune.GRID):
            with torch.no_grad():
                logits = model.tuned(args, episode, learner, (rate, decay))
            totals[k] += 100 * float((logits.argmax(1) == episode.query_y).double().mean())
    assert np.allclose(model.metalearner.accuracy.numpy(), totals, rtol=1e-5)
    assert len(set(totals)) > 1
    best = model.of_best(torch.arange(len(finetune.GRID)))
    assert int(best) == int(np.argmax(model.metalearner.accuracy.numpy()))


@pytest.mark.parametrize("method", ["sgd", "meta-sgd"])
def test_descent_and_its_gradient(method):
    args, model = made(method, "--n-shot", 2, "--grad-divisor", 3, "--bi-init", -1, 1)
    episode, rule = episode_of(args), model.metalearner
    assert rule.bI.numel() == (rule.cI.numel() if method == "meta-sgd" else 1)
    network = copy.deepcopy(model.learners[0]).train()

    def loss_and_grad(x, y):
        torch.nn.utils.vector_to_parameters(theta, network.parameters())
        loss = cross_entropy(network(x), y)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        return loss.item(), torch.cat([g.reshape(-1) for g in grads])

    theta, steps = (p.detach()[:, 0].clone() for p in (rule.cI, rule.bI.sigmoid()))
    total = torch.zeros_like(theta)
    for _ in range(args.epoch):
        grad = loss_and_grad(episode.support, episode.support_y)[1] / 3
        theta, total = theta - steps * grad, total + grad
    with torch.no_grad():
        c, losses = adapt(episode, model.learners[0], rule, 25)
    assert torch.allclose(c[:, 0], theta, rtol=1e-9)
    assert len(losses) == args.epoch
    loss, grad = loss_and_grad(episode.query, episode.query_y)
    of_steps = -grad * total * steps * (1 - steps)
    found, query_loss, _ = model.gradient(args, episode, *model.learners)
    assert float(query_loss) == pytest.approx(loss, rel=1e-9)
    expected = torch.cat((grad, of_steps if method == "meta-sgd" else of_steps.sum().view(1)))
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-12)


# ---- Training, resumption, tests ----


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lstm"])
def test_it_resumes_to_the_same_bits_and_is_tested(method, master, pretrained, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeded(train(master, whole, *begin(method, pretrained)))
    succeeded(train(master, parts, *begin(method, pretrained), episode=2))
    succeeded(train(master, parts, *flags_of(method), "--resume", "auto"))
    assert metrics(whole) == metrics(parts)
    assert_same(tensors(whole), tensors(parts))
    # fine-tuning chooses its rate on the validation classes: none are left to validate on
    assert len(metrics(whole, "val")) == (0 if method == "finetune" else 2)
    trained = tensors(whole)["metalearner"]
    before = tensors(whole, "meta-learner-2.pth.tar")["metalearner"]
    changed = {k for k in trained if not torch.equal(trained[k], before[k])}
    assert {"nearest": not changed, "finetune": changed == {"accuracy"}}.get(method, changed)
    for _ in range(2):
        succeeded(run_test(None, whole, "--episode-test", 3))
        content = json.loads(Path(f"{whole}-719/results.json").read_text())
        assert len(content["tests"]) == 1  # the second one replaces an equal first
    printed = succeeded(run_cli("--mode", "results", "--runs", f"{whole}-719"))
    assert f"| {'pretrained' if method == 'linear-head' else method}" in printed


def test_they_start_from_the_pretrained_convolutions(master, pretrained, head, tmp_path):
    network = tensors(pretrained)["network"]
    assert tensors(pretrained)["hyper_parameters"]["classifier"] == "linear"
    for method in ("nearest", "finetune"):
        flags = begin(method, pretrained)
        succeeded(train(master, tmp_path / method, *flags, episode=1, val_freq=0))
        own = tensors(tmp_path / method)["metalearner"]
        for name, value in network.items():
            same = torch.equal(own.get(f"network.{name}", value), value)
            assert same or "cls." in name or ("running" in name and method == "nearest"), name
    flags = ("--method", "nearest", "--init-from", f"{head}-719")
    succeeded(train(master, tmp_path / "again", *flags, episode=1, val_freq=0))
    one, two = (tensors(tmp_path / save)["metalearner"] for save in ("nearest", "again"))
    for name, value in one.items():  # the features of a head are those of its pre-training
        assert torch.allclose(two[name], value, atol=1e-6), name


# ---- A linear head ----


def test_its_backbone_is_the_pretrained_network(pretrained, head, master):
    """With the mean statistics of 20 episodes' images, and the last shift raised."""
    network, backbone = tensors(pretrained)["network"], tensors(head)["backbone"]
    learner = Conv4(16, 1e-3, 0.95, 6)
    learner.load_state_dict(network)
    learner.train().reset_batch_stats()
    for module in learner.children():
        module.momentum = None  # the mean of all batches
    shown = dataset("plain", master, n_shot=1, n_eval=2, length=methods.MEASURED)
    with torch.no_grad():
        for e in episodes(shown, 0, 0, CPU, False):
            learner(torch.cat((e.support, e.query)))
        learner.norm4.bias += 0.5 * learner.norm4.weight.abs()
    expected = {k: v for k, v in learner.state_dict().items() if not k.startswith("cls.")}
    assert expected.keys() == backbone.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            close = dict(rtol=0.05, atol=0.05) if "running" in name else {}  # grey levels are whole
            assert torch.allclose(backbone[name], value, **close), name


def test_the_head_alone_is_trained(head):
    assert tensors(head)["metalearner"]["metalstm.cI"].shape == (3 * (32 + 1), 1)
    assert_same(tensors(head, "meta-learner-2.pth.tar")["backbone"], tensors(head)["backbone"])


def test_plain_trains_and_tests_it_alike(pretrained, head, master, tmp_path):
    flags = (*begin("linear-head", pretrained), "--plain")
    succeeded(train(master, tmp_path / "logs", *flags, episode=2))
    found, expected = metrics(tmp_path / "logs", "train"), metrics(head, "train")
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    succeeded(run_test(None, tmp_path / "logs", "--episode-test", 2, "--plain"))


# ---- Refusals ----


@pytest.mark.parametrize("method", [*PRETRAINED, "lstm", "sgd"])
def test_a_start_from_another_kind_of_network_is_refused(method, master, pretrained, tmp_path):
    """20 pixels leave features as large as 16 do, and any size the same convolutions."""
    flags = ("--method", method, "--init-from", f"{pretrained}-719")
    for flag, value in (("--image-size", 20), ("--filters", 16), ("--pixels", "unit")):
        done = train(master, tmp_path / "logs", *flags, flag, value)
        refused(done, f"{flag} {value}", pretrained)
    assert not Path(f"{tmp_path}/logs-719").exists()


def test_other_refusals(master, pretrained, head, tmp_path):
    save, init = tmp_path / "logs", ("--init-from", f"{pretrained}-719")
    for method in PRETRAINED:
        refused(train(master, save, "--method", method), f"--method {method}", "--init-from")
    for method in ("matching", "matching-fce", "protonet"):
        refused(train(master, save, "--method", method, *init), "--init-from", method)
    succeeded(train(master, tmp_path / "net", "--method", "protonet", episode=1, val_freq=0))
    net = ("--init-from", f"{tmp_path}/net-719")
    refused(train(master, save, "--method", "nearest", *net), "net-719", "pretrain")
    refused(train(master, save, "--method", "linear-head", "--init-from", f"{head}-719"), head)
    refused(pretrain(master, save, "--resume", f"{head}-719"), head, "--save")
    second = ("--second-order", "true")
    refused(train(master, save, "--method", "protonet", *second), "--second-order", "protonet")
    for flags in (("--tta-permutations", 2), ("--tta-flip", "true"), ("--transductive", "true")):
        refused(run_test(None, tmp_path / "net", *flags), flags[0], "protonet")
    refused(run_test(None, head, "--transductive", "true"), "--transductive")
    refused(train(master, save, "--method", "protonet", "--meta-batch", 2), "--meta-batch 2")
    predict = ("--mode", "predict", "--save", tmp_path / "net", "--cpu")
    refused(run_cli(*predict, "--support", master, "--query", master), "--mode predict", "protonet")
    refused(train(master, save, "--classifier", "linear"), "--classifier linear")
    refused(train(master, save, "--method", "finetune", *init, "--shots", 1, 5), "--shots 1 5")
    for run, method in ((tmp_path / "net", "sgd"), (head, "lstm")):
        refused(train(master, run, "--method", method, "--resume", "auto"), f"--method {method}")


def test_changed_images_are_named_where_they_are(data, pretrained, tmp_path):
    """Fine-tuning trains on the validation classes."""
    flags = begin("finetune", pretrained)
    succeeded(train(data, tmp_path / "logs", *flags, episode=1, val_freq=0))
    next((data / "val").glob("*/*")).unlink()
    flags = (*flags_of("finetune"), "--resume", "auto")
    refused(train(data, tmp_path / "logs", *flags, episode=2, val_freq=0), data / "val")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_start_that_has_seen_a_class_is_refused(split, data, pretrained, tmp_path):
    """Its folder has moved from train/ since; validation would choose by it."""
    (data / "train" / "class 0").rename(data / split / "class 0")
    done = train(data, tmp_path / "logs", *begin("linear-head", pretrained))
    refused(done, data / split, "class 0")
