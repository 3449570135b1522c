"""Whole episodes as CUDA graphs. Without a GPU a tape stands in for the graph: it keeps each operation and the memory that it
read and wrote, as a graph does, and plays them again in the same memory."""

import contextlib
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import Model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from episode import Episode
from fast import graphs, native
from fast.graphs import WARM_UP, Captured

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


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
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and storage(t)._cdata not in known]
        self.made |= {storage(t)._cdata for t in fresh}
        self.operations.append((func, args, kwargs, out, {id(t) for t in fresh}))
        return out

    def put_back(self):
        for now, then in self.before.values():
            now.copy_(then)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out, fresh in self.operations:
            again = func(*args, **kwargs)
            for t, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(t, torch.Tensor) and id(t) in fresh:
                    t.copy_(new)


@contextlib.contextmanager
def recording(tape, stream, capture_error_mode):
    with tape:
        yield
    tape.put_back()


@pytest.fixture
def tape(monkeypatch):
    """Makes torch.cuda's graphs tapes on the CPU, and sends the CPU the GPU's way, past the kernels."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(functions={}))
    with mock.patch.multiple(
        torch.cuda,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda s: contextlib.nullcontext(),
        CUDAGraph=Tape,
        graph=recording,
    ):
        yield


@pytest.fixture(params=DEVICES)
def device(request):
    """The tape on a CPU, graphs on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("tape")
    return torch.device(request.param)


def episodes(n, device, image_size=32):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(5, device=device)
    for _ in range(n):
        support, query = (
            torch.randn(5 * k, 3, image_size, image_size, generator=generator)
            .to(device)
            .contiguous(memory_format=torch.channels_last)
            for k in (2, 3)
        )
        order = torch.stack([torch.randperm(10, generator=generator) for _ in range(3)]).to(device)
        yield Episode(support, y.repeat_interleave(2), query, y.repeat_interleave(3), order)


@pytest.mark.parametrize("conv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [25, 4])
def test_captured_episodes_are_the_eager_ones_bit_for_bit(device, batch_size, conv_dtype):
    """Training and testing by turns, from the warm-up into the replays."""
    eager, graphed = (Model("fast", 32, conv_dtype=conv_dtype, device=device, batch_size=batch_size) for _ in range(2))
    train, test = Captured(graphed.train, graphed.optimizer), Captured(graphed.test)
    for episode in episodes(WARM_UP + 4, device):
        for ours, theirs in zip((*train(episode), *test(episode)), (*eager.train(episode), *eager.test(episode)), strict=True):
            assert torch.equal(ours, theirs)
    assert train.graph is not None
    assert test.graph is not None
    assert all(torch.equal(a, b) for a, b in zip(graphed.everything(), eager.everything(), strict=True))
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)


def test_results_are_the_callers_to_keep(device):
    """The graph writes its own memory anew each time."""
    model = Model("fast", 32, device=device)
    test = Captured(model.test)
    results = [test(episode) for episode in episodes(WARM_UP + 3, device)]
    losses = [loss.item() for loss, _ in results]
    assert len(set(losses)) == len(losses)


def test_an_update_that_is_not_finite_is_skipped_by_the_graph_too(device):
    model = Model("fast", 32, device=device)
    train = Captured(model.train, model.optimizer)
    *good, bad, last = episodes(WARM_UP + 3, device)
    for episode in good:
        train(episode)
    before = model.everything()
    _, _, skipped = train(bad._replace(query=bad.query * float("nan")))
    assert skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.everything(), strict=True))
    assert not train(last)[2]
    assert not torch.equal(before[0], model.everything()[0])


def test_other_shapes_are_refused(device):
    model = Model("fast", 32, device=device)
    test = Captured(model.test)
    (first, *_) = list(episodes(1, device))
    for _ in range(WARM_UP + 1):
        test(first)
    with pytest.raises(ValueError, match="recorded with"):
        test(first._replace(query=first.query[:5]))


def test_where_it_cannot_be_recorded_it_goes_on_in_the_ordinary_way(device, capsys, monkeypatch):
    eager, graphed = Model("fast", 32, device=device), Model("fast", 32, device=device)
    train = Captured(graphed.train, graphed.optimizer)

    @contextlib.contextmanager
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted\nmore")
        yield

    monkeypatch.setattr(graphs.torch.cuda, "graph", refuse)
    for episode in episodes(WARM_UP + 3, device):
        assert torch.equal(train(episode)[0], eager.train(episode)[0])
    assert capsys.readouterr().out.count("operation not permitted") == 1
    assert not any(group["capturable"] for group in graphed.optimizer.param_groups)


def test_the_tape_sees_what_a_graph_would_miss(tape):
    """A number that Python reads is baked in: the check above must notice that."""
    losses = []

    def guilty(episode):
        return (episode.support.sum() * len(losses), losses.append(0) or episode.query.sum())

    captured = Captured(guilty)
    results = [captured(episode)[0].item() for episode in episodes(WARM_UP + 3, "cpu")]
    recorded = [e.support.sum().item() for e in episodes(WARM_UP + 3, "cpu")]
    assert results[WARM_UP:] == [pytest.approx(WARM_UP * s, rel=1e-5) for s in recorded[WARM_UP:]]


# ---- On a GPU ----


@CUDA
@pytest.mark.parametrize("mode", ["train", "test"])
def test_gpu_and_cpu_agree(mode):
    """Each episode from the same parameters: rounding grows from episode to episode."""
    here, there = Model("fast", 32), Model("fast", 32, device="cuda")
    step = Captured(getattr(there, mode), there.optimizer)
    for ours, theirs in zip(episodes(WARM_UP + 3, "cpu"), episodes(WARM_UP + 3, "cuda"), strict=True):
        there.meta.load_state_dict(here.meta.state_dict())
        assert step(theirs)[0].item() == pytest.approx(getattr(here, mode)(ours)[0].item(), rel=1e-3)


@CUDA
def test_a_run_on_the_gpu_repeats_itself_and_resumes_to_the_same_bits(master, tmp_path):
    """Through the command line; resumed, other episodes are warm-up than in the run that was not stopped."""
    import main

    flags = ["--mode", "train", "--data-root", str(master), "--image-size", "32", "--n-eval", "3", "--episode-val", "6"]
    flags += ["--log-freq", "1", "--val-freq", "6", "--seed", "1", "--resume", "auto", "--plots", "false", "--n-workers", "2"]
    for name, lengths in (("a", [12]), ("b", [12]), ("c", [5, 12])):
        for length in lengths:
            assert main.run([*flags, "--save", str(tmp_path / name), "--episode", str(length)]) == 0
    found = []
    for name in "abc":
        lines = (tmp_path / f"{name}-1" / "metrics.jsonl").read_text().splitlines()
        events = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
        last = torch.load(tmp_path / f"{name}-1" / "ckpts" / "meta-learner-last.pth.tar", weights_only=True)
        found.append(([e for e in events if e["event"] == "train"], last["metalearner"]))
    for events, weights in found[1:]:
        assert events == found[0][0]
        assert all(torch.equal(v, found[0][1][k]) for k, v in weights.items())
