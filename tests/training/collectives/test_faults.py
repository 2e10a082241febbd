"""Kill, stop or cut a rank in each collective: an error that names it, then go on."""

import itertools
import os

import pytest

pytestmark = pytest.mark.slow

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
WORLD = 4
VICTIM = 1
PATIENCE_SECONDS = 1.5
ALL = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "reduce",
    "all_to_all",
    "gather",
    "scatter",
    "barrier",
]
CASES = [
    ("SIGKILL", "all_reduce", "tls"),
    ("SIGSTOP", "all_gather", "local"),
    ("cut", "reduce_scatter", "local"),
]
if FACTOR > 1:
    ENDS = ("SIGKILL", "SIGSTOP", "cut", "exit")
    CASES = list(itertools.product(ENDS, ALL, ("local", "tls")))


@pytest.mark.parametrize(("how", "name", "path"), CASES)
def test_the_others_hear_who_it_was_and_go_on(ranks, how, name, path):
    killed = () if how == "cut" else (VICTIM,)
    found = ranks.run("fault_program.py", WORLD, how, name, path, killed=killed)
    left = [rank for rank in range(WORLD) if rank != VICTIM]
    for rank in left:
        report = found[rank]
        assert report["size"] == WORLD - 1
        assert report["sum"] == sum(left)
        if how == "cut":
            assert report["code"] in {"E_ABORTED", "E_PEER_LOST"}
        else:
            assert report["peer"] == f"rank {VICTIM}", report
        # the machine is shared: the bound is patience and a start of threads
        assert report["seconds"] < 4 * PATIENCE_SECONDS + 2
