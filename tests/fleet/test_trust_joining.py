"""Joining over a real broker, with a code and without, and everybody who should not get in by it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sdfleet.errors import JoinRefused, NotReady, StoreUnavailable
from sdfleet.fleet import asking
from sdfleet.fleet.asking import ask, join
from sdfleet.fleet.certificates import Certificates, certificates_in, trusting
from sdfleet.fleet.identity import Identity
from sdfleet.fleet.join_code import parse
from sdfleet.fleet.joining import PROOF, Ask, Join, Joined, commitment_of, proof_of
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.packing import pack, unpack
from sdfleet.fleet.rights import code_inbox, guest_key
from sdfleet.fleet.signing import sign
from sdfleet.fleet.transport import NoAnswer
from sdfleet.fleet.trust import CLAIM_S, CODE_S
from tests.fleet.brokers import free_port
from tests.fleet.trusted import play, trusted


async def _yes(_: str) -> bool:
    return True


def _not_shown(_: str) -> None:
    raise AssertionError("a machine that may not ask shows no code")


def test_a_node_joins_with_a_code_and_both_its_connections_work(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            identity = await world.joined("Mac Studio")
            assert identity.node == "mac-studio"
            assert identity.places == (world.place,)
            assert [each.secret for each in world.admitted] == [identity.secret_bytes]
            for _ in ("control", "bulk"):
                bus = await world.connect(identity)
                assert await world.reaches_router(bus, "fleet.up.mac-studio.hb", marker="fleet.up.mac-studio.ev.1")

    play(test())


def test_all_devices_of_a_machine_join_with_one_code(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            code = world.code()
            await world.joining.apply()
            keys = [NKey.new(), NKey.new()]
            made = await join(code, keys=keys, wish="box")
            assert [(each.node, each.seed) for each in made] == [("box", keys[0].seed), ("box-2", keys[1].seed)]
            for each in made:
                assert (await world.connect(each)).is_connected

    play(test())


def test_a_node_stays_connected_while_others_come_and_go(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            first = await world.connect(await world.joined("a"))
            told: list[bool] = []
            first.on_connection(told.append)
            await world.joined("b")
            world.roster.revoke("b")
            await world.joining.apply()
            await world.joined("c")
            await first.flush()
            assert told == []

    play(test())


def test_a_code_that_was_used_opens_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            code = world.code()
            await world.joining.apply()
            await join(code, keys=[NKey.new()], wish="a")
            with pytest.raises(JoinRefused, match="another machine"):
                await join(code, keys=[NKey.new()], wish="thief")
            world.clock.now_s += CLAIM_S
            await world.joining.apply()
            await _refused_by_broker(code)
            assert [each.node for each in world.admitted] == ["a"]

    play(test())
    assert "a join was refused" in caplog.messages


def test_a_code_that_has_run_out_opens_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            code = world.code()
            await world.joining.apply()
            world.clock.now_s += CODE_S
            await world.joining.apply()
            await _refused_by_broker(code)
            assert world.admitted == []

    play(test())


def test_a_code_cuts_off_who_is_connected_with_it_when_it_has_run_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            code = parse(world.code())
            await world.joining.apply()
            bus = await world.connect_with(code.key, inbox=code_inbox(code.id))
            world.clock.now_s += CODE_S
            await world.joining.apply()
            await world.until(lambda: not bus.is_connected)

    play(test())


async def _refused_by_broker(code: str) -> None:
    """The broker answers a moment after it was told: until then the router itself refuses."""
    async with asyncio.timeout(10):
        while True:
            try:
                await join(code, keys=[NKey.new()], wish="late")
            except JoinRefused as exc:
                assert "run out or was used" in str(exc)  # noqa: PT017 - which refusal it is, is the claim
                return
            except NotReady:
                continue


def test_a_replayed_join_gives_its_answer_to_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that was said at a join, said again by somebody who listened and has no part of the code."""

    async def test() -> None:
        async with trusted(tmp_path) as world:
            await world.joined("a")
            said = next(each for each in world.heard if each.subject.startswith("fleet.join."))
            thief = await world.connect_with(guest_key())
            assert not await world.reaches_router(thief, said.subject, marker="fleet.ask.x")
            # Where a broker would let it through: the answer goes to the code's inbox or nowhere.
            n_before = len(world.heard)
            await world.bus.publish(said.subject, said.data, headers=said.headers, reply="_INBOX_a.1")
            await world.until(lambda: len(world.heard) > n_before)
            await world.until(lambda: "somebody who joins asked to be answered elsewhere" in caplog.messages)

    play(test())


