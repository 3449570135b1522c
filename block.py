"""One block of the learner: convolution -> batch normalisation -> ReLU -> 2x2 max-pooling.

Pooling comes before the ReLU here, which is the same function on a quarter of the numbers.

A batch's own mean takes the convolution's bias out again. The bias is therefore never added in train mode, and its gradient is
exactly zero; added, it would leave rounding noise there, which prep and Adam blow up. Only the running mean hears of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native


def train_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: native.PatchMoments | None = None) -> Tensor:
    """The block with normalisation by the batch's own statistics.

    Args:
        x: [B, C, H, W], float; fastest in channels_last memory format.
        conv, norm: the block's weights, as parameters or as slices of a cell state; ``norm``'s running statistics are updated.
        moments: of ``x`` when it is the images themselves: what the kernels need for the first block.

    Returns:
        [B, filters, H // 2, W // 2].
    """
    if native.handles_block(x, conv.weight):
        return native.train_block(x, conv, norm, moments)
    y = F.conv2d(x, conv.weight.to(x.dtype), padding=1)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    # by way of .data: autograd keeps the running mean, but in train mode its backward pass makes no use of it
    norm.running_mean.data.add_(conv.bias.detach(), alpha=norm.momentum)
    return F.relu(F.max_pool2d(y, 2))


def eval_block(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same by the running statistics.

    Args, returns: as ``train_block``.
    """
    if native.handles_block(x, conv.weight) and not torch.is_grad_enabled():
        return native.eval_block(x, conv, norm)
    y = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, norm.momentum, norm.eps)
    return F.relu(F.max_pool2d(y, 2))
