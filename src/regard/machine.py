"""This machine and its abilities: for choosing engines, and for the header of every figure."""

import contextlib
import ctypes
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from regard.errors import Replacing, ResourceError, UsageError

M = TypeVar("M", bound=nn.Module)

# from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30  # bytes; the largest size of blocks that are kept

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
VARIABLE = "REGARD_DEVICE"  # sets the meaning of "auto"


def choose_device(name: str = "auto") -> torch.device:
    """The device for a name in DEVICES; on GPUs, float32 is then computed in full (no TF32).

    "auto" is the device in the environment variable REGARD_DEVICE, else this machine's accelerator
    (an NVIDIA or AMD GPU is "cuda"), else the CPU.

    Raises:
        UsageError: there is no such device, or this machine does not have it.
    """
    asked = name
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
        asked = name if name == "auto" else f"{name} ({VARIABLE})"
    if name not in DEVICES:
        raise UsageError(f"device {asked}: choose {', '.join(DEVICES)}")
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None and found.type in DEVICES else "cpu"
    elif name != "cpu" and not torch.get_device_module(name).is_available():
        raise UsageError(f"device {asked}: torch finds none on this machine; choose cpu or auto")
    allow_tf32(False)
    return torch.device(name)


@contextlib.contextmanager
def fastest_kernels() -> Iterator[None]:
    """Within the context, cuDNN tries its kernels on each size's first batch and uses the fastest.

    For training steps, whose batches have one size. In evaluation, each size and the last batch
    would be tuned again, which takes longer than the pass itself. Kernels may differ in bits, so
    nothing is tried if torch is set to deterministic algorithms.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def one_cpu_thread(device: torch.device) -> Iterator[None]:
    """Limits torch to one CPU thread within the context, unless the network is on the CPU.

    The CPU's remaining work is small, one image at a time: more threads don't make it faster, and
    the threads of several runs on one machine would spend more time waiting for each other than
    working. If OMP_NUM_THREADS is set, that applies.
    """
    if device.type == "cpu" or os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_channels_last(model: M) -> M:
    """The network with its weights in channels_last, which decide the layout of its activations.

    They are replaced only if some have another layout: `to` copies weights of (N, 1, 1, 1) each
    time, but an average of weights and a captured training step refer to them by address.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=torch.channels_last):
            return model.to(memory_format=torch.channels_last)
    return model


def most_precise(device: torch.device) -> torch.dtype:
    """float64 for summing counts; float32, exact up to 2 ** 24, if the device has no float64.

    Apple's GPUs and some of Intel's have no float64.
    """
    lacks = device.type == "mps"
    if device.type == "xpu":
        lacks = not torch.xpu.get_device_capability(device).get("has_fp64", True)
    return torch.float32 if lacks else torch.float64


def allow_tf32(allowed: bool) -> None:
    """Sets whether NVIDIA GPUs round float32 to 10 bits of mantissa before multiplying.

    torch's own default is yes for convolutions and no for matrix products.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds the random number generators of a device and of the CPU.

    torch.manual_seed would also do, but spends 0.6 ms on devices that don't exist.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def has_bf16(device: torch.device | None = None) -> bool:
    """Whether a device (default: this CPU) multiplies in bf16 instead of emulating it.

    Apple's GPUs count as emulating, as torch does not say which of them multiply in bf16.
    """
    kind = "cpu" if device is None else device.type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_has_bf16()


def has_fp16(device: torch.device) -> bool:
    """Whether a device multiplies in fp16 faster than in float32: GPUs from Volta on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AVX-512 BF16, AMX, or Arm's BF16)."""
    capability = getattr(torch.cpu, "get_capabilities", None)
    if capability is not None:
        found = capability()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and inspect.isroutine(probe) and probe())


def processor() -> str:
    """The CPU's name as the system reports it, such as "AMD EPYC 9R14"."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def extensions() -> list[str]:
    """The vector extensions that decide how fast this CPU multiplies, such as avx512_bf16."""
    capability = getattr(torch.cpu, "get_capabilities", None)
    found = capability() if capability is not None else {}
    wanted = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16")
    return [name for name in wanted if found.get(name)]


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, its vector extensions, threads, accelerator, and relevant versions."""
    packages = ("torch", "timm", "onnxruntime", "openvino", "nncf", "pytorchcv")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    return {
        "processor": processor(),
        "extensions": extensions(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: v for name, v in versions.items() if v is not None},
    }


def accelerator_name(device: torch.device | None) -> str | None:
    """A name such as "NVIDIA H100 80GB HBM3"; None for a CPU."""
    if device is None or device.type == "cpu":
        return None
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if named is None else str(named(device))


def describe(machine: dict[str, Any]) -> str:
    """What `describe_machine` returns, on one line."""
    name = ", ".join(filter(None, (machine["accelerator"], machine["processor"])))
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    threads = machine["threads"]
    return (
        f"{name} ({' '.join(machine['extensions']) or 'no vector extension known'}), "
        f"{threads} thread{'s' * (threads != 1)}, {machine['system']}; {versions}"
    )


def keep_freed_memory() -> bool:
    """Makes glibc keep the memory of freed tensors for new ones, on the CPU.

    glibc returns every block above 32 MiB to the system at once, so that the pages of the next
    tensor of that size must be mapped and cleared again: with large batches, a good part of a
    training step's time (docs/performance.md). In exchange, the process stays at its peak memory.

    Returns:
        Whether this was done; without glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, -1))
    return False


def trim_memory() -> None:
    """Returns freed memory to the system, if the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory that this process may still use, limited by the machine and its cgroup.

    Args:
        root: location of cgroups: version 2, or version 1 with its folder `memory`.
    """
    free = float(psutil.virtual_memory().available)
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:  # "max" is not a number: there is no limit
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, most - taken + int(stat.get(cache, 0)))
    return max(free, 0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, NumPy's, torch's CPU's or a GPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        phrase in text
        for phrase in (
            "DefaultCPUAllocator", "not enough memory", "out of memory", "std::bad_alloc",
            "could not create a memory",
        )
    )  # fmt: skip


def memory_errors(what: str, advice: str) -> Replacing:
    """Turns running out of memory, on the CPU or a GPU, into an error with advice.

    Args:
        what: the task, such as "training".
        advice: what to lower.

    Raises:
        ResourceError: memory ran out.
    """

    def explained(error: Exception) -> ResourceError | None:
        if isinstance(error, ResourceError) or not is_out_of_memory(error):
            return None
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return ResourceError(f"{what} ran out of {where}: {advice}")

    return Replacing(explained)
