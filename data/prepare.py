"""Turns mini-ImageNet, in whichever form you have it, into
data/miniImagenet/{train,val,test}/<class>/<image>.

python data/prepare.py SOURCE [--dest DIR]     make the data set, and show what it is
python data/prepare.py --check DIR             show what a data set is, and what is wrong with it
python data/prepare.py omniglot                download Omniglot and split it
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for utils
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for forms

from utils import SPLITS, Parser, UserError, int_range, print_error, run_main

try:
    from formats import DATA, omniglot, refuse_code_folder
    from formats.build import build, read_record, work_folder
    from formats.check import Report, examine, next_command, notes, table, verdict
    from formats.detect import detect
    from formats.manifest import Options, Plan, is_numbers, validate
    from formats.sources import Folder, Source, open_source
except ModuleNotFoundError as missing:
    if missing.name not in ("numpy", "PIL", "tqdm"):
        raise
    sys.exit(print_error(f"{missing.name} is missing: pip install -r requirements.txt"))

_EXAMPLES = """\
SOURCE, and what prepare.py makes of it:
  split_minidataset/              the git repository github.com/Deo0330/split_minidataset: the published images at 84 px
  mini-imagenet.tar.gz            {train,val,test}/<class>/<image> in a folder, .tar, .tar.gz or .zip, nested or not;
                                  or three archives of these names in a folder; folders that hold the same classes are
                                  one set, which is split by mini-ImageNet's class lists (data/splits)
  ravi/                           images/ or images.zip with train.csv, val.csv, test.csv of `filename,label` lines
  all-classes/                    100 class folders: split by mini-ImageNet's class lists
  pickles/                        mini-imagenet-cache-{train,val,test}.pkl
  pickles/                        miniImageNet_category_split_{train_phase_train,val,test}.pickle
  parquet/                        Parquet shards of a data hub; split by class when every class is in each shard
  ILSVRC2012_img_train.tar        or its train/ folder; with --csv DIR the published images, without it the first 600
                                  of each class
  tiny-imagenet-200.zip           or folder -> data/tiny64: the first 450 training images of 100 classes
  CUB_200_2011.tgz                other class folders, with --split 100/50/50 or --split FILE, and --dest
  omniglot                        the word itself: downloaded by torchvision -> data/omniglot

examples:
  python data/prepare.py split_minidataset
  python data/prepare.py /data/ILSVRC2012_img_train.tar --csv ~/meta-learning-lstm/data/miniImagenet
  python data/prepare.py /data/all-classes --link symlink
  python data/prepare.py CUB_200_2011/images --split 100/50/50 --seed 1 --dest data/cub
  python data/prepare.py --check data/miniImagenet

