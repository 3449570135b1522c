"""Train and test the LSTM meta-learner, look into it and use it.

    python main.py --mode train --data-root data/miniImagenet
    python main.py --mode test

``python main.py --help`` lists the flags.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

# Deterministic cuBLAS needs its workspace fixed before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

import native
from evaluation import Evaluator, result_line
from options import check_stored, parse, run_folder, settle
from predict import predict
from report import CROSS_SCHEDULE, read_results, table, write_results
from runfolder import BEST, LAST, Stopped, check_run_state, locked
from training import Training, build, episode_dataset, load_metalearner, make_reproducible
from utils import Terminal, UserError, keep_freed_memory, load_checkpoint


def pick_device(args: argparse.Namespace) -> torch.device:
    """The GPU where there is one, else the CPU, with a line that says so.

    Raises:
        UserError: ``--gpu`` names a GPU that is not there.
    """
    n_gpu = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.gpu is not None and args.gpu >= n_gpu:
        raise UserError(f"--gpu {args.gpu}: PyTorch sees {n_gpu} GPUs here; leave the flag out to use the CPU")
    if args.cpu or n_gpu == 0:
        found = "" if args.cpu else " (no GPU found)"
        print(f"device: CPU{found}, {torch.get_num_threads()} threads, {native.library().state}")
        return torch.device("cpu")
    device = torch.device("cuda", args.gpu or 0)
    torch.cuda.set_device(device)
    print(f"device: {torch.cuda.get_device_name(device)}")
    return device


def train(args: argparse.Namespace, device: torch.device, checkpoint: dict | None) -> None:
    """Train in the run folder, alone in it and to be stopped at any time."""
    training = Training(args, device, checkpoint)
    try:
        training.run()
    finally:
        training.close()
    if args.plots:
        show_plots(training.folder)


def show_plots(folder: Path) -> None:
    """Draw a run's pictures and say where they are."""
    from plots import plot  # matplotlib takes a second to load, which other modes need not wait for

    print("drawn: " + " ".join(str(path) for path in plot(folder)))


def test(args: argparse.Namespace, device: torch.device, checkpoint: dict) -> None:
    """Report a checkpoint's accuracy on episodes of the test classes, and keep it in the run folder.

    The episodes are the same for every count in ``--episode-test``: the first 100 of the 600 are the 100. A number of shots
    that the model was not trained on is tested with the authors' schedule for that case.
    """
    make_reproducible(args.seed)
    trained_on = checkpoint.get("hyper_parameters", {}).get("n_shot", args.n_shot)
    learners, metalearner = build(args, device)
    load_metalearner(metalearner, checkpoint, Path(args.resume))
    print(f"testing {args.resume} after {checkpoint['episode']} episodes, on {args.data_root}")
    counts, tests = sorted(set(args.episode_test)), {}
    for n_shot in args.shots or [args.n_shot]:
        schedule = {"epoch": args.epoch, "batch_size": args.batch_size}
        if args.shots and n_shot != trained_on:
            schedule = CROSS_SCHEDULE
        these = argparse.Namespace(**{**vars(args), "n_shot": n_shot, **schedule})
        dataset = episode_dataset(these, "test", counts[-1])
        losses, accuracies = Evaluator(these, device, learners, metalearner)(dataset)
        name = f"test {n_shot}-shot ({schedule['epoch']} x {schedule['batch_size']})" if args.shots else "test"
        for count in counts:
            print(result_line(name, losses[:count], accuracies[:count]))
        tests[n_shot] = {**schedule, "counts": counts, "accuracies": accuracies, "losses": losses}
    folder = Path(args.resume).resolve().parent.parent
    if Path(args.resume).resolve().parent.name == "ckpts":
        content = {
            "checkpoint": Path(args.resume).name,
            "episode": checkpoint["episode"],
            "best": checkpoint.get("best"),
            "seed": args.seed,
            "n_class": args.n_class,
            "data": args.data_root.name,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "tests": tests,
        }
        path = write_results(folder, content)
        print(f"written to {path}\n\n{table([read_results(folder)])}")


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


def read_checkpoint(path: str) -> dict:
    """``utils.load_checkpoint``, with all else that it holds checked before use."""
    content = load_checkpoint(Path(path))
    check_stored(Path(path), content.get("hyper_parameters", {}))
    check_run_state(Path(path), content)
    return content


def begun_with(path: Path, content: dict, given: dict[str, object]) -> None:
    """See that a run goes on with the hyper-parameters that it was begun with.

    Raises:
        UserError: a given flag says otherwise; it is named.
    """
    for name, value in content.get("hyper_parameters", {}).items():
        if name in given and given[name] != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {given[name]}: {path} was begun with {flag} {value}; leave it at that, or choose another --save"
            )


def main(argv: list[str]) -> None:
    given, defaults = parse(argv)
    args = settle(given, defaults)
    resume = given.get("resume")
    if args.mode == "train":
        with locked(run_folder(args)):
            if resume == "auto":
                last = run_folder(args) / "ckpts" / LAST
                resume = str(last) if last.is_file() else None
            checkpoint = read_checkpoint(resume) if resume else None
            if checkpoint is not None:
                begun_with(Path(resume), checkpoint, given)
            args = settle({**given, "resume": resume}, defaults, (checkpoint or {}).get("hyper_parameters"))
            if checkpoint is not None and checkpoint["episode"] == args.episode == checkpoint.get("run", {}).get("validated"):
                print(f"{resume}: has seen all {args.episode} episodes; nothing to do")
                return
            device = pick_device(args)
            keep_freed_memory()
            train(args, device, checkpoint)
    elif args.mode == "plot":
        show_plots(run_folder(args))
    else:
        resume = resume if resume not in (None, "auto") else str(find_checkpoint(args))
        checkpoint = read_checkpoint(resume)
        args = settle({**given, "resume": resume}, defaults, checkpoint.get("hyper_parameters"))
        device = pick_device(args)
        keep_freed_memory()
        if args.mode == "test":
            test(args, device, checkpoint)
        else:
            predict(args, device, checkpoint)


def run(argv: list[str]) -> int:
    """``main`` with its exit code: 2, and one line on stderr, for whatever the user can mend."""
    try:
        main(argv)
    except UserError as error:
        print("error: " + str(error).replace("\n", "\\n"), file=sys.stderr)  # names may hold newlines
        return 2
    except BrokenPipeError:  # who read the output is gone, as `| head` is after ten lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it at the end would fail once more
        return 128 + signal.SIGPIPE
    except OSError as error:  # such as a name too long, or a folder that may not be entered
        if error.filename is None:
            raise
        print("error: " + f"{error.filename}: {error.strerror}".replace("\n", "\\n"), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    Terminal.take_over()
    sys.exit(run(sys.argv[1:]))
