"""Candidates for near-duplicates among millions of thumbnails, in bounded memory.

Like pHash (Zauner 2010), this uses the lowest frequencies of a thumbnail's discrete cosine
transform, but does not round them to bits, and decorrelates them over the data set, so that
what all images share, such as a scanner's sector on a dark background, does not count. Crops
and mirror images of a thumbnail come from the same transform. Vectors are only compared within
the cells of a k-means clustering (an inverted file, Jégou et al. 2011).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct

from regard.data.thumbnails import SIDE

MOST = 8  # candidates per image
_FREQUENCIES = 8  # per axis
_SPANS = ((0.0, 1.0), (0.0, 0.92), (0.08, 1.0), (0.04, 0.96))  # parts of an axis that a crop keeps
_LARGER_CROPS = ((0.0, 0.84), (0.16, 1.0), (0.08, 0.92), (0.12, 0.88))  # if there are few images
_FEW = 5_000  # up to this many images, larger crops are compared too
_MANY = 200_000  # above this many images, fewer views are compared
_BRUTE = 4096  # up to this many images, all pairs are compared
_PROBED = 3  # cells
_CHUNK = 4096  # images per block of comparisons
_LEAST = 0.65  # cosine; 98 % of the benchmark's planted copies of each kind reach 0.7
_LEAST_OF_FEW = 0.4  # for a few thousand images, all of whose candidates can be aligned


class View(NamedTuple):
    """A part of an image, mirrored or not; fractions of its height and width."""

    y: tuple[float, float]
    x: tuple[float, float]
    mirrored: bool


class Candidates(NamedTuple):
    """Pairs to look at, each (P,): view `view` of image `first` resembles image `second`."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    view: NDArray[np.int64]
    cosine: NDArray[np.float32]

    def taken(self, at: Any) -> "Candidates":
        """A selection of the pairs, by any NumPy index."""
        return Candidates(self.first[at], self.second[at], self.view[at], self.cosine[at])

    @classmethod
    def joined(cls, parts: "list[Candidates]") -> "Candidates":
        """The pairs of several `Candidates`."""
        return cls(
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.second for part in parts]),
            np.concatenate([part.view for part in parts]),
            np.concatenate([part.cosine for part in parts]),
        )


def views_for(images: int) -> list[View]:
    """The views of each image that are compared with the whole images."""
    spans: tuple[tuple[float, float], ...] = _SPANS[:3] if images > _MANY else _SPANS
    if images <= _FEW:
        spans += _LARGER_CROPS
    parts = list(itertools.product(spans, spans))
    mirrored = parts[:1] if images > _MANY else parts
    return [*(View(*p, False) for p in parts), *(View(*p, True) for p in mirrored)]


def find_candidates(
    thumbnails: NDArray[np.uint8],
    rows: NDArray[np.int64],
    progress: Callable[[int, int], None] | None = None,
) -> Candidates:
    """Up to `MOST` of the most similar images for each image.

    Args:
        thumbnails: (N, SIDE, SIDE).
        rows: the images to compare.
        progress: called with (images done, images in total).
    """
    views = views_for(len(rows))
    space = _Space(thumbnails, rows)
    index = _Index(space, rows)
    least = _LEAST if len(rows) > _BRUTE else _LEAST_OF_FEW
    parts = [_none()]
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        queries = np.concatenate([space.vectors(chunk, view) for view in views])
        found = index.search(queries, np.tile(chunk, len(views)), len(chunk), least)
        parts.append(_limited(_once(found)))
        if progress is not None:
            progress(min(start + _CHUNK, len(rows)), len(rows))
    pairs = _once(Candidates.joined(parts))
    return _limited(pairs)


def _none() -> Candidates:
    at = np.zeros(0, np.int64)
    return Candidates(at, at, at, np.zeros(0, np.float32))


