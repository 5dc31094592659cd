"""A sentence as the rules of `corrections` see it: words with their tags, and classes of English words that grammar knows.

Tags are those of the Penn Treebank. Leaves out trees: what belongs to what is told from the neighbours alone.
"""

from dataclasses import dataclass
from functools import lru_cache

NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))
ADJECTIVES = frozenset(("JJ", "JJR", "JJS"))
VERBS = frozenset(("VB", "VBD", "VBG", "VBN", "VBP", "VBZ"))
ADVERBS = frozenset(("RB", "RBR", "RBS"))
DETERMINERS = frozenset(("DT", "PDT", "PRP$", "WP$", "POS"))
PHRASE = NOUNS | ADJECTIVES | DETERMINERS | {"CD", "PRP"}
"""What a noun phrase is made of."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COLORS = words(
    "black white red green yellow blue brown purple pink orange gray grey"  # Berlin and Kay (1969), the eleven basic terms
    " aqua cyan fuchsia magenta lime maroon navy olive silver teal"  # what CSS 2.1's sixteen and their other names add
)
"""The basic colour words, those of the drawn world among them."""
BE = words("is are was were be been being am 's 're")
SEEM = BE | words("look looks looking looked seem seems seemed appear appears feel feels smell smells taste tastes")
PARTICLES = words("up down in out on off over around round through along by past across about")
PLACES = words("above below behind beneath underneath inside outside within aboard nearby overhead")
NEVER_BEFORE_A_NOUN = words(
    "asleep awake alive alone afloat ajar high low deep wide close flat straight still tight far late early fast"
)
POSTURE_AND_MOTION = words(
    "bend lean hunch crouch slump slouch kneel gather huddle tip fall go come walk run fly jump leap sit stand lie lay climb crawl"
    " look gaze stare peer glance float hang soar drive ride roll slide swim turn move step head swing bow squat reach"
)
"""Verbs whose particle says where or where to, even after a past participle: "hunched over", "bent down"."""
COMPLETED = {
    "up": words(
        "line curl dress set pile prop bundle wrap warm tie make close grow hook cover stack fill cut chop slice mess open light lit clean"
        " wash break hang heat dry mix show end team wake pair sign serve pick"
    ),
    "off": words("take show set cool dry finish kick tee lift pay"),
    "out": words(
        "hang wipe work make check spread stretch lay pass wear stick sell try figure turn help eat dine point"
    ),
    "in": words("plug tuck strap pitch fill join"),
    "on": words("turn carry try put go"),
    "down": words("break settle wind shut"),
    "over": words("take"),
    "through": words("follow"),
    "around": words("fool mess"),
    "along": words("get"),
}
"""Verbs that mean something else, or something finished, with the particle: what is left without it is no sentence of that meaning."""
IRREGULAR = {
    "took": "take", "taken": "take", "hung": "hang", "made": "make", "went": "go", "gone": "go", "came": "come", "bent": "bend",
    "ran": "run", "flew": "fly", "sat": "sit", "stood": "stand", "lying": "lie", "lay": "lie", "laid": "lay", "fell": "fall", "fallen": "fall",
    "rode": "ride", "swam": "swim", "swung": "swing", "grown": "grow", "grew": "grow", "worn": "wear", "wore": "wear", "woke": "wake",
    "shown": "show", "knelt": "kneel", "leant": "lean", "leapt": "leap", "tying": "tie", "broken": "break", "stuck": "stick", "sold": "sell",
    "paid": "pay", "dried": "dry", "tried": "try", "shone": "shine", "wound": "wind", "got": "get", "lit": "light",
}  # fmt: skip


@lru_cache(100_000)
def base_forms(word: str) -> frozenset[str]:
    """What a form of a verb may be a form of: "sitting" gives sitt, sitte, sit."""
    if word in IRREGULAR:
        return frozenset((IRREGULAR[word],))
    found = {word}
    for ending in ("s", "es", "ed", "d", "ing"):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            stem = word[: -len(ending)]
            found |= {stem, stem + "e"}
            if stem[-1] == stem[-2:-1]:
                found.add(stem[:-1])
            if stem.endswith("i"):
                found.add(stem[:-1] + "y")
    return frozenset(found)


@dataclass
class Sentence:
    """Words in lower case and their tags, with an end on both sides, so that every rule may look past the last one."""

    words: list[str]
    tags: list[str]

    def noun_ahead(self, i: int) -> bool:
        """Whether what follows word `i` is a noun, perhaps after adjectives and participles: "nearby table", "high old wall"."""
        j = i + 1
        while self.tags[j] in ADJECTIVES or self.tags[j] in ("CD", "VBN", "VBG"):
            j += 1
        return self.tags[j] in NOUNS

    def object_ahead(self, i: int) -> bool:
        """Whether a noun phrase begins after word `i`."""
        j = i + 1
        if self.words[j] in ("and", "or") and self.words[j + 1] in PARTICLES | PLACES:  # "in and around a barn"
            return self.object_ahead(j + 1)
        if self.words[j] in PARTICLES | PLACES and not self.noun_ahead(i):  # whose own tag is not yet corrected
            return False
        return self.tags[j] in PHRASE and self.words[j] not in NEVER_BEFORE_A_NOUN

    def before(self, i: int) -> int:
        """The place of the nearest word before `i` that is no adverb."""
        i -= 1
        while self.tags[i] in ADVERBS:
            i -= 1
        return i

    def governor(self, i: int) -> int:
        """The place of the nearest word before `i` that is neither adverb nor part of a noun phrase: a verb, a preposition, the end."""
        i -= 1
        while self.tags[i] in PHRASE or self.tags[i] in ADVERBS or self.attributive(i):
            i -= 1
        return i

    def attributive(self, i: int) -> bool:
        """Whether word `i` is a participle that stands before its noun: "a heavily loaded truck"."""
        return (
            self.tags[i] in ("VBN", "VBG", "VBD")
            and self.tags[i + 1] in NOUNS | ADJECTIVES
            and self.tags[self.before(i)] in DETERMINERS | ADJECTIVES | {"CD"}
        )

    def verb_before(self, i: int) -> bool:
        """Whether a verb other than be or seem stands before word `i`, perhaps with its object between."""
        j = self.governor(i)
        return self.tags[j] in VERBS and self.words[j] not in SEEM
