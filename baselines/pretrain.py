"""Pre-training: the learner classifies all training classes, as an ordinary network.

A batch is an episode of all classes in the order of their names, support and query set together.
By default the classifier uses cosines, cos(features, weights of a class), as Gidaris & Komodakis
and Qi et al. (both 2018) do: the features of a class then share one direction, to which one step of
gradient descent moves a linear head that starts at zero. ``--classifier linear`` gives the network
that the paper's baselines start from (section 5.1).

Meta-learning from a pre-trained network is due to Rusu et al. and Sun et al. (both 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.episodic import classification
from data.layout import check_splits, scan_split
from engine.backend import adam, dataset, make_learner, select_backend
from engine.distributed import Ranks
from engine.flags import resolve
from engine.folder import RunFolder
from engine.parallel import set_learning_rate
from engine.run import Run
from episode import Episode, step_if_finite, update_metalearner
from learner import Conv4
from utils import UserError

COSINE_SCALE = 10.0  # of the cosines, so that a probability can come close to 1


def pretrain_batch(
    episode: Episode,
    network: Conv4,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
    classifier: str = "cosine",
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the network once by the classification loss of an episode's images.

    Args:
        episode: of all classes, in the same order in each call.
        network: trained; its running statistics are of this batch.
        optimizer: of the network's parameters.
        grad_clip: largest norm of the gradient.
        step: ``step_if_finite`` or fast/'s equivalent.
        classifier: "cosine" or "linear".

    Returns:
        Loss [], accuracy [] in percent, and whether the update was skipped [], bool; on the device.
    """
    x = torch.cat((episode.support, episode.query))
    y = torch.cat((episode.support_y, episode.query_y))
    network.train()
    network.reset_batch_stats()
    if classifier == "linear":
        logits = network(x)
    else:
        features, classes = F.normalize(network.features(x)), F.normalize(network.cls.weight)
        logits = COSINE_SCALE * F.linear(features, classes)
    gradient, loss, percent = classification(network, logits, y)
    how = network, optimizer, grad_clip, step
    return loss, percent, update_metalearner(gradient.unsqueeze(0), loss.unsqueeze(0), *how)


def pretrain(cli_args: dict[str, object], ranks: Ranks) -> None:
    """Train for ``--episode`` batches (``--mode pretrain``).

    Raises:
        UserError: a flag is not for pre-training.
    """
    args = resolve(cli_args)
    check_splits(args.data_root)
    train_files = scan_split(args.data_root, "train")
    n_classes = len(train_files.classes)
    if cli_args.get("n_class", n_classes) != n_classes:
        raise UserError(f"--n-class {args.n_class}: --mode pretrain takes all {n_classes} classes")
    with RunFolder({**cli_args, "n_class": n_classes}, ranks) as folder:
        args = folder.args
        if folder.finished:
            folder.print_finished()
            return
        backend = select_backend(args, ranks.local)
        print(f"{backend.description}\npre-training on {args.data_root}, into {folder.path}")
        train_set = dataset(args, backend, train_files, args.episode, in_order=True)
        network = make_learner(args, backend)
        optimizer = adam(args, backend, list(network.parameters()))
        how = (network, optimizer, args.grad_clip, backend.step, args.classifier)
        train_step = backend.capture(
            lambda batch: pretrain_batch(batch, *how), (network,), optimizer
        )
        with Run(
            folder, {"network": network}, optimizer, {"train": train_set}, backend.device
        ) as run:
            for n, batch in run.batches():
                set_learning_rate(args, optimizer, n - 1)
                run.log(n, *train_step(*batch))
            run.finish()
