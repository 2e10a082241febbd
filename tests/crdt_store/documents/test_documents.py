"""Documents: any order of slots gives one document, whatever a bad author writes."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycrdt import Doc, Map

from crdt_store.clock import stamp
from crdt_store.documents.part import (
    CHANGE,
    MAX_ITEMS,
    MAX_UPDATES,
    Change,
    build_part,
    client_id_of,
    seq_of,
)
from crdt_store.documents.update_header import clients_of_untrusted
from crdt_store.documents.writing import next_slots
from crdt_store.entry import MAX_VALUE_BYTES
from crdt_store.grants import Revocation
from fabric.core.errors import ConfigError, RemoteProtocolError, ResourceExhausted
from fabric.core.ids import public_key_of

DAYS = 7 * 86400
keys = st.sampled_from(["note/1", "note/2", "tag/good", "set/lr", "x"])
edits = st.dictionaries(keys, st.text(max_size=30) | st.none(), min_size=1, max_size=3)


class Author:
    """An honest author: writes from what it holds, as the service does."""

    def __init__(self, world, signer, doc="board"):
        self.world, self.signer, self.doc = world, signer, doc
        self.slots = {}
        self.seconds = world.now
        self.log = []

    def part(self):
        return build_part(self.signer.public_key, self.slots.values())

    def edit(self, changes, *, renew=False):
        self.seconds += 0.5
        values = next_slots(
            self.part(),
            self.signer.public_key,
            changes,
            int(self.seconds * 1000),
            renew=renew,
        )
        return [self.write(seq, value) for seq, value in values]

    def write(self, seq, value):
        self.seconds += 0.01
        key = f"d/{self.doc}/{self.signer.peer_id}/{seq}"
        entry = self.world.entry(self.signer, key, value, at=self.seconds, ttl=DAYS)
        self.slots[seq] = entry
        self.log.append(entry)
        return entry


def read(replica, doc="board"):
    """What :class:`Documents` reads, without its cache."""
    by_author = defaultdict(list)
    for entry in replica.slots.under(f"d/{doc}/"):
        by_author[entry.author].append(entry)
    return {
        (item.key, item.author): (item.text, item.at)
        for author, entries in by_author.items()
        for item in build_part(author, entries).items.values()
    }


def foreign_update(client, text):
    doc = Doc(client_id=client)
    found = []
    watching = doc.observe(lambda event: found.append(event.update))
    doc.get("items", type=Map)["note/1"] = text
    doc.unobserve(watching)
    return found[0]


@st.composite
def attacks(draw, victim, own):
    """An update no honest author writes."""
    kind = draw(st.sampled_from(["junk", "foreign", "delete", "value", "epoch"]))
    if kind == "junk":
        return draw(st.binary(max_size=80))
    if kind == "foreign":
        return CHANGE.encode(Change(0, 0, foreign_update(victim, "9999:stolen")))
    if kind == "delete":  # everything of the victim's, by its client id
        doc = Doc(client_id=victim)
        root = doc.get("items", type=Map)
        root["note/1"] = "1:x"
        found = []
        watching = doc.observe(lambda event: found.append(event.update))
        del root["note/1"]
        doc.unobserve(watching)
        return CHANGE.encode(Change(0, 0, found[0]))
    if kind == "value":
        return CHANGE.encode(Change(0, 0, foreign_update(own, "no stamp")))
    return CHANGE.encode(
        Change(draw(st.integers(0, 5)), draw(st.integers(0, 9)), b"\x00\x00")
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_replicas_converge_under_faults_and_a_bad_author(make_world, data):
    world = make_world()
    one, two = (Author(world, world.workers[n]) for n in (0, 1))
    bad = Author(world, world.workers[2])
    victim, own = (client_id_of(a.signer.public_key) for a in (one, bad))
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["one", "two", "bad"])):
            case "one":
                one.edit(data.draw(edits), renew=data.draw(st.booleans()))
            case "two":
                two.edit(data.draw(edits))
            case "bad":
                seq = data.draw(st.integers(0, 2 * MAX_UPDATES + 3))
                value = data.draw(attacks(victim, own))
                entry = bad.write(seq, value)
                if data.draw(st.booleans()):  # two histories for one slot and clock
                    bad.log.append(
                        world.entry(
                            bad.signer, entry.key, b"other", hlc=entry.hlc, ttl=DAYS
                        )
                    )
    entries = [*one.log, *two.log, *bad.log]
    replicas = [world.replica() for _ in range(3)]
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    later = world.now + 1000
    for replica in replicas:
        order = [e for e in entries if rng.random() < 0.7]
        order += rng.sample(entries, len(entries))  # what was lost, and again
        for entry in order:
            replica.ingest_untrusted(entry.raw, later)
    documents = [read(replica) for replica in replicas]
    assert documents[0] == documents[1] == documents[2]
    for author in (one, two):  # what honest authors wrote stands, whatever others do
        mine = {k: v for k, v in documents[0].items() if k[1] == author.signer.peer_id}
        assert mine == {
            (key, author.signer.peer_id): (item.text, item.at)
            for key, item in author.part().items.items()
        }
    cut = Revocation(cut=0, reason="bad")
    revocation = world.record(
        world.admin, f"0/rev/{bad.signer.peer_id}", cut, at=later - 1
    )
    for replica in replicas:
        replica.ingest_untrusted(revocation.raw, later)
        left = read(replica)
        assert left == {
            k: v for k, v in documents[0].items() if k[1] != bad.signer.peer_id
        }


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(edits, st.booleans()), max_size=12))
def test_a_part_is_what_its_author_wrote(make_world, history):
    world = make_world()
    author = Author(world, world.workers[0])
    expected = {}
    for changes, renew in history:
        author.edit(changes, renew=renew)
        for key, text in changes.items():
            if text is None:
                expected.pop(key, None)
            else:
                expected[key] = text
        part = author.part()
        assert {key: item.text for key, item in part.items.items()} == expected
        assert not part.refused
        assert all(item.at <= author.seconds * 1000 for item in part.items.values())


@pytest.mark.slow
def test_a_part_stays_bounded_over_many_epochs(world):
    author = Author(world, world.workers[0])
    for number in range(5 * MAX_UPDATES):
        author.edit({"tag/x": str(number), f"note/{number % 7}": "n" * 500})
    assert len(author.slots) <= 2 * MAX_UPDATES
    part = author.part()
    assert part.epoch >= 4
    assert part.items["tag/x"].text == str(5 * MAX_UPDATES - 1)
    assert len(part.items) == 8


def test_a_new_epoch_counts_only_when_its_base_is_whole(world):
    author = Author(world, world.workers[0])
    for number in range(40):
        author.edit({f"note/{number}": "n" * 1000})
    before = author.part()
    written = author.edit({"note/0": "changed"}, renew=True)
    assert len(written) > 3
    after = author.part()
    assert after.items["note/0"].text == "changed"
    for missing in written:
        rest = [entry for entry in author.slots.values() if entry is not missing]
        part = build_part(author.signer.public_key, rest)
        assert part.items == before.items
        assert part.refused["incomplete_epoch"] == 1
        # who goes on from here must not write over what is still read
        assert part.next_epoch % 2 != part.epoch % 2
        assert part.next_epoch > after.epoch


def test_a_time_is_not_later_than_the_slot_that_carries_it(world):
    author = Author(world, world.workers[0])
    values = next_slots(
        author.part(), author.signer.public_key, {"set/lr": "1"}, 10**14
    )
    entry = author.write(*values[0])
    item = author.part().items["set/lr"]
    assert item.at == int(entry.seconds * 1000)


def test_a_foreign_client_and_its_deletions_are_refused_and_counted(world):
    author, other = (Author(world, world.workers[n]) for n in (0, 1))
    author.edit({"note/1": "mine"})
    stolen = foreign_update(client_id_of(author.signer.public_key), "1:stolen")
    other.write(0, CHANGE.encode(Change(0, 0, stolen)))
    part = other.part()
    assert part.items == {}
    assert part.refused == {"foreign_client": 1}
    assert author.part().items["note/1"].text == "mine"


def test_limits_are_refused_with_a_next_step(world):
    author = Author(world, world.workers[0])
    with pytest.raises(ConfigError):
        author.edit({"k": "x" * 3000})
    with pytest.raises(ConfigError):
        author.edit({"k" * 201: "x"})
    for number in range(60):
        author.edit({f"note/{number}": "x" * 2000})
    with pytest.raises(ResourceExhausted) as full:
        author.edit({f"note/{number}": "x" * 2000 for number in range(60, 80)})
    assert full.value.next_step
    assert len(author.edit({"more": "y"}, renew=True)) <= 90


@given(st.binary(max_size=200))
def test_any_bytes_pass_the_header_door(data):
    try:
        clients = clients_of_untrusted(data)
    except RemoteProtocolError:
        return
    assert len(clients) <= 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_wire_fuzz_of_updates_is_only_counted(make_world, data):
    """Genuine updates with flipped, cut and inserted bytes, under any epoch."""
    world = make_world()
    author = Author(world, world.workers[0])
    author.edit({"note/1": "a", "tag/b": ""})
    author.edit({"note/1": None})
    update = bytearray(CHANGE.decode_untrusted(author.log[0].value).update)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(update) - 1)))
        update[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3)
        )
    epoch = data.draw(st.integers(0, 1))
    author.write(
        seq_of(epoch, data.draw(st.integers(0, 3))),
        CHANGE.encode(Change(epoch, data.draw(st.integers(0, 3)), bytes(update))),
    )
    part = author.part()
    assert len(part.items) <= MAX_ITEMS


def test_deep_and_huge_values_do_no_harm(world):
    author = Author(world, world.workers[0])
    client = client_id_of(author.signer.public_key)
    nested: object = "x"
    for _ in range(600):
        nested = [nested]
    doc = Doc(client_id=client)
    found = []
    watching = doc.observe(lambda event: found.append(event.update))
    doc.get("items", type=Map)["deep"] = nested
    doc.unobserve(watching)
    assert len(found[0]) < MAX_VALUE_BYTES
    author.write(0, CHANGE.encode(Change(0, 0, found[0])))
    part = author.part()
    assert part.items == {}
    assert part.refused == {"bad_value": 1}
    # a delete set of 2^60 structs
    update = b"\x00\x01" + b"\xff\xff\xff\xff\x0f" + b"\x01\x00" + b"\xff" * 8 + b"\x0f"
    author.write(1, CHANGE.encode(Change(0, 0, update)))
    author.part()


def test_the_author_of_a_key_is_that_of_its_signature(world):
    author = Author(world, world.workers[0])
    author.edit({"note/1": "a"})
    item = author.part().items["note/1"]
    assert public_key_of(item.author) == author.signer.public_key
    assert stamp(item.at / 1000) <= author.log[0].hlc
