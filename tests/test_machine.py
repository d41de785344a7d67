"""What a machine is told to do with memory, by page faults of a process of its own, and threads."""

import platform
import subprocess
import sys

import pytest
import torch

import regard
from regard.machine import one_cpu_thread
from regard.training import run as run_module

SCRIPT = """
import resource
import numpy as np
from regard.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**23)  # 64 MiB, written and given back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
assert keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told so")
def test_freed_memory_is_kept_and_not_mapped_anew():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 20


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "told", "expected"), [("cuda", "", 1), ("cuda", "2", 3), ("cpu", "", 3)]
)
def test_beside_a_gpu_torch_has_one_thread(device, told, expected, three_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    with one_cpu_thread(torch.device(device)):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 3


def test_a_training_asks_for_it_before_anything_is_read(monkeypatch, tmp_path):
    def asked(device):
        raise LookupError(device)

    monkeypatch.setattr(run_module, "one_cpu_thread", asked)
    with pytest.raises(LookupError, match="cpu"):
        regard.train(tmp_path / "none", device="cpu")
