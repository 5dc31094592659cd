"""What the neighbours of a word say about its part of speech: rules over the tags that a tagger gave.

A tagger without context (TextBlob's PatternTagger gives each word its most frequent tag) calls "down" an adverb in "down the street"
and a preposition in "sits down". Each rule here states a cause of that kind, for a closed class of English words, and `RULES` is their
order: the first that has an answer for a word decides. Rules see corrected tags to their left and, because verbs and nouns are
mended first, those to their right too.

What is taken for an adverb is written at the head of tests/data/test_tagging.py. Leaves out: parsing. "He saw her duck" stays open.
"""

from collections.abc import Callable, Sequence

from t2ilib.data.tagging.sentence import (
    ADJECTIVES,
    ADVERBS,
    BE,
    COLORS,
    COMPLETED,
    DETERMINERS,
    NOUNS,
    PARTICLES,
    PHRASE,
    PLACES,
    POSTURE_AND_MOTION,
    SEEM,
    VERBS,
    Sentence,
    base_forms,
    words,
)

Rule = Callable[[Sentence, int], str | None]


def particle(s: Sentence, i: int) -> str | None:
    """ "sits down" (where to) against "down the street", "holds up a sign", "lined up"."""
    word, before = s.words[i], s.before(i)
    if s.words[i + 1] == "of":
        return "IN"
    if (
        s.tags[i - 1] == "IN"
        and s.words[i - 1] in ("from", "since", "until", "to", "for")
        and s.tags[i + 1] not in PHRASE
    ):
        return "NN"
    bases = base_forms(s.words[before])
    if s.words[before] in ("close", "pick", "line", "push", "pull", "sit") and s.tags[before] in NOUNS:
        return "NN" if not s.object_ahead(i) else "IN"
    if s.object_ahead(i):
        if s.words[i - 1] == "upside":
            return "RB"
        moves = not bases.isdisjoint(POSTURE_AND_MOTION)
        return (
            "RP"
            if word in PARTICLES
            and (s.tags[i] in ("RB", "RP") or word in ("up", "out", "off"))
            and s.tags[before] in VERBS
            and not moves
            else "IN"
        )
    if not bases.isdisjoint(COMPLETED.get(word, ())):
        return "RP"
    if s.tags[before] in ("VBN", "VBD") and s.words[before].endswith(("ed", "en")):
        return "RP" if bases.isdisjoint(POSTURE_AND_MOTION) and word in PARTICLES else "RB"
    transitive = s.tags[before] in PHRASE and s.verb_before(i)
    return "RP" if transitive and word in ("up", "down", "in", "out", "on", "off", "over", "through") else "RB"


def place(s: Sentence, i: int) -> str | None:
    """ "waits outside" against "outside a shop", "the inside of a bus", "an overhead view"."""
    if s.tags[i - 1] in DETERMINERS and (s.words[i + 1] == "of" or s.tags[i + 1] not in PHRASE):
        return "NN"
    if s.tags[i - 1] in DETERMINERS | {"IN", "CD"} and s.tags[i + 1] in NOUNS | ADJECTIVES and s.noun_ahead(i):
        return "JJ" if s.tags[i - 1] != "IN" or s.words[i] in ("nearby", "overhead") else "IN"
    return particle(s, i)


def direction(s: Sentence, i: int) -> str | None:
    """ "skiing downhill" against "a downhill skier", "in downtown Chicago"."""
    verb = s.tags[s.before(i)] in VERBS
    if s.words[i] == "upright" and not verb:
        return "JJ"  # "a square, upright"
    return "JJ" if s.noun_ahead(i) and not verb else "RB"


def flat(s: Sentence, i: int) -> str | None:
    """ "runs fast", "holds its tail high", "high above the street" against "a fast train", "is high", "in high grass"."""
    before = s.tags[s.before(i)]
    if s.words[i + 1] in PARTICLES | PLACES and before in VERBS | NOUNS and not s.noun_ahead(i):
        return "RB"
    if s.noun_ahead(i) and not (before in VERBS and s.words[i - 1] not in SEEM and s.tags[i + 1] == "VBG"):
        return "JJ"
    if s.words[i - 1] in PARTICLES and s.tags[i - 1] in ADVERBS:  # "out wide"
        return "RB"
    return "RB" if s.verb_before(i) and s.tags[i - 1] not in DETERMINERS | {"IN"} else "JJ"


