"""VQA accuracy as the official evaluation code (GT-Vision-Lab/VQA, vqaEval.py) computes it today."""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    **{"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"},
    **{"eight": "8", "nine": "9", "ten": "10", "none": "0"},
}

# Pairs as the official table has them, its oddities with them: "somebody'd" loses its apostrophe, and the pairs with a
# capital letter never apply, because the words are in lower case by then.
CONTRACTIONS = dict(
    re.findall(
        r"(\S+):(\S+)",
        """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
        """,
    )
)


def strip_punctuation(text: str) -> str:
    """Marks next to a space vanish and others become a space; all vanish where a comma stands between digits."""
    digits_with_comma = re.search(r"\d,\d", text)
    stripped = text
    for mark in PUNCTUATION:
        vanishes = digits_with_comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if vanishes else " ")
    # Thirty-two full stops at most: the official code passes a flag (re.UNICODE) in the place of the count.
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


def normalize_words(text: str) -> str:
    """In lower case, number words up to ten as digits, without articles, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """Between 0 and 1: a third for each matching answer of the others, averaged over leaving out each reference.

    Where all references are the same (white space around them aside), they and `answer` are compared as they stand;
    only otherwise are they processed, as in the official code.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("VQA accuracy needs at least one reference answer, and this question has none.")
    answer, *references = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *references))
    if len(set(references)) > 1:
        answer, *references = (normalize_words(strip_punctuation(text)) for text in (answer, *references))
    matches = [reference == answer for reference in references]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / len(matches)
