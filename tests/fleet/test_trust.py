"""What a router remembers of its fleet, and that nothing gets in past it."""

from __future__ import annotations

import datetime as dt
import json
import stat
from pathlib import Path

import pytest

from sdfleet.errors import Conflict, InvalidValue, JoinRefused, RateLimited, StorageError, UnknownName
from sdfleet.fleet.broker import authorization
from sdfleet.fleet.certificates import certificates_in
from sdfleet.fleet.identity import Identity, identity_file
from sdfleet.fleet.join_code import parse
from sdfleet.fleet.keys import NKey, is_public_key
from sdfleet.fleet.state import Limits
from sdfleet.fleet.trust import ASK_BURST, CLAIM_S, CODE_S, MAX_PENDING, PENDING_S, Roster
from tests.fleet.trusted import Clock

PLACE = ("10.0.0.2:4222",)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, clock: Clock) -> Roster:
    return Roster.open(tmp_path / "fleet", clock=clock)


def _enrolled(roster: Roster, wish: str = "mac", *, key: NKey | None = None) -> str:
    code = roster.make_code(PLACE)
    (made,) = roster.enrol_by_code(code.id, ((key or NKey.new()).public,), wish)
    return made.node


def _asks(roster: Roster, clock: Clock, wish: str, code: str) -> str:
    clock.now_s += 60  # the rate of asking is another test's
    key = NKey.new().public
    roster.add_pending((key,), wish, "commitment")
    roster.show_code(key, code)
    return key


def test_what_was_decided_outlives_a_restart(roster: Roster, tmp_path: Path, clock: Clock) -> None:
    node = _enrolled(roster)
    roster.drain(node)
    roster.pin(node, "sd15")
    limits = Limits(max_megapixels=1.5, max_steps=50, max_pictures=4, only=frozenset({"sd15", "sdxl"}))
    roster.limit(node, limits=limits, max_pictures=2)
    roster.note_epoch(7)
    again = Roster.open(tmp_path / "fleet", clock=clock)
    assert again.settled() == roster.settled()
    (settled,) = again.settled()
    assert (settled.is_draining, settled.pinned, settled.limits) == (True, frozenset({"sd15"}), limits)
    assert settled.max_pictures == 2
    assert again.users() == roster.users()
    assert (again.epoch, again.lease_secret, again.fingerprint) == (7, roster.lease_secret, roster.fingerprint)


def test_an_open_code_outlives_a_restart(roster: Roster, tmp_path: Path, clock: Clock) -> None:
    code = roster.make_code(PLACE)
    assert Roster.open(tmp_path / "fleet", clock=clock).open_code(code.id) is not None


def test_only_this_user_can_read_the_keys(roster: Roster, tmp_path: Path) -> None:
    folder = tmp_path / "fleet"
    _enrolled(roster)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(("authority.pem", "authority.key", "broker.pem", "broker.key", "roster.json"), 0o600)


def test_no_secret_is_shown_by_a_repr(roster: Roster) -> None:
    code = roster.make_code(PLACE)
    (node,) = roster.enrol_by_code(code.id, (NKey.new().public,), "mac")
    shown = repr((code, node, roster.open_code(code.id), node.settled, roster.credentials()))
    assert node.secret not in shown
    assert code.secret.hex() not in shown
    assert code.proof.hex() not in shown
    assert str(roster.credentials().seed) not in shown


def test_a_broken_roster_is_not_overwritten(tmp_path: Path) -> None:
    Roster.open(tmp_path / "fleet")
    path = tmp_path / "fleet" / "roster.json"
    path.write_text('{"version": 99}')
    with pytest.raises(StorageError, match="backup"):
        Roster.open(tmp_path / "fleet")
    assert json.loads(path.read_text()) == {"version": 99}


def test_a_name_is_given_once(roster: Roster) -> None:
    assert [_enrolled(roster, "Mac Studio.local") for _ in range(3)] == ["mac-studio", "mac-studio-2", "mac-studio-3"]


