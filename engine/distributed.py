"""Training or test in several processes, which ``torchrun`` starts.

Rank r of N takes episodes r, r + N, r + 2 N, ...; only rank 0 logs and writes. Errors at start-up
are collective: all ranks go on, or none does. Later, all stop after the same update.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor

from engine.flags import ROOT, flag_name
from engine.process import end_with_parent, print_error
from utils import UserError, first_line, out_of_memory

TIMEOUT = timedelta(minutes=30)  # the longest wait for a rank that lives but does not answer
PER_MACHINE = ("data_root", "cache_dir", "n_workers")  # flags that may differ between machines


class CollectiveError(UserError):
    """An error that all ranks raise together."""


class PeerLost(Exception):
    """Another rank has ended, or cannot be reached."""


class Ranks(contextlib.AbstractContextManager):
    """This process's place among those that ``torchrun`` started; rank 0 of 1 without it.

    A context manager: an exception that leaves it ends all ranks, and one of them says why.

    Attributes:
        rank, size: this process's rank, and the number of processes.
        local: the same two on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: tuple[int, int] = (0, 1)):
        self.rank, self.size, self.local = rank, size, local
        self._begun = False

    @classmethod
    def started(cls) -> Ranks:
        """Read torchrun's environment variables, and connect with the other ranks.

        Raises:
            UserError: the variables are incomplete or no numbers, or the others cannot be reached.
        """
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        try:
            rank, size, *local = (int(os.environ.get(name, alone)) for name, alone in names.items())
        except ValueError as e:
            advice = "unset it, or start by torchrun"
            raise UserError(f"{', '.join(names)}: one is no number ({e}); {advice}") from e
        if size == 1:
            return SINGLE_PROCESS
        ranks = cls(rank, size, tuple(local))
        ranks._connect()
        return ranks

    def _connect(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        end_with_parent()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local[1]))
        on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        try:
            self._store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            self._store = dist.PrefixStore(self._meet(self._store), self._store)
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.size, timeout=TIMEOUT
            )
        except (ValueError, RuntimeError) as e:  # no variables, port in use, or no answer
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = first_line(e)
            meet = f"rank {self.rank} of {self.size}: cannot meet the others at {place} ({why})"
            advice = "start all by torchrun, or choose another --master-port"
            raise UserError(f"{meet}; {advice}") from e
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end

    def _meet(self, store: torch.distributed.Store) -> str:
        """Agree on a name that the ranks of this start share, and no earlier start knows.

        torchrun's restarts share one store, which still holds the addresses of ranks that have
        ended. So each rank signs in under a new name, and rank 0 announces the names that it has
        read until each of the others has found its own among them.

        Raises:
            RuntimeError: one of the others does not come within TIMEOUT.
        """
        mine, others = uuid.uuid4().hex, range(1, self.size)
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        store.set(f"signed in {self.rank}", mine)
        while True:
            if self.rank == 0:
                names = [mine, *(store.get(f"signed in {rank}").decode() for rank in others)]
                store.set("announced", " ".join(names))
                if store.check([f"{mine} found by {rank}" for rank in others]):
                    return mine
            else:
                announced = store.get("announced").decode().split()
                if mine in announced:
                    store.set(f"{announced[0]} found by {self.rank}", "")
                    return announced[0]
            if time.monotonic() > deadline:
                raise RuntimeError(f"they do not come within {TIMEOUT.total_seconds():g} seconds")
            time.sleep(0.05)

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: object) -> None:
        if self.size == 1:
            return
        if error is None or isinstance(error, SystemExit):
            self._dist.destroy_process_group()
            return
        # torchrun sends it when the first rank ends, but each has an exit code of its own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, UserError) and not isinstance(error, CollectiveError):
            if self._begun:
                error = UserError(f"rank {self.rank}: {error}")
            else:
                try:  # the others are waiting to hear of it
                    self.exchange(None, str(error))
                except (CollectiveError, PeerLost) as e:
                    error = e
        code = 2 if isinstance(error, UserError) else getattr(error, "exit_code", 1)
        first = f"{self.rank} {code}"  # the rank that has ended first, which alone speaks
        if isinstance(error, CollectiveError):
            first = "0 2"
        else:
            with contextlib.suppress(RuntimeError):  # if the process that held the store has ended
                first = self._store.compare_set("end", "", first).decode()
        speaker, its_code = map(int, first.split())
        if speaker != self.rank:
            raise SystemExit(its_code if isinstance(error, PeerLost) else code) from None
        if isinstance(error, PeerLost):
            print_error(f"rank {self.rank}: {error}")
            raise SystemExit(code) from None
        if isinstance(error, UserError):
            raise error from None

    def _call(self, function: Callable, *args: object) -> None:
        try:
            function(*args)
        except RuntimeError as e:
            if out_of_memory(e):
                raise
            why = first_line(e)
            lost = f"another rank has ended or does not answer ({why})"
            raise PeerLost(f"{lost}; continue with --resume auto") from e

    # ---- Before the work begins ----

    def exchange(self, mine: object, problem: str | None = None) -> list:
        """Gather each rank's value, in the order of the ranks.

        Raises:
            CollectiveError: on all ranks, if one has a problem.
        """
        if self.size == 1:
            return [mine]
        found: list = [None] * self.size
        self._call(self._dist.all_gather_object, found, (mine, problem))
        problems = {r: problem for r, (_, problem) in enumerate(found) if problem is not None}
        if problems:
            alike = len(problems) == self.size and len(set(problems.values())) == 1
            rank, problem = min(problems.items())
            raise CollectiveError(problem if alike else f"rank {rank}: {problem}")
        return [value for value, _ in found]

    def compare(self, facts: dict[str, object]) -> None:
        """Check that all ranks know the same facts, by name.

        Raises:
            CollectiveError: two do not; the first difference is named.
        """
        of_all = self.exchange(facts)
        for name in {name: None for facts in of_all for name in facts}:
            values = [facts.get(name, "the default") for facts in of_all]
            for rank, value in enumerate(values):
                if value != values[0]:
                    differ = f"{values[0]} on rank 0, but {value} on rank {rank}"
                    raise CollectiveError(f"{name}: {differ}; give all ranks the same")

    def compare_start(self, given: dict[str, object]) -> None:
        """Check that all ranks run the same code with the same flags."""
        if self.size > 1:
            facts = {flag_name(k): v for k, v in given.items() if k not in PER_MACHINE}
            facts["version of PyTorch"] = torch.__version__
            facts["version of this repository"] = _code()
            facts["kind of processor"] = torch.backends.cpu.get_cpu_capability()
            self.compare(facts)

    def begin(self, facts: dict[str, object]) -> None:
        """``compare``, and end the start-up phase, in which errors are collective."""
        self.compare(facts)
        self._begun = True

    # ---- At work ----

    def gather(self, mine: Tensor) -> Tensor:
        """The rows of all ranks' episodes in the order of the episodes.

        Args:
            mine: [m, ...], one row for each of this rank's, the same number on all ranks.

        Returns:
            [m * size, ...].

        Raises:
            PeerLost: another rank has ended.
        """
        if self.size == 1:
            return mine
        if mine.is_cuda:
            self.largest(0)  # by gloo, which notices that a rank has ended: NCCL only waits
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(self._dist.all_gather, found, mine)
        return torch.stack(found, dim=1).flatten(0, 1)

    def largest(self, *numbers: int) -> list[int]:
        """The maximum of each number over all ranks.

        Raises:
            PeerLost: another rank has ended.
        """
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers)  # on the CPU, so that no GPU synchronises
        self._call(self._dist.all_reduce, found, self._dist.ReduceOp.MAX)
        return found.tolist()


SINGLE_PROCESS = Ranks()


def _code() -> str:
    """16 hex digits over this repository's code."""
    parts = ("*.py", "data/*.py", "engine/*.py", "baselines/*.py", "fast/**/*.*")
    paths = [path for part in parts for path in sorted(ROOT.glob(part))]
    content = b"".join(path.read_bytes() for path in paths if "__pycache__" not in path.parts)
    return hashlib.sha256(content).hexdigest()[:16]
