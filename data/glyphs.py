"""Draws a small data set of characters in mini-ImageNet's layout; nothing is downloaded.

    python data/glyphs.py            # 100 classes x 60 JPEG images of 32 x 32 px in data/glyphs

A class is one character of six scripts. An image shows it in one of 20 typefaces, which come with
matplotlib, at a random size, place and slant, in random colours, on random paper with noise.
It is a pure function of (seed, character, index). One machine writes the same bytes each time;
another version of Pillow may change a few grey levels."""

from __future__ import annotations

import argparse
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may not exist here

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

from engine.flags import Parser, int_range, path
from engine.process import Terminal, check_packages, run_main
from utils import SPLITS, UserError

if __name__ == "__main__":
    Terminal.take_over()
if code := run_main(check_packages, ["numpy", "PIL.Image", "tqdm.std", "matplotlib.ft2font"]):
    sys.exit(code)

import matplotlib
import numpy as np
import PIL
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.formats import DATA
from data.formats.build import Manifest, build, is_built

RECIPE = 1  # raise it when the same settings come to give other images

# ---- Classes: script by script, without characters that look like one already in the table (O/0,
# A/Α/А, З/3, n/ո) ----

CHARACTERS = "2345678ABDEGHJKLMNPQRSTUWXYZaeghmtyßæΓΔΘΞΣΦΨΩαβδελμξπσωДЖЛЦЧЩЪЫЭЮЯЉ"
CHARACTERS += "ԲԴԵԶԹԺԽԾԿՀՃՇՊՌՎՔՖձմდილორსტუფქძჭჯჰ"

# ---- Typefaces: files of matplotlib's mpl-data/fonts/ttf ----

_OBLIQUE = ("", "-Bold", "-Oblique", "-BoldOblique")
UNICODE_FACES = (
    *(f"DejaVuSans{width}{style}" for width in ("", "Mono") for style in _OBLIQUE),
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
    """Folder name: the Unicode name as lower-case ASCII, for example 'greek-capital-omega'."""
    return unicodedata.name(character).replace("LETTER ", "").lower().replace(" ", "-")


def class_splits() -> dict[str, list[str]]:
    """{'train': 64 characters, 'val': 16, 'test': 20}, disjoint.

    Every fifth of CHARACTERS goes to test and four of every 25 to val, so that each split has all
    six scripts. The split does not depend on the seed."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for n, character in enumerate(CHARACTERS):
        split = "test" if n % 5 == 4 else "val" if n % 25 in (1, 8, 12, 20) else "train"
        splits[split].append(character)
    return splits


def face_file(face: str) -> str:
    """Path of a typeface inside matplotlib. Raises UserError."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise UserError(f"{path}: a typeface of matplotlib is missing: reinstall matplotlib")
    return str(path)


@cache
def faces(character: str) -> tuple[str, ...]:
    """The typefaces that can draw a character, in a fixed order; at least twelve."""
    candidates = UNICODE_FACES + (ASCII_FACES if character.isascii() else ())
    return tuple(face for face in candidates if ord(character) in _character_map(face))


@cache
def _character_map(face: str) -> frozenset[int]:
    return frozenset(FT2Font(face_file(face)).get_charmap())


@cache
def letter(character: str, face: str, font_size: int) -> Image.Image:
    """A character's shape in mode L, 255 where there is ink, cropped; font_size in pixels."""
    # BASIC: the other layout engine depends on whether a system library is installed
    font = ImageFont.truetype(face_file(face), font_size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font)
    return canvas.crop(canvas.getbbox())


def place(shape: Image.Image, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Turn, slant, scale and move a whole shape: ink coverage, float [image_size, image_size]."""
    angle = np.deg2rad(rng.uniform(*ROTATION))
    shear, stretch, size = rng.uniform(*SHEAR), rng.uniform(*STRETCH), rng.uniform(*SIZE)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([stretch, 1.0])
    extent = np.abs(forward) @ shape.size  # of the transformed bounding box
    side = OVERSAMPLING * image_size
    scale = size * side / extent.max()
    centre = side / 2 + rng.uniform(*PLACE, size=2) * (side - scale * extent) / 2

    # Pillow wants where each pixel of the result comes from
    backward = np.linalg.inv(scale * forward)
    offset = np.array(shape.size) / 2 - backward @ centre
    affine = (*backward[0], offset[0], *backward[1], offset[1])
    how = Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    placed = shape.transform((side, side), *how)
    blurred = placed.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR) * side))
    return np.asarray(blurred.reduce(OVERSAMPLING), dtype=np.float64) / 255


def colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paper and darker ink: RGB, float [3] in 0 .. 1, at least CONTRAST of luma apart."""
    while True:
        paper, ink = rng.uniform(size=(2, 3))
        if (paper - ink) @ LUMA >= CONTRAST:
            return paper, ink


def draw(seed: int, character: str, index: int, image_size: int) -> Image.Image:
    """Image number `index` of a class: RGB, image_size x image_size pixels.

    The choices do not depend on image_size: another size gives the same picture, except for noise.
    """
    key = np.random.SeedSequence(seed, spawn_key=(ord(character), index))
    rng = np.random.Generator(np.random.Philox(key))
    face = faces(character)[rng.integers(len(faces(character)))]
    coverage = place(letter(character, face, OVERSAMPLING * image_size), rng, image_size)[..., None]
    paper, ink = colours(rng)
    clouds = (rng.uniform(*TEXTURE) * rng.standard_normal((5, 5))).astype(np.float32)
    square = (image_size, image_size), Image.Resampling.BICUBIC
    clouds = np.asarray(Image.fromarray(clouds).resize(*square))
    picture = (paper + clouds[..., None]) * (1 - coverage) + ink * coverage
    picture += rng.uniform(*NOISE) * rng.standard_normal(picture.shape)
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


# ---- The data set ----


def manifest(seed: int, image_size: int, per_class: int) -> Manifest:
    """The whole data set, as JPEG files; its keys are (character, index)."""

    def stream(wanted: set[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], bytes]]:
        for character, index in sorted(wanted):
            content = io.BytesIO()
            image = draw(seed, character, index, image_size)
            image.save(content, "JPEG", quality=92, subsampling=0)
            yield (character, index), content.getvalue()

    digits = max(3, len(str(per_class - 1)))
    items = {
        f"{split}/{class_name(character)}/{index:0{digits}d}.jpg": (character, index)
        for split, characters in class_splits().items()
        for character in characters
        for index in range(per_class)
    }
    packages = (("matplotlib", matplotlib), ("numpy", np), ("pillow", PIL))
    versions = ", ".join(f"{name} {package.__version__}" for name, package in packages)
    return Manifest(f"characters drawn with {versions}", stream, items)


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = Parser(
        prog="glyphs.py",
        description="Draw 100 classes of characters (64 train, 16 val, 20 test) as JPEG images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dest", help="folder to make", type=path, default=DATA / "glyphs")
    for flag, text, low, high, default in (
        ("--image-size", "width and height of an image, 16 to 512 pixels", 16, 512, 32),
        ("--per-class", "images of each class, 1 to 10000", 1, 10_000, 60),
        ("--seed", "seed of every random choice", 0, 2**63 - 1, 719),
    ):
        parser.add_argument(flag, help=text, type=int_range(low, high), default=default)
    settings = vars(parser.parse_args(argv))
    dest = Path(os.path.abspath(settings.pop("dest")))
    record = {"source": "glyphs", "recipe": RECIPE, **settings}
    if not is_built(dest, record):
        build(dest, record, lambda _: manifest(**settings))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
