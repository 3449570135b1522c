"""The learner, faster: kernels on a CPU, fewer operations everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import gpu, native
from fast.gpu import blocks, update
from fast.gpu.convolution import kernels_order
from learner import N_BLOCKS, Conv4, FlatModule


class FastConv4(Conv4):
    """``learner.Conv4`` with the same parameters, equal up to rounding.

    In training, batch norm subtracts the batch mean, which cancels the convolution's bias: the bias
    enters the running mean alone, and its gradient is exactly zero, where plain PyTorch leaves
    rounding noise. ``num_batches_tracked`` is not counted.

    Args:
        conv_dtype: dtype of the convolutions and of activations between them, such as bfloat16;
            parameters, batch statistics, classifier and loss keep the parameters' dtype. The other
            arguments are ``Conv4``'s.
    """

    def __init__(self, *args, conv_dtype: torch.dtype | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_dtype, self._twice = conv_dtype, False
        self._last: tuple[Tensor, int, Tensor, native.PatchMoments | None] | None = None
        self._flat: tuple[Tensor, Tensor] | None = None  # see _arranged
        self._in_triton: dict[tuple[torch.device, torch.dtype], bool] = {}

    def features(self, x: Tensor) -> Tensor:
        """See ``Conv4.features``; fastest on images in channels_last memory format."""
        return super().features(x).to(self.norm1.weight.dtype)

    def block(self, b: int, x: Tensor) -> Tensor:
        """See ``Conv4.block``."""
        conv, norm = self._block(b)
        x = x.to(self.conv_dtype or x.dtype)
        if self._twice:
            return (_train_block if norm.training else _eval_block)(x, conv, norm)
        return (train_block if norm.training else eval_block)(x, conv, norm)

    def _block(self, b: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return getattr(self, f"conv{b}"), getattr(self, f"norm{b}")

    def _blocks_run_in_triton(self, x: Tensor) -> bool:
        """Whether Triton's kernels train every block; each is checked at the first call, with what
        reaches it from these images.
        """
        if not blocks.handles_block(x, self.conv1.weight):
            return False
        key = x.device, x.dtype
        if key not in self._in_triton:
            self._in_triton[key] = all(self._blocks_work_in_triton(x))
        return self._in_triton[key]

    def _blocks_work_in_triton(self, x: Tensor) -> Iterator[bool]:
        for b in range(1, N_BLOCKS + 1):
            conv, norm = self._block(b)
            with torch.enable_grad():
                kernel = _triton_or(_train_block, blocks.train_block, x, conv, norm)
            yield kernel is blocks.train_block
            with torch.no_grad():
                x = _eval_block(x, conv, norm)  # which leaves the running statistics alone

    def _prepared(self, x: Tensor) -> tuple[Tensor, native.PatchMoments | None]:
        """The images in ``conv_dtype`` and, for the CPU kernels, their moments; kept for the next
        update with the same images.
        """
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            images, moments = x.to(self.conv_dtype or x.dtype), None
            if native.handles_block(images, self.conv1.weight):
                moments = native.PatchMoments.of(images)
            self._last = x, x._version, images, moments
        return self._last[2:]

    def loss_and_grad(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See ``FlatModule.loss_and_grad``."""
        if not self.norm1.training:  # the kernels are of training mode
            return super().loss_and_grad(x, y)
        images, moments = self._prepared(x)
        if moments is not None and native.handles(images):
            return self._in_one_call(images, y, moments, self._own_parameters())[:2]
        if self._blocks_run_in_triton(images):
            return self._by_triton(images, y, self._own_parameters())[:2]
        return super().loss_and_grad(images, y)

    def loss_and_grad_at(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """See ``FlatModule.loss_and_grad_at``; the kernels take a difference of gradients."""
        if not self.norm1.training:
            return self._differentiated_twice(x, y, c)
        images, moments = self._prepared(x)
        if moments is not None and native.handles(images):
            at = partial(self._in_one_call, images, y, moments)
            return native.LossAndGrad.apply(c, x, lambda c, frozen: at(self.slices(c), frozen))
        kernel, eager = FastConv4._differences, FastConv4._differentiated_twice
        results = partial(self._hessian_product, images, y, c)
        if (
            images.dtype == torch.float32
            and self._blocks_run_in_triton(images)
            and gpu.works(kernel, eager, 5e-2, self.conv1.weight, results)
        ):
            return self._differences(images, y, c)
        return self._differentiated_twice(images, y, c)

    def _differences(self, images: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Second order by Triton's kernels."""
        at = partial(self._by_triton, images, y)

        def function(c: Tensor, frozen: update.Switches | None) -> tuple:
            return at(self._arranged_slices(c), frozen)

        return native.LossAndGrad.apply(c, images, function)

    def _differentiated_twice(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Second order by PyTorch's operations, which alone can be differentiated twice."""
        self._twice = True
        try:
            return super().loss_and_grad_at(x, y, c)
        finally:
            self._twice = False

    def _hessian_product(
        self, images: Tensor, y: Tensor, c: Tensor, implementation: Callable
    ) -> list[Tensor]:
        """The gradient, and the Hessian's product with it, for ``gpu.works``."""
        statistics = self._running()
        before = [t.clone() for t in statistics]
        with torch.enable_grad():
            c = c.detach().requires_grad_()
            _, grad = implementation(self, images, y, c)
            (product,) = torch.autograd.grad((grad * grad.detach()).sum(), c)
        torch._foreach_copy_(statistics, before)
        return [grad.detach(), product]

    def _by_triton(
        self,
        images: Tensor,
        y: Tensor,
        parameters: list[Tensor],
        frozen: update.Switches | None = None,
    ) -> tuple[Tensor, Tensor, update.Switches]:
        flat = self.conv1.weight.new_zeros(self.size(), 1)
        args = images, y, parameters, self._norms(), self.slices(flat), frozen
        loss, switches = update.loss_and_grad(*args)
        return loss, flat, switches

    def _in_one_call(
        self,
        images: Tensor,
        y: Tensor,
        moments: native.PatchMoments,
        parameters: list[Tensor],
        frozen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = images, y, moments, parameters, self._running()
        return native.loss_and_grad(*args, self.norm1.eps, self.norm1.momentum, frozen)

    def _own_parameters(self) -> list[Tensor]:
        return [getattr(m, name) for m, name, _ in self.slots]

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [self._block(b)[1] for b in range(1, N_BLOCKS + 1)]

    def _running(self) -> list[Tensor]:
        """The blocks' running means, then their running variances."""
        norms = self._norms()
        return [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]

    @torch.no_grad()
    def reset_batch_stats(self) -> None:
        """See ``FlatModule.reset_batch_stats``."""
        self._last = None  # a new episode may bring other images in the same memory
        statistics = self._running()
        torch._foreach_zero_(statistics)
        torch._foreach_add_(statistics[N_BLOCKS:], 1)

    @torch.no_grad()
    def copy_flat_params(self, c: Tensor) -> None:
        """See ``FlatModule.copy_flat_params``."""
        if any(self._in_triton.values()):
            flat, order = self._arranged(c.device)
            torch.index_select(c.view(-1), 0, order, out=flat)
        else:
            torch._foreach_copy_(self._own_parameters(), self.slices(c))

    def _arranged(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """One buffer [P] in which the parameters lie, filters in the order that Triton's kernels
        read, and which number of the flat vector each of its numbers is.
        """
        if self._flat is None or self._flat[0].data_ptr() != self.conv1.weight.data_ptr():
            numbers = torch.arange(self.size(), device=device)
            order = torch.cat([kernels_order(t).reshape(-1) for t in self.slices(numbers)])
            flat = torch.empty_like(order, dtype=self.conv1.weight.dtype)
            for (m, name, _), part in zip(self.slots, self._parts(flat), strict=True):
                getattr(m, name).data = part.copy_(getattr(m, name).data)
            self._flat = flat, order
        return self._flat

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector [P] in that order, with the parameters' shapes."""
        return [kernels_order(p.view(kernels_order(p).shape)) for p in self.slices(flat)]

    def _arranged_slices(self, c: Tensor) -> list[Tensor]:
        """``slices``, filters in the order that Triton's kernels read."""
        return self._parts(c.detach().view(-1).index_select(0, self._arranged(c.device)[1]))

    @torch.no_grad()
    def copy_buffers(self, other: FlatModule) -> None:
        """See ``FlatModule.copy_buffers``."""
        if not isinstance(other, FastConv4):
            return super().copy_buffers(other)
        torch._foreach_copy_(self._running(), other._running())


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Convolution, batch norm by the batch's own statistics, ReLU and 2x2 max-pooling.

    Pooling comes before ReLU, which is the same function on a quarter of the numbers.

    Args:
        x: [B, C, H, W], float.
        conv, norm: the block's layers, whose weights may be slices of a cell state; ``norm``'s
            running statistics are updated.

    Returns:
        [B, filters, H // 2, W // 2].
    """
    if native.handles_block(x, conv.weight):
        return native.train_block(x, conv, norm)
    return _triton_or(_train_block, blocks.train_block, x, conv, norm)(x, conv, norm)


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same with the running statistics; arguments and result as for ``train_block``."""
    weights = x, conv.weight, conv.bias, norm.weight, norm.bias
    if torch.is_grad_enabled() and any(t.requires_grad for t in weights):
        return _eval_block(x, conv, norm)
    if native.handles_block(x, conv.weight):
        return native.eval_block(x, conv, norm)
    return _triton_or(_eval_block, blocks.eval_block, x, conv, norm)(x, conv, norm)


def _train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = _batch_norm(F.conv2d(x, conv.weight.to(x.dtype), padding=1), norm, True)
    # .data: autograd checks the running mean's version, though a backward pass in train mode does
    # not read it
    norm.running_mean.data.add_(conv.bias.detach(), alpha=norm.momentum)
    return F.relu(F.max_pool2d(y, 2))


def _eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    y = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)
    return F.relu(F.max_pool2d(_batch_norm(y, norm, False), 2))


def _batch_norm(y: Tensor, norm: nn.BatchNorm2d, train: bool) -> Tensor:
    statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
    return F.batch_norm(y, *statistics, *affine, train, norm.momentum, norm.eps)


def _triton_or(
    eager: Callable, kernel: Callable, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> Callable:
    """``kernel`` where it works on this GPU for this number of channels and dtype, else ``eager``.

    In bfloat16 a rounding may move a maximum, so the tolerance is wider.
    """
    if not blocks.handles_block(x, conv.weight):
        return eager
    tolerance = 1e-3 if x.dtype == torch.float32 else 2e-2
    variant = f"{x.shape[1]} channels, {str(x.dtype).removeprefix('torch.')}"
    results = partial(_results, x, conv, norm)
    works = gpu.works(kernel, eager, tolerance, conv.weight, results, variant)
    return kernel if works else eager


def _results(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, implementation: Callable
) -> list[Tensor]:
    """A block's outputs, running statistics and, with grad enabled, gradients, for ``gpu.works``.

    Computed for images of even and of odd size, on copies of all tensors.
    """
    results = []
    for images in (x, x[:, :, 1:, 1:] if min(x.shape[2:]) > 2 else x):
        learned = images, conv.weight, norm.weight, norm.bias
        learned = [t.detach().clone().requires_grad_() for t in learned]
        others = conv.bias, norm.running_mean, norm.running_var
        bias, mean, var = (t.detach().clone() for t in others)
        images, weight, gamma, beta = learned
        constants = {"momentum": norm.momentum, "eps": norm.eps}
        statistics = {"running_mean": mean, "running_var": var}
        norm_copy = SimpleNamespace(weight=gamma, bias=beta, **statistics, **constants)
        out = implementation(images, SimpleNamespace(weight=weight, bias=bias), norm_copy)
        results += [out.detach(), mean, var]
        if torch.is_grad_enabled():
            results += torch.autograd.grad(out.square().sum(), learned)
    return results
