"""A training run's folder, and all that makes the run durable: lock, signals, snapshots and logs.

``logs-<seed>/`` holds ``console.log``, ``metrics.jsonl``, ``lock`` and ``ckpts/``.
``meta-learner-last.pth.tar`` is the snapshot: everything that the next episode depends on, and the
length of the two logs, so that a resumed run cuts off what a killed one wrote after its last
snapshot.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataloader import EpisodeDataset
from engine import checkpoint as checkpoints
from engine.distributed import ALONE, Ranks
from engine.flags import hyper_parameters, run_folder, settle
from engine.logger import Logger, open_tensorboard, result_line
from metalearner import MetaLearner
from tools.results import BEST, LAST, provenance
from utils import UserError, file_lock, release_locks, summary

MAX_SKIPPED = 20  # updates in a row whose loss or gradient is not finite
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
OLD_FINGERPRINT = re.compile(
    "[0-9a-f]{8}-[0-9a-f]{8}"
)  # before the house: checksums of the names and of the decoded pixels
# hyper-parameters that shape the first episode, and cannot change after it
START_ONLY = ("bn_scale", "lstm_init", "bf_init", "bi_init", "adapt", "bn_shift")


class Run:
    """A training in its folder, which is locked for this process. Of several ranks only the first
    one uses the folder.

    In the order of a training::

        with Run(given, defaults) as run:           # lock the folder, read the checkpoint, settle
        the flags: run.args
            done = run.restore(metalearner, optimizer, train_set, val_set, device)
            for each update, up to episode n:
                run.log(n, losses, accuracies, skipped)  # keep the numbers; write a line, save or
                stop if it is time to if run.due(n):                           # save; is it time to
                validate?
                    run.keep(n, losses, accuracies)      # write the validation's result and the
                    checkpoints

    A run that is killed at any instant and started again reaches the same bits, logs included.

    Args:
        given, defaults: the flags, from ``flags.parse``.
        ranks: which train together.

    Raises:
        UserError: the folder is in use or cannot be written, or ``--resume`` names a checkpoint
            that cannot be continued.
    """

    def __init__(self, given: dict[str, object], defaults: dict[str, object], ranks: Ranks = ALONE):
        self._stack, self.ranks, self.args = contextlib.ExitStack(), ranks, settle(given, defaults)
        self.folder = run_folder(self.args)
        if ranks.rank == 0:
            self._stack.enter_context(_alone(self.folder))
        try:
            self._open(given, defaults)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, given: dict[str, object], defaults: dict[str, object]) -> None:
        resume, self.checkpoint, start, origin = self.args.resume, None, self.args.start, None
        if self.ranks.rank == 0:
            if resume == "auto":
                last = checkpoints.held(self.folder, LAST)
                resume = str(last) if last else None
            elif resume:
                resume = checkpoint_of(resume, self.args.seed, LAST)
            self.checkpoint = checkpoints.load(Path(resume)) if resume else None
            if resume and (made := self.checkpoint.get("mode", "train")) != (
                mode := self.args.mode
            ):
                advice = "begin with it by --start" if mode == "train" else "choose another --save"
                raise UserError(
                    f"{resume}: was written by --mode {made}, which --mode {mode} cannot continue; {advice}"
                )
            if start and not resume:  # a run that continues is past its start
                start = checkpoint_of(start, self.args.seed, BEST, LAST, flag="--start")
                origin = checkpoints.load(Path(start), "--start")
        resume, self.checkpoint, start, origin = self.ranks.exchange(
            (resume, self.checkpoint, start, origin)
        )[0]
        self.origin = (Path(start), origin) if origin else None
        stored = self.checkpoint.get("hyper_parameters", {}) if resume else {}
        elsewhere = (
            resume is not None
            and Path(resume).resolve().parent != (self.folder / "ckpts").resolve()
        )
        self.changed = {k: given[k] for k, v in stored.items() if k in given and given[k] != v}
        for name, value in self.changed.items():
            if not elsewhere or name in START_ONLY:
                flag = "--" + name.replace("_", "-")
                advice = (
                    "leave it at that"
                    if elsewhere
                    else "leave it at that, or name another --save and --resume"
                )
                raise UserError(
                    f"{flag} {value}: {resume} was begun with {flag} {stored[name]}; {advice}"
                )
        self.args = settle({**given, "resume": resume}, defaults, stored)
        _check_meta_batch(self.args, (self.checkpoint or {}).get("episode", 0), self.ranks.size)
        self.validated, self.best = 0, None
        self.since_log: dict[str, list] = {
            "loss": [],
            "accuracy": [],
            "skipped": [],
        }  # since the last log line
        self.skipped_in_a_row = 0

    @property
    def folded(self) -> bool:
        """Whether the meta-learner that this run goes on with already contains batch statistics,
        see ``fold_statistics``.
        """
        origin = self.checkpoint or (self.origin[1] if self.origin else {})
        return origin.get("hyper_parameters", {}).get("adapt") == "classifier"

    @property
    def finished(self) -> bool:
        """Whether the checkpoint has seen and validated all episodes already."""
        ckpt = self.checkpoint or {}
        return ckpt.get("episode") == self.args.episode == ckpt.get("run", {}).get("validated")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def restore(
        self,
        metalearner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        train_set: EpisodeDataset,
        val_set: EpisodeDataset | None,
        device: torch.device,
    ) -> int:
        """Continue from the checkpoint, if there is one, and open the logs.

        Args:
            metalearner, optimizer: whose values are restored here and saved from now on.
            train_set, val_set: that the checkpoint was trained on; the second is None in
                pre-training.
            device: that trains.

        Returns:
            The number of episodes seen so far.

        Raises:
            UserError: the checkpoint does not fit to the flags, to the data or to the folder, or
                the ranks' images differ.
        """
        args, checkpoint, done, ends = self.args, self.checkpoint, 0, None
        self.metalearner, self.optimizer = metalearner, optimizer
        self.data = {
            "train": train_set.fingerprint,
            "val": val_set.fingerprint if val_set else "not used",
        }
        self.about = (checkpoint or {}).get("about") or provenance(device, self.ranks.size)
        if self.origin is not None:
            path, origin = self.origin
            checkpoints.load_start(metalearner, origin, path, args)
            name = "/".join([part for part in path.resolve().parts if part != "ckpts"][-2:])
            self.about["started_from"] = {"checkpoint": name, "episode": origin["episode"]}
        if checkpoint is not None:
            path = Path(args.resume)
            checkpoints.load_metalearner(metalearner, checkpoint, path)
            checkpoints.load_optimizer(optimizer, checkpoint, path)
            done = self.validated = checkpoint["episode"]
            self.best = checkpoint.get("best")
            if "run" in checkpoint:
                ends = self._restore_run(checkpoint["run"], path)
            if (
                ends is None
            ):  # another folder, which begins its own logs and keeps its own best checkpoint
                self.best = None
                came_from = {
                    "checkpoint": f"{path.resolve().parent.parent.name}/{path.name}",
                    "episode": done,
                }
                self.about = provenance(device, self.ranks.size) | {
                    "resumed_from": came_from,
                    "changed": self.changed,
                }
            if done > args.episode:
                raise UserError(
                    f"--episode {args.episode}: {args.resume} has seen {done} already; ask for more"
                )
        self.signals, self.saved = Signals(), time.monotonic()
        self._stack.callback(self.signals.restore)
        self.ranks.begin(
            {f"{split} images": fingerprint for split, fingerprint in self.data.items()}
        )
        if self.ranks.rank == 0:
            n_train, n_val = (
                len(found.split.classes) if found else "none" for found in (train_set, val_set)
            )
            self._open_logs(
                done,
                ends,
                f"{args.n_class}-way {args.n_shot}-shot, {args.image_size} px, {metalearner.metalstm.cI.numel()} learner "
                f"parameters; {args.data_root.name}: {n_train} classes to train on, {n_val} to validate on; "
                f"{args.episode} episodes",
            )
        return done

    def _open_logs(self, done: int, ends: dict[str, int] | None, description: str) -> None:
        args = self.args
        if ends is None and (self.folder / "ckpts" / LAST).exists():
            raise UserError(
                f"{self.folder}: holds a run already; continue it with --resume auto, or choose another --save or --seed"
            )
        self.tensorboard = open_tensorboard(self.folder, done) if args.tensorboard else None
        if self.tensorboard is not None:
            self._stack.enter_context(contextlib.closing(self.tensorboard))
        self.logger = self._stack.enter_context(
            contextlib.closing(Logger(self.folder, ends or dict.fromkeys(Logger.NAMES, 0)))
        )
        for left in (self.folder / "ckpts").glob(
            ".*.tmp"
        ):  # by a process that was killed while writing; the folder is ours
            left.unlink(missing_ok=True)
        if done == 0:
            self.logger.info(description)
        else:  # not in the log, which is to be that of an undisturbed run
            print(f"resuming after episode {done} of {args.episode}, in {self.folder}")
        self.bar = self._stack.enter_context(
            tqdm(total=args.episode, initial=done, desc="train", unit="ep", disable=None)
        )
        self.logged, self.since = done, time.perf_counter()

    def _restore_run(self, run: dict, path: Path) -> dict[str, int] | None:
        self.validated, self.skipped_in_a_row = run["validated"], run["skipped_in_a_row"]
        self.since_log = {k: list(v) for k, v in run["since_log"].items()}
        uncompared = [split for split in self.data if OLD_FINGERPRINT.fullmatch(run["data"][split])]
        if uncompared:
            print(
                f"note: {path} is of an older version: nothing tells whether {self.args.data_root} still holds its images"
            )
        for split, fingerprint in self.data.items():
            if split not in uncompared and run["data"][split] != fingerprint:
                raise UserError(
                    f"{self.args.data_root}/{split}: other images than those that {path} was trained on; "
                    "bring them back, or start anew with another --save"
                )
        return (
            run["logs_end_at"]
            if path.resolve().parent == (self.folder / "ckpts").resolve()
            else None
        )

    def log(self, n: int, losses: Tensor, accuracies: Tensor, skipped: Tensor) -> None:
        """Take the numbers of the update that ends with episode ``n``; write a line every
        ``--log-freq`` episodes, save every ``--save-minutes``.

        Args:
            losses, accuracies: of its episodes, [] or [M]; skipped: whether it was, [].

        Raises:
            UserError: too many updates in a row had to be skipped.
            Stopped: a signal asked one of the ranks for it; the snapshot is written.
            Lost: another rank has ended.
        """
        self.episode = n
        if self.ranks.rank == 0:
            self._keep_numbers(n, losses, accuracies, skipped)
        stop, save = self.ranks.largest(int(self.signals.stop or 0), int(self.signals.save))
        if stop or save or time.monotonic() - self.saved >= 60 * self.args.save_minutes:
            self.signals.save = False
            self.snapshot(n, LAST)
        if stop:
            raise Stopped(signal.Signals(stop), self.folder, n)

    def _keep_numbers(self, n: int, losses: Tensor, accuracies: Tensor, skipped: Tensor) -> None:
        for kept, value in zip(self.since_log.values(), (losses, accuracies, skipped), strict=True):
            kept.append(value)
        self.bar.update(self.args.meta_batch)
        if n % self.args.log_freq < self.args.meta_batch or n == self.args.episode:
            self._write_line(n)

    def _write_line(self, n: int) -> None:
        loss, accuracy, skipped = self._numbers().values()  # waits for the GPU
        seconds = time.perf_counter() - self.since
        finite = [v for v in loss if math.isfinite(v)]
        mean_loss = summary(finite)["mean"] if finite else math.nan
        mean_accuracy = summary(accuracy)["mean"]
        rate, n_skipped, total = (
            max(n - self.logged, 1) / seconds,
            int(sum(skipped)),
            self.args.episode,
        )
        self.logger.event(
            "train",
            episode=n,
            loss=loss[-1],
            accuracy=accuracy[-1],
            mean_loss=mean_loss,
            mean_accuracy=mean_accuracy,
            skipped=n_skipped,
            time={"seconds": seconds, "episodes_per_second": rate},
        )
        self._board("train", n, mean_loss, mean_accuracy)
        self.logger.info(
            f"[{n:>{len(str(total))}}/{total}] loss {loss[-1]:.4f} (mean {mean_loss:.4f})  "
            f"acc {accuracy[-1]:5.2f} % (mean {mean_accuracy:5.2f} %)  "
            f"{rate:.2f} episodes/s, {_duration((total - n) / rate)} left"
            + (f"  {n_skipped} updates skipped: loss or gradient not finite" if n_skipped else "")
        )
        for v in skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if v else 0
        self.since_log = {k: [] for k in self.since_log}
        self.logged, self.since = n, time.perf_counter()
        if self.skipped_in_a_row >= MAX_SKIPPED:
            good = (
                self.folder / "ckpts" / (BEST if (self.folder / "ckpts" / BEST).exists() else LAST)
            )
            where = (
                f"the last good checkpoint is {good}"
                if good.exists()
                else "no checkpoint was written yet"
            )
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, up to episode {n}; "
                f"{where}; a smaller --lr may help"
            )

    def _numbers(self) -> dict[str, list[float]]:
        """``since_log`` without its tensors."""
        like = {"dtype": torch.float32, "device": self.metalearner.metalstm.cI.device}
        values = {
            k: [torch.as_tensor(v, **like).view(-1) for v in values]
            for k, values in self.since_log.items()
        }
        return {k: torch.cat(v).tolist() if v else [] for k, v in values.items()}

    def _board(self, kind: str, n: int, loss: float, accuracy: float) -> None:
        if self.tensorboard is not None:
            self.tensorboard.add_scalar(f"{kind}/loss", loss, n)
            self.tensorboard.add_scalar(f"{kind}/accuracy", accuracy, n)

    def due(self, n: int) -> bool:
        """Whether it is time to validate. If so, write a snapshot: an end during validation costs
        nothing else.
        """
        args = self.args
        due = (args.val_freq and n % args.val_freq == 0) or n == args.episode
        if not due or self.validated == n:
            return False
        self.episode, self.paused = n, time.perf_counter()
        self.snapshot(n, LAST)
        return True

    def keep(self, n: int, losses: list[float], accuracies: list[float]) -> None:
        """Log the validation of episode ``n`` (empty lists: there was none) and write the
        checkpoints that belong to it.
        """
        self.validated = n
        if self.ranks.rank > 0:
            return
        names = [f"meta-learner-{n}.pth.tar", LAST]
        if accuracies:
            loss, found = summary(losses), summary(accuracies)
            self._board("val", n, loss["mean"], found["mean"])
            # of each episode, too: trials are compared episode by episode (benchmarks/trials.py)
            self.logger.event(
                "val",
                episode=n,
                loss=loss,
                accuracy=found,
                accuracies=[round(v, 2) for v in accuracies],
            )
            better = self.best is None or found["mean"] > self.best["accuracy"]
            if better:
                self.best = {"episode": n, "accuracy": found["mean"], "std": found["std"]}
                names.insert(0, BEST)
            self.logger.info(
                result_line("val", losses, accuracies) + ("  best so far" if better else "")
            )
        self.snapshot(n, *names)
        self.since += time.perf_counter() - self.paused

    def stop_if_asked(self) -> None:
        """End the run if a signal asks for it, during a validation: its snapshot is written
        already.

        Raises:
            Stopped: a signal asks for it.
        """
        if self.signals.stop is not None:
            raise Stopped(self.signals.stop, self.folder, self.episode)

    def snapshot(self, n: int, *names: str) -> None:
        """Write the checkpoint of episode ``n`` under each of the names; the old file stays until
        the new one is complete.
        """
        self.saved = time.monotonic()
        if self.ranks.rank > 0:  # which has nothing that rank 0 has not
            return
        content = {
            "episode": n,
            "mode": self.args.mode,
            "metalearner": self.metalearner.state_dict(),
            "optim": self.optimizer.state_dict(),
            "hyper_parameters": hyper_parameters(self.args),
            "best": self.best,
            "about": self.about,
            "data_root": str(self.args.data_root.resolve()),
            "run": {
                "validated": self.validated,
                "since_log": self._numbers(),
                "skipped_in_a_row": self.skipped_in_a_row,
                "asked_for": self.args.episode,
                "data": self.data,
                "logs_end_at": self.logger.position(),
            },
        }
        checkpoints.save(content, *(self.folder / "ckpts" / name for name in names))

    def say_done(self) -> None:
        """The log's last line."""
        if self.ranks.rank > 0:
            return
        best = f", best by validation: episode {self.best['episode']}" if self.best else ""
        self.bar.close()
        self.logger.info(f"done: {self.folder.name}/ckpts/{LAST}{best}")


