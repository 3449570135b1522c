"""The example of an own update rule, and frozen features that several threads share."""

import runpy
import sys
import threading

import pytest
import torch
from conftest import LEARNERS, ROOT


def test_the_example_of_an_own_update_rule_learns(capsys):
    runpy.run_path(str(ROOT / "examples" / "own_update_rule.py"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.partition(": ")[2].split()[0]) > 50


@pytest.mark.skipif("fast" not in LEARNERS, reason="plain PyTorch keeps nothing between calls")
def test_threads_that_share_a_network_see_their_own_images():
    network, wrong = LEARNERS["fast"](16, 1e-3, 0.95, 3).eval(), []

    def look(value):
        x = torch.full((1, 3, 16, 16), float(value))
        for _ in range(3000):
            if network._prepared(x)[0] is not x:
                wrong.append(value)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=look, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
