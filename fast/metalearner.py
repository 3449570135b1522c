"""The meta-learner, faster: one kernel per update on a CPU, fewer operations elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fast import native
from metalearner import MetaLearner, MetaState, prep


class FastMetaLearner(MetaLearner):
    """``metalearner.MetaLearner`` with the same parameters and arguments, equal to rounding."""

    def initial_state(self) -> MetaState:
        """See ``MetaLearner.initial_state``."""
        state = super().initial_state()
        if native.handles(state.c):
            h = native.lstm_state(state.c, self.lstm.hidden_size)
            return state._replace(lstm_h=h, lstm_c=h)
        return state

    def forward(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        """See ``MetaLearner.forward``."""
        if native.handles(grad):
            lstm, cell = self.lstm, self.metalstm
            # prep(loss) is the same for all coordinates: its share of the LSTM's input acts as a bias
            bias = lstm.bias_ih + lstm.bias_hh + lstm.weight_ih[:, :2] @ prep(loss)
            weight = torch.cat((lstm.weight_ih[:, 2:], lstm.weight_hh), dim=1)
            return MetaState(*native.MetaStep.apply(weight, bias, cell.WF, cell.bF, cell.WI, cell.bI, grad, *state))
        x = prep(torch.cat((loss.view(1), grad.squeeze(1))))  # both at once
        x = torch.cat((x[:, :1].expand(-1, len(grad)), x[:, 1:])).t()  # [P, 4]
        h, c = self.lstm(x, (state.lstm_h, state.lstm_c))
        return MetaState(h, c, *self.metalstm(h, grad, state.f, state.i, state.c))