def trained(
    given: dict[str, object], defaults: dict[str, object], ranks: Ranks = ALONE
) -> tuple[argparse.Namespace, dict[str, object]]:
    """What to test, or to predict with: ``--resume``, or else the run folder's best checkpoint, or
    its last if validation was off.

    Returns:
        The flags, which take from the checkpoint what is not given, and ``resume`` of which is its
        path; and the checkpoint.

    Raises:
        UserError: there is none, or it cannot adapt yet.
    """
    args, found = settle(given, defaults), None
    if ranks.rank == 0:
        folder, names = run_folder(args), (BEST, LAST)
        own = args.resume in (None, "auto")
        path = (
            checkpoints.held(folder, *names)
            if own
            else checkpoint_of(args.resume, args.seed, *names)
        )
        if path is None:
            raise UserError(
                f"{folder}/ckpts: no checkpoint there; train first, or name one with --resume"
            )
        found = str(path), checkpoints.load(Path(path))
    path, checkpoint = ranks.exchange(found)[0]
    if checkpoint.get("mode") == "pretrain":
        raise UserError(
            f"{path}: is only pre-trained and cannot adapt yet; train a meta-learner with --start {path}"
        )
    args = settle({**given, "resume": path}, defaults, checkpoint.get("hyper_parameters"))
    if not {"data", "data_root"} & given.keys() and "data_root" in checkpoint:
        args.data_root = Path(checkpoint["data_root"])
    return args, checkpoint


