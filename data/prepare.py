"""Turns mini-ImageNet, in whichever form you hold it, into data/miniImagenet/{train,val,test}/<class>/<image>.

python data/prepare.py SOURCE [--dest DIR]     make the data set, and show what it is
python data/prepare.py --check DIR             show what a data set is, and what is wrong with it
python data/prepare.py omniglot                download Omniglot and split it
"""

import argparse
import errno
import hashlib
import os
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA))  # also when run as a module, or imported

try:
    import omniglot
    from build import build, read_record, work_folder
    from check import examine, notes, table, verdict
    from forms import recognise
    from plans import Options, validate
    from sources import DataError, Folder, open_source
except ModuleNotFoundError as error:
    if error.name not in ("numpy", "PIL", "tqdm"):
        raise
    print(f"prepare.py: {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

_EXAMPLES = """\
SOURCE, and what is done with it:
  mini-imagenet.tar.gz            {train,val,test}/<class>/<image> in a folder, .tar, .tar.gz or .zip, nested or not;
                                  or three archives of these names in a folder
  ravi/                           images/ or images.zip with train.csv, val.csv, test.csv of `filename,label` lines
  all-classes/                    100 class folders: split by mini-ImageNet's class lists (data/splits)
  pickles/                        mini-imagenet-cache-{train,val,test}.pkl
  pickles/                        miniImageNet_category_split_{train_phase_train,val,test}.pickle
  parquet/                        Parquet shards of a data hub; split by class when every class is in each shard
  ILSVRC2012_img_train.tar        or its train/ folder; with --csv DIR the published images, without it the first 600
                                  of each class
  tiny-imagenet-200.zip           or folder -> data/tiny64: the first 450 training images of 100 classes
  CUB_200_2011.tgz                other class folders, by --split 100/50/50 or --split FILE, and --dest
  omniglot                        the word itself: downloaded by torchvision -> data/omniglot

examples:
  python data/prepare.py ~/Downloads/mini-imagenet.zip
  python data/prepare.py /data/ILSVRC2012_img_train.tar --csv ~/meta-learning-lstm/data/miniImagenet
  python data/prepare.py /data/all-classes --link symlink
  python data/prepare.py CUB_200_2011/images --split 100/50/50 --seed 1 --dest data/cub
  python data/prepare.py --check data/miniImagenet

exit codes: 0 done; 1 --check has findings; 2 bad input or no room, nothing changed; 130 interrupted: run it again.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser():
    parser = _Parser(
        prog="prepare.py",
        usage="prepare.py SOURCE [--dest DIR] [options]\n       prepare.py --check DIR",
        description="Turns mini-ImageNet, in whichever form you hold it, into {train,val,test}/<class>/<image>.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="folder or archive, its form found out by itself; or the word omniglot",
    )
    what.add_argument(
        "--check",
        metavar="DIR",
        type=Path,
        help="print classes, images, sizes and fingerprints of DIR and what is missing or too much; writes nothing",
    )
    where = parser.add_argument_group("where to")
    where.add_argument(
        "--dest",
        metavar="DIR",
        type=Path,
        help=f"folder to make (default: {DATA}/miniImagenet, or tiny64 or omniglot there for these; none with --split)",
    )
    where.add_argument(
        "--link",
        choices=("copy", "hard", "symlink"),
        default="copy",
        help="how a SOURCE folder's files come to DIR; they are never re-encoded (default: copy)",
    )
    split = parser.add_argument_group("which images, which split")
    split.add_argument(
        "--csv",
        metavar="DIR",
        type=Path,
        help="folder of train.csv, val.csv and test.csv (default: inside of SOURCE, or beside it)",
    )
    split.add_argument(
        "--split",
        metavar="FILE|A/B/C",
        help='for class folders that are not split: a JSON file {"train": [class, ...], "val": [...], "test": [...]}, '
        f"or numbers of classes, drawn by --seed (default: mini-ImageNet's lists; omniglot: {omniglot.SPLIT})",
    )
    split.add_argument(
        "--seed", metavar="N", type=int, default=719, help="draws the classes for --split A/B/C (default: 719)"
    )
    split.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="the names of labels 0, 1, ..., one a line, for Parquet shards that lack them (default: from the shards)",
    )
    split.add_argument(
        "--download",
        metavar="DIR",
        type=Path,
        default=DATA,
        help="omniglot: where torchvision puts omniglot-py/ (default: %(default)s)",
    )
    return parser


def _file_stamp(path):
    info = path.stat()
    return [info.st_size, info.st_mtime_ns]


def _settings(args, source):
    """The source and the flags: two runs that share them make the same data set, and one goes on from another."""
    settings = {"source": os.path.abspath(source.path), "link": args.link}
    settings["stamp"] = (
        source.stamp() if isinstance(source, Folder) else source.path.is_file() and _file_stamp(source.path)
    )
    if args.split and "/" in args.split and args.split.replace("/", "").isdigit():
        settings["split"], settings["seed"] = args.split, args.seed
    elif args.split and Path(args.split).is_file():
        settings["split"] = hashlib.sha256(Path(args.split).read_bytes()).hexdigest()
    if args.class_names:
        settings["class_names"] = hashlib.sha256(args.class_names.read_bytes()).hexdigest()
    tables = args.csv or source.path.absolute().parent
    settings["csv"] = {
        name: _file_stamp(tables / name) for name in ("train.csv", "val.csv", "test.csv") if (tables / name).is_file()
    }
    return settings


def _is_there(dest, settings):
    """Whether `dest` is there and was made with these settings.

    Raises:
        DataError: something else is there, or images are missing from it.
    """
    if not os.path.lexists(dest) or (dest.is_dir() and not any(dest.iterdir())):
        return False
    if not dest.is_dir():
        raise DataError(f"{dest}: exists and is not a folder: remove it or choose another --dest")
    record = read_record(dest)
    if record.get("settings") != settings:
        made = record.get("settings", {}).get("source")
        how = f"was made from {made} or with other flags" if made else "holds something else"
        raise DataError(
            f"{dest}: exists and {how}: remove it or choose another --dest (what it is, --check {dest} says)"
        )
    images = sum(len(files) for folder, _, files in os.walk(dest) if Path(folder) != dest)
    if images != record.get("images"):
        raise DataError(
            f"{dest}: holds {images} files where {record.get('images')} were written: remove it and run again"
        )
    return True


def _check(folder):
    report = examine(folder, progress=True)
    print(*table(report), sep="\n")
    line, findings = verdict(report, read_record(folder))
    _tell(report, line, findings)
    return 1 if findings else 0


def _tell(report, line, findings):
    print(line)
    for finding in findings:
        print(f"- {finding}")
    for note in notes(report):
        print(f"note: {note}")


class _Packed:
    """An archive that is not opened yet."""

    def __init__(self, path):
        self.path = path


def _prepare(args):
    if args.source == "omniglot":
        args.split = args.split or omniglot.SPLIT
        dest = args.dest or DATA / "omniglot"
        source = omniglot.download(args.download)
        names = sorted(source.path.glob("*.zip"))
        settings = {
            "source": "omniglot",
            "split": args.split,
            "seed": args.seed,
            "stamp": [_file_stamp(n) for n in names],
        }
        if _is_there(dest, settings):
            print(f"{dest}: is there already, made from omniglot: nothing to do")
            return 0
        return _build(args, omniglot.plan(source, _options(args)), source, dest, settings)

    if not args.source:
        raise DataError("SOURCE is empty: give a folder or an archive")
    path = Path(args.source)
    args.dest = args.dest and Path(os.path.abspath(args.dest))
    if args.split and not args.dest:
        raise DataError("--split: name the folder to make with --dest, for it will not be mini-ImageNet")
    places = (args.dest,) if args.dest else (DATA / "miniImagenet", DATA / "tiny64")
    for dest in places:
        if dest.resolve() == path.resolve():
            raise DataError(f"{path}: is the place of the data set itself; to prove that it is right: --check {path}")
    # an archive is not listed before it is known that there is something to do
    packed = path.is_file()
    source = _Packed(path) if packed else open_source(path, {p.resolve() for d in places for p in (d, work_folder(d))})
    settings = _settings(args, source)
    for dest in places:
        if (args.dest or read_record(dest).get("settings") == settings) and _is_there(dest, settings):
            print(f"{dest}: is there already, made from {path}: nothing to do")
            return 0
    source = open_source(path) if packed else source
    plan = recognise(source, _options(args))
    dest = args.dest or DATA / plan.dest
    _is_there(dest, settings)
    return _build(args, plan, source, dest, settings)


def _options(args):
    return Options(args.csv, args.split, args.seed, args.class_names)


def _build(args, plan, source, dest, settings):
    validate(plan, source.path)
    if args.link != "copy" and not isinstance(plan.reader, Folder):
        raise DataError(
            f"--link {args.link}: only files of a folder can be linked; {source.path} is {source.kind}: leave it out"
        )
    classes = {
        split: len({item.cls for item in plan.items if item.split == split}) for split in ("train", "val", "test")
    }
    counts = "/".join(map(str, classes.values()))
    print(f"found: {source.path}: {plan.found}: {counts} classes, {len(plan.items)} images -> {dest}", flush=True)
    for note in plan.notes:
        print(f"note: {note}", flush=True)
    args.work = work_folder(dest)
    report = build(plan, dest, settings, args.link)
    print(*table(report), sep="\n")
    _tell(report, *verdict(report, {"published": plan.published}))
    print(f"ready: {dest}")
    return 0


def _explain(error, args):
    """One line for an OSError."""
    what = f"{error.filename2 or error.filename or args.dest or 'SOURCE'}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"{what}: no room on the disk: make room and run the same command again; it goes on from {args.work}"
    if error.errno == errno.EXDEV:
        return f"{what}: hard links cannot cross disks: --link copy or --link symlink"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: choose another --dest, or change who may read and write there"
    return f"{what}"


def main(argv=None):
    """The command line; returns its exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names that are no text
    parser = _parser()
    args = parser.parse_args(argv)
    args.work = None
    if (args.source is None) == (args.check is None):
        parser.error("give either SOURCE or --check DIR")
    try:
        return _check(args.check) if args.check else _prepare(args)
    except DataError as error:
        message, code = str(error), 2
    except MemoryError:
        message, code = f"{args.source or args.check}: does not fit into memory", 2
    except RecursionError:
        message, code = f"{args.source or args.check}: is nested too deeply", 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, code = _explain(error, args), 2
    except KeyboardInterrupt:
        message, code = "interrupted: run the same command again to go on", 130
    print("prepare.py:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
