"""How long the Triton kernels of the fused CBAM block take on a GPU, for several tile sizes.

    python benchmarks/fused_kernels.py [--batch 256] [--bandwidth 4.3]

For the maps of ResNet-50's first and third stage, in bf16: milliseconds of each pass with caches
emptied before (triton.testing.do_bench), and the milliseconds that reading and writing its maps
would take at the given memory bandwidth (TB/s). The last line has the sizes whose sums, weighted
by the stages' blocks, are smallest, as models/fused_triton.py has them. Small batches
take other sizes: try --batch 32 as well.
"""

import argparse
from collections.abc import Callable

import torch
from triton.testing import do_bench

from regard.models import fused_triton as passes

STAGES = {(56 * 56, 256): 3, (14 * 14, 1024): 6}  # positions, channels: blocks
SPANS = [  # ROWS, COLUMNS, WARPS
    (16, 128, 4), (32, 64, 4), (8, 256, 4), (16, 64, 4), (8, 128, 4), (32, 128, 8), (16, 256, 8),
    (32, 128, 4), (16, 128, 8), (64, 64, 8), (32, 64, 2), (16, 64, 2),
]  # fmt: skip
TILES = [(16, 64), (32, 64), (64, 64), (16, 128), (32, 128), (16, 256)]  # tile, BLOCK
MAPS = {  # that a pass reads or writes
    "statistics": 1, "output_backward": 4, "pooled_backward": 1, "pooled": 1, "output": 3,
    "input_backward": 3,
}  # fmt: skip
BY_SPANS = ("statistics", "output_backward", "pooled_backward")


def ways(batch: int, positions: int, channels: int) -> dict[str, Callable[[], object]]:
    """The passes over random maps."""
    y = torch.randn(batch, positions, channels, device="cuda", dtype=torch.bfloat16)
    go, out = torch.randn_like(y), torch.relu(torch.randn_like(y))
    weight, bias = torch.randn(2, channels, device="cuda")
    moments = passes.statistics(y, weight, bias, 1e-5)
    c = torch.rand(batch, 1, channels, device="cuda")
    gc, bc = moments.g * c, moments.b * c
    s = torch.rand(batch, positions, 1, device="cuda")
    pooled, several = passes.pooled(y, moments.mean, gc, bc)
    dpooled = torch.randn_like(pooled)
    q, sums, _ = passes.output_backward(y, out, go, moments.mean, gc, bc, s)
    sums_z, _, count, share = passes.pooled_backward(
        y, moments, gc, bc, pooled, several, dpooled, sums
    )
    d = torch.randn_like(moments.means)
    _, _, at_largest, by_y, plain = passes.statistics_backward(
        moments, weight, d, c, sums_z, count, positions
    )
    return {
        "statistics": lambda: passes.statistics(y, weight, bias, 1e-5),
        "output_backward": lambda: passes.output_backward(y, out, go, moments.mean, gc, bc, s),
        "pooled_backward": lambda: passes.pooled_backward(
            y, moments, gc, bc, pooled, several, dpooled, sums
        ),
        "pooled": lambda: passes.pooled(y, moments.mean, gc, bc),
        "output": lambda: passes.output(y, go, moments.mean, gc, bc, s),
        "input_backward": lambda: passes.input_backward(
            y, q, moments.mean, gc, bc, s, pooled, dpooled, share, moments.means[1], at_largest,
            by_y, plain,
        ),
    }  # fmt: skip


def milliseconds(shape: tuple[int, int, int], names: tuple[str, ...]) -> dict[str, float]:
    """Of each pass named."""
    of = ways(*shape)
    return {name: do_bench(of[name], warmup=5, rep=25) for name in names}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bandwidth", type=float, default=4.3)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, f"batch {args.batch}")
    by_spans: dict[tuple[int, ...], float] = {}
    by_tiles: dict[str, dict[tuple[int, ...], float]] = {
        name: {} for name in MAPS if name not in BY_SPANS
    }
    for (positions, channels), blocks in STAGES.items():
        shape = args.batch, positions, channels
        map_ms = args.batch * positions * channels * 2 / args.bandwidth / 1e9
        ideal = "  ".join(f"{name} {maps * map_ms:.3f}" for name, maps in MAPS.items())
        print(f"{channels} channels, {positions} positions; by bytes alone: {ideal}")
        for sizes in SPANS:
            passes.ROWS, passes.COLUMNS, passes.WARPS = sizes
            found = milliseconds(shape, BY_SPANS)
            by_spans[sizes] = by_spans.get(sizes, 0) + blocks * sum(found.values())
            told = "  ".join(f"{name} {ms:.3f}" for name, ms in found.items())
            print(f"rows {sizes[0]} columns {sizes[1]} warps {sizes[2]}: {told}", flush=True)
        passes.ROWS, passes.COLUMNS, passes.WARPS = min(by_spans, key=by_spans.__getitem__)
        for tile, block in TILES:
            passes.TILE = passes.POOLED_TILE = tile
            passes.BLOCK = block
            found = milliseconds(shape, tuple(by_tiles))
            for name, ms in found.items():
                of = by_tiles[name]
                of[tile, block] = of.get((tile, block), 0) + blocks * ms
            told = "  ".join(f"{name} {ms:.3f}" for name, ms in found.items())
            print(f"tile {tile} block {block}: {told}", flush=True)
    rows, columns, warps = min(by_spans, key=by_spans.__getitem__)
    shared = {
        sizes: by_tiles["output"][sizes] + by_tiles["input_backward"][sizes] for sizes in TILES
    }
    tile, block = min(shared, key=shared.__getitem__)
    pooled = {t: ms for (t, b), ms in by_tiles["pooled"].items() if b == block}
    print(
        f"fastest: ROWS {rows}, COLUMNS {columns}, WARPS {warps}; TILE {tile}, BLOCK {block}, "
        f"POOLED_TILE {min(pooled, key=pooled.__getitem__)}"
    )


if __name__ == "__main__":
    main()
