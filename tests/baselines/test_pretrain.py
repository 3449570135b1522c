"""Pre-training: the learner classifies all training classes; a meta-learner begins with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, DATASETS
from test_cli import expect, metrics, tensors, train
from test_dataloader import dataset, same
from test_episode import make
from torch.nn.functional import cross_entropy

import main
from baselines.pretrain import MEASURED, pretrain_batch
from dataloader import episodes, eval_image, load_image, scan_split, to_input
from learner import Conv4

TINY = [
    "--cpu",
    "--image-size",
    "16",
    "--n-shot",
    "1",
    "--n-eval",
    "2",
    "--hidden-size",
    "4",
    "--log-freq",
    "1",
]
TINY += ["--n-workers", "0", "--plots", "false"]


def pretrain(data, save, *flags, episode=4):
    argv = [
        "--mode",
        "pretrain",
        "--data-root",
        str(data),
        "--save",
        str(save),
        "--episode",
        str(episode),
        "--val-freq",
        "2",
    ]
    return main.run([*argv, *TINY, *flags])


@pytest.fixture(scope="module")
def pretrained(master, tmp_path_factory):
    save = tmp_path_factory.mktemp("pretrained") / "logs"
    assert pretrain(master, save) == 0
    return save


# ---- The update ----


def test_it_is_adam_on_the_loss_of_a_classifier_by_cosines(way):
    episode, learner, _, meta = make(way, dtype=torch.float64)
    optimizer, gates = (
        torch.optim.Adam(meta.parameters(), lr=1e-2),
        {k: v.clone() for k, v in meta.state_dict().items()},
    )
    _, ordinary, *_ = make(way, dtype=torch.float64)
    theirs = torch.optim.Adam(ordinary.parameters(), lr=1e-2)
    x, y = (
        torch.cat((episode.support, episode.query)),
        torch.cat((episode.support_y, episode.query_y)),
    )
    for _ in range(5):
        loss, percent, skipped = pretrain_batch(episode, learner, meta, optimizer, 1e6)
        ordinary.reset_batch_stats()
        logits = 10 * torch.cosine_similarity(
            ordinary.features(x)[:, None], ordinary.cls.weight, dim=2
        )
        expected = cross_entropy(logits, y)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        assert torch.allclose(loss, expected, rtol=1e-9)
        assert float(percent) == pytest.approx(
            100 * float((logits.argmax(1) == y).double().mean()), rel=1e-6
        )
        assert not skipped
    moved = [
        name for name, value in meta.state_dict().items() if not torch.equal(value, gates[name])
    ]
    assert moved == ["metalstm.cI"]
    # the gradient of a bias under batch normalisation is noise, which Adam makes large; cosines do
    # not use the classifier's
    kept = [
        name
        for name, _ in ordinary.named_parameters()
        if not (name.startswith("conv") and name.endswith("bias"))
    ]
    learner.copy_flat_params(meta.metalstm.cI)
    for name in kept:
        assert torch.allclose(
            learner.get_parameter(name), ordinary.get_parameter(name), rtol=1e-6, atol=1e-9
        ), name


def test_a_loss_that_is_not_finite_changes_nothing(way):
    episode, learner, _, meta = make(way)
    optimizer, before = torch.optim.Adam(meta.parameters()), meta.metalstm.cI.clone()
    episode.support[0, 0, 0, 0] = torch.nan
    assert pretrain_batch(episode, learner, meta, optimizer, 0.25)[2]
    assert torch.equal(meta.metalstm.cI, before)


def test_a_class_has_the_same_label_in_every_batch(way, master):
    batches = dataset(way, master, n_class=6, n_shot=1, n_eval=2, in_order=True)
    drawn = dataset(way, master, n_class=6, n_shot=1, n_eval=2)
    names = [
        [batches.files[number].parent.name for number in batches.numbers(index)]
        for index in range(6)
    ]
    in_order = [f"class {c}" for c in range(6)]
    assert names == [in_order + [name for name in in_order for _ in range(2)]] * 6
    assert batches.numbers(0).tolist() != drawn.numbers(0).tolist()
    assert sorted(batches.numbers(0)) == sorted(drawn.numbers(0))  # the same images
    assert len({tuple(batches.numbers(index)) for index in range(6)}) == 6


# ---- The run ----


def test_it_learns_and_keeps_its_gates(pretrained, tmp_path, master):
    assert [m["episode"] for m in metrics(pretrained)] == [1, 2, 3, 4]
    stored = tensors(pretrained)
    assert stored["hyper_parameters"]["n_class"] == 6
    assert (
        pretrain(master, tmp_path / "long", "--lr", "1e-2", "--augment", "mirror", episode=80) == 0
    )
    losses = [m["loss"] for m in metrics(tmp_path / "long")]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    long = tensors(tmp_path / "long")["metalearner"]
    assert [k for k, v in long.items() if not torch.equal(v, stored["metalearner"][k])] == [
        "metalstm.cI"
    ]


def test_it_resumes_to_the_same_bits(pretrained, tmp_path, master):
    save = tmp_path / "logs"
    assert pretrain(master, save, episode=2) == 0
    assert pretrain(master, save, "--resume", "auto") == 0
    assert metrics(save) == metrics(pretrained)
    ours, theirs = tensors(save)["metalearner"], tensors(pretrained)["metalearner"]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_training_begins_with_its_convolutions_and_an_empty_classifier(
    pretrained, tmp_path, master
):
    save = tmp_path / "logs"
    gates = ["--bi-init", "0.5", "0.6"]
    assert (
        train(
            master,
            save,
            "--start",
            f"{pretrained}-719",
            "--lr",
            "1e-30",
            *gates,
            episode=1,
            val_freq=0,
        )
        == 0
    )
    cI, theirs = (tensors(name)["metalearner"]["metalstm.cI"] for name in (save, pretrained))
    assert (
        0.5 <= tensors(save)["metalearner"]["metalstm.bI"] <= 0.6
    )  # pre-training leaves the gates to this training
    n = 32 + 1  # features of a 16-pixel image, and the bias
    assert torch.equal(cI[: -3 * n], theirs[: -6 * n])
    assert cI[-3 * n :].abs().max() < 1e-20
    assert tensors(save)["hyper_parameters"]["n_class"] == 3
    assert tensors(save)["about"]["started_from"] == {
        "checkpoint": "logs-719/meta-learner-last.pth.tar",
        "episode": 4,
    }
    # without the seed, the folder of this training's seed is meant
    short = tmp_path / "short"
    assert (
        train(
            master,
            short,
            "--start",
            str(pretrained),
            "--lr",
            "1e-30",
            *gates,
            episode=1,
            val_freq=0,
        )
        == 0
    )
    assert torch.equal(tensors(short)["metalearner"]["metalstm.cI"], cI)
    assert tensors(short)["about"]["started_from"] == tensors(save)["about"]["started_from"]


def test_statistics_of_training_images_become_part_of_the_filters(pretrained, tmp_path, master):
    save, first = tmp_path / "logs", tmp_path / "first"
    flags = ["--adapt", "classifier", "--bn-shift", "0.5", "--lr", "1e-30"]
    assert (
        train(master, first, "--start", f"{pretrained}-719", "--lr", "1e-30", episode=1, val_freq=0)
        == 0
    )
    assert train(master, save, "--start", f"{pretrained}-719", *flags, val_freq=2) == 0
    ours, theirs = (Conv4(16, 1e-3, 0.95, 3, adapt=adapt) for adapt in ("classifier", "all"))
    ours.copy_flat_params(tensors(save)["metalearner"]["metalstm.cI"])
    theirs.copy_flat_params(tensors(first)["metalearner"]["metalstm.cI"])
    shown = dataset("plain", master, n_class=3, n_shot=1, n_eval=2, length=MEASURED)
    batches = [torch.cat((e.support, e.query)) for e in episodes(shown, 0, 0, CPU, False)]
    for norm in (theirs.norm1, theirs.norm2, theirs.norm3, theirs.norm4):
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        theirs.train()
        theirs.reset_batch_stats()
        for x in batches:
            theirs(x)
        theirs.eval()
        theirs.norm4.bias += 0.5 * theirs.norm4.weight.abs()
        assert torch.allclose(ours.train()(batches[0]), theirs(batches[0]), rtol=1e-3, atol=1e-5)
    # once only: not when it resumes, and not by a training that begins with it
    cI = tensors(save)["metalearner"]["metalstm.cI"]
    assert train(master, save, "--resume", "auto", "--lr", "1e-30", episode=6, val_freq=2) == 0
    assert torch.allclose(tensors(save)["metalearner"]["metalstm.cI"], cI, atol=1e-20)
    assert (
        train(master, tmp_path / "next", "--start", f"{save}-719", *flags, episode=1, val_freq=0)
        == 0
    )
    assert torch.allclose(tensors(tmp_path / "next")["metalearner"]["metalstm.cI"], cI, atol=1e-20)


def test_refusals(pretrained, tmp_path, master, capsys):
    save = tmp_path / "logs"
    expect(capsys, pretrain(master, save, "--n-class", "3"), "--n-class 3", "all 6 classes")
    expect(capsys, pretrain(master, save, "--meta-batch", "2"), "--meta-batch 2", "pretrain")
    expect(
        capsys, pretrain(master, save, "--adapt", "classifier"), "--adapt classifier", "pretrain"
    )
    expect(
        capsys, pretrain(master, save, "--bn-shift", "0.4"), "--bn-shift 0.4", "--adapt classifier"
    )
    start = f"{pretrained}-719"
    for n in ("16", "64", "33"):
        expect(
            capsys,
            train(master, save, "--start", start, "--filters", n),
            "metalstm.cI",
            "--filters",
        )
    expect(
        capsys,
        train(master, save, "--start", start, "--image-size", "64"),
        "metalstm.cI",
        "--image-size",
    )
    found = train(master, save, "--start", str(pretrained), "--seed", "53")
    expect(
        capsys, found, f"--start {pretrained}: there is neither {pretrained} nor {pretrained}-53"
    )
    expect(
        capsys,
        train(master, save, "--resume", start, "--n-class", "6"),
        start,
        "--mode pretrain",
        "--start",
    )
    assert not Path(f"{save}-719").exists()
    assert train(master, save) == 0
    expect(
        capsys, pretrain(master, save, "--resume", "auto"), f"{save}-719", "--mode train", "--save"
    )


def test_a_pretrained_learner_alone_cannot_be_tested(pretrained, master, capsys):
    argv = [
        "--mode",
        "test",
        "--data-root",
        str(master),
        "--save",
        str(pretrained),
        "--cpu",
        "--n-workers",
        "0",
    ]
    expect(capsys, main.run(argv), "pre-trained", f"--start {pretrained}-719")


# ---- Mirrored images ----


def test_training_images_are_mirrored_at_random(way, master):
    ours = dataset(way, master, augment="mirror", pixels="unit")
    plain = dataset(way, master, augment="none", pixels="unit")
    same_side = []
    for a, b in zip(
        episodes(ours, 0, 0, CPU, False), episodes(plain, 0, 0, CPU, False), strict=True
    ):
        for x, y in zip(
            torch.cat((a.support, a.query)), torch.cat((b.support, b.query)), strict=True
        ):
            same_side.append((x - y).abs().max() < 1e-6)
            assert same_side[-1] or (x - y.flip(2)).abs().max() < 1e-2  # Pillow rounds
    assert 0.3 < np.mean(same_side) < 0.7
    for split in ("val", "test"):
        a, b = (
            next(episodes(dataset(way, master, split, augment=how), 0, 0, CPU, False))
            for how in ("mirror", "none")
        )
        assert same(a, b)


def test_both_ways_mirror_the_same_images(master):
    found = [
        next(episodes(dataset(way, master, augment="mirror"), 0, 0, CPU, False)) for way in DATASETS
    ]
    assert all(
        (a - b).abs().mean() < 0.02 for a, b in zip(found[0][:1], found[-1][:1], strict=True)
    )


def test_evaluation_squashes(master):
    path = scan_split(master, "val").files[0][0]
    a, b = (to_input([eval_image(load_image(path), 16, how)], "unit") for how in ("mirror", "none"))
    assert torch.equal(a, b)
