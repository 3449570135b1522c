"""Whole episodes as CUDA graphs. Without a GPU a tape stands in for the graph: it keeps each
operation and the memory that it read and wrote, as a graph does, and plays them again in the same
memory.
"""

import contextlib
import copy
import gc
import json
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, Model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import checkpoint as checkpoints
from episode import Episode, meta_gradient, update_metalearner
from fast import graphs, native
from fast.graphs import CHECKED, WARM_UP, CUDAGraphFunction, step_without_sync
from fast.learner import FastConv4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def storage(tensor):
    return tensor.untyped_storage()


class Tape(TorchDispatchMode):
    """Recording leaves no trace, as with a graph: what it overwrites is put back at the end."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {storage(t)._cdata for t in given}
        if func._schema.is_mutable:
            for t in given:
                if storage(t)._cdata not in self.made | self.before.keys():
                    self.before[storage(t)._cdata] = (storage(t), storage(t).clone())
        out = func(*args, **kwargs)
        fresh = [
            t
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor) and storage(t)._cdata not in known
        ]
        self.made |= {storage(t)._cdata for t in fresh}
        self.operations.append((func, args, kwargs, out, {id(t) for t in fresh}))
        return out

    def put_back(self):
        for now, then in self.before.values():
            now.copy_(then)

    @torch.no_grad()
    def replay(self, takes_part=lambda name: True):
        for func, args, kwargs, out, fresh in self.operations:
            if not takes_part(func._schema.name):
                continue
            again = func(*args, **kwargs)
            for t, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(t, torch.Tensor) and id(t) in fresh:
                    t.copy_(new)


@contextlib.contextmanager
def recording(tape, stream, capture_error_mode):
    """Stands in for torch.cuda.graph."""
    STREAMS.append(stream)
    try:
        with tape:
            yield
    finally:
        tape.put_back()
    STREAMS.pop()  # not after an error, as in torch.cuda.graph


STREAMS = []  # the last one is the current one


@contextlib.contextmanager
def on(stream):
    """Stands in for torch.cuda.stream."""
    before = list(STREAMS)
    STREAMS.append(stream)
    try:
        yield
    finally:
        STREAMS[:] = before


class Stream:
    def wait_stream(self, other):
        pass


class SyncDebug:
    """Stands in for torch.cuda's way of finding waits."""

    mode = 0

    def set(self, mode):
        self.mode = mode

    def wait(self):
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.fixture
def tape(monkeypatch):
    """Makes torch.cuda's graphs tapes on the CPU, and sends the CPU the GPU's way, past the
    kernels.
    """
    sync = SyncDebug()
    STREAMS[:] = [Stream()]
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))
    with mock.patch.multiple(
        torch.cuda,
        Stream=Stream,
        current_stream=lambda: STREAMS[-1],
        stream=on,
        CUDAGraph=Tape,
        graph=recording,
        get_sync_debug_mode=lambda: sync.mode,
        set_sync_debug_mode=sync.set,
    ):
        yield sync


