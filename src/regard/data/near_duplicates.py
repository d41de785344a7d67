"""The same picture twice: scaled, saved again, cropped, brightened, mirrored, with other text.

Three stages, each applied to what the previous one left: candidates by coarse structure
(`similar`), alignment and comparison of details on 32-pixel thumbnails (`registration`), and the
same on larger thumbnails, which are read again for the few remaining pairs.
`benchmarks/near_duplicates.py` measures recall and precision.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from regard.cores import cores
from regard.data.registration import Agreement, agreement, correlation, register
from regard.data.similar import Candidates, View, find_candidates, views_for
from regard.data.table import ImageTable
from regard.data.thumbnails import SIDE, read_thumbnail, read_thumbnail_and_side
from regard.errors import ImageError
from regard.files import plural, spread

LEAK_LIMIT = 20_000  # images that `leak_line` reads
_CHUNK = 64  # images per task of a thread
_BATCH = 1024  # pairs aligned at a time
_CLOSE = 96  # pixels of the larger thumbnails
_COARSE = 0.7  # correlation of 16-pixel thumbnails after alignment; planted copies have 0.93
_SMALLEST = 20  # pixels of the shorter side: smaller images show too little detail
_SMALL = 32  # two images below this are not compared: digits of one font look the same
_LEAST_LEFT = 0.65  # of an axis, after a crop
_LEAST_LEFT_OF_SMALL = 0.72  # the same if 32-pixel thumbnails decide
_FLAT = 4.0  # gray levels: a thumbnail with a smaller standard deviation shows nothing to compare


class Thresholds(NamedTuple):
    """The agreement required to call two images the same picture; see `Agreement`."""

    tiles: int
    share: float
    median: float
    inner_tiles: int
    inner_share: float
    inner_median: float

    def met(self, agreed: Agreement) -> NDArray[np.bool_]:
        """(P,) whether all thresholds are met."""
        pairs = zip(self, agreed[: len(self)], strict=True)
        return np.all([value >= least for least, value in pairs], axis=0)


_PROMISING = Thresholds(6, 0.4, 0.45, 2, 0.4, 0.5)  # on small thumbnails of larger images
_SAME = Thresholds(8, 0.55, 0.7, 3, 0.7, 0.88)


@dataclass(frozen=True, order=True)
class NearDuplicate:
    """Two images that show the same picture.

    Attributes:
        rank: 0: different labels; 1: the same label in different splits; 2: neither.
        first, second: rows of the table, first < second.
        similarity: median correlation of the details, 0 to 1.
        mirrored: one is a mirror image of the other.
    """

    rank: int
    first: int
    second: int
    similarity: float
    mirrored: bool


class Thumbnails:
    """Thumbnails of a table's readable images.

    Attributes:
        pixels: (N, SIDE, SIDE) uint8.
        sides: (N,) shorter sides of the images, in pixels; 0: not read.
    """

    def __init__(self, count: int) -> None:
        self.pixels: NDArray[np.uint8] = np.zeros((count, SIDE, SIDE), np.uint8)
        self.sides: NDArray[np.int32] = np.zeros(count, np.int32)

    def add(self, i: int, pixels: NDArray[np.uint8], side: int) -> None:
        """Sets the thumbnail of image i, with the length of its shorter side."""
        self.pixels[i], self.sides[i] = pixels, side


def read_thumbnails(
    table: ImageTable,
    rows: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Thumbnails:
    """The thumbnails of a table's images, or of these rows; JPEG files are read at reduced size.

    Unreadable images are left out.
    """
    rows = np.arange(len(table)) if rows is None else rows
    read = Thumbnails(len(table))

    def look(part: NDArray[np.int64]) -> int:
        for i in part.tolist():
            with contextlib.suppress(ImageError):
                read.add(i, *read_thumbnail_and_side(table, i))
        return len(part)

    done = 0
    with ThreadPoolExecutor(min(8, cores())) as pool:
        parts = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
        for count in pool.map(look, parts):
            done += count
            if progress is not None:
                progress(done, len(rows))
    return read


def find_near_duplicates(
    table: ImageTable,
    thumbnails: Thumbnails,
    *,
    same: Iterable[Sequence[int]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[NearDuplicate]:
    """Pairs of images that show the same picture, sorted: different labels, splits, the rest.

    Images without any structure, such as black ones, are not in any pair.

    Args:
        table: N images.
        thumbnails: the images' thumbnails.
        same: groups of rows with identical pixels; only the first of each is compared.
        progress: called with (images done, images in total).
    """
    # The products are many and small. BLAS threads wait for each other at each one, and with fewer
    # free cores than threads, as next to other runs, seconds become minutes.
    with threadpool_limits(1):
        return _found(table, thumbnails, same, progress)


def _found(
    table: ImageTable,
    thumbnails: Thumbnails,
    same: Iterable[Sequence[int]],
    progress: Callable[[int, int], None] | None,
) -> list[NearDuplicate]:
    deviations = _deviations(thumbnails.pixels)
    usable = (thumbnails.sides >= _SMALLEST) & (deviations >= _FLAT)
    if thumbnails.sides.max(initial=0) < _SMALL:
        return []
    for group in same:
        usable[list(group)[1:]] = False
    rows = np.flatnonzero(usable)
    if len(rows) < 2:
        return []
    found = find_candidates(thumbnails.pixels, rows, progress)
    views = views_for(len(rows))
    pairs = []
    for start in range(0, len(found.first), _BATCH):
        batch = found.taken(slice(start, start + _BATCH))
        pairs += _decided(table, thumbnails, batch, views)
    return sorted(pairs)


def _deviations(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    parts = [
        pixels[at : at + 4096].std(axis=(1, 2), dtype=np.float32)
        for at in range(0, len(pixels), 4096)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _decided(
    table: ImageTable, thumbnails: Thumbnails, pairs: Candidates, views: list[View]
) -> list[NearDuplicate]:
    """The candidates that do show the same picture."""
    windows = np.array([_window(views[v]) for v in pairs.view], np.float32).reshape(-1, 4)
    mirrored = np.array([views[v].mirrored for v in pairs.view], bool)
    first = thumbnails.pixels[pairs.first].astype(np.float32)
    first[mirrored] = first[mirrored][:, :, ::-1]
    second = thumbnails.pixels[pairs.second].astype(np.float32)
    windows = register(_halved(first), _halved(second), windows, (1.0,), 4)
    at = np.flatnonzero(correlation(_halved(first), _halved(second), windows) > _COARSE)
    if not len(at):
        return []
    windows = register(first[at], second[at], windows[at], (1.0, 0.0), 4)
    agreed = agreement(first[at], second[at], windows, sigma=2.0)
    smaller = np.minimum(thumbnails.sides[pairs.first[at]], thumbnails.sides[pairs.second[at]])
    close = np.minimum(smaller // 16 * 16, _CLOSE)
    close[close < 48] = 0  # little more than the thumbnail shows
    good = np.where(
        close > 0,
        _PROMISING.met(agreed) & _plausible(windows, _LEAST_LEFT),
        _SAME.met(agreed) & _plausible(windows, _LEAST_LEFT_OF_SMALL),
    )
    larger = np.maximum(thumbnails.sides[pairs.first[at]], thumbnails.sides[pairs.second[at]])
    good &= larger >= _SMALL

    def decide(k: int) -> NearDuplicate | None:
        i, j, turned = int(pairs.first[at[k]]), int(pairs.second[at[k]]), bool(mirrored[at[k]])
        similarity: float | None = float(agreed.inner_median[k])
        if close[k]:
            similarity = _look_closer(table, i, j, turned, windows[k], int(close[k]))
        return None if similarity is None else _pair(table, i, j, similarity, turned)

    with ThreadPoolExecutor(min(8, cores())) as pool:
        return [pair for pair in pool.map(decide, np.flatnonzero(good).tolist()) if pair]


def _window(view: View) -> tuple[float, float, float, float]:
    """See `registration.Windows`."""
    (top, bottom), (left, right) = view.y, view.x
    return right - left, left + right - 1, bottom - top, top + bottom - 1


def _halved(images: NDArray[np.float32]) -> NDArray[np.float32]:
    pairs, side, _ = images.shape
    return images.reshape(pairs, side // 2, 2, side // 2, 2).mean((2, 4))


def _plausible(windows: NDArray[np.float32], least: float) -> NDArray[np.bool_]:
    """Whether a crop that keeps at least `least` of each axis explains the windows."""
    scales, shifts = windows[:, 0::2], np.abs(windows[:, 1::2])
    return np.all((scales > least) & (scales < 1 / least) & (shifts < 1 - least), axis=1)


def _look_closer(
    table: ImageTable, i: int, j: int, mirrored: bool, window: NDArray[np.float32], side: int
) -> float | None:
    """The similarity of two images on larger thumbnails; None if they are different pictures."""
    try:
        first, second = (read_thumbnail(table, k, side).astype(np.float32)[None] for k in (i, j))
    except ImageError:
        return None  # it was readable a moment ago
    first = first[:, :, ::-1].copy() if mirrored else first
    windows = register(first, second, window[None], (side / 48, 0.5), 2)
    agreed = agreement(first, second, windows, sigma=side / 24)
    same = bool(_SAME.met(agreed)[0] and _plausible(windows, _LEAST_LEFT)[0])
    return float(agreed.inner_median[0]) if same else None


def keep_together(
    table: ImageTable, pairs: Iterable[NearDuplicate], same: Iterable[Sequence[int]] = ()
) -> ImageTable:
    """The table with groups that keep near-duplicates together when it is split.

    Existing groups that share a pair are joined. Images that are in a split other than train stay
    apart, as they can't be moved.

    Args:
        table: N images.
        pairs: from `find_near_duplicates`.
        same: groups of rows with identical pixels.
    """
    links = [(p.first, p.second) for p in pairs]
    links += [(group[0], other) for group in same for other in group[1:]]
    movable = (table.splits == "") | (table.splits == "train")
    links = [(i, j) for i, j in links if movable[i] and movable[j]]
    if table.groups is not None:
        _, first, group = np.unique(table.groups, return_index=True, return_inverse=True)
        links += zip(first[group].tolist(), range(len(table)), strict=True)
    if not links:
        return table
    i, j = np.array(links).T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(table), len(table)))
    _, component = connected_components(graph, directed=False)
    names = table.groups
    if names is None:
        names = np.array([table.key(k) for k in range(len(table))])
    order = np.lexsort((names, component))  # a component gets the first of its names
    starts = np.flatnonzero(np.diff(component[order], prepend=-1))
    return replace(table, groups=names[order[starts]][component])


def grouped_by_content(
    table: ImageTable, progress: Callable[[int, int], None] | None = None
) -> ImageTable:
    """The table with groups that keep copies and near-duplicates together when it is split.

    Args:
        table: N images; each is read.
        progress: called with (images done, images in total).
    """
    pairs = find_near_duplicates(table, read_thumbnails(table, progress=progress))
    return keep_together(table, pairs)


def leak_line(table: ImageTable, most: int = LEAK_LIMIT) -> str | None:
    """A warning that near-duplicates are in different splits of a table; None if none are.

    Args:
        table: N images with their splits.
        most: number of images that are looked at, evenly spread.
    """
    rows = spread(len(table), most)
    if len(np.unique(table.splits)) < 2:
        return None
    pairs = find_near_duplicates(table, read_thumbnails(table, rows))
    across = [p for p in pairs if table.splits[p.first] != table.splits[p.second]]
    if not across:
        return None
    first, second = (
        f"{table.path(i)} ({table.splits[i]})" for i in (across[0].first, across[0].second)
    )
    looked = "" if len(rows) == len(table) else f" among {len(rows):,} of {len(table):,} images"
    return (
        f"{plural(len(across), 'pair')} of near-duplicates in different splits{looked}, such as "
        f"{first} and {second}: scores would be too good; keep_together puts them into one split "
        "where splits are made"
    )


def _pair(table: ImageTable, i: int, j: int, similarity: float, mirrored: bool) -> NearDuplicate:
    i, j = min(i, j), max(i, j)
    rank = (
        0 if table.labels[i] != table.labels[j] else 1 if table.splits[i] != table.splits[j] else 2
    )
    return NearDuplicate(rank, i, j, round(min(similarity, 1.0), 4), mirrored)


# ---- in words

REASONS = ("labels", "splits", "copies")
"""By rank: two labels, two splits, neither."""


def describe_pair(table: ImageTable, pair: NearDuplicate) -> dict[str, Any]:
    """A pair in the form of `DataCheck.near_duplicates`."""
    both = (pair.first, pair.second)
    return {
        "paths": [table.path(i) for i in both],
        "labels": [table.classes[table.labels[i]] for i in both],
        "splits": [str(table.splits[i]) for i in both],
        "reason": REASONS[pair.rank],
        "similarity": pair.similarity,
        "mirrored": pair.mirrored,
    }


def near_duplicate_lines(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """What the pairs of `DataCheck.near_duplicates` mean, a line for each reason."""
    labels = sum(pair["labels"][0] != pair["labels"][1] for pair in pairs)
    splits = sum(pair["splits"][0] != pair["splits"][1] for pair in pairs)
    rest = sum(pair["reason"] == "copies" for pair in pairs)
    lines = []
    if labels:
        lines.append(f"{plural(labels, 'pair')} of near-duplicates with different labels")
    if splits:
        lines.append(
            f"{plural(splits, 'pair')} of near-duplicates in different splits: scores would be "
            "too good"
        )
    if rest:
        lines.append(f"{plural(rest, 'pair')} of near-duplicates with one label in one split")
    return lines
