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
prepare = importlib.import_module("prepare")
splits = importlib.import_module("formats.splits")

SPLITS = ("train", "val", "test")
CLASSES = json.loads((ROOT / "data" / "splits" / "mini-imagenet.json").read_text())
TINY_CLASSES = json.loads((ROOT / "data" / "splits" / "tiny64.json").read_text())
RANKS = (2, 3, 5)  # of the five images that ILSVRC has of each class, those that were chosen
NUMBERS = (7, 30, 200, 1000, 4321)  # in ILSVRC's names, in an order that is not the alphabet's
PIXELS = 20


def photograph(seed, size=PIXELS, grey=False):
    """A JPEG of a smooth scene with some texture, as photographs are."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in random.uniform(-1, 1, (3, 3))]
    scene = (
        np.stack(waves, -1) * random.uniform(30, 90) + random.normal(0, 6, (size, size, 3)) + 128
    )
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    (image.convert("L") if grey else image).save(content, "JPEG", quality=85)
    return content.getvalue()


def png(seed):
    """A drawing as Omniglot has them: one bit a pixel."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).random((12, 12)) > 0.2).save(content, "PNG")
    return content.getvalue()


@functools.cache
def ilsvrc():
    """{class: [JPEG of each of five images]}; some are greyscale, as in ImageNet."""
    return {
        cls: [photograph([n, i], grey=(n % 9, i) == (0, 1)) for i in range(len(NUMBERS))]
        for n, cls in enumerate(sorted(cls for classes in CLASSES.values() for cls in classes))
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
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != "prepared.json"
    }


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


# ---- the formats; each maker returns SOURCE


def layout_folder(at):
    return write(at / "mini", dataset())


def layout_nested(at):
    return write(
        at / "my data é", {f"a b/mini-imagenet/{k}": v for k, v in (dataset() | LITTER).items()}
    )


def layout_tar(at):
    return tar(at / "mini.tar", {f"./{k}": v for k, v in (dataset() | LITTER).items()})


def layout_tar_gz(at):
    return tar(at / "mini.tar.gz", {f"mini/{k}": v for k, v in dataset().items()}, "w:gz")


def layout_tar_xz(at):
    return tar(at / "mini.tar.xz", dataset(), "w:xz")


def layout_zip(at):
    return zipped(at / "mini.zip", dataset() | LITTER)


def layout_three_tars(at):
    for split in SPLITS:
        tar(at / f"{split}.tar", {k: v for k, v in dataset().items() if k.startswith(split)})
    return at


def _csv():
    lines = {split: ["filename,label"] for split in SPLITS}
    for name in dataset():
        split, cls, file = name.split("/")
        lines[split].append(f"{file},{cls}")
    return {f"{split}.csv": ("\n".join(rows) + "\n").encode() for split, rows in lines.items()}


def _flat():
    return {f"images/{name.split('/')[-1]}": content for name, content in dataset().items()}


def csv_folder(at):
    return write(at / "ravi", _flat() | _csv())


def csv_class_name_first(at):
    """As easyfsl has them: `class_name,image_name`, here with a byte order mark."""
    tables = {}
    for name, content in _csv().items():
        lines = [line.split(",")[::-1] for line in content.decode().splitlines()[1:]]
        rows = ["class_name,image_name", *map(",".join, lines)]
        tables[name] = "\n".join(rows).encode("utf-8-sig")
    return write(at / "easyfsl", _flat() | tables)


def csv_index_column(at):
    """As pandas writes them."""
    tables = {}
    for name, content in _csv().items():
        rows = [f"{n},{line}" for n, line in enumerate(content.decode().splitlines()[1:])]
        tables[name] = "\n".join([",filename,label", *rows]).encode()
    return write(at / "pandas", _flat() | tables)


def flat(at):
    """Ravi & Larochelle's files, whose names begin with their class, without the CSV files."""
    return write(at / "images", {name.split("/")[1]: content for name, content in _flat().items()})


def zip_in_zip(at):
    images = zipped(at / "images.zip", _flat())
    return zipped(at / "outer.zip", _csv() | {"images.zip": images.read_bytes()})


def csv_zip(at):
    return zipped(at / "ravi.zip", {f"mini/{k}": v for k, v in (_flat() | _csv()).items()})


def csv_images_zip(at):
    """images.zip, with the CSV files beside it."""
    write(at, _csv())
    return zipped(at / "images.zip", _flat())


def csv_folder_of_zip(at):
    write(at, _csv())
    zipped(at / "images.zip", _flat())
    return at


def _unsplit():
    return {name.split("/", 1)[1]: content for name, content in dataset().items()}


def class_folders(at):
    return write(at / "all", _unsplit())


def class_folders_zip(at):
    return zipped(at / "all.zip", {f"mini_imagenet/{k}": v for k, v in _unsplit().items()})


def arrays():
    """{split: (images uint8 [N, 20, 20, 3], [class of each])}"""
    out = {}
    for split in SPLITS:
        files = {name: content for name, content in dataset().items() if name.startswith(split)}
        images = [np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for c in files.values()]
        out[split] = np.stack(images), [name.split("/")[1] for name in files]
    return out


def cache_pickles(at, protocol=4):
    for split, (images, labels) in arrays().items():
        classes = {
            cls: [i for i, label in enumerate(labels) if label == cls] for cls in CLASSES[split]
        }
        content = pickle.dumps({"image_data": images, "class_dict": classes}, protocol)
        (at / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)
    return at


