"""States in a file: the same steps as in memory, beside no write left over."""

import pytest
import torch

from fabric.core.errors import ConfigError
from training.sharding import Piece
from training.worker.engines.native.offload import PAGE_BYTES, FileStates
from training.worker.engines.native.states import (
    AdamW,
    Decays,
    MemoryStates,
    owned,
    update,
)

SPANS = [(0, 5000), (5000, 5000), (5000, 5001), (5001, 12000)]
CUT = (Piece(0, 10, 5010), Piece(1, 3, 4), Piece(2, 0, 2000), Piece(3, 1, 5000))


def filled(states):
    for each in owned(states, CUT):
        for number, value in enumerate(each[1:]):
            value.copy_(torch.arange(each.piece.begin, each.piece.end) % 97 + number)
    return states


def test_a_step_is_the_same_as_in_memory(tmp_path):
    gradient = torch.randn(12000, generator=torch.Generator().manual_seed(1))
    decays = Decays(CUT, (0.1, 0.0, 0.0, 0.2))
    memory = filled(MemoryStates(SPANS))
    file = filled(FileStates(SPANS, tmp_path / "states", 700))
    for states in (memory, file):
        for age in range(3):
            for slab in states.sweep():
                part = gradient[slab.begin : slab.begin + slab.master.numel()]
                update(slab, part, decays, AdamW(), age=age, learning_rate=0.1)
    pairs = [
        {each.piece.tensor: [] for each in owned(states, CUT)}
        for states in (memory, file)
    ]
    for found, states in zip(pairs, (memory, file), strict=True):
        for each in owned(states, CUT):
            found[each.piece.tensor].append(torch.stack(each[1:]))
    for tensor, parts in pairs[0].items():
        # not bit for bit: the last lanes of a slab round in another way
        torch.testing.assert_close(torch.cat(parts, 1), torch.cat(pairs[1][tensor], 1))
    assert file.pool_bytes == 3 * 3 * PAGE_BYTES  # 700 elements are 2.05 pages
    file.close()
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_is_left_half_way_leaves_no_write_behind(tmp_path):
    file = filled(FileStates(SPANS, tmp_path / "states", 700))
    sweep = file.sweep()
    next(sweep).master.fill_(5)
    next(sweep)
    sweep.close()
    assert float(next(file.sweep()).master[0]) == 5
    file.close()


def test_what_the_file_system_refuses_is_our_error(tmp_path):
    with pytest.raises(ConfigError) as refused:
        FileStates(SPANS, tmp_path / "none" / "states")
    assert refused.value.code == "E_OFFLOAD"
