"""Tables of the reports."""

from collections.abc import Sequence


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown: the columns' names, and the cells of each row."""
    return [line(names), "| --- " * len(names) + "|", *map(line, rows)]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
