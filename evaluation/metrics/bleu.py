"""BLEU-4 of a corpus through sacrebleu, on the words that CIDEr sees."""

from .ptb import tokenize


def bleu_of_tokens(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """`bleu` of captions cut into words already."""
    if len(candidates) != len(references) or not candidates or not all(references):
        raise ValueError(
            f"BLEU needs at least one candidate and one reference for each, not {len(candidates)} candidates and "
            f"references for {sum(map(bool, references))}."
        )
    from sacrebleu.metrics import BLEU  # of the extra `eval`

    # sacrebleu wants as many references for each candidate, and skips None.
    most = max(map(len, references))
    columns = [[" ".join(group[i]) if i < len(group) else None for group in references] for i in range(most)]
    # pycocoevalcap counts 1e-15 for an order without matches. `force`, because the text is cut into words already.
    metric = BLEU(tokenize="none", smooth_method="floor", smooth_value=1e-15, force=True)
    return metric.corpus_score([" ".join(words) for words in candidates], columns).score / 100


def bleu(candidates: list[str], references: list[list[str]]) -> float:
    """Between 0 and 1, over the whole corpus; of several references, the one nearest in length counts for brevity.

    This is pycocoevalcap's score but where no candidate has four words: 0 here, a small positive number there.

    Raises:
        ValueError: if there is no candidate, or no reference for one.
    """
    tokens = [[tokenize(caption) for caption in group] for group in references]
    return bleu_of_tokens([tokenize(caption) for caption in candidates], tokens)
