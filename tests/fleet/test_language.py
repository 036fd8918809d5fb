"""Text through a router: every byte once and in order, one node at a time, nothing held for those who do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdfleet.errors import Busy, ModelNotFound, NotReady, SdfleetError, UpstreamFailed, UpstreamRefused
from sdfleet.fleet.language import FleetLanguage
from sdfleet.fleet.language_messages import PIECE_BYTES, SILENT_S, WINDOW_BYTES, UnknownDoor, pack_ask, unpack_ask
from sdfleet.fleet.packing import BrokenMessage
from sdfleet.language.asking import Answer, Ask, LanguageModel, Sound
from tests.fleet.fleets import FleetInTest, NodeInTest, RouterInTest, fleet_of
from tests.fleet.virtual_time import run

CHAT = Ask(door="/api/chat", model="m", body={"messages": [], "stream": True})
WHOLE = Ask(door="/v1/embeddings", model="m", body={"input": "x"})
# A step of a script: a piece, a pause in seconds, or how it ends.
Step = bytes | float | SdfleetError


@dataclass(eq=False)
class Scripted:
    """An engine that says what is written. asked: what it was asked; n_said: pieces that were taken from it."""

    script: Sequence[Step] = (b'"a"', b'"b"')
    name: str = "m"
    is_warm: bool = True
    slots: int = 1
    n_bytes: int = 0
    repeats: bool = False
    asked: list[Ask] = field(default_factory=list)
    n_said: int = 0
    n_stopped: int = 0

    async def models(self) -> tuple[LanguageModel, ...]:
        model = LanguageModel(
            name=self.name, engine="openai", capabilities=("completion",), is_warm=self.is_warm, slots=self.slots,
            n_bytes=self.n_bytes,
        )  # fmt: skip
        return (model,)

    async def answer(self, model: LanguageModel, ask: Ask) -> AsyncGenerator[bytes]:
        self.asked.append(ask)
        try:
            while True:
                for step in self.script:
                    match step:
                        case bytes():
                            self.n_said += 1
                            yield step
                        case SdfleetError():
                            raise step
                        case seconds:
                            await asyncio.sleep(seconds)
                if not self.repeats:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.n_stopped += 1
            raise

    async def close(self) -> None:
        return None


@dataclass(eq=False)
class Stage:
    """A router and its nodes."""

    fleet: FleetInTest
    router: RouterInTest
    language: FleetLanguage

    def node(self, name: str) -> NodeInTest:
        return self.fleet.nodes[name]


@asynccontextmanager
async def stage_of(folder: Path, **engines: Scripted) -> AsyncIterator[Stage]:
    async with fleet_of(folder) as fleet, fleet.router() as router:
        for name, engine in engines.items():
            await fleet.node(name, engines=(engine,))
        router.fleet.admit(fleet.settled.values())
        language = FleetLanguage(router.fleet, router.fleet._transport.bus)
        await language.open()
        await asyncio.sleep(5.0)  # of the loop's own clock: every node has said who it is and how it stands
        yield Stage(fleet=fleet, router=router, language=language)


async def said(answer: Answer) -> list[bytes]:
    return [piece async for piece in answer.pieces]


def test_pieces_arrive_once_in_order_and_whole_whatever_their_size(tmp_path: Path) -> None:
    pieces = [json.dumps({"i": i, "text": "é" * (i * PIECE_BYTES // 7)}).encode() for i in range(20)]

    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted(pieces)) as stage, stage.language.ask(CHAT) as answer:
            assert (answer.node, answer.n_retries) == ("n1", 0)
            assert await said(answer) == pieces

    run(main())


def test_an_answer_that_does_not_stream_arrives_byte_by_byte(tmp_path: Path) -> None:
    body = b'{"text":\n "' + b"x" * (3 * WINDOW_BYTES) + b'"}\n'

    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted([body])) as stage, stage.language.ask(WHOLE) as answer:
            assert b"".join(await said(answer)) == body

    run(main())


def test_a_long_request_reaches_the_node_whole(tmp_path: Path) -> None:
    sound = Sound(name="a.wav", kind="audio/wav", data=bytes(range(256)) * 8192)
    ask = Ask(door="/v1/audio/transcriptions", model="m", body={"language": "en"}, sound=sound)
    engine = Scripted([b"{}"])

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage, stage.language.ask(ask) as answer:
            await said(answer)

    run(main())
    assert engine.asked == [ask]


def test_a_reader_who_stops_reading_stops_the_engine_within_two_windows(tmp_path: Path) -> None:
    piece = b"x" * 4096
    engine = Scripted([piece, 0.001], repeats=True)

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage, stage.language.ask(CHAT) as answer:
            await anext(answer.pieces)
            await asyncio.sleep(20)
            stopped_at = engine.n_said
            await asyncio.sleep(20)
            assert engine.n_said == stopped_at
            assert stopped_at * len(piece) < 2.2 * WINDOW_BYTES
            for _ in range(400):  # it goes on where it stood
                assert await anext(answer.pieces) == piece
            assert engine.n_said > stopped_at

    run(main())


def test_leaving_stops_the_engine(tmp_path: Path) -> None:
    engine = Scripted([b'"a"', 1.0], repeats=True)

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage:
            async with stage.language.ask(CHAT) as answer:
                await anext(answer.pieces)
            await asyncio.sleep(0.5)
            assert engine.n_stopped == 1

    run(main())


def test_a_caller_who_leaves_before_the_first_token_stops_the_engine(tmp_path: Path) -> None:
    engine = Scripted([600.0])

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage:
            with suppress(TimeoutError):
                async with asyncio.timeout(60), stage.language.ask(CHAT):
                    pass
            await asyncio.sleep(0.5)
            assert engine.n_stopped == 1

    run(main())


def test_nothing_limits_how_long_the_first_token_takes(tmp_path: Path) -> None:
    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted([300.0, b"1"])) as stage, stage.language.ask(CHAT) as answer:
            assert await said(answer) == [b"1"]

    run(main())


@pytest.mark.parametrize(
    "fault", [UpstreamFailed("x"), NotReady("x"), ModelNotFound("x")], ids=lambda fault: fault.code
)
def test_before_the_first_token_another_node_takes_over(tmp_path: Path, fault: SdfleetError) -> None:
    async def main() -> None:
        engines = {"n1": Scripted([0.5, fault]), "n2": Scripted()}
        async with stage_of(tmp_path, **engines) as stage, stage.language.ask(CHAT) as answer:
            assert (answer.node, answer.n_retries) == ("n2", 1)
            assert await said(answer) == [b'"a"', b'"b"']

    run(main())


@pytest.mark.parametrize("how", ["at once", "while it computes"])
def test_a_node_that_is_silent_before_the_first_token_is_replaced_within_seconds(tmp_path: Path, how: str) -> None:
    first = Scripted([60.0, b'"late"'])

    async def main() -> None:
        async with stage_of(tmp_path, n1=first, n2=Scripted()) as stage:
            loop = asyncio.get_running_loop()
            if how == "at once":
                stage.node("n1").cut()
            else:
                loop.call_later(3.0, stage.node("n1").cut)
            began_s = loop.time()
            async with stage.language.ask(CHAT) as answer:
                assert (answer.node, answer.n_retries) == ("n2", 1)
                assert loop.time() - began_s < 3.0 + SILENT_S + 1.0
            # Back again, it says that it still works on it, and is told that nobody waits.
            stage.node("n1").cut(is_cut=False)
            await asyncio.sleep(3.0)
            assert first.n_stopped == len(first.asked)

    run(main())


def test_a_node_that_is_too_old_for_a_request_says_so_and_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_old = 1

    def unpack(_data: bytes) -> Ask:
        nonlocal n_old
        n_old -= 1
        if n_old >= 0:
            raise UnknownDoor("a request for '/api/chat'")
        return CHAT

    monkeypatch.setattr("sdfleet.fleet.speaking.unpack_ask", unpack)

    async def main() -> None:
        nonlocal n_old
        async with stage_of(tmp_path, n1=Scripted(), n2=Scripted()) as stage:
            async with stage.language.ask(CHAT) as answer:
                assert answer.n_retries == 1
            n_old = 99
            with pytest.raises(
                NotReady, match=r"node n\d does not know a request for '/api/chat': its sdfleet is older"
            ):
                async with stage.language.ask(CHAT):
                    pass

    run(main())


def test_a_request_of_another_version_is_told_from_one_that_makes_no_sense() -> None:
    packed = pack_ask(CHAT)
    with pytest.raises(UnknownDoor, match="/api/song"):
        unpack_ask(packed.replace(b"/api/chat", b"/api/song"))
    with pytest.raises(BrokenMessage, match="wrong kind"):
        unpack_ask(packed.replace(b'"/api/chat"', b"[1,2,3,4,5]"))
    assert unpack_ask(packed) == CHAT


def test_what_a_model_refuses_is_refused_everywhere(tmp_path: Path) -> None:
    second = Scripted()

    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted([UpstreamRefused("no")]), n2=second) as stage:
            with pytest.raises(UpstreamRefused, match="no"):
                async with stage.language.ask(CHAT):
                    pass

    run(main())
    assert second.asked == []


@pytest.mark.parametrize("how", ["cut", "kill", "fault"])
def test_after_the_first_token_a_fault_ends_the_answer_and_nobody_takes_over(tmp_path: Path, how: str) -> None:
    script: list[Step] = [b'"a"', 1.0, UpstreamFailed("it broke off")] if how == "fault" else [b'"a"', 600.0]
    second = Scripted()

    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted(script), n2=second) as stage, stage.language.ask(CHAT) as answer:
            assert await anext(answer.pieces) == b'"a"'
            if how == "cut":
                stage.node("n1").cut()
            if how == "kill":
                await stage.node("n1").kill()
                await stage.node("n1").start()
            with pytest.raises(UpstreamFailed):
                await anext(answer.pieces)

    run(main())
    assert second.asked == []


def test_a_lost_part_is_an_error_and_not_a_gap(tmp_path: Path) -> None:
    async def main() -> None:
        script: list[Step] = [b'"a"', 0.1, b'"b"', 0.1, b'"c"', 0.1, b'"d"']
        async with stage_of(tmp_path, n1=Scripted(script)) as stage, stage.language.ask(CHAT) as answer:
            found = [await anext(answer.pieces)]
            control = stage.node("n1").control
            assert control is not None
            lost = iter([True])
            control.drops = lambda subject: ".tok." in subject and next(lost, False)
            with pytest.raises(UpstreamFailed, match="lost on its way"):
                found += await said(answer)
            assert found == [b'"a"']

    run(main())


def test_a_node_whose_router_was_killed_stops_its_engine(tmp_path: Path) -> None:
    engine = Scripted([b'"a"', 1.0], repeats=True)

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage, stage.language.ask(CHAT) as answer:
            await anext(answer.pieces)
            stage.router.fleet._transport.bus.is_cut = True  # type: ignore[attr-defined]
            await asyncio.sleep(30)
            assert engine.n_stopped == 1

    run(main())


def test_a_model_that_nobody_has_is_not_found_and_all_away_is_not_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted([Busy("full")])) as stage:
            await asyncio.sleep(20)  # every node has had the time to be heard
            nope = Ask(door="/api/chat", model="nope", body={})
            with pytest.raises(ModelNotFound, match=r"model\(s\) 'nope' not found on any node"):
                async with stage.language.ask(nope):
                    pass
            with pytest.raises(Busy, match="full"):
                async with stage.language.ask(CHAT):
                    pass

    run(main())


def test_answers_are_spread_over_the_nodes_and_warm_ones_come_first(tmp_path: Path) -> None:
    async def main() -> None:
        engines = {
            "cold": Scripted([60.0, b"1"], is_warm=False, n_bytes=2**34),
            "n1": Scripted([60.0, b"1"]),
            "n2": Scripted([60.0, b"1"]),
        }
        async with stage_of(tmp_path, **engines) as stage:
            nodes = []
            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    nodes.append(tasks.create_task(_node_of(stage)))
                    await asyncio.sleep(0.1)
            assert sorted(task.result() for task in nodes) == ["n1", "n1", "n2", "n2"]

    run(main())


async def _node_of(stage: Stage) -> str:
    async with stage.language.ask(CHAT) as answer:
        return answer.node


def test_a_draining_node_is_asked_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    async def main() -> None:
        async with stage_of(tmp_path, n1=Scripted(), n2=Scripted()) as stage:
            settled = stage.fleet.settled
            stage.router.fleet.admit([replace(settled["n1"], is_draining=True), settled["n2"]])
            assert {await _node_of(stage) for _ in range(4)} == {"n2"}

    run(main())


def test_memory_of_a_language_model_in_use_is_not_offered_to_pictures(tmp_path: Path) -> None:
    """The rule: free memory, as placement sees it, is without what such a model holds or is about to load."""
    engine = Scripted([60.0, b"1"], is_warm=False, n_bytes=2**30)

    async def main() -> None:
        async with stage_of(tmp_path, n1=engine) as stage:
            node = stage.node("n1")
            node.it.options = _sized(node)  # type: ignore[union-attr]
            before = await _free_bytes(stage)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_node_of(stage))
                await asyncio.sleep(5)
                during = await _free_bytes(stage)
            await asyncio.sleep(5)
            assert before - during == engine.n_bytes
            assert await _free_bytes(stage) == before

    run(main())


def _sized(node: NodeInTest) -> object:
    from dataclasses import replace

    assert node.it is not None
    return replace(node.it.options, memory_bytes=2**33)


async def _free_bytes(stage: Stage) -> int:
    await asyncio.sleep(5)
    member = stage.router.fleet.members.get("n1")
    assert member is not None
    assert member.heartbeat is not None
    return member.heartbeat.memory_free_bytes
