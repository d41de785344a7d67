"""Training steps of CBAM ResNets, fused and not, relative to their plain twin's, in CPU time.

    python benchmarks/fused.py cbam_resnet50 --size 64 --batch 32 [--precision bf16] [--turns 6]

The three networks take steps in turn in one process with one thread: other work on the machine
lengthens their CPU time equally, so that the ratios remain valid on a busy machine. Prints
the median milliseconds per step and the ratios.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F

import regard
from regard.machine import keep_freed_memory
from regard.models.fused import set_fused


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    gated = regard.create_model(args.network, num_classes=10, stem=args.stem)
    networks = {
        "plain": regard.create_model(regard.twins(args.network)["plain"], num_classes=10,
                                     stem=args.stem),
        "modules": gated,
        "fused": copy.deepcopy(gated),
    }  # fmt: skip
    set_fused(networks["fused"])
    x = torch.randn(args.batch, 3, args.size, args.size)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))
    for model in networks.values():
        model.to(memory_format=torch.channels_last).train()
    optimizers = {
        name: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
        for name, model in networks.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(args.turns + 1):
        for name, model in networks.items():
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss = F.cross_entropy(model(x).float(), labels)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            if turn:  # the first turn allocates memory
                taken[name].append(1e3 * (time.process_time() - started))
    plain, modules, fused = (statistics.median(taken[n]) for n in ("plain", "modules", "fused"))
    print(f"{args.network} {args.size}x{args.size}, batch {args.batch}, {args.precision}: "
          f"plain {plain:.0f} ms, modules {modules:.0f} ms, fused {fused:.0f} ms; over plain "
          f"{modules / plain:.2f} and {fused / plain:.2f}; fused takes {fused / modules:.2f} of "
          "the modules' time")  # fmt: skip


if __name__ == "__main__":
    main()
