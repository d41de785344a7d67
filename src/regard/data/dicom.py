"""Reads a DICOM file's image as a viewer shows it; needs the extra `dicom`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.errors import ImageError
from regard.extras import hint, missing

# Defaults of elements that de-identification may leave empty, on which pydicom would fail
_MAY_BE_EMPTY = {"RescaleSlope": 1, "RescaleIntercept": 0, "VOILUTFunction": "LINEAR"}
_RESCALING = ("RescaleSlope", "RescaleIntercept")  # pydicom applies them only together

# Elements of the image that have no default (PS3.3 C.7.6.3)
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
_NEEDED_BY_INTEGERS = ("BitsStored", "PixelRepresentation")

# First bytes of a file without the preamble: its first element, of the
# dataset (0008) or of the meta information (0002), little endian, then big endian
_GROUPS = (b"\x08\x00", b"\x02\x00", b"\x00\x08", b"\x00\x02")


def is_dicom(head: bytes) -> bool:
    """Whether a file that starts with these bytes is DICOM, with or without the preamble."""
    if head[128:132] == b"DICM":
        return True
    if head[:2] not in _GROUPS or len(head) < 12:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()  # the value representation
    implicit = head[:1] != b"\x00" and int.from_bytes(head[4:8], "little") < 2**16
    return explicit or implicit


def read_dicom(file: Any) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """(H, W, 1 or 3) float32 in 0..1, or float64 measurements and their range without a window.

    Raises:
        ImageError: pydicom is not installed, or the file does not hold exactly one image.
    """
    if missing("dicom"):
        raise ImageError(f"is DICOM; {hint('dicom')} brings a reader")
    import pydicom

    dataset = pydicom.dcmread(file, force=True)
    _check_single_image(dataset)
    meta = dataset.file_meta
    if "TransferSyntaxUID" not in meta:  # a file without the preamble has none
        implicit, little = dataset.original_encoding
        meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian if implicit
            else pydicom.uid.ExplicitVRLittleEndian if little
            else pydicom.uid.ExplicitVRBigEndian
        )  # fmt: skip
    bits, high = (int(dataset.get(name) or 0) for name in ("BitsStored", "HighBit"))
    in_upper_bits = (
        0 < bits <= high < dataset.BitsAllocated and not meta.TransferSyntaxUID.is_compressed
    )
    if in_upper_bits:  # as in old files: pydicom takes the lower bits
        dataset.pixel_array_options(correct_unused_bits=False)
    try:
        stored = dataset.pixel_array
    except RuntimeError as error:  # no plugin for this compression, or broken data
        if missing("dicom", "gdcm"):
            name = meta.TransferSyntaxUID.name
            raise ImageError(
                f"is DICOM compressed as {name}; {hint('dicom')} brings a decoder"
            ) from error
        raise
    if in_upper_bits:
        stored = _cut(stored, bits, high)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = pydicom.pixels.apply_color_lut(stored, dataset)
        bits = _palette_bits(dataset)
    if stored.ndim == 3:
        return (stored / (2**bits - 1)).astype(np.float32), None
    pixels, own_range = _gray(stored, dataset)
    return pixels[..., None], own_range


def _cut(words: NDArray[Any], bits: int, high: int) -> NDArray[Any]:
    """Words -> the values in their bits up to `high`, sign-extended where they are signed."""
    word = 8 * words.dtype.itemsize
    return (words << (word - 1 - high)) >> (word - bits)


def _palette_bits(dataset: Any) -> int:
    """Bits of a palette's values: 8 if 16 are declared but none is larger than 255."""
    from pydicom.pixels import apply_color_lut

    entries, first, bits = (int(v) for v in dataset.RedPaletteColorLookupTableDescriptor)
    whole = apply_color_lut(np.arange(first, first + (entries or 2**16)), dataset)
    return 8 if whole.max() < 2**8 else bits


def _check_single_image(dataset: Any) -> None:
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError("is DICOM without an image")
    needed = [*_NEEDED, *(_NEEDED_BY_INTEGERS if "PixelData" in dataset else ())]
    if dataset.get("SamplesPerPixel") == 3:
        needed.append("PlanarConfiguration")
    if lacks := [name for name in needed if dataset.get(name) in (None, "")]:
        raise ImageError(f"is DICOM that lacks {', '.join(lacks)}: the image can't be decoded")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(f"holds {frames} frames; write each as a file of its own")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and dataset.Rows * dataset.Columns > 2 * limit:
        raise ImageError(f"too large ({dataset.Columns} x {dataset.Rows} pixels)")
    # Enhanced images have rescaling and window in functional groups (PS3.3 C.7.6.16)
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(dataset.get(name) or ())[:1]:
            for inner in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for element in (e for item in list(group.get(inner) or ())[:1] for e in item):
                    if element.tag not in dataset:
                        dataset.add(element)