def test_a_join_needs_the_code_s_secret_and_the_keys_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            victim = await world.joined("victim")
            code = parse(world.code())
            await world.joining.apply()
            bus = await world.connect_with(code.key, inbox=code_inbox(code.id))
            subject = f"fleet.join.{code.id}"
            key = NKey.new()
            proof = base64.b64encode(key.sign(proof_of(subject, (key.public,), "x"))).decode()
            good = Join(keys=(key.public,), proofs=(proof,), wish="x")

            unsigned = pack(good)
            with pytest.raises(NoAnswer):
                await bus.request(subject, unsigned, headers={PROOF: "00"}, timeout_s=0.3)
            bad = {
                "is not its own": replace(good, keys=(victim.key.public,)),
                "those of one machine": replace(good, keys=(key.public, key.public), proofs=(proof, proof)),
                "not its own": replace(good, wish="y"),
                "can be printed": replace(good, wish="\x1b[2J"),
                "keys and": replace(good, keys=()),
            }
            for why, said in bad.items():
                payload = pack(said)
                headers = {PROOF: sign(code.proof, subject, payload)}
                answer = unpack(Joined, (await bus.request(subject, payload, headers=headers, timeout_s=3)).data)
                assert answer.granted == ()
                assert why in str(answer.error)
            assert [each.node for each in world.admitted] == ["victim"]

    play(test())
    assert "a join without the code's secret was refused" in caplog.messages


@asynccontextmanager
async def _between(place: str, certificates: Certificates) -> AsyncIterator[str]:
    """Somebody between a machine and its router, who speaks TLS with a certificate of their own; where they are."""
    host, _, port = place.rpartition(":")
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(certificates.certificate, certificates.key)
    client_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_tls.check_hostname, client_tls.verify_mode = False, ssl.CERT_NONE
    pumps: set[asyncio.Task[None]] = set()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port), ssl=client_tls)
        for task in (asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))):
            pumps.add(task)

    own_port = free_port()
    server = await asyncio.start_server(carry, "127.0.0.1", own_port, ssl=server_tls)
    try:
        yield f"127.0.0.1:{own_port}"
    finally:
        server.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _foreign(tmp_path: Path) -> Certificates:
    folder = tmp_path / "foreign"
    folder.mkdir()
    return certificates_in(folder)


def test_a_join_through_somebody_in_between_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world, _between(world.place, _foreign(tmp_path)) as false_place:
            code = world.code(places=[false_place])
            await world.joining.apply()
            with pytest.raises(JoinRefused, match="certificate is another"):
                await join(code, keys=[NKey.new()], wish="a")
            assert world.admitted == []
            # The code is as good as before: its secret was said to nobody.
            code = world.code(places=[false_place, world.place])
            await world.joining.apply()
            assert (await join(code, keys=[NKey.new()], wish="a"))[0].node == "a"

    play(test())
    assert "a broker with a foreign certificate was refused" in caplog.messages


def test_a_node_never_speaks_through_somebody_in_between(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world, _between(world.place, _foreign(tmp_path)) as false_place:
            identity = await world.joined("a")
            with pytest.raises(StoreUnavailable, match="certificate"):
                await world.connect(replace(identity, places=(false_place,)), within_s=1.0)

    play(test())


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    """A public authority's certificate would be of some name; ours are all of one."""

    async def test() -> None:
        async with trusted(tmp_path) as world:
            host, _, port = world.place.rpartition(":")
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection(
                    host, int(port), ssl=trusting(world.roster.authority), server_hostname="example.org"
                )

    play(test())


def test_a_machine_without_a_code_joins_once_both_sides_say_yes(tmp_path: Path) -> None:
    shown: list[str] = []

    async def test() -> None:
        async with trusted(tmp_path) as world:
            keys = [NKey.new(), NKey.new()]
            task = asyncio.create_task(ask(world.place, keys=keys, wish="Mac", show=shown.append, confirm=_yes))
            await world.until(lambda: bool(shown) and bool(world.joining._undecided))
            assert [each.code for each in world.roster.pending()] == shown
            assert world.admitted == []
            world.roster.approve(shown[0])
            made = await task
            assert [each.node for each in made] == ["mac", "mac-2"] == [each.node for each in world.admitted]
            bus = await world.connect(made[1])
            assert await world.reaches_router(bus, "fleet.up.mac-2.hb", marker="fleet.up.mac-2.ev.1")

    play(test())


def test_a_yes_that_was_lost_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "DECISION_S", 0.2)

    async def test() -> None:
        async with trusted(tmp_path) as world:

            def show(code: str) -> None:
                world.roster.approve(code)  # at once: before the machine could ask for the decision

            async with asyncio.timeout(20):
                made = await ask(world.place, keys=[NKey.new()], wish="mac", show=show, confirm=_yes)
            assert made[0].node == "mac"

    play(test())


