"""The worked episode of tests/golden: three training episodes and one evaluation, in float64 and in
float32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LEARNERS, METALEARNERS

from episode import Episode, adapt, evaluate_episode, query_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "episode_32px.npz")
STRIDE = int(GOLDEN["sample_stride"])


def images(name, dtype):
    return (torch.from_numpy(GOLDEN[name]).to(dtype) - 127.5) / 64


def relative(actual, expected):
    actual = actual.detach().double().numpy().reshape(-1)
    expected = np.asarray(expected, dtype=np.float64).reshape(-1)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def golden_setup(backend, dtype):
    shape = dict(
        image_size=int(GOLDEN["image_size"]),
        bn_eps=1e-3,
        bn_momentum=0.95,
        n_classes=int(GOLDEN["n_class"]),
    )
    w_grad, wo_grad = (LEARNERS[backend](**shape).to(dtype) for _ in range(2))
    meta = METALEARNERS[backend](4, 20, GOLDEN["theta0"].size).to(dtype)
    meta.load_state_dict(
        {k: torch.from_numpy(GOLDEN[f"meta.{k}"]).to(dtype) for k in meta.state_dict()}
    )
    support_y, query_y = (torch.from_numpy(GOLDEN[k]).long() for k in ("support_y", "query_y"))
    order = torch.arange(support_y.numel()).repeat(int(GOLDEN["epoch"]), 1)
    episode = Episode(images("support", dtype), support_y, images("query", dtype), query_y, order)
    return episode, w_grad, wo_grad, meta


def one_episode(k, episode, w_grad, wo_grad, meta, close):
    """Forward and backward pass of training episode k, held against the worked one."""
    wo_grad.train()
    cI, losses = adapt(episode, w_grad, meta, batch_size=25)
    loss, logits = query_loss(episode, w_grad, wo_grad, cI)
    meta.zero_grad()
    loss.backward()
    assert relative(torch.stack(losses), GOLDEN[f"train{k}.support_losses"]) < close
    assert relative(cI.norm(), GOLDEN[f"train{k}.cI_norm"]) < close
    assert relative(cI[::STRIDE], GOLDEN[f"train{k}.cI_sample"]) < close
    assert relative(logits, GOLDEN[f"train{k}.query_logits"]) < close
    assert relative(loss, GOLDEN[f"train{k}.query_loss"]) < close
    if k == 0:
        for name, p in meta.named_parameters():
            grad = p.grad[::STRIDE] if name == "metalstm.cI" else p.grad
            assert relative(grad, GOLDEN[f"grad.{name}"]) < close, name
    norm = torch.nn.utils.clip_grad_norm_(meta.parameters(), 0.25)
    assert relative(norm, GOLDEN[f"train{k}.grad_norm"]) < close


def evaluation(episode, w_grad, wo_grad, meta, close):
    loss, accuracy = evaluate_episode(episode, w_grad, wo_grad, meta, batch_size=25)
    assert relative(wo_grad(episode.query), GOLDEN["eval.query_logits"]) < close
    assert relative(loss, GOLDEN["eval.query_loss"]) < close
    assert relative(accuracy, GOLDEN["eval.accuracy"]) < 1e-6


# In float32 the later episodes stand apart: after Adam's steps the parameters differ by up to 1e-3
# where a gradient was nearly zero, and then some maximum of a pooling window falls on its
# neighbour. By chance that happens in the second already: it is 6e-6 off in plain PyTorch with two
# threads, 3e-3 with one, and 3e-3 in fast/ on a processor with AVX2 only.
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, [1e-9] * 4), (torch.float32, [1e-4, 1e-2, 3e-2, 3e-2])]
)
def test_three_episodes_of_training_and_one_of_evaluation(backend, dtype, close):
    episode, w_grad, wo_grad, meta = golden_setup(backend, dtype)
    optimizer = torch.optim.Adam(meta.parameters(), lr=1e-3)
    for k in range(3):
        one_episode(k, episode, w_grad, wo_grad, meta, close[k])
        optimizer.step()
    for name, p in meta.named_parameters():
        value = p[::STRIDE] if name == "metalstm.cI" else p
        assert relative(value, GOLDEN[f"after.{name}"]) < close[2], name
    evaluation(episode, w_grad, wo_grad, meta, close[3])


# In the third, two numbers of one pooling window are equal but for rounding: which is the larger
# depends on the processor, and on the compiler of the kernels; one choice is 1e-7 from the worked
# episode, the other 7e-4.
def test_each_episode_in_float32_from_the_exact_parameters(backend):
    exact, single = golden_setup(backend, torch.float64), golden_setup(backend, torch.float32)
    optimizer = torch.optim.Adam(exact[-1].parameters(), lr=1e-3)
    for k, close in enumerate((1e-4, 1e-4, 2e-3)):
        single[-1].load_state_dict(exact[-1].state_dict())
        one_episode(k, *single, close=close)
        one_episode(k, *exact, close=1e-9)
        optimizer.step()
    single[-1].load_state_dict(exact[-1].state_dict())
    evaluation(*single, close=1e-4)