@pytest.fixture(params=DEVICES)
def device(request):
    """The tape on a CPU, graphs on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("tape")
    return torch.device(request.param)


def episodes(n, device, image_size=16):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(5, device=device)
    for _ in range(n):
        support, query = (
            torch.randn(5 * k, 3, image_size, image_size, generator=generator)
            .to(device)
            .contiguous(memory_format=torch.channels_last)
            for k in (2, 3)
        )
        order = torch.stack([torch.randperm(10, generator=generator) for _ in range(2)]).to(device)
        yield Episode(support, y.repeat_interleave(2), query, y.repeat_interleave(3), order)


@pytest.mark.parametrize("conv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("batch_size", "adapt"), [(25, "all"), (4, "all"), (4, "classifier")])
def test_captured_episodes_are_the_eager_ones_bit_for_bit(
    device, batch_size, adapt, conv_dtype, capsys
):
    """Training and testing by turns, from the warm-up into the replays."""
    how = {"conv_dtype": conv_dtype, "device": device, "batch_size": batch_size, "adapt": adapt}
    eager, graphed = (Model("fast", 16, **how) for _ in range(2))
    train, test = graphed.captured("train"), graphed.captured("test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for episode in episodes(WARM_UP + CHECKED + 2, device):
            theirs = (*eager.train(episode), *eager.test(episode))
            assert all(map(torch.equal, (*train(episode), *test(episode)), theirs))
    assert train.graph is not None
    assert test.graph is not None
    assert all(
        torch.equal(a, b) for a, b in zip(graphed.everything(), eager.everything(), strict=True)
    )
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)
    assert capsys.readouterr().out == ""


def test_what_the_check_copies_does_not_hold_on_to_the_parameters(device):
    """A copy with a graph would keep the place where autograd collects a parameter's gradient, on
    the copy's stream.
    """
    train = Model("fast", 16, device=device).captured("train")
    assert not any(t.requires_grad for t in train._copies())


def test_captured_gradients_of_several_episodes_are_the_eager_ones(device, capsys):
    """With ``--meta-batch``, one episode's gradient is the graph; the mean and Adam's step follow
    in the ordinary way.
    """
    eager, graphed = (Model("fast", 16, device=device) for _ in range(2))

    def gradient(episode):
        return meta_gradient(episode, *graphed.learners, graphed.meta, 25)

    captured = CUDAGraphFunction(gradient, (*graphed.learners, graphed.meta))
    group = list(episodes(3, device))
    for _ in range(WARM_UP):  # updates
        for model, function in (
            (eager, lambda e: meta_gradient(e, *eager.learners, eager.meta, 25)),
            (graphed, captured),
        ):
            gradients, losses, _ = map(torch.stack, zip(*map(function, group), strict=True))
            assert not update_metalearner(
                gradients, losses, model.meta, model.optimizer, 0.25, step_without_sync
            )
    assert captured.graph is not None
    assert captured.calls > WARM_UP + CHECKED
    assert all(
        torch.equal(a, b) for a, b in zip(graphed.everything(), eager.everything(), strict=True)
    )
    assert capsys.readouterr().out == ""


def test_results_are_the_callers_to_keep(device):
    """The graph writes its own memory anew each time."""
    test = Model("fast", 16, device=device).captured("test")
    results = [test(episode) for episode in episodes(WARM_UP + CHECKED + 2, device)]
    losses = [loss.item() for loss, _ in results]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("at", [WARM_UP, WARM_UP + CHECKED])
def test_an_update_that_is_not_finite_is_skipped_by_the_graph_too(device, at, capsys):
    """In a checked replay and in a later one."""
    model = Model("fast", 16, device=device)
    train = model.captured("train")
    *good, bad, last = episodes(at + 2, device)
    for episode in good:
        train(episode)
    before = model.everything()
    _, _, skipped = train(bad._replace(query=bad.query * float("nan")))
    assert skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.everything(), strict=True))
    assert not train(last)[2]
    assert not torch.equal(before[0], model.everything()[0])
    assert capsys.readouterr().out == ""


def test_other_shapes_are_refused(device):
    test = Model("fast", 16, device=device).captured("test")
    (first,) = episodes(1, device)
    test(first)
    with pytest.raises(ValueError, match="the first one had"):
        test(first._replace(query=first.query[:5]))


def test_all_calls_read_the_episode_from_the_same_memory(device):
    """Other alignment could mean another algorithm of cuDNN."""
    seen = []
    captured = CUDAGraphFunction(
        lambda episode: seen.append([t.data_ptr() for t in episode]) or (episode.query.sum(),)
    )
    for episode in episodes(WARM_UP + 1, device):
        captured(episode)
    assert len(seen) == WARM_UP + 2  # the recording, and the first check's ordinary way
    assert all(addresses == seen[0] for addresses in seen)


def test_converted_images_are_not_kept_beyond_an_episode(tape):
    """The recording itself converts support and query images, although the learners keep what they
    converted last.
    """
    test = Model("fast", 16, conv_dtype=torch.bfloat16).captured("test")
    for episode in episodes(WARM_UP + 1, "cpu"):
        test(episode)
    converted = {
        storage(args[0])._cdata
        for func, args, kwargs, *_ in test.graph.operations
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
    }
    assert {storage(t)._cdata for t in (test.inputs.support, test.inputs.query)} <= converted


@pytest.mark.parametrize("begin", ["reset_batch_stats", "copy_buffers"])
def test_a_replay_that_overwrites_images_unseen_is_noticed_at_the_next_episode(begin):
    """It changes the memory but not the version by which a learner knows what it converted last."""
    learner, other = (FastConv4(16, 1e-3, 0.95, 5, conv_dtype=torch.bfloat16) for _ in range(2))
    (first, second) = (episode.support for episode in episodes(2, "cpu"))
    seen = first.clone()
    learner(seen)
    seen.data.copy_(second)
    learner.copy_buffers(other) if begin == "copy_buffers" else learner.reset_batch_stats()
    assert torch.equal(learner(seen), learner(second))
    assert not torch.equal(learner(seen), learner(first))


# ---- What can go wrong ----


def test_where_it_cannot_be_recorded_it_goes_on_in_the_ordinary_way(device, capsys, monkeypatch):
    eager, graphed = Model("fast", 16, device=device), Model("fast", 16, device=device)
    train = graphed.captured("train")

    @contextlib.contextmanager
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted\nmore")
        yield

    monkeypatch.setattr(graphs.torch.cuda, "graph", refuse)
    for episode in episodes(WARM_UP + 3, device):
        assert torch.equal(train(episode)[0], eager.train(episode)[0])
    assert capsys.readouterr().out.count("operation not permitted") == 1
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)
    assert gc.isenabled()


def test_a_capture_whose_end_fails_names_the_cause_and_leaves_the_stream(tape, capsys, monkeypatch):
    """Such an end hides what went wrong, and torch.cuda.graph then leaves its stream the current
    one.
    """
    capturing = []

    class Invalid:
        def __init__(self, graph, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            STREAMS.append(self.stream)
            capturing.append(True)

        def __exit__(self, *args):
            capturing.clear()
            raise RuntimeError("capture invalidated")

    def function(episode):
        if capturing:
            raise RuntimeError("a wait in the middle")
        return (episode.query.sum(),)

    monkeypatch.setattr(torch.cuda, "graph", Invalid)
    current, captured = torch.cuda.current_stream(), CUDAGraphFunction(function)
    for episode in episodes(WARM_UP + 2, "cpu"):
        assert captured(episode)[0] == episode.query.sum()
    assert torch.cuda.current_stream() is current
    said = capsys.readouterr().out
    assert "a wait in the middle" in said
    assert said.count("\n") == 1
    assert gc.isenabled()


class Cycle:
    """Garbage as an Evaluator leaves it: its graph goes only when the collector comes."""

    def __init__(self):
        self.me = self


def test_no_garbage_is_collected_during_a_capture(device):
    """An old graph that is destroyed meanwhile invalidates the new one."""
    old = weakref.ref(Cycle())
    alive = []

    def function(episode):
        alive.append((old() is not None, gc.isenabled()))
        return (episode.query.sum(),)

    captured = CUDAGraphFunction(function)
    *warm_up, recorded = episodes(WARM_UP + 1, device)
    gc.disable()
    for episode in warm_up:
        captured(episode)
    gc.enable()
    captured(recorded)
    assert alive[WARM_UP - 1][0]
    assert alive[WARM_UP] == (False, False)
    assert gc.isenabled()


def test_a_number_that_is_baked_in_shows(tape, capsys):
    """The tape and the check see what a graph would miss: a number that Python reads."""
    calls = []

    def guilty(episode):
        return (episode.support.sum() * len(calls), calls.append(0) or episode.query.sum())

    captured = CUDAGraphFunction(guilty)
    for n, episode in enumerate(episodes(WARM_UP + 3, "cpu")):
        found = captured(episode)[0].item()
        assert found == pytest.approx(episode.support.sum().item() * (n + (n >= WARM_UP)), rel=1e-5)
    assert captured.graph is None
    assert capsys.readouterr().out.count("differs") == 1


def test_a_graph_that_does_something_else_is_dropped_and_leaves_no_trace(tape, capsys, monkeypatch):
    """Here it forgets Adam's step: the results are right, the state is not."""
    eager, graphed = Model("fast", 16), Model("fast", 16)
    train = graphed.captured("train")

    def forgetful(self):
        original(self, lambda name: "adam" not in name)

    original = Tape.replay
    monkeypatch.setattr(Tape, "replay", forgetful)
    for episode in episodes(WARM_UP + 3, "cpu"):
        for ours, theirs in zip(train(episode), eager.train(episode), strict=True):
            assert torch.equal(ours, theirs)
    assert train.graph is None
    assert all(
        torch.equal(a, b) for a, b in zip(graphed.everything(), eager.everything(), strict=True)
    )
    assert capsys.readouterr().out.count("differs") == 1


