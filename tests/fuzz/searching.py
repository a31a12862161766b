"""Search for a while instead of for a number of examples."""

import os
import random
import time

from hypothesis import HealthCheck, given, seed, settings

SECONDS = int(os.environ.get("FUZZ", 60))


def search(check, *strategies):
    """Call `check` with what the strategies draw, for `FUZZ` seconds; what fails is shown at its smallest."""
    start = time.monotonic()
    quiet = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < start + SECONDS:
        quiet(seed(random.SystemRandom().getrandbits(64))(given(*strategies)(check)))()
