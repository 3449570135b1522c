"""Training the meta-learner: what a run consists of, and how it can stop and go on at any episode."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from capture import Captured
from dataloader import EpisodeDataset, episodes, scan_split
from episode import Episode, train_episode
from evaluation import Evaluator, result_line
from learner import Learner
from metalearner import MetaLearner
from options import hyper_parameters, run_folder
from recording import record, write_trace
from runfolder import BEST, LAST, Signals, Stopped, begin_worker
from utils import Logger, UserError, save_checkpoint, summary

RECORDED = 20  # validation episodes that are followed update by update for the plots
MAX_SKIPPED = 20  # updates in a row whose loss or gradient is not finite


def make_reproducible(seed: int) -> None:
    """Same seed, same bits: seed the initialisation, and let cuDNN choose among deterministic algorithms only.

    TF32, which keeps 10 bits of float32's 23, is off: float32 means float32.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def build(args: argparse.Namespace, device: torch.device) -> tuple[tuple[Learner, Learner], MetaLearner]:
    """The pair (learner_w_grad, learner_wo_grad), and the meta-learner whose cI starts as the learner's parameters."""
    conv_dtype = {"fp32": None, "bf16": torch.bfloat16}[args.precision]
    shape = (args.image_size, args.bn_eps, args.bn_momentum, args.n_class)
    learner_w_grad = Learner(*shape, args.bn_scale, conv_dtype).to(device)
    learner_wo_grad = copy.deepcopy(learner_w_grad)
    flat = learner_w_grad.get_flat_params()
    start = (tuple(args.bi_init), tuple(args.bf_init), args.lstm_init)
    metalearner = MetaLearner(args.input_size, args.hidden_size, flat.numel(), *start).to(device)
    metalearner.metalstm.init_cI(flat)
    return (learner_w_grad, learner_wo_grad), metalearner


def provenance(device: torch.device) -> dict[str, object]:
    """What was run, by which code, on what: command (with names of files instead of their paths), commit, versions, machine."""
    root = Path(__file__).resolve().parent
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    packages = ("torch", "torchvision", "numpy", "pillow")
    return {
        "command": "python " + shlex.join(words),
        "commit": commit,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
    }


def load_metalearner(metalearner: MetaLearner, content: dict, path: Path) -> None:
    """Put a checkpoint's tensors into the meta-learner.

    Raises:
        UserError: they are not those that the flags ask for.
    """
    wanted, found = metalearner.state_dict(), content["metalearner"]
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{path}: its meta-learner {'lacks' if name in wanted else 'has a strange'} {name}")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} is {list(found[name].shape)}, but the flags make it {list(tensor.shape)}; "
                "--image-size, --n-class and --hidden-size must be those of its training"
            )
    metalearner.load_state_dict(found)


def episode_dataset(args: argparse.Namespace, split: str, length: int) -> EpisodeDataset:
    shape = {k: getattr(args, k) for k in ("n_class", "n_shot", "n_eval", "image_size", "augment", "pixels", "shuffle")}
    found = scan_split(args.data_root, split)
    cache_dir = Path(args.cache_dir) if args.cache_dir else None
    return EpisodeDataset(found, args.seed, n_pass=args.epoch, length=length, cache_dir=cache_dir, **shape)


