"""What people preferred, for the report: the votes that a study's folder has, with what they show and whether measures agree.

    votes_markdown(listing(folder), {"lora": "LoRA", "dora": "DoRA"}, lambda one, other: -1)

Two intervals stand side by side where several people voted on the same pairs. The votes' takes every vote for itself, which two votes on
one pair of pictures are not; the pairs' counts each pair once, by its majority, and is the one to believe. Both are Wilson's, of the
votes that decided. Imports no torch.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from t2ilib.drawing.voting import TIE, Tally, Votes, count, majority, votes_from
from t2ilib.report.comparing import chosen
from t2ilib.report.contents import StudyReport
from t2ilib.statistics.pooled import differences
from t2ilib.studies.runs import VOTES

Verdict = Callable[[str, str], int | None]
"""Of two variants 1 where the first measured better, -1 where the second did, 0 where neither is shown, None where nobody compared them."""


@dataclass(frozen=True)
class Opinion:
    """What came of the votes on a ballot. `votes`: tally of all; `pairs`: of the pairs, each by the majority of its votes; `num_voters`;
    `agreement`: of pairs that several people decided, the share of two votes on the same pair that are for the same side; None without."""

    names: tuple[str, str]
    votes: Tally
    pairs: Tally
    num_pairs: int
    num_voters: int
    agreement: float | None

    @property
    def shown(self) -> str | None:
        """The side that is shown to be preferred, by pairs; None where neither is."""
        return self.pairs.shown


def opinion_of(votes: Votes) -> Opinion:
    """Counts the votes on a ballot."""
    by_pair: dict[int, list[str]] = defaultdict(list)
    for vote in votes.votes:
        by_pair[vote.pair].append(vote.choice)
    agreed = [both for choices in by_pair.values() if (both := agreements(choices)) is not None]
    alike, of = sum(pair[0] for pair in agreed), sum(pair[1] for pair in agreed)
    names = votes.ballot.names
    voters = {vote.voter for vote in votes.votes}
    return Opinion(
        names,
        votes.tally(),
        count(names, (majority(choices) for choices in by_pair.values())),
        len(by_pair),
        len(voters),
        alike / of if of else None,
    )


def agreements(choices: list[str]) -> tuple[int, int] | None:
    """How many twos of a pair's deciding votes are for the same side, and how many twos there are; None below two votes."""
    counted = Counter(choice for choice in choices if choice != TIE)
    total = counted.total()
    if total < 2:
        return None
    return sum(n * (n - 1) // 2 for n in counted.values()), total * (total - 1) // 2


def votes_of(report: StudyReport) -> list[Votes]:
    """All votes that a report was given, ballot by ballot."""
    told = {name: text for name, text in report.beside.items() if name.startswith(f"{VOTES}/")}
    return [votes_from(json.loads(text), str(report.folder / name)) for name, text in told.items()]


def measured_better(report: StudyReport) -> Verdict:
    """What the score by which a champion is chosen shows of two variants, judged like a table of that one question."""
    choice = chosen(report)

    def judge(one: str, other: str) -> int | None:
        values = choice.values if choice else {}
        if one not in values or other not in values:
            return None
        shown = differences(values, [(one, other)])[0].shown
        return shown and (shown if choice.metric.better == "higher" else -shown)

    return judge


def votes_markdown(
    ballots: Sequence[Votes], titles: Mapping[str, str], verdict: Verdict = lambda one, other: None
) -> str:
    """A section of the report, without its heading: a table of the ballots that people voted on and a sentence for each; "" without any.

    `titles`: variant -> what it is called; `verdict`: what was measured of two variants.
    """
    opinions = [opinion_of(votes) for votes in ballots if votes.votes]
    if not opinions:
        return ""
    rows = [
        "| Between | Votes | Can't tell | Voters | Pairs | Preferred by, of decided pairs | 95% interval | Shown |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    rows += [table_row(own, titles) for own in opinions]
    told = [sentence(own, titles, verdict) for own in opinions]
    return "\n".join(rows) + "\n\n" + "\n\n".join(told) + "\n\n" + READING


READING = (
    "People saw two pictures of the same prompt and noise, without names, of one training run each. A pair counts once, for the side that most"
    " of its votes were for; the interval is Wilson's. Nothing says that who voted sees like others do."
)


def title_of(name: str, titles: Mapping[str, str]) -> str:
    """What a side is called; "lora@400" is a variant at a step."""
    variant, at, step = name.partition("@")
    return titles.get(variant, variant) + (f", step {step}" if at else "")


def table_row(own: Opinion, titles: Mapping[str, str]) -> str:
    first, second = (title_of(name, titles) for name in own.names)
    tally, decided = own.votes, sum(own.pairs.wins.values())
    preferred = f"{first}: {own.pairs.wins[own.names[0]]} of {decided}" if decided else "none decided"
    interval = f"{own.pairs.low:.0%} to {own.pairs.high:.0%}" if decided else ""
    shown = f"{title_of(own.shown, titles)} preferred" if own.shown else "no preference shown"
    cells = (f"{first} and {second}", sum(tally.wins.values()) + tally.ties, tally.ties, own.num_voters, own.num_pairs, preferred, interval, shown)  # fmt: skip
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def sentence(own: Opinion, titles: Mapping[str, str], verdict: Verdict) -> str:
    """What the votes show, whether voters agree, and whether the measures do."""
    first, second = (title_of(name, titles) for name in own.names)
    told = f"**{first} and {second}**: "
    if own.votes.share is None:
        return told + "no vote has decided."
    told += f"of {sum(own.votes.wins.values())} decided votes {own.votes.share:.0%} are for {first} (taken one by one, 95% interval {own.votes.low:.0%} to {own.votes.high:.0%})."
    if own.agreement is not None:
        told += f" Two people who both decide on the same pair choose the same picture in {own.agreement:.0%} of cases."
    return f"{told} {agreement_with(own, verdict, first, second)}"


def agreement_with(own: Opinion, verdict: Verdict, first: str, second: str) -> str:
    measured = verdict(*own.names)
    if measured is None:
        return "What was measured says nothing of these two."
    better = {1: first, -1: second}.get(measured)
    people = {own.names[0]: first, own.names[1]: second}.get(own.shown)
    if better is None and people is None:
        return "Neither the measures nor the votes show a difference."
    if better is None:
        return f"The measures show no difference between them; people prefer {people}."
    if people is None:
        return f"The measures have {better} ahead; the votes show no preference."
    if better == people:
        return f"The measures agree: they have {better} ahead too."
    return f"**The measures disagree**: they have {better} ahead, and people prefer {people}. Believe your eyes, and look for what the measures miss."
