"""The textbook way, which speed and results are measured against: plain modules, NCHW, autograd through everything.

It shares no arithmetic with the project's own path; the order of operations is that of the paper's figure and of earlier code.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from augment import MEAN, STD
from cache import load_image
from dataloader import Augmentation, Split, draw_augmentation, draw_images, draw_order
from episode import Episode
from metalearner import prep

N_FILTERS = 32


class TextbookLearner(nn.Module):
    """Conv4 with convolution (and its bias), batch normalisation, ReLU and pooling one after another."""

    def __init__(self, image_size: int, bn_eps: float, bn_momentum: float, n_classes: int):
        super().__init__()
        for b in range(1, 5):
            self.add_module(f"conv{b}", nn.Conv2d(3 if b == 1 else N_FILTERS, N_FILTERS, 3, padding=1))
            self.add_module(f"norm{b}", nn.BatchNorm2d(N_FILTERS, eps=bn_eps, momentum=bn_momentum))
        self.cls = nn.Linear(N_FILTERS * (image_size // 16) ** 2, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        for b in range(1, 5):
            x = F.max_pool2d(F.relu(getattr(self, f"norm{b}")(getattr(self, f"conv{b}")(x))), 2)
        return self.cls(x.flatten(1))

    def slots(self):
        for module in self.children():
            for name in ("weight", "bias"):
                yield module, name

    def reset_batch_stats(self) -> None:
        for b in range(1, 5):
            getattr(self, f"norm{b}").reset_running_stats()


class TextbookMetaLearner(nn.Module):
    """nn.LSTMCell and the cell of equations 3 and 4, one tensor operation after another."""

    def __init__(self, hidden_size: int, n_learner_params: int):
        super().__init__()
        self.lstm = nn.LSTMCell(4, hidden_size)
        self.metalstm = nn.ParameterDict(
            {
                "WF": torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01),
                "WI": torch.empty(hidden_size + 2, 1).uniform_(-0.01, 0.01),
                "cI": torch.zeros(n_learner_params, 1),
                "bI": torch.empty(1, 1).uniform_(-5, -4),
                "bF": torch.empty(1, 1).uniform_(4, 6),
            }
        )

    def forward(self, loss: Tensor, grad: Tensor, state):
        hc, f, i, c = state
        x = torch.cat((prep(loss).expand(grad.shape[0], 2), prep(grad.squeeze(1)).t()), dim=1)
        h, lstm_c = self.lstm(x, hc)
        f = torch.cat((h, c, f), dim=1) @ self.metalstm["WF"] + self.metalstm["bF"]
        i = torch.cat((h, c, i), dim=1) @ self.metalstm["WI"] + self.metalstm["bI"]
        return (h, lstm_c), f, i, torch.sigmoid(f) * c - torch.sigmoid(i) * grad


def _copy_values(learner: TextbookLearner, c: Tensor) -> None:
    at = 0
    for module, name in learner.slots():
        p = getattr(module, name)
        p.data.copy_(c.detach()[at : at + p.numel()].view_as(p))
        at += p.numel()


def _transfer(learner: TextbookLearner, source: TextbookLearner, c: Tensor) -> None:
    for mine, theirs in zip(learner.buffers(), source.buffers(), strict=True):
        mine.copy_(theirs)
    at = 0
    for module, name in learner.slots():
        shape = getattr(module, name).shape
        module._parameters.pop(name, None)
        setattr(module, name, c[at : at + shape.numel()].view(shape))
        at += shape.numel()


def _minibatches(episode: Episode, batch_size: int):
    for order in episode.order:
        for indices in order.split(batch_size):
            yield episode.support[indices], episode.support_y[indices]


def adapt(episode: Episode, learner: TextbookLearner, meta: TextbookMetaLearner, batch_size: int) -> Tensor:
    """The inner loop; returns the last cell state [P, 1]."""
    learner.train()
    learner.reset_batch_stats()
    c = meta.metalstm["cI"]
    state = (None, torch.zeros_like(c), torch.zeros_like(c), c)
    for x, y in _minibatches(episode, batch_size):
        _copy_values(learner, state[3])
        with torch.enable_grad():
            loss = F.cross_entropy(learner(x), y)
            learner.zero_grad()
            loss.backward()
        grad = torch.cat([p.grad.reshape(-1) for p in learner.parameters()]).unsqueeze(1) / x.shape[0]
        state = meta(loss.detach(), grad, state)
    return state[3]


def train_episode(episode: Episode, learners, meta: TextbookMetaLearner, optimizer, batch_size: int, grad_clip: float):
    """As ``episode.train_episode``: query loss [] and accuracy [] in percent."""
    c = adapt(episode, learners[0], meta, batch_size)
    learners[1].train()
    _transfer(learners[1], learners[0], c)
    logits = learners[1](episode.query)
    loss = F.cross_entropy(logits, episode.query_y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(meta.parameters(), grad_clip)
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == episode.query_y).float().mean() * 100


@torch.no_grad()
def evaluate_episode(episode: Episode, learners, meta: TextbookMetaLearner, batch_size: int):
    """As ``episode.evaluate_episode``."""
    c = adapt(episode, learners[0], meta, batch_size)
    learners[1].eval()
    _transfer(learners[1], learners[0], c)
    logits = learners[1](episode.query)
    return F.cross_entropy(logits, episode.query_y), (logits.argmax(1) == episode.query_y).float().mean() * 100


def _normalise(image: Image.Image) -> Tensor:
    return TF.normalize(TF.to_tensor(image), MEAN, STD)


def train_transform(image: Image.Image, augmentation: Augmentation, k: int, image_size: int) -> Image.Image:
    """Apply row ``k`` of the parameters with torchvision's own functions, one after another."""
    top, left, height, width = (int(v) for v in augmentation.box[k])
    image = TF.resized_crop(image, top, left, height, width, [image_size, image_size], InterpolationMode.BILINEAR)
    if augmentation.flip[k]:
        image = TF.hflip(image)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for step in augmentation.order[k]:
        image = adjust[step](image, float(augmentation.jitter[k, step]))
    return image


