"""The closed form of the exchange, on made-up outcomes to be counted by hand."""

import json
import struct

import msgspec

from fabric.app.control_messages import JobRow
from fabric.jobs.runner import LINK_FACT
from fabric.jobs.spec import JobSpec, OuterSpec, TrainSpec
from sims.demo.traffic import (
    expected_bytes,
    measured_bytes,
    num_parameters,
    rounds_together,
)
from sims.demo.train_step import TrainOutcome

# ids of the length that short() leaves, so that they are their own short form
A, B, C, D = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"
ROUNDS = 10


def outcome(*members, participants=(), facts=None):
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
    return TrainOutcome(members=made, row=row)


def pair(one, other):
    return frozenset((one, other))


def test_rounds_together_of_one_generation():
    assert rounds_together(outcome((0, [A, B])), ROUNDS) == {pair(A, B): ROUNDS}


def test_rounds_together_over_a_loss_and_a_gain():
    run = outcome((0, [A, B, C]), (3, [A, B]), (7, [A, B, D]))
    assert rounds_together(run, ROUNDS) == {
        pair(A, B): 10,
        pair(A, C): 3,
        pair(B, C): 3,
        pair(A, D): 3,
        pair(B, D): 3,
    }


def test_a_generation_that_decided_no_round_counts_nothing():
    run = outcome((0, [A, B]), (4, [A]), (4, [A, B]))
    assert rounds_together(run, ROUNDS) == {pair(A, B): ROUNDS}


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


def test_expected_bytes(tmp_path):
    numel, block = 1000, 256
    folder = export(tmp_path, [10, 100])
    spec = JobSpec(train=TrainSpec(outer=OuterSpec(rounds=ROUNDS, block=block)))
    payload = numel + 4 * 4  # int8 values, and a scale for each of four blocks
    run = outcome((0, [A, B, C]), (5, [A, B]), (6, [A, B, D]), participants=(A, B, D))
    state = 8 * numel // 2  # of a newcomer, from each of two sources
    assert expected_bytes(run, spec, folder) == {
        f"{A}>{B}": 10 * payload,
        f"{B}>{A}": 10 * payload,
        f"{A}>{D}": 4 * payload + state,
        f"{B}>{D}": 4 * payload + state,
        f"{D}>{A}": 4 * payload,
        f"{D}>{B}": 4 * payload,
    }


def test_measured_bytes_takes_links_alone():
    facts = {
        f"{LINK_FACT}{A}>{B}": 12,
        f"{LINK_FACT}total": 12,
        "loss": 3.0,
        "checkpoint": "ab>cd",
    }
    row = msgspec.structs.replace(outcome((0, [A])).row, facts=facts)
    assert measured_bytes(row) == {f"{A}>{B}": 12}
