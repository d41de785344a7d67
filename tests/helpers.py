"""What the tests of training runs share: tiny runs in processes of their own."""

import contextlib
import csv
import http.client
import io
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from tests.nursery import Process


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def dense(cells: list[list[int]], n_classes: int) -> np.ndarray:
    """The confusion matrix of evaluation.json as (C, C) counts."""
    matrix = np.zeros((n_classes, n_classes), int)
    for true, predicted, images in cells:
        matrix[true, predicted] = images
    return matrix


# small enough to take seconds: AG-SonoNet-8 at 16x16 on a few hundred of the digits
QUICK = [
    "--faithfulness-images",
    "0",
    "--model",
    "ag_sononet8",
    "--size",
    "16",
    "--flip",
    "0",
    "--val",
    "0.2",
    "--test",
    "0.2",
]
# bytecode is written, or each of the processes would compile the whole package again
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"


def start(
    *arguments: object, env: dict[str, str] = ENVIRONMENT, cwd: Path | None = None
) -> Process:
    """`regard ARGUMENTS` in a process of its own."""
    return Process([*map(str, arguments)], ENVIRONMENT, cwd)


def run(*arguments: object, code: int = 0, **options) -> str:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    return out + err


def answer(*arguments: object) -> Any:
    """The JSON that a command writes to standard output."""
    process = start(*arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (process.returncode, out, err)
    return json.loads(out)


def same_network(a: Path, b: Path) -> bool:
    first, second = (load_file(f / "model.safetensors") for f in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same_results(a: Path, b: Path) -> bool:
    texts = [
        [(f / name).read_text() for name in ("metrics.csv", "evaluation.json")] for f in (a, b)
    ]
    return texts[0] == texts[1] and same_network(a, b)


def settings(scans: Path, out: Path) -> list[object]:
    return ["train", scans, *QUICK, "--out", out, "--batch-size", "16", "--epochs", "6"]


def stopped_by(number: int, scans: Path, out: Path) -> tuple[int, str]:
    """A run that got a signal once two states were there."""
    process = start(*settings(scans, out), "--save-minutes", "0")
    while process.poll() is None and len(list((out / "state").glob("step-*.pt"))) < 2:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    return process.returncode, err


class Server:
    """A `regard serve` process on a free port."""

    def __init__(self, network: Path, *arguments: object) -> None:
        self.process = start("serve", network, "--port", "0", *arguments)
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://"), self.process.communicate()
        self.url = self.line.split()[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def ask(self, verb: str, path: str, body: bytes | None = None, **headers: str):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(verb, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, verb: str, path: str, body: bytes | None = None):
        status, _, content = self.ask(verb, path, body)
        return status, json.loads(content)

    def stop(self) -> int:
        """Ends it; what it wrote to standard error is in `errors`."""
        self.process.send_signal(signal.SIGTERM)
        _, self.errors = self.process.communicate(timeout=60)  # and closes its pipes
        return self.process.returncode


def jpeg(size: tuple[int, int]) -> bytes:
    """A photograph, enlarged."""
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize(size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds):
        """A step that takes each of `seconds` in turn, the last for ever."""
        each = iter(seconds)
        last = 0.0

        def run():
            nonlocal last
            last = next(each, last)
            self.now += last

        return run


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """The lines that Regard logs within the block."""

    class Listing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    handler, logger = Listing(), logging.getLogger("regard")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
