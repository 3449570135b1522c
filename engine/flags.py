"""The command line: flags, their bounds, and which of them a checkpoint carries.

Imports no PyTorch, so that ``--help`` and errors appear at once.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from utils import ROOT, UserError

MIN_IMAGE_SIZE, INPUT_SIZE = 16, 4  # learner.py's and metalearner.py's, which import PyTorch
# which a checkpoint carries for a resumed run: its length, and what its validations depend on
RUN_FLAGS = ("episode", "val_freq", "episode_val", "transductive", "tta_permutations", "tta_flip")
MODES = {
    "train": "train the meta-learner",
    "test": "test a checkpoint on episodes of the test classes",
    "predict": "classify your own images",
    "pretrain": "train the learner alone, on batches of all training classes, for --init-from",
    "plot": "plot a run; with --data or --data-root, first trace its updates if no trace is there",
    "results": "print tables of tested runs",
    "export": "copy a tested run's best weights, logs, results and figures, to publish them",
}
METHODS = {
    "lstm": "the paper's",
    "sgd": "gradient descent with one learned step size",
    "meta-sgd": "gradient descent with a learned step size for each parameter",
    "linear-head": "the LSTM trains a linear head on frozen features",
    "nearest": "nearest neighbour on frozen features",
    "finetune": "gradient descent from a pre-trained network",
    "matching": "matching network",
    "matching-fce": "matching network with full context embeddings",
    "protonet": "prototypical network",
}
INNER_LOOP = ("lstm", "sgd", "meta-sgd", "linear-head")  # an update rule trains learners
PRETRAINED = ("linear-head", "nearest", "finetune")  # start from a run of --mode pretrain
# modes that accept a flag, if not all; test accepts train's, which scripts/seeds.sh passes on
HEEDED = {
    **dict.fromkeys(("support", "query", "out"), ("predict",)),
    **dict.fromkeys(("init_from", "shots"), ("train", "test")),
    "runs": ("results",),
    "to": ("export",),
    "resume": tuple(MODES.keys() - {"results", "export"}),
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and flags are never abbreviated."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # Python 3.14's: also -1e-5

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def int_range(low: int, high: int = 10**9) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``."""
    return partial(_number, int, "a whole number", low, high, False)