def test_a_second_replay_is_checked_too(tape, monkeypatch):
    """One that is right only the first time."""
    replays = []

    def tired(self):
        replays.append(0)
        if len(replays) == 1:
            original(self)

    original = Tape.replay
    monkeypatch.setattr(Tape, "replay", tired)
    captured = CUDAGraphFunction(lambda episode: (episode.query.sum(),))
    for episode in episodes(WARM_UP + 4, "cpu"):
        assert captured(episode)[0] == episode.query.sum()
    assert len(replays) == CHECKED == 2


@pytest.mark.parametrize("what", ["moments", "parameters"])
def test_a_graph_whose_memory_has_moved_is_dropped(device, what, capsys):
    eager, graphed = Model("fast", 16, device=device), Model("fast", 16, device=device)
    train = graphed.captured("train")
    for n, episode in enumerate(episodes(WARM_UP + CHECKED + 3, device)):
        if n == WARM_UP + CHECKED + 1:
            assert train.graph is not None
            if what == "moments":
                graphed.optimizer.load_state_dict(copy.deepcopy(graphed.optimizer.state_dict()))
            else:
                graphed.meta.metalstm.cI.data = graphed.meta.metalstm.cI.data.clone()
        for ours, theirs in zip(train(episode), eager.train(episode), strict=True):
            assert torch.equal(ours, theirs)
    assert train.graph is None
    assert all(
        torch.equal(a, b) for a, b in zip(graphed.everything(), eager.everything(), strict=True)
    )
    assert capsys.readouterr().out.count("moved") == 1


