"""The meta-learner: an LSTM whose cell state is the learner's parameter vector (paper, section 3).

Gradient descent, theta_t = theta_{t-1} - alpha_t * grad_t, has the form of an LSTM's cell update,
c_t = f_t * c_{t-1} + i_t * c~_t, with f_t = 1, i_t = alpha_t and c~_t = -grad_t (equation 2). The meta-learner learns f, i
and the initial state c_0 = cI, for all coordinates with the same few weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import native

P_PREP = 10.0
INPUT_SIZE = 4  # prep(loss) and prep(grad), two numbers each


def prep(x: Tensor) -> Tensor:
    """Split magnitude from sign, so that numbers of any scale can be read by one network (paper, appendix A).

    (log(|x| + 1e-8) / p, sign(x)) where |x| >= e^-p, else (-1, e^p * x), with p = 10.

    Args:
        x: any shape [...], float.

    Returns:
        [2, ...], same dtype.
    """
    large = x.abs() >= math.exp(-P_PREP)
    first = torch.where(large, torch.log(x.abs() + 1e-8) / P_PREP, -torch.ones_like(x))
    second = torch.where(large, torch.sign(x), math.exp(P_PREP) * x)
    return torch.stack((first, second))


class MetaState(NamedTuple):
    """What the meta-learner remembers of the updates so far; f and i are kept *before* the sigmoid."""

    lstm_h: Tensor  # [hidden_size, P]: coordinates last, so that each unit's numbers lie together; native.py has its own order
    lstm_c: Tensor  # the same
    f: Tensor  # [P, 1]
    i: Tensor  # [P, 1]
    c: Tensor  # [P, 1], the learner's parameters


class _LSTMStep(torch.autograd.Function):
    """nn.LSTMCell over the coordinates, backward written by hand: (weight [4H, 2+H], bias [4H], x [2, P], h, c) -> h, c.

    Rows of weight and bias are in the order input, forget, output gate, candidate: the three sigmoids are one block. x is a
    constant, so its gradient is never made.
    """

    @staticmethod
    def forward(ctx, weight, bias, x, h, c):
        n = h.shape[0]
        z = torch.cat((x, h))
        gates = torch.addmm(bias.unsqueeze(1), weight, z)
        gates[: 3 * n].sigmoid_()
        gates[3 * n :].tanh_()
        i, f, o, g = gates.split(n)
        new_c = torch.addcmul(f * c, i, g)
        squashed = torch.tanh(new_c)
        ctx.save_for_backward(weight, z, c, gates, squashed)
        return o * squashed, new_c

    @staticmethod
    def backward(ctx, grad_h, grad_c):
        weight, z, c, gates, squashed = ctx.saved_tensors
        n = c.shape[0]
        i, f, o, g = gates.split(n)
        grad_c = grad_c + torch.ops.aten.tanh_backward(grad_h * o, squashed)
        grad = torch.empty_like(gates)
        torch.mul(grad_c, g, out=grad[:n])
        torch.mul(grad_c, c, out=grad[n : 2 * n])
        torch.mul(grad_h, squashed, out=grad[2 * n : 3 * n])
        torch.mul(grad_c, i, out=grad[3 * n :])
        torch.ops.aten.sigmoid_backward.grad_input(grad[: 3 * n], gates[: 3 * n], grad_input=grad[: 3 * n])
        torch.ops.aten.tanh_backward.grad_input(grad[3 * n :], g, grad_input=grad[3 * n :])
        return grad @ z.t(), grad.sum(1), None, weight[:, 2:].t() @ grad, grad_c * f


class MetaLSTMCell(nn.Module):
    """One scalar LSTM cell a coordinate of the learner, all with the same gates (paper, equations 3 and 4).

    f_t = [h_t, c_{t-1}, f_{t-1}] WF + bF
    i_t = [h_t, c_{t-1}, i_{t-1}] WI + bI
    c_t = sigmoid(f_t) * c_{t-1} - sigmoid(i_t) * grad_t

    WF, WI ~ U(-0.01, 0.01); bF ~ U(4, 6), bI ~ U(*bi_range), by default U(-5, -4): it starts as gradient descent with a
    small step. cI, the initial cell state, is the learner's initialisation, itself learned (see ``init_cI``).
    """

    def __init__(self, hidden_size: int, n_learner_params: int, bi_range: tuple[float, float] = (-5.0, -4.0)):
        super().__init__()
        self.WF = nn.Parameter(torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01))
        self.WI = nn.Parameter(torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01))
        self.cI = nn.Parameter(torch.zeros(n_learner_params, 1))
        self.bI = nn.Parameter(torch.empty(1, 1).uniform_(*bi_range))
        self.bF = nn.Parameter(torch.empty(1, 1).uniform_(4, 6))

    @torch.no_grad()
    def init_cI(self, flat_params: Tensor) -> None:
        """Start from the learner's own initialisation.

        Args:
            flat_params: [P], as ``Learner.get_flat_params`` gives it.
        """
        self.cI.copy_(flat_params.reshape(-1, 1))

    def forward(self, h: Tensor, grad: Tensor, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update.

        Args:
            h: [hidden_size, P], what the LSTM says of each coordinate.
            grad: [P, 1], a constant: the paper's first-order assumption.
            f, i, c: [P, 1], the last gates before the sigmoid and the last cell state.

        Returns:
            The new f, i and c, [P, 1] each.
        """
        f = self._gate(self.WF, self.bF, h, c, f)
        i = self._gate(self.WI, self.bI, h, c, i)
        return f, i, torch.sigmoid(f) * c - torch.sigmoid(i) * grad

    @staticmethod
    def _gate(w: Tensor, b: Tensor, h: Tensor, c: Tensor, last: Tensor) -> Tensor:
        """[h, c, last] w + b without building the [P, hidden_size + 2] matrix."""
        return (w[:-2].t() @ h).t() + c * w[-2] + last * w[-1] + b


