"""Words taken out of a sentence so that a sentence is left.

What is dropped takes along what stands for nothing without it: "very" with "red", "a" where no noun follows, a comma or "and" between
words that are gone, a preposition without its object, "is" without what it says. An article is said again for the word that it now
stands before, and the capital at the start stays. A sentence of which nothing is dropped is returned as it was, whatever its spaces.
"""

import re
from collections.abc import Callable, Sequence

from t2ilib.data.tagging import Token
from t2ilib.data.tagging.sentence import ADJECTIVES, ADVERBS, BE, COLORS, DETERMINERS, NOUNS, SEEM, VERBS, words

SUBORDINATORS = words("while because although though if unless whereas whether until since that than as")
SHADES = words("dark light bright pale deep hot neon pastel")
OPENING, CLOSING = frozenset("([{“‘"), frozenset(")]}”’")
PUNCTUATION = frozenset(",;:.!?()[]{}\"'“”‘’")
A_AN = frozenset(("a", "an"))
SOUNDS_LIKE_YOU = ("uni", "use", "usu", "uti", "eu", "ewe", "ufo", "uk", "ubi", "one", "once")
MAY_BE_ORPHANS = VERBS | {"CC", "DT", "PRP$", "IN", "TO", "POS"}
SPACES = re.compile(r"\s+")
SILENT_H = ("hour", "honest", "honor", "honour", "heir")

Chooses = Callable[["Sequence[Token]", int], bool]
"""Whether a word of a sentence, given by its place, is to be dropped."""


def noun_ahead(tokens: Sequence[Token], i: int) -> bool:
    """Whether what follows word `i` is a noun, perhaps after adjectives, participles, adverbs, "and" and commas between them."""
    for token in tokens[i + 1 :]:
        if token.tag in NOUNS:
            return True
        if token.tag not in ADJECTIVES | ADVERBS | {"CD", "VBN", "VBG", "CC", ",", "POS"} and token.text != ",":
            return False
    return False


def is_adjective(tokens: Sequence[Token], i: int) -> bool:
    """Adjectives and participles that stand as such ("a tilted square", "a square, tilted"); not "at the top", where it is a noun."""
    tag = tokens[i].tag
    before = i - 1
    while before >= 0 and tokens[before].tag in ADVERBS:
        before -= 1
    previous = tokens[before].tag if before >= 0 else ""
    if tag in ADJECTIVES:
        nominal = before == i - 1 and (
            previous in DETERMINERS or (previous in ADJECTIVES and before > 0 and tokens[before - 1].tag in DETERMINERS)
        )
        return not nominal or noun_ahead(tokens, i)
    if tag == "VBN":
        alone = i + 1 == len(tokens) or tokens[i + 1].text in PUNCTUATION
        if previous == "," or previous == ":":
            return alone or noun_ahead(tokens, i)
        return (previous in DETERMINERS | ADJECTIVES | {"CD", ""}) and noun_ahead(tokens, i)
    return False


def is_verb(tokens: Sequence[Token], i: int) -> bool:
    """Verbs and auxiliaries, with "to" and particles; not participles that stand before a noun."""
    token = tokens[i]
    if token.tag == "TO" or token.text.lower() == "to":
        return i + 1 < len(tokens) and tokens[i + 1].tag == "VB"
    if token.tag == "RP":
        return i > 0 and tokens[i - 1].tag in VERBS
    previous = tokens[i - 1].tag if i else ""
    attributive = (
        token.tag in ("VBN", "VBG", "VBD") and previous in DETERMINERS | ADJECTIVES | ADVERBS and noun_ahead(tokens, i)
    )
    return token.tag == "MD" or (token.tag in VERBS and not (attributive and not is_auxiliary_before(tokens, i)))


def is_auxiliary_before(tokens: Sequence[Token], i: int) -> bool:
    """Whether a form of be stands before word `i`, perhaps with adverbs between: "is slowly riding"."""
    i -= 1
    while i >= 0 and tokens[i].tag in ADVERBS:
        i -= 1
    return i >= 0 and tokens[i].text.lower() in BE


def is_preposition(tokens: Sequence[Token], i: int) -> bool:
    token = tokens[i]
    infinitive = token.text.lower() == "to" and i + 1 < len(tokens) and tokens[i + 1].tag == "VB"
    return token.tag in ("IN", "TO") and token.text.lower() not in SUBORDINATORS - {"as"} and not infinitive


