"""Reads a data set in any known format and writes it as {train,val,test}/<class>/<image>.

`sources` opens folders and unpacks archives, `detect` finds the format and makes a manifest,
`build` writes the images of the manifest, `check` examines the result."""

from utils import ROOT

DATA = ROOT / "data"
