"""What can be counted about jobs; the composer joins it to the metrics."""

from __future__ import annotations

from typing import Protocol

from sdfleet.domain import Job


class Observer(Protocol):
    """Called on the event loop; must not block or raise."""

    def on_accepted(self, job: Job) -> None:
        """A new job has its row."""

    def on_started(self, job: Job, *, wait_s: float) -> None:
        """Drawing begins; `wait_s` since the job was made."""

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        """Done and stored. draw_s: with the backend. device_s: its share of the device. total_s: since it was made."""

    def on_failed(self, job: Job, *, code: str) -> None:
        """Failed or cancelled, with the error's code."""

    def on_store_fault(self, *, code: str) -> None:
        """The store or the outputs' folder could not be written; it is tried again."""


class Several:
    """Observers that all hear of everything, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_accepted(self, job: Job) -> None:
        for each in self._observers:
            each.on_accepted(job)

    def on_started(self, job: Job, *, wait_s: float) -> None:
        for each in self._observers:
            each.on_started(job, wait_s=wait_s)

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        for each in self._observers:
            each.on_finished(job, draw_s=draw_s, device_s=device_s, total_s=total_s)

    def on_failed(self, job: Job, *, code: str) -> None:
        for each in self._observers:
            each.on_failed(job, code=code)

    def on_store_fault(self, *, code: str) -> None:
        for each in self._observers:
            each.on_store_fault(code=code)


class Silent:
    """An observer that counts nothing."""

    def on_accepted(self, job: Job) -> None:
        """Nothing."""

    def on_started(self, job: Job, *, wait_s: float) -> None:
        """Nothing."""

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        """Nothing."""

    def on_failed(self, job: Job, *, code: str) -> None:
        """Nothing."""

    def on_store_fault(self, *, code: str) -> None:
        """Nothing."""
