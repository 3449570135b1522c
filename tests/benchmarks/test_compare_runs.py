"""benchmarks/compare_runs.py: logs side by side, paired episode by episode."""

import json

import torch
from helpers import compare_runs, table

from engine.checkpoint import LAST


def write_run(folder, accuracies, about=None, **hyper_parameters):
    """A run of 300 episodes of 0.2 s with a validation after 200 and a worse one after 300."""
    (folder / "ckpts").mkdir(parents=True)
    content = {"episode": 300, "metalearner": {"cI": torch.zeros(1)}, "about": about or {}}
    content["run_flags"] = {"transductive": hyper_parameters.pop("transductive", False)}
    torch.save({**content, "hyper_parameters": hyper_parameters}, folder / "ckpts" / LAST)
    log = {"mean_loss": 1.0, "mean_accuracy": 50.0}
    log["time"] = {"seconds": 20.0, "episodes_per_second": 5}
    events = [{"event": "train", "episode": n, **log} for n in (100, 200, 300)]
    for n, worse in ((200, 0), (300, 1)):
        each = [v - worse for v in accuracies]
        means = {key: {"mean": 1.0, "ci95": 0.1} for key in ("loss", "accuracy")}
        events.append({"event": "val", "episode": n, "accuracies": each, **means})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_changes_and_the_paired_difference(tmp_path, capsys):
    a = write_run(tmp_path / "a", [40.0, 60.0, 50.0, 70.0], lr=1e-3, bi_init=[-5.0, -4.0])
    about = {"started_from": {"checkpoint": "pre-719/meta-learner-last.pth.tar", "episode": 4}}
    changed = {"lr": 1e-4, "bi_init": [-1.5, -1.0], "transductive": True}
    b = write_run(tmp_path / "b", [41.0, 62.0, 51.0, 72.0], about, **changed)
    first, second = table(compare_runs, capsys, a, b)
    assert (first["changes"], first["starts from"], first["difference"]) == ("", "", "")
    assert (first["validated after"], first["ms per episode"]) == ("200 of 300", "200")
    assert first["validation, 4 episodes, %"].startswith("55.00 ± ")
    assert second["changes"] == "`--bi-init -1.5 -1`, `--lr 0.0001`, `--transductive true`"
    assert second["starts from"] == "pre-719"
    assert second["difference"] == "+1.50 ± 0.49"  # the episodes themselves vary by 11
    first, second = table(compare_runs, capsys, a, b, "--at", "300")
    assert first["validated after"] == "300 of 300"
    assert first["validation, 4 episodes, %"].startswith("54.00 ± ")


def test_runs_of_this_version(trained, tmp_path, capsys):
    """Episodes of another seed are not paired."""
    (row,) = table(compare_runs, capsys, f"{trained}-719")
    assert row["run"] == "logs-719"
    runs = [write_run(tmp_path / f"{seed}", [40.0, 60.0], seed=seed) for seed in (719, 53)]
    assert [row["difference"] for row in table(compare_runs, capsys, *runs)] == ["", ""]
