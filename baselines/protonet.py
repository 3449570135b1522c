"""Prototypical networks (Snell, Swersky & Zemel, 2017): the nearest class mean of the features."""

from __future__ import annotations

from torch import Tensor, nn

from baselines.episodic import one_hot
from episode import Episode
from learner import FlatModule


class PrototypicalNetwork(nn.Module):
    """Logits are minus the squared Euclidean distances to the class means of the support set."""

    def __init__(self, embedding: FlatModule, n_class: int):
        super().__init__()
        self.embedding, self.n_class = embedding, n_class

    def forward(self, episode: Episode) -> Tensor:
        """Compute the logits [n_class * n_eval, n_class] of an episode's query set."""
        members = one_hot(episode, self.n_class)  # [S, n_class]
        means = (members / members.sum(0)).t() @ self.embedding(episode.support)
        differences = self.embedding(episode.query).unsqueeze(1) - means
        return -differences.square().sum(2)
