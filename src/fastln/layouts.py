"""The names of the data layouts that fastln reads. Apart from their readers, which are slow to import."""

from __future__ import annotations

LAYOUTS = ("vqa-rad", "slake", "path-vqa", "parquet", "iu-xray", "llava-med", "plain")
