"""Your own update rule in the LSTM's place: here gradient descent with momentum, whose step size,
friction and starting point are learned on small pictures of characters.

python examples/own_update_rule.py
"""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import engine  # noqa: F401, I001 - before PyTorch: its threads do not spin while they wait
import numpy as np
import torch
from glyphs import class_splits, draw
from torch import Tensor, nn

from episode import Episode, evaluate_episode, train_episode
from learner import Conv4
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


def drawn(split, n_class=16, per_class=12, size=16):
    """Images [n_class, per_class, 3, size, size]."""
    characters = class_splits()[split][:n_class]
    rows = [[draw(719, c, k, size) for k in range(per_class)] for c in characters]
    pixels = torch.from_numpy(np.array([[np.asarray(image) for image in row] for row in rows]))
    return pixels.permute(0, 1, 4, 2, 3).float() / 255


def draw_episode(images, n_class=3, k_shot=3, n_query=5, n_updates=3):
    classes = torch.randperm(len(images))[:n_class]
    picks = torch.stack([torch.randperm(images.shape[1])[: k_shot + n_query] for _ in classes])
    x, y = images[classes.unsqueeze(1), picks], torch.arange(n_class)
    support, query = x[:, :k_shot].flatten(0, 1), x[:, k_shot:].flatten(0, 1)
    labels = y.repeat_interleave(k_shot), y.repeat_interleave(n_query)
    order = torch.arange(n_class * k_shot).repeat(n_updates, 1)
    return Episode(support, labels[0], query, labels[1], order)


torch.manual_seed(0)
train_images, test_images = drawn("train"), drawn("test")
learner = Conv4(16, bn_eps=1e-3, bn_momentum=0.95, n_classes=3, n_filters=8)
learners, rule = (learner, copy.deepcopy(learner)), Momentum(learner.size())
rule.init_cI(learner.get_flat_params())
optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)

for n in range(1, 101):
    episode = draw_episode(train_images)
    loss, accuracy, _ = train_episode(
        episode, *learners, rule, optimizer, batch_size=9, grad_clip=1.0
    )
    if n % 20 == 0:
        print(f"episode {n}: query loss {loss:.3f}, accuracy {accuracy:.1f} %")

tested = [
    evaluate_episode(draw_episode(test_images), *learners, rule, batch_size=9)[1] for _ in range(50)
]
print(f"50 episodes of new characters: {torch.stack(tested).mean():.1f} % (chance: 33.3 %)")