def test_hidden_waits_are_reported(tape, capsys):
    def function(episode):
        tape.wait()
        return (episode.query.sum(),)

    captured = CUDAGraphFunction(function)
    for episode in episodes(WARM_UP + 2, "cpu"):
        captured(episode)
    said = capsys.readouterr().out
    assert "waits for the GPU 1 times" in said
    assert "test_graphs.py:" in said
    assert said.count("\n") == 1
    assert tape.mode == 0


@pytest.mark.parametrize("device", DEVICES)
def test_adams_count_of_steps_follows_its_parameters_to_the_device(device, monkeypatch):
    """From a checkpoint of the older port, whose Adam was not fused: left on the CPU, the first
    step on a GPU would raise.
    """
    where = (
        "meta" if device == "cpu" else device
    )  # stands in for a GPU: a device that is not the checkpoint's
    old = torch.nn.Parameter(torch.zeros(3))
    stored = torch.optim.Adam([old])
    old.grad = torch.ones(3)
    stored.step()
    content = {"optim": copy.deepcopy(stored.state_dict())}
    for group in content["optim"]["param_groups"]:
        group["fused"] = None
    monkeypatch.setattr(
        sys.modules["torch.optim.adam"],
        "_device_dtype_check_for_fused",
        lambda *args, **kwargs: None,
    )
    new = torch.nn.Parameter(torch.zeros(3, device=where))
    optimizer = torch.optim.Adam([new], fused=True)
    checkpoints.load_optimizer(optimizer, content, Path("old.pth.tar"))
    assert optimizer.param_groups[0]["fused"]
    assert {t.device.type for t in optimizer.state[new].values()} == {where}


