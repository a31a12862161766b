"""Three groups of equal number by area, and the accuracy in each."""

import math
from collections.abc import Sequence

from ..common.command import InputError

TERTILES = ("small", "medium", "large")


def tertiles(areas: dict) -> dict:
    """0, 1 or 2 for each key, in three groups of equal number (the first ones one larger) from small to large.

    Equal areas are told apart by their keys, so that the groups do not depend on the order of the samples.
    """
    if len(areas) < len(TERTILES):
        raise InputError(f"{len(areas)} samples have an area, but three groups need at least 3; give more of them.")
    order = sorted(areas, key=lambda key: (areas[key], key))
    return {key: rank * len(TERTILES) // len(order) for rank, key in enumerate(order)}


def accuracy_by_tertile(scores: dict[str, float], areas: dict[str, float]) -> list[dict]:
    """Per tertile of `areas`: its name, number of samples, range of areas, and mean score."""
    groups = [[] for _ in TERTILES]
    for key, tertile in tertiles(areas).items():
        groups[tertile].append(key)
    return [
        {
            "tertile": name,
            "samples": len(keys),
            "smallest_area": min(areas[key] for key in keys),
            "largest_area": max(areas[key] for key in keys),
            "accuracy": math.fsum(scores[key] for key in keys) / len(keys),
        }
        for name, keys in zip(TERTILES, groups, strict=True)
    ]


def scores_by_id(rows: Sequence[dict], name: str) -> dict[str, float]:
    """Score of each row by id (as text); a row with an error counts as wrong."""
    scores = {}
    for row in rows:
        score = row.get("score")
        if score is None and "error" in row:
            score = 0.0
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(
                f"The row of {row['id']!r} in {name} has no score; evaluate a split whose answers are public."
            )
        if str(row["id"]) in scores:
            raise InputError(f"{name} has several rows of {row['id']!r}; give the rows of one run.")
        scores[str(row["id"])] = float(score)
    return scores