def is_color(tokens: Sequence[Token], i: int) -> bool:
    """Colour words, also in compounds ("blue-green"); not the fruit in "an orange"."""
    word = tokens[i].text.lower()
    parts = word.split("-")
    if not any(part in COLORS for part in parts) or any(part not in COLORS | SHADES for part in parts):
        return False
    return (
        tokens[i].tag not in ("NN", "NNS")
        or noun_ahead(tokens, i)
        or word not in ("orange", "olive", "lime", "silver", "navy")
    )


PARTS_OF_SPEECH: dict[str, Chooses] = {
    "adverbs": lambda tokens, i: tokens[i].tag in ADVERBS and tokens[i].text[0].isalnum() and "'" not in tokens[i].text,
    "adjectives": is_adjective,
    "nouns": lambda tokens, i: tokens[i].tag in NOUNS,
    "verbs": is_verb,
    "prepositions": is_preposition,
    "determiners": lambda tokens, i: tokens[i].tag in ("DT", "PDT"),
    "numerals": lambda tokens, i: tokens[i].tag == "CD",
    "pronouns": lambda tokens, i: tokens[i].tag in ("PRP", "PRP$"),
    "conjunctions": lambda tokens, i: (
        tokens[i].tag == "CC" or (tokens[i].tag in ("IN", "WRB") and tokens[i].text.lower() in SUBORDINATORS - {"as", "that", "than"})
    ),
}  # fmt: skip


def drop(caption: str, tokens: Sequence[Token], chosen: Sequence[int]) -> str:
    """`caption` without the words at the places `chosen`, and without what stands for nothing when they are gone; "" where no word is left."""
    if not chosen:
        return caption
    gone = [False] * len(tokens)
    for i in chosen:
        gone[i] = True
    sentence = Remains(tokens, gone)
    sentence.drop_modifiers()
    while sentence.drop_orphans():
        pass
    return sentence.text(caption)


def kind_of(token: Token) -> str:
    """What can be joined by "and" or a comma with what."""
    if token.tag in ADJECTIVES or token.tag == "VBN":
        return "adjective"
    if token.tag in VERBS:
        return "verb"
    return "adverb" if token.tag in ADVERBS else "noun" if token.tag in NOUNS | {"PRP"} else token.tag


