"""benchmarks/reduce.py: a data set of smaller photographs."""

from conftest import benchmark, refused
from PIL import Image

from dataloader import scan_split


def test_each_photograph_is_there_smaller(master, tmp_path):
    done = benchmark("reduce.py", "12", master, tmp_path / "small")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"144 images in {tmp_path / 'small'}\n"
    for split in ("train", "val", "test"):
        before, after = scan_split(master, split), scan_split(tmp_path / "small", split)
        assert before.classes == after.classes
        assert [[path.stem for path in c] for c in before.files] == [
            [path.stem for path in c] for c in after.files
        ]
        assert {Image.open(path).size for c in after.files for path in c} == {(12, 12)}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_bad_input_is_refused_and_leaves_nothing(data, tmp_path):
    (tmp_path / "there").mkdir()
    assert "there: exists already" in refused(
        benchmark("reduce.py", "12", data, tmp_path / "there")
    )
    broken = next((data / "test").rglob("*.jpg"))
    broken.write_bytes(b"no image")
    done = benchmark("reduce.py", "12", data, tmp_path / "small")
    assert done.returncode == 2
    assert f"error: {broken}: not a readable image" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data", "there"}
