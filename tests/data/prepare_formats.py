"""One small data set of mini-ImageNet's classes in every format, and fixtures that run prepare.py.

A format is a dict {path: bytes} of files; the first of them lies in SOURCE, or is it.
"""

import functools
import importlib
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "data" / "prepare.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
main = importlib.import_module("prepare").main
build, splits = (importlib.import_module(f"data.formats.{name}") for name in ("build", "splits"))
run_main = importlib.import_module("engine.process").run_main

SPLITS = ("train", "val", "test")
CLASSES = json.loads((ROOT / "data" / "splits" / "mini-imagenet.json").read_text())
NAMES = sorted(cls for classes in CLASSES.values() for cls in classes)
TINY_CLASSES = json.loads((ROOT / "data" / "splits" / "tiny64.json").read_text())
RANKS = (2, 3, 5)  # of the five images that ILSVRC has of each class, those that were chosen
NUMBERS = (7, 30, 200, 1000, 4321)  # in ILSVRC's names, in an order that is not the alphabet's


# ---- Running the command


def prepare(*argv):
    """Run the command; returns its exit code."""
    return run_main(main, [str(word) for word in argv])


@pytest.fixture
def run(capsys, tmp_path):
    """Run the command, by default with --dest tmp_path/out: (exit code, stdout, stderr)."""

    def run(*argv):
        dest = () if {"--dest", "--check"} & set(argv) else ("--dest", tmp_path / "out")
        return prepare(*argv, *dest), *capsys.readouterr()

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run the command, which must refuse in one line and change nothing: returns the line."""

    def refused(*argv, dest=None):
        before = tree(tmp_path)
        code, _, err = run(*argv, *(("--dest", dest) if dest else ()))
        assert (code, err[:7], err.count("\n")) == (2, "error: ", 1)
        assert tree(tmp_path) == before
        assert not list(tmp_path.rglob("*.part"))
        return err

    return refused


# ---- Images


def encoded(image, kind):
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def photograph(*seed, grey=False):
    """A JPEG."""
    values = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
    return encoded(Image.fromarray(values).convert("L" if grey else "RGB"), "JPEG")


def png(*seed):
    """A drawing as Omniglot has them: one bit a pixel."""
    return encoded(Image.fromarray(np.random.default_rng(seed).random((12, 12)) > 0.2), "PNG")


@functools.cache
def ilsvrc():
    """{class: [JPEG of each of five images]}; some are greyscale, as in ImageNet."""
    return {
        cls: [photograph(n, i, grey=(n % 9, i) == (0, 1)) for i in range(len(NUMBERS))]
        for n, cls in enumerate(NAMES)
    }


@functools.cache
def dataset():
    """{split/class/file name: bytes}, three images of each class, called as Ravi & Larochelle call
    them.
    """
    return {
        f"{split}/{cls}/{cls}{rank:08d}.jpg": ilsvrc()[cls][rank - 1]
        for split in SPLITS
        for cls in CLASSES[split]
        for rank in RANKS
    }


def pixels(files):
    """{split: sorted list of classes, each a sorted list of images' RGB bytes}: no names."""
    splits = {}
    for name, content in files.items():
        split, cls, _ = name.split("/")
        image = Image.open(io.BytesIO(content)).convert("RGB").tobytes()
        splits.setdefault(split, {}).setdefault(cls, []).append(image)
    return {split: sorted(map(sorted, of.values())) for split, of in splits.items()}


# ---- Files


def tree(folder):
    """{path: bytes} of all files, the record and hidden ones left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    files.pop("prepared.json", None)
    return files


def write(folder, files):
    """Write {path: bytes} below a folder; returns the folder or file that the first path begins
    with.
    """
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder, next(iter(files)).split("/")[0])


def below(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


def packed(path, files):
    """An archive, zip or tar by its name, of {name: bytes}."""
    content = io.BytesIO()
    if path.endswith(".zip"):
        with zipfile.ZipFile(content, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        kind = path.partition(".tar")[2].strip(".")
        with tarfile.open(fileobj=content, mode=f"w:{kind}") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {path: content.getvalue()}


LITTER = dict.fromkeys(
    ("__MACOSX/train/._x.jpg", "train/.DS_Store", "train/n01532829/Thumbs.db", "readme.txt"), b"x"
)


def flat():
    """Ravi & Larochelle's files, whose names begin with their class."""
    return {name.split("/")[-1]: content for name, content in dataset().items()}


def unsplit():
    return {name.split("/", 1)[1]: content for name, content in dataset().items()}


def tables(head="filename,label", line="{file},{cls}", encoding="utf-8"):
    """{CSV file's name: content}"""
    lines = {split: [head] for split in SPLITS}
    for n, name in enumerate(dataset()):
        split, cls, file = name.split("/")
        lines[split].append(line.format(n=n, file=file, cls=cls))
    return {f"{s}.csv": ("\n".join(rows) + "\n").encode(encoding) for s, rows in lines.items()}


def images_and_tables(*words):
    return below("images", flat()) | tables(*words)


def ilsvrc_files():
    """All images of mini-ImageNet's classes and of one more."""
    files = {
        f"{cls}/{cls}_{number}.JPEG": content
        for cls, images in ilsvrc().items()
        for number, content in zip(NUMBERS, images, strict=True)
    }
    return files | {f"n00000001/n00000001_{n}.JPEG": photograph(999, n) for n in (1, 2)}


def ilsvrc_tar():
    """A tar archive for each class in one of all."""
    inner = {}
    for name, content in ilsvrc_files().items():
        cls, file = name.split("/")
        inner.setdefault(f"{cls}.tar", {})[file] = content
    tars = [packed(name, files) for name, files in inner.items()]
    return packed("ILSVRC2012_img_train.tar", {k: v for each in tars for k, v in each.items()})


def kaggle():
    """ILSVRC-2012 as Kaggle serves it: train/ beside val/ and test/ of loose images."""
    loose = {f"{part}/ILSVRC2012_{part}_1.JPEG": photograph(997) for part in ("val", "test")}
    return below("ILSVRC/Data/CLS-LOC", below("train", ilsvrc_files()) | loose) | tables()


def three_tars():
    tars = {}
    for split in SPLITS:
        files = {name: x for name, x in dataset().items() if name.startswith(split)}
        tars |= packed(f"{split}.tar", files)
    return tars


def two_folders():
    """github.com/Deo0330/split_minidataset: part of each class in train/, the rest in val/."""
    files = {".git/train/n1/x.jpg": b"x", ".gitattributes": b"x", "README.md": b"x"}
    for n, (name, content) in enumerate(unsplit().items()):
        files[f"{('train', 'val')[n % 3 == 2]}/{name}"] = content
    return files


def numbered_anew():
    """Every class in every part, whose files are numbered anew: for classification."""
    names = [f"{SPLITS[n % 3]}/{name.split('/')[1]}/1.jpg" for n, name in enumerate(dataset())]
    return dict(zip(names, dataset().values(), strict=True))


def without_suffix():
    """CSV files, one image of each class without its suffix."""
    return {name: content.replace(b"0002.jpg", b"0002.raw") for name, content in tables().items()}


def tiny_imagenet():
    """Tiny-ImageNet-200's shape: one class has four images, the others two; more classes than the
    hundred.
    """
    classes = [cls for split in TINY_CLASSES.values() for cls in split]
    files = {"wnids.txt": b"", "words.txt": b""}
    for n, cls in enumerate([*classes, "n00000001", "n00000002"]):
        numbers = range(2 if n else 4)
        files |= {f"train/{cls}/images/{cls}_{i}.JPEG": png(n) for i in numbers}
        files[f"train/{cls}/{cls}_boxes.txt"] = b"boxes"
    for part in ("val", "test"):
        files |= {f"{part}/images/{part}_{i}.JPEG": png(i, 5) for i in range(3)}
    return below("tiny-imagenet-200", files)


# ---- Pickles and shards


def rows(split="", names=None, with_path=True):
    """[(file name or None, bytes, label)] of a split's images or of all; a label is the class, or
    its place in ``names``.
    """
    found = [(*name.split("/"), content) for name, content in dataset().items()]
    return [
        (file if with_path else None, content, names.index(cls) if names else cls)
        for part, cls, file, content in found
        if part.startswith(split)
    ]


def python2_pickle(images, labels):
    """What Python 2 and NumPy 1 write: byte strings for text and for the array's contents."""
    shape = b"(" + b"".join(b"M" + struct.pack("<H", n) for n in images.shape) + b"t"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", images.nbytes) + images.tobytes() + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def pickles(protocol=None):
    """{name: pickle}: of mini-imagenet-cache, or without a protocol of the other kind."""
    out = {}
    for split in SPLITS:
        _, contents, labels = zip(*rows(split), strict=True)
        images = np.stack([Image.open(io.BytesIO(c)).convert("RGB") for c in contents])
        if protocol:
            of = {cls: [i for i, x in enumerate(labels) if x == cls] for cls in CLASSES[split]}
            content = pickle.dumps({"image_data": images, "class_dict": of}, protocol)
            out[f"mini-imagenet-cache-{split}.pkl"] = content
        else:
            part = "train_phase_train" if split == "train" else split
            content = python2_pickle(images, [NAMES.index(label) for label in labels])
            out[f"miniImageNet_category_split_{part}.pickle"] = content
            out[f"miniImageNet_category_split_train_phase_{split}.pickle"] = content
    return out


def shard(rows, names=None):
    """A Parquet shard of [(file name or None, bytes, label)]; `names` go where hubs put class
    names.
    """
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.array([{"bytes": content, "path": name} for name, content, _ in rows])
    table = pyarrow.table({"image": image, "label": pyarrow.array([label for *_, label in rows])})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, row_group_size=50)
    return content.getvalue()


