"""Exponential moving average of a meta-learner's weights (``--ema``).

The average is validated, tested and published. The weights that Adam trains are in a training run's
own checkpoints only, under ``TRAINED``. Averaging replaces learning-rate decay, and needs no length
of training fixed in advance.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace

import torch
from torch import nn

from engine.model import Trainable
from utils import UserError

TRAINED = "trained"


def averaged_copy(args: Namespace, model: Trainable) -> Trainable:
    """The model that is validated and saved: with ``--ema`` it has a copy of the meta-learner."""
    if not args.ema:
        return model
    return replace(model, metalearner=copy.deepcopy(model.metalearner))


def saved_modules(model: Trainable, averaged: Trainable) -> dict[str, nn.Module]:
    """The modules that a checkpoint of the training holds, by their key in it."""
    return averaged.saved | ({} if averaged is model else {TRAINED: model.metalearner})


def chosen_weights(args: Namespace, checkpoint: dict) -> dict:
    """A checkpoint with the weights that ``--ema`` asks for: the average or, with ``--ema 0``,
    those that Adam trained. Those of a checkpoint without an average stand for both.

    Raises:
        UserError: the checkpoint has the average alone, as an exported one.
    """
    averaged = checkpoint.get("hyper_parameters", {}).get("ema")
    if args.ema or not averaged:
        return {TRAINED: checkpoint.get("metalearner"), **checkpoint}
    if TRAINED not in checkpoint:
        raise UserError(f"--ema 0: {args.resume} holds the average (--ema {averaged:g}) alone")
    return {**checkpoint, "metalearner": checkpoint[TRAINED]}


@torch.no_grad()
def update_average(average: nn.Module, trained: nn.Module, decay: float, n_updates: int) -> None:
    """Move the average towards the weights after ``n_updates``, by ``1 - decay`` of the way.

    The first updates move it further, 9 / (10 + n) of the way, so that the average of a short run
    forgets its start, too. Buffers are copied.
    """
    share = 1 - min(decay, (1 + n_updates) / (10 + n_updates))
    for a, t in zip(average.parameters(), trained.parameters(), strict=True):
        a.lerp_(t, share)
    for own, new in zip(average.buffers(), trained.buffers(), strict=True):
        own.copy_(new)
