"""Image models of an Ollama: found by what they say they can, drawn with progress, stopped by hanging up.

Ollama drew pictures up to 0.32.5. A later one refuses: then this backend is unavailable, and says so until another
version answers. A model that does not name the capability `image` is never sent a picture to draw.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
import time
from collections.abc import Collection, Mapping

from pydantic import ValidationError

from sdfleet.backends.base import BackendState, Capabilities, OnProgress
from sdfleet.backends.errands import Errands
from sdfleet.backends.sent_pictures import Asked, as_asked, as_base64, as_result, model_of, ours_alone
from sdfleet.backends.web import BadAnswer, Lost, Unreachable, Web, lines
from sdfleet.catalog.cards import Card
from sdfleet.catalog.published import published
from sdfleet.domain import Drawing, FinishedPicture, ImageRequest, ImageResult, JobId, Picture
from sdfleet.errors import (
    BackendFailed,
    BackendUnavailable,
    BrokenPicture,
    Busy,
    InvalidValue,
    JobCancelled,
    UnsupportedByModel,
)
from sdfleet.storage import pictures

log = logging.getLogger(__name__)

ID = "ollama"
CAPABILITY = "image"
LAST_THAT_DREW = "0.32.5"
# What it has changes when somebody pulls or removes a model.
LOOK_EVERY_S = 10.0
LOOK_WITHIN_S = 2.0
# Between two lines: its own queue, and loading a model from a slow disk.
ANSWER_WITHIN_S = 900.0
MAX_LINE_BYTES = 2 * pictures.MAX_FILE_BYTES
# Of a model that no card of ours knows; Ollama itself does not tell its own.
UNKNOWN_STEPS = 20
MAX_SEED = 2**63 - 1
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
# One of a registry's has an address before it, and is known by the name made from it alone.
_AN_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:[A-Za-z0-9._-]+)?")


class OllamaImages:
    """Draws with an Ollama's image models; see `Backend` for the face. Belongs to one event loop. url: of the Ollama.

    Its memory is its own: models come and go there as it decides, beside language models.
    """

    def __init__(self, url: str, *, look_every_s: float = LOOK_EVERY_S) -> None:
        self._url = url.rstrip("/")
        self._look_every_s = look_every_s
        self._asker = Web(allow_private=True, answer_within_s=LOOK_WITHIN_S)
        self._drawer = Web(allow_private=True, keeps=False, answer_within_s=ANSWER_WITHIN_S)
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")
        self._version = ""
        self._refused: tuple[str, str] | None = None  # (version, what it said) of one that draws no more
        self._why_not = ""
        self._models: dict[str, tuple[str, Card]] = {}  # by the card's name: Ollama's own, and the card
        self._shown: dict[str, bool] = {}  # by digest: whether that model draws
        self._errands = Errands(ID)

    # -------------------------------------------------------------------------------------------------- what is there

    def reason(self) -> str:
        """Why nothing can be drawn now; empty where it can."""
        return self._why_not

    def cards(self) -> tuple[Card, ...]:
        """Its image models."""
        return tuple(card for _, card in self._models.values())

    def capabilities(self) -> Capabilities:
        was_asked = bool(self._version or self._why_not)
        state: BackendState = "unavailable" if self._why_not else "ready" if was_asked else "idle"
        if self._errands.is_closed:
            state = "closed"
        return Capabilities(
            name=ID,
            state=state,
            reason="the backend was closed" if self._errands.is_closed else self._why_not,
            tasks=("txt2img", "img2img"),
            n_running=len(self._errands),
            facts={"device": f"Ollama {self._version}".strip()},
        )

    async def look(self) -> None:
        """Find out which image models there are, unless that was done just now."""
        async with self._looking:
            now_s = asyncio.get_running_loop().time()
            if self._errands.is_closed or now_s - self._looked_s < self._look_every_s:
                return
            try:
                await self._look()
            except (Unreachable, Lost, BadAnswer) as exc:
                self._models = {}
                self._why_not = f"no Ollama answers at {self._url}: {exc}"
            self._looked_s = asyncio.get_running_loop().time()

    async def _look(self) -> None:
        root = await self._asker.ask("GET", f"{self._url}/")
        if root.body.startswith(b"sdfleet"):
            # It would be asked to draw, and ask us.
            self._models, self._why_not = {}, f"{self._url} is a sdfleet server; SD_OLLAMA_URL names an Ollama"
            return
        self._version = str((await self._asker.ask("GET", f"{self._url}/api/version")).json().get("version", ""))
        tags = (await self._asker.ask("GET", f"{self._url}/api/tags")).json().get("models")
        found: dict[str, tuple[str, Card]] = {}
        for entry in tags if isinstance(tags, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and await self._draws(entry):
                card = _card(entry["name"], taken=found)
                if card is not None:
                    found[card.name] = entry["name"], card
        self._models = found
        self._why_not = self._refusal() or ("" if found else f"the Ollama at {self._url} has no image model")

    async def _draws(self, entry: Mapping[str, object]) -> bool:
        told = entry.get("capabilities")
        if isinstance(told, list):
            return CAPABILITY in told
        # Older ones tell only when asked for the model.
        key = str(entry.get("digest") or entry["name"])
        if key not in self._shown:
            answer = await self._asker.ask("POST", f"{self._url}/api/show", body={"model": entry["name"]})
            told = answer.json().get("capabilities") if answer.is_good else None
            self._shown[key] = isinstance(told, list) and CAPABILITY in told
        return self._shown[key]

    def _refusal(self) -> str:
        if self._refused is None or self._refused[0] != self._version:
            return ""
        return (
            f"Ollama {self._version} does not draw ({self._refused[1]}); Ollama {LAST_THAT_DREW} was the last that did"
        )

    # ------------------------------------------------------------------------------------------------------ to draw

    async def start(self) -> None:
        self._errands.check_is_open()
        await self.look()

    async def generate(self, drawing: Drawing, on_progress: OnProgress | None = None) -> ImageResult:
        return await self._errands.run(drawing.job_id, self._draw(drawing, on_progress))

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Nothing: there are no previews."""

    async def cancel(self, job_id: JobId) -> None:
        self._errands.stop(job_id, JobCancelled(f"job {job_id} was cancelled"))

    async def load(self, drawing: Drawing) -> None:
        """Nothing: its memory is not ours to fill."""

    async def unload(self, checkpoint: str) -> None:
        """Nothing: what it holds, it lets go by itself."""

    async def pin(self, checkpoints: Collection[str]) -> None:
        """Nothing, as `unload`."""

    async def close(self) -> None:
        self._errands.close()
        await self._asker.close()
        await self._drawer.close()

    async def _draw(self, drawing: Drawing, on_progress: OnProgress | None) -> ImageResult:
        name = await self._name_of(drawing)
        image = await asyncio.to_thread(as_base64, drawing.image)
        begun_s = time.monotonic()
        found, load_s = [], 0.0
        for index in range(drawing.n_images):
            picture, this_load_s = await self._picture(drawing, index, name, image, on_progress)
            found.append(FinishedPicture(picture=picture, seed=drawing.seed + index))
            load_s += this_load_s
        spent_s = time.monotonic() - begun_s
        return as_result(
            drawing, found, by="Ollama", device=f"Ollama {self._version}".strip(), spent_s=spent_s, load_s=load_s,
            unsaid=("guidance", "sampler", "strength"),
        )  # fmt: skip

    async def _name_of(self, drawing: Drawing) -> str:
        """What Ollama calls the model. Raises BackendUnavailable: what is not known to draw is never asked to."""
        key = model_of(drawing)
        if key not in self._models:
            await self.look()
        if key not in self._models:
            raise BackendUnavailable(ID, self._why_not or f"the Ollama at {self._url} has no image model {key}")
        return self._models[key][0]

    async def _picture(
        self, drawing: Drawing, index: int, name: str, image: str | None, on_progress: OnProgress | None
    ) -> tuple[Picture, float]:
        """The picture, and the seconds of loading that it says it took."""
        body: dict[str, object] = {
            "model": name, "prompt": drawing.prompt, "width": drawing.width_px, "height": drawing.height_px,
            "steps": drawing.steps, "options": {"seed": drawing.seed + index}, "stream": True,
        }  # fmt: skip
        if image is not None:
            body["images"] = [image]
        asked = Asked(drawing, index, on_progress)
        try:
            async with self._drawer.stream("POST", f"{self._url}/api/generate", body=body) as (status, _, parts):
                async for line in lines(parts, max_bytes=MAX_LINE_BYTES):
                    told = await asyncio.to_thread(_object, line)
                    if status != 200 or "error" in told:
                        self._refuse(status, str(told.get("error", "nothing"))[:300])
                    if (step := _step(told, drawing)) is not None:
                        asked.tell(step)
                    if told.get("done"):
                        picture = await asyncio.to_thread(_decoded, told.get("image"), drawing)
                        asked.tell(drawing.steps)
                        return picture, _seconds(told.get("load_duration"))
                if status != 200:
                    self._refuse(status, "nothing")
        except Unreachable as exc:
            self._why_not, self._looked_s = f"no Ollama answers at {self._url}: {exc}", float("-inf")
            raise BackendUnavailable(ID, self._why_not) from exc
        except (Lost, BadAnswer) as exc:
            raise BackendFailed(f"the Ollama at {self._url} did not finish the picture: {exc}") from exc
        raise BackendFailed(f"the Ollama at {self._url} ended without a picture")

    def _refuse(self, status: int, said: str) -> None:
        """Raise what an answer other than progress means."""
        match status:
            case 400:
                # The model says that it draws, and the request keeps to the limits: it is this Ollama that does not.
                self._refused = (self._version, said)
                self._why_not = self._refusal()
                raise BackendUnavailable(ID, self._why_not)
            case 404:
                self._looked_s = float("-inf")
                raise BackendFailed(f"Ollama does not have the model any more: {said}", hint="see /api/backends")
            case 429 | 503:
                raise Busy(f"Ollama has too much to do: {said}", retry_after_s=10.0)
            case _:
                raise BackendFailed(f"Ollama met a fault ({status}): {said}", hint="see its log")


