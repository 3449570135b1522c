"""Draws a small data set of characters in mini-ImageNet's layout; nothing is downloaded.

    python data/glyphs.py            # 100 classes x 60 JPEG images of 32 x 32 px in data/glyphs

The quickstart trains on it: a model learns to tell new characters apart after five examples of
each. A class is one character of six scripts. An image shows it in one of 20 typefaces, at a random
size, place and slant, in random colours, on random paper and with random noise. The typefaces come
with the matplotlib package, so each machine draws the same.

    dest/{train,val,test}/<class>/<nnn>.jpg     64/16/20 classes, for example
    train/greek-capital-delta/007.jpg dest/glyphs.json                            the settings that
    made it

An image is a pure function of (seed, character, index). One machine writes the same bytes each
time. Another version of Pillow brings another FreeType or JPEG encoder: its pixels may differ by a
few grey levels.

The folder appears when it is complete: it is made beside dest as .<name>.tmp and renamed. Exit
codes: 0 made or there already, 2 bad flags or files (one line on stderr says which), 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import shutil
import sys
import time
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for utils
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for forms

from formats import DATA, refuse_code_folder

from utils import Parser, UserError, file_lock, int_range, run_main

MARKER = "glyphs.json"
RECIPE = 1  # raise it when the same settings come to give other images

# ---- Classes: script by script, without characters that look like one already in the table (O/0,
# A/Α/А, З/3, n/ո) ----

CHARACTERS = "".join(
    [
        "2345678",
        "ABDEGHJKLMNPQRSTUWXYZaeghmtyßæ",
        "ΓΔΘΞΣΦΨΩαβδελμξπσω",
        "ДЖЛЦЧЩЪЫЭЮЯЉ",
        "ԲԴԵԶԹԺԽԾԿՀՃՇՊՌՎՔՖձմ",
        "დილორსტუფქძჭჯჰ",
    ]
)

# ---- Typefaces: files of matplotlib's mpl-data/fonts/ttf ----

UNICODE_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Outside ASCII their character maps are not Unicode. cmti10 is left out: older versions of
# matplotlib lack it.
ASCII_FACES = ("cmr10", "cmb10", "cmss10", "cmtt10")

# ---- Variation: (low, high) of uniform draws; lengths are fractions of the image's side ----

SIZE = (0.7, 0.9)  # the longer side of the drawn character
PLACE = (-0.7, 0.7)  # of the free space to each side: 1 would touch the border
ROTATION = (-8.0, 8.0)  # degrees; more would turn one character into another
SHEAR = (-0.1, 0.1)
STRETCH = (0.9, 1.1)  # width over height, relative to the typeface's
CONTRAST = 0.45  # least difference of luma between paper and ink, from 0 to 1
TEXTURE = (0.0, 0.06)  # standard deviation of the paper's clouds
BLUR = (0.0, 0.02)
NOISE = (0.0, 0.05)  # standard deviation
OVERSAMPLING = 3
LUMA = np.array([0.299, 0.587, 0.114])


def class_name(character: str) -> str:
    """Folder name from the Unicode name: lower-case ASCII, e.g. 'greek-capital-omega', 'digit-two'."""
    return unicodedata.name(character).replace("LETTER ", "").lower().replace(" ", "-")


def class_splits() -> dict[str, list[str]]:
    """{'train': 64 characters, 'val': 16, 'test': 20}, disjoint.

    Every fifth of CHARACTERS goes to test and four of every 25 to val, so that each split has all
    six scripts. The split does not depend on the seed.
    """
    splits = {"train": [], "val": [], "test": []}
    for position, character in enumerate(CHARACTERS):
        split = (
            "test" if position % 5 == 4 else "val" if position % 25 in (1, 8, 12, 20) else "train"
        )
        splits[split].append(character)
    return splits


@cache
def character_map(face: str) -> frozenset[int]:
    """The code points for which a typeface has a shape. Raises FileNotFoundError if matplotlib
    lacks the file.
    """
    return frozenset(FT2Font(face_file(face)).get_charmap())


def face_file(face: str) -> str:
    """Path of a typeface inside matplotlib. Raises FileNotFoundError."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise FileNotFoundError(
            errno.ENOENT, "a typeface of matplotlib is missing, reinstall matplotlib", str(path)
        )
    return str(path)