def _gray(stored: NDArray[Any], dataset: Any) -> tuple[NDArray[Any], tuple[float, float] | None]:
    """Stored values (H, W) -> what a viewer shows, 0 black to 1 white (PS3.3 C.11.1, C.11.2).

    Without a table and a window: the values after rescaling, NaN where padding, and their range.
    Where small values are white, they are mirrored in the range of all storable values, so that
    one range for the data set fits images of both kinds.
    """
    from pydicom.pixels import apply_windowing

    _fill_empty(dataset)
    values = _rescaled(stored, dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if dataset.get("VOILUTSequence"):
        table, signed = dataset.VOILUTSequence[0], min(_limits(dataset)) < 0
        shown = _looked_up(values, table, signed, dataset) / (2 ** int(table.LUTDescriptor[2]) - 1)
    elif _has_window(dataset):
        if "BitsStored" not in dataset:  # floats; only their ratio to the range below matters
            dataset.BitsStored, dataset.PixelRepresentation = 16, 0
        # the range to which pydicom maps the window, from values beyond its ends
        with np.errstate(over="ignore"):
            black, white = apply_windowing(np.array([-1e30, 1e30]), dataset)
            shown = (apply_windowing(values, dataset) - black) / (white - black or 1.0)
    else:
        values = np.where(_padding(stored, dataset), np.nan, values.astype(np.float64))
        values = _ends(dataset) - values if inverted else values
        finite = values[np.isfinite(values)]
        own = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        return values, own
    return np.clip(1 - shown if inverted else shown, 0, 1).astype(np.float32), None


def _fill_empty(dataset: Any) -> None:
    """Replaces empty elements by their defaults, and a missing one of a slope and an intercept."""
    rescaled = any(name in dataset for name in _RESCALING)
    for name, default in _MAY_BE_EMPTY.items():
        needed = name in dataset or (rescaled and name in _RESCALING)
        if needed and dataset.get(name) in (None, ""):
            setattr(dataset, name, default)
    if rescaled and dataset.RescaleSlope == 0 and not dataset.get("ModalityLUTSequence"):
        raise ImageError("is DICOM with a rescale slope of 0, by which all values become the same")


def _rescaled(stored: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Stored values (H, W) -> by the modality table, or slope and intercept (PS3.3 C.11.1)."""
    from pydicom.pixels import apply_modality_lut

    if not dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset)
    signed = bool(dataset.get("PixelRepresentation"))
    return _looked_up(stored, dataset.ModalityLUTSequence[0], signed, dataset)


def _looked_up(values: NDArray[Any], table: Any, signed: bool, dataset: Any) -> NDArray[np.float64]:
    """The entries of a modality or VOI table for values (H, W) (PS3.3 C.11.1.1, C.11.2.1.1).

    pydicom (as of 3.0) counts places in VOI tables of 8-bit entries modulo 256, and takes a first
    value below zero for a large one where it was written as unsigned.
    """
    count, first, bits = (int(v) for v in table.LUTDescriptor)
    count = count % 2**16 or 2**16
    if signed:
        first = (first + 2**15) % 2**16 - 2**15
    entries = table.LUTData
    if isinstance(entries, bytes):
        packed = bits <= 8 and len(entries) < 2 * count
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(entries, "u1" if packed else f"{order}u2")
    entries = np.atleast_1d(np.asarray(entries, np.float64))
    if len(entries) < count:
        raise ImageError(f"is DICOM with a table of {len(entries):,} of {count:,} entries")
    places = np.rint(values).astype(np.int64) - first
    return entries[np.clip(places, 0, count - 1)]


def _ends(dataset: Any) -> float:
    """The sum of the lowest and the highest value that can be stored, after rescaling."""
    return sum(_limits(dataset))


def _limits(dataset: Any) -> tuple[float, float]:
    """The lowest and the highest value that can be stored, after rescaling."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    if "BitsStored" not in dataset:  # floats, as in TIFF
        return 0.0, 1.0
    bits = int(dataset.BitsStored)
    low = -(2 ** (bits - 1)) if dataset.get("PixelRepresentation") else 0
    first, last = apply_modality_lut(np.array([low, low + 2**bits - 1]), dataset).tolist()
    return float(first), float(last)


def _has_window(dataset: Any) -> bool:
    """Whether there is a window that can be applied; the standard requires a width of 1 or more."""
    if any(dataset.get(key) in (None, "") for key in ("WindowWidth", "WindowCenter")):
        return False
    width = np.atleast_1d(dataset.WindowWidth).astype(float)[0]
    exact = str(dataset.get("VOILUTFunction") or "LINEAR").upper() != "LINEAR"
    return width > 0 if exact else width >= 1


def _padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_]:
    """Where there is padding instead of image (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(value), int(value if limit is None else limit)]
    if stored.dtype.kind in "iu" and stored.dtype.itemsize == 2:  # -2000 may be stored as 63536
        wrapped = np.array(ends).astype(stored.dtype).tolist()
        if (wrapped[0] <= wrapped[1]) == (ends[0] <= ends[1]):  # else all but these values
            ends = wrapped
    ends.sort()
    return (stored >= ends[0]) & (stored <= ends[1])
