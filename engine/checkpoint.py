"""Checkpoints: written whole, read without executing their content, and checked before use."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed import Ranks
from engine.ema import TRAINED
from engine.flags import check_stored, resolve, run_folder
from engine.schema import finite, fits
from utils import UserError, atomic_write, first_line

BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"


@dataclass
class TrainingState:
    """The state of a training run besides weights and Adam's moments: counters, and numbers that
    the next log line and validation need.
    """

    episode: int = 0  # episodes seen
    validated: int = 0  # the episode of the last validation
    best: dict | None = None  # of the validations: episode, accuracy, std
    skipped_in_a_row: int = 0  # updates whose loss or gradient was not finite
    losses: list[float | Tensor] = field(default_factory=list)  # since the last log line
    accuracies: list[float | Tensor] = field(default_factory=list)
    skipped: list[float | Tensor] = field(default_factory=list)
    asked_for: int = 0  # --episode
    data: dict[str, str] = field(default_factory=dict)  # fingerprints of the images, by split
    logs_end_at: dict[str, int] = field(default_factory=dict)  # length of the logs in bytes

    def to_checkpoint(self) -> dict:
        """The checkpoint's entries ``episode``, ``best`` and ``run``."""
        run = asdict(self)
        return {"episode": run.pop("episode"), "best": run.pop("best"), "run": run}

    @classmethod
    def from_checkpoint(cls, content: dict) -> TrainingState:
        """Read what ``to_checkpoint`` wrote; exported checkpoints have no ``run``."""
        return cls(episode=content["episode"], best=content.get("best"), **content.get("run", {}))


def _count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


_RUN = {
    **dict.fromkeys(("validated", "skipped_in_a_row", "asked_for"), _count),
    **{key: [lambda x: isinstance(x, float)] for key in ("losses", "accuracies", "skipped")},
    **{"data": {str: str}, "logs_end_at": {str: _count}},
}


def _is_run(run: Any) -> bool:
    known = fits(run, _RUN) and run.keys() == _RUN.keys()
    return run == {} or (known and len(run["losses"]) == len(run["accuracies"]))


_FORM = {  # of a checkpoint, beside its weights
    **{key: {str: object} for key in ("hyper_parameters", "run_flags", "about")},
    "classes": [str],
    "data_root": str,
    "best": ({"episode": int, "accuracy": finite}, None),
    "run": _is_run,
}


def save(content: dict, *paths: Path) -> None:
    """Write one checkpoint under each of the names."""
    for path in paths:
        with atomic_write(path) as file:
            try:
                torch.save(content, file)
            except RuntimeError as e:  # torch wraps a failed write
                raise OSError(None, first_line(e)) from e


def find_checkpoint(folder: Path, *names: str) -> Path | None:
    """The first of ``names`` in a run folder, else its exported checkpoint, else None."""
    paths = [folder / "ckpts" / name for name in names] + [folder / "meta-learner.pth.tar"]
    return next((path for path in paths if path.is_file()), None)


def resolve_checkpoint(named: str, seed: int, *names: str, flag: str = "--resume") -> str:
    """The checkpoint that ``--resume`` or ``--init-from`` names: a file, or the first of ``names``
    in a run folder, which may be named without its seed.

    Raises:
        UserError: there is none.
    """
    places = [Path(place) for place in (named, f"{named}-{seed}") if Path(place).exists()]
    if not places:
        raise UserError(f"{flag} {named}: there is neither {named} nor {named}-{seed}")
    found = (find_checkpoint(place, *names) for place in places)
    return str(next(filter(None, found), places[0]))


def short_name(path: Path) -> str:
    """A checkpoint as ``run folder/file``."""
    return "/".join([part for part in path.resolve().parts if part != "ckpts"][-2:])


def trained_shots(content: dict, args: Namespace) -> int:
    """The images per class that a checkpoint was trained on; ``--n-shot`` if it does not say."""
    return content.get("hyper_parameters", {}).get("n_shot") or args.n_shot


