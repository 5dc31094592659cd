"""Captions as an experiment: transforms by name, applied one after the other to the captions of a picture.

A transform is a pure function of the captions of one picture and a generator, which it may draw from; most change each caption,
some choose among them. What draws nothing gives the same captions at every step, so that they are edited once, before a run, by
`Captions.edit_all`. A caption of which nothing is left becomes "", stays it, and is counted by whoever asked.

Leaves out which caption of several is used at a step: without `choose`, the loader draws one. Leaves out processes: one takes 16
seconds for as many captions as COCO has, and two took no less (experiments/benchmarks/captions.py has one's figures).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from t2ilib.config import ConfigError, check_choice
from t2ilib.data.captions import dropping
from t2ilib.data.tagging import Tagger, build_tagger

if TYPE_CHECKING:
    import numpy as np

Edit = Callable[[tuple[str, ...], "np.random.Generator | None"], tuple[str, ...]]
"""The captions of one picture, and a generator for what draws -> its captions."""


def each(change: Callable[[str], str]) -> Edit:
    return lambda captions, rng: tuple(map(change, captions))


def drop(chooses: dropping.Chooses, tagger: Tagger) -> Edit:
    def change(caption: str) -> str:
        tokens = tagger.tag(caption)
        return dropping.drop(caption, tokens, [i for i in range(len(tokens)) if chooses(tokens, i)])

    return each(change)


def drop_part(part: str, argument: Any, tagger: Tagger) -> Edit:
    """Without the words of a part of speech, as the tagger sees it."""
    no_argument(f"drop_{part}", argument)
    return drop(dropping.PARTS_OF_SPEECH[part], tagger)


def drop_colors(argument: Any, tagger: Tagger) -> Edit:
    """Without the basic colour words (`COLORS`), and with them their shades ("dark blue")."""
    no_argument("drop_colors", argument)
    return drop(dropping.is_color, tagger)


def drop_words(argument: Any, tagger: Tagger) -> Edit:
    """Without the words given, in whatever case: a list, or a text of words with spaces or commas between."""
    listed = argument if isinstance(argument, list | tuple) else [argument or ""]
    words = {word for item in listed for word in str(item).lower().replace(",", " ").split()}
    if not words:
        raise ConfigError("drop_words needs the words to drop, such as drop_words: [red, green]")
    return drop(lambda tokens, i: tokens[i].text.lower() in words, tagger)


def trigger(argument: Any) -> Edit:
    """The word that is to call what is learned, before every caption."""
    word = required("trigger", argument, "the word to put before captions, such as trigger: sks")
    return each(lambda caption: f"{word} {caption}" if caption else "")


def template(argument: Any) -> Edit:
    """The caption in a sentence, such as "a photo of {caption}"."""
    text = required("template", argument, 'a sentence around {caption}, such as template: "a photo of {caption}"')
    if "{caption}" not in text:
        raise ConfigError(
            f'template {text!r} has no {{caption}}: write where it goes, such as "a photo of {{caption}}"'
        )
    return each(lambda caption: text.replace("{caption}", caption) if caption else "")


def shuffle_tags(argument: Any) -> Edit:
    """Tags with commas between, in an order drawn anew; so many of the first stay where they are (none)."""
    stay = number("shuffle_tags", 0 if argument is None else argument, 0, "how many leading tags stay")

    def change(captions: tuple[str, ...], rng: "np.random.Generator | None") -> tuple[str, ...]:
        return tuple(shuffled(caption, stay, rng) for caption in captions)

    return change


def shuffled(caption: str, stay: int, rng: "np.random.Generator | None") -> str:
    if rng is None:
        raise ValueError("shuffle_tags draws an order: give a generator")
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    return ", ".join(tags[:stay] + [tags[stay + i] for i in rng.permutation(max(0, len(tags) - stay))])


def choose(argument: Any) -> Edit:
    """One of a picture's captions: the first, longest or shortest (in characters), or by its number from 1."""
    picks: dict[str, Callable[[tuple[str, ...]], str]] = {
        "first": lambda captions: captions[0],
        "longest": lambda captions: max(captions, key=len),
        "shortest": lambda captions: min(captions, key=len),
    }
    if argument is None:
        raise ConfigError(
            f"choose needs which caption: {', '.join(picks)}, or its number from 1, such as choose: longest"
        )
    if str(argument) in picks or not str(argument).lstrip("-").isdigit():
        pick = picks[check_choice(str(argument), picks, "choose")]
    else:
        pick = partial(numbered, number("choose", argument, 1, "the number of a caption"))
    return lambda captions, rng: (pick(captions),) if captions else ()


def numbered(place: int, captions: tuple[str, ...]) -> str:
    if len(captions) < place:
        raise ConfigError(
            f"choose: {place} asks for caption {place} of a picture that has {len(captions)} ({captions[0]!r}, ...): choose first, longest"
            " or shortest, or leave the picture out"
        )
    return captions[place - 1]


