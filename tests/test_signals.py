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