def straight(s: Sentence, i: int) -> str | None:
    """ "right behind", "straight into": what sharpens a preposition or an adverb; not "on the right"."""
    sharpens = s.tags[i + 1] in ADVERBS | {"IN"} or s.words[i + 1] in ("next", "near") or s.words[i + 1] in PARTICLES
    side = (
        s.words[i - 1] in ("top", "bottom", "upper", "lower", "far") or s.words[i + 2] in BE
    )  # "at the top right there is"
    if sharpens and not side and s.tags[i - 1] not in DETERMINERS | {"IN"}:
        return "RB"
    if s.words[i] == "right" and (side or s.tags[i - 1] in DETERMINERS | {"IN"}):
        return "JJ" if s.tags[i + 1] in NOUNS else "NN"
    return flat(s, i) if s.words[i] == "straight" else None


def far(s: Sentence, i: int) -> str | None:
    """ "far away", "far from" against "the far side"."""
    return "JJ" if s.tags[i - 1] in DETERMINERS else "RB"


def close(s: Sentence, i: int) -> str | None:
    """ "stand close together" against "close to" (a preposition), "a close up"."""
    if s.words[i + 1] == "to":
        return "IN"
    if s.words[i + 1] == "up" and not s.verb_before(i):
        return "NN"
    if s.words[i + 1] == "together" or s.words[i - 1] == "so":
        return "RB"
    return flat(s, i) if s.tags[i] not in VERBS or s.verb_before(i) else None


def well(s: Sentence, i: int) -> str | None:
    """ "well dressed", "swims well" against "a stone well", "as well as"."""
    if s.words[i - 1] == "as" and s.words[i + 1] == "as":
        return "CC"
    if s.tags[i + 1] in ("VBN", "VBD", "JJ"):
        return "RB"
    nominal = s.tags[i - 1] in DETERMINERS | ADJECTIVES or (s.tags[i - 1] in NOUNS and not s.verb_before(i))
    return "NN" if nominal else "RB"


def still(s: Sentence, i: int) -> str | None:
    """ "a still pond", "a still life" against "is still open", "stands still"."""
    return "JJ" if s.tags[i - 1] in DETERMINERS | {"IN"} and s.noun_ahead(i) else "RB"


def pretty(s: Sentence, i: int) -> str | None:
    """ "are pretty big" against "a pretty girl", "a pretty young girl"."""
    graded = s.tags[i + 1] in ADJECTIVES | ADVERBS
    return "RB" if graded and s.tags[i - 1] not in DETERMINERS else "JJ"


def half(s: Sentence, i: int) -> str | None:
    """ "half eaten", "half full", "all alone", "all over the floor"."""
    if s.words[i] == "all":
        follows = s.words[i + 1]
        return (
            "RB" if follows in ("alone", "together") or (follows in PARTICLES and follows not in ("in", "on")) else None
        )
    return "RB" if s.tags[i + 1] in ("VBN", "VBD") or s.words[i + 1] in ("full", "empty", "open", "asleep") else None


def wide(s: Sentence, i: int) -> str | None:
    """ "wide open"."""
    return "RB" if s.words[i + 1] in ("open", "awake", "apart") else flat(s, i)


def approximate(s: Sentence, i: int) -> str | None:
    """ "about twenty people wait" against "a book about two bears", "gathered around two cakes"."""
    if s.tags[i + 1] == "CD" and s.tags[i - 1] not in NOUNS and (s.words[i - 1] in BE or s.tags[i - 1] not in VERBS):
        return "RB"
    if s.words[i] == "about" and s.words[i + 1] == "to":
        return "IN"  # "about to swing": what is left without it is no sentence
    return particle(s, i)


def little(s: Sentence, i: int) -> str | None:
    """ "looks a little messy" against "a little red wagon"."""
    graded = s.words[i - 1] == "a" and (s.tags[i + 1] in ADJECTIVES or s.tags[i + 1] == "VBN")
    return "RB" if graded and not s.noun_ahead(i) else "JJ"


def longer(s: Sentence, i: int) -> str | None:
    """ "no longer": both of them."""
    if s.words[i] == "no":
        return "RB" if s.words[i + 1] == "longer" and not s.noun_ahead(i + 1) else None
    return "RBR" if s.tags[i - 1] in ADVERBS and s.words[i - 1] == "no" else flat(s, i)


def enough(s: Sentence, i: int) -> str | None:
    """ "big enough" against "enough food"."""
    return "RB" if s.tags[i - 1] in ADJECTIVES | ADVERBS | VERBS and s.tags[i + 1] not in NOUNS else "JJ"


