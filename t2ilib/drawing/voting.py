"""Which of two variants do people prefer? Pairs of pictures of the same prompt and noise, shown without names, and the votes on them.

Which variant stands on the left is drawn for every pair from an address (`seeds`), so a ballot is the same wherever it is opened, and neither
side tells anything. A tie is a vote too; the share is of the votes that decided. Its interval is Wilson's (1927, J. Am. Stat. Assoc. 22, 209),
which keeps its 95% also where few have voted.

Votes are kept as JSON, which `export_votes` writes and `import_votes` reads:

    {"version": 1, "kind": "t2ilib votes",
     "ballot": {"seed": 0, "prompts": ["a red heart", ...], "num_pictures": 2,
                "variants": [{"name": "lora", "settings": {DrawSettings}}, {"name": "dora", "settings": {DrawSettings}}]},
     "votes": [{"pair": 0, "prompt": "a red heart", "seed": 0, "first": 0, "left": "lora", "choice": "dora", "voter": "ann"}, ...],
     "tally": {"lora": 3, "dora": 5, "tie": 1}}

`pair`: its number in the ballot; `seed`, `first`: of its noise; `left`: the variant that stood there; `choice`: a variant's name, or "tie";
`voter`: who, "" for nobody in particular. `tally` is for people who read the file; what is counted are the votes. Importing this imports no
torch. Leaves out: more than two variants at a time, and who may vote how often.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from t2ilib.config import ConfigError, Section
from t2ilib.drawing.settings import DrawSettings
from t2ilib.runfile import describe_errors
from t2ilib.seeds import numpy_generator_for
from t2ilib.text import read_text, write_whole

VERSION, KIND = 1, "t2ilib votes"
TIE = "tie"
LEVEL = 0.95
LEFT, RIGHT = "left", "right"


class Variant(Section):
    """`settings`: the base, the adapters and how pictures are drawn; prompt, noise and number of pictures are the ballot's."""

    name: str
    settings: DrawSettings


class Ballot(Section):
    """What is voted on: `num_pictures` pairs of each prompt, drawn by both variants."""

    seed: int = 0
    prompts: tuple[str, ...]
    num_pictures: int = 1
    variants: tuple[Variant, Variant]

    @property
    def names(self) -> tuple[str, str]:
        return self.variants[0].name, self.variants[1].name

    def pairs(self) -> list["Pair"]:
        """All pairs, prompt by prompt, as they are to be shown."""
        addresses = [(prompt, number) for prompt in self.prompts for number in range(self.num_pictures)]
        return [Pair(self, pair, prompt, number) for pair, (prompt, number) in enumerate(addresses)]


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt and noise, under this number of a ballot."""

    ballot: Ballot
    number: int
    prompt: str
    first: int

    @property
    def left(self) -> str:
        """The variant that stands on the left."""
        return self.ballot.names[int(numpy_generator_for(self.ballot.seed, "side", self.number).integers(2))]

    @property
    def right(self) -> str:
        return next(name for name in self.ballot.names if name != self.left)

    def settings(self) -> tuple[DrawSettings, DrawSettings]:
        """What draws the left and the right picture. Their files would name the variants: show the pictures alone."""
        own = {variant.name: variant.settings for variant in self.ballot.variants}
        told = {"prompt": self.prompt, "seed": self.ballot.seed, "first": self.first, "num_pictures": 1}
        return own[self.left].model_copy(update=told), own[self.right].model_copy(update=told)


class Vote(Section):
    """See the module's docstring."""

    pair: int
    prompt: str
    seed: int
    first: int
    left: str
    choice: str
    voter: str = ""