def checkpoint_of(named: str, seed: int, *names: str, flag: str = "--resume") -> str:
    """What ``--resume`` or ``--start`` names: a checkpoint, or a run folder, which may be named
    without its seed. Of a folder, the first of ``names`` that it holds, or itself.

    Raises:
        UserError: there is neither.
    """
    place = next((place for place in (named, f"{named}-{seed}") if Path(place).exists()), None)
    if place is None:
        raise UserError(
            f"{flag} {named}: there is neither {named} nor {named}-{seed}; name a checkpoint or a run folder"
        )
    return str(checkpoints.held(Path(place), *names) or place)


def _check_meta_batch(args: argparse.Namespace, done: int, n_ranks: int) -> None:
    """Check that the training, its validations and its position are whole numbers of updates, and
    an update one of ranks.

    Raises:
        UserError: one is not; the message names it.
    """
    m = args.meta_batch
    if m % n_ranks:
        advice = f"give --meta-batch {m + -m % n_ranks}"
        raise UserError(
            f"--meta-batch {m}: {n_ranks} processes cannot divide an update of {m} episodes evenly; {advice}"
        )
    for flag, n in (("--episode", args.episode), ("--val-freq", args.val_freq)):
        if n % m:
            raise UserError(
                f"{flag} {n}: not a multiple of --meta-batch {m}, the episodes of an update; give {n + -n % m}"
            )
    if done % m:
        raise UserError(
            f"--meta-batch {m}: {args.resume} has seen {done} episodes, not a multiple of it; give a divisor"
        )


