"""Traces of jobs for OpenTelemetry (extra `otel`): one span from acceptance to the stored picture, its phases inside.

A caller's `traceparent` header (W3C Trace Context) makes the job a part of the caller's trace. No prompt is in it.
"""

from __future__ import annotations

from sdfleet import __version__
from sdfleet.domain import Job
from sdfleet.errors import InvalidValue

PHASES = ("load", "encode", "denoise", "decode")
_NANOSECONDS = 1_000_000_000


class Spans:
    """Tells every ended job to a collector; an observer of the desk.

    endpoint: base address of an OTLP/HTTP collector, for example http://localhost:4318. Raises InvalidValue where the
    extra is not installed.
    """

    def __init__(self, endpoint: str, *, provider: object | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as exc:
            raise InvalidValue(
                "SD_OTEL_ENDPOINT", "OpenTelemetry is not installed", hint="pip install 'sdfleet[otel]'"
            ) from exc
        if isinstance(provider, TracerProvider):
            self._provider = provider
        else:
            self._provider = TracerProvider(resource=Resource.create({"service.name": "sdfleet"}))
            exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sdfleet", __version__)

    def on_accepted(self, job: Job) -> None:
        """Nothing yet: spans are told when they are whole."""

    def on_started(self, job: Job, *, wait_s: float) -> None:
        """Nothing yet."""

    def on_finished(self, job: Job, *, draw_s: float, device_s: float, total_s: float) -> None:
        """The job with its phases."""
        self._tell(job, code=None)

    def on_failed(self, job: Job, *, code: str) -> None:
        """The job with its error's code."""
        self._tell(job, code=code)

    def on_store_fault(self, *, code: str) -> None:
        """No span of its own."""

    def close(self) -> None:
        """Send what has not been sent; waits a few seconds at most. Blocks."""
        self._provider.shutdown()

    def _tell(self, job: Job, *, code: str | None) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller = TraceContextTextMapPropagator().extract({"traceparent": job.submission.traceparent})
        asked = job.request
        span = self._tracer.start_span(
            "job",
            context=caller,
            start_time=_ns(job.created_s),
            attributes={
                "sdfleet.job_id": job.id,
                "sdfleet.model": asked.model,
                "sdfleet.dialect": job.submission.dialect,
                "sdfleet.task": asked.task,
                "sdfleet.n_images": asked.n_images,
                "sdfleet.steps": asked.steps or 0,
                "sdfleet.attempts": job.attempts,
                "sdfleet.state": job.state,
            },
        )
        if code is not None:
            span.set_attribute("sdfleet.error_code", code)
            span.set_status(Status(StatusCode.ERROR, code))
        inside = set_span_in_context(span)
        at_s = job.created_s
        if job.started_s is not None:
            self._tracer.start_span("wait", context=inside, start_time=_ns(at_s)).end(_ns(job.started_s))
            at_s = job.started_s
        for phase in PHASES:
            if phase in job.timings_s:
                phase_span = self._tracer.start_span(phase, context=inside, start_time=_ns(at_s))
                at_s += job.timings_s[phase]
                phase_span.end(_ns(at_s))
        span.end(_ns(job.finished_s or at_s))


def _ns(at_s: float) -> int:
    return round(at_s * _NANOSECONDS)
