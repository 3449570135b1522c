"""The learner: the network that the meta-learner trains (paper, section 4; the 32-filter Conv4).

Two instances share one shape and play two parts:

``learner_w_grad``
    An ordinary model with leaf parameters. It yields the support loss and its gradient, which are *inputs* of the
    meta-learner and constants to its graph.
``learner_wo_grad``
    Holds no parameters of its own. Its weights *are* slices of the meta-learner's last cell state cI, so the gradient
    of the query loss flows through them into the meta-learner.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block import eval_block, train_block
from native import PatchMoments

N_FILTERS = 32
N_BLOCKS = 4
MIN_IMAGE_SIZE = 2**N_BLOCKS


class Learner(nn.Module):
    """Four blocks of convolution, batch normalisation, ReLU and 2x2 max-pooling, then a linear classifier.

    Args:
        image_size: height and width of the images in pixels, at least 16.
        bn_eps: epsilon of the batch normalisation.
        bn_momentum: share of the newest batch in the running statistics.
        n_classes: number of classes of an episode (n-way).
        bn_scale: where batch normalisation's scale starts: "uniform", U(0, 1), the default of Torch and of PyTorch before 1.2,
            with which both earlier codes ran; or "one", PyTorch's default since.
        conv_dtype: what the convolutions and what lies between them are computed in; parameters, batch statistics, classifier
            and loss keep the parameters' own type.

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
        conv_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size is {image_size}, but four poolings need at least {MIN_IMAGE_SIZE} pixels")
        for b in range(1, N_BLOCKS + 1):
            self.add_module(f"conv{b}", nn.Conv2d(3 if b == 1 else N_FILTERS, N_FILTERS, 3, padding=1))
            self.add_module(f"norm{b}", nn.BatchNorm2d(N_FILTERS, eps=bn_eps, momentum=bn_momentum))
            if bn_scale == "uniform":
                nn.init.uniform_(getattr(self, f"norm{b}").weight)
        self.cls = nn.Linear(N_FILTERS * (image_size // MIN_IMAGE_SIZE) ** 2, n_classes)
        self.conv_dtype = conv_dtype
        # where each stretch of the flat vector goes: (module, "weight" or "bias", shape), in the order of parameters()
        self._slots = [(m, name, p.shape) for m in self.children() for name, p in m.named_parameters()]
        self.sizes = [shape.numel() for _, _, shape in self._slots]

    def forward(self, x: Tensor, moments: PatchMoments | None = None) -> Tensor:
        """Class scores.

        Args:
            x: images [B, 3, image_size, image_size], float; fastest in channels_last memory format.
            moments: ``PatchMoments.of(x)`` with x in ``conv_dtype``, worth giving when the same images come again and again.

        Returns:
            Logits [B, n_classes]. In train mode the batch's own statistics normalise (and update the running ones);
            in eval mode the running statistics do.
        """
        x = x.to(self.conv_dtype or x.dtype)
        for b in range(1, N_BLOCKS + 1):
            conv, norm = getattr(self, f"conv{b}"), getattr(self, f"norm{b}")
            x = train_block(x, conv, norm, moments if b == 1 else None) if self.training else eval_block(x, conv, norm)
        return self.cls(x.flatten(1).to(self.cls.weight.dtype))

    def loss_and_grad(self, x: Tensor, y: Tensor, moments: PatchMoments | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of a minibatch and its gradient, both cut off from any graph.

        Args:
            x: images [B, 3, H, W]; y: labels [B], int64; moments: see ``forward``.

        Returns:
            The loss [] and its gradient with respect to the flat parameters [P, 1].
        """
        with torch.enable_grad():
            loss = F.cross_entropy(self(x, moments), y)
            grads = torch.autograd.grad(loss, list(self.parameters()), allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads]).unsqueeze(1)

    def get_flat_params(self) -> Tensor:
        """A detached copy of the parameters as one vector [P], in the order of ``parameters()``."""
        return torch.cat([getattr(m, name).detach().reshape(-1) for m, name, _ in self._slots])

    def _slices(self, flat: Tensor) -> list[Tensor]:
        if flat.numel() != sum(self.sizes):
            raise ValueError(f"the flat vector has {flat.numel()} numbers, but this learner has {sum(self.sizes)}")
        parts = flat.reshape(-1).split(self.sizes)
        return [part.view(shape) for part, (_, _, shape) in zip(parts, self._slots, strict=True)]

    @torch.no_grad()
    def copy_flat_params(self, cI: Tensor) -> None:
        """Overwrite the parameters' values with those of a cell state (learner_w_grad's part).

        Args:
            cI: [P] or [P, 1]; its graph, if any, is left behind.
        """
        torch._foreach_copy_([getattr(m, name) for m, name, _ in self._slots], self._slices(cI))

    def transfer_params(self, learner_w_grad: Learner, cI: Tensor) -> None:
        """Let slices of a cell state *be* this learner's weights (learner_wo_grad's part).

        From the first call on this learner owns no parameters: each ``weight`` and ``bias`` is a view of ``cI`` and
        carries its ``grad_fn``, so a loss computed here back-propagates into whatever made ``cI``.

        Args:
            learner_w_grad: the twin whose running statistics of batch normalisation are copied.
            cI: [P] or [P, 1], the meta-learner's last cell state.
        """
        with torch.no_grad():
            torch._foreach_copy_(list(self.buffers()), list(learner_w_grad.buffers()))
        for (m, name, _), value in zip(self._slots, self._slices(cI), strict=True):
            m._parameters.pop(name, None)
            setattr(m, name, value)

    def reset_batch_stats(self) -> None:
        """Forget the running statistics: mean 0, variance 1. Before each episode, both learners."""
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()