def test_a_known_key_keeps_its_name_and_what_was_decided_about_it(roster: Roster) -> None:
    key = NKey.new()
    node = _enrolled(roster, "mac", key=key)
    roster.drain(node)
    before = roster.settled()
    assert _enrolled(roster, "another name", key=key) == node
    assert roster.settled() == before


def test_a_code_is_good_once(roster: Roster, clock: Clock) -> None:
    code = roster.make_code(PLACE)
    first = (NKey.new().public,)
    made = roster.enrol_by_code(code.id, first, "mac")
    assert roster.enrol_by_code(code.id, first, "mac") == made, "the answer was lost, and is asked for again"
    with pytest.raises(JoinRefused, match="another machine"):
        roster.enrol_by_code(code.id, (NKey.new().public,), "thief")
    clock.now_s += CLAIM_S
    with pytest.raises(JoinRefused, match="run out or was used"):
        roster.enrol_by_code(code.id, first, "mac")
    assert code.key.public not in authorization(roster.users())


def test_a_code_runs_out(roster: Roster, clock: Clock) -> None:
    code = roster.make_code(PLACE)
    assert code.key.public in authorization(roster.users())
    assert roster.next_change_s() == CODE_S
    clock.now_s += CODE_S
    assert code.key.public not in authorization(roster.users())
    with pytest.raises(JoinRefused, match="run out"):
        roster.enrol_by_code(code.id, (NKey.new().public,), "mac")


def test_a_revoked_node_leaves_neither_key_nor_secret(roster: Roster, tmp_path: Path) -> None:
    _enrolled(roster, "mac")
    gone = roster.find("mac")
    roster.revoke("mac")
    assert roster.settled() == ()
    assert gone.key not in authorization(roster.users())
    assert gone.secret not in (tmp_path / "fleet" / "roster.json").read_text()
    with pytest.raises(UnknownName):
        roster.revoke("mac")


def test_machines_that_ask_are_few_and_slow(roster: Roster, clock: Clock) -> None:
    for n in range(ASK_BURST):
        roster.add_pending((NKey.new().public,), f"m{n}", "c")
    with pytest.raises(RateLimited):
        roster.add_pending((NKey.new().public,), "flood", "c")
    for n in range(MAX_PENDING - ASK_BURST):
        clock.now_s += 5.0
        roster.add_pending((NKey.new().public,), f"n{n}", "c")
    clock.now_s += 5.0
    with pytest.raises(RateLimited, match="as many machines"):
        roster.add_pending((NKey.new().public,), "one too many", "c")
    clock.now_s += PENDING_S
    assert roster.pending() == ()
    roster.add_pending((NKey.new().public,), "later", "c")


def test_who_asks_is_approved_by_its_code_or_its_name(roster: Roster, clock: Clock) -> None:
    first, second = _asks(roster, clock, "Mac", "ABCD-EFGH"), _asks(roster, clock, "mac", "JKLM-NPQR")
    assert [each.nodes for each in roster.pending()] == [("mac",), ("mac-2",)]
    with pytest.raises(UnknownName):
        roster.approve("ZZZZ-ZZZZ")
    assert [each.key for each in roster.approve("jklmnpqr")] == [second]
    assert [each.key for each in roster.approve("mac")] == [first]
    assert roster.pending() == ()


def test_who_was_turned_away_is_unknown(roster: Roster, clock: Clock) -> None:
    key = _asks(roster, clock, "mac", "ABCD-EFGH")
    roster.deny("ABCD-EFGH")
    assert key not in authorization(roster.users())
    with pytest.raises(UnknownName):
        roster.approve("ABCD-EFGH")


def test_a_machine_that_has_shown_no_code_cannot_be_approved(roster: Roster) -> None:
    roster.add_pending((NKey.new().public,), "mac", "c")
    with pytest.raises(UnknownName):
        roster.approve("")


def test_a_name_taken_meanwhile_is_not_given_twice(roster: Roster, clock: Clock) -> None:
    _asks(roster, clock, "mac", "ABCD-EFGH")
    code = roster.make_code(PLACE)
    (made,) = roster.enrol_by_code(code.id, (NKey.new().public,), "mac")
    assert made.node == "mac-2"
    assert roster.approve("ABCD-EFGH")[0].node == "mac"