class Training:
    """A run: its data, its models, and how far it has come. All that the next episode depends on is in ``snapshot``."""

    def __init__(self, args: argparse.Namespace, device: torch.device, checkpoint: dict | None):
        make_reproducible(args.seed)
        self.args, self.device, self.folder = args, device, run_folder(args)
        self.train_set = episode_dataset(args, "train", args.episode)
        self.val_set = episode_dataset(args, "val", args.episode_val)
        self.data = {s.split.name: s.fingerprint for s in (self.train_set, self.val_set)}
        self.learners, self.metalearner = build(args, device)
        self.evaluate = Evaluator(args, device, self.learners, self.metalearner)
        learned = [p for p in self.metalearner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=args.lr, fused=True)
        self.step = Captured(self.train_episode, self.optimizer) if device.type == "cuda" else self.train_episode
        self.done, self.validated, self.best = 0, 0, None
        self.since_log = {"loss": [], "accuracy": [], "skipped": []}  # of the episodes since the last line of the log
        self.skipped_in_a_row = 0
        self.about = (checkpoint or {}).get("about") or provenance(device)
        logs_end_at = None
        if checkpoint is not None:
            load_metalearner(self.metalearner, checkpoint, Path(args.resume))
            load_optimizer(self.optimizer, checkpoint, Path(args.resume), args.lr)
            self.done = self.validated = checkpoint["episode"]
            self.best = checkpoint.get("best")
            if "run" in checkpoint:
                run = checkpoint["run"]
                self.validated, self.skipped_in_a_row = run["validated"], run["skipped_in_a_row"]
                self.since_log = {k: list(v) for k, v in run["since_log"].items()}
                for split, fingerprint in self.data.items():
                    if run["data"][split] != fingerprint:
                        raise UserError(
                            f"{args.data_root}/{split}: other images than those that {args.resume} was trained on; "
                            "bring them back, or start anew with another --save"
                        )
                if Path(args.resume).resolve().parent == (self.folder / "ckpts").resolve():
                    logs_end_at = run["logs_end_at"]
            if self.done > args.episode:
                raise UserError(f"--episode {args.episode}: {args.resume} has seen {self.done} already; ask for more")
        if logs_end_at is None and (self.folder / "ckpts" / LAST).exists():
            raise UserError(f"{self.folder}: holds a run already; go on with --resume auto, or choose another --save or --seed")
        self.logger = Logger(self.folder, logs_end_at or dict.fromkeys(Logger.NAMES, 0))
        self.tensorboard = open_tensorboard(self.folder, self.done) if args.tensorboard else None
        for left in (self.folder / "ckpts").glob(".*.tmp"):  # by a process that was killed while it wrote; the folder is ours
            left.unlink(missing_ok=True)
        self.signals = Signals()
        self.saved = time.monotonic()

    def train_episode(self, episode: Episode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        args = self.args
        return train_episode(episode, *self.learners, self.metalearner, self.optimizer, args.batch_size, args.grad_clip)

    def snapshot(self, *names: str) -> None:
        """Write the checkpoint under each of the names in ``ckpts/``; what was there stays until the new one is whole."""
        content = {
            "episode": self.done,
            "metalearner": self.metalearner.state_dict(),
            "optim": self.optimizer.state_dict(),
            "hyper_parameters": hyper_parameters(self.args),
            "best": self.best,
            "about": self.about,
            "run": {
                "validated": self.validated,
                "since_log": {k: [float(v) for v in values] for k, values in self.since_log.items()},
                "skipped_in_a_row": self.skipped_in_a_row,
                "data": self.data,
                "logs_end_at": self.logger.position(),
            },
        }
        save_checkpoint(content, *(self.folder / "ckpts" / name for name in names))
        self.saved = time.monotonic()

    def heed_signals(self) -> None:
        """Save, and stop, if a signal or the clock asks for it."""
        stop = self.signals.stop
        if stop is not None or self.signals.save or time.monotonic() - self.saved >= 60 * self.args.save_minutes:
            self.signals.save = False
            self.snapshot(LAST)
        if stop is not None:
            raise Stopped(stop, self.folder, self.done)

    def log(self, seconds: float) -> None:
        """A line and an event for the episodes since the last one.

        Raises:
            UserError: too many updates in a row had to be skipped.
        """
        args = self.args
        loss, accuracy, skipped = (
            torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values]).tolist()
            for values in self.since_log.values()
        )
        finite = [v for v in loss if math.isfinite(v)]
        mean_loss = summary(finite)["mean"] if finite else math.nan
        mean_accuracy = summary(accuracy)["mean"]
        rate = max(self.done - self.logged, 1) / seconds
        n_skipped = int(sum(skipped))
        self.logger.event(
            "train",
            episode=self.done,
            loss=loss[-1],
            accuracy=accuracy[-1],
            mean_loss=mean_loss,
            mean_accuracy=mean_accuracy,
            skipped=n_skipped,
            time={"seconds": seconds, "episodes_per_second": rate},
        )
        if self.tensorboard is not None:
            self.tensorboard.add_scalar("train/loss", mean_loss, self.done)
            self.tensorboard.add_scalar("train/accuracy", mean_accuracy, self.done)
        self.logger.info(
            f"[{self.done:>{len(str(args.episode))}}/{args.episode}] loss {loss[-1]:.4f} (mean {mean_loss:.4f})  "
            f"acc {accuracy[-1]:5.2f} % (mean {mean_accuracy:5.2f} %)  "
            f"{rate:.2f} episodes/s, {_duration((args.episode - self.done) / rate)} left"
            + (f"  {n_skipped} updates skipped: loss or gradient not finite" if n_skipped else "")
        )
        for v in skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if v else 0
        self.since_log = {k: [] for k in self.since_log}
        self.logged = self.done
        if self.skipped_in_a_row >= MAX_SKIPPED:
            good = self.folder / "ckpts" / (BEST if (self.folder / "ckpts" / BEST).exists() else LAST)
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite, up to episode "
                f"{self.done}; " + (f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written yet")
                + "; a smaller --lr may help"
            )

    def validate(self) -> None:
        """Validate if that is due, and write the checkpoints that go with it."""
        args = self.args
        due = (args.val_freq and self.done % args.val_freq == 0) or self.done == args.episode
        if not due or self.validated == self.done:
            return
        self.snapshot(LAST)  # an end during validation costs the validation only
        names = [f"meta-learner-{self.done}.pth.tar", LAST]
        if args.val_freq:
            loss, accuracy = self.evaluate(self.val_set, self.stop_if_asked)
            found = summary(accuracy)
            if self.tensorboard is not None:
                self.tensorboard.add_scalar("val/loss", summary(loss)["mean"], self.done)
                self.tensorboard.add_scalar("val/accuracy", found["mean"], self.done)
            self.logger.event("val", episode=self.done, loss=summary(loss), accuracy=found)
            better = self.best is None or found["mean"] > self.best["accuracy"]
            if better:
                self.best = {"episode": self.done, "accuracy": found["mean"], "std": found["std"]}
                names.insert(0, BEST)
            self.logger.info(result_line("val", loss, accuracy) + ("  best so far" if better else ""))
        self.validated = self.done
        self.snapshot(*names)

    def close(self) -> None:
        """Let go of the logs and the signals."""
        self.signals.restore()
        self.logger.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def stop_if_asked(self) -> None:
        """During validation, whose snapshot is written already."""
        if self.signals.stop is not None:
            raise Stopped(self.signals.stop, self.folder, self.done)

    def run(self) -> None:
        """Train the meta-learner for ``--episode`` episodes, validating and saving every ``--val-freq``."""
        args, logger = self.args, self.logger
        sizes = (
            f"{args.n_class}-way {args.n_shot}-shot, {args.image_size} px, {self.metalearner.metalstm.cI.numel()} learner "
            f"parameters; {args.data_root}: {len(self.train_set.split.classes)} classes to train on, "
            f"{len(self.val_set.split.classes)} to validate on; episodes {self.done + 1} to {args.episode}, into {self.folder}"
        )
        if self.done == 0:
            logger.info(sizes)
        else:  # not for the log, which is to be that of an undisturbed run
            print(f"going on after episode {self.done} of {args.episode}, in {self.folder}")
        bar = tqdm(total=args.episode, initial=self.done, desc="train", unit="ep", disable=None)
        self.validate()
        self.logged, since = self.done, time.perf_counter()
        # closed, its worker processes end; left to an exception's traceback, they would keep the process from ending
        with contextlib.closing(
            episodes(self.train_set, self.done, args.n_workers, self.device, args.pin_mem, begin_worker)
        ) as stream:
            for episode in stream:
                found = self.step(episode)
                self.done += 1
                for k, v in zip(self.since_log, found, strict=True):
                    self.since_log[k].append(v)
                bar.update()
                if self.done % args.log_freq == 0 or self.done == args.episode:
                    self.log(time.perf_counter() - since)
                    since = time.perf_counter()
                self.heed_signals()
                paused = time.perf_counter()
                self.validate()
                since += time.perf_counter() - paused
        bar.close()
        if args.plots:
            few = self.val_set.first(RECORDED)
            write_trace(self.folder, record(few, self.evaluate.pairs[0], self.metalearner, args.batch_size, self.device))
        best = f", best by validation: episode {self.best['episode']}" if self.best else ""
        logger.info(f"done: {self.folder / 'ckpts' / LAST}{best}")


def open_tensorboard(folder: Path, done: int):
    """A writer whose numbers after episode ``done``, if any, were those of a killed process and are hidden.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from e
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: dict, path: Path, lr: float) -> None:
    """Put a checkpoint's moments into Adam, whose settings stay the flags'.

    Raises:
        UserError: they do not fit.
    """
    try:
        optimizer.load_state_dict(checkpoint["optim"])
        for p, state in optimizer.state.items():
            if state["exp_avg"].shape != p.shape or state["exp_avg_sq"].shape != p.shape:
                raise ValueError("moments of another shape")
        if len(optimizer.state) not in (0, len(optimizer.param_groups[0]["params"])):
            raise ValueError("moments of other parameters")
        for group in optimizer.param_groups:
            group.update(lr=lr, fused=True, foreach=None, capturable=False)
    except Exception as e:  # whatever stands there instead of Adam's state
        raise UserError(f"{path}: its optimiser's state does not fit ({type(e).__name__}: {e}); it can only be tested") from e


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
