"""Ollama's image models, over a thin stand-in for its protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from sdfleet.backends.ollama_images import OllamaImages, check
from sdfleet.domain import ImageRequest, Progress
from sdfleet.errors import BackendFailed, BackendUnavailable, Busy, InvalidValue, JobCancelled, UnsupportedByModel
from tests.backends.drawings import GREY, WHITE, drawing
from tests.backends.ollama_server import TEXT_MODEL, OllamaServer
from tests.backends.stand_in import ENDLESS, serving

HERE = "elsewhere/ollama/z-image-turbo"


@pytest.fixture(scope="module")
def served() -> Iterator[OllamaServer]:
    with serving(OllamaServer()) as server:
        yield server


@pytest.fixture
def ollama(served: OllamaServer) -> OllamaServer:
    served.renew()
    return served


def tell(url: str, story: Callable[[OllamaImages], Awaitable[None]]) -> None:
    """Run one story; nothing may be left when the backend is closed. It looks anew whenever it is asked to."""

    async def told() -> None:
        backend = OllamaImages(url, look_every_s=0.0)
        try:
            async with asyncio.timeout(60):
                await backend.look()
                await story(backend)
        finally:
            await backend.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(told())


@pytest.mark.parametrize("tells_in_tags", [True, False])
def test_only_models_that_say_they_draw_are_known(ollama: OllamaServer, *, tells_in_tags: bool) -> None:
    ollama.tells_in_tags = tells_in_tags
    ollama.models |= {"x/flux2-klein:9b": ["image"], "hf.co/someone/Drawer.X:Q4": ["image"]}

    async def story(backend: OllamaImages) -> None:
        cards = {card.name: card for card in backend.cards()}
        assert list(cards) == ["z-image-turbo", "flux2-klein-9b", "drawer.x-q4"]
        assert not [card for card in cards.values() if card.answers_to(TEXT_MODEL)]
        assert cards["z-image-turbo"].answers_to("x/z-image-turbo")
        assert (cards["z-image-turbo"].steps, cards["z-image-turbo"].backend) == (8, "ollama")
        assert (backend.reason(), backend.capabilities().state) == ("", "ready")
        await backend.look()
        assert ollama.n_asked["show"] == (0 if tells_in_tags else 4), "each model is asked for once"

    tell(ollama.url, story)


def test_a_picture_is_drawn_with_progress_and_what_was_asked_for(ollama: OllamaServer) -> None:
    async def story(backend: OllamaImages) -> None:
        seen: list[Progress] = []
        asked = drawing(prompt="a fox", checkpoint=HERE, width_px=64, height_px=48, steps=5, seed=9, image=GREY)
        result = await backend.generate(asked, seen.append)
        assert [each.step for each in seen] == [1, 2, 3, 4, 5]
        assert (result.images[0].picture.width_px, result.images[0].seed) == (64, 9)
        assert result.device == "Ollama 0.32.5"
        assert result.timings_s["load"] == 0.002
        assert set(result.unsaid) == {"guidance", "sampler", "strength"}

    tell(ollama.url, story)
    (sent,) = ollama.drawn
    assert len(sent.pop("images")) == 1
    assert sent == {
        "model": "x/z-image-turbo:latest", "prompt": "a fox", "width": 64, "height": 48, "steps": 5,
        "options": {"seed": 9}, "stream": True,
    }  # fmt: skip


def test_a_text_model_is_never_asked_to_draw(ollama: OllamaServer) -> None:
    async def story(backend: OllamaImages) -> None:
        for name in ("llama3.2", "llama3.2:latest", "elsewhere/ollama/llama3.2"):
            with pytest.raises(BackendUnavailable, match="has no image model"):
                await backend.generate(drawing(checkpoint=name))

    tell(ollama.url, story)
    assert ollama.drawn == []


def test_an_ollama_that_draws_no_more_is_unavailable_until_another_version_answers(ollama: OllamaServer) -> None:
    ollama.version, ollama.draws = "0.33.0", False

    async def story(backend: OllamaImages) -> None:
        with pytest.raises(BackendUnavailable, match=r"Ollama 0\.33\.0 does not draw .* 0\.32\.5 was the last"):
            await backend.generate(drawing(checkpoint=HERE))
        await backend.look()
        assert backend.reason().startswith("Ollama 0.33.0 does not draw (image generation is not supported)")
        assert backend.capabilities().state == "unavailable"
        ollama.version, ollama.draws = "0.32.4", True
        await backend.look()
        assert backend.reason() == ""
        assert (await backend.generate(drawing(checkpoint=HERE))).images

    tell(ollama.url, story)


def test_an_ollama_without_image_models_and_one_that_is_away_say_so(ollama: OllamaServer) -> None:
    ollama.models = {TEXT_MODEL: ["completion"]}

    async def without(backend: OllamaImages) -> None:
        assert "has no image model" in backend.reason()
        assert backend.cards() == ()

    async def away(backend: OllamaImages) -> None:
        assert backend.reason().startswith("no Ollama answers at http://127.0.0.1:1")

    tell(ollama.url, without)
    tell("http://127.0.0.1:1", away)


def test_a_server_of_ours_is_not_taken_for_an_ollama(ollama: OllamaServer) -> None:
    ollama.root = "sdfleet 1.2.3 is running; see /openapi.json"

    async def story(backend: OllamaImages) -> None:
        assert "is a sdfleet server" in backend.reason()
        assert backend.cards() == ()

    tell(ollama.url, story)
    assert ollama.n_asked["tags"] == 0


def test_cancelling_hangs_up(ollama: OllamaServer) -> None:
    async def story(backend: OllamaImages) -> None:
        asked = drawing(prompt=ENDLESS, checkpoint=HERE)
        begun = asyncio.Event()
        job = asyncio.create_task(backend.generate(asked, lambda _: begun.set()))
        await asyncio.to_thread(ollama.wait_until, lambda: bool(ollama.drawn))
        await backend.cancel(asked.job_id)
        with pytest.raises(JobCancelled):
            await job
        await asyncio.to_thread(ollama.wait_until, lambda: ollama.n_hung_up == 1)

    tell(ollama.url, story)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (500, BackendFailed, r"met a fault \(500\): scripted 500"),
        (404, BackendFailed, "does not have the model any more"),
        (503, Busy, "too much to do"),
        ("lost", BackendFailed, "did not finish the picture"),
        ("error", BackendFailed, "the runner was killed"),
        ("words", BackendFailed, "without a picture"),
    ],
)
def test_faults_are_told_and_the_next_picture_is_drawn(
    ollama: OllamaServer, fault: int | str, kind: type[Exception], text: str
) -> None:
    ollama.faults.append(fault)

    async def story(backend: OllamaImages) -> None:
        with pytest.raises(kind, match=text):
            await backend.generate(drawing(checkpoint=HERE))
        assert (await backend.generate(drawing(checkpoint=HERE))).images

    tell(ollama.url, story)


def test_what_ollama_cannot_do_is_refused_or_told(ollama: OllamaServer) -> None:
    async def story(backend: OllamaImages) -> None:
        (card,) = backend.cards()
        with pytest.raises(UnsupportedByModel, match="takes no mask"):
            check(card, ImageRequest(prompt="x", image=GREY, mask=WHITE))
        with pytest.raises(InvalidValue, match="seed"):
            check(card, ImageRequest(prompt="x", seed=2**63))
        assert check(card, ImageRequest(prompt="x", image=GREY, strength=0.5, t5="skip")) == (
            "strength has no effect on z-image-turbo at Ollama",
            "t5 has no effect on z-image-turbo at Ollama",
        )

    tell(ollama.url, story)


def test_it_is_not_asked_again_for_a_while(ollama: OllamaServer) -> None:
    async def told() -> None:
        backend = OllamaImages(ollama.url)
        for _ in range(5):
            await backend.look()
        await backend.close()

    asyncio.run(told())
    assert ollama.n_asked["tags"] == 1
