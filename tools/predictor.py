"""A trained model in use: it adapts to a few images of each class and classifies others.

Probabilities are averaged over permutations of the classes, see engine/tta.py. The examples' pixels
determine the order of the classes, so predictions do not depend on the labels or their order.
"""

from __future__ import annotations

import copy
import hashlib
from argparse import Namespace
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice, product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.imagefiles import to_rgb
from data.transforms import eval_image, to_input
from dataloader import draw_order
from engine.backend import Backend, reproducible
from engine.evaluation import schedule
from engine.model import Model
from engine.tta import adapt_view, class_permutations, probabilities, views
from episode import Episode
from learner import FlatModule
from utils import UserError

CHUNK = 64  # images that are classified at once


class Predictor:
    """Classifies images by a few examples of each class.

    Images are PIL images, or tensors [3, H, W]: uint8, or floats from 0 to 1. Any size will do.

    Args:
        args: the flags of ``--mode predict``.
        model: on the backend's device.
        trained_on: images per class in training.

    Attributes:
        classes: the labels, in the order of the columns of ``predict``; empty before ``adapt``.
        adapted: the permutations that ``predict`` averages over, each with its adapted learner.
    """

    def __init__(self, args: Namespace, backend: Backend, model: Model, trained_on: int):
        self.args, self.backend, self.model, self.trained_on = args, backend, model, trained_on
        self.classes: list[Hashable] = []
        self.adapted: list[tuple[Tensor, FlatModule]] = []

    @reproducible()
    @torch.no_grad()
    def adapt(self, images: Iterable[Image.Image | Tensor], labels: Iterable[Hashable]) -> None:
        """Learn new classes; forgets those of an earlier call.

        Args:
            images: the examples, at least one of each class.
            labels: what each shows, such as names or numbers (or a tensor of them); as many
                different ones as the model was trained for.

        Raises:
            UserError: there are more or fewer labels than that, or than images.
        """
        args, model, device = self.args, self.model, self.backend.device
        inputs = [self._input(image) for image in images]
        labels = [each.item() if isinstance(each, Tensor) else each for each in labels]
        classes = list(dict.fromkeys(labels))
        if len(inputs) != len(labels):
            raise UserError(f"{len(inputs)} images, but {len(labels)} labels; give one for each")
        if more := len(classes) - args.n_class:
            advice = f"leave out {more} of them" if more > 0 else f"add {-more}"
            advice += f", or train with --n-class {len(classes)}" if len(classes) > 1 else ""
            trained = f"{args.resume} was trained for {args.n_class}"
            raise UserError(f"{len(classes)} classes, but {trained}; {advice}")
        pairs = list(zip(inputs, labels, strict=True))
        examples = by_content([[x for x, label in pairs if label == c] for c in classes])
        ranked, n = list(dict.fromkeys(k for k, _ in examples)), len(classes)
        permutations = class_permutations(n, args.tta_permutations or n, args.seed)
        permutations = permutations[:, [ranked.index(k) for k in range(n)]].to(device)
        support = views(torch.stack([x for _, x in examples]).to(device), model, args.tta_flip)
        y = torch.tensor([k for k, _ in examples], device=device)
        drawn = draw_order(args.seed, "test", 0, args.epoch, len(y), args.shuffle)
        nothing = torch.empty(0, device=device)
        episode = Episode(support[0], y, nothing, nothing, torch.from_numpy(drawn).to(device))
        size, model.metalearner.grad_divisor = schedule(args, self.trained_on, len(y))
        self.classes, self.adapted = classes, []
        w_grad, wo_grad = model.learners
        for permutation, x in product(permutations, support):
            learner = copy.deepcopy(wo_grad)
            adapt_view(episode, x, permutation, w_grad, learner, model, size)
            self.adapted.append((permutation, learner))

    @reproducible()
    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image | Tensor]) -> Tensor:
        """Probabilities [N, n] of the classes, float64 on the CPU.

        Raises:
            UserError: ``adapt`` has not been called, or an image is something else.
        """
        if not self.classes:
            raise UserError("no classes to choose from; call adapt(images, labels) first")
        rows = [torch.empty(0, len(self.classes), dtype=torch.float64)]
        for batch in self._batches(images):
            query = views(batch, self.model, self.args.tta_flip)
            each = [probabilities(query, *pair) for pair in self.adapted]
            rows.append(torch.stack(each).double().mean(0).cpu())
        return torch.cat(rows)

    @reproducible()
    @torch.no_grad()
    def features(self, images: Iterable[Image.Image | Tensor]) -> Tensor:
        """What the classifier reads, [N, F] float32 on the CPU.

        With ``--method lstm`` they are those of the adapted learner, the first of those that
        ``predict`` averages over.

        Raises:
            UserError: they depend on the examples, and ``adapt`` has not been called; the network
                has no method ``features``; or there are no images.
        """
        network = self.model.backbone
        if network is None and not self.adapted:
            raise UserError("features depend on the examples; call adapt(images, labels) first")
        read = network or getattr(self.adapted[0][1], "features", None)
        if read is None:
            raise UserError("features: the learner has no method of this name")
        found = [read(batch).flatten(1).cpu() for batch in self._batches(images)]
        if not found:
            raise UserError("features: no images; give at least one")
        return torch.cat(found)

    def _batches(self, images: Iterable[Image.Image | Tensor]) -> Iterator[Tensor]:
        if isinstance(images, Image.Image):
            raise UserError("a single image: give a list of images")
        images = iter(images)
        while chunk := list(islice(images, CHUNK)):
            yield torch.stack([self._input(image) for image in chunk]).to(self.backend.device)

    def _input(self, image: Image.Image | Tensor) -> Tensor:
        """Transform as for validation: [3, image_size, image_size] float32."""
        if not isinstance(image, (Image.Image, Tensor)):
            raise UserError(f"{type(image).__name__}: give a PIL image, or a tensor [3, H, W]")
        if isinstance(image, Tensor):
            image = _from_tensor(image)
        try:
            image = to_rgb(image)
        except ValueError as e:
            raise UserError(f"an image of mode {image.mode}: {e}") from e
        image = eval_image(image, self.args.image_size, self.args.augment)
        return to_input([image], self.args.pixels)[0]


def _from_tensor(image: Tensor) -> Image.Image:
    if image.is_floating_point() and ((image >= 0) & (image <= 1)).all():
        image = (image * 255).round().to(torch.uint8)
    if image.dim() != 3 or len(image) != 3 or image.dtype != torch.uint8 or not image.numel():
        found = f"a tensor {list(image.shape)} of {image.dtype}"
        raise UserError(f"{found} is no image; give [3, H, W] uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


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
    order = sorted(range(len(images)), key=keyed.__getitem__)
    return [(k, images[k][i]) for k in order for _, i in keyed[k]]
