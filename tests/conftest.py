"""Hypothesis profiles: `fast` for every run; SOAK_FACTOR multiplies every count."""

import gc
import os

from hypothesis import HealthCheck, settings

# Before torch is imported, here and in what tests start: threads that wait by spinning
# took a minute of processor time for a test of two seconds where cores were busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))

gc.disable()  # until all is collected: nothing of it is garbage

# the same examples every time, except in a soak, which draws them from its seed
settings.register_profile(
    "fast",
    deadline=None,
    derandomize=FACTOR == 1,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fast")


def pytest_collection_modifyitems(items):
    """Begin with the files that wait for daemons; in a soak, multiply example counts.

    Last, they would leave workers idle: each file runs in one of them. So would slow
    tests, which come next.
    """
    first = [
        {item.path for item in items if item.get_closest_marker(marker)}
        for marker in ("scenario", "slow")
    ]
    items.sort(key=lambda item: [item.path not in files for files in first])
    if FACTOR == 1:
        return
    seen = set()
    for item in items:
        machine = getattr(item, "cls", None)
        if machine is not None and isinstance(
            getattr(machine, "settings", None), settings
        ):
            if machine not in seen:
                machine.settings = scaled(machine.settings)
                seen.add(machine)
            continue
        test = getattr(item, "obj", None)
        test = getattr(test, "__func__", test)
        stated = getattr(test, "_hypothesis_internal_use_settings", None)
        if stated is not None and test not in seen:
            test._hypothesis_internal_use_settings = scaled(stated)
            seen.add(test)


def pytest_collection_finish():
    """Let garbage be looked for among what tests make, not in what was collected."""
    gc.freeze()
    gc.enable()


def scaled(stated):
    return settings(stated, max_examples=stated.max_examples * FACTOR)
