"""What a resumed run may not change: whatever its numbers so far depend on."""

import pytest
import torch
from conftest import metrics, refused, succeeded, tensors, train, training

from engine.checkpoint import LAST
from engine.flags import parse
from engine.folder import locked


@pytest.fixture(scope="module")
def trained(master, tmp_path_factory):
    """A run of two episodes, with a learning rate that falls."""
    save = tmp_path_factory.mktemp("run") / "logs"
    succeeded(train(master, save, "--lr-decay", "0.5", "--tta-flip", "true", episode=2))
    return save


def test_the_learning_rate_falls_at_the_end(master, tmp_path):
    succeeded(train(master, tmp_path / "logs", "--lr-decay", "0.5", val_freq=1))
    ends = [tensors(tmp_path / "logs", f"meta-learner-{n}.pth.tar") for n in (1, 2, 3, 4)]
    rates = [end["optim"]["param_groups"][0]["lr"] for end in ends]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


CHANGES = ["--episode-val 3", "--transductive true", "--tta-flip false", "--tta-permutations 3"]
CHANGES += ["--episode 4"]  # by which --lr-decay would change


@pytest.mark.parametrize("words", CHANGES)
def test_each_is_refused(master, trained, words):
    before = metrics(trained)
    done = train(master, trained, "--resume", "auto", *words.split(), episode=2)
    refused(done, words, LAST)
    assert metrics(trained) == before


def test_what_is_not_given_is_as_it_was(master, trained, tmp_path):
    """Also where the default differs."""
    done = succeeded(train(master, trained, "--resume", "auto", episode=2))
    assert "nothing to do" in done
    save = tmp_path / "logs"
    succeeded(train(master, save, "--tta-permutations", 3, episode=2))
    succeeded(train(master, save, "--resume", "auto"))  # longer: no rate depends on it
    assert tensors(save)["run_flags"] == tensors(trained)["run_flags"] | {
        "episode": 4,
        "tta_flip": False,
        "tta_permutations": 3,
    }
    assert len(metrics(save, "val")) == 2


def test_another_folder_may_change_them(master, trained, tmp_path):
    resume = ["--resume", f"{trained}-719"]
    done = train(master, tmp_path / "new", *resume, "--episode-val", 3, "--tta-flip", "false")
    succeeded(done)
    assert [len(event["accuracies"]) for event in metrics(tmp_path / "new", "val")] == [3]


def test_another_folder_keeps_the_length_that_the_rate_depends_on(master, trained, tmp_path):
    words = training(master, tmp_path / "new", "--resume", f"{trained}-719")
    at = words.index("--episode")
    with locked(parse(words[:at] + words[at + 2 :])) as folder:
        assert folder.args.episode == 2


def test_a_flag_newer_than_the_checkpoint_had_its_default(master, tmp_path):
    save = tmp_path / "logs"
    succeeded(train(master, save, episode=2))
    content = tensors(save)
    del content["hyper_parameters"]["ema"]
    torch.save(content, f"{save}-719/ckpts/{LAST}")
    refused(train(master, save, "--resume", "auto", "--ema", "0.5"), "--ema 0.5", "--ema 0.0")
    succeeded(train(master, tmp_path / "new", "--resume", f"{save}-719", "--ema", "0.5"))
    assert tensors(tmp_path / "new")["about"]["changed"] == {"ema": 0.5}
