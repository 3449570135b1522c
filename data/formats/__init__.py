"""Reads a data set in any of the forms that people hold it in, and writes it as
{train,val,test}/<class>/<image>.

A source (sources) is detected (detect) as a plan (manifest), which is carried out (build) and
examined (check).
"""

import os
from pathlib import Path

from utils import UserError

DATA = Path(__file__).resolve().parent.parent
_CODE = (DATA / "formats", DATA / "splits")


def refuse_code_folder(dest: Path) -> None:
    """Raise UserError if ``dest`` is, or lies in, one of the folders of data/ that hold code and
    class lists.
    """
    place = Path(os.path.realpath(dest))
    for folder in _CODE:
        if folder in (place, *place.parents):
            raise UserError(
                f"{dest}: --dest must not be in {folder}, which is part of the code: choose another --dest"
            )
