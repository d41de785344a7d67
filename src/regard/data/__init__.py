"""Where images come from: reading files, tables of labelled images, splits, checking.

Nothing here imports torch; `loading` and `transforms`, which do, are imported by their name.
"""

from regard.data.check import DataCheck, check_data, print_check
from regard.data.images import IMAGE_SUFFIXES, ImageError, read_image
from regard.data.sources import ImageTable, class_counts, open_data
from regard.data.splits import assign_splits, read_splits, write_splits

__all__ = [
    "IMAGE_SUFFIXES",
    "DataCheck",
    "ImageError",
    "ImageTable",
    "assign_splits",
    "check_data",
    "class_counts",
    "open_data",
    "print_check",
    "read_image",
    "read_splits",
    "write_splits",
]
