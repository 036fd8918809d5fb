"""What an engine says, and how it is set up. Plain data: the parent process reads it without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdfleet.domain import FinishedPicture, JobId, Progress, TokenCount
from sdfleet.errors import SdfleetError

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
WeightFormat = Literal["fp8", "int8", "nf4"]
WeightsChoice = Literal["auto", "fp8", "int8", "nf4"]
TextWeightsChoice = Literal["auto", "full", "fp8", "int8", "nf4"]
MemoryMode = Literal["auto", "fast", "eco"]
CompileChoice = Literal["auto", "off", "on"]
ExecutorChoice = Literal["auto", "torch", "openvino", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How one engine uses its device.

    weights: the format large weights are kept in: less memory, slower steps, other pictures; auto: as dtype.
    text_weights: the same for large text encoders; auto: as `weights`, full: as dtype.
    max_rows: most network rows in one step (a guided picture takes two); None lets the batcher measure.
    memory_limit_bytes: most bytes for weights and activations together; None asks the device.
    n_threads: CPU threads for torch; None takes every core this process may use.
    executor: what runs the denoiser on a CPU; auto tries both when there is nothing to draw, and needs a cache_folder.
        int8 tries 8-bit weights and activations too: faster on large networks, and changes the pictures.
    compile: torch.compile of the denoiser's blocks; auto: on a card, after the first pictures. Unmeasured there.
    cache_folder: for what was converted; None keeps nothing on disk.
    rehearses: on a CPU, calls of sizes not needed so far are made while there is nothing to draw (`rehearsal.py`).
    """

    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    weights: WeightsChoice = "auto"
    text_weights: TextWeightsChoice = "auto"
    memory_mode: MemoryMode = "auto"
    max_rows: int | None = None
    memory_limit_bytes: int | None = None
    n_threads: int | None = None
    executor: ExecutorChoice = "auto"
    compile: CompileChoice = "auto"
    cache_folder: str | None = None
    rehearses: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureDone:
    """One picture of a job is finished; a job of n pictures sends n of these, then a JobDone."""

    job_id: JobId
    image_index: int
    finished: FinishedPicture


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDone:
    """All pictures of a job were sent. Fields as in `domain.ImageResult`."""

    job_id: JobId
    timings_s: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[TokenCount, ...] = ()
    warnings: tuple[str, ...] = ()
    rungs: tuple[str, ...] = ()
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailed:
    """The job ended without its pictures; cancelled jobs end with `JobCancelled` as the error."""

    job_id: JobId
    error: SdfleetError


Event = Progress | PictureDone | JobDone | JobFailed
