"""Which of timm's families accept inserted attention: one small network of each is grafted.

    python benchmarks/graft_families.py > benchmarks/graft_families.csv

A family is a timm module; of its networks the one with the smallest-sounding name is created. A row
is family, network, millions of parameters, and "grafted" or the reason of the refusal.
"""

import csv
import signal
import sys

import timm
import torch

import regard

SMALL = ("atto", "femto", "pico", "nano", "micro", "xxs", "_xs", "tiny", "mini", "lite", "small",
         "10t", "14t", "18", "_s", "_t", "26", "b0", "050", "base")  # fmt: skip
SECONDS = 30  # limit for one family
LARGEST = 60e6  # limit of parameters


def smallest(names: list[str]) -> str:
    """The name that suggests the smallest network."""
    for word in SMALL:
        if found := [name for name in names if word in name]:
            return min(found, key=len)
    return min(names, key=len)


def late(*_: object) -> None:
    """Ends a family that takes too long."""
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    """Grafts a network of each family."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["family", "network", "parameters (M)", "result"])
    signal.signal(signal.SIGALRM, late)
    own = set(regard.list_models())
    for family in sorted(timm.list_modules()):
        names = [n for n in timm.list_models(module=family) if n not in own and n != "grafted"]
        if not names:
            continue
        name = smallest(names)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        result = "not tried: too large"
        if parameters <= LARGEST:
            signal.alarm(SECONDS)
            try:
                regard.graft(timm.create_model(name, num_classes=10))
                result = "grafted"
            except (regard.RegardError, TimeoutError) as error:
                result = " ".join(str(error).split())[:160]
            finally:
                signal.alarm(0)
        writer.writerow([family, name, f"{parameters / 1e6:.2f}", result])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
