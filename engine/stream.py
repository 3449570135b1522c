"""Episodes in order, from worker processes that run ahead of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataloader import EpisodeDataset
from engine.process import begin_worker
from episode import Episode
from utils import UserError, first_line

LONGEST_WAIT = 300  # seconds in which no worker process has an episode ready


def episodes(
    dataset: EpisodeDataset,
    start: int,
    n_workers: int,
    device: torch.device,
    pin_memory: bool,
    step: int = 1,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Episode]:
    """Yield episodes ``start``, ``start + step``, ... on ``device``; worker processes run ahead.

    Args:
        waiting: called every second in which no worker has an episode ready.

    Raises:
        UserError: an image cannot be read, or nothing comes from the workers.
    """
    loader = DataLoader(
        _ReturnsErrors(dataset),
        batch_size=None,
        sampler=range(start, len(dataset), step),
        num_workers=n_workers,
        collate_fn=_identity,
        timeout=1 if n_workers else 0,
        pin_memory=pin_memory and device.type != "cpu",
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # the global one belongs to the training
    )
    stream, waited = iter(loader), 0
    try:
        while waited < LONGEST_WAIT:
            try:
                item = next(stream)
            except StopIteration:
                return
            except RuntimeError as e:
                if "DataLoader timed out" not in str(e):
                    raise
                waited += 1
                waiting()
                continue
            if isinstance(item, UserError):
                raise item
            yield dataset.deliver(item, device)
            waited = 0
        late = f"no episode came from the worker processes in {LONGEST_WAIT} seconds"
        advice = "give --n-workers 0, which shows what holds them up"
        raise UserError(f"--n-workers {n_workers}: {late}; {advice}")
    finally:
        if n_workers:  # an exception's traceback would keep them alive
            stream._shutdown_workers()  # type: ignore[attr-defined]


class _ReturnsErrors(Dataset):
    """Returns a data set's errors: raised in a worker, their message would be a whole traceback.

    In a worker it moves the tensors to shared memory itself: the queue drops an item that it cannot
    move.
    """

    def __init__(self, dataset: EpisodeDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> object:
        try:
            item = self.dataset[index]
        except UserError as error:
            return error
        worker = get_worker_info()
        if worker is not None:
            try:
                for tensor in item:
                    if isinstance(tensor, Tensor):
                        tensor.share_memory_()
            except RuntimeError as e:
                advice = "mount a larger /dev/shm (docker run --shm-size 1g), or give --n-workers 0"
                why = f"an episode does not fit into shared memory ({first_line(e)})"
                return UserError(f"--n-workers {worker.num_workers}: {why}; {advice}")
        return item


def _identity(item: object) -> object:
    return item
