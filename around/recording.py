"""What the meta-learner does inside an episode, recorded for the plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader import EpisodeDataset, episodes
from episode import accuracy, query_loss, updates
from learner import N_BLOCKS, Learner
from metalearner import MetaLearner
from utils import UserError, whole_file

NAME = "trace.npz"
RECORDED = 20  # validation episodes that are followed update by update
LAYERS = (*(f"block {b}" for b in range(1, N_BLOCKS + 1)), "classifier")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def layers(learner: Learner) -> list[slice]:
    """The place of each of ``LAYERS`` in the flat parameter vector."""
    sizes = [shape.numel() for _, _, shape in learner.slots()]
    ends = np.cumsum([0, *sizes])
    return [slice(int(ends[k]), int(ends[min(k + 4, len(sizes))])) for k in range(0, len(sizes), 4)]


@torch.no_grad()
def record(
    dataset: EpisodeDataset,
    learners: tuple[Learner, Learner],
    metalearner: MetaLearner,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Follow all episodes of a data set update by update.

    Returns:
        E episodes, T updates, L layers:
        ``forget``, ``input``: [E, T, L, 6] float32, the gates after the sigmoid: mean over the layer's coordinates, then
        ``QUANTILES``; ``moved``: [E, T, L], |c_t - cI| / |cI| of the layer; ``support``, ``query``: [E, T], accuracy in
        percent of the learner on either set, with the running statistics; and, of the last episode, ``images`` [Q, S, S, 3]
        uint8 and ``confusion`` [Q, 2] int64, true and predicted class of each query image.
    """
    w_grad, wo_grad = learners
    wo_grad.eval()
    where = layers(w_grad)
    cI = metalearner.metalstm.cI
    found: dict[str, list] = {k: [] for k in ("forget", "input", "moved", "support", "query")}
    for episode in episodes(dataset, 0, 0, device, False):
        rows: dict[str, list] = {k: [] for k in found}
        for _, state in updates(episode, w_grad, metalearner, batch_size):
            rows["forget"].append(_spread(torch.sigmoid(state.f), where))
            rows["input"].append(_spread(torch.sigmoid(state.i), where))
            rows["moved"].append(torch.stack([(state.c[s] - cI[s]).norm() / cI[s].norm() for s in where]))
            logits = query_loss(episode, w_grad, wo_grad, state.c)[1]
            rows["query"].append(accuracy(logits, episode.query_y))
            rows["support"].append(accuracy(wo_grad(episode.support), episode.support_y))
        for k, values in rows.items():
            found[k].append(torch.stack(values))
    arrays = {k: torch.stack(v).float().cpu().numpy() for k, v in found.items()}
    x = episode.query.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    images = ((x - low) / (high - low).clamp_min(1e-6) * 255).round().byte().permute(0, 2, 3, 1)
    confusion = torch.stack((episode.query_y, logits.argmax(1)), dim=1)
    return arrays | {"images": images.cpu().numpy(), "confusion": confusion.cpu().numpy()}


def _spread(gate: Tensor, where: list[slice]) -> Tensor:
    q = torch.tensor(QUANTILES, device=gate.device, dtype=gate.dtype)
    return torch.stack([torch.cat((gate[s].mean().view(1), torch.quantile(gate[s].view(-1), q))) for s in where])


def write_trace(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a record into a run folder as ``trace.npz``."""
    with whole_file(folder / NAME) as file:
        np.savez_compressed(file, **arrays)


def read_trace(folder: Path) -> dict[str, np.ndarray] | None:
    """What ``write_trace`` wrote, or None where there is none.

    Raises:
        UserError: the file is something else.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {k: arrays[k] for k in ("forget", "input", "moved", "support", "query", "images", "confusion")}
    except Exception as e:  # damaged or foreign bytes raise nearly anything
        raise UserError(f"{path}: not a record of episodes; remove it") from e
