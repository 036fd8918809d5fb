from __future__ import annotations

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sdfleet.domain import ImageRequest, Job, JobId, Submission
from sdfleet.spans import Spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def _job(**changed: object) -> Job:
    request = ImageRequest(prompt="a secret plan", model="starter", steps=4)
    facts: dict[str, object] = {
        "id": JobId("ab12"),
        "submission": Submission(request=request, traceparent=PARENT),
        "state": "done",
        "created_s": 100.0,
        "started_s": 101.0,
        "finished_s": 104.0,
        "timings_s": {"encode": 0.5, "denoise": 2.0, "decode": 0.25, "total": 3.0},
    }
    return Job(**(facts | changed))  # type: ignore[arg-type]


def _spans() -> tuple[Spans, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans("http://localhost:4318", provider=provider), exporter


def test_a_job_is_a_span_of_its_callers_trace_with_its_phases_in_order() -> None:
    spans, exporter = _spans()
    spans.on_finished(_job(), draw_s=3.0, device_s=2.0, total_s=4.0)
    told = {span.name: span for span in exporter.get_finished_spans()}
    assert list(told) == ["wait", "encode", "denoise", "decode", "job"]
    job = told["job"]
    assert job.context is not None
    assert format(job.context.trace_id, "032x") == PARENT.split("-")[1]
    assert job.parent is not None
    assert format(job.parent.span_id, "016x") == PARENT.split("-")[2]
    assert (job.start_time, job.end_time) == (100 * 10**9, 104 * 10**9)
    assert told["denoise"].start_time == told["encode"].end_time


def test_a_failed_job_is_told_with_its_code_and_no_span_holds_a_prompt() -> None:
    spans, exporter = _spans()
    spans.on_failed(_job(state="failed", timings_s={}), code="out_of_memory")
    job = exporter.get_finished_spans()[-1]
    assert job.attributes is not None
    assert job.attributes["sdfleet.error_code"] == "out_of_memory"
    assert not job.status.is_ok
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())
