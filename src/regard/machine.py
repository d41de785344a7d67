"""What this machine is and can do: for choosing engines, and for the header of every figure."""

import contextlib
import ctypes
import importlib.metadata
import inspect
import platform
from pathlib import Path
from typing import Any

import torch

# the names' numbers in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30  # bytes of a block that is kept


def has_bf16(device: torch.device | None = None) -> bool:
    """Whether a device, without one this CPU, multiplies in bf16 instead of imitating it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AVX-512 BF16, AMX, or Arm's BF16)."""
    capability = getattr(torch.cpu, "get_capabilities", None)
    if capability is not None:
        found = capability()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and inspect.isroutine(probe) and probe())


def processor() -> str:
    """The CPU's name as the system tells it, such as "AMD EPYC 9R14"."""
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
    """Processor, its vector extensions, threads, accelerator, and the versions that matter."""
    packages = ("torch", "timm", "onnxruntime", "openvino", "nncf", "pytorchcv")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    on_gpu = device is not None and device.type == "cuda"
    return {
        "processor": processor(),
        "extensions": extensions(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if on_gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: v for name, v in versions.items() if v is not None},
    }


def keep_freed_memory() -> bool:
    """Has this process keep the memory of freed tensors for the next ones, on the CPU.

    glibc gives every block above 32 MiB back to the system at once, and the next tensor of
    that size then has all its pages mapped and cleared anew: with large batches a good part
    of a training step's time (docs/performance.md). In turn the process stays at its peak.

    Returns:
        Whether it could be done: elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # musl, macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, -1))
    return False
