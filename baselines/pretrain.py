"""Pre-training: the learner classifies all training classes, as an ordinary network.

A batch is an episode of all classes in the order of their names, support and query set together.
By default the classifier uses cosine similarities, cos(features, weights of a class), as Gidaris &
Komodakis and Qi et al. (both 2018) do. The features of a class then share a direction, so one step
of gradient descent moves a linear head from zero along it. ``--classifier linear`` gives the
network that the paper's baselines start from (section 5.1).

Meta-learning from a pre-trained network is due to Rusu et al. and Sun et al. (both 2019).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.episodic import EpisodicModel, classification
from data.layout import scan_split
from engine.flags import resolve
from episode import Episode
from utils import UserError

COSINE_SCALE = 10.0  # of the cosines, so that a probability can come close to 1


class PretrainModel(EpisodicModel):
    """The learner as a classifier of all training classes."""

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by their key in it."""
        return {"network": self.metalearner}

    def gradient(self, args: argparse.Namespace, episode: Episode) -> tuple[Tensor, ...]:
        """See ``engine.model.Trainable``; of a batch, with its statistics."""
        network = self.metalearner.train()
        network.reset_batch_stats()
        x = torch.cat((episode.support, episode.query))
        y = torch.cat((episode.support_y, episode.query_y))
        if args.classifier == "linear":
            return classification(network, network(x), y)
        features, classes = F.normalize(network.features(x)), F.normalize(network.cls.weight)
        return classification(network, COSINE_SCALE * F.linear(features, classes), y)


def with_all_classes(cli_args: dict[str, object]) -> dict[str, object]:
    """The flags of ``--mode pretrain``, whose n-way is all training classes.

    Raises:
        UserError: ``--n-class`` is another number.
    """
    args = resolve(cli_args)
    n = len(scan_split(args.data_root, "train").classes)
    if cli_args.get("n_class", n) != n:
        raise UserError(f"--n-class {args.n_class}: --mode pretrain takes all {n} classes")
    return {**cli_args, "n_class": n}
