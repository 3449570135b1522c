"""Few-shot learning in use: adapt to the user's own photographs, then classify others.

Probabilities are averaged over permutations of the classes, see engine/tta.py. The order of the
classes follows the examples' pixels, so predictions do not depend on file or folder names.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataloader import draw_order, eval_image, scan_classes, to_input
from engine.backend import Backend
from engine.model import Model
from engine.tta import adapt_view, class_permutations, probabilities, sides, views
from episode import Episode
from imagefiles import images_below, load_image
from learner import FlatModule
from tools.class_names import display_name
from tools.plots import load_figures
from utils import UserError, atomic_write

CHUNK = 64  # images that are decoded and classified at once
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
        if path.is_dir():
            found += images_below(path, support)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--query {name}: no such file or folder")
    if not found:
        raise UserError(f"--query {' '.join(paths)}: no images there")
    return found


def prepare(path: Path, args: argparse.Namespace) -> Tensor:
    """Decode and transform as for validation: [3, image_size, image_size] float32."""
    return to_input([eval_image(load_image(path), args.image_size, args.augment)], args.pixels)[0]


def by_content(images: list[list[Tensor]]) -> list[tuple[int, Tensor]]:
    """Sort classes, and the examples of each, by their pixels: names play no part.

    Args:
        images: by class.

    Returns:
        (number of the class, image) of each example.
    """
    keyed = [
        sorted((hashlib.sha256(x.numpy().tobytes()).digest(), i) for i, x in enumerate(of_class))
        for of_class in images
    ]
    return [
        (k, images[k][i])
        for k in sorted(range(len(images)), key=keyed.__getitem__)
        for _, i in keyed[k]
    ]


def adapted_learners(
    args: argparse.Namespace,
    backend: Backend,
    model: Model,
    examples: list[tuple[int, Tensor]],
    permutations: Tensor,
) -> list[FlatModule]:
    """Adapt to the examples, anew for each view of them.

    Args:
        examples: from ``by_content``.
        permutations: [N, n], the output of each class.

    Returns:
        The adapted learners, one per view, in eval mode.
    """
    device, nothing = backend.device, torch.empty(0, device=backend.device)
    support = sides(torch.stack([x for _, x in examples]).to(device), model, args.tta_flip)
    labels = torch.tensor([k for k, _ in examples], device=device)
    drawn = draw_order(args.seed, "test", 0, args.epoch, len(labels), args.shuffle)
    order = torch.from_numpy(drawn).to(device)
    episode, found = Episode(support[0], labels, nothing, nothing, order), []
    for view in views(permutations, args.tta_flip):
        found.append(copy.deepcopy(model.learner_wo_grad))
        pair = (model.learner_w_grad, found[-1])
        adapt_view(episode, support, view, *pair, model, args.batch_size)
    return found


def chunks(files: list[Path], args: argparse.Namespace) -> Iterator[tuple[list[Path], Tensor]]:
    """Decode images, ``CHUNK`` at a time; one that cannot be read is left out, with a note."""
    bar = tqdm(total=len(files), desc="predict", unit="image", leave=False, disable=None)
    for start in range(0, len(files), CHUNK):
        good, images = [], []
        for path in files[start : start + CHUNK]:
            try:
                images.append(prepare(path, args))
                good.append(path)
            except UserError as e:
                tqdm.write(f"note: skipped {e}")
            bar.update()
        if good:
            yield good, torch.stack(images)
    bar.close()


def table(classes: list[str], files: list[Path], probabilities: np.ndarray) -> bytes:
    """A CSV file, one line per image: file, class, its probability, and those of all classes."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability", *classes])
    for file, row in zip(files, probabilities, strict=True):
        writer.writerow(
            [file, classes[row.argmax()], f"{row.max():.4f}", *(f"{p:.4f}" for p in row)]
        )
    return text.getvalue().encode("utf-8", "backslashreplace")  # names may hold bytes of any kind


def picture(
    classes: list[str], support: list[list[Path]], files: list[Path], probabilities: np.ndarray
) -> bytes:
    """A PNG file: above, examples of each class; below, the first images with their names and
    likeliest classes.

    Raises:
        UserError: Matplotlib is missing or broken.
    """
    figures = load_figures()
    plt, shorten = figures.plt, figures.shorten
    shown, columns = files[:SHOWN], max(len(classes), 4)
    rows = 1 + -(-len(shown) // columns)
    names = [shorten(display_name(name), 20) for name in classes]
    labels = [shorten(file.name, 26) for file in shown]
    with figures.style([*names, *labels]):
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.1 * columns, 2.6 * rows), squeeze=False
        )
        figure.get_layout_engine().set(hspace=0.1)
        if len(files) > SHOWN:
            figure.supxlabel(f"the first {SHOWN} of {len(files)} images", fontsize=9)
        for axis in axes.flat:
            axis.axis("off")
        for axis, name, examples in zip(axes[0], names, support, strict=False):
            side = [np.asarray(_square(load_image(p), 96)) for p in examples[:4]]
            side += [np.full_like(side[0], 255)] * (4 - len(side))
            axis.imshow(np.vstack((np.hstack(side[:2]), np.hstack(side[2:]))))
            axis.set_title(f"{name}\n{len(examples)} examples", color=figures.BLUE, weight="bold")
        for axis, file, label, row in zip(
            axes[1:].flat, shown, labels, probabilities, strict=False
        ):
            axis.imshow(_square(load_image(file), 192))
            best = row.argsort()[::-1][:2]
            axis.set_title("\n".join(f"{names[k]} {row[k]:.0%}" for k in best))
            look = {"ha": "center", "va": "top", "fontsize": 8, "color": figures.GREY}
            axis.text(0.5, -0.03, label, transform=axis.transAxes, **look)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)
    return out.getvalue()


