import math

import pytest
import torch
from textbook import TextbookMetaLearner

from metalearner import MetaLearner, prep


def test_prep_on_both_sides_of_its_threshold():
    x = torch.tensor([1.0, -0.5, 0.0, 1e-6, -2e-5, math.exp(-10) * 1.001], dtype=torch.float64)
    first, second = prep(x)
    large = [True, True, False, False, False, True]
    for k, v in enumerate(x.tolist()):
        expected = (math.log(abs(v) + 1e-8) / 10, math.copysign(1, v)) if large[k] else (-1, math.exp(10) * v)
        assert (first[k].item(), second[k].item()) == pytest.approx(expected, rel=1e-12)


def test_parameter_names_are_the_checkpoints():
    shapes = {name: tuple(p.shape) for name, p in MetaLearner(4, 20, 100).named_parameters()}
    assert shapes == {
        "lstm.weight_ih": (80, 4),
        "lstm.weight_hh": (80, 20),
        "lstm.bias_ih": (80,),
        "lstm.bias_hh": (80,),
        "metalstm.WF": (22, 1),
        "metalstm.WI": (22, 1),
        "metalstm.cI": (100, 1),
        "metalstm.bI": (1, 1),
        "metalstm.bF": (1, 1),
    }


def test_initialisation_is_the_published_one():
    for seed in range(20):
        torch.manual_seed(seed)
        cell = MetaLearner(4, 20, 10).metalstm
        assert cell.WF.abs().max() <= 0.01
        assert cell.WI.abs().max() <= 0.01
        assert 4 <= cell.bF.item() <= 6
        assert -5 <= cell.bI.item() <= -4
    assert MetaLearner(4, 20, 10, bi_range=(0.0, 0.0)).metalstm.bI.item() == 0


def test_init_cI():
    meta = MetaLearner(4, 20, 6)
    flat = torch.arange(6.0)
    meta.metalstm.init_cI(flat)
    assert torch.equal(meta.metalstm.cI.detach().squeeze(1), flat)


def test_other_input_sizes_are_refused():
    with pytest.raises(ValueError, match="input_size is 5"):
        MetaLearner(5, 20, 6)


def test_steps_are_those_of_the_textbook():
    ours, plain = MetaLearner(4, 7, 11).double(), TextbookMetaLearner(7, 11).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.5)
    plain.load_state_dict(ours.state_dict())
    state, c = ours.initial_state(), plain.metalstm["cI"]
    other = (None, torch.zeros_like(c), torch.zeros_like(c), c)
    for k in range(3):
        loss, grad = torch.tensor(1.5 - k, dtype=torch.float64), torch.randn(11, 1, dtype=torch.float64) * 10.0 ** -(2 * k)
        state, other = ours(loss, grad, state), plain(loss, grad, other)
    assert torch.allclose(state.c, other[3], rtol=1e-12)
    weights = torch.randn(11, 1, dtype=torch.float64)
    (state.c * weights).sum().backward()
    (other[3] * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    for name, mine in ours.named_parameters():
        assert torch.allclose(mine.grad, theirs[name].grad, rtol=1e-9, atol=1e-14), name


def test_starts_as_gradient_descent_with_a_small_step():
    meta = MetaLearner(4, 20, 50).double()
    meta.metalstm.init_cI(torch.randn(50))
    grad = torch.randn(50, 1, dtype=torch.float64)
    with torch.no_grad():
        c = meta(torch.tensor(1.6, dtype=torch.float64), grad, meta.initial_state()).c
    step = meta.metalstm.cI - c
    assert torch.nn.functional.cosine_similarity((step - 0.01 * meta.metalstm.cI), grad, dim=0).item() > 0.5
    assert step.abs().max() < 0.1


def test_the_authors_initialisation():
    meta = MetaLearner(4, 20, 100, bf_range=(4, 5), lstm_init="authors")
    assert all(p.abs().max() <= 0.01 for p in meta.lstm.parameters())
    assert meta.lstm.weight_hh.std() > 0.004
    assert (meta.lstm.bias_hh == 0).all()
    assert not meta.lstm.bias_hh.requires_grad
    assert 4 <= meta.metalstm.bF.item() <= 5
    assert -5 <= meta.metalstm.bI.item() <= -4
