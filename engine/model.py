"""The networks of a training: the learner pair, the meta-learner, and frozen features if any."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from episode import Episode, evaluate_episode, meta_gradient
from learner import FlatModule


@dataclass(frozen=True)
class Trainable:
    """Interface of a model for training and test: ``Model``, or a baseline without an inner loop.

    ``gradient`` and ``evaluate`` get an episode of images on the model's device, where their
    results stay, and one copy of ``learners``.

    Attributes:
        metalearner: the module whose parameters are trained.
        learners: networks that an episode overwrites; parallel episodes have a copy each.
    """

    metalearner: nn.Module
    learners: tuple[FlatModule, ...] = ()

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by their key in it."""
        return {"metalearner": self.metalearner}

    def gradient(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient [G] of ``metalearner``, query loss [], query accuracy [] in percent."""
        raise NotImplementedError

    def evaluate(
        self, args: argparse.Namespace, episode: Episode, *learners: FlatModule
    ) -> tuple[Tensor, Tensor]:
        """Query loss [] and query accuracy [] in percent."""
        raise NotImplementedError


@dataclass(frozen=True)
class Model(Trainable):
    """The learners (learner_w_grad, learner_wo_grad), and an ``UpdateRule`` as meta-learner.

    Attributes:
        backbone: frozen network that turns images into the learner's inputs; None for the paper's
            method, whose learner reads the images.
    """

    backbone: nn.Module | None = None

    @property
    def saved(self) -> dict[str, nn.Module]:
        """See ``Trainable.saved``."""
        return super().saved | ({} if self.backbone is None else {"backbone": self.backbone})

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
