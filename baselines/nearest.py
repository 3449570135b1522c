"""Nearest neighbour by cosine on the features of a pre-trained network: nothing is trained."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.episodic import EpisodicModel
from episode import Episode
from learner import FlatModule


class NearestNeighbour(nn.Module):
    """A class's logit is the cosine to its nearest support image."""

    def __init__(self, network: FlatModule, n_class: int):
        super().__init__()
        self.network, self.n_class = network.requires_grad_(False), n_class
        self.nothing = nn.Parameter(torch.zeros(0))  # an optimiser needs a parameter

    def forward(self, episode: Episode) -> Tensor:
        """Compute the logits [n_class * n_eval, n_class] of an episode's query set."""
        support, query = (F.normalize(self.network(x)) for x in (episode.support, episode.query))
        cosines = query @ support.t()  # [Q, S]
        lowest = cosines.new_full((len(query), self.n_class), -1.0)
        labels = episode.support_y.expand_as(cosines)
        return lowest.scatter_reduce(1, labels, cosines, "amax")


class NearestModel(EpisodicModel):
    """Has no gradient: training only counts episodes."""

    def gradient(self, args: argparse.Namespace, episode: Episode) -> tuple[Tensor, ...]:
        """See ``engine.model.Trainable``."""
        return torch.zeros_like(self.metalearner.nothing), *self.evaluate(args, episode)