@dataclass(frozen=True)
class Tally:
    """`wins`: variant -> votes for it, `ties`: votes for neither; `share`: of the decided votes, those for the first variant, None without any;
    `low`, `high`: the ends of its 95% interval."""

    names: tuple[str, str]
    wins: dict[str, int]
    ties: int
    share: float | None
    low: float | None
    high: float | None

    @property
    def shown(self) -> str | None:
        """The variant of which it is shown that people prefer it; None where the interval holds one half."""
        if self.share is None or self.low <= 0.5 <= self.high:
            return None
        return self.names[0] if self.low > 0.5 else self.names[1]

    def sentence(self) -> str:
        """What came of it, in words."""
        first, second = self.names
        ties = f"{self.ties} tie{'s' * (self.ties != 1)}"
        if self.share is None:
            return f"{first} against {second}: no vote has decided yet ({ties})"
        told = f"{self.wins[first]} of {sum(self.wins.values())} decided votes for {first}, {self.wins[second]} for {second}, {ties}: {self.share:.0%}"
        interval = f"{told} (95% interval {self.low:.0%} to {self.high:.0%})"
        return f"{interval}; {self.shown} is preferred" if self.shown else f"{interval}; no preference shown"


@dataclass
class Votes:
    """The votes on a ballot."""

    ballot: Ballot
    votes: list[Vote] = field(default_factory=list)

    def vote(self, pair: Pair, side: str, voter: str = "") -> Vote:
        """Takes a vote: `side` is "left", "right" or "tie". Who votes on a pair again changes their mind; of nobody in particular all votes count.

        Raises ConfigError for another side, and for a pair of another ballot.
        """
        if pair.ballot != self.ballot:
            raise ConfigError("this pair is of another ballot")
        choices = {LEFT: pair.left, RIGHT: pair.right, TIE: TIE}
        if side not in choices:
            raise ConfigError(f"vote {side!r}: choose {', '.join(choices)}")
        vote = Vote(
            pair=pair.number,
            prompt=pair.prompt,
            seed=self.ballot.seed,
            first=pair.first,
            left=pair.left,
            choice=choices[side],
            voter=voter,
        )
        if voter:
            self.votes = [other for other in self.votes if (other.voter, other.pair) != (voter, pair.number)]
        self.votes.append(vote)
        return vote

    def waiting(self, voter: str = "") -> list[Pair]:
        """The pairs that this voter has not voted on yet; for nobody in particular, that no one has."""
        done = {vote.pair for vote in self.votes if not voter or vote.voter == voter}
        return [pair for pair in self.ballot.pairs() if pair.number not in done]

    def tally(self) -> Tally:
        return count(self.ballot.names, (vote.choice for vote in self.votes))


def build_ballot(
    variants: tuple[tuple[str, DrawSettings], tuple[str, DrawSettings]],
    prompts: Sequence[str],
    seed: int = 0,
    num_pictures: int = 1,
) -> Ballot:
    """A ballot about two named variants. Raises ConfigError for names that are empty, alike or "tie", for no prompts, and for variants between
    which there is no difference."""
    (first, one), (second, other) = variants
    if first == second or TIE in (first, second) or not (first and second):
        raise ConfigError(f"variants {first!r} and {second!r}: give them two different names, other than {TIE!r}")
    if not prompts or num_pictures < 1:
        raise ConfigError("a ballot needs a prompt and a picture at least")
    blank = {"prompt": "", "seed": 0, "first": 0, "num_pictures": 1}
    one, other = one.model_copy(update=blank), other.model_copy(update=blank)
    if one == other:
        raise ConfigError(f"{first} and {second} are drawn alike: there is nothing to tell between them")
    named = (Variant(name=first, settings=one), Variant(name=second, settings=other))
    return Ballot(seed=seed, prompts=tuple(prompts), num_pictures=num_pictures, variants=named)


def count(names: tuple[str, str], choices: Iterable[str]) -> Tally:
    """The tally of choices, each a name or "tie"."""
    from scipy import stats

    found = Counter(choices)
    wins = {name: found[name] for name in names}
    decided = sum(wins.values())
    if not decided:
        return Tally(names, wins, found[TIE], None, None, None)
    interval = stats.binomtest(wins[names[0]], decided).proportion_ci(LEVEL, method="wilson")
    return Tally(names, wins, found[TIE], wins[names[0]] / decided, float(interval.low), float(interval.high))


