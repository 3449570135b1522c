"""The networks of a training: the learner pair, the meta-learner, and frozen features if any."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from episode import Episode
from learner import FlatModule
from metalearner import MetaLearner


class Model(NamedTuple):
    """What a training trains and a test tests.

    Attributes:
        backbone: frozen network that turns images into the learner's inputs; None for the paper's
            method, whose learner reads the images.
    """

    learner_w_grad: FlatModule
    learner_wo_grad: FlatModule
    metalearner: MetaLearner
    backbone: nn.Module | None = None

    @property
    def learners(self) -> tuple[FlatModule, FlatModule]:
        """The pair (learner_w_grad, learner_wo_grad)."""
        return self.learner_w_grad, self.learner_wo_grad

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by their key in it."""
        backbone = {} if self.backbone is None else {"backbone": self.backbone}
        return {"metalearner": self.metalearner, **backbone}

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, H, W] into the learner's inputs [B, ...]."""
        return images if self.backbone is None else self.backbone(images)

    def embed(self, episode: Episode) -> Episode:
        """The episode with the learner's inputs instead of images."""
        if self.backbone is None:
            return episode
        support, query = self.inputs(episode.support), self.inputs(episode.query)
        return episode._replace(support=support, query=query)
