"""TextBlob's PatternTagger: the most frequent tag of each word, from a lexicon that its wheel holds, and what the nouns and verbs lack.

In TextBlob the tagger is its lexicon of 94,000 words and rules about endings; the rules of context that lie beside the lexicon are not
applied. So a tag depends on the word alone and is looked up once a word. `TextBlob(...).tags` would split sentences with NLTK's
data; the parser that is called here needs none. Then nouns and verbs of one form ("rides", "a sink", "to swing") are told apart by their neighbours.
"""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

from t2ilib.data.tagging.sentence import ADJECTIVES, ADVERBS, BE, DETERMINERS, NOUNS, base_forms

BARE = ("VB", "VBP")
EDGES = ("top", "bottom", "upper", "lower")
STARTS_AN_OBJECT = frozenset(("DT", "PRP$", "PRP", "IN", "TO", "RB", "CD"))
BEFORE_AN_INFINITIVE = frozenset(
    ("about", "ready", "trying", "tries", "waiting", "waits", "preparing", "prepares", "going", "learning")
)


@cache
def parser():
    from textblob.en import parser

    len(parser.lexicon)  # read now: it is read at first use
    return parser


@cache
def raw_tag(word: str) -> str:
    """What PatternTagger gives for a word that stands alone."""
    return ending_ly(word) or parser().find_tags([word])[0][1]


def ending_ly(word: str) -> str | None:
    """Unknown words in -ly: from an adjective an adverb ("dazedly"), from a noun or a verb an adjective ("sparkly", "ghostly")."""
    lexicon = parser().lexicon
    if not word.endswith("ly") or not word.islower() or word in lexicon or len(word) < 5:
        return None
    stem = word[:-2]
    stems = (stem, stem[:-1] + "y" if stem.endswith("i") else stem, stem + "le", stem + "ll", stem.removesuffix("al"))
    if "-" in word or any(lexicon.get(s) in ("JJ", "VBN", "VBG", "VBD", "JJR") for s in stems):
        return None
    noun_or_verb = any(
        lexicon.get(s) in ("NN", "NNS", "VB", "VBP") for s in (stem, stem + "l", stem + "le", stem + "e")
    )
    return "JJ" if noun_or_verb else None


@cache
def first_tag(word: str) -> str:
    """The same for the first word of a sentence, whose capital says nothing: "Brown horse" is no name."""
    lower = word.lower()
    return raw_tag(lower) if lower in parser().lexicon else raw_tag(word)


@cache
def is_verb(form: str) -> bool:
    """Whether a form in -s is that of a word that the lexicon has as a verb."""
    lexicon = parser().lexicon
    return any(
        lexicon.get(base) in BARE
        or lexicon.get(base + "ing") == "VBG"
        or lexicon.get(base.removesuffix("e") + "ing") == "VBG"
        for base in base_forms(form) - {form}
    )


def tag_words(words: Sequence[str], lowered: Sequence[str]) -> list[str]:
    """Penn tags of the words of one sentence."""
    titled = len(words) > 3 and all(word[0].isupper() or not word[0].isalpha() for word in words)  # "A Black Dog Runs"
    tags = [(first_tag if titled else raw_tag)(word) for word in words]
    if words:
        tags[0] = first_tag(words[0])
    return mend(lowered, tags)


def mend(words: Sequence[str], tags: list[str]) -> list[str]:
    """Nouns and verbs of one form, by the words beside them, from left to right."""
    for i, tag in enumerate(tags):
        before, after = tags[i - 1] if i else "", tags[i + 1] if i + 1 < len(tags) else ""
        if tag == "NNS":
            subject = before == "NN" or (i and words[i - 1] in ("that", "which", "who", "he", "she", "it"))
            if subject and after in STARTS_AN_OBJECT and is_verb(words[i]):
                tags[i] = "VBZ"
        elif tag == "NN":
            if words[i].endswith("ing") and i and words[i - 1] in BE:
                tags[i] = "VBG"
            elif before == "TO" and (after in DETERMINERS or (i > 1 and words[i - 2] in BEFORE_AN_INFINITIVE)):
                tags[i] = "VB"
        elif (
            tag == "JJ"
            and before == "TO"
            and after not in NOUNS | ADJECTIVES
            and i > 1
            and words[i - 2] not in ("next", "close")
        ):
            tags[i] = "VB"  # "the doors to open"
        elif tag == "RB":
            between = before in DETERMINERS and after in NOUNS  # where no adverb stands
            if between and words[i].endswith("ly") and words[i] not in parser().lexicon:
                tags[i] = "JJ"
        elif tag in BARE:
            joined = "and" in words[max(0, i - 4) : i]
            if before in DETERMINERS or before in ADJECTIVES or before == "IN" or (before == "NN" and not joined):
                tags[i] = "NN"
        elif tag == "VBZ":
            if before in DETERMINERS or before in ADJECTIVES or before == "CD":
                tags[i] = "NNS"
        elif words[i] == "left" and (before in DETERMINERS or after == ":" or (i and words[i - 1] in EDGES)):
            tags[i] = "JJ" if after in NOUNS else "NN"
        elif tag == "VBD":
            graded = before in ADVERBS and i > 1 and (tags[i - 2] in DETERMINERS or tags[i - 2] in ADJECTIVES)
            attributive = before in DETERMINERS or before in ADJECTIVES or graded
            if attributive or (i > 1 and tags[i - 2] == "," and after in (",", "")):
                tags[i] = "VBN"
    return tags


def textblob_version() -> str:
    return version("textblob")