def float_range(low: int, high: int, low_open: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` (itself excluded if ``low_open``) to ``high``."""
    return partial(_number, float, "a number", low, high, low_open)


def _number(kind: type, what: str, low: int, high: int, low_open: bool, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (low_open and value == low):
        bound = "above" if low_open else "from"
        raise argparse.ArgumentTypeError(
            f"is {text!r}, but must be {what} {bound} {low} up to {high}"
        )
    return value


def boolean(text: str) -> bool:
    """Parse true/false, so that ``--pin-mem False`` means what it says."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be true or false")
    return values[text.lower()]


def flag_name(name: str) -> str:
    """A flag as one types it: ``n_class`` -> ``--n-class``."""
    return "--" + name.replace("_", "-")


def flag_value(value: object) -> str:
    """A flag's value as one types it."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.lower() if value in (True, False, None) else text


def path(text: str) -> str:
    """A path with the home folder for "~", which no shell replaces after "="."""
    if not text:
        advice = "is an unset variable of the shell meant? else leave the flag out"
        raise argparse.ArgumentTypeError(f"is empty, but must be a path; {advice}")
    if text != "~" and not text.startswith("~/"):
        return text
    try:
        return str(Path(text).expanduser()) + "/" * text.endswith("/")  # --out DIR/
    except RuntimeError as e:  # no HOME, and a user without an entry in the list of users
        raise argparse.ArgumentTypeError(f"{text}: there is no home folder; set HOME") from e


def split_learner(learner: str) -> tuple[str, str, str]:
    """``--learner FILE:NAME@DIGEST`` -> FILE, NAME and DIGEST, which may be empty."""
    file, _, name = learner.rpartition(":")
    name, _, digest = name.partition("@")
    return file, name, digest


def comparable(value: object) -> object:
    """A flag's value for comparison; of --learner without FILE, which may have moved."""
    learner = isinstance(value, str) and "@" in value
    return "@".join(split_learner(value)[1:]) if learner else value


def with_digest(learner: str) -> str:
    """``--learner`` with a digest of the file's content, as a checkpoint keeps it; conv4 has none.

    Raises:
        UserError: there is no such file, or no name in it is given.
    """
    learner = path(learner)
    file, name, digest = split_learner(learner)
    if digest or learner == "conv4":
        return learner
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"--learner {learner}: should be conv4, or FILE:NAME such as my_net.py:Net")
    try:
        content = Path(file).read_bytes()
    except OSError as e:
        raise UserError(f"--learner {file}:{name}: cannot be read ({e.strerror})") from e
    return f"{learner}@{hashlib.sha256(content).hexdigest()[:12]}"


def _listed(title: str, items: dict[str, str]) -> str:
    return f"{title}:\n" + "".join(f"  {k:<13} {v}\n" for k, v in items.items()) + "\n"


def default_workers() -> int:
    """Half of the usable cores, from 2 to 8: on a GPU, preparing episodes limits the speed."""
    usable = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
    return min(8, max(2, len(usable) // 2))


_parser = Parser(
    prog="main.py",
    usage="python main.py [--mode MODE] [flags]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="The LSTM meta-learner of Ravi & Larochelle (ICLR 2017).\n"
    "The defaults are the 5-way 5-shot recipe of the PyTorch port of 2019.\n"
    "For test and predict, the checkpoint's values replace them.",
    epilog=_listed("modes", MODES) + _listed("methods", METHODS) + "examples:\n"
    "  python main.py --mode train --data-root data/miniImagenet\n  python main.py --mode test",
    argument_default=argparse.SUPPRESS,  # leaves out flags that are not given
)
DEFAULTS: dict[str, object] = {}
HYPER_PARAMETERS: list[str] = []


def _group(title: str) -> Callable:
    """Begin a group of flags, and return the function that adds one."""
    section = _parser.add_argument_group(title)

    def add(name: str, default, help: str, metavar=None, hyper: bool = False, **kwargs) -> None:
        key = name[2:].replace("-", "_")
        DEFAULTS[key] = default
        if hyper:
            HYPER_PARAMETERS.append(key)
        if metavar in ("PATH", "DIR", "NAME"):
            kwargs["type"] = path
        if "action" not in kwargs and isinstance(default, bool):
            kwargs["type"], metavar = boolean, "BOOL"
        if "action" not in kwargs and default is not None:
            help += f" (default: {flag_value(default)})"
        if metavar:
            kwargs["metavar"] = metavar
        section.add_argument(name, help=help, **kwargs)

    return add


count, positive = int_range(1), partial(float_range, 0, low_open=True)

add = _group("what to do")
add("--mode", "train", "one of the modes below", "MODE", choices=tuple(MODES))
words = "checkpoint, or run folder (train: its last checkpoint; else its best); auto: this run's "
add("--resume", None, words + "own, if any (default in tests: this run's best)", "PATH")
add("--save", "logs", "the run folder is SAVE-SEED", "PATH")
add("--seed", 719, "seed of initialisation and episodes", "N", True, type=int_range(0, 2**32 - 1))
words = "minutes between two writes of the last checkpoint"
add("--save-minutes", 5.0, words, "X", type=float_range(0, 10**6))
add("--runs", None, "results: run folders", "DIR", nargs="+")
add("--to", "exported", "export: folder for the run's copy", "DIR")

add = _group("data")
add("--data", "miniImagenet", "data set, a folder in data/", "NAME")
words = "folder with train/, val/, test/ of class folders (default: data/NAME)"
add("--data-root", None, words, "DIR")
words, pixels = "height and width of the images, pixels", int_range(MIN_IMAGE_SIZE, 1024)
add("--image-size", 84, words, "PX", True, type=pixels)
words = "augmentation of training images. port: random crops, flips, colour jitter; zoom, mild: "
words += "crops of at least 22 and 60 %% of the area, weaker jitter; none: the whole image resized "
words += "to a square, as in the authors' code; flip: the same with random flips. Validation and "
words += "test: a centre crop with port, else the whole image"
add("--augment", "port", words, hyper=True, choices=("port", "none", "flip", "zoom", "mild"))
words = "imagenet: normalised by ImageNet's mean and standard deviation, as in the port; unit: in "
words += "[0, 1]"
add("--pixels", "imagenet", words, hyper=True, choices=("imagenet", "unit"))
add("--cache-dir", None, "folder for decoded images (default: .decoded in the data)", "DIR")
words = "processes that prepare episodes"
add("--n-workers", default_workers(), words, "N", type=int_range(0, 256))
add("--pin-mem", True, "page-locked memory for copies to the GPU")

add = _group("episodes")
add("--n-class", 5, "classes of an episode (n-way)", "N", True, type=int_range(2, 10**5))
add("--n-shot", 5, "support images per class (k-shot)", "N", True, type=int_range(1, 1000))
add("--n-eval", 15, "query images per class", "N", True, type=int_range(1, 1000))
add("--episode", 50000, "training episodes; pretrain: batches", "N", type=count)
add("--episode-val", 100, "validation episodes, the same each time", "N", type=count)
words = "test episodes; larger counts include smaller ones"
add("--episode-test", [600], words, "N", type=count, nargs="+")
words = "test: images per class to adapt to, such as 1 5 (default: --n-shot)"
add("--shots", None, words, "K", type=int_range(1, 1000), nargs="+")

add = _group("learner")
words = "conv4, the paper's; or your own network, a class or function NAME in a Python file: "
words += "see examples/own_network.py. Only FILE is checked for changes, not what it imports"
add("--learner", "conv4", words, "FILE:NAME", True, type=with_digest)
add("--epoch", 8, "passes over the support set", "N", True, type=int_range(1, 10000))
add("--batch-size", 25, "images of a support minibatch", "N", True, type=count)
words = "divide the minibatch's mean gradient by N; 0: by its number of images, as in the authors' "
words += "code"
add("--grad-divisor", 0, words, "N", True, type=int_range(0, 10**6))
words = "shuffle the support images anew for each pass, or once per episode"
add("--shuffle", "pass", words, hyper=True, choices=("pass", "episode"))
words = "initial scale of batch norm: uniform, U(0, 1), as in the authors' code and the port; one, "
words += "PyTorch's default"
add("--bn-scale", "uniform", words, hyper=True, choices=("uniform", "one"))
words = "weight of the new batch in batch norm's running statistics"
add("--bn-momentum", 0.95, words, "X", True, type=float_range(0, 1))
words = "validation and test: update batch norm's statistics on the support set once more, with "
words += "the learner's last parameters"
add("--final-stats", False, words, hyper=True)
add("--bn-eps", 1e-3, "epsilon of batch norm", "X", True, type=positive(1))
words = "filters of each convolution; the CPU kernels are for 32"
add("--filters", 32, words, "N", True, type=int_range(1, 1024))

add = _group("meta-learner")
only = int_range(INPUT_SIZE, INPUT_SIZE)
add("--input-size", INPUT_SIZE, "inputs of the LSTM per coordinate; only 4", "N", True, type=only)
add("--hidden-size", 20, "width of the LSTM", "N", True, type=int_range(1, 4096))
words = "initialisation of the LSTM: pytorch, as in the port; authors: U(-0.01, 0.01) and one bias"
add("--lstm-init", "pytorch", words, hyper=True, choices=("pytorch", "authors"))
bias = {"metavar": ("LOW", "HIGH"), "hyper": True, "type": float_range(-100, 100), "nargs": 2}
add("--bf-init", [4.0, 6.0], "range of bF's initial value (authors: 4 5)", **bias)
words = "range of bI's initial value. The first steps are sigmoid(bI) times the gradient: about "
words += "1/100, or 1/2 for 0 0, which suits small networks and a few hundred episodes"
add("--bi-init", [-5.0, -4.0], words, **bias)
add("--lr", 1e-3, "learning rate of Adam", "X", True, type=positive(1))
words = "final fraction of training over which the learning rate falls linearly to 0"
add("--lr-decay", 0.0, words, "X", True, type=float_range(0, 1))
words = "decay of an exponential moving average of the weights, used in validation, test and "
words += "prediction; 0: no average (in tests: the weights that Adam trained)"
add("--ema", 0.0, words, "X", True, type=float_range(0, 1))
words = "episodes whose gradients are averaged for an update"
add("--meta-batch", 1, words, "M", True, type=int_range(1, 10**6))
add("--grad-clip", 0.25, "largest norm of the meta-gradient", "X", True, type=positive(10**6))

add = _group("beyond the paper")
add("--method", "lstm", "one of the methods below", "METHOD", True, choices=tuple(METHODS))
words = "pretrain: cosine similarities, or a linear classifier as for the paper's baselines"
add("--classifier", "cosine", words, hyper=True, choices=("cosine", "linear"))
words = "also differentiate the learner's losses and gradients, which the paper treats as "
words += "constants (first order)"
add("--second-order", False, words, hyper=True)
words = "start a new training from the weights of this checkpoint or run folder (or PATH-SEED)"
add("--init-from", None, words, "PATH")
words = "linear-head: add X times its scale to the bias of the last batch norm"
add("--bn-shift", 0.0, words, "X", True, type=float_range(-10, 10))

add = _group("test and prediction")
words = "test-time augmentation: adapt to each of N permutations of the labels, and average "
words += "(default: 1; predict: number of classes)"
add("--tta-permutations", None, words, "N", type=int_range(1, 1000))
words = "test-time augmentation: average over flipped support and query images, too"
add("--tta-flip", False, words)
words = "transductive batch norm in validation and test: the query batch's own statistics"
add("--transductive", False, words)
add("--support", None, "predict: a folder with one folder of examples per class", "DIR")
add("--query", None, "predict: images to classify, or folders of them", "PATH", nargs="+")
add("--out", "predictions", "predict: writes OUT.csv and OUT.png", "PATH")

add = _group("machine and log")
switch = {"action": "store_true"}
add("--cpu", False, "use the CPU even where there is a GPU", **switch)
words = "use GPU number N or fail (default: the first GPU, else the CPU)"
add("--gpu", None, words, "N", type=int_range(0, 63))
add("--plain", False, "plain PyTorch, without fast/: slower, equal up to rounding", **switch)
words = "precision of the learner's convolutions; bf16 needs a GPU"
add("--precision", "fp32", words, hyper=True, choices=("fp32", "bf16"))
add("--plots", True, "plot the run at the end of training")
add("--tensorboard", False, "also write TensorBoard's files into the run folder", **switch)
add("--log-freq", 50, "episodes between two lines of the log", "N", type=count)
words = "episodes between two validations and checkpoints; 0: none"
add("--val-freq", 1000, words, "N", type=int_range(0))


def parse(argv: list[str]) -> dict[str, object]:
    """Parse the command line into the flags that are given.

    Raises:
        UserError: a flag is unknown or out of bounds; it is named.
    """
    cli_args = vars(_parser.parse_args(argv))
    if cli_args.get("cpu") and cli_args.get("gpu") is not None:
        raise UserError(f"--cpu and --gpu {cli_args['gpu']}: give one of the two")
    return cli_args


def resolve(
    cli_args: dict[str, object], checkpoint_args: dict[str, object] | None = None
) -> argparse.Namespace:
    """Decide each flag's value: the command line, else the checkpoint, else the default.

    Args:
        cli_args: from ``parse``.
        checkpoint_args: the flags that a checkpoint carries.

    Raises:
        UserError: flags contradict each other.
    """
    known = (*HYPER_PARAMETERS, *RUN_FLAGS)
    stored = {k: v for k, v in (checkpoint_args or {}).items() if k in known}
    args = argparse.Namespace(**{**DEFAULTS, **stored, **cli_args})
    args.data_root = Path(args.data_root) if args.data_root else ROOT / "data" / args.data
    for name, modes in HEEDED.items():
        if name in cli_args and args.mode not in modes:
            flag = f"{flag_name(name)} {flag_value(getattr(args, name))}"
            advice = "name the run by --save and --seed" if name == "resume" else "leave it out"
            raise UserError(f"{flag}: is not for --mode {args.mode}; {advice}")
    for name in ("bi_init", "bf_init"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"{flag_name(name)} {low:g} {high:g}: LOW must not exceed HIGH")
    mode, method, conv4 = args.mode, args.method, args.learner == "conv4"
    training, head = mode != "pretrain", method == "linear-head"
    this = f"--method {method}" if training else "--mode pretrain"
    not_here = f"is not for {this}; leave it out"
    loop, lstm = training and method in INNER_LOOP, training and (method == "lstm" or head)
    of_loop = "tta_permutations tta_flip transductive final_stats second_order meta_batch "
    of_loop += "grad_divisor bi_init"
    rules = [  # flags, whether they may have other values than the default, and why not
        ("mode", conv4 or mode != "pretrain", "needs --learner conv4"),
        ("method precision", conv4, "needs --learner conv4"),
        ("bn_shift", head, "is for --method linear-head only"),
        ("transductive final_stats", not head, "a linear head has no batch norm; leave it out"),
        ("ema method", training, not_here),
        ("classifier", not training, "is for --mode pretrain only"),
        (of_loop, loop, not_here),
        ("hidden_size lstm_init bf_init", lstm, not_here),
        ("lr lr_decay grad_clip ema", method not in ("nearest", "finetune"), not_here),
        ("batch_size", loop or method == "finetune", not_here),
        ("mode", loop or mode != "predict", f"is not for --method {method}"),
        ("init_from", loop or method in PRETRAINED, f"--method {method} starts from scratch"),
        ("shots", method != "finetune", "is tuned for one number of shots; leave it out"),
    ]
    if mode not in ("train", "pretrain") and checkpoint_args is None:
        rules = []  # method and learner come from the checkpoint, which is not read yet
    rules.append(
        ("transductive", mode != "predict", "a prediction must not depend on the other images")
    )
    for names, allowed, why in rules:
        for name in names.split():
            if not allowed and (value := getattr(args, name)) != DEFAULTS[name]:
                raise UserError(f"{flag_name(name)} {flag_value(value)}: {why}")
    return args


def check(argv: list[str]) -> None:
    """Answer ``--help``, and raise ``UserError`` for invalid flags.

    Under torchrun it does nothing: there, all ranks refuse together.
    """
    if "WORLD_SIZE" not in os.environ:
        resolve(parse(argv))


def check_stored(path: Path, content: dict) -> None:
    """Check that the flags that a checkpoint carries are known, with values that they admit.

    Raises:
        UserError: one is not; it is named.
    """
    for table, known in (("hyper_parameters", HYPER_PARAMETERS), ("run_flags", RUN_FLAGS)):
        for name, value in content.get(table, {}).items():
            words = map(str, value if isinstance(value, list) else [value])
            try:
                parsed = parse([flag_name(name), *words]).get(name) if name in known else None
            except UserError as e:
                raise UserError(f"{path}: its {name} {value} is invalid: {e}") from e
            if parsed != value:
                raise UserError(f"{path}: its {name} {value} is unknown")


def data_name(args: argparse.Namespace) -> str:
    """The name of the folder with the data, also of ``--data-root .``."""
    return os.path.basename(os.path.abspath(args.data_root))


def run_folder(args: argparse.Namespace) -> Path:
    """``SAVE-SEED``, below the working directory unless SAVE is absolute."""
    return Path(f"{args.save}-{args.seed}")


def completed(stored: dict[str, object]) -> dict[str, object]:
    """A checkpoint's hyper-parameters, with defaults for newer flags; {} stays {}."""
    return {k: DEFAULTS[k] for k in HYPER_PARAMETERS} | stored if stored else {}


def stored_flags(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """The flags that a checkpoint carries: hyper-parameters and, for a resumed run, others."""
    hyper_parameters = {k: getattr(args, k) for k in HYPER_PARAMETERS}
    run_flags = {k: getattr(args, k) for k in RUN_FLAGS if getattr(args, k) is not None}
    return {"hyper_parameters": hyper_parameters, "run_flags": run_flags}
