"""The models of results/ and your own, for other programs, by ``torch.hub`` or an import.

    import torch
    model = torch.hub.load("path/to/this/clone", "load_pretrained",
                           "miniImagenet-5s5c-pretrained-53", source="local")
    model.adapt(images, labels)         # five classes, some examples of each
    model.predict(others)               # probabilities [N, 5], columns as in model.classes

This repository's modules have names such as ``utils`` and ``learner``. While they load, they
replace yours of the same names in ``sys.modules``; then yours are put back. Nothing is imported
later.
"""

import contextlib
import functools
import pathlib
import sys
import threading

dependencies = ["torch", "torchvision", "PIL", "numpy", "tqdm"]
_ROOT = pathlib.Path(__file__).resolve().parent
_NAMES = {p.stem for p in (*_ROOT.glob("*.py"), *(q.parent for q in _ROOT.glob("*/__init__.py")))}
_PUBLISHED = sorted(path.parent.name for path in _ROOT.glob("results/*/meta-learner.pth.tar"))
_loaded: dict = {}  # our modules by name
_lock = threading.RLock()  # sys.modules is for all threads


@contextlib.contextmanager
def _own_modules():
    found = {name: m for name, m in sys.modules.items() if name.split(".")[0] in _NAMES}
    for name, module in found.items():
        if _ROOT not in pathlib.Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]
    sys.modules.update(_loaded)
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        for name in [name for name in sys.modules if name.split(".")[0] in _NAMES]:
            _loaded[name] = sys.modules.pop(name)
        sys.modules.update(found)


def load_pretrained(name_or_path, *flags):
    """A trained model as a ``tools.predictor.Predictor``: ``adapt(images, labels)``,
    ``predict(images)`` and ``features(images)``.

    Args:
        name_or_path: a folder's name in results/, or the path of a run's folder or checkpoint.
        flags: of ``python main.py --mode predict``, such as "--cpu" or "--tta-flip", "true".

    Raises:
        utils.UserError: there is no such model, or it cannot be used.
    """
    path = _ROOT / "results" / name_or_path if name_or_path in _PUBLISHED else name_or_path
    with _lock, _own_modules():
        import torch

        from engine.backend import reproducible
        from engine.checkpoint import resolve_checkpoint
        from engine.flags import parse, resolve
        from main import load_predictor
        from utils import UserError

        cli_args = parse(["--mode=predict", f"--resume={path}", *flags])
        seed = resolve(cli_args).seed
        try:
            resolve_checkpoint(str(path), seed, flag="load_pretrained")
        except UserError as e:
            raise UserError(f"{e}; results/ holds {', '.join(_PUBLISHED)}") from e
        # the program's random numbers and settings stay as they are
        with torch.random.fork_rng(), reproducible():
            return load_predictor(cli_args)


for _name in _PUBLISHED:  # torch.hub.load(clone, "miniImagenet-5s5c-pretrained-53", source="local")
    globals()[_name] = functools.partial(load_pretrained, _name)
