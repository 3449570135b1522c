"""One small data set of mini-ImageNet's classes in every format: a helper of test_prepare*.py."""

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
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "data" / "prepare.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
main = importlib.import_module("prepare").main
splits = importlib.import_module("formats.splits")
run_main = importlib.import_module("utils").run_main

SPLITS = ("train", "val", "test")
CLASSES = json.loads((ROOT / "data" / "splits" / "mini-imagenet.json").read_text())
NAMES = sorted(cls for classes in CLASSES.values() for cls in classes)
TINY_CLASSES = json.loads((ROOT / "data" / "splits" / "tiny64.json").read_text())
RANKS = (2, 3, 5)  # of the five images that ILSVRC has of each class, those that were chosen
NUMBERS = (7, 30, 200, 1000, 4321)  # in ILSVRC's names, in an order that is not the alphabet's
PIXELS = 20


def prepare(*argv):
    """Run the command; returns its exit code."""
    return run_main(main, [str(word) for word in argv])


def encoded(image, kind):
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def photograph(*seed, size=PIXELS, grey=False):
    """A JPEG."""
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
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


def tree(folder):
    """{path: bytes} of all files, the record and hidden ones left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    files.pop("prepared.json", None)
    return files


def pixels(files):
    """{split: sorted list of classes, each a list of images' RGB bytes in the files' order}: no
    names.
    """
    splits = {}
    for name in sorted(files):
        split, cls, _ = name.split("/")
        image = Image.open(io.BytesIO(files[name])).convert("RGB").tobytes()
        splits.setdefault(split, {}).setdefault(cls, []).append(image)
    return {split: sorted(classes.values()) for split, classes in splits.items()}


def write(folder, files):
    """Write {name: bytes} under `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Path(folder)


def tar(path, files, mode="w"):
    """Write {name: bytes} as a tar archive."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path, files):
    """Write {name: bytes} as a zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


LITTER = dict.fromkeys(
    ("__MACOSX/train/._x.jpg", "train/.DS_Store", "train/n01532829/Thumbs.db", "readme.txt"), b"x"
)


def below(prefix, files):
    return {f"{prefix}{name}": content for name, content in files.items()}


# ---- The contents of the formats


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


def ilsvrc_files():
    files = {
        f"{cls}/{cls}_{number}.JPEG": content
        for cls, images in ilsvrc().items()
        for number, content in zip(NUMBERS, images, strict=True)
    }
    return files | {f"n00000001/n00000001_{n}.JPEG": photograph(999, n) for n in (1, 2)}


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


def shard(path, rows, names=None):
    """Write [(file name or None, bytes, label)] as a Parquet shard; `names` go where hubs put class
    names.
    """
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.array([{"bytes": content, "path": name} for name, content, _ in rows])
    table = pyarrow.table({"image": image, "label": pyarrow.array([label for *_, label in rows])})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=50)


def two_folders():
    """github.com/Deo0330/split_minidataset: part of each class in train/, the rest in val/."""
    files = {".git/train/n1/x.jpg": b"x", ".gitattributes": b"x", "README.md": b"x"}
    for n, (name, content) in enumerate(dataset().items()):
        files[f"{('train', 'val')[n % 3 == 2]}/{name.split('/', 1)[1]}"] = content
    return files


def numbered_anew():
    """Every class in every part, whose files are numbered anew: for classification."""
    names = [(SPLITS[n % 3], name.split("/")[1]) for n, name in enumerate(dataset())]
    return {f"{s}/{c}/1.jpg": x for (s, c), x in zip(names, dataset().values(), strict=True)}


def without_suffix(tables):
    """CSV files, one image of each class without its suffix."""
    return {name: content.replace(b"0002.jpg", b"0002.raw") for name, content in tables.items()}


# ---- The formats; each maker returns SOURCE


def parquet_split(at):
    """Class names as labels, several shards of a split."""
    for split, file in (("train", "train"), ("val", "validation"), ("test", "test")):
        for n, part in enumerate((rows(split)[:40], rows(split)[40:])):
            shard(at / "data" / f"{file}-{n:05d}-of-00002.parquet", part)
    return at


def parquet_every_class(at):
    """Numbers as labels, their names in the metadata, every class in every shard: one of its images
    in each.
    """
    for n, split in enumerate(("train", "validation", "test")):
        shard(at / "default" / split / "0000.parquet", rows(names=NAMES)[n::3], NAMES)
    return at


def parquet_numbers_zip(at):
    """Numbers as labels and no names but in the paths; in a zip archive."""
    shard(at / "train.parquet", rows(names=NAMES))
    return zipped(at / "hub.zip", {"train.parquet": (at / "train.parquet").read_bytes()})


def parquet_without_paths(at):
    """Class names as labels, images without file names."""
    for split in SPLITS:
        shard(at / f"{split}.parquet", rows(split, with_path=False))
    return at


def parquet_labels_start_again(at):
    """Numbers as labels, from 0 in each split, and no names at all."""
    for split in SPLITS:
        shard(at / f"{split}.parquet", rows(split, sorted(CLASSES[split]), with_path=False))
    return at


def three_tars(at):
    for split in SPLITS:
        tar(at / f"{split}.tar", {k: v for k, v in dataset().items() if k.startswith(split)})
    return at


def zip_in_zip(at):
    images = zipped(at / "images.zip", below("images/", flat()))
    return zipped(at / "outer.zip", tables() | {"images.zip": images.read_bytes()})


def ilsvrc_without_csv(at):
    return write(at / "train", ilsvrc_files())


def ilsvrc_tar(at):
    write(at, tables())
    inner = {}
    for name, content in ilsvrc_files().items():
        cls, file = name.split("/")
        inner.setdefault(cls, {})[file] = content
    tars = {f"{cls}.tar": tar(at / "inner", files).read_bytes() for cls, files in inner.items()}
    return tar(at / "ILSVRC2012_img_train.tar", tars)


def kaggle():
    """ILSVRC-2012 as Kaggle serves it: train/ beside val/ and test/ of loose images."""
    files = below("train/", ilsvrc_files())
    files |= {f"{part}/ILSVRC2012_{part}_1.JPEG": photograph(997) for part in ("val", "test")}
    return below("ILSVRC/Data/CLS-LOC/", files) | tables()


IMAGES_AND_TABLES = {
    "csv_folder": {},
    # as easyfsl has them, here with a byte order mark; as pandas writes them
    "csv_class_name_first": dict(
        head="class_name,image_name", line="{cls},{file}", encoding="utf-8-sig"
    ),
    "csv_index_column": {"head": ",filename,label", "line": "{n},{file},{cls}"},
}
FILE_FORMS = {
    "mini_folder": lambda at: write(at / "mini", dataset()),
    "mini_nested": lambda at: write(at / "my é", below("a b/mini-imagenet/", dataset() | LITTER)),
    "mini_tar": lambda at: tar(at / "mini.tar", below("./", dataset() | LITTER)),
    "mini_tar_gz": lambda at: tar(at / "mini.tar.gz", below("mini/", dataset()), "w:gz"),
    "mini_tar_xz": lambda at: tar(at / "mini.tar.xz", dataset(), "w:xz"),
    "mini_zip": lambda at: zipped(at / "mini.zip", dataset() | LITTER),
    "three_tars": three_tars,
    **{
        name: lambda at, kwargs=kwargs: write(
            at / "ravi", below("images/", flat()) | tables(**kwargs)
        )
        for name, kwargs in IMAGES_AND_TABLES.items()
    },
    "csv_zip": lambda at: zipped(
        at / "ravi.zip", below("mini/", below("images/", flat()) | tables())
    ),
    # images.zip with the CSV files beside it, and the folder of both
    "csv_images_zip": lambda at: zipped(write(at, tables()) / "images.zip", flat()),
    "csv_folder_of_zip": lambda at: zipped(write(at, tables()) / "images.zip", flat()).parent,
    "flat": lambda at: write(at / "images", flat()),
    "zip_in_zip": zip_in_zip,
    "class_folders": lambda at: write(at / "all", unsplit()),
    "class_folders_zip": lambda at: zipped(at / "all.zip", below("mini_imagenet/", unsplit())),
    "ilsvrc_folder": lambda at: write(write(at, tables()) / "train", ilsvrc_files()),
    "ilsvrc_whole_folder": lambda at: write(at / "imagenet", kaggle()),
    "ilsvrc_tar": ilsvrc_tar,
    "two_folders": lambda at: write(at / "clone", two_folders()),
    "two_folders_zip": lambda at: zipped(
        at / "x.zip", below("split_minidataset-main/", two_folders())
    ),
}
RENAMED_FORMS = {
    "numbered_anew": lambda at: write(at / "mini", numbered_anew()),
    "csv_without_suffix": lambda at: write(
        write(at, without_suffix(tables())) / "train", ilsvrc_files()
    ),
}
PARQUET_FORMS = {
    form.__name__: form
    for form in (
        *(parquet_split, parquet_every_class, parquet_numbers_zip, parquet_without_paths),
        parquet_labels_start_again,
    )
}
ARRAY_FORMS = {
    "cache_pickles": lambda at: write(at / "p", pickles(4)),
    "cache_pickles_protocol_2": lambda at: write(at / "p", pickles(2)),
    "cache_pickles_protocol_5": lambda at: write(at / "p", pickles(5)),
    "cache_pickles_zip": lambda at: zipped(at / "cache.zip", below("p/", pickles(4))),
    "category_pickles": lambda at: write(at / "p", pickles()),
}
FORMS = FILE_FORMS | RENAMED_FORMS | PARQUET_FORMS | ARRAY_FORMS
UNNAMED = ("category_pickles", "parquet_labels_start_again")  # their labels are numbers


def make(form, at):
    """Make a format; returns SOURCE."""
    at.mkdir(exist_ok=True)
    return FORMS[form](at)


def tiny_imagenet(at, first=452):
    """Tiny-ImageNet-200's shape: one class has `first` images, the others two; more classes than
    the hundred.
    """
    classes = [cls for split in TINY_CLASSES.values() for cls in split]
    files = {"wnids.txt": b"", "words.txt": b""}
    for n, cls in enumerate([*classes, "n00000001", "n00000002"]):
        numbers = range(first if n == 0 else 2)
        files |= dict.fromkeys((f"train/{cls}/images/{cls}_{i}.JPEG" for i in numbers), png(n))
        files[f"train/{cls}/{cls}_boxes.txt"] = b"boxes"
    for part in ("val", "test"):
        files |= {f"{part}/images/{part}_{i}.JPEG": png(i, 5) for i in range(3)}
    return write(at / "tiny-imagenet-200", files)
