"""Train and test the LSTM meta-learner.

    python main.py --mode train --data-root data/miniImagenet
    python main.py --mode test

``python main.py --help`` lists the flags.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from pathlib import Path

# Deterministic cuBLAS needs its workspace fixed before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from tqdm import tqdm

import dataloader
from episode import evaluate_episode, train_episode
from learner import Learner
from metalearner import MetaLearner
from options import hyper_parameters, parse, run_folder, settle
from utils import Logger, UserError, load_checkpoint, save_checkpoint, summary

BEST, LAST = "meta-learner-best.pth.tar", "meta-learner-last.pth.tar"


def pick_device(args: argparse.Namespace) -> torch.device:
    """The GPU where there is one, else the CPU, with a line that says so.

    Raises:
        UserError: ``--gpu`` names a GPU that is not there.
    """
    n_gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.gpu is not None and args.gpu >= n_gpu:
        raise UserError(f"--gpu {args.gpu}: PyTorch sees {n_gpu} GPUs here; leave the flag out to use the CPU")
    if args.cpu or n_gpu == 0:
        print(f"device: CPU, {torch.get_num_threads()} threads" + ("" if args.cpu else " (no GPU found)"))
        return torch.device("cpu")
    device = torch.device("cuda", args.gpu or 0)
    torch.cuda.set_device(device)
    print(f"device: {torch.cuda.get_device_name(device)}")
    return device


def make_reproducible(seed: int) -> None:
    """Same seed, same bits: seed the initialisation, and let cuDNN choose among deterministic algorithms only."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def build(args: argparse.Namespace, device: torch.device) -> tuple[tuple[Learner, Learner], MetaLearner]:
    """The pair (learner_w_grad, learner_wo_grad), and the meta-learner whose cI starts as the learner's parameters."""
    conv_dtype = {"fp32": None, "bf16": torch.bfloat16}[args.precision]
    learner_w_grad = Learner(args.image_size, args.bn_eps, args.bn_momentum, args.n_class, conv_dtype).to(device)
    learner_wo_grad = copy.deepcopy(learner_w_grad)
    flat = learner_w_grad.get_flat_params()
    metalearner = MetaLearner(args.input_size, args.hidden_size, flat.numel(), tuple(args.bi_init)).to(device)
    metalearner.metalstm.init_cI(flat)
    return (learner_w_grad, learner_wo_grad), metalearner


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


def episode_dataset(args: argparse.Namespace, split: str, length: int) -> dataloader.EpisodeDataset:
    shape = {k: getattr(args, k) for k in ("n_class", "n_shot", "n_eval", "image_size", "augment")}
    found = dataloader.scan_split(args.data_root, split)
    cache_dir = Path(args.cache_dir) if args.cache_dir else None
    return dataloader.EpisodeDataset(found, args.seed, n_pass=args.epoch, length=length, cache_dir=cache_dir, **shape)


def evaluate(
    args: argparse.Namespace,
    dataset: dataloader.EpisodeDataset,
    learners: tuple[Learner, Learner],
    metalearner: MetaLearner,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, float]]:
    """Adapt to each episode of a data set and report on its query images.

    Returns:
        ``utils.summary`` of the losses and of the accuracies in percent.
    """
    losses, accuracies = [], []
    bar = tqdm(total=len(dataset), desc=dataset.split.name, unit="ep", leave=False, disable=None)
    for episode in dataloader.episodes(dataset, 0, args.n_workers, device, args.pin_mem):
        loss, accuracy = evaluate_episode(episode, *learners, metalearner, args.batch_size)
        losses.append(loss)
        accuracies.append(accuracy)
        bar.update()
    bar.close()
    return summary(torch.stack(losses).tolist()), summary(torch.stack(accuracies).tolist())


def result_line(what: str, loss: dict[str, float], accuracy: dict[str, float]) -> str:
    return (
        f"{what}, {accuracy['n']} episodes: accuracy {accuracy['mean']:.2f} ± {accuracy['ci95']:.2f} % "
        f"(std {accuracy['std']:.2f}), loss {loss['mean']:.4f}"
    )