def load(path: Path, flag: str = "--resume") -> dict:
    """Read a checkpoint of this project or of the port.

    Args:
        flag: that names it, for errors.

    Returns:
        A dict with at least ``episode`` (int) and ``metalearner`` or, of a pre-training,
        ``network`` (a state dict of CPU tensors).

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
        why = f"not a checkpoint ({type(e).__name__})"
        raise UserError(f"{path}: {why}; give {flag} a file written by training") from e
    if fault := _fault(content):
        raise UserError(f"{path}: {fault}; take another checkpoint")
    check_stored(path, content)
    return content


def _fault(content: object) -> str | None:
    """What is wrong with a checkpoint's content, if anything."""
    if not isinstance(content, dict) or not isinstance(content.get("episode"), int):
        return "not a checkpoint of this project: it lacks 'episode'"
    if content["episode"] < 0:
        return f"episode {content['episode']} is negative"
    mode = content.get("mode", "train")
    if mode not in ("train", "pretrain"):
        return f"its mode {mode!r} is unknown"
    weights = "network" if mode == "pretrain" else "metalearner"
    for key in (weights, *({"backbone", TRAINED} & content.keys())):
        tensors = content.get(key)
        if not fits(tensors, {str: Tensor}) or not tensors:
            return f"not a checkpoint of this project: it lacks {key!r}, a table of tensors"
        for name, value in tensors.items():
            if value.layout != torch.strided:
                return f"{name} should be a dense tensor"
            if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
                return f"{name} is {value.dtype}, but should be of floats"
            if not torch.isfinite(value).all():
                return f"{name} holds numbers that are not finite"
    for key, form in _FORM.items():
        if key in content and not fits(content[key], form):
            return f"its {key} is not what training writes"
    return None


def load_weights(modules: dict[str, nn.Module], content: dict, path: Path) -> None:
    """Load a checkpoint's tensors into modules, by their key in it.

    Raises:
        UserError: their names or shapes are not those that the flags ask for.
    """
    for key, module in modules.items():
        expected, stored = module.state_dict(), content.get(key, {})
        for name in sorted(expected.keys() ^ stored.keys()):
            fault = "lacks" if name in expected else "has an unexpected tensor"
            raise UserError(f"{path}: its {key} {fault} {name}")
        for name, tensor in expected.items():
            if stored[name].shape != tensor.shape:
                raise UserError(
                    f"{path}: {name} is {list(stored[name].shape)}, but the flags make it "
                    f"{list(tensor.shape)}; --image-size, --n-class, --filters, --learner and "
                    "--hidden-size must be those of its training"
                )
        module.load_state_dict(stored)


def load_optimizer(optimizer: torch.optim.Optimizer, content: dict, path: Path) -> None:
    """Load a checkpoint's moments into Adam, whose settings stay the flags'.

    Raises:
        UserError: they do not fit.
    """
    try:
        stored, own = content["optim"], optimizer.state_dict()["param_groups"]
        # the flags' settings come first: by them PyTorch decides where the count of steps lies
        pairs = zip(stored["param_groups"], own, strict=True)
        groups = [{**theirs, **mine, "params": theirs["params"]} for theirs, mine in pairs]
        optimizer.load_state_dict({**stored, "param_groups": groups})
    except Exception as e:  # damaged or foreign content raises nearly anything
        why = f"its optimiser's state does not fit ({type(e).__name__}: {e})"
        raise UserError(f"{path}: {why}; it can only be tested") from e


def load_for_test(cli_args: dict[str, object], ranks: Ranks) -> tuple[Namespace, dict]:
    """Load ``--resume``, else the run folder's best checkpoint, else its last.

    Returns:
        The flags, of which those that are not given come from the checkpoint and ``resume`` is its
        path; and the checkpoint.

    Raises:
        UserError: there is none, or it is a pre-training, which cannot adapt.
    """
    args, found = resolve(cli_args), None
    if ranks.rank == 0:
        own = args.resume in (None, "auto")
        path = find_checkpoint(run_folder(args), BEST, LAST) if own else None
        if own and path is None:
            place = f"{run_folder(args)}/ckpts"
            raise UserError(f"{place}: no checkpoint there; train first, or give --resume")
        resume = str(path or resolve_checkpoint(args.resume, args.seed, BEST, LAST))
        found = resume, load(Path(resume))
    resume, checkpoint = ranks.exchange(found)[0]
    if checkpoint.get("mode") == "pretrain":
        raise UserError(f"{resume}: is only pre-trained; train a model with --init-from {resume}")
    args = resolve({**cli_args, "resume": resume}, checkpoint.get("hyper_parameters"))
    if not {"data", "data_root"} & cli_args.keys() and "data_root" in checkpoint:
        args.data_root = Path(checkpoint["data_root"])
    return args, checkpoint
