"""Writes the outputs of every network and ablation with reproducible weights.

    python scripts/make_golden.py            # writes tests/golden/variants.json
    python scripts/make_golden.py --check    # says what would change; exit code 1 if anything

The outputs are computed in float64 and stored with 10 digits. An output that is the same
up to rounding keeps its digits, so that a change in the file is a change in a network.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import golden  # noqa: E402  (the tests' folder is not installed)

TOLERANCE = 1e-8


def answers() -> dict[str, np.ndarray]:
    """The outputs of every variant, by label."""
    return {label: golden.variant_outputs(*made) for label, made in golden.variants().items()}


def changes(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> list[str]:
    """A line for each variant that is new, removed, or has different outputs."""
    lines = [f"{label}: gone" for label in old if label not in new]
    for label, rows in new.items():
        if label not in old:
            lines.append(f"{label}: new")
        elif (error := golden.relative_error(rows, old[label])) > TOLERANCE:
            lines.append(f"{label}: changed by {error:.2g} of its norm")
    return lines


def as_json(new: dict[str, np.ndarray], old: dict[str, np.ndarray]) -> str:
    """JSON with one line per variant and 10 significant digits."""
    lines = []
    for label, rows in new.items():
        same = label in old and golden.relative_error(rows, old[label]) <= TOLERANCE
        kept = [[float(f"{v:.10g}") for v in row] for row in (old[label] if same else rows)]
        lines.append(f"{json.dumps(label)}: {json.dumps(kept)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(text: str, path: Path) -> None:
    """Writes a temporary file and renames it, so that a file is never half-written."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        beside = Path(scratch, path.name)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def main() -> int:
    """Writes the file, or checks it."""
    old = golden.golden_variants() if golden.VARIANTS.exists() else {}
    new = answers()
    changed = changes(new, old)
    for line in changed:
        print(line)
    if "--check" in sys.argv:
        return 1 if changed else 0
    write(as_json(new, old), golden.VARIANTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
