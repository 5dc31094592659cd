"""Blind votes: sides that tell nothing, a tally with an interval that is right, and files that cannot be taken for others."""

import json
import math

import pytest

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import build_settings
from t2ilib.drawing.voting import Votes, build_ballot, count, export_votes, import_votes, merge_votes

LORA, DORA = (build_settings({"adapters": [{"path": f"results/{name}"}]}) for name in ("lora", "dora"))


def ballot_of(seed=0, prompts=("a heart", "a square"), num_pictures=2, variants=(("lora", LORA), ("dora", DORA))):
    return build_ballot(variants, prompts, seed, num_pictures)


def test_both_pictures_of_a_pair_differ_by_the_variant_alone():
    ballot = ballot_of(seed=5)
    pairs = ballot.pairs()
    assert [(pair.number, pair.prompt, pair.first) for pair in pairs] == [
        (0, "a heart", 0),
        (1, "a heart", 1),
        (2, "a square", 0),
        (3, "a square", 1),
    ]
    for pair in pairs:
        left, right = pair.settings()
        assert left.adapters != right.adapters
        assert left.without_adapters() == right.without_adapters()
        assert (left.prompt, left.seed, left.first, left.num_pictures) == (pair.prompt, 5, pair.first, 1)
        assert left.adapters[0].path == f"results/{pair.left}"
        assert right.adapters[0].path == f"results/{pair.right}"


def test_sides_are_fair_and_the_same_wherever_the_ballot_is_opened():
    ballot = ballot_of(prompts=["x"], num_pictures=2000)
    left = [pair.left for pair in ballot.pairs()]
    assert left == [pair.left for pair in ballot_of(prompts=["x"], num_pictures=2000).pairs()]
    assert abs(left.count("lora") - 1000) < 4 * math.sqrt(2000) / 2, "four standard deviations of a coin"
    assert left != [pair.left for pair in ballot_of(seed=1, prompts=["x"], num_pictures=2000).pairs()]
    turned = build_ballot((("dora", DORA), ("lora", LORA)), ["x"], 0, 2000)
    alike = sum(one == pair.left for one, pair in zip(left, turned.pairs(), strict=True))
    assert alike == 0, "the side is of the first or the second, whatever they are called"


def test_votes_are_for_what_stood_there():
    ballot = ballot_of(num_pictures=8)
    votes = Votes(ballot)
    for pair in ballot.pairs():
        votes.vote(pair, "left" if pair.left == "dora" else "right")
    votes.vote(ballot.pairs()[0], "tie")
    tally = votes.tally()
    assert (tally.wins, tally.ties, tally.share) == ({"lora": 0, "dora": 16}, 1, 0.0)
    assert tally.shown == "dora"
    assert tally.sentence().endswith("; dora is preferred")
    assert "0 of 16 decided votes for lora, 16 for dora, 1 tie: 0%" in tally.sentence()
    with pytest.raises(ConfigError, match="vote 'both': choose left, right, tie"):
        votes.vote(ballot.pairs()[0], "both")
    with pytest.raises(ConfigError, match="another ballot"):
        votes.vote(ballot_of(seed=9).pairs()[0], "left")