def cache_pickles_protocol_2(at):
    return cache_pickles(at, 2)


def cache_pickles_protocol_5(at):
    return cache_pickles(at, 5)


def cache_pickles_zip(at):
    cache_pickles(at)
    return zipped(
        at / "cache.zip", {f"p/{path.name}": path.read_bytes() for path in at.glob("*.pkl")}
    )


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


def category_pickles(at):
    order = [cls for split in SPLITS for cls in CLASSES[split]]
    for split, (images, labels) in arrays().items():
        part = "train_phase_train" if split == "train" else split
        content = python2_pickle(images, [order.index(label) for label in labels])
        (at / f"miniImageNet_category_split_{part}.pickle").write_bytes(content)
    for part in ("train_phase_val", "train_phase_test"):
        (at / f"miniImageNet_category_split_{part}.pickle").write_bytes(b"not to be read")
    return at


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


def _rows(split=None):
    for name, content in dataset().items():
        if split in (None, name.split("/")[0]):
            yield name.split("/")[2], content, name.split("/")[1]


def parquet_split(at):
    """Class names as labels, several shards of a split."""
    for split, file in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = list(_rows(split))
        for n, part in enumerate((rows[:40], rows[40:])):
            shard(at / "data" / f"{file}-{n:05d}-of-00002.parquet", part)
    return at


def parquet_every_class(at):
    """Numbers as labels, their names in the metadata, every class in every shard: one of its images
    in each.
    """
    names = sorted(cls for classes in CLASSES.values() for cls in classes)
    rows = [(name, content, names.index(label)) for name, content, label in _rows()]
    for n, split in enumerate(("train", "validation", "test")):
        shard(at / "default" / split / "0000.parquet", rows[n::3], names)
    return at


def parquet_numbers_zip(at):
    """Numbers as labels and no names but in the paths; in a zip archive."""
    names = sorted(cls for classes in CLASSES.values() for cls in classes)
    shard(
        at / "train.parquet",
        [(name, content, names.index(label)) for name, content, label in _rows()],
    )
    return zipped(at / "hub.zip", {"train.parquet": (at / "train.parquet").read_bytes()})


def parquet_without_paths(at):
    """Class names as labels, images without file names."""
    for split in SPLITS:
        shard(
            at / f"{split}.parquet", [(None, content, label) for _, content, label in _rows(split)]
        )
    return at


def _ilsvrc_files():
    files = {
        f"{cls}/{cls}_{number}.JPEG": content
        for cls, images in ilsvrc().items()
        for number, content in zip(NUMBERS, images, strict=True)
    }
    return files | {f"n00000001/n00000001_{n}.JPEG": photograph([999, n]) for n in (1, 2)}


def ilsvrc_folder(at):
    write(at, _csv())
    return write(at / "train", _ilsvrc_files())


def ilsvrc_whole_folder(at):
    """As Kaggle serves it: train/ beside val/ and test/ of loose images."""
    files = {
        f"ILSVRC/Data/CLS-LOC/train/{name}": content for name, content in _ilsvrc_files().items()
    }
    files |= {
        f"ILSVRC/Data/CLS-LOC/{part}/ILSVRC2012_{part}_1.JPEG": photograph([997])
        for part in ("val", "test")
    }
    return write(at / "imagenet", files | _csv())


def ilsvrc_tar(at):
    write(at, _csv())
    inner = {}
    for name, content in _ilsvrc_files().items():
        cls, file = name.split("/")
        inner.setdefault(cls, {})[file] = content
    tars = {f"{cls}.tar": tar(at / "inner.tar", files).read_bytes() for cls, files in inner.items()}
    (at / "inner.tar").unlink()
    return tar(at / "ILSVRC2012_img_train.tar", tars)


FILE_FORMS = [
    layout_folder, layout_nested, layout_tar, layout_tar_gz, layout_tar_xz, layout_zip,
    layout_three_tars,
    csv_folder, csv_class_name_first, csv_index_column, csv_zip, csv_images_zip, csv_folder_of_zip,
    flat, zip_in_zip, class_folders, class_folders_zip,
    ilsvrc_folder, ilsvrc_whole_folder, ilsvrc_tar,
]  # fmt: skip
PARQUET_FORMS = [parquet_split, parquet_every_class, parquet_numbers_zip]
ARRAY_FORMS = [
    cache_pickles,
    cache_pickles_protocol_2,
    cache_pickles_protocol_5,
    cache_pickles_zip,
    category_pickles,
]


def tiny_imagenet(at, first=452):
    """Tiny-ImageNet-200's shape: one class has `first` images, the others two; more classes than
    the hundred.
    """
    classes = [cls for split in TINY_CLASSES.values() for cls in split]
    files = {"wnids.txt": b"", "words.txt": b""}
    for n, cls in enumerate([*classes, "n00000001", "n00000002"]):
        image = photograph([n, 7], 8)
        files |= {
            f"train/{cls}/images/{cls}_{i}.JPEG": image for i in range(first if n == 0 else 2)
        }
        files[f"train/{cls}/{cls}_boxes.txt"] = b"boxes"
    files |= {
        f"{part}/images/{part}_{i}.JPEG": photograph([i, 5], 8)
        for part in ("val", "test")
        for i in range(3)
    }
    return write(at / "tiny-imagenet-200", files)
