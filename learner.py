"""The learner: the network that the meta-learner trains (paper, section 4: four convolutional
blocks of 32 filters).

Two instances of one network play two parts:

``learner_w_grad``
    An ordinary model with leaf parameters. It yields the support loss and its gradient, which are
    *inputs* of the meta-learner and constants to its graph.
``learner_wo_grad``
    Its weights *are* slices of the meta-learner's last cell state cI, so the gradient of the query
    loss flows through them into the meta-learner. It has no leaf parameters of its own while it
    does so.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_BLOCKS = 4
MIN_IMAGE_SIZE = 2**N_BLOCKS


class FlatModule(nn.Module):
    """A network that the meta-learner can train: its parameters are read and written as one flat
    vector.

    Derive your own network from this class instead of ``nn.Module``, and write ``__init__`` and
    ``forward(x) -> logits`` as usual. Any layers will do, as long as all parameters are floats of
    one dtype and none is shared between two layers. The flat vector follows the order of
    ``parameters()``; P is its length."""

    _slots: list[tuple[nn.Module, str, torch.Size]] | None = None

    def slots(self) -> list[tuple[nn.Module, str, torch.Size]]:
        """Where each stretch of the flat vector belongs: (module, name in it, shape).

        Raises:
            ValueError: two layers share a parameter.
        """
        if self._slots is None:  # kept, because transfer_params takes the parameters away
            named = [
                (m, name, p.shape)
                for m in self.modules()
                for name, p in m.named_parameters(recurse=False)
            ]
            if len(named) != len(list(self.parameters())):
                raise ValueError(
                    "two layers share a parameter, but each needs a place of its own in the flat vector"
                )
            self._slots = named
        return self._slots

    def slices(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector [P] or [P, 1] into views with the parameters' shapes.

        Raises:
            ValueError: its length is not P.
        """
        shapes = [shape for _, _, shape in self.slots()]
        sizes = [shape.numel() for shape in shapes]
        if flat.numel() != sum(sizes):
            raise ValueError(
                f"the flat vector has {flat.numel()} numbers, but this learner has {sum(sizes)}"
            )
        return [
            part.view(shape)
            for part, shape in zip(flat.reshape(-1).split(sizes), shapes, strict=True)
        ]

    def size(self) -> int:
        """P."""
        return sum(shape.numel() for _, _, shape in self.slots())

    def get_flat_params(self) -> Tensor:
        """A detached copy of the parameters as one vector [P]."""
        return torch.cat([getattr(m, name).detach().reshape(-1) for m, name, _ in self.slots()])

    @torch.no_grad()
    def copy_flat_params(self, cI: Tensor) -> None:
        """Overwrite the parameters' values with those of a cell state (for learner_w_grad).

        Args:
            cI: [P] or [P, 1]; its graph, if any, is left behind.
        """
        for (m, name, _), value in zip(self.slots(), self.slices(cI), strict=True):
            getattr(m, name).copy_(value)

    def transfer_params(self, learner_w_grad: FlatModule, cI: Tensor) -> None:
        """Make slices of a cell state this learner's weights (for learner_wo_grad).

        From the first call on this learner owns no parameters: each weight is a view of ``cI`` and
        carries its ``grad_fn``, so a loss computed here back-propagates into whatever made ``cI``.

        Args:
            learner_w_grad: the twin whose buffers (batch normalisation's running statistics) are
                copied.
            cI: [P] or [P, 1], the meta-learner's last cell state.
        """
        self.copy_buffers(learner_w_grad)
        for (m, name, _), value in zip(self.slots(), self.slices(cI), strict=True):
            m._parameters.pop(name, None)
            setattr(m, name, value)

    def __deepcopy__(self, memo: dict) -> FlatModule:
        """A copy of its own, also of a learner_wo_grad: PyTorch refuses to copy weights that carry
        a ``grad_fn``.
        """
        for m, name, _ in self._slots or []:
            weight = getattr(m, name)
            if not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    @torch.no_grad()
    def copy_buffers(self, other: FlatModule) -> None:
        """Copy the values of another instance's buffers."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)

    def reset_batch_stats(self) -> None:
        """Reset batch normalisation's running statistics to mean 0 and variance 1: before each
        episode, both learners.
        """
        for m in self.modules():
            if hasattr(m, "reset_running_stats"):
                m.reset_running_stats()

    def to_adapt(self, x: Tensor) -> tuple[FlatModule, Tensor]:
        """What an episode trains: this network or a part of it whose parameters are the last ones
        of the flat vector.

        Args:
            x: the support images [N, ...].

        Returns:
            The part, and what it reads of them, [N, ...]. Here: all of it.
        """
        return self, x

    def loss_and_grad(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of a minibatch and its gradient, both detached.

        Args:
            x: inputs [B, ...]; y: labels [B], int64.

        Returns:
            The loss [] and its gradient with respect to the flat parameters [P, 1], zero where the
            loss does not depend on one.
        """
        with torch.enable_grad():
            loss = F.cross_entropy(self(x), y)
            grads = torch.autograd.grad(
                loss, list(self.parameters()), allow_unused=True, materialize_grads=True
            )
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads]).unsqueeze(1)


