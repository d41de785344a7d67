"""Reading images, tables of labeled images, splits, and data checks.

Nothing here imports torch; modules that do, such as `loading`, are imported by their own name.
"""

from regard.data.audit import DataCheck, check_data
from regard.data.images import IMAGE_SUFFIXES, read_image
from regard.data.sources import ImageTable, class_counts, open_data
from regard.data.splits import assign_splits
from regard.data.splits_file import read_splits, write_splits
from regard.errors import ImageError

__all__ = [
    "IMAGE_SUFFIXES",
    "DataCheck",
    "ImageError",
    "ImageTable",
    "assign_splits",
    "check_data",
    "class_counts",
    "open_data",
    "read_image",
    "read_splits",
    "write_splits",
]
