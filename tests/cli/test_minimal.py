"""With only torch, torchvision, pillow, tqdm and numpy, all but pictures is there.

This file needs pytest beside them, and no other test's helpers, so that it runs in such an
environment, too.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
START = """
import json, sys
for name in ("matplotlib", "tensorboard", "torch.utils.tensorboard", "pyarrow", "scipy", "pandas"):
    sys.modules[name] = None  # an import of it fails
import main
from engine.process import run_main
for words in json.loads(sys.argv[1]):
    print("begin", flush=True)
    print("end", run_main(main.main, words), flush=True)
"""


@pytest.mark.slow
def test_all_modes_but_pictures(tmp_path):
    data = tmp_path / "data"
    for split, c, k in itertools.product(("train", "val", "test"), range(3), range(4)):
        path = data / split / f"{split}_{c}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (80 * c, 60 * k, 128)).save(path)
    words = "--cpu --n-workers 0"
    small = f"{words} --image-size 16 --n-class 3 --n-shot 1 --n-eval 2 --epoch 1 --episode 2"
    small += f" --val-freq 2 --episode-val 2 --data-root {data}"
    known = f"--support {data}/test --query {data}/test/test_0/1.png"
    modes = {
        f"{small} --plots true": 0,
        f"--mode test {words} --episode-test 2 --plots true": 0,
        f"--mode predict {words} {known}": 0,
        f"--mode pretrain {small} --save pre --plots true": 0,
        f"{small} --method linear-head --init-from pre --save head --plots true": 0,
        "--mode results": 0,
        "--mode plot": 2,
        f"{small} --tensorboard --save board": 2,
    }
    command = [sys.executable, "-c", START, json.dumps([mode.split() for mode in modes])]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **how)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    outputs = done.stdout.split("begin\n")[1:]
    codes = [int(output.rsplit("end ", 1)[1]) for output in outputs]
    assert codes == list(modes.values()), done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr
    for train in (outputs[0], outputs[4]):
        assert len([line for line in train.splitlines() if "left out" in line]) == 1
    assert (tmp_path / "predictions.csv").is_file()
    assert not list(tmp_path.rglob("plots/*.png"))