def test_who_is_turned_away_or_sees_another_code_does_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "DECISION_S", 0.2)

    async def test() -> None:
        async with trusted(tmp_path) as world:
            with pytest.raises(JoinRefused, match="turned away"):
                await ask(world.place, keys=[NKey.new()], wish="a", show=world.roster.deny, confirm=_yes)

            async def no(_: str) -> bool:
                return False

            def approve(code: str) -> None:
                world.roster.approve(code)

            with pytest.raises(JoinRefused, match="another code"):
                await ask(world.place, keys=[NKey.new()], wish="b", show=approve, confirm=no)

    play(test())


def test_nobody_in_between_can_make_both_sides_show_one_code(tmp_path: Path) -> None:
    """The relay has another certificate, so what the machine shows is not what the router shows."""
    shown: list[str] = []

    async def test() -> None:
        async with trusted(tmp_path) as world, _between(world.place, _foreign(tmp_path)) as false_place:
            task = asyncio.create_task(ask(false_place, keys=[NKey.new()], wish="a", show=shown.append, confirm=_yes))
            await world.until(lambda: bool(shown))
            assert world.roster.pending()[0].code not in {"", *shown}
            task.cancel()
            await asyncio.wait({task})

    play(test())


def test_a_machine_that_changes_its_mind_gets_no_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who could choose its number after the router's could try until the codes agree."""

    async def test() -> None:
        async with trusted(tmp_path) as world:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(asking, "commitment_of", lambda nonce, keys: commitment_of(nonce + "0", keys))
                with pytest.raises(JoinRefused, match="committed"):
                    await ask(world.place, keys=[NKey.new()], wish="a", show=_not_shown, confirm=_yes)

    play(test())
    assert "a machine that asks to join has changed its mind" in caplog.messages


def test_nobody_asks_with_the_key_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            victim, thief = NKey.new(), NKey.new()
            subject = f"fleet.ask.{victim.public}"
            commitment = commitment_of("n", (victim.public,))
            proof = base64.b64encode(thief.sign(proof_of(subject, (victim.public,), "x", commitment))).decode()
            guest = await world.connect_with(guest_key())
            await guest.publish(
                subject, pack(Ask(keys=(victim.public,), proofs=(proof,), wish="x", commitment=commitment))
            )
            await world.until(lambda: "a machine that asks to join was refused" in caplog.messages)
            assert world.roster.pending() == ()

    play(test())


def test_a_router_that_takes_no_guests_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path, takes_guests=False) as world:
            with pytest.raises(JoinRefused, match="without a code"):
                await ask(world.place, keys=[NKey.new()], wish="a", show=_not_shown, confirm=_yes)

    play(test())


def test_nothing_answers_at_the_code_s_place(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            code = world.code(places=[f"127.0.0.1:{free_port()}"])
            with pytest.raises(StoreUnavailable, match="is the router running"):
                await join(code, keys=[NKey.new()], wish="a")

    play(test())


def test_a_revoked_node_is_cut_within_a_second_and_stays_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            identity = await world.joined("a")
            control, bulk = await world.connect(identity), await world.connect(identity)
            async with asyncio.timeout(1):
                world.roster.revoke("a")
                await world.joining.apply()
                await world.until(lambda: not control.is_connected and not bulk.is_connected)
            await world.until(lambda: control.was_refused)  # it tries again, and is told why
            assert world.admitted == []
            with pytest.raises(StoreUnavailable):
                await world.connect(identity, within_s=2.0)

    play(test())


def test_no_secret_and_no_code_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="sdfleet")
    kept: list[tuple[Identity, str]] = []

    async def test() -> None:
        async with trusted(tmp_path) as world:
            kept.append((await world.joined("a"), world.code()))

    play(test())
    text = "\n".join(str(vars(record)) for record in caplog.records)
    identity, code = kept[0]
    for secret in (identity.seed, identity.secret, code, parse(code).secret.hex(), parse(code).proof.hex()):
        assert secret not in text


def test_the_broker_s_files_are_for_this_user_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with trusted(tmp_path) as world:
            folder = world.folder / "broker"
            assert folder.stat().st_mode & 0o077 == 0
            assert (folder / "nats.conf").stat().st_mode & 0o077 == 0

    play(test())