def test_tests_and_benchmarks_compute_as_training_does(monkeypatch):
    """Without TF32, and deterministically: PyTorch's defaults on a GPU are otherwise."""

    def settings():
        precise = [
            b.fp32_precision
            for b in (
                torch.backends.cuda.matmul,
                torch.backends.cudnn.conv,
                torch.backends.cudnn.rnn,
            )
        ]
        return *precise, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark

    wanted = ("ieee", "ieee", "ieee", True, False)
    assert settings() == wanted
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.deterministic = (
        "tf32",
        False,
    )  # until the next test
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    run.Model(torch.device("cpu"), plain=False)
    assert settings() == wanted


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "test"])
def test_gpu_and_cpu_agree(mode):
    """Each episode from the same parameters: rounding grows from episode to episode."""
    here, there = Model("fast", 32), Model("fast", 32, device="cuda")
    step, n = there.captured(mode), WARM_UP + CHECKED + 2
    for ours, theirs in zip(episodes(n, "cpu", 32), episodes(n, "cuda", 32), strict=True):
        there.meta.load_state_dict(here.meta.state_dict())
        assert step(theirs)[0].item() == pytest.approx(
            getattr(here, mode)(ours)[0].item(), rel=1e-3
        )


@pytest.mark.gpu
def test_the_benchmark_counts_kernels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    *found, total = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in run.kernels(torch.device("cuda"))[3:]
    ]
    assert {"_convolve", "_filters_backward", "_meta_forward", "_meta_backward"} <= {
        name for name, *_ in found
    }
    assert int(total[1]) >= sum(int(launches) for _, launches, _ in found)


@pytest.mark.gpu
def test_a_wait_is_reported_and_ends_a_capture_but_not_the_next(capsys):
    def function(episode):
        total = episode.query.sum()
        return (total * (total.item() > -1e9),)

    current, waiting = torch.cuda.current_stream(), CUDAGraphFunction(function)
    for episode in episodes(WARM_UP + 2, "cuda"):
        assert waiting(episode)[0] == episode.query.sum()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "waits for the GPU 1 times" in said[0]
    assert "no CUDA graph" in said[1]
    assert torch.cuda.current_stream() == current
    sound = Model("fast", 16, device="cuda").captured("train")
    for episode in episodes(WARM_UP + CHECKED + 1, "cuda"):
        sound(episode)
    assert sound.graph is not None


@pytest.mark.gpu
def test_a_run_on_the_gpu_repeats_itself_and_resumes_to_the_same_bits(master, tmp_path):
    """Through the command line; resumed, other episodes are warm-up than in the run that was not
    stopped.
    """
    import main

    flags = [
        "--mode",
        "train",
        "--data-root",
        str(master),
        "--image-size",
        "32",
        "--n-eval",
        "3",
        "--episode-val",
        "6",
    ]
    flags += [
        "--log-freq",
        "1",
        "--val-freq",
        "6",
        "--seed",
        "1",
        "--resume",
        "auto",
        "--plots",
        "false",
        "--n-workers",
        "2",
    ]
    for name, lengths in (("a", [12]), ("b", [12]), ("c", [5, 12])):
        for length in lengths:
            assert main.run([*flags, "--save", str(tmp_path / name), "--episode", str(length)]) == 0
    found = []
    for name in "abc":
        lines = (tmp_path / f"{name}-1" / "metrics.jsonl").read_text().splitlines()
        events = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
        last = torch.load(
            tmp_path / f"{name}-1" / "ckpts" / "meta-learner-last.pth.tar", weights_only=True
        )
        found.append(([e for e in events if e["event"] == "train"], last["metalearner"]))
    for events, weights in found[1:]:
        assert events == found[0][0]
        assert all(torch.equal(v, found[0][1][k]) for k, v in weights.items())
