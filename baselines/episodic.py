"""Methods without an inner loop: a network reads a whole episode and classifies its query set."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.backend import Backend, make_learner
from engine.model import Trainable
from episode import Episode, accuracy, trainable_parameters
from learner import FlatModule, flat_gradient


class EpisodicModel(Trainable):
    """A module ``forward(episode) -> logits`` [n_class * n_eval, n_class], trained by episodes.

    It stands in ``metalearner``'s place: it is what the optimiser trains and a checkpoint holds.
    """

    def gradient(self, args: argparse.Namespace, episode: Episode) -> tuple[Tensor, ...]:
        """See ``engine.model.Trainable``; in train mode."""
        return classification(self.metalearner, self.metalearner.train()(episode), episode.query_y)

    @torch.no_grad()
    def evaluate(self, args: argparse.Namespace, episode: Episode) -> tuple[Tensor, Tensor]:
        """See ``engine.model.Trainable``; in eval mode."""
        logits = self.metalearner.eval()(episode)
        return F.cross_entropy(logits, episode.query_y), accuracy(logits, episode.query_y)


def classification(module: nn.Module, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the cross entropy of a trained module's logits [B, K] for labels y [B].

    Returns:
        The gradient [G] of the module's trained parameters, one after the other; the loss []; the
        accuracy [] in percent. They are detached.
    """
    loss = F.cross_entropy(logits, y)
    return flat_gradient(loss, trainable_parameters(module)), loss.detach(), accuracy(logits, y)


def make_embedding(args: argparse.Namespace, backend: Backend) -> FlatModule:
    """Make the learner without its classifier: images [B, 3, H, W] -> features [B, n_features]."""
    network = make_learner(args, backend)
    network.n_features = network.cls.in_features
    network.cls = nn.Identity()
    return network


def build(
    module: Callable[[FlatModule, int], nn.Module],
    args: argparse.Namespace,
    backend: Backend,
    model: type[EpisodicModel] = EpisodicModel,
) -> EpisodicModel:
    """Make the method that is ``module(embedding, n_class)``."""
    return model(module(make_embedding(args, backend), args.n_class).to(backend.device))


def one_hot(episode: Episode, n_class: int) -> Tensor:
    """The support set's labels as rows with a single 1, [n_class * n_shot, n_class], float."""
    return F.one_hot(episode.support_y, n_class).to(episode.support.dtype)
