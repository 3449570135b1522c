import pytest
from conftest import refused, run_cli, succeeded

from engine.flags import DEFAULTS, HYPER_PARAMETERS, flag_name, parse, resolve

PUBLISHED = dict(
    n_class=5, n_shot=5, n_eval=15, epoch=8, batch_size=25, image_size=84, filters=32,
    episode=50000, episode_val=100, val_freq=1000, bn_momentum=0.95, bn_eps=1e-3, lr=1e-3,
    grad_clip=0.25, hidden_size=20, input_size=4, bi_init=[-5.0, -4.0], bf_init=[4.0, 6.0],
    augment="port", pixels="imagenet", shuffle="pass", bn_scale="uniform", lstm_init="pytorch",
    precision="fp32", seed=719, method="lstm", meta_batch=1, lr_decay=0.0,
)  # fmt: skip


def test_defaults_are_the_published_recipe():
    args = resolve(parse([]))
    assert {k: getattr(args, k) for k in PUBLISHED} == PUBLISHED
    assert set(HYPER_PARAMETERS) <= set(vars(args))


def test_precedence():
    stored = {"n_shot": 1, "epoch": 12, "data_root": "not a hyper-parameter"}
    args = resolve(parse(["--epoch", "3", "--data", "x"]), stored)
    assert (args.n_shot, args.epoch, args.n_eval) == (1, 3, 15)
    assert args.data_root.parts[-2:] == ("data", "x")


def test_booleans_mean_what_they_say():
    for text, value in (("False", False), ("true", True), ("0", False), ("yes", True)):
        assert resolve(parse(["--pin-mem", text])).pin_mem is value


# the first word is the one that the error names
BAD = """--n-shot 0, --n-shot 2.5, --n-shot, --n-class 1, --image-size 15, --image-size 84px,
--filters 0, --lr 0, --lr nan, --lr inf, --lr -1, --lr-decay 2, --bn-momentum 1.5, --bn-eps 0,
--grad-clip 0, --input-size 5, --episode 0, --val-freq -1, --seed -1, --seed 4294967296,
--pin-mem maybe, --bi-init 1, --bi-init 1 0, --bf-init 1 0, --n-workers 9999, --meta-batch 0,
--tta-permutations 0, --epsiode 3, --episod 3, stray, --cpu --gpu 0, --ema 0.9 --mode pretrain,
--transductive true --method linear-head, --transductive true --mode predict,
--support a, --support a --mode test, --query a --mode plot, --shots 1 --mode export,
--shots 1 --mode predict, --to a --mode test, --runs a --mode test, --init-from a --mode pretrain,
--init-from a --mode predict, --resume a --mode export, --resume a --mode results,
--mode fly, --augment fly, --precision fly, --pixels fly, --shuffle fly, --bn-scale fly,
--lstm-init fly, --method fly, --hidden-size 5 --method protonet, --hidden-size 5 --method sgd,
--bi-init 0 0 --method nearest, --grad-divisor 1 --method matching,
--batch-size 5 --method protonet, --bf-init 0 0 --method meta-sgd, --batch-size 5 --mode pretrain,
--hidden-size 5 --mode pretrain,
--second-order true --mode pretrain, --transductive true --mode pretrain"""


@pytest.mark.parametrize("words", BAD.split(","))
def test_bad_flags_are_named(words):
    refused(run_cli(*words.split()), words.split()[0])


def test_an_empty_path_is_not_a_flag_left_out():
    paths = "init-from resume data-root data query out to cache-dir save runs support"
    for flag in paths.split():
        refused(run_cli(f"--{flag}", ""), f"--{flag}")
        refused(run_cli(f"--{flag}="), f"--{flag}")


def test_help_gives_each_flag_its_default():
    text = " ".join(succeeded(run_cli("--help")).split())
    for name, default in DEFAULTS.items():
        assert flag_name(name) in text
        if default not in (None, False, True) and not isinstance(default, list):
            assert f"(default: {default})" in text
