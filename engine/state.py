"""The state of a training beyond its weights and moments: what a snapshot holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from torch import Tensor


@dataclass
class TrainingState:
    """Counts and numbers that the next episode's log line and validation depend on."""

    episode: int = 0  # episodes seen
    validated: int = 0  # the episode of the last validation
    best: dict | None = None  # of the validations: episode, accuracy, std
    skipped_in_a_row: int = 0  # updates whose loss or gradient was not finite
    losses: list[float | Tensor] = field(default_factory=list)  # since the last log line
    accuracies: list[float | Tensor] = field(default_factory=list)
    skipped: list[float | Tensor] = field(default_factory=list)
    asked_for: int = 0  # --episode
    data: dict[str, str] = field(default_factory=dict)  # fingerprints of the images, by split
    logs_end_at: dict[str, int] = field(default_factory=dict)  # length of the logs in bytes

    def to_checkpoint(self) -> dict:
        """The checkpoint's entries ``episode``, ``best`` and ``run``."""
        run = asdict(self)
        return {"episode": run.pop("episode"), "best": run.pop("best"), "run": run}

    @classmethod
    def from_checkpoint(cls, content: dict) -> TrainingState:
        """Read what ``to_checkpoint`` wrote; exported checkpoints have no ``run``.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        best, run = content.get("best"), content.get("run", {})
        state = cls(episode=content["episode"], best=best, **run)
        if run and run.keys() != state.to_checkpoint()["run"].keys():
            raise KeyError("a part of the run's state")
        counts = [state.validated, state.skipped_in_a_row, state.asked_for]
        lists = [state.losses, state.accuracies, state.skipped]
        sound = (
            all(isinstance(n, int) and n >= 0 for n in (*counts, *state.logs_end_at.values()))
            and all(isinstance(each, list) for each in lists)
            and all(isinstance(x, float) for each in lists for x in each)
            and len(state.losses) == len(state.accuracies)
            and all(isinstance(v, str) for v in state.data.values())
            and (best is None or isinstance(best["episode"], int))
            and (best is None or math.isfinite(best["accuracy"]))
        )
        if not sound:
            raise ValueError("not what training writes")
        return state
