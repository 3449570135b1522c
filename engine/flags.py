"""The command line: flags, their bounds, and their values from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from learner import MIN_IMAGE_SIZE
from metalearner import INPUT_SIZE
from utils import Parser, UserError, float_range, int_range

ROOT = Path(__file__).resolve().parent.parent

# What shapes the meta-learner and its episodes: each checkpoint stores it, and test mode takes it
# from there.
HYPER_PARAMETERS = (
    "n_shot",
    "n_eval",
    "n_class",
    "input_size",
    "hidden_size",
    "lr",
    "lr_decay",
    "meta_batch",
    "epoch",
    "batch_size",
    "grad_divisor",
    "image_size",
    "filters",
    "adapt",
    "grad_clip",
    "bn_momentum",
    "bn_eps",
    "augment",
    "pixels",
    "shuffle",
    "bn_scale",
    "bn_shift",
    "lstm_init",
    "bf_init",
    "bi_init",
    "precision",
    "seed",
)


def boolean(text: str) -> bool:
    """true/false, so that ``--pin-mem False`` means what it says."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be true or false")
    return words[text.lower()]


def build_parser() -> tuple[Parser, dict[str, object]]:
    """The parser, which leaves out flags that are not given, and every flag's default."""
    parser = Parser(
        prog="main.py",
        description="The LSTM meta-learner of Ravi & Larochelle (ICLR 2017). The defaults are the 5-way 5-shot recipe.",
        epilog="examples:  python main.py --mode train --data-root data/miniImagenet   |   python main.py --mode test",
        argument_default=argparse.SUPPRESS,
    )
    defaults: dict[str, object] = {}

    def group(title: str):
        g = parser.add_argument_group(title)

        def add(name: str, default, help: str, **kwargs):
            defaults[name[2:].replace("-", "_")] = default
            words = " ".join(map(str, default)) if isinstance(default, list) else default
            g.add_argument(
                name,
                help=help if default in (None, False) else f"{help} (default: {words})",
                **kwargs,
            )

        return add

    add = group("what to do")
    modes = ("train", "pretrain", "test", "plot", "results", "export", "predict")
    words = "train; pretrain: the learner alone, on batches of all training classes, for --start; test a checkpoint; plot a "
    words += "run; results: table of tested runs; export: copy what is worth publishing of a run into results/; predict: "
    words += "classify photographs"
    add("--mode", "train", words, choices=modes)
    words = "checkpoint, or run folder (PATH, or else PATH-SEED) for its last (train) or best (test, predict); auto: "
    words += "SAVE-SEED's, if there is one"
    add("--resume", None, words, metavar="PATH")
    add(
        "--seed",
        719,
        "seed of initialisation and episodes",
        type=int_range(0, 2**32 - 1),
        metavar="N",
    )
    add(
        "--save-minutes",
        5.0,
        "minutes between two snapshots",
        type=float_range(0, 1e6),
        metavar="X",
    )
    add(
        "--save",
        "logs",
        "the run folder is SAVE-SEED, with log, metrics and checkpoints",
        metavar="PATH",
    )
    add("--runs", None, "run folders for --mode results", nargs="+", metavar="DIR")
    words = "in tables, the mean alone of three or more runs that differ in their seed only"
    add("--means", False, words, type=boolean, metavar="BOOL")

    add = group("data")
    add("--data", "miniImagenet", "data set's name, a folder in data/", metavar="NAME")
    add(
        "--data-root",
        None,
        "folder with train/, val/, test/ of class folders (default: data/NAME)",
        metavar="DIR",
    )
    add(
        "--image-size",
        84,
        "height and width of the images, pixels",
        type=int_range(MIN_IMAGE_SIZE, 1024),
        metavar="PX",
    )
    add(
        "--augment",
        "port",
        "port: random crops, flips and colours for train, centre crops for val and test, as the older port; "
        "none: every image squashed to a square, as the authors; mirror: that, and train mirrored at random; zoom, mild: "
        "larger crops and weaker colours for train, the whole image squashed for val and test",
        choices=("port", "none", "mirror", "zoom", "mild"),
    )
    words = "imagenet: ImageNet's mean subtracted, divided by its deviation, as the port; unit: 0 to 1, as the authors"
    add("--pixels", "imagenet", words, choices=("imagenet", "unit"))
    add(
        "--cache-dir",
        None,
        "folder for decoded images (default: .decoded in the data root)",
        metavar="DIR",
    )
    add(
        "--n-workers",
        2,
        "processes that prepare episodes; any N gives the same ones",
        type=int_range(0, 256),
        metavar="N",
    )
    add("--pin-mem", True, "page-locked memory for copies to the GPU", type=boolean, metavar="BOOL")

    add = group("episodes")
    add("--n-class", 5, "classes of an episode (n-way)", type=int_range(2, 1000), metavar="N")
    add("--n-shot", 5, "support images per class (k-shot)", type=int_range(1, 1000), metavar="N")
    add("--n-eval", 15, "query images per class", type=int_range(1, 1000), metavar="N")
    add("--episode", 50000, "episodes of training", type=int_range(1), metavar="N")
    add(
        "--episode-val",
        100,
        "episodes of a validation, the same each time",
        type=int_range(1),
        metavar="N",
    )
    words = "episodes of a test, or several counts of the same ones"
    add("--episode-test", [600], words, type=int_range(1), nargs="+", metavar="N")
    add(
        "--shots",
        None,
        "numbers of shots to test with, such as 1 5",
        type=int_range(1, 1000),
        nargs="+",
        metavar="K",
    )

    add = group("learner and its training on the support set")
    add("--epoch", 8, "passes over the support set", type=int_range(1, 10000), metavar="N")
    add("--batch-size", 25, "images of a support minibatch", type=int_range(1), metavar="N")
    words = "divide a minibatch's gradient by N before the meta-learner reads it; 0: by its number of images, as the authors"
    add("--grad-divisor", 0, words, type=int_range(0, 10**6), metavar="N")
    words = "order of the support images in smaller minibatches: new in each pass, or one per episode, as the authors"
    add("--shuffle", "pass", words, choices=("pass", "episode"))
    words = "start of batch normalisation's scale: uniform, U(0, 1), as both earlier codes; one, as PyTorch since 1.2"
    add("--bn-scale", "uniform", words, choices=("uniform", "one"))
    words = "what adapts to an episode: all of the learner, as in the paper; classifier: its last layer, while all before it "
    words += "stays as it starts, normalised by statistics of training images"
    add("--adapt", "all", words, choices=("all", "classifier"))
    words = "with --adapt classifier: raise the shift of the last batch normalisation, when training begins, by X standard "
    words += "deviations; the higher, the fewer features are zero"
    add("--bn-shift", 0.0, words, type=float_range(-10, 10), metavar="X")
    words = "filters of each convolution; on a CPU, kernels are for 32"
    add("--filters", 32, words, type=int_range(1, 1024), metavar="N")
    add(
        "--bn-momentum",
        0.95,
        "share of the newest batch in the running statistics",
        type=float_range(0, 1),
        metavar="X",
    )
    add(
        "--bn-eps",
        1e-3,
        "epsilon of batch normalisation",
        type=float_range(0, 1, low_open=True),
        metavar="X",
    )

    add = group("meta-learner and its training")
    size = int_range(INPUT_SIZE, INPUT_SIZE)
    add(
        "--input-size",
        INPUT_SIZE,
        "numbers that its LSTM reads per coordinate",
        type=size,
        metavar="N",
    )
    add("--hidden-size", 20, "width of its LSTM", type=int_range(1, 4096), metavar="N")
    words = "checkpoint or run folder (PATH, or else PATH-SEED) of another training, whose meta-learner a new one begins with "
    words += "(default: a random one); a classifier of another number of classes starts at zero"
    add("--start", None, words, metavar="PATH")
    add("--lr", 1e-3, "learning rate of Adam", type=float_range(0, 1, low_open=True), metavar="X")
    words = "share of the training, at its end, in which the learning rate falls evenly to 0; 0: never, as both earlier codes"
    add("--lr-decay", 0.0, words, type=float_range(0, 1), metavar="X")
    words = "episodes of an update, whose gradients are averaged; more run side by side on cores, GPUs and machines"
    add("--meta-batch", 1, words, type=int_range(1, 10**6), metavar="M")
    add(
        "--grad-clip",
        0.25,
        "largest norm of its gradient",
        type=float_range(0, 1e6, low_open=True),
        metavar="X",
    )
    bias = float_range(-100, 100)
    words = "start of its LSTM: pytorch, as the port; authors: U(-0.01, 0.01) and one bias"
    add("--lstm-init", "pytorch", words, choices=("pytorch", "authors"))
    add(
        "--bf-init",
        [4.0, 6.0],
        "range in which bF starts (authors: 4 5)",
        type=bias,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    add(
        "--bi-init",
        [-5.0, -4.0],
        "range in which bI starts",
        type=bias,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )

    add = group("test and prediction")
    words = "orders of the classes over which answers are averaged, the learner trained anew for each; more: steadier, slower "
    words += "(default: 1; to predict, as many as classes)"
    add("--orders", None, words, type=int_range(1, 1000), metavar="N")
    words = "average over mirror images, too: of the support images, with a learner for each, and of the query images"
    add("--mirror", False, words, type=boolean, metavar="BOOL")
    words = "normalise the query images of a test or validation by their own batch statistics, not by the support set's"
    add("--transductive", False, words, type=boolean, metavar="BOOL")
    add("--support", None, "examples: a folder with one folder of images per class", metavar="DIR")
    add("--query", None, "images to classify, or folders of them", nargs="+", metavar="PATH")
    add("--out", "predictions", "answers are written to OUT.csv and OUT.png", metavar="PATH")

    add = group("machine and log")
    add("--cpu", False, "use the CPU even where there is a GPU", action="store_true")
    add(
        "--gpu",
        None,
        "insist on GPU number N (default: the first one, else the CPU)",
        type=int_range(0, 63),
        metavar="N",
    )
    add(
        "--plain",
        False,
        "without fast/, in plain PyTorch as the root has it: slower, equal to rounding",
        action="store_true",
    )
    add(
        "--precision",
        "fp32",
        "of the learner's convolutions; all else is fp32",
        choices=("fp32", "bf16"),
    )
    add(
        "--plots",
        True,
        "pictures in the run folder at the end of training",
        type=boolean,
        metavar="BOOL",
    )
    add(
        "--tensorboard",
        False,
        "also write the log's numbers for TensorBoard, into the run folder",
        action="store_true",
    )
    add("--log-freq", 50, "episodes between two lines of the log", type=int_range(1), metavar="N")
    add(
        "--val-freq",
        1000,
        "episodes between two validations and checkpoints; 0: none",
        type=int_range(0),
        metavar="N",
    )
    return parser, defaults


def parse(argv: list[str]) -> tuple[dict[str, object], dict[str, object]]:
    """Read the command line.

    Returns:
        The flags that were given, and the defaults of all flags.

    Raises:
        UserError: a flag is unknown or out of bounds; the message names it.
    """
    parser, defaults = build_parser()
    given = vars(parser.parse_args(argv))
    if given.get("cpu") and given.get("gpu") is not None:
        raise UserError(f"--cpu and --gpu {given['gpu']}: give one of the two")
    return given, defaults


def settle(
    given: dict[str, object], defaults: dict[str, object], stored: dict[str, object] | None = None
) -> argparse.Namespace:
    """Settle each flag's value. Precedence: command line, checkpoint, default.

    Args:
        given, defaults: from ``parse``.
        stored: the hyper-parameters that a checkpoint carries, or None.

    Raises:
        UserError: flags contradict each other.
    """
    stored = {k: v for k, v in (stored or {}).items() if k in HYPER_PARAMETERS}
    args = argparse.Namespace(**{**defaults, **stored, **given})
    args.data_root = Path(args.data_root) if args.data_root else ROOT / "data" / args.data
    for name in ("bi_init", "bf_init"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(
                f"--{name.replace('_', '-')} {low:g} {high:g}: the first must not be the larger one"
            )
    if args.bn_shift and args.adapt != "classifier":
        raise UserError(
            f"--bn-shift {args.bn_shift:g}: is for --adapt classifier only; give that, or leave the shift out"
        )
    if args.transductive and args.adapt == "classifier":
        raise UserError(
            "--transductive true: is for --adapt all only; with --adapt classifier no batch's statistics are used"
        )
    if args.transductive and args.mode == "predict":
        raise UserError(
            "--transductive true: is for tests; a prediction must not depend on the other images"
        )
    return args


def check_stored(path: Path, stored: dict[str, object]) -> None:
    """Check that the flags admit a checkpoint's hyper-parameters.

    Raises:
        UserError: one is not; it is named.
    """
    for name, value in stored.items():
        words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        try:
            parsed = (
                parse([f"--{str(name).replace('_', '-')}", *words])[0].get(name)
                if name in HYPER_PARAMETERS
                else None
            )
        except UserError as e:
            raise UserError(f"{path}: its hyper-parameter {name} {value} cannot be: {e}") from e
        if parsed != value:
            raise UserError(
                f"{path}: its hyper-parameter {name} {value} is unknown or no plain number"
            )


def run_folder(args: argparse.Namespace) -> Path:
    """``SAVE-SEED``, below the working directory unless SAVE is absolute."""
    return Path(f"{args.save}-{args.seed}")


def hyper_parameters(args: argparse.Namespace) -> dict[str, object]:
    """The part of the flags that a checkpoint carries."""
    return {k: getattr(args, k) for k in HYPER_PARAMETERS}