def test_a_machine_cannot_ask_with_a_key_of_the_fleet(roster: Roster) -> None:
    _enrolled(roster)
    with pytest.raises(JoinRefused, match="belongs to the fleet"):
        roster.add_pending((roster.find("mac").key,), "mac", "c")


def test_permissions_are_exactly_a_node_s_own(roster: Roster) -> None:
    _enrolled(roster, "mac")
    user = next(user for user in roster.users() if user.nkey == roster.find("mac").key)
    assert (user.publish, user.subscribe) == (("fleet.up.mac.>",), ("fleet.n.mac.>", "_INBOX_mac.>"))
    router = roster.users()[0]
    assert (router.publish, router.subscribe, router.denied) == (None, None, ("$SYS.>",))


def test_without_guests_nobody_without_a_code_may_connect(tmp_path: Path) -> None:
    open_to_all = Roster.open(tmp_path / "a").users()
    assert len(Roster.open(tmp_path / "b", takes_guests=False).users()) == len(open_to_all) - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[:20] + ("a" if text[20] != "a" else "b") + text[21:],
        lambda text: text.replace("sdf1-", "sdf9-"),
        lambda _: "sdf1-",
        lambda _: "",
        lambda text: text + "a" * 1000,
        lambda _: "sdf1-ﬀ",
    ],
)
def test_a_damaged_code_is_told_from_a_refused_one(roster: Roster, damage: object) -> None:
    text = roster.make_code(PLACE).text()
    assert parse(f"  {text[:40]}\n{text[40:].upper()} ").places == PLACE
    assert callable(damage)
    with pytest.raises(InvalidValue, match="sdfleet fleet code"):
        parse(damage(text))


def test_a_code_for_no_place_is_not_made(roster: Roster) -> None:
    for places in ((), ("here",), ("a:1 b:2",)):
        with pytest.raises(InvalidValue):
            roster.make_code(places)


def test_the_broker_s_certificate_is_renewed_and_the_authority_stays(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    first = certificates_in(tmp_path, now=now)
    assert certificates_in(tmp_path, now=now + dt.timedelta(days=365)) == first
    later = certificates_in(tmp_path, now=now + dt.timedelta(days=3 * 365 - 30))
    assert later.authority == first.authority
    assert later.fingerprint != first.fingerprint


def test_an_identity_is_kept_for_this_user_alone(tmp_path: Path, roster: Roster) -> None:
    path = identity_file(tmp_path, device="0")
    assert Identity.load(path) is None
    identity = Identity(node="mac", seed=NKey.new().seed, secret="ab" * 32, places=PLACE, authority=roster.authority)
    identity.save(path)
    assert Identity.load(path) == identity
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity.seed not in repr(identity)
    assert identity.secret not in repr(identity)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "sdfleet node", "version": 1, "node": "*"}', "\x00"])
def test_a_broken_identity_says_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.json"
    path.write_text(text)
    with pytest.raises(StorageError, match="join again"):
        Identity.load(path)


def test_a_key_is_spelled_as_the_broker_s_own_tools_do() -> None:
    nkeys = pytest.importorskip("nkeys")
    key = NKey(bytes(range(32)))
    theirs = nkeys.from_seed(bytearray(key.seed.encode()))
    assert theirs.public_key.decode() == key.public
    assert is_public_key(key.public)
    assert NKey.from_seed(key.seed).public == key.public
    with pytest.raises(InvalidValue):
        NKey.from_seed(key.seed[:-1] + "A")


def test_a_conflict_is_an_error_a_caller_can_act_on(roster: Roster, clock: Clock) -> None:
    """The name was promised to a machine that asks, and a node got it by a restart of the router in between."""
    key = _asks(roster, clock, "mac", "ABCD-EFGH")
    promised = roster.pending()[0]
    roster._pending.clear()
    _enrolled(roster, "mac")
    roster._pending[key] = promised
    with pytest.raises(Conflict, match="ask again"):
        roster.approve("ABCD-EFGH")
