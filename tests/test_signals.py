"""Signals to stop: Ctrl-C, a scheduler's, and that of a closed terminal."""

import signal

import pytest

from regard.commands.signals import Signaled, signals_raise
from regard.signals import STOPPING


@pytest.mark.parametrize("number", STOPPING)
def test_each_ends_a_command_in_order(number):
    before = signal.signal(number, signal.default_int_handler)  # these tests may run under nohup
    try:
        with pytest.raises(Signaled) as stopped, signals_raise():
            signal.raise_signal(number)
        assert stopped.value.number == number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_must_be_done_as_a_whole_is_done_first():
    done = []

    def rows():
        with signals_raise() as signals:
            with signals.whole():
                done.append("row")
            with signals.whole():
                signal.raise_signal(signal.SIGTERM)
                done.append("row")
            done.append("the next")

    with pytest.raises(Signaled) as stopped:
        rows()
    assert stopped.value.number == signal.SIGTERM
    assert done == ["row", "row"]