def eval_transform(image: Image.Image, image_size: int) -> Image.Image:
    """Shorter side to image_size * 8 // 7, then the centre."""
    image = TF.resize(image, [image_size * 8 // 7], InterpolationMode.BILINEAR)
    return TF.center_crop(image, [image_size, image_size])


class TextbookDataset(Dataset):
    """The same episodes, decoded and transformed by Pillow and torchvision image by image, NCHW."""

    def __init__(
        self, split: Split, seed: int, n_class: int, n_shot: int, n_eval: int, n_pass: int, image_size: int, length: int
    ):
        self.split, self.seed, self.length = split, seed, length
        self.n_class, self.n_shot, self.n_eval, self.n_pass, self.image_size = n_class, n_shot, n_eval, n_pass, image_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode:
        classes, picks = draw_images(self.seed, self.split, index, self.n_class, self.n_shot + self.n_eval)
        picks = [
            (c, k)
            for part in (picks[:, : self.n_shot], picks[:, self.n_shot :])
            for c, row in zip(classes, part, strict=True)
            for k in row
        ]
        images = [load_image(self.split.files[c][k]) for c, k in picks]
        if self.split.name == "train":
            sizes = np.array([(image.height, image.width) for image in images])
            drawn = draw_augmentation(self.seed, self.split.name, index, sizes)
            images = [train_transform(image, drawn, k, self.image_size) for k, image in enumerate(images)]
        else:
            images = [eval_transform(image, self.image_size) for image in images]
        x = torch.stack([_normalise(image) for image in images])
        y = torch.arange(self.n_class)
        return Episode(
            x[: self.n_class * self.n_shot],
            y.repeat_interleave(self.n_shot),
            x[self.n_class * self.n_shot :],
            y.repeat_interleave(self.n_eval),
            torch.from_numpy(draw_order(self.seed, self.split.name, index, self.n_pass, self.n_class * self.n_shot)),
        )


def episodes(dataset: TextbookDataset, n_workers: int):
    """Episodes in order from a DataLoader with worker processes."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=n_workers))
