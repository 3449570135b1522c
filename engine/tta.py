"""Test-time augmentation: predictions averaged over several adaptations to one support set.

The outputs of cI, the learner's initialisation, differ, so predictions depend on which class is
assigned to which output. ``--tta-permutations`` adapts to each of several permutations of the
labels and averages the probabilities; with all n! of n classes, predictions do not depend on the
order of the classes. ``--tta-flip`` does the same with flipped images.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model import Model
from episode import Episode, accuracy, adapt
from learner import FlatModule


def class_permutations(n: int, count: int, seed: int) -> Tensor:
    """Draw different permutations of n classes, beginning with the identity.

    Every n rows are the cyclic shifts of one.

    Returns:
        [count, n] int64, or all n! of them if there are fewer: the place of each class.
    """
    count = min(count, math.factorial(n))
    rng = np.random.Generator(np.random.Philox(seed))
    starts = {tuple(range(n)): None}
    while len(starts) * n < count:
        starts[(0, *(int(k) + 1 for k in np.argsort(rng.random(n - 1))))] = None
    rows = [[(place + shift) % n for place in start] for start in starts for shift in range(n)]
    return torch.tensor(rows[:count])


def views(images: Tensor, model: Model, flip: bool) -> list[Tensor]:
    """The learner's inputs for images [B, 3, H, W], and with ``flip`` for the flipped ones."""
    if not flip:
        return [model.inputs(images)]
    flipped = images.flip(3).contiguous(memory_format=torch.channels_last)  # as the images are
    return [model.inputs(images), model.inputs(flipped)]


def adapt_view(
    episode: Episode,
    support: Tensor,
    permutation: Tensor,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    model: Model,
    batch_size: int,
    transductive: bool = False,
) -> None:
    """Adapt to one view of the support set; ``learner_wo_grad`` takes over the result.

    Args:
        support: the learner's inputs, one of ``views``.
        permutation: [n] int64, on the episode's device: the output of each class.
        Others: see ``episode.evaluate_episode``.
    """
    seen = episode._replace(support=support, support_y=permutation[episode.support_y])
    learner_wo_grad.train(transductive)
    c, _ = adapt(seen, learner_w_grad, model.metalearner, batch_size)
    learner_wo_grad.transfer_params(learner_w_grad, c)


def probabilities(query: list[Tensor], permutation: Tensor, learner: FlatModule) -> Tensor:
    """An adapted learner's probabilities [B, n] by class, averaged over the inputs in ``query``."""
    return torch.stack([learner(x).softmax(dim=1) for x in query]).mean(0)[:, permutation]


@torch.no_grad()
def evaluate_tta(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    model: Model,
    batch_size: int,
    permutations: Tensor,
    flip: bool,
    transductive: bool = False,
) -> tuple[Tensor, Tensor]:
    """``episode.evaluate_episode`` with averaged probabilities, of an episode of images.

    Args:
        permutations: from ``class_permutations``, on the episode's device.
        flip: whether flipped images are averaged over, too.
        Others: see ``episode.evaluate_episode``.

    Returns:
        Query loss [] and query accuracy [] in percent, still on the device.
    """
    support, query = views(episode.support, model, flip), views(episode.query, model, flip)
    pair, found = (learner_w_grad, learner_wo_grad), []
    for permutation, x in product(permutations, support):
        adapt_view(episode, x, permutation, *pair, model, batch_size, transductive)
        found.append(probabilities(query, permutation, learner_wo_grad))
    mean = torch.stack(found).mean(0)
    logs = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # a 0 would make the loss infinite
    return F.nll_loss(logs, episode.query_y), accuracy(mean, episode.query_y)
