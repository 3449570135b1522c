"""A user's own network as the learner: ``--learner FILE:NAME``."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from engine.flags import DEFAULTS, split_learner, with_digest
from learner import FlatModule
from utils import UserError, first_line


class OwnLearner(FlatModule):
    """A network that need not derive from ``FlatModule``.

    Args:
        network: from images [B, 3, H, W], float32, to logits [B, n_classes].
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Call the network."""
        return self.network(x)

    @property
    def features(self) -> Any:
        """The network's own, if it has any."""
        return self.network.features


def conv4_arguments(args: Namespace) -> dict[str, Any]:
    """The arguments of ``learner.Conv4``, by the flags."""
    known = {"n_classes": args.n_class, "image_size": args.image_size, "n_filters": args.filters}
    return known | {k: getattr(args, k) for k in ("bn_eps", "bn_momentum", "bn_scale")}


def own_learner(args: Namespace) -> FlatModule:
    """Make the network that ``--learner`` names, on the CPU.

    NAME is called with those of ``conv4_arguments`` that it accepts by name; with all, if it takes
    ``**kwargs``.

    Raises:
        UserError: the file is not the one of the training, or its network cannot be a learner.
    """
    path, name, digest = split_learner(args.learner)
    flag = f"--learner {path}:{name}"
    try:
        found = with_digest(f"{path}:{name}")
    except UserError as e:
        advice = f"the checkpoint has this path; if the file moved, give --learner NEW.py:{name}"
        raise UserError(f"{e}; {advice}") from e
    if found != args.learner:
        advice = f"bring it back; to test or predict with it as it is, give {flag}"
        raise UserError(f"{path}: has changed since the training with it ({digest}); {advice}")
    try:
        make = getattr(_module(Path(path)), name)
        accepted = inspect.signature(make).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        network = make(**{k: v for k, v in conv4_arguments(args).items() if every or k in accepted})
        fault = _fault(network, args)
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        raise UserError(f"{flag}: {type(e).__name__}: {first_line(e)}") from e
    if fault:
        raise UserError(f"{flag}: {fault}")
    if args.mode == "train" and args.bi_init == DEFAULTS["bi_init"]:
        print(
            "note: --bi-init -5 -4 starts with steps of about 1/100 of the gradient; if the "
            "accuracy stays at chance for hundreds of episodes, try --bi-init 0 0, a half of it"
        )
    return network if isinstance(network, FlatModule) else OwnLearner(network)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"learner_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # as for any import: dataclasses look there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: the user's utils.py does not hide ours
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _fault(network: object, args: Namespace) -> str | None:
    """Why a network cannot be a learner, or None; runs it on random images."""
    if not isinstance(network, nn.Module):
        return f"gives a {type(network).__name__}, but should give a torch.nn.Module"
    named = dict(network.named_parameters())
    if not named:
        return "has no parameters, so there is nothing to learn"
    for name, parameter in named.items():
        if is_lazy(parameter):
            return f"{name} has no shape yet; use layers that are not lazy"
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, but should be torch.float32"
        if not parameter.requires_grad:
            return f"{name} is frozen, but all parameters are learned; make it a buffer"
    learner = network if isinstance(network, FlatModule) else OwnLearner(network)
    cI = learner.get_flat_params().requires_grad_()  # a ValueError if layers share a parameter
    x, twin = torch.randn(args.n_class, 3, args.image_size, args.image_size), copy.deepcopy(learner)
    first = twin.train()(x)
    for logits in (first, twin.eval()(x)):
        if not isinstance(logits, Tensor) or logits.shape != (args.n_class, args.n_class):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            return f"makes {found} of {args.n_class} images, but should make [images, n_classes]"
        if logits.dtype != torch.float32:
            return f"makes logits of {logits.dtype}, but should make torch.float32"
    near = {"rtol": 1e-3, "atol": 1e-5}
    if not torch.allclose(first, twin.train()(x), **near):
        return "is random in training (dropout?), but must repeat its results"
    kept = dict(learner.named_buffers())
    for name, buffer in twin.named_buffers():
        module = twin.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, _NormBase) and not torch.equal(buffer, kept[name]):
            return f"changes {name}, which no new episode resets; only batch norm may keep values"
    n_support = args.n_class * args.n_shot
    twin(x[: n_support % args.batch_size or args.batch_size])  # the smallest minibatch
    twin.eval()
    if not torch.allclose(twin(x)[-1:], twin(x[-1:]), **near):
        advice = "tests that see all query images are for --transductive true"
        return f"is random, or mixes images, in tests (track_running_stats=False?); {advice}"
    twin.train()
    twin.transfer_params(learner, cI)
    loss = F.cross_entropy(twin(x), torch.arange(args.n_class))
    grad = torch.autograd.grad(loss, cI, allow_unused=True)[0]
    if grad is None or not grad.any():
        return "does not use the parameters that the meta-learner gives it; does it keep copies?"
    return None
