"""What the meta-learner does inside an episode, recorded for the plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader import EpisodeDataset, episodes
from episode import accuracy, query_loss, updates
from learner import FlatModule
from metalearner import MetaLearner
from utils import UserError, atomic_write

NAME = "trace.npz"
RECORDED = 20  # validation episodes that are followed update by update
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def layers(learner: FlatModule, n: int) -> dict[str, slice]:
    """The learner's layers and their places in the last n numbers of the flat parameter vector, in
    its order.

    A layer is a module with a matrix or filters of its own, and the modules with vectors only
    (biases, normalisation) that follow it.
    """
    names = {module: name for name, module in learner.named_modules()}
    found, start, layer = {}, 0, None
    for module, _, shape in learner.slots():
        if layer is None or (len(shape) > 1 and names[module] != layer):
            layer = names[module]
            found[layer] = slice(start, start)
        start += shape.numel()
        found[layer] = slice(found[layer].start, start)
    before = start - n
    return {
        layer: slice(s.start - before, s.stop - before)
        for layer, s in found.items()
        if s.start >= before
    }


@torch.no_grad()
def record(
    dataset: EpisodeDataset,
    learners: tuple[FlatModule, FlatModule],
    metalearner: MetaLearner,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Follow all episodes of a data set update by update.

    Returns:
        E episodes, T updates, L layers that adapt:
        ``layers``: [L] their names; ``forget``, ``input``: [E, T, L, 6] float32, the gates after
        the sigmoid: mean over the layer's coordinates, then ``QUANTILES``; ``moved``: [E, T, L],
        |c_t - cI| / |cI| of the layer; ``support``, ``query``: [E, T + 1], accuracy in percent of
        the learner on either set, with the running statistics, first of cI itself with the
        statistics of the first minibatch; and, of the last episode, ``classes`` [n-way] their
        names, ``images`` [Q, S, S, 3] uint8 and ``confusion`` [Q, 2] int64, true and predicted
        class of each query image.
    """
    w_grad, wo_grad = learners
    wo_grad.eval()
    cI = metalearner.metalstm.cI
    found: dict[str, list] = {k: [] for k in ("forget", "input", "moved", "support", "query")}
    for episode in episodes(dataset, 0, 0, device, False):
        rows: dict[str, list] = {k: [] for k in found}
        for _, state in updates(episode, w_grad, metalearner, batch_size):
            c, start, where = (
                metalearner.complete(state.c),
                cI[-len(state.c) :],
                layers(w_grad, len(state.c)),
            )
            for parameters in (c,) if rows["query"] else (cI, c):
                logits = query_loss(episode, w_grad, wo_grad, parameters)[1]
                rows["query"].append(accuracy(logits, episode.query_y))
                rows["support"].append(accuracy(wo_grad(episode.support), episode.support_y))
            rows["forget"].append(_spread(torch.sigmoid(state.f), where))
            rows["input"].append(_spread(torch.sigmoid(state.i), where))
            rows["moved"].append(
                torch.stack(
                    [(state.c[s] - start[s]).norm() / start[s].norm() for s in where.values()]
                )
            )
        for k, values in rows.items():
            found[k].append(torch.stack(values))
    arrays = {k: torch.stack(v).float().cpu().numpy() for k, v in found.items()}
    x = episode.query.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    images = ((x - low) / (high - low).clamp_min(1e-6) * 255).round().byte().permute(0, 2, 3, 1)
    confusion = torch.stack((episode.query_y, logits.argmax(1)), dim=1)
    shown = dataset.numbers(len(dataset) - 1)[: dataset.n_class * dataset.n_shot : dataset.n_shot]
    words = {"layers": list(where), "classes": [dataset.files[k].parent.name for k in shown]}
    arrays |= {k: np.array(v, dtype=np.str_) for k, v in words.items()}
    return arrays | {"images": images.cpu().numpy(), "confusion": confusion.cpu().numpy()}


def _spread(gate: Tensor, where: dict[str, slice]) -> Tensor:
    q = torch.tensor(QUANTILES, device=gate.device, dtype=gate.dtype)
    return torch.stack(
        [
            torch.cat((gate[s].mean().view(1), torch.quantile(gate[s].view(-1), q)))
            for s in where.values()
        ]
    )


def write_trace(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a record into a run folder as ``trace.npz``."""
    with atomic_write(folder / NAME) as file:
        np.savez_compressed(file, **arrays)


def read_trace(folder: Path) -> dict[str, np.ndarray] | None:
    """What ``write_trace`` wrote, or None where there is none. Older records know no names: layers
    and classes get numbers.

    Raises:
        UserError: the file is something else.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            trace = {
                k: arrays[k]
                for k in ("forget", "input", "moved", "support", "query", "images", "confusion")
            }
            counts = {"layers": trace["moved"].shape[2], "classes": trace["confusion"].max() + 1}
            numbers = {name: np.array([f"{k + 1}" for k in range(n)]) for name, n in counts.items()}
            return trace | {name: arrays.get(name, numbers[name]) for name in numbers}
    except Exception as e:  # damaged or foreign bytes raise nearly anything
        raise UserError(f"{path}: not a record of episodes; remove it") from e
