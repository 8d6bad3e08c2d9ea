"""Signals that ask a run to stop: it finishes the step, saves, and exits with a code of its own."""

import os
import signal
from types import FrameType
from typing import Any

from dllm_jepa.training._ranks import Ranks

STOPPED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and has saved its state: EX_TEMPFAIL of sysexits.h, start it again."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state.

    Args:
        reason: the signal, such as SIGTERM.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(STOPPED_EXIT_CODE)
        self.reason = reason

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str]]:
        """Made again on another rank from its reason, not from its exit code."""
        return Stopped, (self.reason,)


class StopSignals:
    """Remembers a signal until the end of the step. A context manager, to be used in the main thread.

    A second SIGINT ends the process at once, whatever it is doing.

    Args:
        ranks: the ranks, which stop after the same step whichever of them got the signal.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Take the signals over."""
        self._before = {number: signal.signal(number, self._note) for number in _HANDLED}
        return self

    def agreed(self) -> str | None:
        """The signal that some rank has got, the same on every rank; None if nobody has. On all ranks at once."""
        number = self._ranks.largest(self._received)
        return signal.Signals(number).name if number else None

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._ranks.is_rank_zero:  # not by print: the signal may have come in the middle of one
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())
