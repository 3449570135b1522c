"""Whole episodes as CUDA graphs. Without a GPU a tape stands in for the graph: it replays each
operation in the memory that it read and wrote.
"""

import contextlib
import copy
import gc
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import Model, assert_same, metrics, new_episode, poisoned, run_cli, same, succeeded
from conftest import tensors as checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import checkpoint as checkpoints
from episode import Episode, meta_gradient, update_metalearner
from fast import native
from fast.graphs import CHECKED, WARM_UP, CUDAGraphFunction, step_without_sync
from fast.learner import FastConv4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SLOW = pytest.mark.slow


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()


class Tape(TorchDispatchMode):
    """Like a capture, recording leaves no trace: what it overwrites is put back at the end."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        known = {storage(t)._cdata for t in inputs}
        if func._schema.is_mutable:
            for t in inputs:
                if storage(t)._cdata not in self.made | self.before.keys():
                    self.before[storage(t)._cdata] = (storage(t), storage(t).clone())
        out = func(*args, **kwargs)
        fresh = [t for t in tensors(out) if storage(t)._cdata not in known]
        self.made |= {storage(t)._cdata for t in fresh}
        self.operations.append((func, args, kwargs, out, {id(t) for t in fresh}))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for now, then in self.before.values():
            now.copy_(then)

    @torch.no_grad()
    def replay(self, takes_part=lambda name: True):
        for func, args, kwargs, out, fresh in self.operations:
            if takes_part(func._schema.name):
                again = func(*args, **kwargs)
                for t, new in zip(tensors(out), tensors(again), strict=True):
                    if id(t) in fresh:
                        t.copy_(new)


@pytest.fixture
def tape(monkeypatch):
    """Replaces torch.cuda's graphs by tapes, and the CPU kernels by what a GPU would run; gives the
    function that sets the sync debug mode.
    """
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))
    stand_ins = {"CUDAGraph": Tape, "graph": lambda tape, **_: tape, "Stream": mock.Mock}
    stand_ins |= {"current_stream": mock.Mock(), "stream": contextlib.nullcontext}
    stand_ins |= {"get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": mock.Mock()}
    with mock.patch.multiple(torch.cuda, **stand_ins):
        yield torch.cuda.set_sync_debug_mode


@pytest.fixture(params=DEVICES)
def device(request):
    """The tape on a CPU, graphs on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("tape")
    return torch.device(request.param)


def episodes(n, device="cpu", image_size=16):
    def moved(t):
        return t.to(device, memory_format=torch.channels_last) if t.dim() == 4 else t.to(device)

    torch.manual_seed(1)
    drawn = [new_episode(5, n_eval=3, size=image_size) for _ in range(n)]
    return [Episode(*map(moved, episode)) for episode in drawn]


def query_sum(episode):
    return (episode.query.sum(),)


def model(device="cpu", **options):
    """The published networks on a GPU; on a CPU the smallest that do the same."""
    small = {} if torch.device(device).type == "cuda" else {"hidden_size": 4, "n_filters": 8}
    return Model("fast", 16, device=device, **small, **options)


def two_models(device="cpu", **options):
    """An eager model and one to be captured, alike."""
    return model(device, **options), model(device, **options)


def one_line(capsys):
    """The only line of output."""
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.parametrize(
    ("batch_size", "conv_dtype", "second_order"),
    [
        (6, None, False),
        pytest.param(25, None, False, marks=SLOW),
        pytest.param(4, torch.bfloat16, False, marks=SLOW),
        pytest.param(25, None, True, marks=SLOW),
    ],
)
def test_captured_episodes_match_eager_bits(device, batch_size, conv_dtype, second_order, capsys):
    """Training and testing by turns, from the warm-up into the replays."""
    eager, graphed = two_models(device, batch_size=batch_size, conv_dtype=conv_dtype)
    for meta in (eager.meta, graphed.meta):
        meta.second_order = meta.final_stats = second_order
    train, test = graphed.captured("train"), graphed.captured("test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for episode in episodes(WARM_UP + CHECKED + 2, device):
            expected = (*eager.train(episode), *eager.test(episode))
            assert same((*train(episode), *test(episode)), expected)
    assert train.graph is not None
    assert test.graph is not None
    assert not any(t.requires_grad for t in train._copy_state())  # autograd would remember a stream
    assert same(graphed.everything(), eager.everything())
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)
    assert capsys.readouterr().out == ""


def test_captured_gradients_match_eager_bits(device, capsys):
    """With ``--meta-batch`` the graph is one episode's gradient; mean and Adam's step are eager."""
    eager, graphed = two_models(device)
    functions = [lambda e, m=m: meta_gradient(e, *m.learners, m.meta, 25) for m in (eager, graphed)]
    captured = CUDAGraphFunction(functions[1], (*graphed.learners, graphed.meta))
    batch = episodes(3, device)
    for _ in range(WARM_UP):
        for model, function in ((eager, functions[0]), (graphed, captured)):
            gradients, losses, _ = map(torch.stack, zip(*map(function, batch), strict=True))
            step = model.meta, model.optimizer, 0.25, step_without_sync
            assert not update_metalearner(gradients, losses, *step)
    assert captured.graph is not None
    assert captured.calls > WARM_UP + CHECKED
    assert same(graphed.everything(), eager.everything())
    assert capsys.readouterr().out == ""