@cache
def faces(character: str) -> tuple[str, ...]:
    """The typefaces that can draw a character, in a fixed order; at least twelve for each of
    CHARACTERS.
    """
    candidates = UNICODE_FACES + (ASCII_FACES if character.isascii() else ())
    return tuple(face for face in candidates if ord(character) in character_map(face))


@cache
def letter(character: str, face: str, font_size: int) -> Image.Image:
    """A character's shape, cropped to its ink. Mode L, 255 where there is ink; font_size in pixels."""
    # BASIC: the other layout engine depends on whether a system library is installed
    font = ImageFont.truetype(face_file(face), font_size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font)
    return canvas.crop(canvas.getbbox())


def place(shape: Image.Image, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Turn, slant, scale and move a whole shape into the image; returns ink coverage, float
    [image_size, image_size].
    """
    angle = np.deg2rad(rng.uniform(*ROTATION))
    shear, stretch, size = rng.uniform(*SHEAR), rng.uniform(*STRETCH), rng.uniform(*SIZE)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([stretch, 1.0])
    extent = np.abs(forward) @ shape.size  # of the transformed bounding box
    side = OVERSAMPLING * image_size
    scale = size * side / extent.max()
    centre = side / 2 + rng.uniform(*PLACE, size=2) * (side - scale * extent) / 2

    backward = np.linalg.inv(
        scale * forward
    )  # Pillow wants where each pixel of the result comes from
    offset = np.array(shape.size) / 2 - backward @ centre
    affine = (*backward[0], offset[0], *backward[1], offset[1])
    placed = shape.transform(
        (side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    blurred = placed.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR) * side))
    return np.asarray(blurred.reduce(OVERSAMPLING), dtype=np.float64) / 255


def colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paper and darker ink: two RGB colours, float [3] in 0 .. 1, at least CONTRAST of luma apart."""
    while True:
        paper, ink = rng.uniform(size=(2, 3))
        if (paper - ink) @ LUMA >= CONTRAST:
            return paper, ink


def draw(seed: int, character: str, index: int, image_size: int) -> Image.Image:
    """Image number `index` of a class: RGB, image_size x image_size pixels; a pure function of its
    arguments.

    The choices do not depend on image_size: another size gives the same picture, except for noise.
    """
    rng = np.random.Generator(
        np.random.Philox(np.random.SeedSequence(seed, spawn_key=(ord(character), index)))
    )
    face = faces(character)[rng.integers(len(faces(character)))]
    coverage = place(letter(character, face, OVERSAMPLING * image_size), rng, image_size)[..., None]
    paper, ink = colours(rng)
    clouds = Image.fromarray(
        (rng.uniform(*TEXTURE) * rng.standard_normal((5, 5))).astype(np.float32)
    )
    clouds = np.asarray(clouds.resize((image_size, image_size), Image.Resampling.BICUBIC))[
        ..., None
    ]
    picture = (paper + clouds) * (1 - coverage) + ink * coverage
    picture += rng.uniform(*NOISE) * rng.standard_normal(picture.shape)
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


# ---- The folder ----


def make(folder: Path, settings: dict[str, int]) -> None:
    """Write the whole data set and its marker into an empty folder. Raises OSError."""
    seed, image_size, per_class = settings["seed"], settings["image_size"], settings["per_class"]
    digits = max(3, len(str(per_class - 1)))
    classes = [
        (split, character) for split, members in class_splits().items() for character in members
    ]
    with tqdm(
        total=len(classes) * per_class, desc="drawing", unit=" images", disable=None, leave=False
    ) as bar:
        for split, character in classes:
            class_folder = folder / split / class_name(character)
            class_folder.mkdir(parents=True)
            for index in range(per_class):
                image = draw(seed, character, index, image_size)
                image.save(
                    class_folder / f"{index:0{digits}d}.jpg", "JPEG", quality=92, subsampling=0
                )
                bar.update()
    made_with = {
        "matplotlib": matplotlib.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
    (folder / MARKER).write_text(
        json.dumps({**settings, "made_with": made_with}, indent=2) + "\n", encoding="utf-8"
    )


def check(dest: Path, settings: dict[str, int]) -> bool:
    """True if dest holds this very data set, False if it is missing or empty. Raises UserError if
    it is anything else.
    """
    if not dest.exists():
        return False
    if not dest.is_dir():
        raise UserError(f"{dest} is a file, not a folder: choose another --dest")
    if not any(dest.iterdir()):
        return False
    advice = "choose another --dest or remove it"
    try:
        found = json.loads((dest / MARKER).read_text(encoding="utf-8"))
        found = {key: found[key] for key in settings}
    except FileNotFoundError:
        raise UserError(f"{dest} holds something else (it has no {MARKER}): {advice}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{dest / MARKER} is damaged: {advice}") from None
    differing = [
        f"{key} {found[key]!r} (asked: {settings[key]})"
        for key in settings
        if found[key] != settings[key]
    ]
    if differing:
        raise UserError(f"{dest} was made with {', '.join(differing)}: {advice}")
    images, expected = (
        sum(1 for _ in dest.glob("*/*/*.jpg")),
        len(CHARACTERS) * settings["per_class"],
    )
    if images != expected:
        raise UserError(f"{dest} holds {images} images, {expected} were made: {advice}")
    return True


def ensure(dest: Path, settings: dict[str, int]) -> bool:
    """Make the data set unless it is there already; returns whether it was made.

    Raises:
        UserError: something else is there; it is left as it is.
        OSError: it cannot be written.
    """
    if check(dest, settings):
        return False
    dest.parent.mkdir(parents=True, exist_ok=True)
    lock, unfinished = dest.parent / f".{dest.name}.lock", dest.parent / f".{dest.name}.tmp"
    with file_lock(lock, wait=True):
        try:
            if check(dest, settings):  # another run made it while this one waited
                return False
            if unfinished.exists():  # of a run that was killed
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            make(unfinished, settings)
            if dest.exists():
                dest.rmdir()  # empty, says check; renaming over it is not possible everywhere
            unfinished.rename(dest)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                lock.unlink()
    return True


# ---- The command line ----


def parse(argv: list[str]) -> argparse.Namespace:
    summary = "Draw 100 classes of characters (64 train, 16 val, 20 test) as JPEG images; nothing is downloaded."
    parser = Parser(prog="glyphs.py", description=summary)
    words = "folder to make, which must not exist yet (default: %(default)s)"
    parser.add_argument("--dest", type=Path, default=DATA / "glyphs", metavar="FOLDER", help=words)
    words = "width and height of an image, 16 to 512 pixels (default: %(default)s)"
    parser.add_argument(
        "--image-size", type=int_range(16, 512), default=32, metavar="PIXELS", help=words
    )
    words = "images of each class, 1 to 10000 (default: %(default)s)"
    parser.add_argument(
        "--per-class", type=int_range(1, 10_000), default=60, metavar="IMAGES", help=words
    )
    words = "seed of every random choice, 0 or more (default: %(default)s)"
    parser.add_argument(
        "--seed", type=int_range(0, 2**63 - 1), default=719, metavar="NUMBER", help=words
    )
    return parser.parse_args(argv)


def _run(argv: list[str]) -> int:
    args = parse(argv)
    settings = {
        "recipe": RECIPE,
        "seed": args.seed,
        "image_size": args.image_size,
        "per_class": args.per_class,
    }
    started = time.perf_counter()
    try:
        refuse_code_folder(args.dest)
        made = ensure(args.dest.resolve(), settings)
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        return 130
    except OSError as error:
        raise UserError(f"{error.filename or args.dest}: {error.strerror or error}") from error
    except RuntimeError as error:  # a loop of symbolic links, before Python 3.13
        raise UserError(f"{args.dest}: {error}") from error
    if not made:
        print(f"{args.dest} is there already, nothing to do")
        return 0
    counts = ", ".join(f"{len(members)} {split}" for split, members in class_splits().items())
    print(
        f"{args.dest}: {len(CHARACTERS)} classes ({counts}) x {args.per_class} images of {args.image_size} x "
        f"{args.image_size} px, seed {args.seed}, drawn in {time.perf_counter() - started:.1f} s"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_main(_run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
