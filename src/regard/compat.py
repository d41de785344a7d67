"""Private names of timm, torch and others that Regard uses, each with the version it was seen in.

A name that has moved ends here with a sentence, not somewhere else with an AttributeError.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@functools.cache
def silence_libtiff() -> None:
    """Stops the libtiff inside Pillow from printing each fault of a file on standard error.

    Pillow (seen in 13.0, libtiff 4.7.2) leaves libtiff's default handlers, which write past
    Python's streams, and has no switch; what matters it raises as an exception. Where the
    library can't be located (not Linux) nothing happens.
    """
    import ctypes

    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in {line.split(maxsplit=5)[-1] for line in lines if "libtiff" in line}:
        try:
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
        except (OSError, AttributeError):
            continue


# raw modes of big-endian numbers, and of the machine's where that is little-endian
_BIG_ENDIAN = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}


def read_in_native_order(image: Any) -> None:
    """Corrects how PIL is going to read a TIFF of signed or float numbers that libtiff decodes.

    libtiff gives numbers in the machine's byte order, and Pillow (seen in 13.0) swaps those of a
    big-endian file once more. A version that does not asks for no big-endian raw mode here.
    """
    if sys.byteorder != "little":
        return
    image.tile = [
        tile._replace(args=(_BIG_ENDIAN[tile.args[0]], *tile.args[1:]))
        if tile.codec_name == "libtiff" and tile.args[0] in _BIG_ENDIAN else tile
        for tile in image.tile
    ]  # fmt: skip


def release_killed(batches: Any) -> None:
    """Frees the pipes, threads and data of a DataLoader's iterator whose workers were killed.

    torch (seen in 2.14) tells them to end by an event, whose lock one of them may have held.
    """
    batches._workers_done_event = threading.Event()
    batches._shutdown_workers()


def default_store() -> Any:
    """The key-value store of torch's default process group (torch 2.11 to 2.14)."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError as error:
        raise RuntimeError("this torch keeps its default store under another name") from error
    return _get_default_store()


def without_buffer_exchange() -> dict[str, Any]:
    """The argument by which DistributedDataParallel leaves buffers alone in the forward pass.

    It was broadcast_buffers until another name came with a warning about the old one (2.14).
    """
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


def feature_take_indices(count: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The maps that `indices` asks for among `count`, and the last of them (timm 1.0.31).

    timm's own `forward_intermediates` reads its argument by it: None means all, a number the
    last so many, and negative indices count from the end.
    """
    try:
        from timm.models._features import feature_take_indices as take
    except ImportError as error:
        raise RuntimeError("this timm has feature_take_indices in another place") from error
    return take(count, indices)


@contextlib.contextmanager
def downloads_in_small_steps(size: int) -> Iterator[None]:
    """Within, huggingface_hub (2.4) reports downloads each `size` bytes, not each 10 MB.

    A version that has the number elsewhere reports as it does.
    """
    from huggingface_hub import constants

    before = getattr(constants, "DOWNLOAD_CHUNK_SIZE", None)
    if before is None:
        yield
        return
    constants.DOWNLOAD_CHUNK_SIZE = size
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


def save_config_for_hf(model: Any, path: Path, **entries: Any) -> None:
    """Writes timm's config.json of a network (timm 1.0.31).

    Args:
        model: made by timm.create_model().
        path: of the file.
        entries: `model_config` and `data_config`, as timm's function takes them.
    """
    try:
        from timm.models._hub import save_config_for_hf as save
    except ImportError as error:
        raise RuntimeError("this timm has save_config_for_hf in another place") from error
    save(model, str(path), **entries)


def mark_pretrained(name: str) -> None:
    """Has timm (1.0.31) list a network as pretrained whose default entry has no weights.

    A version that keeps the list elsewhere lists it under its tagged names alone.
    """
    try:
        from timm.models._registry import _model_has_pretrained
    except ImportError:
        return
    _model_has_pretrained.add(name)


def is_a_matrix_to_muon(parameter: Any) -> bool:
    """Whether timm's Muon (1.0.31) orthogonalizes a parameter; it moves the others by AdamW."""
    try:
        from timm.optim.muon import _is_suitable_for_muon
    except ImportError as error:
        raise RuntimeError("this timm has _is_suitable_for_muon in another place") from error
    return bool(_is_suitable_for_muon(parameter))


def muon_coefficients(name: str) -> list[tuple[float, float, float]]:
    """The coefficients of timm's Muon (1.0.31) for each iteration, by their name there."""
    try:
        from timm.optim.muon import _COEFFICIENTS
    except ImportError as error:
        raise RuntimeError("this timm has Muon's coefficients in another place") from error
    return _COEFFICIENTS[name]
