"""What Windows and macOS lack: a training without these names, in a process of its own."""

import os
import re
import subprocess
import sys

import pytest

from regard.papers import Row, Table
from regard.runs import data_name
from regard.studies.plan import plan_study
from tests.helpers import ENVIRONMENT

SCRIPT = """
import os, psutil, signal, sys
for name in ("pthread_sigmask", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
del os.sched_getaffinity
sys.modules["resource"] = sys.modules["fcntl"] = None
import regard
regard.train(
    sys.argv[1], model="ag_sononet8", size=16, val=0.2, test=0.2, flip=0.0, batch_size=16, steps=3,
    faithfulness_images=0, memory="no", workers=1, out=sys.argv[2], trackers=["none"],
)
from regard.commands.bench import command
command(["ag_sononet8"], size=(32, 32), rounds=1, train=True, engine=["eager"])
"""


@pytest.mark.report
@pytest.mark.slow
def test_streamed_training_and_bench_need_no_name_of_posix_alone(scans, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT,
         str(scans), str(tmp_path / "run")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()


def test_an_upload_is_closed_before_it_is_opened_to_be_read():
    """Windows opens no temporary file a second time."""
    from regard.serve.uploads import as_file

    with as_file(b"an image") as path:
        opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        assert str(path) not in opened
        assert path.read_bytes() == b"an image"
    assert not path.exists()


FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\\/]|[ .]$|^(con|prn|aux|nul|(com|lpt)\d)(\.|$)', re.I)


def test_folders_named_after_data_and_rows_have_names_that_windows_takes(tmp_path):
    for data in ("hf:owner/name", "hf:a:b", "photos ", "a?b", "x.", "médecine", ".", "a/b:c*.csv"):
        assert not FORBIDDEN.search(data_name(data)), data
        assert data_name(data)
    names = ["CON", "nul.", "Aux.txt", "lpt1", "a: b", "a/b", "...", "a|b"]
    rows = tuple(Row(name=name, network="ag_sononet8") for name in names)
    table = Table(key="x", title="x", rows=rows)
    runs = plan_study(table, "digits", tmp_path, seeds=1, folds=1)
    folders = {run.folder.parent.name for run in runs}
    assert len(folders) == len(names)
    assert not [folder for folder in folders if FORBIDDEN.search(folder)]
