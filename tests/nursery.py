"""Processes of `regard` that start at once: forked from one that has imported everything.

Importing torch, timm and the rest takes seconds, and the tests start many processes. Here one
process imports, and then forks a child for each command: a process of its own as any other,
with its own streams, signals and exit code. tests/test_cli.py and tests/test_import.py start
`regard` from nothing, so that what forking could hide is seen there.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

PRELOADED = (
    "torch", "torchvision", "timm", "accelerate", "sklearn.metrics", "sklearn.datasets",
    "scipy.stats", "matplotlib.pyplot", "jinja2", "PIL.Image", "fastapi", "uvicorn",
    "torch.utils.tensorboard", "torch.utils.data", "regard.training.run", "regard.predict",
    "regard.commands.explain", "regard.report.build", "regard.run_data", "regard.commands.demo",
    "regard.commands.convert", "regard.serve.server",
)  # fmt: skip


reports = True  # whether a run that is trained gets its report, which takes most of its time


def no_report(folder: Path, device: str) -> Path:
    return folder / "report.html"


class Process:
    """One command in a forked process; answers as `subprocess.Popen` with text pipes does."""

    def __init__(self, arguments: list[str], environment: dict[str, str], cwd: Path | None = None):
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(_nursery())
        request = {
            "arguments": arguments,
            "environment": environment,
            "cwd": str(cwd or os.getcwd()),
            "reports": reports,
        }
        socket.send_fds(self._line, [json.dumps(request).encode() + b"\n"], [out_end, err_end])
        os.close(out_end)
        os.close(err_end)
        self.args = ["regard", *arguments]
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None
        self._told = b""
        while b"\n" not in self._told:
            self._told += self._line.recv(100)
        pid, self._told = self._told.split(b"\n", 1)
        self.pid = int(pid)

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            self._line.settimeout(None if end is None else max(end - time.monotonic(), 1e-3))
            try:
                self._told += self._line.recv(100)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            if self._told.endswith(b"\n"):
                self.returncode = int(self._told)
                self._line.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """To it and all that it started, as `timeout`, systemd and SLURM do."""
        os.killpg(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        texts = ["", ""]

        def read(k: int, stream) -> None:
            texts[k] = stream.read()

        streams = enumerate((self.stdout, self.stderr))
        threads = [threading.Thread(target=read, args=s, daemon=True) for s in streams]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:  # the test fails; what comes after it shall not
            self.signal_group(signal.SIGKILL)
            self.wait()
            raise
        for thread in threads:
            thread.join(timeout)
        self.stdout.close()
        self.stderr.close()
        return texts[0], texts[1]


ADDRESS = "REGARD_TEST_NURSERY"
_life = None  # the nursery ends when its input does, that is, with the process that started it


def start() -> None:
    """Starts the nursery of this process and those that it starts, without waiting for it."""
    global _life
    address = Path(tempfile.mkdtemp(prefix="regard-")) / "nursery"
    _life = subprocess.Popen(
        [sys.executable, "-m", "tests.nursery", str(address)],
        stdin=subprocess.PIPE, cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    os.environ[ADDRESS] = str(address)


def _nursery() -> str:
    """The nursery's socket, once it is open."""
    if ADDRESS not in os.environ:
        start()
    address = os.environ[ADDRESS]
    end = time.monotonic() + 240
    while not os.path.exists(address):
        assert time.monotonic() < end, "the nursery did not open"
        time.sleep(0.05)
    return address


def serve(address: str) -> dict:
    """Forks a child for each request. Returns in the child only, with its request."""
    gc.disable()
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # of an extra: its own tests will say so
            importlib.import_module(name)
    gc.freeze()  # what is imported is no rubbish; looking at it would copy its pages
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(100)
    os.rename(f"{address}.new", address)  # whoever sees it can connect
    bell, rung = os.pipe()
    os.set_blocking(bell, False)
    os.set_blocking(rung, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(rung)
    ready = selectors.DefaultSelector()
    for source in (sys.stdin.buffer, listener, bell):
        ready.register(source, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while True:
        sources = [key.fileobj for key, _ in ready.select()]
        if sys.stdin.buffer in sources:
            for pid in children:  # nobody is there any more
                os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(Path(address).parent, ignore_errors=True)
            os._exit(0)
        if bell in sources:
            os.read(bell, 1000)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                with children.pop(pid) as line, contextlib.suppress(OSError):
                    line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        if listener in sources:
            line, _ = listener.accept()
            text, fds, _, _ = socket.recv_fds(line, 1 << 20, 2)
            while not text.endswith(b"\n"):
                text += line.recv(1 << 20)
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)  # a group of its own, as a shell's jobs have
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores for the suite
                ready.close()
                for other in (line, listener, *children.values()):
                    other.close()
                for fd, place in zip(
                    (os.open(os.devnull, os.O_RDONLY), *fds), range(3), strict=True
                ):
                    os.dup2(fd, place)
                    os.close(fd)
                os.close(bell)
                os.close(rung)
                return json.loads(text)
            for fd in fds:
                os.close(fd)
            children[pid] = line
            line.sendall(b"%d\n" % pid)


if __name__ == "__main__":
    wanted = serve(sys.argv[1])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["cwd"])
    sys.argv = ["regard", *wanted["arguments"]]
    from regard.cli import main
    from regard.commands import train

    if not wanted["reports"]:
        train._report = no_report
    code: object = 1
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    # as the interpreter ends, without taking thousands of modules apart
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
