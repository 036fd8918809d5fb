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
from sdfleet.language.counting import DONE, UNKNOWN, Kind

# From a picture of the built-in model on a fast machine to a large one on a slow one.
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
# To the first token: from a small model that is warm to a large one that is read from a disk first.
TOKEN_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
# Servers and nodes say themselves which language models they have: what is beyond these is counted as one.
MOST_LANGUAGE_MODELS = 200
OTHER_MODELS = "others"
MOST_CHARS = 120


class Load(Protocol):
    """How much there is to do."""

    @property
    def n_queued(self) -> int: ...
    @property
    def n_running(self) -> int: ...


class Metrics:
    """Counts what happens to jobs and to answers in words; an observer of the desk and of language models."""

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
        by_model = ["kind", "model"]
        self._answers = Counter(
            "sdfleet_answers",
            "Answers in words, vectors and transcripts that ended: done, left by their caller, or an error's code.",
            [*by_model, "outcome"],
            registry=registry,
        )
        self._tokens = Counter("sdfleet_answer_tokens", "Tokens that models wrote.", by_model, registry=registry)
        self._first_token_s = Histogram(
            "sdfleet_answer_first_token_seconds", "To the first token of a stream.", by_model, buckets=TOKEN_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._answer_s = Histogram(
            "sdfleet_answer_seconds", "Whole answers, as their callers see it.", by_model, buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._open = Gauge("sdfleet_answer_streams_open", "Streams that go on.", ["kind"], registry=registry)
        self._language_models: set[str] = set()
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

    def on_asked(self, kind: Kind, *, is_stream: bool) -> None:
        """A language or speech model is asked."""
        self._open.labels(kind).inc(is_stream)

    def on_first_token(self, kind: Kind, model: str, *, after_s: float) -> None:
        """A stream begins to speak."""
        self._first_token_s.labels(kind, self._label(model)).observe(after_s)

    def on_ended(self, kind: Kind, model: str, *, outcome: str, n_tokens: int, spent_s: float, is_stream: bool) -> None:
        """An answer ended; see `AnswerObserver`."""
        label = self._label(model)
        self._open.labels(kind).dec(is_stream)
        self._answers.labels(kind, label, outcome).inc()
        if n_tokens:
            self._tokens.labels(kind, label).inc(n_tokens)
        if outcome == DONE:
            self._answer_s.labels(kind, label).observe(spent_s)

    def _label(self, model: str) -> str:
        known, model = self._language_models, model[:MOST_CHARS]
        if model != UNKNOWN and len(known) < MOST_LANGUAGE_MODELS:
            known.add(model)
        return model if model in known or model == UNKNOWN else OTHER_MODELS

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