def majority(choices: Sequence[str]) -> str:
    """The side that most of a pair's votes are for, of those that decided; TIE where there are as many for both."""
    counted = Counter(choice for choice in choices if choice != TIE).most_common()
    if not counted or (len(counted) > 1 and counted[0][1] == counted[1][1]):
        return TIE
    return counted[0][0]


def export_votes(votes: Votes, path: Path) -> None:
    """Writes the votes as JSON, see the module's docstring."""
    tally = votes.tally()
    content = {
        "version": VERSION,
        "kind": KIND,
        "ballot": votes.ballot.model_dump(mode="json"),
        "votes": [vote.model_dump(mode="json") for vote in votes.votes],
        "tally": {**tally.wins, TIE: tally.ties},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))


def import_votes(path: Path, ballot: Ballot | None = None) -> Votes:
    """The votes of a file. Raises ConfigError for a file that is none, for votes on other variants, prompts or noise than `ballot` (None: the
    file's own) has, and for votes that do not fit the ballot they are said to be about."""
    return votes_from(read_json(path), str(path), ballot)


def votes_from(content: dict[str, Any], path: str, ballot: Ballot | None = None) -> Votes:
    """The same of what such a file, `path`, holds."""
    try:
        told = Ballot.model_validate(content.get("ballot"))
        votes = [Vote.model_validate(vote) for vote in content.get("votes") or []]
    except ValidationError as error:
        raise describe_errors(error, path, Ballot, "the votes") from None
    if ballot is not None and told != ballot:
        raise ConfigError(f"{path} has votes on something else: {difference(told, ballot)}")
    pairs = {pair.number: pair for pair in told.pairs()}
    for number, vote in enumerate(votes):
        pair = pairs.get(vote.pair)
        fits = pair and (vote.prompt, vote.seed, vote.first, vote.left) == (
            pair.prompt,
            told.seed,
            pair.first,
            pair.left,
        )
        if not fits or vote.choice not in (*told.names, TIE):
            raise ConfigError(f"{path}: vote {number} ({vote.choice!r} on pair {vote.pair}) does not fit the ballot")
    return Votes(told, votes)


def merge_votes(votes: Votes, other: Votes) -> int:
    """Adds votes of the same ballot, and returns how many were new: those of a voter on a pair that has their vote already are passed over, and
    so is, for votes of nobody in particular, a file that was taken in before. Raises ConfigError for another ballot."""
    if other.ballot != votes.ballot:
        raise ConfigError(f"these are votes on something else: {difference(other.ballot, votes.ballot)}")
    known = {(vote.voter, vote.pair) for vote in votes.votes if vote.voter}
    named = [vote for vote in other.votes if vote.voter and (vote.voter, vote.pair) not in known]
    lacking = Counter(repr(v) for v in other.votes if not v.voter) - Counter(
        repr(v) for v in votes.votes if not v.voter
    )
    nameless = []
    for vote in other.votes:
        if not vote.voter and lacking[repr(vote)] > 0:
            lacking[repr(vote)] -= 1
            nameless.append(vote)
    votes.votes += [*named, *nameless]
    return len(named) + len(nameless)


def difference(one: Ballot, other: Ballot) -> str:
    """In what two ballots differ, and which is which."""
    if one.names != other.names:
        return f"on {' and '.join(one.names)}, not on {' and '.join(other.names)}"
    parts = [name for name in ("seed", "prompts", "num_pictures") if getattr(one, name) != getattr(other, name)]
    pairs = zip(one.variants, other.variants, strict=True)
    parts += [f"what {mine.name} is drawn with" for mine, yours in pairs if mine != yours]
    return f"{', '.join(parts)} differ{'s' * (len(parts) == 1)}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the path of a file of votes") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ConfigError(f"{path} holds no votes: take a file that was exported from a comparison")
    if content.get("version") != VERSION:
        raise ConfigError(f"{path} is of version {content.get('version')!r}, which a later t2ilib wrote: update t2ilib")
    return content
