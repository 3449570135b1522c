"""A linear head on frozen features, trained in each episode by the LSTM meta-learner.

It is an ordinary episode of a linear ``FlatModule``: ``Model.embed`` turns the images into the
features of a pre-trained Conv4, whose batch norm uses statistics of training images, and
``episode.updates`` trains the head on them. (Bronskill et al., "TaskNorm", 2020, compare the
statistics that a few-shot learner may use.)
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from dataloader import EpisodeDataset, episodes
from engine.backend import Backend, make_learner, make_metalearner
from engine.checkpoint import load_init, load_weights
from engine.model import Model
from learner import N_BLOCKS, FlatModule
from utils import UserError

MEASURED = 20  # training episodes whose images' batch statistics are averaged


class LinearHead(FlatModule):
    """A linear classifier of ``n_features`` numbers, starting at zero."""

    def __init__(self, n_features: int, n_classes: int):
        super().__init__()
        self.cls = nn.Linear(n_features, n_classes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [B, n_classes] of features [B, n_features]."""
        return self.cls(x)


def build_linear_head(args: argparse.Namespace, backend: Backend) -> Model:
    """Make the pair of heads, their meta-learner, and a backbone with random weights."""
    backbone = make_learner(args, backend)
    head = LinearHead(backbone.cls.in_features, args.n_class).to(backend.device)
    backbone.cls = nn.Identity()
    backbone.eval().requires_grad_(False)
    return Model(head, copy.deepcopy(head), make_metalearner(args, backend, head), backbone)


@torch.no_grad()
def load_backbone(
    model: Model, content: dict, path: Path, args: argparse.Namespace, train_set: EpisodeDataset
) -> None:
    """Start from a pre-training: its convolutions, and batch statistics of training images.

    ``--bn-shift`` then raises the shift of the last batch norm by so many standard deviations of
    its output: a long pre-training leaves 85 % of the features at zero, and a higher shift brings
    some back (docs/pretrained.md).

    Raises:
        UserError: the checkpoint is no pre-training, or its network does not fit.
    """
    if content.get("mode") != "pretrain":
        raise UserError(f"{path}: --method linear-head starts from a run of --mode pretrain")
    backbone = model.backbone
    kept = {k: v for k, v in content["network"].items() if not k.startswith("cls.")}
    load_weights({"network": backbone}, {"network": kept}, path)
    device = next(backbone.parameters()).device
    norms = [backbone.get_submodule(f"norm{b}") for b in range(1, N_BLOCKS + 1)]
    momentum = norms[0].momentum
    backbone.train()
    for k, episode in enumerate(episodes(train_set.first(MEASURED), 0, 0, device, False), 1):
        for norm in norms:
            norm.momentum = 1 / k  # a plain average over the batches
        backbone(torch.cat((episode.support, episode.query)))
    for norm in norms:
        norm.momentum = momentum
    backbone.eval()
    norms[-1].bias.add_(args.bn_shift * norms[-1].weight.abs())


def initialise(
    args: argparse.Namespace,
    model: Model,
    origin: tuple[Path, dict] | None,
    train_set: EpisodeDataset,
) -> None:
    """Start from the checkpoint that ``--init-from`` names, if there is one.

    Raises:
        UserError: it does not fit, or a linear head has none.
    """
    if origin is not None and args.method == "linear-head":
        load_backbone(model, *reversed(origin), args, train_set)
    elif origin is not None:
        load_init(model, *reversed(origin))
    elif args.method == "linear-head":
        raise UserError("--method linear-head: needs --init-from, a run of --mode pretrain")