def train(args: argparse.Namespace, device: torch.device, checkpoint: dict | None) -> None:
    """Train the meta-learner for ``args.episode`` episodes, validating and saving every ``args.val_freq``."""
    make_reproducible(args.seed)
    train_set = episode_dataset(args, "train", args.episode)
    val_set = episode_dataset(args, "val", args.episode_val)
    learners, metalearner = build(args, device)
    val_learners = copy.deepcopy(learners)
    optimizer = torch.optim.Adam(metalearner.parameters(), lr=args.lr)
    done, best = 0, None
    if checkpoint is not None:
        load_metalearner(metalearner, checkpoint, Path(args.resume))
        optimizer.load_state_dict(checkpoint["optim"])
        for g in optimizer.param_groups:
            g["lr"] = args.lr
        done, best = checkpoint["episode"], checkpoint.get("best")
        if done >= args.episode:
            raise UserError(f"--episode {args.episode}: {args.resume} has seen {done} episodes already; ask for more")

    folder = run_folder(args)
    logger = Logger(folder)
    logger.info(
        f"{args.n_class}-way {args.n_shot}-shot, {args.image_size} px, {metalearner.metalstm.cI.numel()} learner parameters; "
        f"{args.data_root}: {len(train_set.split.classes)} classes to train on, {len(val_set.split.classes)} to validate on; "
        f"episodes {done + 1} to {args.episode}, into {folder}"
    )
    bar = tqdm(total=args.episode, initial=done, desc="train", unit="ep", disable=None)
    losses, accuracies, since = [], [], time.perf_counter()
    batches = dataloader.episodes(train_set, done, args.n_workers, device, args.pin_mem)
    for episode in batches:
        done += 1
        loss, accuracy = train_episode(episode, *learners, metalearner, optimizer, args.batch_size, args.grad_clip)
        losses.append(loss)
        accuracies.append(accuracy)
        bar.update()
        last = done == args.episode
        if done % args.log_freq == 0 or last:
            loss, accuracy = torch.stack(losses).tolist(), torch.stack(accuracies).tolist()
            seconds = time.perf_counter() - since
            rate = len(loss) / seconds
            mean = {"loss": summary(loss)["mean"], "accuracy": summary(accuracy)["mean"]}
            logger.event(
                "train",
                episode=done,
                loss=loss[-1],
                accuracy=accuracy[-1],
                mean_loss=mean["loss"],
                mean_accuracy=mean["accuracy"],
                time={"seconds": seconds, "episodes_per_second": rate},
            )
            logger.info(
                f"[{done:>{len(str(args.episode))}}/{args.episode}] loss {loss[-1]:.4f} (mean {mean['loss']:.4f})  "
                f"acc {accuracy[-1]:5.2f} % (mean {mean['accuracy']:5.2f} %)  "
                f"{rate:.2f} episodes/s, {_duration((args.episode - done) / rate)} left"
            )
            losses, accuracies, since = [], [], time.perf_counter()
        if (args.val_freq and done % args.val_freq == 0) or last:
            paused = time.perf_counter()
            names = [f"meta-learner-{done}.pth.tar", LAST]
            if args.val_freq:
                val_loss, val_accuracy = evaluate(args, val_set, val_learners, metalearner, device)
                logger.event("val", episode=done, loss=val_loss, accuracy=val_accuracy)
                better = best is None or val_accuracy["mean"] > best["accuracy"]
                if better:
                    best = {"episode": done, "accuracy": val_accuracy["mean"]}
                    names.append(BEST)
                logger.info(result_line("val", val_loss, val_accuracy) + ("  best so far" if better else ""))
            content = {
                "episode": done,
                "metalearner": metalearner.state_dict(),
                "optim": optimizer.state_dict(),
                "hyper_parameters": hyper_parameters(args),
                "best": best,
            }
            save_checkpoint(content, *(folder / "ckpts" / name for name in names))
            since += time.perf_counter() - paused
    bar.close()
    logger.info(f"done: {folder / 'ckpts' / LAST}" + (f", best by validation: episode {best['episode']}" if best else ""))
    logger.close()


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def test(args: argparse.Namespace, device: torch.device, checkpoint: dict) -> None:
    """Report a checkpoint's accuracy on episodes of the test classes."""
    make_reproducible(args.seed)
    dataset = episode_dataset(args, "test", args.episode_test)
    learners, metalearner = build(args, device)
    load_metalearner(metalearner, checkpoint, Path(args.resume))
    print(f"testing {args.resume} after {checkpoint['episode']} episodes, on {args.data_root}")
    print(result_line("test", *evaluate(args, dataset, learners, metalearner, device)))


def find_checkpoint(args: argparse.Namespace) -> Path:
    """The run folder's best checkpoint, or its last where validation was off.

    Raises:
        UserError: there is none.
    """
    folder = run_folder(args) / "ckpts"
    for name in (BEST, LAST):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no checkpoint there; train first, or name one with --resume")


def main(argv: list[str]) -> None:
    given, defaults = parse(argv)
    args = settle(given, defaults)
    if args.mode == "test" and args.resume is None:
        given["resume"] = str(find_checkpoint(args))
    checkpoint = load_checkpoint(Path(given["resume"])) if given.get("resume") else None
    if checkpoint is not None:
        args = settle(given, defaults, checkpoint.get("hyper_parameters"))
    device = pick_device(args)
    if args.mode == "train":
        train(args, device, checkpoint)
    else:
        test(args, device, checkpoint)


def run(argv: list[str]) -> int:
    """``main`` with its exit code: 2, and one line on stderr, for whatever the user can mend."""
    try:
        main(argv)
    except UserError as error:
        print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)  # names may hold newlines
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
