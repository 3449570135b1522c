"""The meta-learner, faster: one kernel per update on a CPU or in Triton, fewer operations else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fast import gpu, native
from fast.gpu import meta
from metalearner import MetaLearner, MetaState, prep

LARGEST_HIDDEN = 256  # of the CPU kernel, which needs that much memory per thread


class FastMetaLearner(MetaLearner):
    """``metalearner.MetaLearner`` with the same parameters and arguments, equal up to rounding."""

    def initial_state(self) -> MetaState:
        """See ``MetaLearner.initial_state``; the CPU kernels arrange h and c in tiles."""
        state = super().initial_state()
        if self._on_cpu_kernel(state.c):
            n_tiles = -(-len(state.c) // native.TILE)
            h = state.c.new_zeros(n_tiles, self.lstm.hidden_size, native.TILE)
            return state._replace(lstm_h=h, lstm_c=h)
        return state

    def forward(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        """See ``MetaLearner.forward``."""
        if self._on_cpu_kernel(grad):
            return MetaState(*native.MetaStep.apply(loss, *self._weights(), grad, *state))
        kernel, eager = FastMetaLearner._in_triton, FastMetaLearner._in_pytorch
        size, variant = self.lstm.hidden_size, f"{self.lstm.hidden_size} hidden units"
        variant += ", second order" * grad.requires_grad
        results = partial(self._two_updates, loss, grad, state)
        if meta.handles(grad, size) and gpu.works(kernel, eager, 1e-3, grad, results, variant):
            return self._in_triton(loss, grad, state)
        return self._in_pytorch(loss, grad, state)

    def _on_cpu_kernel(self, x: Tensor) -> bool:
        return self.lstm.hidden_size <= LARGEST_HIDDEN and native.handles(x)

    def _in_triton(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        return meta.step(loss, self._weights(), grad, state)

    def _weights(self) -> list[Tensor]:
        lstm, cell = self.lstm, self.metalstm
        weights = [lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh]
        return [*weights, cell.WF, cell.bF, cell.WI, cell.bI]

    def _in_pytorch(self, loss: Tensor, grad: Tensor, state: MetaState) -> MetaState:
        x = prep(torch.cat((loss.view(1), grad.squeeze(1))))  # both at once
        x = torch.cat((x[:, :1].expand(-1, len(grad)), x[:, 1:])).t()  # [P, 4]
        h, c = self.lstm(x, (state.lstm_h, state.lstm_c))
        return MetaState(h, c, *self.metalstm(h, grad, state.f, state.i, state.c))

    def _two_updates(
        self, loss: Tensor, grad: Tensor, state: MetaState, implementation: Callable[..., MetaState]
    ) -> list[Tensor]:
        """The state after two updates and the gradients of what is learned and, in second order, of
        loss and gradient, for ``gpu.works``.
        """
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in (loss, grad)]
        loss, grad = inputs
        with torch.enable_grad():
            for _ in range(2):
                state = implementation(self, loss, grad, state)
            total = sum(t.square().sum() for t in state)
            learned = [p for p in (*self.parameters(), *inputs) if p.requires_grad]
            grads = torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True)
        return [*(t.detach() for t in state), *grads]
