"""How each ``--method`` other than the paper's is built, and what ``--init-from`` loads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from baselines import descent, episodic, finetune, linear_head, matching
from baselines.nearest import NearestModel, NearestNeighbour
from baselines.pretrain import PretrainModel
from baselines.protonet import PrototypicalNetwork
from dataloader import EpisodeDataset
from engine.backend import Backend, make_learner
from engine.checkpoint import load_weights
from engine.flags import PRETRAINED, comparable, flag_name
from engine.model import Trainable
from learner import N_BLOCKS
from utils import UserError

# by --method, and of --mode pretrain
BUILDERS: dict[str, Callable[[argparse.Namespace, Backend], Trainable]] = {
    "sgd": descent.build,
    "meta-sgd": descent.build,
    "linear-head": linear_head.build,
    "nearest": partial(episodic.build, NearestNeighbour, model=NearestModel),
    "finetune": finetune.build,
    "matching": partial(episodic.build, matching.MatchingNetwork),
    "matching-fce": partial(episodic.build, matching.with_context),
    "protonet": partial(episodic.build, PrototypicalNetwork),
    "pretrain": lambda args, backend: PretrainModel(make_learner(args, backend)),
}
MEASURED = 20  # training episodes whose images' batch statistics are averaged
SAME = ("image_size", "filters", "pixels", "learner")  # as in the training that --init-from names


def training_splits(args: argparse.Namespace) -> dict[str, str]:
    """The splits that training and validation read; fine-tuning only chooses its rate, and
    pre-training is not validated.
    """
    if args.method == "finetune":
        return {"train": "val"}
    validated = args.val_freq and args.mode != "pretrain"
    return {"train": "train"} | ({"val": "val"} if validated else {})


def load_start(
    args: argparse.Namespace,
    model: Trainable,
    origin: tuple[Path, dict] | None,
    train_set: EpisodeDataset,
) -> None:
    """Start from the checkpoint that ``--init-from`` names, if there is one.

    Raises:
        UserError: it does not fit, or a method that needs one has none.
    """
    if origin is None:
        if args.method in PRETRAINED:
            raise UserError(f"--method {args.method}: needs --init-from, a run of --mode pretrain")
        return
    path, content = origin
    for name in SAME:
        value, stored = getattr(args, name), content.get("hyper_parameters", {}).get(name)
        if stored is not None and comparable(stored) != comparable(value):
            flag = f"{flag_name(name)} {value}"
            raise UserError(f"{flag}: {path} was trained with {stored}; give that")
    if args.method not in PRETRAINED:
        if content.get("mode") != "pretrain":
            load_weights({"metalearner": model.metalearner}, content, path)
            return
        learner = model.learners[0]
        _load_convolutions(learner, content, path, args.method)
        for parameter in learner.cls.parameters():  # of other classes
            nn.init.zeros_(parameter)
        model.metalearner.init_cI(learner.get_flat_params())
        return
    network = model.backbone if args.method == "linear-head" else model.metalearner.network
    _load_convolutions(network, content, path, args.method)
    if content.get("mode") == "pretrain" and args.method != "finetune":
        measure_statistics(network, train_set)
    shifted = content.get("hyper_parameters", {}).get("bn_shift", 0)  # the features of a head
    norm = network.get_submodule(f"norm{N_BLOCKS}")
    with torch.no_grad():  # see docs/pretrained.md
        norm.bias.add_((args.bn_shift - shifted) * norm.weight.abs())


def _load_convolutions(network: nn.Module, content: dict, path: Path, method: str) -> None:
    """Load all but the classifier of a pre-training, or of the features of a linear head."""
    weights = content["network"] if content.get("mode") == "pretrain" else content.get("backbone")
    if weights is None or (method == "linear-head" and "backbone" in content):
        raise UserError(f"{path}: --method {method} starts from a run of --mode pretrain")
    kept = {k: v for k, v in weights.items() if not k.startswith("cls.")}
    own = {k: v for k, v in network.state_dict().items() if k.startswith("cls.")}
    load_weights({"network": network}, {"network": kept | own}, path)


@torch.no_grad()
def measure_statistics(network: nn.Module, train_set: EpisodeDataset) -> None:
    """Set batch norm's running statistics to the mean over the first training episodes' images."""
    device = next(network.parameters()).device
    norms = [network.get_submodule(f"norm{b}") for b in range(1, N_BLOCKS + 1)]
    momentum = norms[0].momentum
    network.train()
    for k in range(MEASURED):
        episode = train_set.deliver(train_set[k], device)
        for norm in norms:
            norm.momentum = 1 / (k + 1)  # a plain average over the batches
        network(torch.cat((episode.support, episode.query)))
    for norm in norms:
        norm.momentum = momentum
    network.eval()