def parquet_split():
    """Class names as labels, several shards of a split."""
    return {
        f"data/{file}-{n:05d}-of-00002.parquet": shard(part)
        for split, file in (("train", "train"), ("val", "validation"), ("test", "test"))
        for n, part in enumerate((rows(split)[:40], rows(split)[40:]))
    }


def parquet_every_class():
    """Numbers as labels, their names in the metadata, every class in every shard: one of its images
    in each.
    """
    parts = enumerate(("train", "validation", "test"))
    numbered = rows(names=NAMES)
    return {f"default/{s}/0000.parquet": shard(numbered[n::3], NAMES) for n, s in parts}


def parquet_without_paths():
    """Class names as labels, images without file names."""
    return {f"{split}.parquet": shard(rows(split, with_path=False)) for split in SPLITS}


def parquet_labels_start_again():
    """Numbers as labels, from 0 in each split, and no names at all."""
    return {f"{s}.parquet": shard(rows(s, sorted(CLASSES[s]), with_path=False)) for s in SPLITS}


# ---- The formats

FILE_FORMS = {
    "mini_folder": lambda: below("mini", dataset()),
    "mini_nested": lambda: below("my é/a b/mini-imagenet", dataset() | LITTER),
    "mini_tar": lambda: packed("mini.tar", below(".", dataset() | LITTER)),
    "mini_tar_gz": lambda: packed("mini.tar.gz", below("mini", dataset())),
    "mini_tar_xz": lambda: packed("mini.tar.xz", dataset()),
    "mini_zip": lambda: packed("mini.zip", dataset() | LITTER),
    "three_tars": lambda: below("three", three_tars()),
    "csv_folder": lambda: below("ravi", images_and_tables()),
    # as easyfsl and pandas have them, with a byte order mark
    "csv_other_columns": lambda: below(
        "ravi", images_and_tables(",class_name,image_name", "{n},{cls},{file}", "utf-8-sig")
    ),
    "csv_zip": lambda: packed("ravi.zip", below("mini", images_and_tables())),
    # images.zip with the CSV files beside it, and the folder of both
    "csv_images_zip": lambda: packed("images.zip", flat()) | tables(),
    "csv_folder_of_zip": lambda: below("ravi", packed("images.zip", flat()) | tables()),
    "flat": lambda: below("images", flat()),
    "zip_in_zip": lambda: packed(
        "outer.zip", tables() | packed("images.zip", below("images", flat()))
    ),
    "class_folders": lambda: below("all", unsplit()),
    "ilsvrc_folder": lambda: below("train", ilsvrc_files()) | tables(),
    "ilsvrc_whole_folder": lambda: below("imagenet", kaggle()),
    "ilsvrc_tar": lambda: ilsvrc_tar() | tables(),
    "two_folders": lambda: below("clone", two_folders()),
}
ARRAY_FORMS = {
    **{f"cache_pickles_{n}": lambda n=n: below("p", pickles(n)) for n in (2, 4, 5)},
    "cache_pickles_zip": lambda: packed("cache.zip", below("p", pickles(4))),
    "category_pickles": lambda: below("p", pickles()),
}
FORMS = {
    **FILE_FORMS,
    **ARRAY_FORMS,
    # the files get other names
    "numbered_anew": lambda: below("mini", numbered_anew()),
    "csv_without_suffix": lambda: below("train", ilsvrc_files()) | without_suffix(),
    "parquet_split": lambda: below("hub", parquet_split()),
    "parquet_every_class": lambda: below("hub", parquet_every_class()),
    # numbers as labels and no names but in the paths
    "parquet_numbers": lambda: {"hub/train.parquet": shard(rows(names=NAMES))},
    "parquet_without_paths": lambda: below("hub", parquet_without_paths()),
    "parquet_labels_start_again": lambda: below("hub", parquet_labels_start_again()),
}
UNNAMED = ("category_pickles", "parquet_labels_start_again")  # their labels are numbers


@functools.cache
def files_of(form):
    """The files of a format; the test is skipped if they need a package that is missing."""
    if "parquet" in form:
        pytest.importorskip("pyarrow")
    return FORMS[form]()


def make(form, at):
    """Make a format; returns SOURCE."""
    return write(at, files_of(form))
