"""Train the LSTM meta-learner, test it, look into it and use it.

    python main.py --mode train --data-root data/miniImagenet
    python main.py --mode test

``python main.py --help`` lists the flags. ``train`` below is the paper's algorithm 1: its inner
loop is in episode.py, and the two networks are in learner.py and metalearner.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from itertools import islice
from pathlib import Path

from utils import Terminal, UserError, missing_package, print_error, run_main, step_aside

# Deterministic cuBLAS needs a workspace of fixed size before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Threads that wait for each other spin for long by default: then two trainings side by side take
# four times as long, not twice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if __name__ == "__main__":
    step_aside()  # before PyTorch starts threads
if name := missing_package("torch", "tqdm"):
    sys.exit(
        print_error(f"{name} is missing; run scripts/quickstart.sh, which installs what is needed")
    )

from baselines.pretrain import all_classes, fold_statistics, pretrain_batch
from dataloader import check_apart, episodes, scan_split
from engine import checkpoint as checkpoints
from engine.backend import Way, adam, choose, dataset, make_reproducible
from engine.distributed import Ranks, end
from engine.evaluation import Evaluator, judge
from engine.flags import parse, run_folder, settle
from engine.parallel import MetaBatch
from engine.run import Run, Stopped, begin_worker, checkpoint_of, trained
from episode import learned, train_episode
from learner import FlatModule
from metalearner import MetaLearner
from tools.predict import predict
from tools.results import contradictions, export, provenance, tables, write_results
from tools.trace import RECORDED, record, write_trace


def build(args: argparse.Namespace, way: Way) -> tuple[tuple[FlatModule, FlatModule], MetaLearner]:
    """The pair (learner_w_grad, learner_wo_grad), and the meta-learner, whose cI starts as the
    learner's parameters.
    """
    make_reproducible(args.seed)
    shape = (
        args.image_size,
        args.bn_eps,
        args.bn_momentum,
        args.n_class,
        args.bn_scale,
        args.filters,
        args.adapt,
    )
    learner_w_grad = way.learner(*shape).to(way.device)
    learner_wo_grad = copy.deepcopy(learner_w_grad)
    theta = learner_w_grad.get_flat_params()
    how = (tuple(args.bi_init), tuple(args.bf_init), args.lstm_init, args.grad_divisor)
    metalearner = way.metalearner(args.input_size, args.hidden_size, theta.numel(), *how).to(
        way.device
    )
    metalearner.metalstm.init_cI(theta)
    return (learner_w_grad, learner_wo_grad), metalearner


def learning_rate(args: argparse.Namespace, seen: int) -> float:
    """Of the update that follows ``seen`` episodes: ``--lr``, which at the end falls evenly to 0."""
    return args.lr * min(1.0, (args.episode - seen) / (args.lr_decay * args.episode))


def train(run: Run) -> None:
    """Train the meta-learner for ``--episode`` episodes; validate and save every ``--val-freq``.

    With ``--mode pretrain`` an episode is a batch of all classes, which trains cI alone; nothing is
    validated.
    """
    args, ranks, way = run.args, run.ranks, choose(run.args, run.ranks.local)
    print(f"{way.description}\ntraining on {args.data_root}, into {run.folder}")
    ranks.compare({"device": way.description})
    train_files, val_files = (scan_split(args.data_root, split) for split in ("train", "val"))
    if note := check_apart(train_files, val_files):
        print(note)
    pretraining = args.mode == "pretrain"
    train_set = dataset(args, way, train_files, args.episode, in_order=pretraining)
    val_set = None if pretraining else dataset(args, way, val_files, args.episode_val)
    learners, metalearner = build(args, way)
    optimizer = adam(args, way, learned(metalearner))
    evaluate = Evaluator(args, way, learners, metalearner, ranks)

    def one(episode):
        if pretraining:
            return pretrain_batch(
                episode, learners[0], metalearner, optimizer, args.grad_clip, way.step
            )
        return train_episode(
            episode, *learners, metalearner, optimizer, args.batch_size, args.grad_clip, way.step
        )

    def update(share):
        return step(*share)

    if args.meta_batch == 1:
        step = way.recorded(one, (*learners, metalearner), optimizer)
    else:
        update = MetaBatch(args, way, ranks, learners, metalearner, optimizer)
    done = run.restore(metalearner, optimizer, train_set, val_set, way.device)
    if args.adapt == "classifier" and not run.folded:
        fold_statistics(args, metalearner, train_set)

    def validate(n: int) -> None:
        if run.due(n):
            run.keep(
                n,
                *(evaluate(val_set, run.stop_if_asked) if val_set and args.val_freq else ([], [])),
            )

    validate(done)  # if the last process ended while it validated
    # closing the stream ends its worker processes; a traceback that held it would keep this process
    # from ending
    how = (args.n_workers, way.device, args.pin_mem, begin_worker)
    with contextlib.closing(
        episodes(train_set, done + ranks.rank, *how, step=ranks.size)
    ) as stream:
        for n in range(done + args.meta_batch, args.episode + 1, args.meta_batch):
            if args.lr_decay:
                optimizer.param_groups[0]["lr"].fill_(learning_rate(args, n - args.meta_batch))
            losses, accuracies, skipped = update(islice(stream, args.meta_batch // ranks.size))
            run.log(n, losses, accuracies, skipped)
            validate(n)
    if args.plots and ranks.rank == 0 and not pretraining:
        few = val_set.first(RECORDED)
        write_trace(run.folder, record(few, learners, metalearner, args.batch_size, way.device))
    run.say_done()


def test(args: argparse.Namespace, checkpoint: dict, ranks: Ranks) -> None:
    """Report a checkpoint's accuracy on episodes of the test classes, and keep it in the run
    folder.
    """
    way, path = choose(args, ranks.local), Path(args.resume)
    print(way.description)
    learners, metalearner = build(args, way)
    checkpoints.load_metalearner(metalearner, checkpoint, path)
    print(f"testing {path} after {checkpoint['episode']} episodes, on {args.data_root}")
    stored = checkpoint.get("hyper_parameters", {})
    for name, value in contradictions(args, stored).items():
        print(
            f"note: tested with --{name.replace('_', '-')} {value}, but trained with {stored[name]}"
        )
    trained_on = stored.get("n_shot", args.n_shot)
    tests = judge(args, way, learners, metalearner, trained_on, ranks)
    if ranks.rank == 0 and path.resolve().parent.name == "ckpts":
        folder = path.resolve().parent.parent
        written = write_results(folder, args, checkpoint, tests, provenance(way.device, ranks.size))
        print(f"written to {written}\n\n{tables([folder])}")
        if args.plots and (folder / "plots").is_dir():
            show_plots(folder, "histogram")


def show_plots(folder: Path, wanted: str | None = None) -> None:
    """Draw a run's pictures, or the one that is wanted, and print where they are."""
    from tools.plots import (
        plot,  # matplotlib takes a second to load, which other modes need not wait for
    )

    print("drawn: " + " ".join(str(path) for path in plot(folder, wanted)))


