"""Where the CPU time of a training step goes, and what its parts would take at the limit.

    python benchmarks/costs.py NETWORK [--size S] [--batch B] [--precision bf16] [--fuse]

A part's limit is the larger of its arithmetic at the rate of a large matrix product in the same
precision, and its bytes, each tensor that an operator reads or writes once, at the rate of adding
two maps of the batch's size. Both rates are measured in the same process, alternating with the
steps, in one thread. No implementation that runs the operators separately can be faster; one that
fuses them can, as it moves fewer bytes. Prints a table of CPU times, divided among the parts by
the profiler's shares.
"""

import argparse
import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.machine import keep_freed_memory
from regard.models.counting import count_multiply_adds
from regard.models.fused import set_fused
from regard.training.losses import multi_head_cross_entropy

# parts, and prefixes of their operators' names; the first match counts
PARTS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "convolution", "_slow_conv", "thnn_conv"),
    "batch norm, backward": ("native_batch_norm_backward",),
    "batch norm, forward": ("native_batch_norm", "_native_batch_norm", "_batch_norm"),
    "ReLU": ("threshold_backward", "clamp_min", "relu"),
    "optimizer": ("_fused_", "_foreach_"),
    "matrix products": ("addmm", "mm", "bmm", "linear"),
    "additions": ("add",),
    "pooling and resizing": ("max_pool", "avg_pool", "upsample", "amax", "mean", "max",
                             "adaptive", "_adaptive"),
    "sigmoids and products": ("sigmoid", "mul", "sum", "div"),
    "casts and copies": ("_to_copy", "copy", "clone", "to"),
}  # fmt: skip
OTHER = "everything else"


def part_of(operator: str) -> str:
    """The part that an operator, such as `add_` of `aten::add_`, belongs to."""
    found = (part for part, names in PARTS.items() if operator.startswith(names))
    return next(found, OTHER)


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that each part's operators read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if not func.is_view:
            unique = {t.data_ptr(): t.nbytes for t in tensors}
            self.moved[part_of(func.overloadpacket.__name__)] += sum(unique.values())
        return out


def cpu_seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median CPU time of a call."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def limits(dtype: torch.dtype, values: int) -> tuple[float, float]:
    """Multiply-adds per second of a matrix product, and bytes per second of adding two maps."""
    a, b = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 2048, dtype=dtype)
    x, y = torch.randn(2, values).to(dtype)
    out = torch.empty_like(x)
    torch.mm(a, b), torch.add(x, y, out=out)
    arithmetic = 2048 * 1024 * 2048 / cpu_seconds(lambda: torch.mm(a, b))
    return arithmetic, 3 * x.nbytes / cpu_seconds(lambda: torch.add(x, y, out=out), 25)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--fuse", action="store_true", help="CBAM's blocks end in one operator")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    model = regard.create_model(args.network, num_classes=10)
    channels = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).in_channels
    shape = (channels, args.size, args.size)
    each = count_multiply_adds(model, shape)
    model.to(memory_format=torch.channels_last).train()
    set_fused(model, args.fuse)
    x = torch.randn(args.batch, *shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=args.precision == "bf16"):
            loss = multi_head_cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(2):  # allocates memory and creates oneDNN's primitives
        step()
    with Bytes() as counted, FlopCounterMode(display=False) as flops:
        step()
    done = collections.Counter[str]()
    for operator, count in flops.get_flop_counts()["Global"].items():
        done[part_of(operator.__name__)] += count // 2
    # the size of a map of the first stage
    first = args.batch * 64 * (args.size // 2) ** 2
    rates, taken, seconds = [], [], collections.Counter[str]()
    for _ in range(args.steps):
        rates.append(limits(dtype, first))
        taken.append(cpu_seconds(step, 1))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
        for event in profiled.key_averages():
            if event.key.startswith("aten::"):
                part = part_of(event.key.removeprefix("aten::"))
                seconds[part] += event.self_cpu_time_total / 1e6 / args.steps
    arithmetic, bandwidth = (statistics.median(values) for values in zip(*rates, strict=True))
    whole = statistics.median(taken)
    print(f"{args.network}, {each / 1e6:.0f} million multiply-adds an image of {shape}, batch "
          f"{args.batch}, {args.precision}: {1e3 * whole:.0f} ms a step, {args.batch / whole:.0f} "
          f"images/s; limits: {arithmetic / 1e9:.0f} billion multiply-adds/s, "
          f"{bandwidth / 1e9:.1f} GB/s\n")  # fmt: skip
    print("| Part | ms | % | ms at the limit | which |\n|---|---:|---:|---:|---|")
    whole_limit, profiled_whole = 0.0, sum(seconds.values())
    for part, took in seconds.most_common():
        by = {"arithmetic": done[part] / arithmetic, "bytes": counted.moved[part] / bandwidth}
        which = max(by, key=lambda name: by[name])
        whole_limit += by[which]
        share = took / profiled_whole
        print(f"| {part} | {1e3 * share * whole:.1f} | {share:.0%} | {1e3 * by[which]:.1f} "
              f"| {which} |")  # fmt: skip
    print(f"| all | {1e3 * whole:.1f} | 100% | {1e3 * whole_limit:.1f} | |")


if __name__ == "__main__":
    main()
