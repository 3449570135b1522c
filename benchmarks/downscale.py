"""A copy of a data set with smaller photographs, squashed to SIZE x SIZE pixels and saved as PNG:
what does the size matter?
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from tqdm import tqdm

from dataloader import load_image, scan_split
from utils import SPLITS, Parser, UserError, int_range, run_main


def reduce(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "size", type=int_range(1), metavar="SIZE", help="height and width of the copies in pixels"
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder with train/, val/, test/ of class folders",
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to make, of the same form")
    args = parser.parse_args(argv)
    if args.dest.exists():
        raise UserError(f"{args.dest}: exists already; name a new folder")
    files = [
        path
        for split in SPLITS
        for of_class in scan_split(args.source, split).files
        for path in of_class
    ]
    args.dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dest.parent, prefix=".") as folder:
        made = Path(folder, args.dest.name)  # moves into place when it is complete
        for path in tqdm(files, unit=" images"):
            to = made / path.relative_to(args.source).with_suffix(".png")
            to.parent.mkdir(parents=True, exist_ok=True)
            load_image(path).resize((args.size, args.size), Image.Resampling.BICUBIC).save(to)
        made.rename(args.dest)
    print(f"{len(files)} images in {args.dest}")


if __name__ == "__main__":
    sys.exit(run_main(reduce, sys.argv[1:]))
