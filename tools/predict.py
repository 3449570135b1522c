"""Few-shot learning in use: adapt to the user's own photographs, then classify others.

Answers are averaged over several orders of the classes, see averaging.py. The first order follows
the examples' pixels, so the names of folders and files have no part in the answer.
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

from dataloader import draw_order, eval_image, load_image, scan_classes, to_input
from engine.backend import Way
from engine.tta import View, adapted, answer, class_orders, views
from episode import Episode
from learner import FlatModule
from metalearner import MetaLearner
from tools.class_names import plain
from utils import UserError, atomic_write

CHUNK = 64  # images that are decoded and classified at once
SHOWN = 24  # images in the picture


def gather(paths: list[str]) -> list[Path]:
    """Image files, from files and from folders of them, in the order given.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")
            )
            found += [p for p in inside if p.suffix.lower() in Image.registered_extensions()]
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
    """Sort classes, and the examples of each, by their pixels, so that no name has a part in the
    answer.

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


def trained_learners(
    examples: list[tuple[int, Tensor]],
    shown: list[View],
    args: argparse.Namespace,
    learners: tuple[FlatModule, FlatModule],
    metalearner: MetaLearner,
    device: torch.device,
) -> list[FlatModule]:
    """Train the learner on the examples, anew for each view of them.

    Args:
        examples: from ``by_content``; the views' places are those of the classes' numbers.

    Returns:
        The trained learners, in eval mode.
    """
    x = torch.stack([image for _, image in examples]).to(device)
    labels = torch.tensor([k for k, _ in examples], device=device)
    nothing = torch.empty(0, device=device)
    order = torch.from_numpy(
        draw_order(args.seed, "test", 0, args.epoch, len(labels), args.shuffle)
    ).to(device)
    episode, found = Episode(x, labels, nothing, nothing, order), []
    for view in shown:
        found.append(copy.deepcopy(learners[1]))
        adapted(episode, view, learners[0], found[-1], metalearner, args.batch_size)
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
    """A CSV file, one line per image: file, class, its probability, and all classes' probabilities."""
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
    """
    from tools.plots import BLUE, GREY, plt, shorten, style  # matplotlib takes a second to load

    shown, columns = files[:SHOWN], max(len(classes), 4)
    rows = 1 + -(-len(shown) // columns)
    names = [shorten(plain(name), 20) for name in classes]
    labels = [shorten(file.name, 26) for file in shown]
    with style([*names, *labels]):
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
            axis.set_title(f"{name}\n{len(examples)} examples", color=BLUE, weight="bold")
        for axis, file, label, row in zip(
            axes[1:].flat, shown, labels, probabilities, strict=False
        ):
            axis.imshow(_square(load_image(file), 192))
            best = row.argsort()[::-1][:2]
            axis.set_title("\n".join(f"{names[k]} {row[k]:.0%}" for k in best))
            axis.text(
                0.5,
                -0.03,
                label,
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color=GREY,
            )
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
    if (more := len(classes) - args.n_class) != 0:
        change = (
            f"leave out {more} of them"
            if more > 0
            else f"add {-more}, such as of anything else that the images may show"
        )
        raise UserError(
            f"--support {args.support}: {len(classes)} classes, but {args.resume} was trained for {args.n_class}; {change}, "
            + (
                f"or train with --n-class {len(classes)}"
                if len(classes) > 1
                else "for one class leaves nothing to choose"
            )
        )
    for name, images in zip(classes, support, strict=True):
        if not images:
            raise UserError(
                f"--support {args.support}/{name}: no images there; a class needs at least one example"
            )
    return classes, support


@torch.no_grad()
def predict(
    args: argparse.Namespace,
    way: Way,
    learners: tuple[FlatModule, FlatModule],
    metalearner: MetaLearner,
) -> None:
    """Adapt to the classes in ``--support`` and say which of them each image in ``--query`` shows.

    Raises:
        UserError: a flag is missing, the number of classes is not the checkpoint's, an example or
            all of the images cannot be read, or the picture would replace one of them.
    """
    if args.support is None or args.query is None:
        missing = "--support" if args.support is None else "--query"
        raise UserError(
            f"{missing}: needed by --mode predict; give a folder of examples and images to classify"
        )
    classes, support = _examples(args)
    files = gather(args.query)
    stem = re.sub(r"\.(csv|png)$", "", args.out, flags=re.IGNORECASE)
    targets = [Path(f"{stem}.csv"), Path(f"{stem}.png")]
    if targets[1].resolve() in {
        path.resolve() for of_class in [*support, files] for path in of_class
    }:
        raise UserError(
            f"--out {args.out}: would replace {targets[1]}, which is one of the images; choose another name"
        )
    # as large steps as in training, also from fewer examples
    metalearner.grad_divisor = metalearner.grad_divisor or min(
        args.batch_size, args.n_class * args.n_shot
    )
    examples = by_content([[prepare(path, args) for path in of_class] for of_class in support])
    place = {k: rank for rank, k in enumerate(dict.fromkeys(k for k, _ in examples))}
    ranks = np.array([place[k] for k in range(len(classes))])
    orders = class_orders(len(classes), args.orders or len(classes), args.seed)[:, ranks]
    shown = views(orders, args.mirror)
    trained = trained_learners(examples, shown, args, learners, metalearner, way.device)
    read, rows = [], []
    for good, images in chunks(files, args):
        x = images.to(way.device)
        each = [
            answer(x, view, learner, args.mirror)
            for view, learner in zip(shown, trained, strict=True)
        ]
        rows.append(torch.stack(each).double().mean(0).cpu().numpy())
        read += good
    if not read:
        raise UserError(
            f"--query {' '.join(args.query)}: none of the {len(files)} files is a readable image"
        )
    probabilities = np.concatenate(rows)
    width = max(len(str(file)) for file in read)
    over = f"{len(orders)} orders of the classes" + " and mirror images" * args.mirror
    print(f"{'image':<{width}}  class, probability (mean over {over})")
    words = [name if plain(name) == name else f"{name} ({plain(name)})" for name in classes]
    for file, row in zip(read, probabilities, strict=True):
        print(f"{file!s:<{width}}  {words[row.argmax()]}, {row.max():.2f}")
    contents = [table(classes, read, probabilities), picture(classes, support, read, probabilities)]
    for path, content in zip(targets, contents, strict=True):
        with atomic_write(path) as out:
            out.write(content)
    print(f"written to {targets[0]} and {targets[1]}")
