"""Numbers about the server in Prometheus' text format; every name begins with `sdfleet_`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sdfleet import __version__
from sdfleet.backends.base import Capabilities
from sdfleet.domain import Job
from sdfleet.errors import ContentWithheld

# From a picture of the built-in model on a fast machine to a large one on a slow one.
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Load(Protocol):
    """How much there is to do."""

    @property
    def n_queued(self) -> int: ...
    @property
    def n_running(self) -> int: ...


class Metrics:
    """Counts what happens to jobs; an observer of the desk."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._accepted = Counter("sdfleet_jobs_accepted", "Jobs taken.", ["model", "dialect"], registry=registry)
        self._done = Counter("sdfleet_jobs_done", "Jobs done.", ["model", "dialect"], registry=registry)
        self._images = Counter("sdfleet_images", "Pictures made.", ["model"], registry=registry)
        self._failed = Counter(
            "sdfleet_jobs_failed",
            "Jobs failed or cancelled, by the error's code.",
            ["model", "code"],
            registry=registry,
        )
        self._wait_s = Histogram(
            "sdfleet_job_wait_seconds", "From acceptance to drawing.", ["model"], buckets=SECONDS, registry=registry
        )
        self._draw_s = Histogram(
            "sdfleet_job_generation_seconds", "Drawing, as its caller sees it.", ["model"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._total_s = Histogram(
            "sdfleet_job_total_seconds", "From acceptance to the stored pictures.", ["model"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._verdicts = Counter(
            "sdfleet_safety_verdicts",
            "Pictures by what the model's safety checker said: passed, flagged, withheld, off, none.",
            ["model", "verdict"],
            registry=registry,
        )
        self._rungs = Counter(
            "sdfleet_memory_rungs", "Steps of the memory ladder that jobs took.", ["rung"], registry=registry
        )
        self._store_faults = Counter(
            "sdfleet_store_faults",
            "Writes of jobs or pictures that had to be tried again.",
            ["code"],
            registry=registry,
        )
        version = Gauge("sdfleet_info", "Always 1; the version is a label.", ["version"], registry=registry)
        version.labels(__version__).set(1)

    def on_accepted(self, job: Job) -> None:
        """A new job has its row."""
        self._accepted.labels(job.request.model, job.submission.dialect).inc()

    def on_started(self, job: Job, *, wait_s: float) -> None:
        """Drawing begins."""
        self._wait_s.labels(job.request.model).observe(wait_s)

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        """Done and stored."""
        model = job.request.model
        self._done.labels(model, job.submission.dialect).inc()
        self._images.labels(model).inc(len(job.outputs))
        for output in job.outputs:
            self._verdicts.labels(model, output.safety).inc()
        self._verdicts.labels(model, "withheld").inc(len(job.withheld))
        self._draw_s.labels(model).observe(draw_s)
        self._total_s.labels(model).observe(total_s)
        for rung in job.rungs:
            self._rungs.labels(rung).inc()

    def on_failed(self, job: Job, *, code: str) -> None:
        """Failed or cancelled."""
        self._failed.labels(job.request.model, code).inc()
        if code == ContentWithheld.code:
            self._verdicts.labels(job.request.model, "withheld").inc(job.request.n_images)

    def on_store_fault(self, *, code: str) -> None:
        """The store or the outputs' folder could not be written."""
        self._store_faults.labels(code).inc()

    def expose(self, *, load: Load, backend: Capabilities) -> bytes:
        """Everything, with how it stands now."""
        now = CollectorRegistry()
        now.register(_Now(load, backend))
        return generate_latest(self._registry) + generate_latest(now)


class _Now(Collector):
    """What is read at the moment somebody asks."""

    def __init__(self, load: Load, backend: Capabilities) -> None:
        self._load = load
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        """The gauges; facts of the engine that are numbers become one each."""
        yield GaugeMetricFamily("sdfleet_jobs_queued", "Jobs that wait.", value=self._load.n_queued)
        yield GaugeMetricFamily("sdfleet_jobs_running", "Jobs being drawn.", value=self._load.n_running)
        state = GaugeMetricFamily("sdfleet_backend_up", "1 while the backend can draw.", labels=["backend", "state"])
        is_up = self._backend.state not in {"unavailable", "closed"}
        state.add_metric([self._backend.name, self._backend.state], float(is_up))
        yield state
        for fact, name, told in (
            ("checkpoints", "sdfleet_checkpoints_loaded", "Checkpoints on the device."),
            ("pinned", "sdfleet_checkpoints_pinned", "Checkpoints that nothing pushes off the device."),
        ):
            held = self._backend.facts.get(fact)
            yield GaugeMetricFamily(name, told, value=len(held) if isinstance(held, list | tuple) else 0)
        facts = GaugeMetricFamily("sdfleet_engine", "What the engine says of itself.", labels=["fact"])
        for name, value in self._backend.facts.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                facts.add_metric([name], float(value))
        yield facts
