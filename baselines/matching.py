"""Matching networks (Vinyals et al., 2016) as the authors' Lua code has them: a class's logit is
the *sum* of the cosines to its support images, without a softmax over the support set.

``matching-fce`` adds full context embeddings: a bidirectional LSTM reads the support set, and an
LSTM attends over it for each query image. As in the authors' code, their weights start at zero, so
training begins as if without them. The authors add the backward outputs in the wrong order; here
each image gets its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.episodic import one_hot
from episode import Episode
from learner import N_BLOCKS, FlatModule

DROPOUT = 0.1  # after each pooling
STEPS = 3  # of the attention LSTM


class FullContext(nn.Module):
    """Full context embeddings of F features (Vinyals et al., appendix A)."""

    def __init__(self, n_features: int):
        super().__init__()
        self.support_lstm = nn.LSTM(n_features, n_features, bidirectional=True)
        self.query_lstm = nn.LSTMCell(2 * n_features, n_features)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the features [S, F] and [Q, F] of an episode, in the order in which they come."""
        forward, backward = self.support_lstm(support)[0].chunk(2, dim=1)
        support = support + forward + backward
        h = c = torch.zeros_like(query)
        read = support.mean(0).expand_as(query)
        for _ in range(STEPS):
            h, c = self.query_lstm(torch.cat((query, read), dim=1), (h, c))
            h = h + query
            read = (h @ support.t()).softmax(dim=1) @ support
        return support, h


class MatchingNetwork(nn.Module):
    """Compares each query image with all support images by the cosine of their embeddings.

    Args:
        context: ``FullContext``, or None.
    """

    def __init__(self, embedding: FlatModule, n_class: int, context: nn.Module | None = None):
        super().__init__()
        self.embedding, self.n_class, self.context = embedding, n_class, context

    def embed(self, x: Tensor) -> Tensor:
        """Compute the features [B, F] of images [B, 3, H, W]."""
        for b in range(1, N_BLOCKS + 1):
            x = F.dropout(self.embedding.block(b, x), DROPOUT, self.training)
        return x.flatten(1).to(self.embedding.norm1.weight.dtype)

    def forward(self, episode: Episode) -> Tensor:
        """Compute the logits [n_class * n_eval, n_class] of an episode's query set."""
        order = episode.order[0]  # a random one, as the authors'
        support, query = self.embed(episode.support)[order], self.embed(episode.query)
        if self.context is not None:
            support, query = self.context(support, query)
        cosines = F.normalize(query) @ F.normalize(support).t()
        return cosines @ one_hot(episode, self.n_class)[order]


def with_context(embedding: FlatModule, n_class: int) -> MatchingNetwork:
    """Make a network with full context embeddings."""
    return MatchingNetwork(embedding, n_class, FullContext(embedding.n_features))
