"""Where the time of a step goes."""

import time
from collections import defaultdict

import torch


class StepClock:
    """A stop watch whose laps are booked by name.

    On a GPU a lap ends when the work handed to the GPU before has ended: laps are events on its stream, which are read
    later, so that no lap waits for it.

    Args:
        device: device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last = self._now()
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin the first lap."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """End a lap; the time since the last one belongs to `name`."""
        self._laps.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds under every name since the last call; on a GPU it waits for the last lap to end."""
        seconds: dict[str, float] = defaultdict(float)
        for name, end in self._laps:
            seconds[name] += self._between(self._last, end)
            self._last = end
        self._laps.clear()
        return dict(seconds)

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def _between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float), "both come from the same clock"
            return end - start
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # milliseconds
