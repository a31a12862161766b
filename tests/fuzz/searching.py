"""Searches: the same draws in every run of the slow tests, new ones for `FUZZ` seconds by `make fuzz`."""

import itertools
import os
import random
import time

from hypothesis import HealthCheck, given, seed, settings

SECONDS = int(os.environ.get("FUZZ", 0))


def search(check, *strategies, rounds: int):
    """Call `check` with what the strategies draw, 20 times a round; what fails is shown at its smallest.

    `rounds` are as many as take half a minute. A change is judged by draws that do not change from run to run.
    """
    end = time.monotonic() + SECONDS
    quiet = settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for number in itertools.count() if SECONDS else range(rounds):
        if SECONDS and time.monotonic() > end:
            return
        chosen = random.SystemRandom().getrandbits(64) if SECONDS else number
        quiet(seed(chosen)(given(*strategies)(check)))()