def as_as(s: Sentence, i: int) -> str | None:
    """The first of "as tall as", and "as well" at an end; all other "as" are conjunctions or prepositions."""
    if s.words[i + 1] == "well" and s.words[i + 2] != "as":
        return "RB"
    graded = s.tags[i + 1] in ADJECTIVES | ADVERBS and s.words[i + 1] != "well"
    return "RB" if graded and s.words[i + 2] == "as" else "IN"


def so(s: Sentence, i: int) -> str | None:
    """ "so close", "so many" against "so he can rest"."""
    return "RB" if s.tags[i + 1] in ADJECTIVES | ADVERBS or s.words[i + 1] in ("many", "much", "few", "close") else "IN"


def very(s: Sentence, i: int) -> str | None:
    """ "the very top" against "the very large dog"."""
    edge = s.words[i + 1] in (
        "top",
        "bottom",
        "end",
        "edge",
        "back",
        "front",
        "middle",
        "center",
        "same",
        "first",
        "last",
    )
    return "JJ" if s.words[i - 1] == "the" and (edge or s.tags[i + 1] in NOUNS) else "RB"


def only(s: Sentence, i: int) -> str | None:
    """ "only one banana", "is only sitting" against "the only child", "an early morning", "her daily walk"."""
    determined = s.tags[i - 1] in DETERMINERS | ADJECTIVES | {"CD", "IN"}
    if s.words[i] == "only":
        return "JJ" if s.tags[i - 1] in DETERMINERS and s.noun_ahead(i) else "RB"
    if s.noun_ahead(i) or s.tags[i - 1] in DETERMINERS:
        return "JJ"
    return "JJ" if s.words[i - 1] in SEEM and not determined and s.tags[i + 1] not in ("IN",) else "RB"


def there(s: Sentence, i: int) -> str | None:
    """ "there is a dog", where it stands for the subject, against "sits there", "over there", "from there"."""
    if s.words[i + 1] in BE or s.words[i + 1] in (
        "appears",
        "appear",
        "seems",
        "seem",
        "has",
        "have",
        "stands",
        "hangs",
        "lies",
    ):
        return "RB" if s.words[i - 1] in ("over", "out", "up", "down", "in") else "EX"
    if s.words[i - 1] in BE and s.tags[i + 1] in PHRASE:
        return "EX"
    return "NN" if s.words[i - 1] in ("from", "in", "near") else "RB"


def more(s: Sentence, i: int) -> str | None:
    """ "more colorful", "best lit", "smiles more" against "more apples", "most of them", "the best seat"."""
    graded = s.tags[i + 1] in ADJECTIVES | ADVERBS | {"VBN", "VBD"}
    degree = "RBS" if s.words[i].endswith("st") else "RBR"
    if graded and s.words[i + 1] != "than":
        return degree
    if s.tags[i + 1] in PHRASE or s.words[i + 1] in ("of", "than"):
        return "JJS" if degree == "RBS" else "JJR"
    return degree if flat(s, i) == "RB" else "JJS" if degree == "RBS" else "JJR"


def back(s: Sentence, i: int) -> str | None:
    """ "looks back" against "in the back", "on its back", "the back wheel"."""
    if s.tags[i - 1] in DETERMINERS | ADJECTIVES | {"IN", "CD"}:
        return "JJ" if s.tags[i + 1] in NOUNS else "NN"
    return "RB"


def forward(s: Sentence, i: int) -> str | None:
    """ "leaps forward" against "a forward pass"."""
    return "JJ" if s.tags[i - 1] in DETERMINERS and s.noun_ahead(i) else "RB"


def unless_of(s: Sentence, i: int) -> str | None:
    """ "looks ahead", "stays instead" against "ahead of", "instead of", "rather than": compound prepositions."""
    return "IN" if s.words[i + 1] in ("of", "than") else "RB"


def upside(s: Sentence, i: int) -> str | None:
    """ "upside down": both of them."""
    return "RB" if s.words[i + 1] == "down" else None


def compound(s: Sentence, i: int) -> str | None:
    """ "next to": one preposition of two words."""
    return "IN" if s.words[i + 1] == "to" else None


def extra(s: Sentence, i: int) -> str | None:
    return "RB" if s.tags[i + 1] in ADJECTIVES else None


