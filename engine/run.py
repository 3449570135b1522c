"""A training run that can be killed and resumed: it logs, validates, and writes checkpoints.

``meta-learner-last.pth.tar`` holds all that the next episode depends on, and the lengths of the
logs, so that a resumed run cuts off what a killed one wrote after that checkpoint. A run that is
killed at any time and resumed gives the same bits as one that is not, logs included.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloader import EpisodeDataset
from engine import checkpoint as checkpoints
from engine.checkpoint import BEST, LAST, TrainingState, short_name
from engine.ema import chosen_weights
from engine.flags import data_name, stored_flags
from engine.folder import RunFolder
from engine.logger import Logger, result_line, summary
from engine.process import Signals, Stopped
from engine.provenance import provenance
from engine.stream import episodes
from episode import Episode
from utils import UserError, counted

Evaluation = Callable[[], tuple[list[float], list[float]]]  # gives losses and accuracies

MAX_SKIPPED = 20  # updates in a row whose loss or gradient is not finite


class Run(contextlib.ExitStack):
    """Restores a training run from its folder's checkpoint, if there is one, and records it.

    A context manager: it closes the logs and restores the signal handlers.

    Args:
        folder: locked, with flags and checkpoint.
        modules: the networks that a checkpoint holds, by their key in it; they are restored.
        optimizer: restored too.
        datasets: the splits in use by name, "train" first.
        device: that trains.

    Raises:
        UserError: the checkpoint fits neither flags, data nor folder, or the ranks' images differ.
    """

    def __init__(
        self,
        folder: RunFolder,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        datasets: dict[str, EpisodeDataset],
        device: torch.device,
    ):
        super().__init__()
        self.folder, self.args, self.ranks = folder, folder.args, folder.ranks
        self.modules, self.optimizer = modules, optimizer
        self.datasets, self.device = datasets, device
        data = {split: dataset.split.fingerprint for split, dataset in datasets.items()}
        self.state = TrainingState()
        self.about = provenance(device, self.ranks.size)
        self.trained_classes: list[str] = []  # classes that the checkpoint was trained on
        if folder.origin is not None:
            path, origin = folder.origin
            self.trained_classes = origin.get("classes", [])
            started = {"checkpoint": short_name(path), "episode": origin["episode"]}
            self.about["started_from"] = started
        if folder.checkpoint is not None:
            self._restore(folder.checkpoint, Path(self.args.resume), data)
        self.state.asked_for, self.state.data = self.args.episode, data
        self.ranks.begin({f"{split} images": value for split, value in data.items()})
        if self.ranks.rank == 0:
            self._open_logs()
        self.signals, self.saved_at = Signals(), time.monotonic()
        self.callback(self.signals.restore)
        self.began = self.logged = self.state.episode
        self.since = time.perf_counter()

    def _restore(self, checkpoint: dict, path: Path, data: dict[str, str]) -> None:
        checkpoints.load_weights(self.modules, chosen_weights(self.args, checkpoint), path)
        checkpoints.load_optimizer(self.optimizer, checkpoint, path)
        self.state = TrainingState.from_checkpoint(checkpoint)
        self.trained_classes = checkpoint.get("classes", [])
        n = self.state.episode
        for split, fingerprint in self.state.data.items():
            if data.get(split, fingerprint) != fingerprint:
                place = f"{self.args.data_root}/{self.datasets[split].split.name}"
                advice = "bring them back, or start anew with another --save"
                raise UserError(f"{place}: other images than {path} was trained on; {advice}")
        if n > self.args.episode:
            raise UserError(
                f"--episode {self.args.episode}: {self.args.resume} has already seen {n}"
            )
        if self.folder.continues:
            self.about = checkpoint.get("about") or self.about
            return
        # another folder begins its own logs and keeps its own best checkpoint
        self.state.best, self.state.validated, self.state.logs_end_at = None, n, {}
        about = {k: v for k, v in checkpoint.get("about", {}).items() if k == "started_from"}
        about["resumed_from"] = {"checkpoint": short_name(path), "episode": n}
        self.about |= about | {"changed": self.folder.changed}

    def _open_logs(self) -> None:
        args, state, folder = self.args, self.state, self.folder
        if not folder.continues and (advice := folder.how_to_continue()):
            raise UserError(f"{folder.path}: holds a run already; {advice}another --save or --seed")
        ends = state.logs_end_at or dict.fromkeys(Logger.NAMES, 0)
        logger = Logger(folder.path, ends, args.tensorboard, state.episode)
        self.logger = self.enter_context(contextlib.closing(logger))
        for left in folder.ckpt("").glob(".*.tmp"):  # by a process that was killed while writing
            left.unlink(missing_ok=True)
        if state.episode == 0:
            self.logger.info(self._description())
        else:  # not in the log, which equals that of an undisturbed run
            print(f"resuming after episode {state.episode} of {args.episode}, in {folder.path}")
        bar = tqdm(total=args.episode, initial=state.episode, desc="train", unit="ep", disable=None)
        self.bar = self.enter_context(bar)

    def _description(self) -> str:
        args = self.args
        classes = ", ".join(f"{len(d.split.classes)} {s}" for s, d in self.datasets.items())
        module: Any = next(iter(self.modules.values()))
        rule = hasattr(module, "initial_state")
        learned = [module.initial_state().c] if rule else module.parameters()
        size = sum(p.numel() for p in learned)
        return (
            f"{args.n_class}-way {args.n_shot}-shot, {args.image_size} px, {size} learner "
            f"parameters; {data_name(args)}: {classes} classes; {counted(args.episode, 'episode')}"
        )

    def batches(self, evaluate: Evaluation) -> Iterator[tuple[int, list[Episode]]]:
        """Yield (n, batch) for each update: the number of episodes seen once it is done, and this
        rank's share of its episodes.

        Validates after an update where that is due, and first of all if the last process ended
        while it validated.

        Args:
            evaluate: gives the losses and accuracies of the validation episodes.
        """
        args, ranks, state = self.args, self.ranks, self.state
        where = (args.n_workers, self.device, args.pin_mem)
        how = {"step": ranks.size} | ({} if ranks.rank else {"waiting": self.heed_signals})
        stream = episodes(self.datasets["train"], state.episode + ranks.rank, *where, **how)
        # closing the stream ends its worker processes
        with contextlib.closing(stream):
            self._validate_if_due(evaluate)
            for n in range(state.episode + args.meta_batch, args.episode + 1, args.meta_batch):
                yield n, list(islice(stream, args.meta_batch // ranks.size))
                self._validate_if_due(evaluate)

    def log(self, n: int, losses: Tensor, accuracies: Tensor, skipped: Tensor) -> None:
        """Record the update that ends with episode ``n``.

        Writes a line every ``--log-freq`` episodes, and a checkpoint every ``--save-minutes``.

        Args:
            losses, accuracies: of its episodes, [] or [M].
            skipped: whether it was skipped, [].

        Raises:
            UserError: too many updates in a row were skipped.
            Stopped: a signal asked one of the ranks for it; the checkpoint is written.
            PeerLost: another rank has ended.
        """
        state, args = self.state, self.args
        state.episode = n
        if self.ranks.rank == 0:
            state.losses.append(losses)
            state.accuracies.append(accuracies)
            state.skipped.append(skipped)
            self.bar.update(args.meta_batch)
            if n % args.log_freq < args.meta_batch or n == args.episode:
                self._write_line()
            elif n == self.began + args.meta_batch:  # not in the log, as above
                tqdm.write(
                    f"the first update is done; a line follows every {args.log_freq} episodes"
                )
        stop, save = self.ranks.largest(int(self.signals.stop or 0), int(self.signals.save))
        if stop or save or time.monotonic() - self.saved_at >= 60 * args.save_minutes:
            self.signals.save = False
            self.save_checkpoint(LAST)
        if stop:
            raise Stopped(signal.Signals(stop), self.folder.path, n)

    def _write_line(self) -> None:
        state, n, total = self.state, self.state.episode, self.args.episode
        self._to_floats()  # waits for the GPU
        seconds = time.perf_counter() - self.since
        finite = [v for v in state.losses if math.isfinite(v)]
        loss, accuracy = state.losses[-1], state.accuracies[-1]
        mean_loss = summary(finite)["mean"] if finite else math.nan
        mean_accuracy = summary(map(float, state.accuracies))["mean"]
        rate, n_skipped = max(n - self.logged, 1) / seconds, int(sum(state.skipped))
        self.logger.event(
            "train",
            episode=n,
            loss=loss,
            accuracy=accuracy,
            mean_loss=mean_loss,
            mean_accuracy=mean_accuracy,
            skipped=n_skipped,
            time={"seconds": seconds, "episodes_per_second": rate},
        )
        self.logger.curve("train", n, mean_loss, mean_accuracy)
        note = f"  {n_skipped} updates skipped: loss or gradient not finite" if n_skipped else ""
        self.logger.info(
            f"[{n:>{len(str(total))}}/{total}] loss {loss:.4f} (mean {mean_loss:.4f})  "
            f"acc {accuracy:5.2f} % (mean {mean_accuracy:5.2f} %)  "
            f"{rate:.2f} episodes/s, {timedelta(seconds=round((total - n) / rate))} left{note}"
        )
        for v in state.skipped:
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if v else 0
        state.losses, state.accuracies, state.skipped = [], [], []
        self.logged, self.since = n, time.perf_counter()
        if state.skipped_in_a_row >= MAX_SKIPPED:
            good = next((p for p in map(self.folder.ckpt, (BEST, LAST)) if p.exists()), "none")
            raise UserError(
                f"{state.skipped_in_a_row} updates in a row had a loss or gradient that is not "
                f"finite, up to episode {n}; last good checkpoint: {good}; try a smaller --lr"
            )

    def _to_floats(self) -> None:
        """Bring the numbers since the last log line from the device."""
        for name in ("losses", "accuracies", "skipped"):
            values = getattr(self.state, name)
            rows = [torch.as_tensor(v, device=self.device).view(-1).float() for v in values]
            setattr(self.state, name, torch.cat(rows).tolist() if rows else [])

    def _validate_if_due(self, evaluate: Evaluation) -> None:
        n, every = self.state.episode, self.args.val_freq
        due = (every and n % every == 0) or n == self.args.episode
        if not due or self.state.validated == n:
            return
        began = time.perf_counter()
        self.save_checkpoint(LAST)  # a kill while it validates costs no more
        self._log_validation(*evaluate())
        self.since += time.perf_counter() - began

    def _log_validation(self, losses: list[float], accuracies: list[float]) -> None:
        """Log a validation (empty lists: there was none) and write its checkpoints."""
        state, n = self.state, self.state.episode
        state.validated = n
        if self.ranks.rank > 0:
            return
        names = [f"meta-learner-{n}.pth.tar", LAST]
        if accuracies:
            loss, percent = summary(losses), summary(accuracies)
            self.logger.curve("val", n, loss["mean"], percent["mean"])
            # of each episode, too: benchmarks/compare_runs.py pairs them
            each = [round(v, 2) for v in accuracies]
            self.logger.event("val", episode=n, loss=loss, accuracy=percent, accuracies=each)
            better = state.best is None or percent["mean"] > state.best["accuracy"]
            if better:
                state.best = {"episode": n, "accuracy": percent["mean"], "std": percent["std"]}
                names.insert(0, BEST)
            note = "  best so far" if better else ""
            self.logger.info(result_line("val", losses, accuracies) + note)
        self.save_checkpoint(*names)

    def heed_signals(self) -> None:
        """Between two updates: write a checkpoint, and end the run, if a signal asks for it.

        Raises:
            Stopped: a signal asks for it.
        """
        if self.ranks.rank == 0 and (self.signals.stop or self.signals.save):
            self.signals.save = False
            self.save_checkpoint(LAST)
        if self.signals.stop:
            raise Stopped(self.signals.stop, self.folder.path, self.state.episode)

    def save_checkpoint(self, *names: str) -> None:
        """Write a checkpoint under each name; an old file stays until the new one is whole."""
        self.saved_at = time.monotonic()
        if self.ranks.rank > 0:  # which has nothing that rank 0 lacks
            return
        self.folder.check_place()
        self._to_floats()
        self.state.logs_end_at = self.logger.position()
        content = {
            **self.state.to_checkpoint(),
            **{key: module.state_dict() for key, module in self.modules.items()},
            "mode": self.args.mode,
            "optim": self.optimizer.state_dict(),
            **stored_flags(self.args),
            "about": self.about,
            "data_root": str(self.args.data_root.resolve()),
            "classes": sorted({*self.datasets["train"].split.classes, *self.trained_classes}),
        }
        checkpoints.save(content, *map(self.folder.ckpt, names))

    def finish(self) -> None:
        """Write the log's last line."""
        if self.ranks.rank == 0:
            best = self.state.best
            note = f", best by validation: episode {best['episode']}" if best else ""
            self.bar.close()
            self.logger.info(f"done{note}")
            print(f"written to {self.folder.ckpt(LAST)}")  # the log is published, this path is not
