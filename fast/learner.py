"""The learner, faster: kernels on a CPU, fewer operations everywhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import gpu, native
from fast.gpu import blocks
from learner import N_BLOCKS, Conv4, FlatModule


class FastConv4(Conv4):
    """``learner.Conv4`` with the same parameters, equal to rounding.

    Batch normalisation subtracts the batch mean, which cancels the convolution's bias, so training
    skips it; only the running mean includes it. The bias's gradient is then exactly zero, where
    plain PyTorch leaves rounding noise. Nothing counts the batches (``num_batches_tracked``).

    Args:
        conv_dtype: what the convolutions and what lies between them are computed in, such as
            bfloat16; parameters, batch statistics, classifier and loss keep the parameters' own
            dtype. The other arguments are ``Conv4``'s.
    """

    def __init__(
        self,
        image_size: int,
        bn_eps: float,
        bn_momentum: float,
        n_classes: int,
        bn_scale: str = "uniform",
        n_filters: int = 32,
        conv_dtype: torch.dtype | None = None,
    ):
        super().__init__(image_size, bn_eps, bn_momentum, n_classes, bn_scale, n_filters)
        self.conv_dtype = conv_dtype
        self._last: tuple[Tensor, int, Tensor, native.PatchMoments | None] | None = None

    def features(self, x: Tensor) -> Tensor:
        """See ``Conv4.features``; fastest on images in channels_last memory format."""
        x, moments = self._prepared(x)
        for b in range(1, N_BLOCKS + 1):
            conv, norm = getattr(self, f"conv{b}"), getattr(self, f"norm{b}")
            x = (
                train_block(x, conv, norm, moments if b == 1 else None)
                if norm.training
                else eval_block(x, conv, norm)
            )
        return x.flatten(1).to(self.norm1.weight.dtype)

    def _prepared(self, x: Tensor) -> tuple[Tensor, native.PatchMoments | None]:
        """The images in ``conv_dtype`` and, where kernels use them, their moments: the same in all
        updates of an episode.
        """
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            images = x.to(self.conv_dtype or x.dtype)
            wanted = self.norm1.training and native.handles_block(images, self.conv1.weight)
            self._last = (x, x._version, images, native.PatchMoments.of(images) if wanted else None)
        return self._last[2:]

    def loss_and_grad(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``FlatModule.loss_and_grad``."""
        images, moments = self._prepared(x)
        if moments is not None and native.handles(images):
            parameters = [getattr(m, name) for m, name, _ in self.slots()]
            running = self._running("mean") + self._running("var")
            return native.loss_and_grad(
                images, y, moments, parameters, running, self.norm1.eps, self.norm1.momentum
            )
        with torch.enable_grad():
            loss = F.cross_entropy(self(x), y)
            grads = torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)
        zero = torch.zeros_like(self.conv1.bias)  # one for all the biases
        return loss.detach(), torch.cat(
            [zero if g is None else g.reshape(-1) for g in grads]
        ).unsqueeze(1)

    def _running(self, what: str) -> list[Tensor]:
        return [
            getattr(getattr(self, f"norm{b}"), f"running_{what}") for b in range(1, N_BLOCKS + 1)
        ]

    @torch.no_grad()
    def reset_batch_stats(self) -> None:
        """See ``FlatModule.reset_batch_stats``. A new episode begins."""
        self._last = None
        torch._foreach_zero_(self._running("mean") + self._running("var"))
        torch._foreach_add_(self._running("var"), 1)

    @torch.no_grad()
    def copy_flat_params(self, cI: Tensor) -> None:
        """See ``FlatModule.copy_flat_params``."""
        torch._foreach_copy_([getattr(m, name) for m, name, _ in self.slots()], self.slices(cI))

    @torch.no_grad()
    def copy_buffers(self, other: FlatModule) -> None:
        """See ``FlatModule.copy_buffers``. A new query set follows."""
        self._last = None
        torch._foreach_copy_(*([*m._running("mean"), *m._running("var")] for m in (self, other)))


def train_block(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: native.PatchMoments | None = None
) -> Tensor:
    """Convolution -> normalisation by the batch's own statistics -> ReLU -> 2x2 max-pooling.

    Pooling comes before ReLU, which is the same function on a quarter of the numbers.

    Args:
        x: [B, C, H, W], float.
        conv, norm: the block's weights, as parameters or as slices of a cell state; ``norm``'s
            running statistics are updated.
        moments: of ``x`` if it is the images themselves, see ``native.PatchMoments``.

    Returns:
        [B, filters, H // 2, W // 2].
    """
    if native.handles_block(x, conv.weight):
        return native.train_block(x, conv, norm, moments)
    chosen = (
        blocks.train_block
        if _in_triton(blocks.train_block, _train_block, x, conv, norm)
        else _train_block
    )
    return chosen(x, conv, norm)


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same with the running statistics; arguments and result as for ``train_block``."""
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, conv.weight, conv.bias, norm.weight, norm.bias)
    ):
        return _eval_block(x, conv, norm)
    if native.handles_block(x, conv.weight):
        return native.eval_block(x, conv, norm)
    chosen = (
        blocks.eval_block
        if _in_triton(blocks.eval_block, _eval_block, x, conv, norm)
        else _eval_block
    )
    return chosen(x, conv, norm)


def _train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = F.conv2d(x, conv.weight.to(x.dtype), padding=1)
    y = F.batch_norm(
        y,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        True,
        norm.momentum,
        norm.eps,
    )
    # through .data: autograd keeps the running mean, but its backward pass does not use it in train
    # mode
    norm.running_mean.data.add_(conv.bias.detach(), alpha=norm.momentum)
    return F.relu(F.max_pool2d(y, 2))


def _eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)
    y = F.batch_norm(
        y,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        False,
        norm.momentum,
        norm.eps,
    )
    return F.relu(F.max_pool2d(y, 2))


def _in_triton(
    kernel: Callable, code: Callable, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> bool:
    """Whether the kernel works on this GPU; in bfloat16 a rounding may move a maximum."""
    tolerance = 1e-3 if x.dtype == torch.float32 else 2e-2
    fits = blocks.handles_block(x, conv.weight)
    return fits and gpu.works(
        kernel, code, tolerance, conv.weight, lambda way: _tried(way, x, conv, norm)
    )


def _tried(way: Callable, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> list[Tensor]:
    """What a way of computing a block makes of images of even and of odd size, running statistics
    and gradients included.
    """
    found = []
    for images in (x, x[:, :, 1:, 1:]):
        w, b, gamma, beta, mean, var = (
            t.detach().clone()
            for t in (
                conv.weight,
                conv.bias,
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
            )
        )
        given = [t.requires_grad_() for t in (images.detach().clone(), w, gamma, beta)]
        like = SimpleNamespace(
            weight=gamma,
            bias=beta,
            running_mean=mean,
            running_var=var,
            momentum=norm.momentum,
            eps=norm.eps,
        )
        out = way(given[0], SimpleNamespace(weight=w, bias=b), like)
        found += [out.detach(), mean, var]
        if torch.is_grad_enabled():
            found += torch.autograd.grad(out.square().sum(), given)
    return found
