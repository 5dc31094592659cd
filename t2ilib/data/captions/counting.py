"""What the captions of a data set are like: how many, how long, in which words, and which come several times.

CLIP's tokenizer is not needed to know what is surely too long for it: it cuts a text into pieces first, by a pattern that is known, and
each piece is one token or more.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median_low
from typing import Any

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
"""Letters, with apostrophes and hyphens inside, or digits."""
PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)
"""Ends such as 's, letters, a digit, anything else (the pattern of CLIP's tokenizer)."""
CLIP_TOKENS = 77
"""What CLIP's text encoders take, with the two that mark beginning and end."""
LETTERS = 6
"""A piece of so many letters and more is counted as several tokens where the question is what may be too long."""
MOST_FREQUENT = 40
Range = tuple[int, int, int]
"""Least, median, most."""


@dataclass(frozen=True)
class CaptionCounts:
    """`lengths`: number of words -> how many captions have so many. `words`: the most frequent in small letters, with their counts.
    `repeated`: captions of several pictures, the most frequent first, with the pictures' number; `num_repeated` of them there are.

    `cut`: captions that surely have more tokens than CLIP takes. `may_be_cut`: others that have where long words are several tokens.
    """

    captions: int = 0
    of_a_picture: Range = (0, 0, 0)
    lengths: dict[int, int] = field(default_factory=dict)
    words: tuple[tuple[str, int], ...] = ()
    num_words: int = 0
    repeated: tuple[tuple[str, int], ...] = ()
    num_repeated: int = 0
    cut: int = 0
    may_be_cut: int = 0

    @property
    def length(self) -> Range:
        """Words of a caption."""
        return spread([words for words, count in self.lengths.items() for _ in range(count)])

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        names = ("least", "median", "most")
        ranges = {
            "of_a_picture": dict(zip(names, self.of_a_picture, strict=True)),
            "words_of_a_caption": dict(zip(names, self.length, strict=True)),
        }
        return asdict(self) | ranges | {"words": dict(self.words), "repeated": dict(self.repeated)}


def count_captions(pictures: Sequence[tuple[str, ...]]) -> CaptionCounts:
    """`pictures`: the captions of each."""
    lengths, words, cut, may_be_cut = Counter(), Counter(), 0, 0
    pictures_of = Counter(caption for captions in pictures for caption in dict.fromkeys(captions))
    for caption, count in Counter(caption for captions in pictures for caption in captions).items():
        found = WORD.findall(caption.lower())
        lengths[len(found)] += count
        for word in found:
            words[word] += count
        least, most = tokens(caption)
        cut += count * (least > CLIP_TOKENS)
        may_be_cut += count * (least <= CLIP_TOKENS < most)
    repeated = [(caption, count) for caption, count in pictures_of.items() if count > 1]
    repeated.sort(key=lambda item: -item[1])
    return CaptionCounts(
        sum(lengths.values()),
        spread([len(captions) for captions in pictures]),
        dict(sorted(lengths.items())),
        tuple(words.most_common(MOST_FREQUENT)),
        len(words),
        tuple(repeated[:MOST_FREQUENT]),
        len(repeated),
        cut,
        may_be_cut,
    )


def tokens(caption: str) -> tuple[int, int]:
    """How many tokens of CLIP's a caption has at least, and about how many at most."""
    if len(caption.encode("utf-8", "replace")) <= CLIP_TOKENS - 2:  # a token is a byte at least
        return 2, CLIP_TOKENS
    pieces = PIECE.findall(caption)
    return 2 + len(pieces), 2 + sum(1 + len(piece) // LETTERS for piece in pieces)


def spread(values: Sequence[int]) -> Range:
    return (min(values), median_low(values), max(values)) if values else (0, 0, 0)
