"""Train and test the LSTM meta-learner, plot its runs and predict with it.

    python main.py --mode train --data-root data/miniImagenet

``train`` is algorithm 1; episode.py has its inner loop, learner.py and metalearner.py the networks.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

from engine import process
from engine.flags import check, parse, resolve
from utils import UserError, counted

if __name__ == "__main__":
    process.Terminal.take_over()
    if code := process.run_main(check, sys.argv[1:]):  # before the slow imports
        sys.exit(code)
    process.announce("importing PyTorch")
if code := process.run_main(process.check_packages, process.PACKAGES):
    sys.exit(code)

from baselines.methods import BUILDERS, load_start, training_splits
from baselines.pretrain import with_all_classes
from data.layout import check_splits, scan_split
from engine.backend import Backend, adam, dataset, make_learner, make_metalearner, select_backend
from engine.checkpoint import load_for_test, load_weights, trained_shots
from engine.distributed import SINGLE_PROCESS, Ranks
from engine.ema import averaged_copy, chosen_weights, saved_modules
from engine.evaluation import Evaluator, run_test
from engine.folder import locked
from engine.model import Model, Trainable
from engine.parallel import make_train_step
from engine.run import Run
from episode import trainable_parameters
from tools import export, plots, predict, results, tables, trace
from tools.predictor import Predictor


def build(args: argparse.Namespace, backend: Backend) -> Trainable:
    """Line 1 of algorithm 1: make both learners and the meta-learner, whose cI starts as theirs."""
    kind = args.method if args.mode != "pretrain" else "pretrain"
    if kind != "lstm":
        return BUILDERS[kind](args, backend)
    learner_w_grad = make_learner(args, backend)
    learner_wo_grad = copy.deepcopy(learner_w_grad)
    metalearner = make_metalearner(args, backend, learner_w_grad)
    return Model(metalearner, (learner_w_grad, learner_wo_grad))


def train(cli_args: dict[str, object], ranks: Ranks) -> None:
    """Algorithm 1: train the meta-learner for ``--episode`` episodes."""
    with locked(cli_args, ranks) as folder:
        args = folder.args
        if folder.finished():
            return
        backend = select_backend(args, ranks.local)
        print(f"{backend.description}\ntraining on {args.data_root}, into {folder.path}")
        ranks.compare({"device": backend.description})
        seen_classes = folder.origin[1].get("classes", ()) if folder.origin else ()
        check_splits(args.data_root, seen_classes, ("val", "test"))
        splits = {k: scan_split(args.data_root, of) for k, of in training_splits(args).items()}
        lengths = {"train": args.episode, "val": args.episode_val}
        in_order = args.mode == "pretrain"
        sets = {k: dataset(args, backend, of, lengths[k], in_order) for k, of in splits.items()}
        model = build(args, backend)
        optimizer = adam(args, backend, trainable_parameters(model.metalearner))
        if folder.checkpoint is None:
            load_start(args, model, folder.origin, sets["train"])
        averaged = averaged_copy(args, model)
        with Run(folder, saved_modules(model, averaged), optimizer, sets, backend.device) as run:
            train_step = make_train_step(args, backend, model, optimizer, ranks, averaged)
            evaluator, val_set = Evaluator(args, backend, averaged, ranks), sets.get("val")
            for n, batch in run.batches(partial(evaluator, val_set, run.heed_signals)):
                run.log(n, *train_step(n, batch))
            run.finish()
        if args.plots and ranks.rank == 0:
            process.announce("plotting the run")
            trace.write_trace(folder.path, val_set, averaged, args.batch_size, backend.device)
            plots.draw(folder.path)


def load_model(
    cli_args: dict[str, object], ranks: Ranks = SINGLE_PROCESS
) -> tuple[argparse.Namespace, dict, Backend, Trainable]:
    """Load a model for test or prediction: its flags, checkpoint, backend and networks."""
    args, checkpoint = load_for_test(cli_args, ranks)
    backend = select_backend(args, ranks.local)
    model = build(args, backend)
    load_weights(model.saved, chosen_weights(args, checkpoint), Path(args.resume))
    return args, checkpoint, backend, model


def test(cli_args: dict[str, object], ranks: Ranks) -> None:
    """Report a checkpoint's accuracy on episodes of the test classes, and record it in the run."""
    args, checkpoint, backend, model = load_model(cli_args, ranks)
    seen = counted(checkpoint["episode"], "episode")
    print(f"{backend.description}\ntesting {args.resume} after {seen}")
    folder = results.folder_of(Path(args.resume)) if ranks.rank == 0 else None
    check_splits(args.data_root, checkpoint.get("classes", ()))
    for note in results.contradiction_notes(args, checkpoint):
        print(note)
    tests = run_test(args, backend, model, trained_shots(checkpoint, args), ranks)
    if folder is not None:
        tables.report(folder, args, checkpoint, tests, backend.device, ranks.size)


def load_predictor(cli_args: dict[str, object], ranks: Ranks = SINGLE_PROCESS) -> Predictor:
    """Load a model that adapts to the user's examples and classifies images."""
    args, checkpoint, backend, model = load_model(cli_args, ranks)
    for note in results.contradiction_notes(args, checkpoint):
        print(note)
    return Predictor(args, backend, model, trained_shots(checkpoint, args))


MODES = {
    "train": train,
    "test": test,
    "pretrain": lambda cli_args, ranks: train(with_all_classes(cli_args), ranks),
    "predict": lambda *args: predict.predict(load_predictor(*args)),
    "plot": lambda cli_args, _: plots.plot_mode(cli_args, load_model),
    "results": lambda cli_args, _: tables.results_mode(resolve(cli_args)),
    "export": lambda cli_args, _: export.export_mode(resolve(cli_args)),
}


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    process.announce("")
    try:
        with Ranks.started() as ranks, process.explain_failures():
            cli_args = parse(argv)
            ranks.compare_start(cli_args)
            mode = str(cli_args.get("mode", "train"))
            if mode not in ("train", "test") and ranks.size > 1:
                raise UserError(f"--mode {mode}: is for one process; start it without torchrun")
            MODES[mode](cli_args, ranks)
    except process.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    process.exit_process(lambda: process.run_main(main, sys.argv[1:]))