class MetaLearner(nn.Module):
    """The whole meta-learner: an LSTM that reads loss and gradient, and the cell that updates the learner.

    Args:
        input_size: numbers that the LSTM reads for a coordinate; always 4.
        hidden_size: width of the LSTM, its weights shared by all coordinates.
        n_learner_params: P, the length of the learner's flat parameter vector.
        bi_range: range of the uniform distribution from which bI starts.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_learner_params: int,
        bi_range: tuple[float, float] = (-5.0, -4.0),
    ):
        super().__init__()
        if input_size != INPUT_SIZE:
            raise ValueError(f"input_size is {input_size}, but prep(loss) and prep(grad) make {INPUT_SIZE} numbers")
        self.lstm = nn.LSTMCell(input_size, hidden_size)
        self.metalstm = MetaLSTMCell(hidden_size, n_learner_params, bi_range)

    def initial_state(self) -> MetaState:
        """The state before the first update: c_0 = cI, all else zero."""
        cI = self.metalstm.cI
        n = self.lstm.hidden_size
        h = native.lstm_state(cI, n) if native.handles(cI) else cI.new_zeros(n, cI.shape[0])
        zero = torch.zeros_like(cI)
        return MetaState(h, h, zero, zero, cI)

    def forward(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        """One update of the learner.

        Args:
            loss: [], mean cross entropy of the minibatch, detached.
            grad: [P, 1], its gradient divided once more by the minibatch's number of images, detached.
            state: from ``initial_state`` or the last call.

        Returns:
            The new state; ``state.c`` holds the learner's new parameters with their graph.
        """
        # prep(loss) is the same for all coordinates: its share of the LSTM's input is a bias
        lstm = self.lstm
        bias = lstm.bias_ih + lstm.bias_hh + lstm.weight_ih[:, :2] @ prep(loss)
        weight = torch.cat((lstm.weight_ih[:, 2:], lstm.weight_hh), dim=1)
        if native.handles(grad):
            cell = self.metalstm
            return MetaState(*native.MetaStep.apply(weight, bias, cell.WF, cell.bF, cell.WI, cell.bI, grad, *state))
        weight, bias = (_sigmoids_together(v) for v in (weight, bias))
        h, c = _LSTMStep.apply(weight, bias, prep(grad.squeeze(1)), state.lstm_h, state.lstm_c)
        return MetaState(h, c, *self.metalstm(h, grad, state.f, state.i, state.c))


def _sigmoids_together(v: Tensor) -> Tensor:
    """Rows of PyTorch's order (input, forget, candidate, output) -> (input, forget, output, candidate)."""
    i, f, g, o = v.chunk(4)
    return torch.cat((i, f, o, g))
