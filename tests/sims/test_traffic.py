"""The closed form of the exchange, on made-up outcomes to be counted by hand."""

import json
import struct

import msgspec

from fabric.app.control_messages import JobRow
from fabric.jobs.runner import LINK_FACT
from fabric.jobs.spec import JobSpec, OuterSpec, TrainSpec
from sims.demo.traffic import (
    expected_bytes,
    expected_state_bytes,
    measured_bytes,
    num_parameters,
)
from sims.demo.train_step import TrainOutcome

# ids of the length that short() leaves, so that they are their own short form
A, B, C, D = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"
ROUNDS = 10


def outcome(*members, participants=(), facts=None, contributors=()):
    """(first round, peers) per generation; the job's row names ``participants``."""
    row = JobRow(
        job="j",
        name="demo",
        kind="train",
        state="done",
        reason="",
        coordinator=A,
        generation=len(members),
        participants=tuple(participants),
        round=ROUNDS,
        rounds=ROUNDS,
        facts=facts or {},
    )
    made = [(at, frozenset(peers)) for at, peers in members]
    said = [(at, frozenset(peers)) for at, peers in contributors]
    return TrainOutcome(members=made, contributors=said, row=row)


def export(tmp_path, *shapes):
    header = {
        str(i): {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for i, shape in enumerate(shapes)
    }
    raw = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    return tmp_path


def test_parameters_are_counted_from_the_header(tmp_path):
    export(tmp_path, [10, 20], [7], [])
    assert num_parameters(tmp_path / "model.safetensors") == 208  # a scalar is one


SPEC = JobSpec(train=TrainSpec(outer=OuterSpec(rounds=ROUNDS, block=256)))
PAYLOAD = 1000 + 4 * 4


def test_each_contributor_sends_to_each_other_participant():
    run = outcome(
        (0, [A, B]),
        participants=[A, B],
        contributors=[(0, [A, B]), (1, [A])],  # B was late in round 1
    )
    assert expected_bytes(run, SPEC, 1000) == {
        f"{A}>{B}": 2 * PAYLOAD,
        f"{B}>{A}": PAYLOAD,
    }
    assert expected_state_bytes(run, 1000) == 0


def test_the_lost_do_not_count_and_newcomers_do_from_their_first_round():
    run = outcome(
        (0, [A, B, C]),
        (1, [A, B]),
        (2, [A, B, D]),
        participants=[A, B, D],
        contributors=[(0, [A, B, C]), (1, [A, B]), (2, [A, B, D])],
    )
    expected = expected_bytes(run, SPEC, 1000)
    assert expected[f"{A}>{B}"] == 3 * PAYLOAD
    assert expected[f"{A}>{D}"] == expected[f"{D}>{A}"] == PAYLOAD
    assert not any(C in link for link in expected)
    assert expected_state_bytes(run, 1000) == 8000


def test_measured_bytes_takes_links_alone():
    facts = {
        f"{LINK_FACT}{A}>{B}": 12,
        f"{LINK_FACT}total": 12,
        "loss": 3.0,
        "checkpoint": "ab>cd",
    }
    row = msgspec.structs.replace(outcome((0, [A])).row, facts=facts)
    assert measured_bytes(row) == {f"{A}>{B}": 12}
