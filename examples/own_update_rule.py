"""Your own update rule in the LSTM's place: here gradient descent with momentum, whose step size,
friction and starting point are learned on the data of own_loop.py.

python examples/own_update_rule.py
"""

import copy
from typing import NamedTuple

from own_loop import MLP, train_and_test  # isort: skip - it finds the repository
import torch
from torch import Tensor, nn

from metalearner import UpdateRule


class State(NamedTuple):
    c: Tensor  # [P, 1], the learner's parameters: every rule's state has this field
    velocity: Tensor  # [P, 1]


class Momentum(UpdateRule):
    def __init__(self, n_params):
        super().__init__()
        self.cI = nn.Parameter(torch.zeros(n_params, 1))  # where the learner starts
        self.rate, self.keep = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def initial_state(self):
        return State(self.cI, torch.zeros_like(self.cI))

    def forward(self, loss, grad, state):
        velocity = self.keep.sigmoid() * state.velocity + self.rate.exp() * grad
        return State(state.c - velocity, velocity)


torch.manual_seed(0)
mlp = MLP()
rule = Momentum(mlp.size())
rule.init_cI(mlp.get_flat_params())
train_and_test((mlp, copy.deepcopy(mlp)), rule)