class Classifier(FlatModule, nn.Linear):
    """The learner's last layer, which can be trained alone."""


class Conv4(FlatModule):
    """Four blocks of convolution, batch normalisation, ReLU and 2x2 max-pooling, then a linear
    classifier.

    Args:
        image_size: height and width of the images in pixels, at least 16.
        bn_eps: epsilon of batch normalisation.
        bn_momentum: share of the newest batch in the running statistics.
        n_classes: number of classes of an episode (n-way).
        bn_scale: where batch normalisation's scale starts: "uniform" for U(0, 1), as in the
            authors' Torch and the port's PyTorch 1.0; "one" as in PyTorch since 1.2.
        n_filters: filters of each convolution.
        adapt: what an episode trains: "all", or "classifier", the last layer only. Then nothing
            before it depends on the episode: batch normalisation does not look at the batch, but
            has mean 0 and variance 1 for its statistics, and it is for the filters to make them so
            (``baselines.pretrain.fold_statistics``).

    Raises:
        ValueError: ``image_size`` is smaller than 16, so that nothing is left after four poolings.
    """

    def __init__(
        self,
        image_size: int,
        bn_eps: float,
        bn_momentum: float,
        n_classes: int,
        bn_scale: str = "uniform",
        n_filters: int = 32,
        adapt: str = "all",
    ):
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(
                f"image_size is {image_size}, but four poolings need at least {MIN_IMAGE_SIZE} pixels"
            )
        for b in range(1, N_BLOCKS + 1):
            conv = nn.Conv2d(3 if b == 1 else n_filters, n_filters, 3, padding=1)
            norm = nn.BatchNorm2d(n_filters, eps=bn_eps, momentum=bn_momentum)
            if bn_scale == "uniform":
                nn.init.uniform_(norm.weight)
            self.add_module(f"conv{b}", conv)
            self.add_module(f"norm{b}", norm)
        self.cls = Classifier(n_filters * (image_size // MIN_IMAGE_SIZE) ** 2, n_classes)
        self.adapt = adapt
        self.train()

    def train(self, mode: bool = True) -> Conv4:
        """See ``nn.Module.train``. Only where all of the learner adapts does batch normalisation
        have two modes.
        """
        super().train(mode)
        for b in range(1, N_BLOCKS + 1):
            getattr(self, f"norm{b}").train(mode and self.adapt == "all")
        return self

    def to_adapt(self, x: Tensor) -> tuple[FlatModule, Tensor]:
        """See ``FlatModule.to_adapt``: all of it, or the classifier, which reads the images'
        features.
        """
        if self.adapt == "all":
            return self, x
        with torch.no_grad():
            return self.cls, self.features(x)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier reads.

        Args:
            x: images [B, 3, image_size, image_size], float.

        Returns:
            [B, n_filters * (image_size // 16)^2]. In train mode, if all of it adapts, the batch's
            own statistics normalise (and update the running ones); otherwise the running statistics
            do.
        """
        for b in range(1, N_BLOCKS + 1):
            conv, norm = getattr(self, f"conv{b}"), getattr(self, f"norm{b}")
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: as for ``features``.

        Returns:
            Logits [B, n_classes].
        """
        return self.cls(self.features(x))
