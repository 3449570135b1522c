"""Pre-training: the learner learns to tell all training classes apart, as an ordinary network,
before it meta-learns.

A batch is an episode of all training classes in the order of their names, without a support set to
adapt to: the loss of all its images trains cI directly, and the gates not at all. A meta-learner
that begins with the result (``--start``) keeps its convolutions; its classifier, of fewer classes,
starts at zero (``checkpoints.load_start``).

The classifier compares directions only, cos(features, weights of a class), as in Gidaris &
Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", and Qi et al., "Low-Shot Learning
with Imprinted Weights" (both 2018): the images of a class must then lie in one direction, that of
their mean, to which a step of gradient descent moves an empty classifier.

The paper compares with such a network as a baseline (section 5.1). To begin meta-learning with it
is from Rusu et al., "Meta-Learning with Latent Embedding Optimization", and Sun et al.,
"Meta-Transfer Learning for Few-Shot Learning" (both 2019).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dataloader import EpisodeDataset, episodes, scan_split
from episode import Episode, accuracy, learned, step_if_finite, update_metalearner
from learner import N_BLOCKS, Conv4
from metalearner import MetaLearner
from utils import UserError

MEASURED = 20  # episodes whose images' batch statistics are taken
COSINE_SCALE = 10.0  # of the cosines, so that a probability can come close to 1


def all_classes(args: argparse.Namespace) -> int:
    """How many classes pre-training tells apart: all that there are to train on.

    Raises:
        UserError: the flags ask for something else.
    """
    n = len(scan_split(args.data_root, "train").classes)
    if args.n_class not in (None, n):
        raise UserError(
            f"--n-class {args.n_class}: --mode pretrain takes all {n} classes of {args.data_root}/train; leave it out"
        )
    if args.adapt != "all":
        raise UserError(
            f"--adapt {args.adapt}: --mode pretrain trains all of the learner; leave it out"
        )
    if args.meta_batch != 1:
        raise UserError(
            f"--meta-batch {args.meta_batch}: --mode pretrain makes one update a batch; leave it out"
        )
    return n


@torch.no_grad()
def fold_statistics(
    args: argparse.Namespace, metalearner: MetaLearner, dataset: EpisodeDataset
) -> None:
    """Make batch normalisation's statistics a part of the filters and biases in cI; raise the last
    shift by ``--bn-shift``.

    Normalised by mean 0 and variance 1, as ``Conv4`` has it with ``adapt="classifier"``, the blocks
    then do what they did with the statistics. (Bronskill et al., "TaskNorm", 2020, compare where a
    few-shot learner may take its statistics from.)

    A long pre-training leaves 85 % of the features of mini-ImageNet's images zero; a higher shift
    brings some back, which helps to tell new classes apart (results/recipe-search.md).

    Args:
        args: the flags that shape the learner.
        metalearner: cI is changed.
        dataset: of the training images; the statistics of its first ``MEASURED`` episodes are
            averaged.
    """
    cell = metalearner.metalstm
    device = cell.cI.device
    learner = Conv4(
        args.image_size, args.bn_eps, args.bn_momentum, args.n_class, n_filters=args.filters
    ).to(device)
    learner.copy_flat_params(cell.cI)
    shown = episodes(dataset.first(MEASURED), 0, 0, device, False)
    update_bn((torch.cat((episode.support, episode.query)) for episode in shown), learner)
    for b in range(1, N_BLOCKS + 1):
        conv, norm = learner.get_submodule(f"conv{b}"), learner.get_submodule(f"norm{b}")
        scale = torch.sqrt((1 + norm.eps) / (norm.running_var + norm.eps))
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.sub_(norm.running_mean).mul_(scale)
    norm.bias.add_(
        args.bn_shift * norm.weight.abs()
    )  # what a normalisation makes has a standard deviation of |weight|
    cell.init_cI(learner.get_flat_params())


def pretrain_batch(
    episode: Episode,
    learner: Conv4,
    metalearner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    step: Callable[[torch.optim.Optimizer, Tensor], None] = step_if_finite,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of cI by the classification loss of an episode's images, support and query set
    alike.

    Args:
        episode: of all classes, which are in the same order in each call.
        learner: takes cI's values; overwritten.
        metalearner: cI is updated; the gates have a gradient of zero, with which Adam leaves them
            as they are.
        optimizer, grad_clip, step: as for ``episode.update_metalearner``.

    Returns:
        Loss [], accuracy [] in percent, and whether the update was skipped [], bool; still on the
        device.
    """
    x, y = (
        torch.cat((episode.support, episode.query)),
        torch.cat((episode.support_y, episode.query_y)),
    )
    learner.train()
    learner.reset_batch_stats()
    learner.copy_flat_params(metalearner.metalstm.cI)
    logits = COSINE_SCALE * F.linear(
        F.normalize(learner.features(x)), F.normalize(learner.cls.weight)
    )
    loss = F.cross_entropy(logits, y)
    grads = torch.autograd.grad(
        loss, list(learner.parameters()), allow_unused=True, materialize_grads=True
    )
    of_cI, cI = torch.cat([g.reshape(-1) for g in grads]), metalearner.metalstm.cI
    gradient = torch.cat(
        [of_cI if p is cI else torch.zeros_like(p).view(-1) for p in learned(metalearner)]
    )
    losses = loss.detach().unsqueeze(0)
    skipped = update_metalearner(
        gradient.unsqueeze(0), losses, metalearner, optimizer, grad_clip, step
    )
    return losses[0], accuracy(logits.detach(), y), skipped
