"""Average normalised Levenshtein similarity, the score of ST-VQA and DocVQA (Biten et al., 2019)."""


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that turn `first` into `second`."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(answer: str, references: list[str], threshold: float = 0.5) -> float:
    """Between 0 and 1: the similarity to the nearest reference; 0 where the distance reaches `threshold`.

    Capitals and the amount of white space do not count.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("ANLS needs at least one reference answer, and this question has none.")
    answer, *references = (" ".join(text.lower().split()) for text in (answer, *references))
    distances = [edit_distance(answer, reference) / max(len(answer), len(reference), 1) for reference in references]
    nearest = min(distances)
    return 1 - nearest if nearest < threshold else 0.0
