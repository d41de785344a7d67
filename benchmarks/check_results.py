"""Evaluates the weights that come with Regard, and compares the results with their cards.

    python benchmarks/check_results.py --data DIR [NAME ...]

DIR holds cifar10_jpeg.npz and imagenette_224_jpeg.npz with their unpack scripts; digits need
nothing. Each network is tested in fp32 on all images on which the run was tested. The exit code is
1 if an accuracy or an end of its interval differs from the card's by more than half a hundredth of
a point.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from regard.errors import UsageError
from regard.evaluation import evaluate
from regard.run_data import predictions_of
from regard.runs import RunFolder
from regard.weights import Weights, shipped

ROUNDING = 5e-5
SCRIPTS = {"cifar10": "unpack_cifar10.py", "imagenette": "unpack_imagenette.py"}


def data_of(found: Weights, archives: Path | None, unpacked: Path) -> str:
    """DATA with the images on which these weights were tested.

    Raises:
        UsageError: the archive is not there.
    """
    if found.tag.startswith("digits"):
        return "digits"
    kind = next((k for k in SCRIPTS if found.tag.startswith(k)), None)
    if kind is None or archives is None or not (archives / SCRIPTS[kind]).is_file():
        raise UsageError(f"{found.name}: its images are not in {archives}")
    folder = unpacked / kind
    if not folder.exists():
        script = archives / SCRIPTS[kind]
        subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
        if kind == "imagenette":  # as for its leaderboard; none of its images chose anything
            (folder / "val").rename(folder / "test")
    return str(folder)


def check(found: Weights, data: str) -> bool:
    """Tests these weights and prints a line; returns whether the card is right."""
    facts, recipe = RunFolder(found.folder).read_facts(), RunFolder(found.folder).read_recipe()
    _, said, unreadable = predictions_of(found.folder, data, split=facts["tested_on"])
    top1 = evaluate(said, seed=recipe["seed"]).metrics["top1"]
    card = (found.accuracy, found.low, found.high)
    same = all(
        abs(a - b) <= ROUNDING for a, b in zip((top1.value, top1.low, top1.high), card, strict=True)
    )
    same = same and len(said.labels) == found.images and not unreadable
    print(
        f"{found.name}: {top1.value:.2%} ({top1.low:.2%} to {top1.high:.2%}) on "
        f"{len(said.labels):,} images; its card: {card[0]:.2%} ({card[1]:.2%} to {card[2]:.2%}) on "
        f"{found.images:,}{'' if same else ': NOT THE SAME'}",
        flush=True,
    )
    return same


def main(words: list[str] | None = None) -> int:
    """Checks all weights, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="weights to check (default: all)")
    parser.add_argument("--data", type=Path, help="folder of the archives")
    asked = parser.parse_args(words)
    known = shipped()
    if strange := [name for name in asked.names if name not in known]:
        parser.error(f"no weights are called {strange[0]}; choose {', '.join(known)}")
    same = True
    with tempfile.TemporaryDirectory(prefix="regard-") as unpacked:
        for name in asked.names or known:
            try:
                data = data_of(known[name], asked.data, Path(unpacked))
                same &= check(known[name], data)
            except UsageError as error:
                print(error)
                same = False
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