def test_memory_of_the_calls(device):
    """All read the same (cuDNN's choice depends on alignment); the results are copies."""
    seen = []
    captured = CUDAGraphFunction(
        lambda episode: seen.append([t.data_ptr() for t in episode]) or query_sum(episode)
    )
    batch = episodes(WARM_UP + CHECKED + 2, device)
    results = [captured(episode)[0] for episode in batch]
    assert captured.graph is not None
    assert same(results, [query_sum(episode)[0] for episode in batch])
    assert len(seen) == WARM_UP + 1 + CHECKED  # the capture, and the eager calls of the checks
    assert all(addresses == seen[0] for addresses in seen)
    with pytest.raises(ValueError, match="the first one had"):
        captured(batch[0]._replace(query=batch[0].query[:5]))


@pytest.mark.parametrize("at", [WARM_UP, WARM_UP + CHECKED])
def test_graph_skips_a_nonfinite_update(device, at, capsys):
    """In a checked replay and in a later one."""
    trained = model(device)
    train = trained.captured("train")
    *good, bad, last = episodes(at + 2, device)
    for episode in good:
        train(episode)
    before = trained.everything()
    assert train(poisoned(bad))[2]
    assert same(before, trained.everything())
    assert not train(last)[2]
    assert not torch.equal(before[0], trained.everything()[0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("begin", ["reset_batch_stats", "copy_buffers"])
def test_a_new_episode_converts_its_images(begin):
    """A replay changes the images' memory, but not the version by which a learner knows them."""
    learner, other = (FastConv4(16, 1e-3, 0.95, 5, conv_dtype=torch.bfloat16) for _ in range(2))
    first, second = (episode.support for episode in episodes(2))
    x = first.clone()
    learner(x)
    x.data.copy_(second)
    learner.copy_buffers(other) if begin == "copy_buffers" else learner.reset_batch_stats()
    assert torch.equal(learner(x), learner(second))
    assert not torch.equal(learner(x), learner(first))


# ---- What can go wrong ----


def check_dropped(eager, graphed, train, batch, before=lambda n: None):
    """All results and the final state are the eager ones, though the graph is dropped."""
    for n, episode in enumerate(batch):
        before(n)
        assert same(train(episode), eager.train(episode))
    assert train.graph is None
    assert same(graphed.everything(), eager.everything())
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)
    assert gc.isenabled()


def test_failing_capture_falls_back_to_eager(tape, capsys, monkeypatch):
    """The end of an invalid capture hides the first error."""
    capturing, (eager, graphed) = [], two_models()

    @contextlib.contextmanager
    def invalid(graph, **_):
        capturing.append(True)
        try:
            yield
        finally:
            capturing.clear()
            raise RuntimeError("capture invalidated")

    def train(episode):
        if capturing:
            raise LookupError("a wait in the middle\nmore")  # Triton's are no RuntimeError
        return graphed.train(episode)

    monkeypatch.setattr(torch.cuda, "graph", invalid)
    captured = CUDAGraphFunction(train, (*graphed.learners, graphed.meta), graphed.optimizer)
    check_dropped(eager, graphed, captured, episodes(WARM_UP + 3))
    assert one_line(capsys).endswith("a wait in the middle")


class Cycle:
    """Garbage that only the collector frees, such as the graph of an old Evaluator."""

    def __init__(self):
        self.me = self


def test_no_garbage_collection_during_capture(device):
    """Destroying an old graph meanwhile would invalidate the new one."""
    old, alive = weakref.ref(Cycle()), []

    def function(episode):
        alive.append((old() is not None, gc.isenabled()))
        return query_sum(episode)

    captured = CUDAGraphFunction(function)
    gc.disable()
    for n, episode in enumerate(episodes(WARM_UP + 1, device)):
        if n == WARM_UP:
            gc.enable()
        captured(episode)
    assert alive[WARM_UP - 1][0]
    assert alive[WARM_UP] == (False, False)
    assert gc.isenabled()


def test_check_finds_a_baked_in_number(tape, capsys):
    """A number that Python reads is a constant of the graph; this one changes in the last check."""
    calls = []

    def guilty(episode):
        calls.append(0)
        return (episode.query.sum() * (1 + (len(calls) > WARM_UP + CHECKED)),)

    captured = CUDAGraphFunction(guilty)
    for n, episode in enumerate(episodes(WARM_UP + CHECKED + 1), 1):
        (result,), (total,) = captured(episode), query_sum(episode)
        assert result == total * (1 + (n >= WARM_UP + CHECKED))
    assert captured.graph is None
    assert "differs" in one_line(capsys)


def test_check_compares_the_state(tape, capsys, monkeypatch):
    """A replay without Adam's step has the right results, but not the right state."""
    eager, graphed = two_models()
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda self: replay(self, lambda name: "adam" not in name))
    check_dropped(eager, graphed, graphed.captured("train"), episodes(WARM_UP + 3))
    assert "differs" in one_line(capsys)


