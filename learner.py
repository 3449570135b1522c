"""The learner: the network that the meta-learner trains (paper, section 5.1: four convolutional
blocks of 32 filters).

Two instances of one network play two parts:

``learner_w_grad``
    An ordinary model with leaf parameters. It yields the support loss and its gradient, which are
    *inputs* of the meta-learner and, unless it asks for second order, constants in its graph.
``learner_wo_grad``
    Its weights *are* slices of the meta-learner's last cell state, so the gradient of the query
    loss flows through them into the meta-learner. It has no leaf parameters.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

N_BLOCKS = 4
MIN_IMAGE_SIZE = 2**N_BLOCKS


def flat_gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """The loss's gradient [G], one parameter after the other; zeros for those without effect."""
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


class FlatModule(nn.Module):
    """A network whose parameters are read and written as one flat vector [P].

    Derive your own network from this class (``--learner`` also wraps other ``nn.Module``s), and
    write ``__init__`` and ``forward(x) -> logits`` as usual. All parameters must have the same
    floating dtype, and no two layers may share one. ``--learner`` also refuses what cannot be
    meta-learned here: other dtypes than float32, frozen parameters, dropout, and buffers that
    change, except batch norm's. The vector follows the order of ``parameters()``.
    """

    @functools.cached_property  # transfer_params removes the parameters
    def slots(self) -> list[tuple[nn.Module, str, torch.Size]]:
        """List (module, parameter's name in it, shape) in the order of the flat vector.

        Raises:
            ValueError: two layers share a parameter.
        """
        named = [
            (m, name, p.shape)
            for m in self.modules()
            for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
        ]
        if len(named) != len(list(self.parameters())):
            raise ValueError("two layers share a parameter; give each one of its own")
        return named

    def slices(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector [P] or [P, 1] into views with the parameters' shapes."""
        shapes = [shape for _, _, shape in self.slots]
        parts = flat.reshape(-1).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def size(self) -> int:
        """P, the number of parameters."""
        return sum(shape.numel() for _, _, shape in self.slots)

    def get_flat_params(self) -> Tensor:
        """Copy the parameters into one vector [P], detached."""
        return torch.cat([getattr(m, name).detach().reshape(-1) for m, name, _ in self.slots])

    @torch.no_grad()
    def copy_flat_params(self, c: Tensor) -> None:
        """Overwrite the parameters' values with those of a cell state (for learner_w_grad).

        Args:
            c: [P] or [P, 1]; copied without its graph.
        """
        for (m, name, _), value in zip(self.slots, self.slices(c), strict=True):
            getattr(m, name).copy_(value)

    def transfer_params(self, learner_w_grad: FlatModule, c: Tensor) -> None:
        """Make slices of a cell state this learner's weights (for learner_wo_grad).

        From the first call on, this learner owns no parameters: each weight is a view of ``c``
        with its ``grad_fn``, so the loss back-propagates into whatever made ``c``.

        Args:
            learner_w_grad: the source of the buffers (batch norm's running statistics).
            c: [P] or [P, 1], the meta-learner's last cell state.
        """
        self.copy_buffers(learner_w_grad)
        for (m, name, _), value in zip(self.slots, self.slices(c), strict=True):
            m._parameters.pop(name, None)
            setattr(m, name, value)

    @torch.no_grad()
    def copy_buffers(self, other: FlatModule) -> None:
        """Copy the values of another instance's buffers."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)

    def reset_batch_stats(self) -> None:
        """Reset batch norm's running statistics to mean 0 and variance 1, before an episode."""
        for m in self.modules():
            if isinstance(m, _NormBase):
                m.reset_running_stats()

    def loss_and_grad(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean cross entropy of a minibatch and its gradient.

        Args:
            x: inputs [B, ...].
            y: labels [B], int64.

        Returns:
            The loss [] and its gradient [P, 1], both detached; 0 for an unused parameter.
        """
        with torch.enable_grad():
            loss = F.cross_entropy(self(x), y)
        return loss.detach(), flat_gradient(loss, list(self.parameters())).unsqueeze(1)

    def loss_and_grad_at(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """``loss_and_grad`` at a cell state c [P, 1], differentiable: second order.

        Leaves the parameters as they are, and updates the buffers.

        Returns:
            The loss [] and its gradient [P, 1], both with their graph.
        """
        parameters = dict(zip(dict(self.named_parameters()), self.slices(c), strict=True))
        buffers = {name: buffer.clone() for name, buffer in self.named_buffers()}
        loss = F.cross_entropy(functional_call(self, (parameters, buffers), x), y)
        (grad,) = torch.autograd.grad(loss, c, create_graph=True)
        for buffer, new in zip(self.buffers(), buffers.values(), strict=True):
            buffer.copy_(new)
        return loss, grad


class Conv4(FlatModule):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling; a linear classifier.

    Args:
        image_size: height and width of the images in pixels, at least 16.
        bn_eps: epsilon of batch normalisation.
        bn_momentum: share of the newest batch in the running statistics.
        n_classes: number of classes of an episode (n-way).
        bn_scale: initial scale of batch norm: "uniform" for U(0, 1), as in the authors' Torch and
            the port's PyTorch 1.0; "one" as in PyTorch since 1.2.
        n_filters: filters of each convolution.

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
    ):
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size is {image_size}; four poolings need {MIN_IMAGE_SIZE} px")
        for b in range(1, N_BLOCKS + 1):
            conv = nn.Conv2d(3 if b == 1 else n_filters, n_filters, 3, padding=1)
            norm = nn.BatchNorm2d(n_filters, eps=bn_eps, momentum=bn_momentum)
            if bn_scale == "uniform":
                nn.init.uniform_(norm.weight)
            self.add_module(f"conv{b}", conv)
            self.add_module(f"norm{b}", norm)
        self.cls = nn.Linear(n_filters * (image_size // MIN_IMAGE_SIZE) ** 2, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the classifier's input.

        Batch norm uses the batch's statistics in train mode, and updates the running ones; in eval
        mode it uses those.

        Args:
            x: images [B, 3, image_size, image_size], float.

        Returns:
            [B, n_filters * (image_size // 16)^2].
        """
        for b in range(1, N_BLOCKS + 1):
            x = self.block(b, x)
        return x.flatten(1)

    def block(self, b: int, x: Tensor) -> Tensor:
        """Compute block b, from 1 to 4: [B, C, H, W] -> [B, n_filters, H // 2, W // 2]."""
        conv, norm = getattr(self, f"conv{b}"), getattr(self, f"norm{b}")
        return F.max_pool2d(F.relu(norm(conv(x))), 2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [B, n_classes] of images [B, 3, image_size, image_size]."""
        return self.cls(self.features(x))
