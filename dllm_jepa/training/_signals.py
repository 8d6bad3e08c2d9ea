"""Signals that ask a run to stop: it finishes the step, saves, and exits with a code of its own."""

import os
import signal
from types import FrameType
from typing import Any

from dllm_jepa.training._ranks import Ranks

STOPPED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and has saved its state: EX_TEMPFAIL of sysexits.h, start it again."""

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C before the first step: that of a program which a shell sees end by SIGINT."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """The run was asked to stop by the signal named `reason`."""

    def __init__(self, reason: str, exit_code: int = STOPPED_EXIT_CODE) -> None:
        super().__init__(exit_code)
        self.reason = reason

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, Any]]:
        """Made again on another rank from its reason, too."""
        return Stopped, (self.reason, self.code)


class StopSignals:
    """Remembers a signal until the end of the step. A context manager, to be used in the main thread.

    As long as nothing is trained, that is until `defer`, Ctrl-C ends the run at once; later a second one does.

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
        # A rank that waits for rank zero sits in a call of gloo's, where no handler of Python's would run.
        signal.signal(signal.SIGINT, self._interrupt if self._ranks.is_rank_zero else signal.SIG_DFL)
        return self

    def defer(self) -> None:
        """From now on Ctrl-C, too, waits for the end of the step; to be called when the first step begins."""
        if self._before:
            signal.signal(signal.SIGINT, self._note)

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

    def _interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nSIGINT: stopped before the first step, nothing to save\n")
        if self._ranks.world_size > 1:
            os._exit(INTERRUPTED_EXIT_CODE)  # an orderly end would wait for ranks that have ended
        raise Stopped("SIGINT", INTERRUPTED_EXIT_CODE)
