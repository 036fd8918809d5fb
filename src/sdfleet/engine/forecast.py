"""The needs of one drawing as plain data, and the process that finds them: `python -m sdfleet.engine.forecast`.

For a server, whose own process must not import torch: it gives the question as one line of JSON on standard input and
reads the answer as one line from standard output. Nothing is loaded and nothing is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sdfleet.engine.events import DeviceChoice, DtypeChoice, TextWeightsChoice, WeightsChoice

if TYPE_CHECKING:
    from sdfleet.engine.needs import Need, PictureTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A picture of a published model, and how the engine would use this machine.

    architecture: its name in catalog/data/architectures. book_folder: where measured times are kept. budget_s: see
    `picture_time`; below 0, no time is predicted at all. all_formats: see `needs`.
    """

    architecture: str
    family: str
    width_px: int
    height_px: int
    steps: int
    guidance: float
    sampler: str
    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    weights: WeightsChoice = "auto"
    text_weights: TextWeightsChoice = "auto"
    limit_bytes: int | None = None
    n_threads: int | None = None
    book_folder: str | None = None
    budget_s: float = 10.0
    all_formats: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a picture takes here: memory by mode and format, and time where it is known."""

    memory: tuple[Need, ...]
    time: PictureTime | None

    def to_json(self) -> dict[str, Any]:
        """As docs/models.md describes it."""
        told: dict[str, Any] = {"memory": [asdict(need) | {"fits": need.fits} for need in self.memory]}
        if self.time is not None:
            rounded = {
                name: round(value, 4) if isinstance(value, float) else value
                for name, value in asdict(self.time).items()
            }
            told["time"] = rounded | {"picture_s": round(self.time.picture_s, 3)}
        return told


def forecast(question: Question) -> Forecast:
    """The answer, found in this process; imports torch. Raises as the engine does, and UnknownName."""
    from sdfleet.catalog import architectures
    from sdfleet.domain import Drawing, JobId
    from sdfleet.engine.devices import choose_device
    from sdfleet.engine.needs import needs, picture_footprint, picture_time
    from sdfleet.engine.random_weights import write_checkpoint

    with TemporaryDirectory(prefix="sdfleet-plan-") as home:
        folder = Path(home) / "checkpoint"
        write_checkpoint(architectures.load(question.architecture), folder)
        drawing = Drawing(
            job_id=JobId("plan"), checkpoint=str(folder), family=question.family, prompt="a", negative_prompt="",
            width_px=question.width_px, height_px=question.height_px, steps=question.steps,
            guidance=question.guidance, seed=0, n_images=1, sampler=question.sampler,
        )  # fmt: skip
        device = choose_device(question.device, question.dtype, question.weights, question.text_weights)
        # Of weights that are kept in fewer bits the time is not predicted: there the two look at different networks.
        footprint = None if device.weights is not None else picture_footprint(drawing, device)
        memory = needs(
            drawing,
            device=question.device,
            dtype=question.dtype,
            weights=question.weights,
            text_weights=question.text_weights,
            limit_bytes=question.limit_bytes,
            all_formats=question.all_formats,
            footprint=footprint,
        )
        if question.budget_s < 0:
            return Forecast(memory=memory, time=None)
        time = picture_time(
            drawing,
            device=question.device,
            dtype=question.dtype,
            book_folder=None if question.book_folder is None else Path(question.book_folder),
            budget_s=question.budget_s,
            n_threads=question.n_threads,
            footprint=footprint,
        )
        return Forecast(memory=memory, time=time)


def main() -> int:
    """Answer the question on standard input; an error is told as `{"fault": ...}` with exit code 1."""
    from sdfleet.errors import SdfleetError

    asked: Mapping[str, Any] = json.loads(sys.stdin.readline())
    code = 0
    with redirect_stdout(sys.stderr):  # libraries print; only the answer goes out
        try:
            answer = forecast(Question(**asked)).to_json()
        except SdfleetError as exc:
            answer, code = {"fault": str(exc), "code": exc.code}, 1
    sys.stdout.write(json.dumps(answer) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
