"""Fine-tuning a pre-trained network in each episode by gradient descent, as the authors do.

All parameters are trained, from the pre-trained convolutions and a random classifier; ``--epoch``
and ``--batch-size`` set passes and batches. Running statistics normalise the query images. Learning
rate and decay come from ``GRID``: each "training episode" draws from the validation classes and
tries every pair, and the pair with the best accuracy so far is used.
"""

from __future__ import annotations

import argparse
import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.episodic import EpisodicModel
from engine.backend import Backend, make_learner
from episode import Episode, accuracy, minibatches
from learner import FlatModule

# (rate, decay): the n-th update, from 0, has the rate rate / (1 + n * decay)
GRID = tuple(
    itertools.product((0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5), (1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 0))
)


class FineTuning(nn.Module):
    """The network to start from, and the accuracy of each pair of ``GRID`` summed over episodes."""

    def __init__(self, network: FlatModule):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.register_buffer("grid", torch.tensor(GRID), persistent=False)
        self.register_buffer("accuracy", torch.zeros(len(GRID)))
        self.nothing = nn.Parameter(torch.zeros(0))  # an optimiser needs a parameter


class FineTuningModel(EpisodicModel):
    """Its learner is trained anew in each episode."""

    def of_best(self, choices: Tensor) -> Tensor:
        """The best pair's row of ``choices`` [len(GRID), ...], without a GPU synchronisation."""
        return choices.index_select(0, self.metalearner.accuracy.argmax().view(1))[0]

    def tuned(
        self, args: argparse.Namespace, episode: Episode, learner: FlatModule, pair: Tensor
    ) -> Tensor:
        """Train ``learner`` on the support set; the logits of the query set.

        Args:
            pair: [2], rate and decay.
        """
        network, (rate, decay) = self.metalearner.network, pair
        flat = network.get_flat_params()
        learner.copy_flat_params(flat)
        learner.copy_buffers(network)
        learner.train()
        for n, (x, y) in enumerate(minibatches(episode, args.batch_size)):
            grad = learner.loss_and_grad(x, y)[1].squeeze(1)
            flat = flat - rate / (1 + n * decay) * grad
            learner.copy_flat_params(flat)
        return learner.eval()(episode.query)

    @torch.no_grad()
    def gradient(
        self, args: argparse.Namespace, episode: Episode, learner: FlatModule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Try all pairs of ``GRID``; an empty gradient, and the best pair's loss and accuracy."""
        module = self.metalearner
        logits = torch.stack([self.tuned(args, episode, learner, pair) for pair in module.grid])
        module.accuracy += torch.stack([accuracy(each, episode.query_y) for each in logits])
        best, y = self.of_best(logits), episode.query_y
        return torch.zeros_like(module.nothing), F.cross_entropy(best, y), accuracy(best, y)

    @torch.no_grad()
    def evaluate(
        self, args: argparse.Namespace, episode: Episode, learner: FlatModule
    ) -> tuple[Tensor, Tensor]:
        """Train with the best pair."""
        logits = self.tuned(args, episode, learner, self.of_best(self.metalearner.grid))
        return F.cross_entropy(logits, episode.query_y), accuracy(logits, episode.query_y)


def build(args: argparse.Namespace, backend: Backend) -> FineTuningModel:
    """Make the method that the flags ask for, on a network with random weights."""
    network = make_learner(args, backend)
    learner = copy.deepcopy(network)
    return FineTuningModel(FineTuning(network).to(backend.device), (learner,))
