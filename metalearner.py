"""The meta-learner: an LSTM whose cell state is the learner's parameter vector (paper, section 3).

Gradient descent, theta_t = theta_{t-1} - alpha_t * grad_t, has the form of an LSTM's cell update,
c_t = f_t * c_{t-1} + i_t * c~_t, with f_t = 1, i_t = alpha_t and c~_t = -grad_t (equation 2). The
meta-learner learns cI = c_0 and computes f and i, with the same few weights for all coordinates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

P_PREP = 10.0
INPUT_SIZE = 4  # prep(loss) and prep(grad), two numbers each


def prep(x: Tensor) -> Tensor:
    """Separate magnitude and sign, so that one network reads numbers of any scale (section 3.2).

    (log(|x| + 1e-8) / p, sign(x)) where |x| >= e^-p, else (-1, e^p * x), with p = 10.

    Args:
        x: any shape [...], float.

    Returns:
        [2, ...], same dtype.
    """
    size = x.abs()
    large = size >= math.exp(-P_PREP)
    first = torch.where(large, torch.log(size + 1e-8) / P_PREP, -1.0)
    second = torch.where(large, torch.sign(x), math.exp(P_PREP) * x)
    return torch.stack((first, second))


class MetaState(NamedTuple):
    """The state between two updates. The gates f and i are kept *before* the sigmoid."""

    lstm_h: Tensor  # [P, hidden_size]; a subclass may lay out h and c differently
    lstm_c: Tensor  # [P, hidden_size]
    f: Tensor  # [P, 1]
    i: Tensor  # [P, 1]
    c: Tensor  # [P, 1], the learner's parameters


class UpdateRule(nn.Module):
    """A rule that trains the learner: the interface of a meta-learner that ``episode.py`` expects.

    Derive your own from this class: ``__init__`` makes its parameters, among them the learner's
    initialisation [P, 1], and the two methods below use them; ``examples/own_update_rule.py`` is
    one. All parameters with ``requires_grad`` are trained.

    Attributes:
        grad_divisor: divides a minibatch's mean gradient before ``forward``; 0 stands for its
            number of images, as in the authors' Lua code: a step is then at most 1/B of the
            gradient of B images, with the authors' minibatches 1/25 in 5-shot and 1/5 in 1-shot.
        second_order: whether training differentiates the learner's loss and gradient, too, which
            the paper treats as constants.
        final_stats: whether validation and test update batch norm's running statistics once more,
            with the last parameters; not in the paper.
    """

    grad_divisor: int = 0
    second_order: bool = False
    final_stats: bool = False

    def initial_state(self) -> Any:
        """The state before the first update: a tuple with a field ``c``, the parameter cI."""
        raise NotImplementedError

    def forward(self, loss: Tensor, grad: Tensor, state: Any) -> Any:
        """One update of the learner.

        Args:
            loss: [], mean cross entropy of the minibatch; a constant unless ``second_order``.
            grad: [P, 1], its gradient divided by ``grad_divisor``; a constant likewise.
            state: from ``initial_state`` or the last call.

        Returns:
            The new state; ``state.c`` holds the learner's new parameters with their graph.
        """
        raise NotImplementedError

    @torch.no_grad()
    def init_cI(self, flat_params: Tensor) -> None:
        """Start from the learner's own initialisation.

        Args:
            flat_params: [P], as ``Conv4.get_flat_params`` returns it.
        """
        self.initial_state().c.copy_(flat_params.reshape(-1, 1))


class MetaLSTMCell(nn.Module):
    """An LSTM cell per coordinate, with shared weights (section 3.1; f, i are logits here).

    f_t = [h_t, c_{t-1}, f_{t-1}] WF + bF
    i_t = [h_t, c_{t-1}, i_{t-1}] WI + bI
    c_t = sigmoid(f_t) * c_{t-1} - sigmoid(i_t) * grad_t

    WF, WI ~ U(-0.01, 0.01); bF ~ U(*bf_range), bI ~ U(*bi_range). With ``MetaLearner``'s default
    ranges it starts as gradient descent with a small step. cI, the initial cell state, is the
    learner's initialisation, itself learned (see ``UpdateRule.init_cI``).

    Args:
        hidden_size: width of h, the LSTM's output.
        n_learner_params: P, the number of coordinates.
        bi_range, bf_range: (low, high) of the initial biases.
    """

    def __init__(
        self,
        hidden_size: int,
        n_learner_params: int,
        bi_range: tuple[float, float],
        bf_range: tuple[float, float],
    ):
        super().__init__()
        self.WF = nn.Parameter(torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01))
        self.WI = nn.Parameter(torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01))
        self.cI = nn.Parameter(torch.zeros(n_learner_params, 1))
        self.bI = nn.Parameter(torch.empty(1, 1).uniform_(*bi_range))
        self.bF = nn.Parameter(torch.empty(1, 1).uniform_(*bf_range))

    def forward(
        self, h: Tensor, grad: Tensor, f: Tensor, i: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One update.

        Args:
            h: [P, hidden_size], the LSTM's output for each coordinate.
            grad: [P, 1], a constant unless ``UpdateRule.second_order``.
            f, i, c: [P, 1], the last gates before the sigmoid, and the last cell state.

        Returns:
            The new f, i and c, [P, 1] each.
        """
        f = torch.addmm(self.bF, torch.cat((h, c, f), dim=1), self.WF)
        i = torch.addmm(self.bI, torch.cat((h, c, i), dim=1), self.WI)
        return f, i, torch.sigmoid(f) * c - torch.sigmoid(i) * grad


class MetaLearner(UpdateRule):
    """The LSTM that reads loss and gradient, and the cell that updates the learner.

    Args:
        input_size: numbers that the LSTM reads per coordinate; always 4.
        hidden_size: width of the LSTM, its weights shared by all coordinates.
        n_learner_params: P, the length of the learner's flat parameter vector.
        bi_range, bf_range: ranges of the uniform distributions from which bI and bF start.
        lstm_init: "pytorch" for PyTorch's default, U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)) and
            two biases, as the port; "authors" for U(-0.01, 0.01) and a single bias (``bias_hh``
            stays zero), as the authors' Lua code.

    Raises:
        ValueError: ``input_size`` is not 4.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_learner_params: int,
        bi_range: tuple[float, float] = (-5.0, -4.0),
        bf_range: tuple[float, float] = (4.0, 6.0),
        lstm_init: str = "pytorch",
    ):
        super().__init__()
        if input_size != INPUT_SIZE:
            raise ValueError(f"input_size is {input_size}, but prep makes {INPUT_SIZE} inputs")
        self.lstm = nn.LSTMCell(input_size, hidden_size)
        if lstm_init == "authors":
            for parameter in self.lstm.parameters():
                nn.init.uniform_(parameter, -0.01, 0.01)
            nn.init.zeros_(self.lstm.bias_hh).requires_grad_(False)
        self.metalstm = MetaLSTMCell(hidden_size, n_learner_params, bi_range, bf_range)

    def initial_state(self) -> MetaState:
        """The state before the first update: c_0 = cI, all else zero."""
        cI = self.metalstm.cI
        h, zero = cI.new_zeros(cI.shape[0], self.lstm.hidden_size), torch.zeros_like(cI)
        return MetaState(h, h, zero, zero, cI)

    def forward(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        """See ``UpdateRule.forward``."""
        x = torch.cat((prep(loss).expand(len(grad), 2), prep(grad.squeeze(1)).t()), dim=1)  # [P, 4]
        h, c = self.lstm(x, (state.lstm_h, state.lstm_c))
        return MetaState(h, c, *self.metalstm(h, grad, state.f, state.i, state.c))
