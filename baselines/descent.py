"""Gradient descent in place of the LSTM: the forget gate is 1 and the input gate a learned constant
(equation 2 of the paper).

``sgd`` has one step size for all parameters, ``meta-sgd`` (Li et al., 2017) one for each. cI is
learned, so ``sgd`` is first-order MAML (Finn et al., 2017) with a learned step size, or MAML itself
with ``--second-order true``.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.backend import Backend, make_learner, prepare_rule
from engine.model import Model
from metalearner import UpdateRule


class DescentState(NamedTuple):
    """The state between two updates."""

    c: Tensor  # [P, 1], the learner's parameters


class GradientDescent(UpdateRule):
    """c_t = c_{t-1} - sigmoid(bI) * grad_t.

    Args:
        n_learner_params: P, the length of the learner's flat parameter vector.
        n_rates: 1, or P for a step size of each parameter.
        bi_range: range of the uniform distribution from which bI starts.
    """

    def __init__(self, n_learner_params: int, n_rates: int, bi_range: tuple[float, float]):
        super().__init__()
        self.cI = nn.Parameter(torch.zeros(n_learner_params, 1))
        self.bI = nn.Parameter(torch.empty(n_rates, 1).uniform_(*bi_range))

    def initial_state(self) -> DescentState:
        """See ``UpdateRule.initial_state``."""
        return DescentState(self.cI)

    def forward(self, loss: Tensor, grad: Tensor, state: DescentState) -> DescentState:
        """See ``UpdateRule.forward``."""
        return DescentState(state.c - torch.sigmoid(self.bI) * grad)


def build(args: argparse.Namespace, backend: Backend) -> Model:
    """Make the learner pair and the update rule; cI starts as the learner's parameters."""
    learner = make_learner(args, backend)
    size = learner.size()
    n_rates = size if args.method == "meta-sgd" else 1
    rule = GradientDescent(size, n_rates, tuple(args.bi_init))
    return Model(prepare_rule(rule, args, backend, learner), (learner, copy.deepcopy(learner)))
