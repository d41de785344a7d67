"""One thread a process: two test processes share two cores, and sums come out the same."""

import gc
import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["REGARD_DEVICE"] = "cpu"  # also where a GPU is; tests marked gpu ask for theirs

from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from regard import familiarity, run_data
from regard.commands import train
from tests import nursery
from tests.helpers import Server, jpeg, run, settings

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

# The same cases each time, whatever the machine; none of them against a clock.
hypothesis.settings.register_profile("regard", derandomize=True, deadline=None)
hypothesis.settings.load_profile("regard")


# files that take longest come first, so that no process is left with one at the end
LONGEST = (
    "test_demo", "test_models", "test_graft", "test_distributed", "test_resume", "test_report",
    "test_training", "test_studies", "test_pretrained",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """One nursery for all processes of the tests."""
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        nursery.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no search for rubbish looks at it again."""
    gc.freeze()


# few images are read sooner than processes as large as a test's are forked to read them
familiarity.default_workers = run_data.default_workers = lambda: 0

write_report = train._report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test's run gets its report, which takes most of its time, if the test asks for it."""
    nursery.reports = item.get_closest_marker("report") is not None
    train._report = write_report if nursery.reports else nursery.no_report


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    """120 of the digits 0, 1 and 2 as PNG files in a folder of class folders."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path_factory.mktemp("scans") / "scans"
    for name in (0, 1, 2):
        (folder / str(name)).mkdir(parents=True)
        for k, scan in enumerate(digits.images[digits.target == name][:40]):
            pixels = np.kron(scan / 16 * 255, np.ones((3, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(name) / f"{k:02d}.png")
    return folder


@pytest.fixture(scope="session")
def whole(scans, tmp_path_factory) -> Path:
    """A run that nobody disturbed, with its report."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "reports", True)
        run(*settings(scans, out))
    return out


@pytest.fixture(scope="module")
def server(whole):
    """A server of that run; nothing may have gone wrong in it by the end."""
    running = Server(whole)
    yield running
    assert running.stop() == 0
    assert running.errors == ""


@pytest.fixture(scope="module")
def photo() -> bytes:
    return jpeg((640, 427))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here: the page was not tried in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()
