"""A short run of every recipe on real images: does the loss fall, is it well over chance?

    python benchmarks/recipes.py CIFAR_FOLDER OUT [RECIPE ...]

CIFAR_FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg, such as the first 200 images per class
of each. Runs are shortened to what two cores do in minutes, and the schedules' milestones with
them, as the commands show. Appends a row per run to benchmarks/recipes.csv.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

from regard.machine import processor

RESULTS = Path(__file__).with_name("recipes.csv")

# DATA is CIFAR_FOLDER, OUT the folder of all runs
RUNS = {
    "demo": "digits --recipe demo",
    "ag-sononet": "digits --recipe ag-sononet --model ag_sononet8 --size 48 --resize squash "
    "--flip 0 --largest-class-weight 1 --epochs 12",
    "ag-sononet-ft": "digits --recipe ag-sononet-ft --model ag_sononet8 --size 48 --resize squash "
    "--flip 0 --largest-class-weight 1 --epochs 3 --weights OUT/ag-sononet",
    "attention-cifar": "DATA --recipe attention-cifar --model attention56_cifar --steps 240",
    "attention-cifar-fast": "DATA --recipe attention-cifar-fast --model attention56_cifar "
    "--steps 90 --batch-size 128 --lr 0.2",
    "cbam-cifar": "DATA --recipe cbam-cifar --model cbam_resnet18 --epochs 4",
    "attention-imagenet": "DATA --recipe attention-imagenet --model attention56 --size 64 "
    "--steps 80 --batch-size 32 --crop-scale 0.3 1",
    "cbam-imagenet": "DATA --recipe cbam-imagenet --model cbam_resnet18 --size 64 --epochs 5 "
    "--batch-size 64 --crop-scale 0.3 1",
    "quick": "DATA",
    "finetune": "DATA --recipe finetune --model cbam_resnet18 --size 32 --epochs 2 "
    "--weights OUT/quick",
}


def measure(name: str, data: str, out: Path) -> dict[str, str]:
    """Runs `regard train` and reads the results from its folder."""
    command = ["train", *RUNS[name].replace("DATA", data).replace("OUT", str(out)).split()]
    folder = out / name
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "regard", *command, "--out", str(folder)], check=True)
    seconds = time.perf_counter() - started
    facts = json.loads((folder / "run.json").read_text())["facts"]
    test = json.loads((folder / "evaluation.json").read_text())
    with (folder / "metrics.csv").open() as file:
        history = list(csv.DictReader(file))
    top1 = test["metrics"]["top1"]
    return {
        "recipe": name,
        "command": "regard train " + RUNS[name].replace("DATA", "CIFAR").replace("OUT/", "runs/"),
        "training images": str(facts["counts"]["train"]),
        "steps": str(facts["steps"]),
        "first loss": f"{float(history[0]['loss']):.3f}",
        "last loss": f"{float(history[-1]['loss']):.3f}",
        "test accuracy": f"{top1['value']:.4f}",
        "low": f"{top1['low']:.4f}",
        "high": f"{top1['high']:.4f}",
        "chance": f"{1 / len(test['classes']):.2f}",
        "seconds in all": f"{seconds:.0f}",
        "images a second": f"{facts['images_a_second']:.0f}",
        "waiting": f"{facts['waited']:.3f}",
        "machine": f"{processor()}, {facts['threads']} threads",
        "torch": facts["versions"]["torch"],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Runs the recipes that are named, or all."""
    data, out = sys.argv[1], Path(sys.argv[2])
    for name in sys.argv[3:] or RUNS:
        row = measure(name, data, out)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
