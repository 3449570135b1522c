"""``--mode predict``: classifies the user's own images with ``tools/predictor.py``."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data.imagefiles import images_below, load_image
from data.layout import scan_classes
from tools.plots import load_figures, optional
from tools.predictor import Predictor
from tools.words import display_name, printable, shorten
from utils import UserError, atomic_write, counted

SHOWN = 24  # images in the picture


def gather(paths: list[str], support: list[Path]) -> list[Path]:
    """Image files, from files and from folders of them, in the order given; without the examples
    in ``support`` that lie in such a folder.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"--query {name}: no such file or folder")
        found += images_below(path, support) if path.is_dir() else [path]
    if not found:
        raise UserError(f"--query {' '.join(paths)}: no images there")
    return found


def readable(files: list[Path], read: list[Path]) -> Iterator[Image.Image]:
    """Decode images and note their paths in ``read``; one that cannot be read is left out, with a
    note.
    """
    for path in tqdm(files, desc="predict", unit="image", leave=False, disable=None):
        try:
            image = load_image(path)
        except UserError as e:
            tqdm.write(f"note: skipped {e}")
        else:
            read.append(path)
            yield image


def table(classes: list[str], files: list[Path], probabilities: np.ndarray) -> bytes:
    """A CSV file, one line per image: file, class, its probability, and those of all classes."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability", *classes])
    for file, row in zip(files, probabilities, strict=True):
        best = classes[row.argmax()], f"{row.max():.4f}"
        writer.writerow([file, *best, *(f"{p:.4f}" for p in row)])
    return printable(text.getvalue()).encode()


def picture(
    classes: list[str], support: list[list[Path]], files: list[Path], probabilities: np.ndarray
) -> bytes:
    """A PNG file: above, examples of each class; below, the first images with their names and
    likeliest classes.

    Raises:
        UserError: Matplotlib is missing or broken.
    """
    figures, fit = load_figures(), partial(ImageOps.fit, method=Image.Resampling.BILINEAR)
    shown, columns = files[:SHOWN], max(len(classes), 4)
    rows = 1 + -(-len(shown) // columns)
    names = [shorten(display_name(name), 20) for name in classes]
    labels = [shorten(file.name, 26) for file in shown]
    with figures.style([*names, *labels]):
        size = (2.1 * columns, 2.6 * rows)
        figure, axes = figures.plt.subplots(rows, columns, figsize=size, squeeze=False)
        figure.get_layout_engine().set(hspace=0.1)
        if len(files) > SHOWN:
            figure.supxlabel(f"the first {SHOWN} of {len(files)} images", fontsize=9)
        for axis in axes.flat:
            axis.axis("off")
        for axis, name, examples in zip(axes[0], names, support, strict=False):
            side = [np.asarray(fit(load_image(p), (96, 96))) for p in examples[:4]]
            side += [np.full_like(side[0], 255)] * (4 - len(side))
            axis.imshow(np.vstack((np.hstack(side[:2]), np.hstack(side[2:]))))
            title = f"{name}\n{counted(len(examples), 'example')}"
            axis.set_title(title, color=figures.BLUE, weight="bold")
        drawn = zip(axes[1:].flat, shown, labels, probabilities, strict=False)
        for axis, file, label, row in drawn:
            axis.imshow(fit(load_image(file), (192, 192)))
            best = row.argsort()[::-1][:2]
            axis.set_title("\n".join(f"{names[k]} {row[k]:.0%}" for k in best))
            look = {"ha": "center", "va": "top", "fontsize": 8, "color": figures.GREY}
            axis.text(0.5, -0.03, label, transform=axis.transAxes, **look)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15)
        figures.plt.close(figure)
    return out.getvalue()


def _targets(out: str) -> tuple[Path, Path]:
    """OUT.csv and OUT.png, in a folder OUT predictions.csv and .png; neither may exist."""
    if out.endswith(("/", os.sep)) or os.path.isdir(out):
        out = os.path.join(out, "predictions")
    stem = re.sub(r"\.(csv|png)$", "", out, flags=re.IGNORECASE)
    targets = Path(f"{stem}.csv"), Path(f"{stem}.png")
    for path in targets:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("xb").close()
            path.unlink()
        except FileExistsError as e:
            raise UserError(f"{path}: exists already; give another --out, or remove it") from e
        except OSError as e:
            raise UserError(f"--out {path}: cannot be written ({e.strerror}); give another") from e
    return targets


def predict(predictor: Predictor) -> None:
    """Adapt to the classes in ``--support`` and say which of them each image in ``--query`` shows.

    Raises:
        UserError: a flag is missing, the number of classes is not the checkpoint's, an example or
            all of the images cannot be read, or an earlier prediction would be replaced.
    """
    args = predictor.args
    for flag, value in (("--support", args.support), ("--query", args.query)):
        if value is None:
            raise UserError(f"{flag}: needed by --mode predict")
    classes, support = scan_classes(Path(args.support), "--support")
    for name, images in zip(classes, support, strict=True):
        if not images:
            advice = "no images there; a class needs at least one example"
            raise UserError(f"--support {args.support}/{name}: {advice}")
    labels = [name for name, of_class in zip(classes, support, strict=True) for _ in of_class]
    examples = [path for of_class in support for path in of_class]
    files = gather(args.query, examples)
    csv_path, png_path = _targets(args.out)
    try:
        predictor.adapt(map(load_image, examples), labels)
    except UserError as e:
        raise UserError(f"--support {args.support}: {e}") from e
    read: list[Path] = []
    shares = predictor.predict(readable(files, read)).numpy()
    if not read:
        query = " ".join(args.query)
        raise UserError(f"--query {query}: none of the {len(files)} files is a readable image")
    names = [printable(str(file)).replace("\n", "\\n") for file in read]
    width, n = max(map(len, names)), len(predictor.adapted)
    print(f"{'image':<{width}}  class, probability (mean over {counted(n, 'adaptation')})")
    shown = {c: c if display_name(c) == c else f"{c} ({display_name(c)})" for c in classes}
    for name, row in zip(names, shares, strict=True):
        print(f"{name:<{width}}  {shown[classes[row.argmax()]]}, {row.max():.2f}")
    with atomic_write(csv_path, new=True) as file:
        file.write(table(classes, read, shares))
    print(f"written to {csv_path}")
    with optional():
        drawn = picture(classes, support, read, shares)
        with atomic_write(png_path, new=True) as file:
            file.write(drawn)
        print(f"written to {png_path}")