def color(s: Sentence, i: int) -> str | None:
    """ "a cyan square", "an orange cat" against "an orange": what a lexicon calls a noun, or does not know."""
    joined = s.words[i + 1] in ("and", "or", ",") and (s.words[i + 2] in COLORS or s.tags[i + 2] in ADJECTIVES)
    if s.noun_ahead(i) or (joined and s.noun_ahead(i + 2)):
        return "JJ"
    if s.words[s.before(i)] in SEEM or s.words[i - 1] in ("painted", "colored"):
        return "JJ"
    return "NN" if s.tags[i - 1] in DETERMINERS else None


def edge(s: Sentence, i: int) -> str | None:
    """ "at the top", "bottom left: a ball" against "the top shelf"."""
    return "JJ" if s.noun_ahead(i) and s.words[i + 1] not in ("left", "right") else "NN"


def always(tag: str) -> Rule:
    return lambda s, i: tag


RULES: tuple[tuple[frozenset[str], Rule, str], ...] = (
    (words("about around"), approximate, "before a number they say how nearly, not where"),
    (PARTICLES, particle, "adverb where nothing is its object, and where it does not complete its verb"),
    (PLACES, place, "the same words are adverb, preposition, noun and adjective; what stands on both sides tells"),
    (
        words(
            "downhill uphill upstairs downstairs downtown uptown indoors outdoors upright backwards backward underwater underground offshore"
            " upstream downstream inland midair sideways halfway barefoot overseas northbound southbound north south east west clockwise"
        ),
        direction,
        "adjective before a noun, otherwise where or how",
    ),
    (words("together apart aside away forth ashore aloft alone else again here not"), always("RB"), "nothing else in any place"),
    (words("forward onward outward inward upward downward"), forward, "adjective only between determiner and noun"),
    (words("ahead instead rather"), unless_of, "with of or than a preposition"),
    (words("asleep awake afloat alike apiece"), always("JJ"), "adjectives that follow their noun, which lexica call adverbs"),
    (words("today tonight tomorrow yesterday"), always("NN"), "nouns that say when (Penn Treebank)"),
    (words("how when where why"), always("WRB"), "they join clauses: without them two sentences run into one"),
    (words("back"), back, "noun after a determiner or preposition"),
    (words("still"), still, "adjective between determiner and noun"),
    (words("fast hard high low deep tight flat slow loud late short"), flat, "an adjective's form after a verb says how"),
    (words("straight right"), straight, "they sharpen prepositions"),
    (words("far"), far, "adjective after a determiner"),
    (words("close"), close, "part of 'close to' and 'close up'"),
    (words("wide"), wide, "says how open"),
    (words("well"), well, "also a noun"),
    (words("pretty"), pretty, "degree only without a determiner before it"),
    (words("half all"), half, "degree before participles"),
    (words("little"), little, "degree in 'a little messy'"),
    (words("no longer"), longer, "the two make one adverb"),
    (words("enough"), enough, "degree after what it grades"),
    (words("as"), as_as, "degree only as the first of a pair"),
    (words("so"), so, "degree before what it grades, otherwise it joins clauses"),
    (words("very"), very, "'the very top' means that one"),
    (words("only early daily weekly monthly hourly nightly yearly leisurely likely kindly"), only, "-ly words that are also adjectives"),
    (words("there"), there, "stands for the subject before be"),
    (words("more most less least best better worse worst"), more, "degree before adjectives, amount before nouns"),
    (words("too quite somewhat never ever just even also already once then now perhaps maybe"), always("RB"), "nothing else in captions"),
    (words("upside"), upside, "the two make one adverb"),
    (words("next due prior"), compound, "with to a preposition"),
    (words("extra super"), extra, "degree before adjectives"),
    (words("top bottom"), edge, "nouns where no other follows"),
    (COLORS, color, "adjectives before a noun; some are things too"),
)  # fmt: skip
"""Words, the rule for them, and why they need one."""


def index_rules() -> dict[str, tuple[Rule, ...]]:
    index: dict[str, tuple[Rule, ...]] = {}
    for covered, rule, _ in RULES:
        for word in covered:
            index[word] = (*index.get(word, ()), rule)
    return index


RULES_FOR = index_rules()


def correct(lowered: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The tags of one sentence, of words in lower case, corrected from left to right."""
    places = [i for i, word in enumerate(lowered, 1) if word in RULES_FOR]
    if not places:
        return list(tags)
    s = Sentence(["", *lowered, "", "", ""], ["", *tags, "", "", ""])
    for i in places:
        for rule in RULES_FOR[s.words[i]]:
            if (tag := rule(s, i)) is not None:
                s.tags[i] = tag
                break
    return s.tags[1:-3]