class _Space:
    """Thumbnails as unit vectors."""

    def __init__(self, thumbnails: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self.thumbnails = thumbnails
        self.mean = np.zeros(_FREQUENCIES**2 - 1, np.float32)
        self.whiten = np.eye(_FREQUENCIES**2 - 1, dtype=np.float32)
        sample = rows[:: max(1, len(rows) // 50_000)]
        plain = self.vectors(sample, View((0.0, 1.0), (0.0, 1.0), False))
        self.mean = plain.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov((plain - self.mean).T.astype(np.float64)))
        floor = 0.02 * values.max() + 1e-9
        self.whiten = (vectors / np.sqrt(np.maximum(values, 0) + floor)).astype(np.float32)

    def vectors(self, rows: NDArray[np.int64], view: View) -> NDArray[np.float32]:
        """(n, 63) unit vectors of a view of these images."""
        images = self.thumbnails[rows].astype(np.float32)
        low = _frequencies(view.y) @ images @ _frequencies(view.x).T  # (n, 8, 8)
        if view.mirrored:
            low[:, :, 1::2] *= -1
        flat = low.reshape(len(rows), -1)[:, 1:]  # drops the mean brightness
        return _unit((_unit(flat) - self.mean) @ self.whiten)


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return vectors.astype(np.float32, copy=False) / np.maximum(
        np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6
    )


def _frequencies(span: tuple[float, float]) -> NDArray[np.float32]:
    """(8, SIDE): the lowest cosine coefficients of part of an axis, resampled linearly."""
    low, high = span
    at = (low + (high - low) * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5
    at = np.clip(at, 0, SIDE - 1)[:, None]
    resampled = np.maximum(0, 1 - np.abs(at - np.arange(SIDE)))
    return dct(resampled, axis=0, norm="ortho")[:_FREQUENCIES].astype(np.float32)


class _Index:
    """The whole images, sorted into the cells of a clustering."""

    def __init__(self, space: _Space, rows: NDArray[np.int64]) -> None:
        whole = View((0.0, 1.0), (0.0, 1.0), False)
        parts = [rows[at : at + _CHUNK] for at in range(0, len(rows), _CHUNK)]
        vectors = np.concatenate([space.vectors(part, whole).astype(np.float16) for part in parts])
        self.centers = _centers(vectors)
        cell = np.concatenate(
            [self._nearest(vectors[at : at + _CHUNK], 1) for at in range(0, len(rows), _CHUNK)]
        )[:, 0]
        order = np.argsort(cell, kind="stable")
        self.rows, self.vectors = rows[order], vectors[order]
        self.starts = np.searchsorted(cell[order], np.arange(len(self.centers) + 1))

    def _nearest(self, vectors: NDArray[np.floating], count: int) -> NDArray[np.int64]:
        """(n, count) nearest cells."""
        near = vectors.astype(np.float32) @ self.centers.T
        if count >= near.shape[1]:
            return np.tile(np.arange(near.shape[1]), (len(near), 1))
        return np.argpartition(-near, count - 1, axis=1)[:, :count]

    def search(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], images: int, least: float
    ) -> Candidates:
        """The indexed images that these views of `images` images resemble."""
        count = min(_PROBED, len(self.centers))
        cells = np.concatenate(
            [self._nearest(queries[at : at + _CHUNK], count) for at in range(0, len(rows), _CHUNK)]
        )
        order = np.argsort(cells.ravel(), kind="stable")
        bounds = np.searchsorted(cells.ravel()[order], np.arange(len(self.centers) + 1))
        parts = [_none()]
        for cell in range(len(self.centers)):
            asked = order[bounds[cell] : bounds[cell + 1]] // count
            stored = slice(self.starts[cell], self.starts[cell + 1])
            members = self.vectors[stored].astype(np.float32).T
            for at in range(0, len(asked), _CHUNK):
                some = asked[at : at + _CHUNK]
                cosines = queries[some] @ members
                q, j = _highest(cosines, least)
                first, second = rows[some[q]], self.rows[stored][j]
                other = first != second
                parts.append(
                    Candidates(
                        first[other], second[other], some[q[other]] // images,
                        cosines[q, j][other],
                    )
                )  # fmt: skip
        return Candidates.joined(parts)


def _centers(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """(cells, 63), about sqrt(N) cells; a single one for few images."""
    if len(vectors) <= _BRUTE:
        return np.zeros((1, vectors.shape[1]), np.float32)
    from sklearn.cluster import MiniBatchKMeans

    cells = round(len(vectors) ** 0.5)
    sample = vectors[:: max(1, len(vectors) // (64 * cells))].astype(np.float32)
    means = MiniBatchKMeans(cells, n_init=1, max_iter=20, batch_size=8192, random_state=0)
    return _unit(means.fit(sample).cluster_centers_.astype(np.float32))


def _highest(
    cosines: NDArray[np.float32], least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of up to MOST + 1 values per row, each at least `least`."""
    q, j = np.nonzero(cosines >= least)
    counts = np.bincount(q, minlength=len(cosines))
    many = np.flatnonzero(counts > MOST + 1)
    if len(many):
        top = np.argpartition(-cosines[many], MOST, axis=1)[:, : MOST + 1]
        few = counts[q] <= MOST + 1
        q = np.concatenate([q[few], np.repeat(many, MOST + 1)])
        j = np.concatenate([j[few], top.ravel()])
    return q, j


def _once(pairs: Candidates) -> Candidates:
    """Each unordered pair once, with its best view."""
    low, high = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    order = np.lexsort((pairs.view, -pairs.cosine, high, low))
    low, high = low[order], high[order]
    new = np.ones(len(order), bool)
    new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return pairs.taken(order[new])


def _limited(pairs: Candidates) -> Candidates:
    """The pairs that are among the MOST best of at least one of their images."""
    keep = np.zeros(len(pairs.first), bool)
    for image in (pairs.first, pairs.second):
        order = np.lexsort((-pairs.cosine, image))
        starts = np.flatnonzero(np.diff(image[order], prepend=-1))
        ranks = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        keep[order[ranks < MOST]] = True
    return pairs.taken(keep)
