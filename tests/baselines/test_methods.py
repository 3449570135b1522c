"""The methods besides the paper's: each against its formula in float64 or NumPy, each trains,
resumes to the same bits, and is tested; what cannot be is refused by name.
"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    assert_same,
    make,
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
from torch.nn.functional import cross_entropy

from baselines import finetune, methods
from baselines.pretrain import pretrain_batch
from engine.backend import select_backend
from engine.flags import INNER_LOOP, METHODS, PRETRAINED, parse, resolve
from engine.folder import _check_meta_batch
from episode import adapt, train_episode
from learner import Conv4
from utils import UserError

SCRATCH = tuple(m for m in METHODS if m not in (*PRETRAINED, "lstm"))
FLAGS = {"finetune": ("--epoch", 3, "--batch-size", 3)}


def settings(method, *flags):
    return resolve(parse([*SMALL, "--method", method, *map(str, flags)]))


def made(method, *flags, plain=True):
    """A method's model in float64 with random weights everywhere, batch norm's statistics too."""
    args = settings(method, *flags, *["--plain"] * plain)
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
    """NumPy features of the support and query images, by a network of the root in eval mode."""
    ordinary = Conv4(16, 1e-3, 0.95, 3).double()
    missing, _ = ordinary.load_state_dict(network.state_dict(), strict=False)
    assert all(name.startswith("cls.") for name in missing)
    with torch.no_grad():
        return [ordinary.eval().features(x).numpy() for x in (episode.support, episode.query)]


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.fixture(scope="module")
def pretrained(master, tmp_path_factory):
    """A network with a linear classifier of the training classes."""
    save = tmp_path_factory.mktemp("pretrained") / "logs"
    succeeded(pretrain(master, save, "--classifier", "linear", "--val-freq", 0, episode=2))
    return save


def test_pretraining_with_a_linear_classifier(pretrained, backend):
    assert tensors(pretrained)["hyper_parameters"]["classifier"] == "linear"
    episode, network, *_ = make(backend)
    x, y = (torch.cat(pair) for pair in (episode[::2][:2], episode[1::2]))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    network.reset_batch_stats()
    first = cross_entropy(copy.deepcopy(network).train()(x), y)
    how = (episode, network, optimizer, 1000)
    losses = [float(pretrain_batch(*how, classifier="linear")[0]) for _ in range(20)]
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    """Fine-tuning tries a few of its pairs only, for time."""
    monkeypatch.setattr(finetune, "GRID", finetune.GRID[3:24:7])


def start(method, pretrained):
    return ("--init-from", f"{pretrained}-719") if method in PRETRAINED else ()


# ---- Formulas ----


def test_a_prototype_is_the_mean_of_its_class():
    args, model = made("protonet", "--n-shot", 3)
    episode = episode_of(args)
    support, query = embedded(episode, model.metalearner.embedding)
    labels = episode.support_y.numpy()
    means = [support[labels == c].mean(0) for c in range(3)]
    expected = [[-((x - mean) ** 2).sum() for mean in means] for x in query]
    found = model.metalearner.eval()(episode).detach().numpy()
    assert np.allclose(found, expected, rtol=1e-9)
    loss = cross_entropy(torch.tensor(np.array(expected)), episode.query_y)
    assert float(model.evaluate(args, episode)[0]) == pytest.approx(float(loss), rel=1e-9)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, h, c, weights):
    """One step of an LSTM; PyTorch's order of the gates is i, f, g, o."""
    w_x, w_h, b_x, b_h = weights
    i, f, g, o = np.split(w_x @ x + b_x + w_h @ h + b_h, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def in_context(support, query, weights):
    """Full context embeddings, one image after another."""
    zero = np.zeros(support.shape[1])
    new = support.copy()
    for suffix, places in (("", range(len(support))), ("_reverse", range(len(support))[::-1])):
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        part, h, c = [weights[f"support_lstm.{n}{suffix}"] for n in names], zero, zero
        for k in places:
            h, c = lstm(support[k], h, c, part)
            new[k] += h
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    part, embedded_query = [weights[f"query_lstm.{n}"] for n in names], []
    for x in query:
        h, c, read = zero, zero, new.mean(0)
        for _ in range(3):
            h, c = lstm(np.concatenate((x, read)), h, c, part)
            h = h + x
            attention = np.exp([h @ s - (new @ h).max() for s in new])
            read = (attention[:, None] * new).sum(0) / attention.sum()
        embedded_query.append(h)
    return new, np.array(embedded_query)


@pytest.mark.parametrize("method", ["matching", "matching-fce"])
def test_a_logit_is_the_sum_of_the_cosines_to_a_class(method):
    args, model = made(method, "--n-shot", 2)
    episode = episode_of(args)
    network, order = model.metalearner, episode.order[0].numpy()
    support, query = embedded(episode, network.embedding)
    support, labels = support[order], episode.support_y.numpy()[order]
    if method == "matching-fce":
        weights = {k: v.numpy() for k, v in network.context.state_dict().items()}
        support, query = in_context(support, query, weights)
    cosines = np.array([[cosine(x, s) for s in support] for x in query])
    expected = np.stack([cosines[:, labels == c].sum(1) for c in range(3)], axis=1)
    assert np.allclose(network.eval()(episode).detach().numpy(), expected, rtol=1e-8)


def test_full_context_starts_as_none():
    args = settings("matching-fce")
    model = methods.BUILDERS["matching-fce"](args, select_backend(args))
    network, episode = model.metalearner.eval(), new_episode(n_shot=1)
    found, network.context = network(episode), None
    assert torch.allclose(found, network(episode), atol=1e-6)


def test_the_nearest_neighbour_decides():
    args, model = made("nearest", "--n-shot", 3)
    episode = episode_of(args)
    support, query = embedded(episode, model.metalearner.network)
    cosines = np.array([[cosine(x, s) for s in support] for x in query])
    labels = episode.support_y.numpy()
    expected = np.stack([cosines[:, labels == c].max(1) for c in range(3)], axis=1)
    assert np.allclose(model.metalearner.eval()(episode).numpy(), expected, rtol=1e-9)
    right = (labels[cosines.argmax(1)] == episode.query_y.numpy()).mean()
    assert float(model.evaluate(args, episode)[1]) == pytest.approx(100 * right)


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
    network = copy.deepcopy(model.learner_w_grad)
    steps, total = sigmoid(rule.bI.detach().numpy()[:, 0]), 0
    theta = rule.cI.detach().numpy()[:, 0].copy()
    for _ in range(args.epoch):
        torch.nn.utils.vector_to_parameters(torch.tensor(theta), network.parameters())
        loss = cross_entropy(network.train()(episode.support), episode.support_y)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        grad = torch.cat([g.reshape(-1) for g in grads]).numpy() / 3
        theta, total = theta - steps * grad, total + grad
    with torch.no_grad():
        c, losses = adapt(episode, model.learner_w_grad, rule, 25)
    assert np.allclose(c.numpy()[:, 0], theta, rtol=1e-9)
    assert len(losses) == args.epoch
    torch.nn.utils.vector_to_parameters(torch.tensor(theta), network.parameters())
    loss = cross_entropy(network(episode.query), episode.query_y)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    grad = torch.cat([g.reshape(-1) for g in grads]).numpy()
    of_steps = -grad * total * steps * (1 - steps)
    expected = np.concatenate((grad, of_steps if method == "meta-sgd" else [of_steps.sum()]))
    found, query_loss, _ = model.gradient(args, episode, *model.learners)
    assert float(query_loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert np.allclose(found.numpy(), expected, rtol=1e-7, atol=1e-12)


# ---- Training, resumption, tests ----


@pytest.mark.parametrize("method", SCRATCH)
def test_it_learns(method):
    """Over and over from the same few images, in which it finds the classes again."""
    args = settings(method, "--n-shot", 2, "--n-eval", 4, "--bi-init", 0, 0, "--grad-divisor", 1)
    model = methods.BUILDERS[method](args, select_backend(args))
    centres = torch.randn(6, 3, 16, 16)
    optimizer = torch.optim.Adam(model.metalearner.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        images = centres[torch.randperm(6)[:3]].unsqueeze(1) + 1.2 * torch.randn(3, 6, 3, 16, 16)
        drawn = new_episode(3, 2, 4)
        support, query = images[:, :2].flatten(0, 1), images[:, 2:].flatten(0, 1)
        drawn = drawn._replace(support=support, query=query)
        if method in INNER_LOOP:
            loss = train_episode(drawn, *model.learners, model.metalearner, optimizer, 25, 10)[0]
        else:
            gradient, loss, _ = model.gradient(args, drawn)
            parts = gradient.split([p.numel() for p in model.metalearner.parameters()])
            for p, part in zip(model.metalearner.parameters(), parts, strict=True):
                p.grad = part.view_as(p)
            optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4]), losses


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lstm", "linear-head")])
def test_it_resumes_to_the_same_bits_and_is_tested(method, master, pretrained, tmp_path):
    flags = ("--method", method, *FLAGS.get(method, ()))
    begin = (*flags, *start(method, pretrained))
    succeeded(train(master, tmp_path / "whole", *begin))
    succeeded(train(master, tmp_path / "parts", *begin, episode=2))
    succeeded(train(master, tmp_path / "parts", *flags, "--resume", "auto"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert_same(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    assert len(metrics(tmp_path / "whole", "val")) == 2
    trained = tensors(tmp_path / "whole")["metalearner"]
    before = tensors(tmp_path / "whole", "meta-learner-2.pth.tar")["metalearner"]
    changed = {k for k in trained if not torch.equal(trained[k], before[k])}
    assert changed == ({"accuracy"} if method == "finetune" else set()) or method in SCRATCH
    assert changed or method == "nearest"
    for _ in range(2):
        succeeded(run_test(None, tmp_path / "whole", "--episode-test", 3))
        content = json.loads(Path(f"{tmp_path}/whole-719/results.json").read_text())
        assert len(content["tests"]) == 1  # the second one replaces an equal first
    printed = succeeded(run_cli("--mode", "results", "--runs", f"{tmp_path / 'whole'}-719"))
    assert f"| {method}" in printed


def test_they_start_from_the_pretrained_convolutions(master, pretrained, tmp_path):
    network = tensors(pretrained)["network"]
    for method in ("nearest", "finetune"):
        flags = ("--method", method, *start(method, pretrained))
        succeeded(train(master, tmp_path / method, *flags, episode=1, val_freq=0))
        own = tensors(tmp_path / method)["metalearner"]
        for name, value in network.items():
            same = torch.equal(own.get(f"network.{name}", value), value)
            assert same or "cls." in name or ("running" in name and method == "nearest"), name
    flags = ("--method", "linear-head", "--bn-shift", 0.5, *start("linear-head", pretrained))
    succeeded(train(master, tmp_path / "head", *flags))
    flags = ("--method", "nearest", "--init-from", f"{tmp_path}/head-719")
    succeeded(train(master, tmp_path / "again", *flags, episode=1, val_freq=0))
    one, two = (tensors(tmp_path / save)["metalearner"] for save in ("nearest", "again"))
    for name, value in one.items():  # the features of a head are those of its pre-training
        assert torch.allclose(two[name], value, atol=1e-6), name


# ---- Refusals ----


@pytest.mark.parametrize("method", [*PRETRAINED, "lstm", "sgd"])
def test_a_start_from_another_kind_of_network_is_refused(method, master, pretrained, tmp_path):
    """20 pixels leave features as large as 16 do, and any size the same convolutions."""
    flags = ("--method", method, "--init-from", f"{pretrained}-719")
    for flag, value in (("--image-size", 20), ("--filters", 16), ("--pixels", "unit")):
        done = train(master, tmp_path / "logs", *flags, flag, value)
        refused(done, f"{flag} {value}", pretrained)
    assert not Path(f"{tmp_path}/logs-719").exists()


def test_other_refusals(master, pretrained, tmp_path):
    save, begin = tmp_path / "logs", ("--init-from", f"{pretrained}-719")
    for method in PRETRAINED:
        refused(train(master, save, "--method", method), f"--method {method}", "--init-from")
    for method in ("matching", "matching-fce", "protonet"):
        refused(train(master, save, "--method", method, *begin), "--init-from", method)
    succeeded(train(master, tmp_path / "net", "--method", "protonet", episode=1, val_freq=0))
    net = ("--init-from", f"{tmp_path}/net-719")
    refused(train(master, save, "--method", "nearest", *net), "net-719", "pretrain")
    second = ("--second-order", "true")
    refused(train(master, save, "--method", "protonet", *second), "--second-order", "protonet")
    for flags in (("--tta-permutations", 2), ("--tta-flip", "true"), ("--transductive", "true")):
        refused(run_test(None, tmp_path / "net", *flags), flags[0], "protonet")
    refused(train(master, save, "--method", "protonet", "--meta-batch", 2), "--meta-batch 2")
    predict = ("--mode", "predict", "--save", tmp_path / "net", "--cpu")
    refused(run_cli(*predict, "--support", master, "--query", master), "--mode predict", "protonet")
    refused(train(master, save, "--classifier", "linear"), "--classifier linear")
    refused(train(master, save, "--method", "finetune", *begin, "--shots", 1, 5), "--shots 1 5")
    refused(train(master, tmp_path / "net", "--method", "sgd", "--resume", "auto"), "--method sgd")


def test_several_processes_are_refused_with_advice_that_works():
    with pytest.raises(UserError, match="without torchrun"):
        _check_meta_batch(settings("protonet"), 0, 2)


def test_changed_images_are_named_where_they_are(data, pretrained, tmp_path):
    """Fine-tuning trains on the validation classes."""
    flags = ("--method", "finetune", *FLAGS["finetune"])
    begin = (*flags, *start("finetune", pretrained))
    succeeded(train(data, tmp_path / "logs", *begin, episode=1, val_freq=0))
    next((data / "val").glob("*/*")).unlink()
    done = train(data, tmp_path / "logs", *flags, "--resume", "auto", episode=2, val_freq=0)
    refused(done, data / "val")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_start_that_has_seen_a_class_is_refused(split, data, pretrained, tmp_path):
    """Its folder has moved from train/ since; validation would choose by it."""
    (data / "train" / "class 0").rename(data / split / "class 0")
    flags = ("--method", "linear-head", *start("linear-head", pretrained))
    refused(train(data, tmp_path / "logs", *flags), data / split, "class 0")


def test_pretraining_looks_for_leaks(data, tmp_path):
    shutil.copytree(data / "train" / "class 0", data / "test" / "class 0")
    run = ("--mode", "pretrain", "--data-root", data, "--save", tmp_path / "logs", "--cpu")
    refused(run_cli(*run), data, "class 0")
