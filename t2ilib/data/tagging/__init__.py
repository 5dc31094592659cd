"""Parts of speech of captions: taggers by name, each with its version, and the place of every word in its caption.

`pattern`, the default, ships its lexicon in TextBlob's wheel. `spacy` and `nltk` are for those who have their models. Which one is used is chosen by name, never by what is installed: the same run must
give the same captions on every machine. After each of them the rules of `corrections` are applied.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from t2ilib.config import ConfigError, check_choice
from t2ilib.data.tagging.corrections import correct

TOKEN = re.compile(
    r"\w+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ll|ve|d|m)\b|\w+(?:[-&/]\w+|[.,:]\d+)*|[^\w\s]", re.IGNORECASE
)
SENTENCE_ENDS = frozenset(".!?")


class Token(NamedTuple):
    """A word or a mark, its Penn tag, and its place: `caption[start:end] == text`."""

    text: str
    tag: str
    start: int
    end: int


@dataclass(frozen=True)
class Tagger:
    """`tag_words`: the words of one sentence, as written and in lower case -> a Penn tag each."""

    name: str
    version: str
    tag_words: Callable[[Sequence[str], Sequence[str]], list[str]]

    def tag(self, caption: str) -> list[Token]:
        """The words and marks of a caption, in order."""
        found = [(m.group(), m.start(), m.end()) for m in TOKEN.finditer(caption)]
        tags: list[str] = []
        sentence: list[str] = []
        for text, _, _ in found:
            sentence.append(text)
            if text in SENTENCE_ENDS:
                tags += self.tag_sentence(sentence)
                sentence = []
        tags += self.tag_sentence(sentence)
        return [Token(text, tag, start, end) for (text, start, end), tag in zip(found, tags, strict=True)]

    def tag_sentence(self, words: list[str]) -> list[str]:
        lowered = [word.lower() for word in words]
        return correct(lowered, self.tag_words(words, lowered)) if words else []


def load_pattern(model: str | None) -> Tagger:
    from t2ilib.data.tagging import pattern

    if model is not None:
        raise ConfigError(
            f"the tagger pattern has one lexicon, which TextBlob ships, and takes no model (got {model!r})"
        )
    pattern.parser()
    return Tagger("pattern", f"textblob {pattern.textblob_version()}", pattern.tag_words)


def load_spacy(model: str | None) -> Tagger:
    name = model or "en_core_web_sm"
    try:
        import spacy
    except ImportError:
        raise ConfigError(
            "the tagger spacy needs the package spacy: pip install spacy, then python -m spacy download "
            f"{name}; or take the tagger pattern, which needs neither"
        ) from None
    try:
        nlp = spacy.load(name, disable=["parser", "ner", "lemmatizer"])
    except OSError:
        raise ConfigError(
            f"the tagger spacy needs its model {name!r}: python -m spacy download {name}; or take the tagger pattern"
        ) from None

    def tag_words(words: Sequence[str], lowered: Sequence[str]) -> list[str]:
        return [token.tag_ for token in nlp(spacy.tokens.Doc(nlp.vocab, words=list(words)))]

    return Tagger("spacy", f"spacy {spacy.__version__}, {name} {nlp.meta['version']}", tag_words)


def load_nltk(model: str | None) -> Tagger:
    if model is not None:
        raise ConfigError(
            f"the tagger nltk has one model, averaged_perceptron_tagger_eng, and takes none (got {model!r})"
        )
    try:
        import nltk
    except ImportError:
        raise ConfigError("the tagger nltk needs the package nltk: pip install nltk") from None
    try:
        nltk.pos_tag(["a"])
    except LookupError:
        raise ConfigError(
            "the tagger nltk needs its model: python -m nltk.downloader averaged_perceptron_tagger_eng; or take the tagger pattern"
        ) from None
    return Tagger(
        "nltk",
        f"nltk {nltk.__version__}, averaged_perceptron_tagger_eng",
        lambda words, lowered: [tag for _, tag in nltk.pos_tag(list(words))],
    )


TAGGERS: dict[str, Callable[[str | None], Tagger]] = {"pattern": load_pattern, "spacy": load_spacy, "nltk": load_nltk}


def build_tagger(spec: str) -> Tagger:
    """The tagger `name` or `name=model`, such as `spacy=en_core_web_md`; raises ConfigError for a wrong name or what is missing."""
    name, _, model = spec.partition("=")
    return TAGGERS[check_choice(name, TAGGERS, "the tagger")](model or None)
