"""Records gates and updates within episodes, for the plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader import EpisodeDataset
from engine.model import Model, Trainable
from episode import accuracy, query_loss, updates
from learner import FlatModule
from metalearner import MetaLearner
from utils import UserError, atomic_write

NAME = "trace.npz"
N_EPISODES = 20  # that are followed update by update
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ARRAYS = ("layers", "classes", "forget", "input", "moved", "support", "query", "confusion")


def write_trace(
    folder: Path,
    dataset: EpisodeDataset | None,
    model: Trainable,
    batch_size: int,
    device: torch.device,
) -> None:
    """Record the first ``N_EPISODES`` of a data set into a run folder, as ``trace.npz``, if there
    is one and the model has gates.

    In an exported run's folder it holds no photographs.
    """
    gates = isinstance(model, Model) and isinstance(model.metalearner, MetaLearner)
    if dataset is None or not gates:
        return
    arrays = record(dataset, model, batch_size, device)
    if not (folder / "ckpts").is_dir():
        del arrays["images"]
    with atomic_write(folder / NAME) as file:
        np.savez_compressed(file, **arrays)


def read_trace(folder: Path) -> dict[str, np.ndarray] | None:
    """Read what ``write_trace`` wrote, or None where there is none; "images" may be missing.

    Raises:
        UserError: the file is something else.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [*ARRAYS, "images"] if "images" in arrays else ARRAYS
            return {name: arrays[name] for name in names}
    except Exception as e:  # damaged or foreign bytes raise nearly anything
        raise UserError(f"{path}: not a record of episodes; remove it") from e


def layers(learner: FlatModule) -> dict[str, slice]:
    """The learner's layers and their places in the flat parameter vector, in its order.

    A layer is a module with a matrix or filters of its own, and the modules with vectors only
    (biases, normalisation) that follow it.
    """
    names = {module: name for name, module in learner.named_modules()}
    found, start, layer = {}, 0, None
    for module, _, shape in learner.slots:
        if layer is None or (len(shape) > 1 and names[module] != layer):
            layer = names[module]
            found[layer] = slice(start, start)
        start += shape.numel()
        found[layer] = slice(found[layer].start, start)
    return found


@torch.no_grad()
def record(
    dataset: EpisodeDataset, model: Model, batch_size: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Follow the first ``N_EPISODES`` update by update; overwrites the model's learners.

    Returns:
        Of E episodes, T updates, L layers:
        ``layers`` [L], their names;
        ``forget``, ``input`` [E, T, L, 6] float32, the gates after the sigmoid: mean over the
        layer's coordinates, then ``QUANTILES``;
        ``moved`` [E, T, L], |c_t - cI| / |cI| of the layer;
        ``support``, ``query`` [E, T + 1], accuracy in percent on either set, with the running
        statistics; entry 0 is cI's, with the statistics of the first minibatch.
        Of the last episode, with Q query images of S pixels:
        ``classes`` [n-way], their names; ``images`` [Q, S, S, 3] uint8;
        ``confusion`` [Q, 2] int64, true and predicted class.
    """
    w_grad, wo_grad = model.learners
    wo_grad.eval()
    cI, places = model.metalearner.metalstm.cI, layers(w_grad)
    found: dict[str, list] = {k: [] for k in ("forget", "input", "moved", "support", "query")}
    for index in range(N_EPISODES):
        images = dataset.deliver(dataset[index], device)
        episode = model.embed(images)
        rows: dict[str, list] = {k: [] for k in found}
        for _, state in updates(episode, w_grad, model.metalearner, batch_size):
            for parameters in (state.c,) if rows["query"] else (cI, state.c):
                logits = query_loss(episode, w_grad, wo_grad, parameters)[1]
                rows["query"].append(accuracy(logits, episode.query_y))
                rows["support"].append(accuracy(wo_grad(episode.support), episode.support_y))
            rows["forget"].append(_spread(torch.sigmoid(state.f), places))
            rows["input"].append(_spread(torch.sigmoid(state.i), places))
            moved = [
                (state.c[s] - cI[s]).norm() / cI[s].norm().clamp_min(1e-12) for s in places.values()
            ]
            rows["moved"].append(torch.stack(moved))
        for k, values in rows.items():
            found[k].append(torch.stack(values))
    arrays = {k: torch.stack(v).float().cpu().numpy() for k, v in found.items()}
    x = images.query.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    pixels = ((x - low) / (high - low).clamp_min(1e-6) * 255).round().byte().permute(0, 2, 3, 1)
    confusion = torch.stack((episode.query_y, logits.argmax(1)), dim=1)
    shown = dataset.indices(index)[: dataset.n_class * dataset.n_shot : dataset.n_shot]
    names = {"layers": list(places), "classes": [dataset.files[k].parent.name for k in shown]}
    arrays |= {k: np.array(v, dtype=np.str_) for k, v in names.items()}
    return arrays | {"images": pixels.cpu().numpy(), "confusion": confusion.cpu().numpy()}


def _spread(gate: Tensor, places: dict[str, slice]) -> Tensor:
    q = torch.tensor(QUANTILES, device=gate.device, dtype=gate.dtype)
    parts = [gate[s].view(-1) for s in places.values()]
    return torch.stack([torch.cat((p.mean().view(1), torch.quantile(p, q))) for p in parts])