@pytest.mark.parametrize("moved", ["moments", "parameters"])
def test_graph_is_dropped_when_memory_moves(device, moved, capsys):
    eager, graphed = two_models(device)
    train = graphed.captured("train")

    def move(n):
        if n == WARM_UP + CHECKED + 1:
            assert train.graph is not None
            if moved == "moments":
                graphed.optimizer.load_state_dict(copy.deepcopy(graphed.optimizer.state_dict()))
            else:
                graphed.meta.metalstm.cI.data = graphed.meta.metalstm.cI.data.clone()

    check_dropped(eager, graphed, train, episodes(WARM_UP + CHECKED + 3, device), move)
    assert "moved" in one_line(capsys)


WAIT = "called a synchronizing CUDA operation"
REPORTED = {  # what an episode does, with the meta device as a GPU -> what is said about it
    "a wait": (lambda: warnings.warn(WAIT, stacklevel=1), "waits for the GPU 1 time,"),
    "to": (lambda: torch.arange(3).to("meta", non_blocking=True), "copies 1 tensor "),
    "copy_": (lambda: torch.empty(3, device="meta").copy_(torch.ones(3)), "copies 1 tensor "),
}


@pytest.mark.parametrize("what", REPORTED)
@pytest.mark.filterwarnings(f"ignore:{WAIT}")
def test_waits_and_copies_are_reported(tape, capsys, what):
    """Copies on one device are none of these."""
    do, message = REPORTED[what]

    def function(episode):
        do()
        return (episode.query.to(torch.float64).sum(),)

    captured = CUDAGraphFunction(function)
    for episode in episodes(WARM_UP):
        captured(episode)
    line = one_line(capsys)
    assert message in line
    assert "test_graphs.py:" in line
    assert tape.mock_calls == [mock.call("warn"), mock.call(0)]


@pytest.mark.parametrize("fused", [True, None])
def test_adams_step_count_follows_its_flags(fused, monkeypatch):
    """A fused Adam reads it on its device, whichever Adam wrote it; meta stands in for a GPU."""
    check = "_device_dtype_check_for_fused"
    monkeypatch.setattr(sys.modules["torch.optim.adam"], check, lambda *args, **kwargs: None)
    here, there = (torch.nn.Parameter(torch.zeros(3, device=d)) for d in ("cpu", "meta"))
    stored = torch.optim.Adam([here], lr=0.1, fused=None if fused else True)
    here.grad = torch.ones(3)
    stored.step()
    optimizer = torch.optim.Adam([there], lr=0.5, fused=fused)
    checkpoints.load_optimizer(optimizer, {"optim": stored.state_dict()}, Path("x"))
    devices = {name: t.device.type for name, t in optimizer.state[there].items()}
    assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
    assert optimizer.param_groups[0]["fused"] is fused
    assert optimizer.param_groups[0]["lr"] == 0.5


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
def test_a_sync_ends_one_capture_but_not_the_next(capsys):
    def function(episode):
        total = episode.query.sum()
        return (total * (total.item() > -1e9),)

    current, waiting = torch.cuda.current_stream(), CUDAGraphFunction(function)
    for episode in episodes(WARM_UP + 2, "cuda"):
        assert waiting(episode)[0] == episode.query.sum()
    wait, dropped = capsys.readouterr().out.splitlines()
    assert "waits for the GPU 1 time," in wait
    assert "no CUDA graph" in dropped
    assert torch.cuda.current_stream() == current
    sound = Model("fast", 16, device="cuda").captured("train")
    for episode in episodes(WARM_UP + CHECKED + 1, "cuda"):
        sound(episode)
    assert sound.graph is not None


@pytest.mark.gpu
def test_gpu_runs_repeat_and_resume_to_the_same_bits(master, tmp_path):
    """Through the command line. A resumed run has its warm-up at other episodes."""
    flags = ["--mode", "train", "--data-root", master, "--image-size", "32", "--n-eval", "3"]
    flags += ["--episode-val", "6", "--log-freq", "1", "--val-freq", "6", "--n-workers", "2"]
    flags += ["--resume", "auto", "--plots", "false"]
    for name, lengths in (("a", [12]), ("b", [12]), ("c", [5, 12])):
        for length in lengths:
            succeeded(run_cli(*flags, "--save", tmp_path / name, "--episode", length))
    for name in "bc":
        assert metrics(tmp_path / name, "train") == metrics(tmp_path / "a", "train")
        first, other = (checkpoint(tmp_path / run)["metalearner"] for run in ("a", name))
        assert_same(first, other)
