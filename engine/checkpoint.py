"""Checkpoints: written whole, read without executing anything that they contain, and checked before
use.
"""

from __future__ import annotations

import argparse
import math
import zipfile
from pathlib import Path

import torch

from engine.flags import check_stored
from learner import MIN_IMAGE_SIZE
from metalearner import MetaLearner
from utils import UserError, atomic_write

# in checkpoints from before these flags
OLDER = {
    "bn_scale": "one",
    "meta_batch": 1,
    "lr_decay": 0.0,
    "grad_divisor": 0,
    "adapt": "all",
    "bn_shift": 0.0,
}
RETIRED = {
    "fresh_stats": False,
    "filter_scale": 1.0,
}  # flags of some days in 2026, at the values that are understood


def save(content: dict, *paths: Path) -> None:
    """Write one checkpoint under each of the names."""
    for path in paths:
        with atomic_write(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as e:  # torch wraps a failed write
                raise OSError(None, str(e).splitlines()[0]) from e


def held(folder: Path, *names: str) -> Path | None:
    """The first of the checkpoints that a run's folder holds."""
    return next(
        (path for path in (folder / "ckpts" / name for name in names) if path.is_file()), None
    )


def load(path: Path, flag: str = "--resume") -> dict:
    """Read a checkpoint of this project or of the older port.

    Args:
        flag: which names it, for errors.

    Returns:
        A dict with at least ``episode`` (int) and ``metalearner`` (a state dict of CPU tensors).

    Raises:
        UserError: there is no such file, or its content is not what training writes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give {flag} a file written by training")
    try:
        if zipfile.is_zipfile(path):  # PyTorch writes checksums but does not read them
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("its bytes have changed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged or foreign bytes raise nearly anything
        raise UserError(
            f"{path}: not a checkpoint ({type(e).__name__}); give {flag} a file written by training"
        ) from e
    try:
        wrong = _wrong(content)
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ):  # some part is missing or of another type
        wrong = "its run state is not what training writes"
    if wrong:
        raise UserError(f"{path}: {wrong}; take another checkpoint")
    stored = {
        k: v
        for k, v in content.get("hyper_parameters", {}).items()
        if not (k in RETIRED and v == RETIRED[k])
    }
    check_stored(path, stored)
    if stored:
        content["hyper_parameters"] = OLDER | stored
    return content


def _wrong(content: object) -> str | None:
    """What is wrong with a checkpoint's content, if anything. Parts that are missing altogether may
    raise.
    """
    if not isinstance(content, dict) or not isinstance(content.get("episode"), int):
        return "not a checkpoint of this project: it lacks 'episode'"
    if content["episode"] < 0:
        return f"episode {content['episode']} cannot be"
    tensors = content.get("metalearner")
    if not isinstance(tensors, dict) or not all(
        isinstance(v, torch.Tensor) for v in tensors.values()
    ):
        return "not a checkpoint of this project: it lacks 'metalearner', a table of tensors"
    for name, value in tensors.items():
        if not value.is_floating_point() or value.layout != torch.strided:
            return (
                f"{name} is {value.dtype}, {value.layout}, but should be a dense tensor of floats"
            )
        if not torch.isfinite(value).all():
            return f"{name} holds numbers that are not finite"
    if not isinstance(content.get("hyper_parameters", {}), dict):
        return "its hyper_parameters are no table of names and values"
    about, root = content.get("about", {}), content.get("data_root", "")
    if content.get("mode", "train") not in ("train", "pretrain"):
        return f"its mode {content['mode']!r} is unknown"
    if (
        not isinstance(about, dict)
        or not all(isinstance(k, str) for k in about)
        or not isinstance(root, str)
    ):
        return "what it says about its training is not what training writes"
    best, run = content.get("best"), content.get("run")
    if best is not None and not (
        isinstance(best["episode"], int) and math.isfinite(best["accuracy"])
    ):
        return "its best validation is not what training writes"
    if run is not None:
        log, ends = run["since_log"], run["logs_end_at"].values()
        counts = [run["validated"], run["skipped_in_a_row"], run.get("asked_for", 1), *ends]
        sound = list(log) == ["loss", "accuracy", "skipped"] and len(log["loss"]) == len(
            log["accuracy"]
        ) >= len(log["skipped"])
        sound = sound and all(isinstance(x, float) for v in log.values() for x in v)
        sound = sound and all(isinstance(n, int) and n >= 0 for n in counts)
        if not sound or not all(isinstance(run["data"][split], str) for split in ("train", "val")):
            return "its run state is not what training writes"
    return None


def load_metalearner(metalearner: MetaLearner, content: dict, path: Path) -> None:
    """Put a checkpoint's tensors into the meta-learner.

    Raises:
        UserError: their names or shapes are not those that the flags ask for.
    """
    wanted, found = metalearner.state_dict(), content["metalearner"]
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(
            f"{path}: its meta-learner {'lacks' if name in wanted else 'has an unknown'} {name}"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} is {list(found[name].shape)}, but the flags make it {list(tensor.shape)}; "
                "--image-size, --n-class, --filters and --hidden-size must be those of its training"
            )
    metalearner.load_state_dict(found)


def load_start(
    metalearner: MetaLearner, content: dict, path: Path, args: argparse.Namespace
) -> None:
    """Begin with another training's meta-learner. If that one had another number of classes, as
    pre-training has, the weights and biases of the learner's classifier, the end of cI, start at
    zero. Of pre-training, which leaves the gates alone, only cI is taken.

    Raises:
        UserError: the rest does not fit.
    """
    stored, cI = content.get("hyper_parameters", {}), content["metalearner"].get("metalstm.cI")
    alike = all(stored.get(name) == getattr(args, name) for name in ("filters", "image_size"))
    if cI is not None and alike and stored.get("n_class", args.n_class) != args.n_class:
        of_a_class = args.filters * (args.image_size // MIN_IMAGE_SIZE) ** 2 + 1
        body = cI.reshape(-1, 1)[: max(cI.numel() - stored["n_class"] * of_a_class, 0)]
        cI = torch.cat((body, body.new_zeros(args.n_class * of_a_class, 1)))
    if cI is not None:
        gates = (
            metalearner.state_dict()
            if content.get("mode") == "pretrain"
            else content["metalearner"]
        )
        content = {"metalearner": {**gates, "metalstm.cI": cI}}
    load_metalearner(metalearner, content, path)


def load_optimizer(optimizer: torch.optim.Optimizer, content: dict, path: Path) -> None:
    """Put a checkpoint's moments into Adam, whose settings stay the flags'.

    Raises:
        UserError: they do not fit.
    """
    try:
        stored, own = content["optim"], optimizer.state_dict()["param_groups"]
        # the flags' settings come first: by them PyTorch decides on which device the count of steps
        # lies
        pairs = zip(stored["param_groups"], own, strict=True)
        groups = [{**theirs, **mine, "params": theirs["params"]} for theirs, mine in pairs]
        optimizer.load_state_dict({**stored, "param_groups": groups})
        for p, state in optimizer.state.items():
            if state["exp_avg"].shape != p.shape or state["exp_avg_sq"].shape != p.shape:
                raise ValueError("moments of another shape")
        if len(optimizer.state) not in (0, len(optimizer.param_groups[0]["params"])):
            raise ValueError("moments of other parameters")
    except Exception as e:  # damaged or foreign content raises nearly anything
        raise UserError(
            f"{path}: its optimiser's state does not fit ({type(e).__name__}: {e}); it can only be tested"
        ) from e
