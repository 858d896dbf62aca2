"""Signals on one rank: what a handler does, and what it leaves as it was."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support.ranks_busy import small_state

from ckpt import CheckpointManager, ConfigError


def test_a_signal_is_noted_and_the_old_handler_comes_back(tmp_path):
    calls = []

    def mine(*_args):
        calls.append(1)

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with CheckpointManager(tmp_path) as manager:
            assert manager.preempted() is False
            undo = manager.save_on_signal(signal.SIGUSR1, signal.SIGUSR2)
            undo()
            assert signal.getsignal(signal.SIGUSR1) is mine
            manager.save_on_signal(signal.SIGUSR1, deadline=5)
            manager.save_on_signal(signal.SIGUSR1, deadline=5)  # twice does no harm
            os.kill(os.getpid(), signal.SIGUSR1)
            assert manager.preempted() is True
            manager.last_save(7, small_state())
            os.kill(os.getpid(), signal.SIGUSR1)  # schedulers repeat themselves
            assert manager.preempted() is True
        assert calls == []
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert manager.steps() == [7]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_can_be_requested_from_any_thread(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        thread = threading.Thread(target=manager.request_stop)
        thread.start()
        thread.join()
        assert manager.preempted()


def test_what_cannot_be_handled_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ConfigError, match="SIGKILL"):
            manager.save_on_signal(signal.SIGKILL)
        for deadline in (0, -1, float("nan")):
            with pytest.raises(ConfigError, match="deadline"):
                manager.save_on_signal(deadline=deadline)
        raised = []

        def elsewhere():
            try:
                manager.save_on_signal()
            except ConfigError as error:
                raised.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "main thread" in raised[0]
