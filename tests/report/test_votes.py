"""What people preferred, in the report: pairs count once, voters agree as they do, and measures are held against it."""

import itertools

import pytest

from t2ilib.drawing.settings import build_settings
from t2ilib.drawing.voting import Votes, build_ballot, count, export_votes, majority
from t2ilib.report.balloting import listing
from t2ilib.report.votes import agreements, opinion_of, votes_markdown

LORA, DORA = (build_settings({"adapters": [{"path": f"results/{name}"}]}) for name in ("lora", "dora"))
TITLES = {"lora": "LoRA", "dora": "Do|RA"}


def voted(choices_by_voter, names=("lora", "dora")):
    most = max(map(len, choices_by_voter.values()))
    ballot = build_ballot(((names[0], LORA), (names[1], DORA)), ["x"], num_pictures=most)
    votes = Votes(ballot)
    for voter, choices in choices_by_voter.items():
        for pair, choice in zip(ballot.pairs(), choices, strict=False):
            votes.vote(pair, {"tie": "tie", pair.left: "left"}.get(choice, "right"), voter)
    return votes


def write(folder, votes, name="one"):
    export_votes(votes, folder / "votes" / f"{name}.json")
    return folder


def test_a_pair_counts_once_however_many_vote_on_it():
    own = opinion_of(voted({f"voter{i}": ["lora"] * 6 for i in range(5)}))
    expected = count(("lora", "dora"), ["lora"] * 6)
    assert (own.pairs.low, own.pairs.high) == (expected.low, expected.high)
    assert own.votes.low > own.pairs.low
    assert (own.num_voters, own.num_pairs, own.agreement) == (5, 6, 1.0)


def test_majorities_and_agreement_are_counted():
    assert majority(["a", "a", "b", "tie"]) == "a"
    assert majority(["a", "b"]) == majority(["tie"]) == majority([]) == "tie"
    for choices in (["a", "a", "b"], ["a", "b", "b", "b"], ["a", "a"]):
        twos = list(itertools.combinations(choices, 2))
        assert agreements(choices) == (sum(one == other for one, other in twos), len(twos))
    assert agreements(["a", "tie"]) is None


@pytest.mark.parametrize(
    ("choices", "measured", "told"),
    [
        (["lora"] * 10, 1, "The measures agree: they have LoRA ahead too"),
        (["lora"] * 10, -1, "The measures disagree"),
        (["lora"] * 10, 0, "people prefer LoRA"),
        (["lora", "dora"] * 5, 1, "The measures have LoRA ahead; the votes show no preference"),
        (["lora", "dora"] * 5, 0, "Neither the measures nor the votes"),
        (["lora"] * 10, None, "says nothing of these two"),
    ],
)
def test_measures_are_held_against_the_votes(tmp_path, choices, measured, told):
    text = votes_markdown(listing(write(tmp_path, voted({"ann": choices}))), TITLES, lambda one, other: measured)
    assert told in text


def test_the_table_says_who_voted_on_what(tmp_path):
    write(tmp_path, voted({"ann": ["lora"] * 8 + ["tie"], "bob": ["lora"] * 7 + ["dora"]}))
    write(tmp_path, voted({"ann": ["tie"]}, ("lora", "dora@40")), "two")
    write(tmp_path, voted({"ann": ["lora"]}, ("dora", "lora")), "three")
    text = votes_markdown(listing(tmp_path), TITLES)
    rows = [line.replace("\\|", "¦").split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {8}
    told = next(row for row in rows if "LoRA and Do¦RA " in row[0] and "17" in row[1])
    assert [cell.strip() for cell in told[1:7]] == ["17", "1", "2", "9", "LoRA: 7 of 7", "65% to 100%"]
    assert "Do|RA, step 40" in text
    assert "no vote has decided" in text
    assert "choose the same picture in 88% of cases" in text


def test_without_votes_there_is_no_section(tmp_path):
    assert votes_markdown(listing(tmp_path), TITLES) == ""
    write(tmp_path, Votes(build_ballot((("lora", LORA), ("dora", DORA)), ["x"])))
    assert votes_markdown(listing(tmp_path), TITLES) == ""
