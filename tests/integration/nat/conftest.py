"""Laboratories with daemons for the scenarios; a failure shows what they logged."""

import time
from contextlib import ExitStack

import pytest

from sims.lab.command import HEADINGS, row_of
from sims.lab.lab import Lab
from sims.lab.namespaces import obstacle
from sims.lab.topology import Topology

LOG_LINES = 40


@pytest.fixture
def started(request):
    """Return a function that builds sites and starts a daemon in each host."""
    if obstacle():
        pytest.skip(obstacle())
    with ExitStack() as stack:
        labs = []

        def start(*sites, settings=()):
            lab = stack.enter_context(Lab(Topology(sites=sites), settings))
            labs.append(lab)
            lab.start()
            return lab

        yield start
        report = request.node.stash.get(REPORT, None)
        if report is not None and report.failed:
            for lab in labs:
                for host in lab.hosts:
                    print(f"===== {host}\n{lab.log(host, LOG_LINES)}")


@pytest.fixture
def formed(started):
    """Return a function that also makes one mesh: the lab, and who joined when."""

    def form(*sites, settings=()):
        lab = started(*sites, settings=settings)
        joined = {}
        lab.form(joined=lambda host: joined.update({host: time.monotonic()}))
        return lab, joined

    return form


REPORT = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[REPORT] = report
    return report


@pytest.fixture
def show(capsys):
    """Return a function that prints pairs as a table, even when all is well."""

    def show(title, results):
        rows = [tuple(map(str, row_of(result))) for result in results]
        rows.insert(0, HEADINGS)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        with capsys.disabled():
            print(f"\n{title}")
            for row in rows:
                cells = zip(row, widths, strict=True)
                print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
            for result in results:
                if result.failure:
                    print(f"{result.one} {result.other}: {result.failure}")

    return show


def check(results):
    """Every pair can call; those that can be direct are."""
    failed = [f"{r.one} {r.other} ({r.kinds}): {r.failure}" for r in results]
    unconnected = [
        text for r, text in zip(results, failed, strict=True) if not r.connected
    ]
    assert not unconnected
    relayed = [f"{r.one} {r.other} ({r.kinds})" for r in results if not r.as_expected]
    assert not relayed, "can be direct and are not"
