"""The networks of a training: the learner pair, the meta-learner, and frozen features if any."""

from __future__ import annotations

import argparse
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from episode import Episode, evaluate_episode, meta_gradient
from learner import FlatModule
from metalearner import UpdateRule


class Trainable(Protocol):
    """Interface of a model for training and test: ``Model``, or a baseline without an inner loop.

    All are NamedTuples. ``gradient`` and ``evaluate`` get one of ``learners``' copies and an
    episode of images on the model's device; what they return stays there.
    """

    @property
    def metalearner(self) -> nn.Module:
        """The module whose parameters are trained."""

    @property
    def learners(self) -> tuple[FlatModule, ...]:
        """Networks that an episode overwrites; parallel episodes have a copy each."""

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by their key in it."""

    def gradient(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient [G] of ``metalearner``, query loss [], query accuracy [] in percent."""

    def evaluate(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor]:
        """Query loss [] and query accuracy [] in percent."""


class Model(NamedTuple):
    """A pair of learners and the update rule that trains them in each episode.

    Attributes:
        backbone: frozen network that turns images into the learner's inputs; None for the paper's
            method, whose learner reads the images.
    """

    learner_w_grad: FlatModule
    learner_wo_grad: FlatModule
    metalearner: UpdateRule
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
        support, query = self.inputs(episode.support), self.inputs(episode.query)
        return episode._replace(support=support, query=query)

    def gradient(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``episode.meta_gradient``."""
        return meta_gradient(self.embed(episode), *learners, self.metalearner, args.batch_size)

    def evaluate(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor]:
        """See ``episode.evaluate_episode``."""
        how = (args.batch_size, args.transductive)
        return evaluate_episode(self.embed(episode), *learners, self.metalearner, *how)
