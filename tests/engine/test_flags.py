import re

import pytest

from engine.flags import HYPER_PARAMETERS, build_parser, parse, settle
from utils import UserError

PUBLISHED = dict(
    n_class=5, n_shot=5, n_eval=15, epoch=8, batch_size=25, image_size=84, filters=32, episode=50000,
    episode_val=100, val_freq=1000,
    bn_momentum=0.95, bn_eps=1e-3, lr=1e-3, grad_clip=0.25, hidden_size=20, input_size=4, bi_init=[-5.0, -4.0],
    augment="port", pixels="imagenet", shuffle="pass", bn_scale="uniform", lstm_init="pytorch", bf_init=[4.0, 6.0],
    precision="fp32", seed=719,
)  # fmt: skip


def test_defaults_are_the_published_recipe():
    args = settle(*parse([]))
    assert {k: getattr(args, k) for k in PUBLISHED} == PUBLISHED
    assert set(HYPER_PARAMETERS) <= set(vars(args))


def test_precedence():
    stored = {"n_shot": 1, "epoch": 12, "data_root": "not a hyper-parameter"}
    args = settle(*parse(["--epoch", "3", "--data", "x"]), stored)
    assert (args.n_shot, args.epoch, args.n_eval) == (1, 3, 15)
    assert args.data_root.parts[-2:] == ("data", "x")


def test_booleans_mean_what_they_say():
    for text, value in (("False", False), ("true", True), ("0", False), ("yes", True)):
        assert settle(*parse(["--pin-mem", text])).pin_mem is value


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        ("--n-shot 0", "--n-shot"),
        ("--n-shot -3", "--n-shot"),
        ("--n-shot 2.5", "--n-shot"),
        ("--n-shot", "--n-shot"),
        ("--n-class 1", "--n-class"),
        ("--image-size 15", "--image-size"),
        ("--filters 0", "--filters"),
        ("--image-size 84px", "--image-size"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        ("--lr -1", "--lr"),
        ("--bn-momentum 1.5", "--bn-momentum"),
        ("--bn-eps 0", "--bn-eps"),
        ("--grad-clip 0", "--grad-clip"),
        ("--input-size 5", "--input-size"),
        ("--episode 0", "--episode"),
        ("--val-freq -1", "--val-freq"),
        ("--seed -1", "--seed"),
        ("--seed 4294967296", "--seed"),
        ("--pin-mem maybe", "--pin-mem"),
        ("--mode fly", "--mode"),
        ("--augment all", "--augment"),
        ("--precision fp16", "--precision"),
        ("--bi-init 1", "--bi-init"),
        ("--bi-init 1 0", "--bi-init"),
        ("--bf-init 1 0", "--bf-init"),
        ("--pixels 255", "--pixels"),
        ("--shuffle never", "--shuffle"),
        ("--bn-scale 1", "--bn-scale"),
        ("--lstm-init port", "--lstm-init"),
        ("--n-workers 9999", "--n-workers"),
        ("--epsiode 3", "--epsiode"),
        ("--episod 3", "--episod"),
        ("stray", "stray"),
        ("--cpu --gpu 0", "--cpu"),
    ],
)
def test_bad_flags_are_named(argv, culprit):
    with pytest.raises(UserError, match=re.escape(culprit)) as caught:
        settle(*parse(argv.split()))
    assert "\n" not in str(caught.value)


def test_help_gives_each_flag_its_default():
    parser, defaults = build_parser()
    text = " ".join(parser.format_help().split())
    for name, default in defaults.items():
        assert f"--{name.replace('_', '-')}" in text
        if default not in (None, False) and not isinstance(default, list):
            assert f"(default: {default})" in text
