"""Your own training loop and data, as a user of the library: an MLP learns to tell random blobs
apart.

python examples/own_loop.py
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: F401, I001 - before PyTorch: its threads do not spin while they wait
import torch
from torch import nn

from episode import Episode, evaluate_episode, train_episode
from learner import FlatModule
from metalearner import MetaLearner


class MLP(FlatModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return self.layers(x)


def draw_episode(k_shot=5, n_query=15, n_updates=5):
    centres = torch.randn(3, 1, 8)  # three new classes
    support, query = (centres + 0.7 * torch.randn(3, k, 8) for k in (k_shot, n_query))
    y = torch.arange(3)
    order = torch.arange(3 * k_shot).repeat(n_updates, 1)  # the whole support set in each update
    labels = y.repeat_interleave(k_shot), y.repeat_interleave(n_query)
    return Episode(support.flatten(0, 1), labels[0], query.flatten(0, 1), labels[1], order)


def train_and_test(learners, metalearner):
    optimizer = torch.optim.Adam(metalearner.parameters(), lr=1e-2)
    for n in range(1, 501):
        loss, accuracy, _ = train_episode(
            draw_episode(), *learners, metalearner, optimizer, batch_size=15, grad_clip=0.25
        )
        if n % 100 == 0:
            print(f"episode {n}: query loss {loss:.3f}, accuracy {accuracy:.1f} %")
    tested = [
        evaluate_episode(draw_episode(), *learners, metalearner, batch_size=15)[1]
        for _ in range(100)
    ]
    print(f"100 new episodes: accuracy {torch.stack(tested).mean():.1f} % (chance: 33.3 %)")


if __name__ == "__main__":
    torch.manual_seed(0)
    mlp = MLP()
    # bI sets the first step, sigmoid(bI) of the gradient, which is divided by the batch size.
    # main.py's default, --bi-init -5 -4, gives about 1/100, for tens of thousands of episodes; a
    # small network that trains for hundreds learns faster from (0, 0), a half.
    metalearner = MetaLearner(4, 20, mlp.size(), bi_range=(0, 0))
    metalearner.init_cI(mlp.get_flat_params())
    train_and_test((mlp, copy.deepcopy(mlp)), metalearner)  # learner_w_grad, learner_wo_grad
