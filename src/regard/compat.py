"""Private names of timm, torch and others that Regard uses, with the version they were seen in.

If a name has moved, the error is a clear sentence from here, not an AttributeError elsewhere.
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
    """Stops the libtiff inside Pillow from printing every fault of a file on standard error.

    Pillow (seen in 13.0, libtiff 4.7.2) keeps libtiff's default handlers, which bypass Python's
    streams, and has no option to change this; anything important is raised as an exception too. If
    the library can't be located (not Linux), nothing happens.
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


# raw modes of big-endian numbers, and of native ones on little-endian machines
_BIG_ENDIAN = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}


def read_in_native_order(image: Any) -> None:
    """Corrects how PIL will read a TIFF of signed or float numbers that libtiff decodes.

    libtiff returns numbers in native byte order, and Pillow (seen in 13.0) swaps those of a
    big-endian file again. A version without this fault requests no big-endian raw mode here.
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

    torch (seen in 2.14) ends workers by an event, whose lock a killed worker may have held.
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
    """The argument that stops DistributedDataParallel from broadcasting buffers in forward.

    It was broadcast_buffers until 2.14, which renamed it and warns about the old name.
    """
    import inspect

    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}


def feature_take_indices(count: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The indices of the maps that `indices` selects from `count`, and the last one (timm 1.0.31).

    timm's own `forward_intermediates` interprets its argument this way: None means all, a number n
    the last n, and negative indices count from the end.
    """
    try:
        from timm.models._features import feature_take_indices as take
    except ImportError as error:
        raise RuntimeError("this timm has feature_take_indices in another place") from error
    return take(count, indices)


@contextlib.contextmanager
def downloads_in_small_steps(size: int) -> Iterator[None]:
    """Makes huggingface_hub (2.4) report downloads every `size` bytes, not every 10 MB.

    A version that keeps this number elsewhere reports as usual.
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
        path: path of the file.
        entries: `model_config` and `data_config`, as in timm's function.
    """
    try:
        from timm.models._hub import save_config_for_hf as save
    except ImportError as error:
        raise RuntimeError("this timm has save_config_for_hf in another place") from error
    save(model, str(path), **entries)


def mark_pretrained(name: str) -> None:
    """Makes timm (1.0.31) list a network as pretrained although its default entry has no weights.

    A version that keeps the list elsewhere lists only its tagged names.
    """
    try:
        from timm.models._registry import _model_has_pretrained
    except ImportError:
        return
    _model_has_pretrained.add(name)


def timm_channel_gates() -> tuple[type[Any], ...]:
    """timm's (1.0.31) channel gates with a hidden layer: squeeze-and-excitation and CBAM's."""
    try:
        from timm.layers.cbam import ChannelAttn
        from timm.layers.squeeze_excite import SEModule
        from timm.models._efficientnet_blocks import SqueezeExcite
        from timm.models.senet import SEModule as LegacySEModule
    except ImportError as error:
        raise RuntimeError("this timm has its channel gates in other places") from error
    return ChannelAttn, SEModule, SqueezeExcite, LegacySEModule


def is_a_matrix_to_muon(parameter: Any) -> bool:
    """Whether timm's Muon (1.0.31) orthogonalizes a parameter; it updates the others with AdamW."""
    try:
        from timm.optim.muon import _is_suitable_for_muon
    except ImportError as error:
        raise RuntimeError("this timm has _is_suitable_for_muon in another place") from error
    return bool(_is_suitable_for_muon(parameter))


def muon_coefficients(name: str) -> list[tuple[float, float, float]]:
    """The coefficients of timm's Muon (1.0.31) for each iteration, by timm's name for them."""
    try:
        from timm.optim.muon import _COEFFICIENTS
    except ImportError as error:
        raise RuntimeError("this timm has Muon's coefficients in another place") from error
    return _COEFFICIENTS[name]