def _square(image: Image.Image, side: int) -> Image.Image:
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize(
        (side, side), Image.Resampling.BILINEAR, (left, top, left + short, top + short)
    )


def _examples(args: argparse.Namespace) -> tuple[list[str], list[list[Path]]]:
    classes, support = scan_classes(Path(args.support), "--support")
    place, more = f"--support {args.support}", len(classes) - args.n_class
    if more:
        advice = f"leave out {more} of them" if more > 0 else f"add {-more}"
        if len(classes) > 1:
            advice += f", or train with --n-class {len(classes)}"
        have = f"{len(classes)} classes, but {args.resume} was trained for {args.n_class}"
        raise UserError(f"{place}: {have}; {advice}")
    for name, images in zip(classes, support, strict=True):
        if not images:
            raise UserError(f"{place}/{name}: no images there; a class needs at least one example")
    return classes, support


def _targets(args: argparse.Namespace, images: list[Path]) -> tuple[Path, Path]:
    """OUT.csv and OUT.png, neither of which may be one of the images."""
    stem = re.sub(r"\.(csv|png)$", "", args.out, flags=re.IGNORECASE)
    targets = Path(f"{stem}.csv"), Path(f"{stem}.png")
    if targets[1].resolve() in {path.resolve() for path in images}:
        advice = f"would replace {targets[1]}, which is one of the images; choose another name"
        raise UserError(f"--out {args.out}: {advice}")
    return targets


@torch.no_grad()
def predict(args: argparse.Namespace, backend: Backend, model: Model) -> None:
    """Adapt to the classes in ``--support`` and say which of them each image in ``--query`` shows.

    Raises:
        UserError: a flag is missing, the number of classes is not the checkpoint's, an example or
            all of the images cannot be read, or an image or another prediction would be replaced.
    """
    for flag, value in (("--support", args.support), ("--query", args.query)):
        if value is None:
            raise UserError(f"{flag}: needed by --mode predict")
    classes, support = _examples(args)
    files = gather(args.query, [path for of_class in support for path in of_class])
    csv_path, png_path = _targets(
        args, [*files, *(path for of_class in support for path in of_class)]
    )
    # as large steps as in training, also from fewer examples
    model.metalearner.grad_divisor = model.metalearner.grad_divisor or min(
        args.batch_size, args.n_class * args.n_shot
    )
    examples = by_content([[prepare(path, args) for path in of_class] for of_class in support])
    place = {k: rank for rank, k in enumerate(dict.fromkeys(k for k, _ in examples))}
    count = args.tta_permutations or len(classes)
    permutations = class_permutations(len(classes), count, args.seed)
    permutations = permutations[:, [place[k] for k in range(len(classes))]].to(backend.device)
    learners = adapted_learners(args, backend, model, examples, permutations)
    seen, read, rows = views(permutations, args.tta_flip), [], []
    for good, images in chunks(files, args):
        query = sides(images.to(backend.device), model, args.tta_flip)
        each = [probabilities(query, *pair) for pair in zip(seen, learners, strict=True)]
        rows.append(torch.stack(each).double().mean(0).cpu().numpy())
        read += good
    if not read:
        query = " ".join(args.query)
        raise UserError(f"--query {query}: none of the {len(files)} files is a readable image")
    shares = np.concatenate(rows)
    content = table(classes, read, shares)
    if csv_path.exists() and csv_path.read_bytes() != content:
        raise UserError(f"{csv_path}: holds another prediction; give another --out, or remove it")
    width = max(len(str(file)) for file in read)
    over = f"{len(permutations)} permutations of the classes" + " and flips" * args.tta_flip
    print(f"{'image':<{width}}  class, probability (mean over {over})")
    shown = {c: c if display_name(c) == c else f"{c} ({display_name(c)})" for c in classes}
    for file, row in zip(read, shares, strict=True):
        print(f"{file!s:<{width}}  {shown[classes[row.argmax()]]}, {row.max():.2f}")
    _write(csv_path, content)
    try:
        drawn = picture(classes, support, read, shares)
    except UserError as e:
        print(f"note: the picture is left out: {e}\nwritten to {csv_path}")
        return
    _write(png_path, drawn)
    print(f"written to {csv_path} and {png_path}")


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
