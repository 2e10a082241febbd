"""Hypothesis profiles: `fast` for every run, `soak` for the long counts."""

import os

from hypothesis import HealthCheck, settings

# shrinking a state machine can take minutes: `fast` reports the seed instead
settings.register_profile(
    "fast", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "soak",
    deadline=None,
    max_examples=2000,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
