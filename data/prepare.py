"""Makes data/miniImagenet/{train,val,test}/<class>/<image> of mini-ImageNet in any known format.

python data/prepare.py SOURCE [--dest DIR]     make the data set, and show what it is
python data/prepare.py --check DIR             show what a data set is, and what is wrong with it
python data/prepare.py omniglot                download Omniglot and split it
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

from engine.flags import Parser, int_range
from engine.flags import path as home_path
from engine.process import Terminal, check_packages, run_main
from utils import SPLITS, UserError

if __name__ == "__main__":
    Terminal.take_over()
if code := run_main(check_packages, ["numpy", "PIL.Image", "tqdm.std"]):
    sys.exit(code)

from data.formats import DATA, omniglot
from data.formats.build import Manifest, build, is_built
from data.formats.check import examine, print_report, read_record
from data.formats.detect import detect, is_wanted
from data.formats.sources import Source, unpack
from data.formats.splits import MINI, TINY, is_numbers

_EPILOG = """\
data/README.md lists the sources, for example:
  python data/prepare.py split_minidataset          a clone of github.com/Deo0330/split_minidataset
  python data/prepare.py CUB_200_2011/images --split 100/50/50 --seed 1 --dest data/cub

exit codes: 0 done; 1 --check has findings; 2 bad input or no room; 130 interrupted. After 2 and 130
nothing has changed.
"""
_SPLIT = (
    'how to split classes: a JSON file {"train": [class, ...], "val": [...], "test": [...]}, '
    f"or numbers of classes (default: mini-ImageNet's lists; omniglot: {omniglot.SPLIT})"
)


def _parser() -> Parser:
    parser = Parser(
        prog="prepare.py",
        usage="prepare.py SOURCE [--dest DIR] [options]\n       prepare.py --check DIR",
        description="Makes {train,val,test}/<class>/<image> of mini-ImageNet in any known format.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, metavar: str | None, **kwargs: Any) -> None:
        if metavar in ("DIR", "FILE"):
            kwargs["type"] = lambda text: Path(home_path(text))
        parser.add_argument(name, help=text, metavar=metavar, **kwargs)

    text = "folder or archive, whose format is found automatically; or the word omniglot"
    add("source", text, "SOURCE", nargs="?")
    text = "print what DIR holds, its faults, and the next command; writes nothing"
    add("--check", text, "DIR")
    text = f"folder to make (default: {DATA}/miniImagenet, tiny64 or omniglot; none with --split)"
    add("--dest", text, "DIR")
    links = ("copy", "hard", "symlink")
    text = "copy, hard link or symlink the files of a SOURCE folder (default: copy)"
    add("--link", text, None, choices=links, default="copy")
    text = "folder of train.csv, val.csv and test.csv (default: in SOURCE, or beside it)"
    add("--csv", text, "DIR")
    add("--split", _SPLIT, "FILE|A/B/C", type=home_path)
    seed = int_range(0, 2**63 - 1)
    add("--seed", "draws the classes for --split A/B/C (default: 719)", "N", type=seed, default=719)
    text = f"omniglot: where torchvision puts omniglot-py/ (default: {DATA})"
    add("--download", text, "DIR", default=DATA)
    return parser


def _stamp(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]


def _settings(args: argparse.Namespace, source: str, stamp: Any) -> dict[str, Any]:
    """The source and the flags: a second run that shares them has nothing to do."""
    settings = {"source": source, "link": args.link, "stamp": stamp}
    if is_numbers(args.split):
        settings["split"], settings["seed"] = args.split, args.seed
    elif args.split and Path(args.split).is_file():
        settings["split"] = hashlib.sha256(Path(args.split).read_bytes()).hexdigest()
    tables = [(args.csv or Path(source).parent) / f"{split}.csv" for split in SPLITS]
    settings["csv"] = {table.name: _stamp(table) for table in tables if table.is_file()}
    return settings


def _prepare(args: argparse.Namespace) -> None:
    path, folder = Path(args.source), None
    if args.source == "omniglot":
        args.split, args.dest = args.split or omniglot.SPLIT, args.dest or DATA / "omniglot"
    if args.split and not args.dest:
        raise UserError("--split: name the folder to make with --dest, as it is no mini-ImageNet")
    dests = [args.dest] if args.dest else [DATA / known.folder for known in (MINI, TINY)]
    dests = [Path(os.path.abspath(dest)) for dest in dests]
    source, archives = os.path.abspath(path), {path: ""}
    if args.source == "omniglot":
        archives = {path: path.stem for path in omniglot.download(args.download)}
        source, path = args.source, next(iter(archives)).parent
    elif not path.is_file():
        if os.path.realpath(path) in map(os.path.realpath, dests):
            raise UserError(f"{path}: is the data set itself; to examine it: --check {path}")
        folder = Source(path, without=set(map(os.path.realpath, dests)))
    settings = _settings(args, source, folder.stamp if folder else [*map(_stamp, archives)])
    for dest in dests:
        wanted = args.dest or read_record(dest).get("settings") == settings
        if wanted and is_built(dest, settings):
            return

    def make(scratch: Path) -> Manifest:
        wanted = partial(is_wanted, args=args)
        return detect(folder or unpack(path, archives, scratch / "outer", wanted), args, scratch)

    build(dests[0], settings, make)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    if bool(args.source) == bool(args.check):
        raise UserError("give either SOURCE or --check DIR (see --help)")
    try:
        if args.check:
            return print_report(args.check, examine(args.check))
        _prepare(args)
    except (MemoryError, RecursionError):
        what = "does not fit into memory, or is nested too deeply"
        raise UserError(f"{args.source or args.check}: {what}") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