def lower(argument: Any) -> Edit:
    """In lower case."""
    no_argument("lower", argument)
    return each(str.lower)


@dataclass(frozen=True)
class Kind:
    """`build`: the argument, or None, and the tagger for what needs one -> a transform; raises ConfigError."""

    build: Callable[..., Edit]
    tags: bool = False
    varies: bool = False


TRANSFORMS: dict[str, Kind] = {
    **{f"drop_{part}": Kind(partial(drop_part, part), tags=True) for part in dropping.PARTS_OF_SPEECH},
    "drop_colors": Kind(drop_colors, tags=True),
    "drop_words": Kind(drop_words, tags=True),
    "trigger": Kind(trigger),
    "template": Kind(template),
    "shuffle_tags": Kind(shuffle_tags, varies=True),
    "choose": Kind(choose),
    "lower": Kind(lower),
}


@dataclass(frozen=True)
class Captions:
    """Transforms in order. `tagger` and `version` are None where none of them needs a tagger; `varies` says whether any draws."""

    specs: tuple[tuple[str, Any], ...]
    edits: tuple[Edit, ...]
    varies: bool
    tagger: str | None
    version: str | None

    def __reduce__(self) -> tuple[Callable[..., "Captions"], tuple[Any, ...]]:
        """Pickled as what they are made of, for processes that load data."""
        return build_captions, ([{name: argument} for name, argument in self.specs], self.tagger or "pattern")

    def split(self) -> tuple["Captions", "Captions | None"]:
        """What comes before the first transform that draws, and can be done once; and that one with all after it, None where none does."""
        draws = (place for place, (name, _) in enumerate(self.specs) if TRANSFORMS[name].varies)
        first = next(draws, len(self.specs))
        before = replace(self, specs=self.specs[:first], edits=self.edits[:first], varies=False)
        after = replace(self, specs=self.specs[first:], edits=self.edits[first:])
        return before, after if after.specs else None

    def edit(self, captions: tuple[str, ...], rng: "np.random.Generator | None" = None) -> tuple[str, ...]:
        """The captions of one picture, transformed; the generator is needed where `varies`."""
        for edit in self.edits:
            captions = edit(captions, rng)
        return captions

    def edit_all(self, pictures: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """The captions of many pictures, transformed, in order; the same captions are worked on once. Raises ValueError where `varies`:
        what is drawn is drawn at each step."""
        if self.varies:
            raise ValueError("these transforms draw at every step: use edit(captions, rng)")
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        for captions in (pictures := [tuple(captions) for captions in pictures]):
            if captions not in known:
                known[captions] = self.edit(captions)
        return [known[captions] for captions in pictures]


def build_captions(specs: Sequence[str | Mapping[str, Any]], tagger: str = "pattern") -> Captions:
    """Transforms from what YAML gives, `name` or `{name: argument}`, or a command line, `name=argument`; the tagger is loaded where one
    needs it. Raises ConfigError for a wrong name or argument."""
    if isinstance(specs, str | Mapping):
        raise ConfigError(f"data.captions {specs!r} must be a list of transforms, such as [drop_adverbs, trigger: sks]")
    named = tuple(name_and_argument(spec) for spec in specs)
    kinds = [TRANSFORMS[check_choice(name, TRANSFORMS, "data.captions: the caption transform")] for name, _ in named]
    loaded = build_tagger(tagger) if any(kind.tags for kind in kinds) else None
    edits = tuple(
        kind.build(argument, loaded) if kind.tags else kind.build(argument)
        for kind, (_, argument) in zip(kinds, named, strict=True)
    )
    varies = any(kind.varies for kind in kinds)
    return Captions(named, edits, varies, tagger if loaded else None, loaded.version if loaded else None)


def name_and_argument(spec: str | Mapping[str, Any]) -> tuple[str, Any]:
    if isinstance(spec, str):
        name, equals, argument = spec.partition("=")
        return name.strip(), argument if equals else None
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, argument),) = spec.items()
        return str(name), argument
    raise ConfigError(f"data.captions: {spec!r} is no transform: write its name, or one {{name: argument}} an item")


def no_argument(name: str, argument: Any) -> None:
    if argument is not None:
        raise ConfigError(
            f"{name} takes no argument (got {argument!r}): write {name} alone; for words of your own there is drop_words"
        )


def required(name: str, argument: Any, what: str) -> str:
    if argument is None or not str(argument).strip():
        raise ConfigError(f"{name} needs {what}")
    return str(argument).strip()


def number(name: str, argument: Any, least: int, what: str) -> int:
    text = str(argument).strip()
    if isinstance(argument, bool) or not text.lstrip("-").isdigit() or int(text) < least:
        raise ConfigError(f"{name} takes a whole number, {what}, at least {least} (got {argument!r})")
    return int(text)
