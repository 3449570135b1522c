import numpy as np
import pytest
import torch

from metalearner import MetaLearner


@pytest.mark.parametrize("lstm_init", ["pytorch", "authors"])
def test_initialisation_is_the_published_one(lstm_init):
    for _ in range(20):
        meta = MetaLearner(4, 20, 10, lstm_init=lstm_init)
        cell = meta.metalstm
        assert max(cell.WF.abs().max(), cell.WI.abs().max()) <= 0.01
        assert 4 <= cell.bF.item() <= 6
        assert -5 <= cell.bI.item() <= -4
        largest = max(p.abs().max() for p in meta.lstm.parameters())
        assert (largest <= 0.01) == (lstm_init == "authors")
        assert (
            meta.lstm.bias_hh.requires_grad == meta.lstm.bias_hh.any() == (lstm_init == "pytorch")
        )
    cell = MetaLearner(4, 20, 10, bi_range=(0.0, 0.0), bf_range=(2.0, 2.0)).metalstm
    assert (cell.bI.item(), cell.bF.item()) == (0, 2)


def test_steps_are_the_papers():
    """Equations 3 and 4 and an LSTM, one coordinate after another in NumPy, for any sizes."""
    plain = MetaLearner(4, 7, 11).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(0, 0.5)
    w = {name: p.detach().numpy() for name, p in plain.named_parameters()}
    state, c = plain.initial_state(), w["metalstm.cI"][:, 0].copy()
    h, memory, f, i = np.zeros((11, 7)), np.zeros((11, 7)), np.zeros(11), np.zeros(11)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def one_number(v):
        if abs(v) < np.exp(-10):
            return -1, np.exp(10) * v
        return np.log(abs(v) + 1e-8) / 10, np.sign(v)

    for step in range(3):
        loss = torch.tensor(1.5 - step, dtype=torch.float64)
        grad = torch.randn(11, 1, dtype=torch.float64) * 10.0 ** (-2 * step)
        grad[:3, 0] = torch.tensor([0.0, 0.999, -1.001]) * np.exp(-10)  # where prep changes
        state = plain(loss, grad, state)
        for k in range(11):
            g = grad[k].item()
            x = np.array([*one_number(loss.item()), *one_number(g)])
            gates = w["lstm.weight_ih"] @ x + w["lstm.weight_hh"] @ h[k]
            gates += w["lstm.bias_ih"] + w["lstm.bias_hh"]
            enter, forget, new, leave = np.split(gates, 4)
            memory[k] = sigmoid(forget) * memory[k] + sigmoid(enter) * np.tanh(new)
            h[k] = sigmoid(leave) * np.tanh(memory[k])
            f[k] = np.array([*h[k], c[k], f[k]]) @ w["metalstm.WF"][:, 0] + w["metalstm.bF"].item()
            i[k] = np.array([*h[k], c[k], i[k]]) @ w["metalstm.WI"][:, 0] + w["metalstm.bI"].item()
            c[k] = sigmoid(f[k]) * c[k] - sigmoid(i[k]) * g
        assert np.allclose(state.c.detach().numpy()[:, 0], c, rtol=1e-12)
        assert np.allclose(state.i.detach().numpy()[:, 0], i, rtol=1e-12)
