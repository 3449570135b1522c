"""Answers averaged over several trainings of the learner on the same support set.

The learner's initial weights, cI, differ from output to output, so the answer depends on which
class gets which output: two random orders of the classes disagree about a fifth of the images
(5-way 5-shot mini-ImageNet). So the learner adapts several times, each time with the classes in
another order, and the probabilities are averaged (``--orders``). Each class having each output
once, n orders, leaves 2 to 4 % of disagreement; all n! orders leave none. ``--mirror`` does the
same with images that are mirrored left to right.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from episode import Episode, accuracy, adapt
from learner import FlatModule
from metalearner import MetaLearner


class View(NamedTuple):
    """One way to show a support set to the learner."""

    places: np.ndarray  # [n] int64: the output of each class
    mirrored: bool


def class_orders(n: int, count: int, seed: int) -> np.ndarray:
    """Different orders of n classes; in each n in a row, beginning with the first, every class has
    every place once.

    Returns:
        [count, n] int64, or all n! of them if there are fewer: the place of each class.
    """
    count = min(count, math.factorial(n))
    rng = np.random.Generator(np.random.Philox(seed))
    starts = {tuple(range(n)): None}
    while len(starts) * n < count:
        starts[(0, *(int(k) + 1 for k in np.argsort(rng.random(n - 1))))] = None
    return np.array(
        [[(place + shift) % n for place in start] for start in starts for shift in range(n)]
    )[:count]


def views(orders: np.ndarray, mirror: bool) -> list[View]:
    """Each of the orders [count, n], and with ``mirror`` each of them with mirrored images, too."""
    return [
        View(places, mirrored)
        for places, mirrored in product(orders, (False, True) if mirror else (False,))
    ]


def mirrored(x: Tensor) -> Tensor:
    """Images [B, 3, H, W], left and right exchanged, in the same memory format."""
    return x.flip(3).contiguous(memory_format=torch.channels_last)


def adapted(
    episode: Episode,
    view: View,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: MetaLearner,
    batch_size: int,
    transductive: bool = False,
) -> None:
    """Train the learner on a view of the support set: ``learner_wo_grad`` takes over the result,
    see ``evaluate_episode``.
    """
    x, places = episode.support, torch.from_numpy(view.places).to(episode.support_y.device)
    seen = episode._replace(
        support=mirrored(x) if view.mirrored else x, support_y=places[episode.support_y]
    )
    learner_wo_grad.train(transductive)
    cI, _ = adapt(seen, learner_w_grad, metalearner, batch_size)
    learner_wo_grad.transfer_params(learner_w_grad, cI)


def answer(x: Tensor, view: View, learner: FlatModule, mirror: bool) -> Tensor:
    """A trained learner's probabilities for images [B, 3, H, W], with ``mirror`` averaged over both
    sides: [B, n].
    """
    sides = [x, mirrored(x)] if mirror else [x]
    return torch.stack([learner(side).softmax(dim=1) for side in sides]).mean(0)[:, view.places]


@torch.no_grad()
def evaluate_averaged(
    episode: Episode,
    learner_w_grad: FlatModule,
    learner_wo_grad: FlatModule,
    metalearner: MetaLearner,
    batch_size: int,
    orders: np.ndarray,
    mirror: bool,
    transductive: bool = False,
) -> tuple[Tensor, Tensor]:
    """``episode.evaluate_episode`` with averaged probabilities.

    Args:
        orders: from ``class_orders``.
        mirror: whether mirror images are averaged over, too.
        The others are ``evaluate_episode``'s.

    Returns:
        Query loss [] and query accuracy [] in percent.
    """
    found = []
    for view in views(orders, mirror):
        adapted(
            episode, view, learner_w_grad, learner_wo_grad, metalearner, batch_size, transductive
        )
        found.append(answer(episode.query, view, learner_wo_grad, mirror))
    mean = torch.stack(found).mean(0)
    logs = mean.clamp_min(
        torch.finfo(mean.dtype).tiny
    ).log()  # or one image of probability 0 makes the loss infinite
    return F.nll_loss(logs, episode.query_y), accuracy(mean, episode.query_y)