def test_the_interval_is_wilsons():
    """By hand, from 1927: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    z = 1.959963984540054
    for wins, losses in ((7, 3), (1, 0), (60, 40)):
        n, p = wins + losses, wins / (wins + losses)
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        tally = count(("a", "b"), ["a"] * wins + ["b"] * losses + ["tie"] * 5)
        assert (tally.low, tally.high) == pytest.approx(
            ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
        )
        assert tally.ties == 5
    assert count(("a", "b"), ["a"] * 7 + ["b"] * 3).shown is None
    assert "no preference shown" in count(("a", "b"), ["a"] * 7 + ["b"] * 3).sentence()
    assert count(("a", "b"), ["a"] * 60 + ["b"] * 40).shown == "a"
    nobody = count(("a", "b"), ["tie"])
    assert (nobody.share, nobody.low, nobody.shown) == (None, None, None)
    assert nobody.sentence() == "a against b: no vote has decided yet (1 tie)"


def test_who_votes_again_changes_their_mind_and_pairs_that_wait():
    ballot = ballot_of()
    votes, (first, second, *_) = Votes(ballot), ballot.pairs()
    votes.vote(first, "left", "ann")
    votes.vote(first, "right", "ann")
    votes.vote(first, "left", "bob")
    assert [(vote.voter, vote.choice) for vote in votes.votes] == [("ann", first.right), ("bob", first.left)]
    votes.vote(second, "tie")
    votes.vote(second, "left")
    assert len(votes.votes) == 4, "those of nobody in particular all count"
    assert [pair.number for pair in votes.waiting("ann")] == [1, 2, 3]
    assert [pair.number for pair in votes.waiting()] == [2, 3]


def voted(ballot, *voters):
    votes = Votes(ballot)
    for voter in voters:
        for pair in ballot.pairs():
            votes.vote(pair, "left", voter)
    return votes


def test_a_file_gives_the_votes_back(tmp_path):
    votes = voted(ballot_of(), "ann", "")
    export_votes(votes, tmp_path / "new" / "votes.json")
    again = import_votes(tmp_path / "new" / "votes.json", votes.ballot)
    assert again == votes
    content = json.loads((tmp_path / "new" / "votes.json").read_text())
    assert content["tally"] == {**votes.tally().wins, "tie": 0}
    assert content["ballot"]["variants"][0]["settings"]["adapters"][0]["path"] == "results/lora"
    assert content["votes"][0] == {
        "pair": 0,
        "prompt": "a heart",
        "seed": 0,
        "first": 0,
        "left": votes.ballot.pairs()[0].left,
        "choice": votes.ballot.pairs()[0].left,
        "voter": "ann",
    }


def test_taking_a_file_in_twice_counts_once():
    ballot = ballot_of()
    votes = voted(ballot, "ann")
    assert merge_votes(votes, voted(ballot, "ann", "bob", "")) == 8
    assert merge_votes(votes, voted(ballot, "ann", "bob", "")) == 0
    assert len(votes.votes) == 12
    assert merge_votes(votes, voted(ballot, "", "")) == 4, "one of two is new"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"variants": (("lora", LORA), ("full", DORA))}, "on lora and full, not on lora and dora"),
        ({"seed": 1}, "seed differs"),
        ({"prompts": ["a heart"], "num_pictures": 1}, "prompts, num_pictures differ"),
        (
            {"variants": (("lora", LORA), ("dora", DORA.changed(num_inference_steps=5)))},
            "what dora is drawn with differs",
        ),
    ],
)
def test_votes_on_something_else_are_refused(tmp_path, other, told):
    export_votes(voted(ballot_of(**other), "ann"), tmp_path / "votes.json")
    with pytest.raises(ConfigError, match=f"votes on something else: {told}"):
        import_votes(tmp_path / "votes.json", ballot_of())
    with pytest.raises(ConfigError, match=told):
        merge_votes(Votes(ballot_of()), voted(ballot_of(**other), "ann"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(kind="notes"), "holds no votes"),
        (lambda c: c.update(version=2), "a later t2ilib wrote: update"),
        (lambda c: c["votes"][0].update(choice="full"), r"vote 0 \('full' on pair 0\) does not fit the ballot"),
        (lambda c: c["votes"][1].update(pair=99), "vote 1 .* does not fit"),
        (lambda c: c["votes"][0].update(left="full"), "does not fit the ballot"),
        (lambda c: c["votes"][0].update(prompt="other"), "does not fit the ballot"),
        (lambda c: c["votes"][0].update(mood="good"), "mood: no such field"),
        (lambda c: c["ballot"].pop("variants"), "variants: Field required"),
        (lambda c: c.update(votes=[3]), "mistake"),
    ],
)
def test_files_that_were_changed_are_refused(tmp_path, change, told):
    path = tmp_path / "votes.json"
    export_votes(voted(ballot_of(), "ann"), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=told):
        import_votes(path)


def test_files_that_are_none_are_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name, told in (("a.json", "is no JSON"), ("b.json", "does not exist"), (".", "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            import_votes(tmp_path / name)


@pytest.mark.parametrize(
    ("variants", "prompts", "told"),
    [
        ((("a", LORA), ("a", DORA)), ["x"], "two different names"),
        ((("a", LORA), ("tie", DORA)), ["x"], "other than 'tie'"),
        ((("", LORA), ("b", DORA)), ["x"], "two different names"),
        ((("a", LORA), ("b", LORA.changed(prompt="y", seed=3))), ["x"], "a and b are drawn alike"),
        ((("a", LORA), ("b", DORA)), [], "needs a prompt"),
    ],
)
def test_ballots_that_decide_nothing_are_refused(variants, prompts, told):
    with pytest.raises(ConfigError, match=told):
        build_ballot(variants, prompts)
