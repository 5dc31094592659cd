"""Two variants compared without their names: what is drawn, what is shown next, and what came of it (`drawing.voting`).

While votes are open nothing that is shown, no file and no name tells which variant is which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2ilib.app.asking import prompts_of
from t2ilib.app.choices import BASE_ALONE, Choice, read_adapter
from t2ilib.config import ConfigError, ModelConfig
from t2ilib.drawing.finding import base_of
from t2ilib.drawing.infotext import shown_name
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.drawing.voting import Ballot, Pair, Votes, build_ballot, import_votes, merge_votes


@dataclass
class Comparison:
    """`shown`: number of a pair -> its pictures, left and right, as far as they were drawn; `pair`: what is voted on now."""

    votes: Votes
    shown: dict[int, tuple[str, str]] = field(default_factory=dict)
    left: str | None = None
    pair: Pair | None = None

    def add(self, number: int, picture: str) -> None:
        """Takes in picture `number` of all that `jobs` draw."""
        if number % 2 == 0:
            self.left = picture
        else:
            self.shown[number // 2] = (self.left, picture)

    def jobs(self) -> list[DrawSettings]:
        """What is drawn: of every pair the left picture, then the right."""
        return [settings for pair in self.votes.ballot.pairs() for settings in pair.settings()]

    def next_pair(self, voter: str) -> Pair | None:
        """The first pair that was drawn and this voter has not voted on; also what `vote` is about from now on."""
        waiting = (pair for pair in self.votes.waiting(voter) if pair.number in self.shown)
        self.pair = next(waiting, None)
        return self.pair

    def vote(self, side: str, voter: str) -> None:
        """Takes a vote on the pair that is shown. Raises ConfigError where none is."""
        if self.pair is None:
            raise ConfigError("there is no pair to vote on: draw some first")
        self.votes.vote(self.pair, side, voter)

    def progress(self) -> str:
        """How far the voting is, without telling how it stands."""
        count = len(self.votes.votes)
        return f"{count} vote{'s' * (count != 1)} so far, on {len(self.shown)} pairs"


def start(
    choices: Sequence[Choice], one: str, other: str, prompts: str, settings: DrawSettings, results: Path
) -> Comparison:
    """A comparison of two adapters as the page has them, "" for the base alone; each is drawn over its run's base.

    `choices`: what they are called in the page. Raises ConfigError for variants that are alike, and prompts that differ in nothing.
    """
    plain = settings.changed(adapters=())
    named = [variant(text, choices, plain, results) for text in (one, other)]
    base = next((own for _, _, own in named if own is not None), plain.model)
    chosen = tuple((name, one.changed(model=(own or base).model_dump())) for name, one, own in named)
    lines = [job.prompt for job in prompts_of(prompts, plain)]
    if not any(lines):
        raise ConfigError("what is to be drawn? Write prompts, one a line, or a prompt among the settings")
    ballot = build_ballot(chosen, tuple(dict.fromkeys(lines)), plain.seed, plain.num_pictures)
    return Comparison(Votes(ballot))


def variant(
    text: str, choices: Sequence[Choice], settings: DrawSettings, results: Path
) -> tuple[str, DrawSettings, ModelConfig | None]:
    """Name, settings and, of an adapter whose run says so, the base of a variant."""
    if not text:
        return BASE_ALONE[0], settings, None
    own = settings.changed(adapters=[read_adapter(text)])
    labels = {value: label.partition(" (")[0] for label, value in choices}
    name = labels.get(text) or shown_name(own.adapters[0])
    return name, own, base_of(AdapterChoice.model_validate(read_adapter(text)), results)


def take_votes(comparison: Comparison | None, file: Path) -> tuple[Comparison, int]:
    """A comparison with the votes of a file, and how many were new. Without one, or without a picture drawn for it, it is the file's own.

    Raises ConfigError for a file that is none, and votes on something else than what is being voted on.
    """
    if comparison is None or not comparison.shown:
        votes = import_votes(file)
        return Comparison(votes), len(votes.votes)
    return comparison, merge_votes(comparison.votes, import_votes(file, comparison.votes.ballot))


def told_result(ballot: Ballot, sentence: str) -> str:
    """What came of the votes, with what they are about."""
    count = len(ballot.prompts) * ballot.num_pictures
    return f"{sentence}\n{count} pair{'s' * (count != 1)}: {'; '.join(ballot.prompts)}"
