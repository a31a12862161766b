"""Words for signs: real ones and made-up ones, a seventh of all strings kept for testing.

Whether a word belongs to training or to testing is a function of its letters, so that no word can be in both.
"""

import functools
import random
import zlib

from spellchecker import SpellChecker

HELD_OUT_EVERY = 7
COMMON = 20_000  # most frequent words of 3 to 9 letters
UNKIND = (
    "bitch", "fuck", "shit", "cunt", "nigg", "fag", "slut", "whore", "rape", "cock", "dick", "puss", "penis", "nazi",
    "porn",
)  # fmt: skip
ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z",
    "bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "pl", "pr", "sh", "sk", "sl", "sm", "sn", "sp",
    "st", "tr", "th", "qu",
)  # fmt: skip
VOWELS = (
    "a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "oo", "ou", "y",
)  # fmt: skip
CODAS = (
    "n", "r", "s", "t", "l", "m", "d", "k", "p", "g", "x", "b", "ck", "ng", "nt", "rd", "st", "ll", "sh",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_held_out(word: str) -> bool:
    """Whether `word` is kept for testing; a number is as soon as it has three digits."""
    return len(word) > 2 and zlib.crc32(word.upper().encode()) % HELD_OUT_EVERY == 0


@functools.cache
def real_words(held_out: bool) -> tuple[str, ...]:
    """Common English words of 3 to 9 letters, in capitals."""
    frequency = SpellChecker().word_frequency.dictionary
    words = [word for word in frequency if 3 <= len(word) <= 9 and word.isascii() and word.isalpha()]
    words = [word for word in words if not any(stem in word for stem in UNKIND)]
    common = sorted(words, key=lambda word: (-frequency[word], word))[:COMMON]
    return tuple(word.upper() for word in common if is_held_out(word) == held_out)


def made_up_word(rng: random.Random, held_out: bool, shortest: int = 3, longest: int = 9) -> str:
    """Syllables, or a fifth of the time letters in any order."""
    while True:
        length = rng.randint(shortest, longest)
        if rng.random() < 0.2:
            word = "".join(rng.choices(LETTERS, k=length))
        else:
            word = ""
            while len(word) < length:
                word += rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
            word = word[:length].upper()
        if is_held_out(word) == held_out and not any(stem.upper() in word for stem in UNKIND):
            return word


def real_word(rng: random.Random, held_out: bool, shortest: int = 3, longest: int = 9) -> str:
    words = real_words(held_out)
    while True:
        word = rng.choice(words)
        if shortest <= len(word) <= longest:
            return word


def number(rng: random.Random, held_out: bool) -> str:
    while True:
        digits = str(rng.randrange(10 ** rng.randint(1, 5)))
        if len(digits) < 3 or is_held_out(digits) == held_out:
            return digits


def word(rng: random.Random, held_out: bool, shortest: int = 3, longest: int = 9) -> str:
    """A real word or a made-up one, with equal chances."""
    return (real_word if rng.random() < 0.5 else made_up_word)(rng, held_out, shortest, longest)


def sign_text(rng: random.Random, held_out: bool) -> str:
    """One word, two words or a number."""
    chance = rng.random()
    if chance < 0.15:
        return number(rng, held_out)
    if chance < 0.35:
        return f"{word(rng, held_out)} {word(rng, held_out)}"
    return word(rng, held_out)
