"""A rendezvous point keeps registrations within bounds and tells each of them once."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fabric.core.errors import RemoteProtocolError
from fabric.core.signing import Ed25519Signer
from nat.discovery.rendezvous import (
    BURST,
    MAX_TTL_SECONDS,
    PointLimits,
    RendezvousPoint,
)
from nat.discovery.rendezvous_messages import (
    Discover,
    Found,
    Register,
    Registered,
    Status,
    Unregister,
    decode_request_untrusted,
    decode_response_untrusted,
    encode_request,
    encode_response,
)
from nat.discovery.rendezvous_records import open_record_untrusted, seal_record

SIGNERS = [Ed25519Signer(bytes([i]) * 32) for i in range(1, 9)]
ONE, TWO = SIGNERS[:2]
ADDRS = ("/ip4/192.0.2.1/tcp/4801",)
SPACE = "fabric/abc"


def point(**limits):
    return RendezvousPoint(b"instance", PointLimits(**limits))


def register(made, signer, now=0.0, *, space=SPACE, ttl=0, seq=1, member=False):
    request = Register(space, seal_record(signer, ADDRS, seq), ttl)
    return made.receive(signer.peer_id, request, now, member=member)


def discover(made, cookie=b"", now=0.0, *, space=SPACE, limit=0, asker=TWO):
    found = made.receive(asker.peer_id, Discover(space, limit, cookie), now)
    names = [open_record_untrusted(r.record).peer for r in found.registrations]
    return found, names


def test_registered_peers_are_found_until_their_time_is_over():
    made = point()
    assert register(made, ONE, ttl=600) == Registered(Status.OK, "", 600)
    assert register(made, TWO).ttl_seconds == 7200
    found, names = discover(made, now=100.0)
    assert names == [ONE.peer_id, TWO.peer_id]
    assert found.registrations[0].ttl_seconds == 500
    assert discover(made, now=601.0)[1] == [TWO.peer_id]
    assert discover(made, now=7201.0)[1] == []


def test_a_cookie_asks_for_what_is_new():
    made = point()
    register(made, ONE)
    cookie = discover(made)[0].cookie
    assert discover(made, cookie)[1] == []
    register(made, TWO)
    found, names = discover(made, cookie)
    assert names == [TWO.peer_id]
    register(made, ONE, seq=2)
    assert discover(made, found.cookie)[1] == [ONE.peer_id]


def test_pages():
    made = point()
    for signer in SIGNERS:
        register(made, signer)
    seen, cookie = [], b""
    while page := (answer := discover(made, cookie, limit=3))[1]:
        seen += page
        cookie = answer[0].cookie
    assert seen == [signer.peer_id for signer in SIGNERS]


@pytest.mark.parametrize("cookie", [b"x", bytes(24), bytes(100)])
def test_a_cookie_of_another_point_space_or_time_is_refused(cookie):
    made, other = point(), RendezvousPoint(b"restartd", PointLimits())
    register(made, ONE)
    assert discover(made, cookie)[0].status is Status.E_INVALID_COOKIE
    good = discover(made)[0].cookie
    assert discover(made, good, space="else")[0].status is Status.E_INVALID_COOKIE
    assert discover(other, good)[0].status is Status.E_INVALID_COOKIE


def test_unregistering_twice_is_no_error():
    made = point()
    register(made, ONE)
    for _ in range(2):
        assert made.receive(ONE.peer_id, Unregister(SPACE), 0.0) is None
    assert discover(made)[1] == []


def test_a_peer_registers_only_itself_with_its_own_signature():
    made = point()
    stolen = Register(SPACE, seal_record(ONE, ADDRS, 1))
    assert made.receive(TWO.peer_id, stolen, 0.0).status is Status.E_NOT_AUTHORIZED
    forged = bytearray(seal_record(ONE, ADDRS, 1))
    forged[-1] ^= 1
    answer = made.receive(ONE.peer_id, Register(SPACE, bytes(forged)), 0.0)
    assert answer.status is Status.E_INVALID_SIGNED_PEER_RECORD
    assert made.refused["E_NOT_AUTHORIZED"] == 1
    assert len(made) == 0


def test_an_older_record_does_not_replace_a_newer():
    made = point()
    assert register(made, ONE, seq=5).status is Status.OK
    answer = register(made, ONE, seq=4)
    assert answer.status is Status.E_INVALID_SIGNED_PEER_RECORD
    assert register(made, ONE, seq=5).status is Status.OK


@pytest.mark.parametrize("space", ["", "x" * 256])
def test_namespaces_have_bounds_and_are_never_listed(space):
    made = point()
    register(made, ONE)
    assert register(made, ONE, space=space).status is Status.E_INVALID_NAMESPACE
    assert discover(made, space=space)[0].status is Status.E_INVALID_NAMESPACE


@pytest.mark.parametrize("ttl", [1, MAX_TTL_SECONDS + 1, 2**63])
def test_inadmissible_times(ttl):
    assert register(point(), ONE, ttl=ttl).status is Status.E_INVALID_TTL


def test_strangers_leave_room_for_members():
    made = point(registrations=4, strangers=2)
    answers = [register(made, signer).status for signer in SIGNERS[:3]]
    assert answers == [Status.OK, Status.OK, Status.E_UNAVAILABLE]
    answers = [register(made, s, member=True).status for s in SIGNERS[3:6]]
    assert answers == [Status.OK, Status.OK, Status.E_UNAVAILABLE]
    assert register(made, SIGNERS[0], seq=2).status is Status.OK  # it has its place
    # once their time is over there is room again
    assert register(made, SIGNERS[2], 7201.0).status is Status.OK


def test_one_peer_has_a_bound_of_its_own():
    made = point(per_peer=2)
    answers = [register(made, ONE, space=f"s{i}").status for i in range(3)]
    assert answers == [Status.OK, Status.OK, Status.E_UNAVAILABLE]
    assert register(made, ONE, 7201.0, space="s9").status is Status.OK


def test_a_peer_that_asks_too_often_waits():
    made = point()
    answers = [discover(made)[0].status for _ in range(BURST + 5)]
    assert answers.count(Status.E_UNAVAILABLE) == 5
    assert discover(made, asker=ONE)[0].status is Status.OK
    assert discover(made, now=2.0)[0].status is Status.OK


def test_many_identities_do_not_grow_the_budgets_without_bound():
    made = point(registrations=5)
    for i in range(20):
        signer = Ed25519Signer(bytes([100 + i]) * 32)
        register(made, signer, float(i))
        made.check_integrity()
    assert len(made._budgets) <= 5


class PointMachine(RuleBasedStateMachine):
    """Against the simple twin: a dictionary of who should be there until when."""

    def __init__(self):
        super().__init__()
        self.made = point(registrations=6, strangers=4, per_peer=2)
        self.now, self.seq = 0.0, 0
        self.twin = {}

    def alive(self):
        return {key for key, until in self.twin.items() if until > self.now}

    @rule(seconds=st.floats(0, 5000))
    def wait(self, seconds):
        self.now += seconds

    @rule(
        signer=st.sampled_from(SIGNERS),
        space=st.sampled_from(["a", "b", "c"]),
        ttl=st.integers(60, 9000),
        member=st.booleans(),
    )
    def register(self, signer, space, ttl, member):
        self.seq += 1
        answer = register(
            self.made,
            signer,
            self.now,
            space=space,
            ttl=ttl,
            seq=self.seq,
            member=member,
        )
        if answer.status is Status.OK:
            self.twin[space, signer.peer_id] = self.now + ttl
        else:
            alive = self.alive()
            own = sum(peer == signer.peer_id for _, peer in alive)
            slow = answer.text.startswith("too many")
            assert slow or own >= 2 or len(alive) >= 4

    @rule(signer=st.sampled_from(SIGNERS), space=st.sampled_from(["a", "b", "c"]))
    def unregister(self, signer, space):
        before = self.made.registered(space, self.now)
        self.made.receive(signer.peer_id, Unregister(space), self.now)
        after = self.made.registered(space, self.now)
        if before != after:
            del self.twin[space, signer.peer_id]

    @invariant()
    def agrees(self):
        self.made.check_integrity()
        found = {
            (space, s.record.peer)
            for space in "abc"
            for s in self.made.registered(space, self.now)
        }
        assert found == self.alive()


TestPoint = PointMachine.TestCase
TestPoint.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

names = st.text(max_size=40)
requests = st.one_of(
    st.builds(Register, names, st.binary(max_size=200), st.integers(0, 2**63)),
    st.builds(Unregister, names),
    st.builds(Discover, names, st.integers(0, 2**31), st.binary(max_size=60)),
)
responses = st.one_of(
    st.builds(
        Registered,
        st.sampled_from(Status),
        st.text("abc xyz", max_size=40),
        st.integers(0, 2**40),
    ),
    st.builds(
        Found,
        st.sampled_from(Status),
        st.text("abc xyz", max_size=40),
        st.lists(st.builds(Register, names, st.binary(max_size=50), st.just(7))).map(
            tuple
        ),
        st.binary(max_size=60),
    ),
)


@given(requests)
def test_requests_survive_the_wire(request):
    assert decode_request_untrusted(encode_request(request)) == request


@given(responses)
def test_responses_survive_the_wire(response):
    assert decode_response_untrusted(encode_response(response)) == response


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    for decode in (decode_request_untrusted, decode_response_untrusted):
        with contextlib.suppress(RemoteProtocolError):
            decode(data)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_any_record_is_answered(data, ttl):
    answer = point().receive(ONE.peer_id, Register(SPACE, data, ttl), 0.0)
    assert answer.status is not Status.OK
