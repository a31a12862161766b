import pytest

from pheye.evaluation.metrics.ptb import tokenize

pytestmark = pytest.mark.once

# Recorded from pycocoevalcap 1.2's PTBTokenizer, which runs Stanford's in Java.
JAVA = {
    'A man holds a sign that says "STOP".': "a man holds a sign that says stop",
    "The dog's bowl, the dogs' bowls; it's James's!": "the dog 's bowl the dogs bowls it 's james 's",
    "They can't, won't and don't; you'd say they've I'm": "they ca n't wo n't and do n't you 'd say they 've i 'm",
    "I cannot, gonna, wanna, gotta, lemme; 'tis 'twas": "i can not gon na wan na got ta lem me 't is 't was",
    "O'Neil's o'clock in Hawai'i, ma'am, y'all": "o'neil 's o'clock in hawai'i ma'am y' all",
    "rock 'n' roll of the '90s, the 80's and the 1990s": "rock 'n' roll of the '90s the 80 's and the 1990s",
    "a black-and-white T-shirt, well- known x--y": "a black-and-white t-shirt well known x y",
    "and/or black/white/gray/red w/ 24/7 f/2.8": "and/or black/white/gray / red w / 24/7 f/2 .8",
    "at 5 p.m. in the U.S. on Main St. with Mr. Smith Jr.": "at 5 p.m. in the u.s. on main st. with mr. smith jr.",
    "Washington D.C.": "washington d.c.",
    "No. 5 and no. no.7": "no. 5 and no no. 7",
    "12 oz., 5th.; a cat. lb.": "12 oz. 5th. a cat lb",
    "$5.00 US$5 £20 €30 5¢ 50% #1 $1.5M": "$ 5.00 us$ 5 # 20 $ 30 5 cents 50 % # 1 $ 1.5 m",
    "1,000 at 10:30pm, 5x7, 3.5-inch, 1 1/2 ½ -5 1+1": "1,000 at 10:30 pm 5x7 3.5-inch 1 1/2 1/2 -5 1 +1",
    '5\'10" and 24"x36"': "5 10 and 24 x36",
    "(a) [b] {c} <d> < 3": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> < 3",
    "wait... really?! yes!! no! ok?": "wait ... really ?! yes !! no ok".replace(" ...", ""),
    "hello!world end.Start a,b": "hello!world end.start a b",
    "(650) 723-0293 and (555)555-5555": "-lrb-650-rrb- 723-0293 and -lrb-555-rrb-555-5555",
    "www.x.com, foo.com/bar.html. a@b.com @user's #tag": "www.x.com foo.com/bar.html a@b.com @user 's #tag",
    "AT&T M&M's &amp; salt&pepper C++": "at&t m&m 's & salt & pepper c++",
    "smile :) :-( ;D **wow**": "smile :-rrb- :--lrb- ;d ** wow **",
    "\u201cit\u2019s\u201d \u2018a\u2019 café\u2014naïve \u2013 25° ™ 東京": "it 's a café naïve 25 ° ™ 東京",
    "a 😀 face": "a face",
    " \t ": "",
    "": "",
}


@pytest.mark.parametrize("caption", JAVA)
def test_words_are_those_of_the_java_tokenizer(caption):
    assert tokenize(caption) == JAVA[caption].split()