exit codes: 0 done; 1 --check has findings; 2 bad input or no room, nothing changed; 130 interrupted: run it again.
"""


def _parser() -> Parser:
    parser = Parser(
        prog="prepare.py",
        usage="prepare.py SOURCE [--dest DIR] [options]\n       prepare.py --check DIR",
        description="Turns mini-ImageNet, in whichever form you have it, into {train,val,test}/<class>/<image>.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to do")
    words = "folder or archive, whose form is found automatically; or the word omniglot"
    what.add_argument("source", metavar="SOURCE", nargs="?", help=words)
    words = "print classes, images, sizes, fingerprints and faults of DIR, and the next command; writes nothing"
    what.add_argument("--check", metavar="DIR", type=Path, help=words)
    where = parser.add_argument_group("where to")
    words = f"folder to make (default: {DATA}/miniImagenet, or tiny64 or omniglot there for these; none with --split)"
    where.add_argument("--dest", metavar="DIR", type=Path, help=words)
    words = (
        "how the files of a SOURCE folder come to DIR; they are never re-encoded (default: copy)"
    )
    where.add_argument("--link", choices=("copy", "hard", "symlink"), default="copy", help=words)
    split = parser.add_argument_group("which images, which split")
    words = "folder of train.csv, val.csv and test.csv (default: in SOURCE, or beside it)"
    split.add_argument("--csv", metavar="DIR", type=Path, help=words)
    words = (
        'for class folders that are not split: a JSON file {"train": [class, ...], "val": [...], "test": [...]}, or '
        f"numbers of classes, which --seed draws (default: mini-ImageNet's lists; omniglot: {omniglot.SPLIT})"
    )
    split.add_argument("--split", metavar="FILE|A/B/C", help=words)
    words = "draws the classes for --split A/B/C (default: 719)"
    split.add_argument("--seed", metavar="N", type=int_range(0, 2**63 - 1), default=719, help=words)
    words = "the names of labels 0, 1, ..., one a line, for Parquet shards that lack them (default: from the shards)"
    split.add_argument("--class-names", metavar="FILE", type=Path, help=words)
    words = "omniglot: where torchvision puts omniglot-py/ (default: %(default)s)"
    split.add_argument("--download", metavar="DIR", type=Path, default=DATA, help=words)
    return parser


def _file_stamp(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]


def _settings(args: argparse.Namespace, path: Path, source: Source | None) -> dict[str, Any]:
    """The source and the flags: two runs that share them make the same data set, and one can resume
    the other.
    """
    stamp = source.stamp() if isinstance(source, Folder) else path.is_file() and _file_stamp(path)
    settings = {"source": os.path.abspath(path), "link": args.link, "stamp": stamp}
    if is_numbers(args.split):
        settings["split"], settings["seed"] = args.split, args.seed
    elif args.split and Path(args.split).is_file():
        settings["split"] = hashlib.sha256(Path(args.split).read_bytes()).hexdigest()
    if args.class_names:
        settings["class_names"] = hashlib.sha256(args.class_names.read_bytes()).hexdigest()
    folder = args.csv or path.absolute().parent
    tables = [folder / f"{split}.csv" for split in SPLITS]
    settings["csv"] = {table.name: _file_stamp(table) for table in tables if table.is_file()}
    return settings


def _is_there(dest: Path, settings: dict[str, Any]) -> bool:
    """Whether ``dest`` was made with these settings; False if it is missing or empty.

    Raises:
        UserError: something else is there, or images are missing from it.
    """
    if not os.path.lexists(dest) or (dest.is_dir() and not any(dest.iterdir())):
        return False
    if not dest.is_dir():
        raise UserError(f"{dest}: exists and is not a folder: remove it or choose another --dest")
    record = read_record(dest)
    if record.get("settings") != settings:
        made = record.get("settings", {}).get("source")
        how = f"was made from {made} or with other flags" if made else "holds something else"
        raise UserError(
            f"{dest}: exists and {how}: remove it or choose another --dest (--check {dest} says what it is)"
        )
    images = sum(len(files) for folder, _, files in os.walk(dest) if Path(folder) != dest)
    if images != record.get("images"):
        written = record.get("images")
        raise UserError(
            f"{dest}: holds {images} files where {written} were written: remove it and run again"
        )
    return True


def _tell(folder: Path, report: Report) -> int:
    """Print a report and the next step; returns the exit code of --check."""
    record = read_record(folder)
    line, findings = verdict(report, record)
    lines = [
        *table(report),
        line,
        *(f"- {finding}" for finding in findings),
        *(f"note: {n}" for n in notes(report)),
    ]
    step = (
        f"correct what is listed above, then: --check {folder}"
        if findings
        else next_command(folder, report, record)
    )
    print(*lines, f"next: {step}", sep="\n")
    return 1 if findings else 0


def _prepare(args: argparse.Namespace) -> int:
    if not args.source:
        raise UserError("SOURCE is empty: give a folder or an archive")
    if args.dest:
        refuse_code_folder(args.dest)
        args.dest = Path(os.path.abspath(args.dest))
    if args.source == "omniglot":
        return _omniglot(args)
    path = Path(args.source)
    if args.split and not args.dest:
        raise UserError(
            "--split: name the folder to make with --dest, as it will not be mini-ImageNet"
        )
    places = (args.dest,) if args.dest else (DATA / "miniImagenet", DATA / "tiny64")
    if os.path.realpath(path) in map(os.path.realpath, places):
        raise UserError(
            f"{path}: is the place of the data set itself; to check that it is right: --check {path}"
        )
    without = {os.path.realpath(p) for dest in places for p in (dest, work_folder(dest))}
    # listing an archive takes long: only when there is something to do
    source = None if path.is_file() else open_source(path, without)
    settings = _settings(args, path, source)
    for dest in places:
        if (args.dest or read_record(dest).get("settings") == settings) and _is_there(
            dest, settings
        ):
            print(f"{dest}: is there already, made from {path}: nothing to do")
            return 0
    source = source or open_source(path)
    plan = detect(source, _options(args))
    dest = args.dest or DATA / plan.dest
    _is_there(dest, settings)
    return _build(args, plan, source, dest, settings)


def _omniglot(args: argparse.Namespace) -> int:
    args.split = args.split or omniglot.SPLIT
    dest = args.dest or DATA / "omniglot"
    source = omniglot.download(args.download)
    stamp = [_file_stamp(file) for file in sorted(source.path.glob("*.zip"))]
    settings = {"source": "omniglot", "split": args.split, "seed": args.seed, "stamp": stamp}
    if _is_there(dest, settings):
        print(f"{dest}: is there already, made from omniglot: nothing to do")
        return 0
    return _build(args, omniglot.plan(source, _options(args)), source, dest, settings)


def _options(args: argparse.Namespace) -> Options:
    return Options(args.csv, args.split, args.seed, args.class_names)


def _build(
    args: argparse.Namespace, plan: Plan, source: Source, dest: Path, settings: dict[str, Any]
) -> int:
    validate(plan, source.path)
    if args.link != "copy" and not isinstance(plan.reader, Folder):
        which = f"only files of a folder can be linked; {source.path} is {source.kind}"
        raise UserError(f"--link {args.link}: {which}: leave it out")
    counts = "/".join(
        str(len({item.cls for item in plan.items if item.split == split})) for split in SPLITS
    )
    print(
        f"found: {source.path}: {plan.found}: {counts} classes, {len(plan.items)} images -> {dest}",
        flush=True,
    )
    for note in plan.notes:
        print(f"note: {note}", flush=True)
    args.dest = dest  # for an error's advice
    report = build(plan, dest, settings, args.link)
    print(f"ready: {dest}")
    _tell(dest, report)
    return 0


def _advice(error: OSError, args: argparse.Namespace) -> str:
    what = f"{error.filename2 or error.filename or args.dest or args.source or args.check}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) and args.dest:
        resumes = f"it resumes from {work_folder(args.dest)}"
        return f"{what}: no room on the disk: free some space and run the same command again; {resumes}"
    if error.errno == errno.EXDEV:
        return f"{what}: hard links cannot cross disks: choose --link copy or --link symlink"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: choose another --dest, or change who may read and write there"
    return what


def _run(argv: list[str]) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes of any kind
    args = _parser().parse_args(argv)
    if (args.source is None) == (args.check is None):
        raise UserError("give either SOURCE or --check DIR (see --help)")
    try:
        return (
            _tell(args.check, examine(args.check, progress=True)) if args.check else _prepare(args)
        )
    except MemoryError:
        raise UserError(f"{args.source or args.check}: does not fit into memory") from None
    except RecursionError:
        raise UserError(f"{args.source or args.check}: is nested too deeply") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(_advice(error, args)) from error
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main(_run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
