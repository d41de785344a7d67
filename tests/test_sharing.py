"""Held images of several processes of a machine: decoded once among them, and there once."""

import threading

import pytest
import torch

from regard.data.augment import Augmentation
from regard.data.loading import Reader, decode_all
from regard.data.preprocess import Preprocess
from regard.data.sources import open_data
from regard.training import sharing
from regard.training.config import Recipe
from regard.training.sharing import decode_together
from regard.training.splits import load_split

UNIT = Preprocess((1, 12, 12), (0.5,), (0.25,))


class Together:
    """Two processes' exchange, between two threads of one."""

    def __init__(self, count: int, per_machine: int) -> None:
        self.barrier, self.values = threading.Barrier(count, timeout=60), [None] * count
        self.local = per_machine

    def ranks(self, rank: int):
        barrier, values = self.barrier, self.values

        class Ranks:
            count, local, place = len(values), self.local, rank % self.local

            def all(self, value):
                values[rank] = value
                barrier.wait()
                found = list(values)
                barrier.wait()
                return found

        Ranks.rank = rank
        return Ranks()


def in_each(work, count: int = 2, per_machine: int = 2) -> list:
    """work(ranks) in so many threads that exchange as processes do."""
    together, results = Together(count, per_machine), [None] * count

    def run(rank):
        results[rank] = work(together.ranks(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert all(result is not None for result in results)
    return results


class Counted(Reader):
    """A reader that lists the rows that it decoded."""

    def decode(self, index):
        self.__dict__.setdefault("rows", []).append(index)
        return super().decode(index)


def file_of(images) -> int:
    """The address of the pages' file: equal for maps of one file."""
    tensor = images if isinstance(images, torch.Tensor) else images[0]
    return tensor.untyped_storage().filename


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_each_process_decodes_its_share_and_has_all(scans, crop):
    table = open_data(str(scans))
    augmentation = None if crop == "none" else Augmentation(random_crop=crop)
    expected, _ = decode_all(Reader(table, UNIT, augmentation))
    readers = [Counted(table, UNIT, augmentation) for _ in range(2)]
    found = in_each(lambda ranks: decode_together(readers[ranks.rank], ranks))
    for rank, (images, bad) in enumerate(found):
        assert sorted(readers[rank].rows) == list(range(rank, len(table), 2))
        assert bad == []
        assert len(images) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
    assert isinstance(found[0][0], torch.Tensor) == (crop == "none")
    assert file_of(found[0][0]) == file_of(found[1][0]) is not None
    first, second = (images for images, _ in found)
    first[5][0, 0, 0] = 77  # the same memory
    assert second[5][0, 0, 0] == 77


def test_each_machine_has_its_own(scans):
    table = open_data(str(scans))
    found = in_each(lambda ranks: decode_together(Reader(table, UNIT), ranks), 4)
    files = [file_of(images) for images, _ in found]
    assert files[0] == files[1] != files[2] == files[3]
    assert torch.equal(found[0][0], found[3][0])


def test_unreadable_images_are_left_out_of_what_is_common(scans, tmp_path):
    import shutil

    shutil.copytree(scans, tmp_path / "scans")
    lost = sorted((tmp_path / "scans/1").iterdir())[3:5]
    for path in lost:
        path.write_bytes(b"no image")
    table = open_data(str(tmp_path / "scans"))
    alone = load_split(Reader(table, UNIT), Recipe(), "val", show=False)
    parts = in_each(
        lambda ranks: load_split(Reader(table, UNIT), Recipe(), "val", show=False, ranks=ranks)
    )
    for part in parts:
        assert torch.equal(part.images, alone.images)
        assert [path for path, _ in part.left_out] == [path for path, _ in alone.left_out]
        assert len(part.left_out) == 2
    assert file_of(parts[0].images) == file_of(parts[1].images) is not None


def test_without_room_for_a_file_each_process_holds_all(scans, monkeypatch):
    monkeypatch.setattr(sharing, "SPARE", 1e18)
    table = open_data(str(scans))
    expected, _ = decode_all(Reader(table, UNIT))
    for images, _ in in_each(lambda ranks: decode_together(Reader(table, UNIT), ranks)):
        assert torch.equal(images, expected)
        assert file_of(images) is None


def test_more_than_the_limit_is_held_by_none(scans):
    table = open_data(str(scans))
    for limit in (len(table) * 144 - 1, len(table) * 40):  # of all; of a share

        def work(ranks, limit=limit):
            return decode_together(Reader(table, UNIT), ranks, limit=limit)

        assert in_each(work) == [(None, [])] * 2


def test_no_file_is_left(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "SHARED_MEMORY", tmp_path)
    table = open_data(str(scans))
    found = in_each(lambda ranks: decode_together(Reader(table, UNIT), ranks))
    assert str(tmp_path) in str(file_of(found[0][0]))
    assert list(tmp_path.iterdir()) == []