def check(card: Card, request: ImageRequest) -> tuple[str, ...]:
    """What would be left out of a request, as warnings. Raises a BadRequest for what Ollama cannot draw."""
    if request.mask is not None:
        raise UnsupportedByModel(f"{card.name} is drawn by Ollama, which takes no mask", hint="name another backend")
    if request.seed is not None and request.seed + request.n_images - 1 > MAX_SEED:
        raise InvalidValue("seed", f"{request.seed} is more than Ollama takes", hint=f"use at most {MAX_SEED}")
    unheeded = ["strength"] if request.image is not None and request.strength is not None else []
    unheeded += ours_alone(request)
    return tuple(f"{field} has no effect on {card.name} at Ollama" for field in unheeded)


def _card(name: str, *, taken: Collection[str]) -> Card | None:
    """The card of one of its models; None for a name that no request could say."""
    path, _, tag = name.rpartition(":") if ":" in name else (name, "", "latest")
    base = path.rpartition("/")[2]
    wanted = base if tag == "latest" else f"{base}-{tag}"
    slug = _NOT_IN_NAMES.sub("-", wanted.lower()).strip("-._")[:64]
    if slug in taken:
        slug = _NOT_IN_NAMES.sub("-", name.lower()).strip("-._")[:64]
    known = next((card for card in published() if card.answers_to(slug) or card.answers_to(f"x/{base}")), None)
    try:
        return Card(
            name=slug,
            family="other",
            title=f"{base if known is None else known.title or base}, at Ollama",
            licence=None if known is None else known.licence,
            licence_url=None if known is None else known.licence_url,
            aliases=(name,) if _AN_ALIAS.fullmatch(name) else (),
            width_px=1024 if known is None else known.width_px,
            height_px=1024 if known is None else known.height_px,
            steps=UNKNOWN_STEPS if known is None else known.steps,
            guidance=1.0,
            sampler="euler",
            ignores=("negative_prompt", "guidance", "sampler"),
            backend=ID,
        )
    except ValidationError:
        log.info("a model of Ollama has a name that cannot be used here", extra={"model": name[:100]})
        return None


def _object(line: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise BadAnswer("a line is not JSON") from exc
    if not isinstance(found, dict):
        raise BadAnswer("a line is not a JSON object")
    return found


def _step(told: Mapping[str, object], drawing: Drawing) -> int | None:
    """Its step as one of ours, should it take another number of them; None where it does not say."""
    completed, total = told.get("completed"), told.get("total")
    if not isinstance(completed, int) or not isinstance(total, int) or total < 1:
        return None
    return min(drawing.steps, completed * drawing.steps // total)


def _decoded(image: object, drawing: Drawing) -> Picture:
    if not isinstance(image, str) or not image:
        raise BackendFailed("Ollama answered without a picture", hint="is this model one that draws?")
    try:
        return as_asked(base64.b64decode(image, validate=True), drawing)
    except (binascii.Error, BrokenPicture) as exc:
        raise BackendFailed("Ollama sent what is no picture") from exc


def _seconds(nanoseconds: object) -> float:
    return nanoseconds / 1e9 if isinstance(nanoseconds, int) and nanoseconds >= 0 else 0.0