@contextlib.contextmanager
def _alone(folder: Path):
    """Hold a run folder for this process alone; if nothing was put into it, it goes away again."""
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / "lock"):
            try:
                yield
            finally:
                if os.listdir(folder) == ["lock"]:
                    (folder / "lock").unlink()
                    with contextlib.suppress(
                        OSError
                    ):  # another run has put something into a folder above
                        for empty in made or [folder]:
                            empty.rmdir()
    except OSError as e:
        if e.filename is None or not Path(str(e.filename)).is_relative_to(folder):
            raise
        raise UserError(
            f"{folder}: cannot be written ({e.strerror}); choose another folder with --save"
        ) from e


class Signals:
    """What the outside has asked of this process, looked at between episodes.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal is gone) ask for a snapshot and the end;
    SIGUSR1 (Slurm sends it before it preempts) asks for a snapshot. A second SIGINT ends the
    process at once. A signal that was ignored from the start, such as SIGHUP under nohup or SIGINT
    in a script's background, stays ignored.
    """

    def __init__(self):
        self.stop: signal.Signals | None = None
        self.save = False
        heeded = [s for s in HEEDED if signal.getsignal(s) != signal.SIG_IGN]
        self._before = {s: signal.signal(s, self._note) for s in heeded}

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop is not None:
            raise KeyboardInterrupt
        else:
            self.stop = signal.Signals(number)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for s, handler in self._before.items():
            signal.signal(s, handler)


class Stopped(Exception):
    """A signal ended the run after its snapshot was written."""

    def __init__(self, number: signal.Signals, folder: Path, episode: int):
        super().__init__(
            f"stopped by {number.name} after episode {episode}; continue with --resume auto ({folder})"
        )
        self.exit_code = 128 + number


def begin_worker(_worker: int = 0) -> None:
    """What a worker process does first: ignore signals, since one to the whole group reaches it
    too, and release the locks.

    Workers end with the training. If it is killed they survive it by some seconds, in which it can
    be started again.
    """
    for s in HEEDED:
        signal.signal(s, signal.SIG_IGN)
    release_locks()


def _duration(seconds: float) -> str:
    return (
        time.strftime("%H:%M:%S", time.gmtime(seconds))
        if seconds < 86400
        else f"{seconds / 86400:.1f} days"
    )
