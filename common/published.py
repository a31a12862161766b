"""What the paper reports in Table 1, by the names that the benchmarks have here; the only copy."""

from dataclasses import dataclass

PAPER_URL = "https://arxiv.org/abs/2501.02584"


@dataclass(frozen=True)
class Published:
    """Scores by model on one split of a benchmark, in percent (CIDEr: times 100); samples: how many it has."""

    benchmark: str
    split: str
    samples: int
    metric: str
    scores: dict[str, float]

    def of_variant(self, variant: str) -> float:
        """The score of a published Pheye; `variant` is a key of `configuration_pheye.VARIANTS`."""
        return self.scores[f"Pheye-{variant}"]


PUBLISHED = {
    "vqav2": Published(
        "VQAv2",
        "test-dev",
        107_394,
        "accuracy",
        {
            "Pheye-x4-448": 75.2,
            "Pheye-x4-672": 75.5,
            "Pheye-x2-448": 76.0,
            "Pheye-x2-672": 76.4,
            "moondream2": 77.7,
            "MoE-LLaVA-2.7Bx4": 77.1,
        },
    ),
    "nocaps": Published(
        "NoCaps",
        "val",
        4_500,
        "CIDEr",
        {
            "Pheye-x4-448": 110.1,
            "Pheye-x4-672": 110.8,
            "Pheye-x2-448": 111.8,
            "Pheye-x2-672": 110.5,
            "moondream2": 92.5,
        },
    ),
    "textvqa": Published(
        "TextVQA",
        "val",
        5_000,
        "accuracy",
        {
            "Pheye-x4-448": 45.9,
            "Pheye-x4-672": 49.2,
            "Pheye-x2-448": 47.3,
            "Pheye-x2-672": 50.5,
            "moondream2": 49.7,
            "MoE-LLaVA-2.7Bx4": 50.2,
        },
    ),
    "textcaps": Published(
        "TextCaps",
        "test",
        3_289,
        "CIDEr",
        {
            "Pheye-x4-448": 106.4,
            "Pheye-x4-672": 111.9,
            "Pheye-x2-448": 108.9,
            "Pheye-x2-672": 115.9,
            "moondream2": 120.2,
        },
    ),
}