class Remains:
    """A sentence of which some words are gone."""

    def __init__(self, tokens: Sequence[Token], gone: list[bool]) -> None:
        self.tokens, self.gone = tokens, gone

    def kept_before(self, i: int) -> int | None:
        return next((j for j in range(i - 1, -1, -1) if not self.gone[j]), None)

    def kept_after(self, i: int) -> int | None:
        return next((j for j in range(i + 1, len(self.tokens)) if not self.gone[j]), None)

    def run_after(self, i: int) -> list[Token]:
        """What is gone directly after word `i`."""
        end = self.kept_after(i)
        return list(self.tokens[i + 1 : len(self.tokens) if end is None else end])

    def drop_modifiers(self) -> None:
        """Adverbs of dropped adjectives, participles, numbers and verbs; shades of dropped colours; "of" after what it belonged to."""
        tokens, gone = self.tokens, self.gone
        for i in [i for i, dropped in enumerate(gone) if dropped]:
            tag, j = tokens[i].tag, i - 1
            if tag in ADJECTIVES | VERBS | {"CD"} or tokens[i].text.lower() in COLORS:
                while j >= 0 and (
                    tokens[j].tag in ADVERBS or (tokens[j].text.lower() in SHADES and tokens[i].text.lower() in COLORS)
                ):
                    gone[j] = True
                    j -= 1
            j = i + 1
            while tag in VERBS and tag != "VBN" and j < len(tokens) and tokens[j].tag in ADVERBS:
                gone[j] = True
                j += 1
            if tag in NOUNS | {"DT", "CD", "JJS", "PRP"} and i + 1 < len(tokens) and tokens[i + 1].text.lower() == "of":
                gone[i + 1] = True

    def drop_orphans(self) -> bool:
        """Takes away what the last losses orphaned; whether there was anything."""
        orphans = [i for i in self.beside_gaps() if self.is_orphan(i)]
        for i in orphans:
            if self.is_orphan(i):  # of two commas that meet, one stays
                self.gone[i] = True
        return bool(orphans)

    def beside_gaps(self) -> list[int]:
        gone = [True, *self.gone, True]
        return [i for i in range(len(self.tokens)) if not gone[i + 1] and (gone[i] or gone[i + 2])]

    def is_orphan(self, i: int) -> bool:
        token = self.tokens[i]
        word = token.text.lower()
        left_gone = i > 0 and self.gone[i - 1]
        right_gone = i + 1 < len(self.tokens) and self.gone[i + 1]
        if not (left_gone or right_gone) or (token.tag not in MAY_BE_ORPHANS and word[0].isalnum()):
            return False
        before, after = self.kept_before(i), self.kept_after(i)
        if token.tag == "CC" or word in (",", ";", ":"):
            return self.joins_nothing(i, left_gone, right_gone, before, after)
        closes = word in CLOSING or (word == '"' and sum(t.text == '"' for t in self.tokens[:i]) % 2 == 1)
        if closes:
            return left_gone and self.opened_at_gone(i)
        if word in OPENING or word == '"':
            return right_gone and after is not None and self.tokens[after].text in CLOSING | {'"'}
        if token.tag == "POS" or (word in ("'s", "’s") and left_gone):
            return left_gone and self.tokens[i - 1].tag in NOUNS
        if not right_gone:
            return False
        follows = None if after is None else self.tokens[after]
        if word in A_AN or word in ("the", "every") or token.tag == "PRP$":
            return not self.noun_left(i)
        lost = [t for t in self.run_after(i) if t.tag not in ADVERBS]
        if token.tag in ("IN", "TO") and word not in SUBORDINATORS:
            starts_object = follows is not None and (
                follows.tag in NOUNS | ADJECTIVES | DETERMINERS | {"CD", "PRP", "VBG", "EX", "WP", "WRB", "WDT"}
                or (follows.tag == "VB" and word == "to")
                or follows.text in ('"', "“", "‘", "'")
            )
            return bool(lost) and not starts_object
        if word in SEEM and token.tag in VERBS:
            says_more = follows is not None and follows.tag in NOUNS | ADJECTIVES | DETERMINERS | {
                "CD",
                "PRP",
                "VBG",
                "VBN",
                "RB",
                "EX",
            }
            if follows is not None and follows.tag == "CC":  # "is [red] and shiny"
                head = self.head_after(after)
                says_more = head is not None and kind_of(head) == "adjective"
            return any(kind_of(t) == "adjective" for t in lost) and not says_more
        return False

    def opened_at_gone(self, i: int) -> bool:
        """Whether the mark that opened before the closing one at `i` is gone, with all between."""
        j = i - 1
        while j >= 0 and self.gone[j]:
            if self.tokens[j].text in OPENING | {'"'}:
                return True
            j -= 1
        return False

    def joins_nothing(self, i: int, left_gone: bool, right_gone: bool, before: int | None, after: int | None) -> bool:
        """Whether "and", a comma or a colon has nothing to join any more."""
        tokens, word = self.tokens, self.tokens[i].text
        if before is None or after is None or tokens[before].text in ".!?;:(":
            return (before is None or tokens[before].text != ":" or left_gone) and (left_gone or after is None)
        if word in (";", ":"):
            return False
        if left_gone and right_gone and tokens[before].text != ",":
            return not (word == "," and tokens[i - 1].tag in ADVERBS and tokens[i - 1].tag != tokens[i + 1].tag)
        if right_gone and tokens[after].text in ".!?):;":
            return True
        if word == "," and ((left_gone and tokens[before].text == ",") or self.opened_aside(i, after)):
            return True
        if left_gone and (tokens[before].tag in DETERMINERS or tokens[before].tag == "IN"):
            return True
        kept_before, kept_after = kind_of(tokens[before]), kind_of(self.head_after(i) or tokens[after])
        if left_gone and kind_of(tokens[i - 1]) == kept_after != kept_before and tokens[i - 1].tag != ",":
            return True
        return right_gone and kind_of(tokens[after - 1]) == kept_before != kept_after

    def opened_aside(self, i: int, after: int) -> bool:
        """Whether the comma at `i` opened what was said aside, before a verb, and all of it is gone: "a man, slowly, walks"."""
        return self.tokens[after].tag in VERBS and self.gone[after - 1] and self.tokens[after - 1].text == ","

    def head_after(self, i: int) -> Token | None:
        """The first word after word `i` that is left and no adverb."""
        left = (t for t, gone in zip(self.tokens[i + 1 :], self.gone[i + 1 :], strict=True) if not gone)
        return next((t for t in left if t.tag not in ADVERBS), None)

    def noun_left(self, i: int) -> bool:
        """Whether the words that are left after the article at `i` come to a noun."""
        left = [t for t, gone in zip(self.tokens[i + 1 :], self.gone[i + 1 :], strict=True) if not gone]
        while left and (left[0].tag == "CC" or left[0].text == ","):  # about to go
            left = left[1:]
        return bool(left) and (left[0].tag in NOUNS or (begins_phrase(left[0]) and noun_ahead(left, 0)))

    def text(self, caption: str) -> str:
        """What is left, with the caption's own spaces, one at a time."""
        tokens, gone = self.tokens, self.gone
        starts = [i for i in range(len(tokens)) if not gone[i] and (i == 0 or gone[i - 1])]
        pieces: list[str] = []
        end = 0  # of what was kept last, as a place among the tokens
        for start in starts:
            next_gone = next((j for j in range(start, len(tokens)) if gone[j]), len(tokens))
            last = tokens[next_gone - 1]
            piece = caption[tokens[start].start : last.end]
            if start > end:
                piece = self.capital(end, piece)
            if last.text.lower() in A_AN and start != starts[-1]:
                piece = piece[: len(piece) - len(last.text)] + self.article(next_gone - 1)
            if pieces and self.spaced(caption, end - 1, start):
                piece = " " + piece
            pieces.append(piece)
            end = next_gone
        left = "".join(pieces).strip()
        return SPACES.sub(" ", left) if any(map(str.isalnum, left)) else ""

    def spaced(self, caption: str, before: int, start: int) -> bool:
        """Whether a space stands between the words at `before` and `start`, between which all is gone."""
        tokens, text = self.tokens, self.tokens[start].text
        closes = text in PUNCTUATION - OPENING or text[0] in "'’" or text == "n't"
        if closes and (text != '"' or self.closes_quote(start)):
            return tokens[start].start > tokens[start - 1].end
        opens = tokens[before].text in OPENING or (tokens[before].text == '"' and not self.closes_quote(before))
        gap = caption[tokens[before].end : tokens[start].start]
        return any(map(str.isspace, gap)) and not (opens and tokens[before].end == tokens[before + 1].start)

    def closes_quote(self, i: int) -> bool:
        return sum(token.text == '"' for token in self.tokens[:i]) % 2 == 1

    def capital(self, lost: int, piece: str) -> str:
        """`piece` with a capital, where that of a sentence went with the word at `lost`."""
        before = lost - 1
        while before >= 0 and not self.tokens[before].text[0].isalnum() and self.tokens[before].text not in ".!?":
            before -= 1
        at_start = before < 0 or self.tokens[before].text in ".!?"
        return piece[0].upper() + piece[1:] if at_start and self.tokens[lost].text[0].isupper() else piece

    def article(self, i: int) -> str:
        """ "a" or "an" as the word asks that it stands before now."""
        text, after = self.tokens[i].text, self.kept_after(i)
        if self.tokens[i].tag in NOUNS or after is None or not self.tokens[after].text[0].isalnum():
            return text
        said = "an" if vowel_sound(self.tokens[after].text) else "a"
        return said.capitalize() if text[0].isupper() else said


def begins_phrase(token: Token) -> bool:
    return token.tag in NOUNS | ADJECTIVES | ADVERBS | {"CD", "VBN", "VBD", "VBG"}


def vowel_sound(word: str) -> bool:
    """Whether "an" stands before a word."""
    lower = word.lower()
    if lower[0].isdigit():
        return lower[0] == "8" or lower in ("11", "18")
    if len(word) > 1 and word.isupper():  # said letter by letter: "an SUV"
        return word[0] in "AEFHILMNORSX"
    return lower.startswith(SILENT_H) or (lower[0] in "aeiou" and not lower.startswith(SOUNDS_LIKE_YOU))
