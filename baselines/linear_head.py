"""A linear head on frozen features, trained in each episode by the LSTM meta-learner.

The learner is a linear ``FlatModule``. ``Model.embed`` turns the images into the features of a
pre-trained Conv4, whose batch norm uses statistics of training images, and ``episode.updates``
trains the head on them. (Bronskill et al., "TaskNorm", 2020, compare such statistics.)
"""

from __future__ import annotations

import argparse
import copy

from torch import Tensor, nn

from baselines.episodic import make_embedding
from engine.backend import Backend, make_metalearner
from engine.model import Model
from learner import FlatModule


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


def build(args: argparse.Namespace, backend: Backend) -> Model:
    """Make the pair of heads, their meta-learner, and a backbone with random weights."""
    backbone = make_embedding(args, backend).eval().requires_grad_(False)
    head = LinearHead(backbone.n_features, args.n_class).to(backend.device)
    metalearner = make_metalearner(args, backend, head)
    return Model(metalearner, (head, copy.deepcopy(head)), backbone)
