"""The signals that ask a command to stop: Ctrl-C, a scheduler's, and that of a closed terminal."""

import signal

STOPPING: list[signal.Signals] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def heeded() -> list[signal.Signals]:
    """Those to listen to: all but a SIGHUP that is ignored already, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    return [n for n in STOPPING if n != hangup or signal.getsignal(n) != signal.SIG_IGN]