def main(argv: list[str]) -> int:
    try:
        with Ranks.started() as ranks:
            return work(argv, ranks)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code


def work(argv: list[str], ranks: Ranks) -> int:
    given, defaults = parse(argv)
    ranks.compare_start(given)
    args = settle(given, defaults)
    if args.mode not in ("train", "test") and ranks.size > 1:
        raise UserError(f"--mode {args.mode}: is for one process; start it without torchrun")
    if args.mode == "pretrain":
        given["n_class"] = all_classes(settle({"n_class": None, **given}, defaults))
    if args.mode in ("train", "pretrain"):
        with Run(given, defaults, ranks) as run:
            if run.finished:
                print(f"{run.args.resume}: has seen all {run.args.episode} episodes; nothing to do")
                return 0
            train(run)
            if run.args.plots and ranks.rank == 0:
                show_plots(run.folder)
    elif args.mode == "plot":
        folder = (
            run_folder(args)
            if args.resume in (None, "auto")
            else Path(checkpoint_of(args.resume, args.seed))
        )
        show_plots(
            folder.resolve().parent.parent if folder.is_file() else folder
        )  # a checkpoint lies in its run's ckpts/
    elif args.mode == "export":
        print(f"written to {export(run_folder(args))}")
    elif args.mode == "results":
        print(tables([Path(folder) for folder in args.runs or [run_folder(args)]], args.means))
    else:
        args, checkpoint = trained(given, defaults, ranks)
        if args.mode == "test":
            test(args, checkpoint, ranks)
        else:
            way = choose(args)
            learners, metalearner = build(args, way)
            checkpoints.load_metalearner(metalearner, checkpoint, Path(args.resume))
            predict(args, way, learners, metalearner)
    return 0


def run(argv: list[str]) -> int:
    """``main`` with its exit code: 2, and one line on stderr, for whatever the user can mend."""
    return run_main(main, argv)


if __name__ == "__main__":
    Terminal.take_over()
    end(lambda: run(sys.argv[1:]))
