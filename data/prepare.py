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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for utils
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for formats

from utils import SPLITS, Parser, UserError, int_range, print_error, run_main

try:
    from formats import DATA, omniglot
    from formats.build import build, is_built, read_record, work_folder
    from formats.check import Report, examine, next_command, notes, table, verdict
    from formats.detect import detect
    from formats.manifest import MINI, TINY, is_numbers
    from formats.sources import open_source
except ModuleNotFoundError as missing:
    if missing.name not in ("numpy", "PIL", "tqdm"):
        raise
    sys.exit(print_error(f"{missing.name} is missing: pip install -r requirements.txt"))

_EXAMPLES = """\
data/README.md lists the sources, for example:
  python data/prepare.py split_minidataset          a clone of github.com/Deo0330/split_minidataset
  python data/prepare.py mini-imagenet.tar.gz       {train,val,test}/<class>/<image>, nested or not
  python data/prepare.py ravi/                      images/ with train.csv, val.csv and test.csv
  python data/prepare.py pickles/                   or parquet/: arrays
  python data/prepare.py ILSVRC2012_img_train.tar --csv meta-learning-lstm/data/miniImagenet
  python data/prepare.py tiny-imagenet-200.zip      makes data/tiny64
  python data/prepare.py CUB_200_2011/images --split 100/50/50 --seed 1 --dest data/cub
  python data/prepare.py omniglot                   the word itself: torchvision downloads it
  python data/prepare.py --check data/miniImagenet

exit codes: 0 done; 1 --check has findings; 2 bad input or no room, nothing changed; 130
interrupted: run it again.
"""


def _parser() -> Parser:
    parser = Parser(
        prog="prepare.py",
        usage="prepare.py SOURCE [--dest DIR] [options]\n       prepare.py --check DIR",
        description="Makes {train,val,test}/<class>/<image> of mini-ImageNet in any known format.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, **kwargs: Any) -> None:
        parser.add_argument(name, help=text, **kwargs)

    text = "folder or archive, whose format is found automatically; or the word omniglot"
    add("source", text, metavar="SOURCE", nargs="?")
    text = "print what DIR holds, its faults, and the next command; writes nothing"
    add("--check", text, metavar="DIR", type=Path)
    text = f"folder to make (default: {DATA}/miniImagenet, tiny64 or omniglot; none with --split)"
    add("--dest", text, metavar="DIR", type=Path)
    text = "copy, hard link or symlink the files of a SOURCE folder (default: copy)"
    add("--link", text, choices=("copy", "hard", "symlink"), default="copy")
    text = "folder of train.csv, val.csv and test.csv (default: in SOURCE, or beside it)"
    add("--csv", text, metavar="DIR", type=Path)
    text = (
        'how to split classes: a JSON file {"train": [class, ...], "val": [...], "test": [...]}, '
        f"or numbers of classes (default: mini-ImageNet's lists; omniglot: {omniglot.SPLIT})"
    )
    add("--split", text, metavar="FILE|A/B/C")
    text = "draws the classes for --split A/B/C (default: 719)"
    add("--seed", text, metavar="N", type=int_range(0, 2**63 - 1), default=719)
    text = "names of labels 0, 1, ..., one a line, for Parquet shards that lack them"
    add("--class-names", text, metavar="FILE", type=Path)
    text = "omniglot: where torchvision puts omniglot-py/ (default: %(default)s)"
    add("--download", text, metavar="DIR", type=Path, default=DATA)
    return parser


def _file_stamp(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]


def _settings(args: argparse.Namespace, source: str, stamp: Any) -> dict[str, Any]:
    """The source and the flags: a second run that shares them has nothing to do, or resumes the
    first.
    """
    settings = {"source": source, "link": args.link, "stamp": stamp}
    if is_numbers(args.split):
        settings["split"], settings["seed"] = args.split, args.seed
    elif args.split and Path(args.split).is_file():
        settings["split"] = hashlib.sha256(Path(args.split).read_bytes()).hexdigest()
    if args.class_names:
        settings["class_names"] = hashlib.sha256(args.class_names.read_bytes()).hexdigest()
    folder = args.csv or Path(source).parent
    tables = [folder / f"{split}.csv" for split in SPLITS]
    settings["csv"] = {table.name: _file_stamp(table) for table in tables if table.is_file()}
    return settings


def _report(folder: Path, report: Report) -> int:
    """Print a report and the next step; returns the exit code of --check."""
    record = read_record(folder)
    line, findings = verdict(report, record)
    print(*table(report), line, *(f"- {finding}" for finding in findings), sep="\n")
    for note in notes(report):
        print(f"note: {note}")
    correct = f"correct what is listed above, then: --check {folder}"
    print(f"next: {correct if findings else next_command(folder, report, record)}")
    return 1 if findings else 0


def _prepare(args: argparse.Namespace) -> int:
    if not args.source:
        raise UserError("SOURCE is empty: give a folder or an archive")
    path, drawings = Path(args.source), args.source == "omniglot"
    if drawings:
        args.split, args.dest = args.split or omniglot.SPLIT, args.dest or DATA / "omniglot"
    if args.split and not args.dest:
        raise UserError("--split: name the folder to make with --dest, as it is no mini-ImageNet")
    folders = [args.dest] if args.dest else [DATA / known.folder for known in (MINI, TINY)]
    places = [Path(os.path.abspath(folder)) for folder in folders]
    source = None
    if drawings:
        archives = omniglot.download(args.download)
        settings = _settings(args, args.source, list(map(_file_stamp, archives)))
    else:
        if os.path.realpath(path) in map(os.path.realpath, places):
            raise UserError(f"{path}: is the data set itself; to examine it: --check {path}")
        # listing an archive takes long: only when there is something to do
        without = {os.path.realpath(p) for place in places for p in (place, work_folder(place))}
        source = None if path.is_file() else open_source(path, without)
        stamp = source.stamp if source else _file_stamp(path)
        settings = _settings(args, os.path.abspath(path), stamp)
    for place in places:
        wanted = args.dest or read_record(place).get("settings") == settings
        if wanted and is_built(place, settings):
            print(f"{place}: is there already, made from {path}: nothing to do")
            return 0
    if drawings:
        manifest = omniglot.manifest(archives[0].parent, args)
    else:
        manifest = detect(source or open_source(path), args)
    dest = places[0] if args.dest else DATA / manifest.dest
    is_built(dest, settings)  # refuses a data set of another source
    manifest.validate(settings["source"])
    if args.link != "copy" and getattr(manifest.reader, "kind", "") != "a folder":
        raise UserError(f"--link {args.link}: only image files of a folder can be linked")
    classes = {(item.split, item.cls) for item in manifest.items}
    counts = "/".join(str(sum(split == of for of, _ in classes)) for split in SPLITS)
    print(f"found: {settings['source']}: {manifest.found}")
    for note in manifest.notes:
        print(f"note: {note}")
    print(f"writing: {counts} classes, {len(manifest.items)} images -> {dest}", flush=True)
    report = build(manifest, dest, settings, args.link)
    print(f"ready: {dest}")
    _report(dest, report)
    return 0


def _run(argv: list[str]) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes of any kind
    args = _parser().parse_args(argv)
    if (args.source is None) == (args.check is None):
        raise UserError("give either SOURCE or --check DIR (see --help)")
    try:
        return _report(args.check, examine(args.check)) if args.check else _prepare(args)
    except (MemoryError, RecursionError):
        what = "does not fit into memory, or is nested too deeply"
        raise UserError(f"{args.source or args.check}: {what}") from None
    except OSError as error:
        if error.filename or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{args.source or args.check}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main(_run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
