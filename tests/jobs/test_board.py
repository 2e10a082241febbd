"""A job's board: whose word stands, what the schema refuses, when a setting holds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_store.documents.part import Item
from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId
from fabric.jobs.board import Override, edits_of, read_board
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec
from fabric.jobs.steering import STEERABLE, parse_setting, steer, value_at

SPEC = JobSpec()
ANN, BOB, EVE = map(PeerId, ("ann", "bob", "eve"))
LR = "train.learning_rate"


def board(*items):
    return read_board([Item(*i) for i in items], SPEC, lambda peer: peer != EVE)


def test_the_last_authorised_word_stands():
    found = board(
        (f"set/{LR}", "0.1", ANN, 10),
        (f"set/{LR}", "0.2", BOB, 20),
        (f"set/{LR}", "0.9", EVE, 30),
        ("set/train.grad_clip", "2", ANN, 5),
    )
    assert found.settings == (
        Setting("train.grad_clip", 2.0, ANN),
        Setting(LR, 0.2, BOB),
    )
    eve = next(o for o in found.overrides if o.item.author == EVE)
    assert eve.refused
    assert not eve.stands


def test_null_goes_back_to_the_spec():
    found = board((f"set/{LR}", "0.1", ANN, 10), (f"set/{LR}", "null", BOB, 20))
    assert found.settings == ()
    assert [o.stands for o in found.overrides] == [False, True]


def test_what_breaks_the_schema_is_shown_and_does_not_count():
    found = board(
        (f"set/{LR}", "0.1", ANN, 10),
        (f"set/{LR}", "7", BOB, 20),
        ("set/train.seed", "7", BOB, 20),
        ("set/train.outer.rounds", "null", BOB, 20),
    )
    assert found.settings == (Setting(LR, 0.1, ANN),)
    assert all(o.refused for o in found.overrides if o.item.author == BOB)


def test_notes_and_tags_are_in_order_and_keep_their_authors():
    found = board(
        ("note/2", "b", ANN, 2), ("note/1", "a", BOB, 1), ("tag/x", "", EVE, 3)
    )
    assert [(n.text, n.author) for n in found.notes] == [("a", BOB), ("b", ANN)]
    assert [t.key for t in found.tags] == ["tag/x"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"set/{p}" for p in STEERABLE] + ["set/x", "set/", "?"]),
            st.text(max_size=8)
            | st.sampled_from(["0.1", "1e-3", "null", "NaN", "[1]"]),
            st.sampled_from([ANN, BOB, EVE]),
            st.integers(0, 3),
        ),
        max_size=12,
    )
)
def test_any_document_gives_settings_that_keep_the_spec_valid(items):
    found = board(*items)
    steered = steer(SPEC, found.settings)
    for setting in found.settings:
        assert setting.author != EVE
        assert value_at(steered, setting.path) == setting.value
    assert all(isinstance(override, Override) for override in found.overrides)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (LR, "0"),
        (LR, "NaN"),
        (LR, "Infinity"),
        (LR, "true"),
        (LR, '"0.1"'),
        (LR, "fast"),
        ("train.outer.momentum", "1"),
        ("train.lr", "0.1"),
        ("train.batch_size", "4"),
    ],
)
def test_a_bad_setting_is_refused_with_a_reason(path, text):
    with pytest.raises(ConfigError) as refused:
        parse_setting(SPEC, path, text)
    assert path in refused.value.reason


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(ConfigError) as refused:
        parse_setting(SPEC, "train.learning_rat", "0.1")
    assert LR in refused.value.next_step


def test_a_coordinator_that_sends_nonsense_changes_nothing():
    bad = [
        Setting("train.seed", 1.0, ANN),
        Setting(LR, math.nan, ANN),
        Setting(LR, -1.0, ANN),
        Setting("train", 1.0, ANN),
    ]
    assert steer(SPEC, bad) == SPEC


def test_edits_name_what_they_write():
    edits = edits_of(
        SPEC,
        1000,
        notes=("a", "b"),
        tags=("good",),
        untags=("old",),
        sets=((LR, "0.1"),),
    )
    assert edits == {
        "note/1000": "a",
        "note/1001": "b",
        "tag/good": "",
        "tag/old": None,
        f"set/{LR}": "0.1",
    }
    with pytest.raises(ConfigError):
        edits_of(SPEC, 0, tags=("no tag/",))


def test_a_decision_carries_the_board_and_everybody_applies_it(make_net):
    net = make_net(4, rounds=6, min_peers=4, seed=3)
    for index in range(4):
        net.start(index)
    assert net.run(60, lambda: any(s.next_round >= 1 for s in net.seats.values()))
    wanted = (Setting("train.outer.learning_rate", 0.25, net.ids[2]),)
    for seat in net.seats.values():
        seat.set_settings(wanted)
    assert net.run(200, net.all_done)
    carried = [d.settings for _, d in sorted(net.decisions.items())]
    assert carried[0] == ()
    assert carried[-1] == wanted
    # in force from one round on, and not off again
    assert carried == sorted(carried, key=bool)
    events = [e for _, _, e in net.log if e.kind == "steered"]
    assert [(e.peer, e.facts["value"]) for e in events] == [(net.ids[2], 0.25)]
    assert net.diverged == 0


def test_a_newcomer_is_told_what_is_in_force(make_net):
    net = make_net(4, rounds=12, min_peers=2, seed=5)
    for index in range(3):
        net.start(index)
    wanted = (Setting(LR, 0.01, net.ids[0]),)
    for seat in net.seats.values():
        seat.set_settings(wanted)
    assert net.run(60, lambda: any(d.settings for d in net.decisions.values()))
    net.start(3)
    assert net.run(
        200, lambda: any(net.ids[3] in g.participants for g in net.commits.values())
    )
    newest = max(net.commits.values(), key=lambda g: g.counter)
    assert newest.settings == wanted
