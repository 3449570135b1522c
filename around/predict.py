"""Few-shot learning in use: adapt to the user's own photographs, then classify others."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from around.way import Way
from dataloader import draw_order, eval_image, load_image, scan_classes, to_input
from episode import Episode, adapt, query_loss
from learner import FlatModule
from metalearner import MetaLearner
from utils import UserError, whole_file


def gather(paths: list[str]) -> list[Path]:
    """Image files, from files and from folders of them, in the order given.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            found += [p for p in inside if p.suffix.lower() in Image.registered_extensions()]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--query {name}: no such file or folder")
    if not found:
        raise UserError(f"--query {' '.join(paths)}: no images there")
    return found


def prepare(files: list[Path], args: argparse.Namespace, device: torch.device) -> Tensor:
    """Decode and transform as for validation: [B, 3, image_size, image_size] float32."""
    images = [eval_image(load_image(path), args.image_size, args.augment) for path in files]
    return to_input(images, args.pixels).to(device)


def write_table(path: Path, classes: list[str], files: list[Path], probabilities: np.ndarray) -> None:
    """One line per image: file, class, its probability, and all classes' probabilities."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "class", "probability", *classes])
    for file, row in zip(files, probabilities, strict=True):
        writer.writerow([file, classes[row.argmax()], f"{row.max():.4f}", *(f"{p:.4f}" for p in row)])
    with whole_file(path) as out:
        out.write(text.getvalue().encode("utf-8"))


def draw(path: Path, classes: list[str], support: list[list[Path]], files: list[Path], probabilities: np.ndarray) -> None:
    """A picture: above, examples of each class; below, up to 24 of the images with their classes' probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown, columns = files[:24], max(len(classes), 4)
    rows = 1 + -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.5 * rows), squeeze=False, constrained_layout=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, name, examples in zip(axes[0], classes, support, strict=False):
        side = [np.asarray(_square(load_image(p), 96)) for p in examples[:4]]
        side += [np.full_like(side[0], 255)] * (4 - len(side))
        axis.imshow(np.vstack((np.hstack(side[:2]), np.hstack(side[2:]))))
        axis.set_title(f"{name}\n{len(examples)} examples", fontsize=9, color="#0072B2", weight="bold")
    for axis, file, row in zip(axes[1:].flat, shown, probabilities, strict=False):
        axis.imshow(_square(load_image(file), 192))
        best = row.argsort()[::-1][:2]
        axis.set_title("\n".join(f"{classes[k]} {row[k]:.0%}" for k in best), fontsize=9)
    with whole_file(path) as out:
        figure.savefig(out, format="png", dpi=110)
    plt.close(figure)


def _square(image: Image.Image, side: int) -> Image.Image:
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + short, top + short))


@torch.no_grad()
def predict(
    args: argparse.Namespace, way: Way, learners: tuple[FlatModule, FlatModule], metalearner: MetaLearner
) -> None:
    """Adapt to the classes in ``--support`` and say which of them each image in ``--query`` shows.

    Raises:
        UserError: a flag is missing, the number of classes is not the checkpoint's, or an image cannot be read.
    """
    if args.support is None or args.query is None:
        missing = "--support" if args.support is None else "--query"
        raise UserError(f"{missing}: needed by --mode predict; give a folder of examples and images to classify")
    classes, support = scan_classes(Path(args.support), "--support")
    if len(classes) != args.n_class:
        raise UserError(
            f"--support {args.support}: {len(classes)} classes, but {args.resume} was trained for {args.n_class}; "
            "give it that many, or train with --n-class"
        )
    for name, images in zip(classes, support, strict=True):
        if not images:
            raise UserError(f"--support {args.support}/{name}: no images there; a class needs at least one example")
    files = gather(args.query)
    device = way.device
    labels = torch.tensor([k for k, images in enumerate(support) for _ in images], device=device)
    x = prepare([path for images in support for path in images], args, device)
    query = prepare(files, args, device)
    order = torch.from_numpy(draw_order(args.seed, "test", 0, args.epoch, len(labels), args.shuffle)).to(device)
    unknown = torch.zeros(len(files), dtype=torch.int64, device=device)
    episode = Episode(x, labels, query, unknown, order)
    learners[1].eval()
    cI, _ = adapt(episode, learners[0], metalearner, args.batch_size)
    probabilities = torch.softmax(query_loss(episode, *learners, cI)[1], dim=1).cpu().numpy()
    width = max(len(str(file)) for file in files)
    print(f"{'image':<{width}}  class, probability")
    for file, row in zip(files, probabilities, strict=True):
        print(f"{file!s:<{width}}  {classes[row.argmax()]}, {row.max():.2f}")
    table, picture = Path(f"{args.out}.csv"), Path(f"{args.out}.png")
    write_table(table, classes, files, probabilities)
    draw(picture, classes, support, files, probabilities)
    print(f"written to {table} and {picture}")
