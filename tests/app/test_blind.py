"""The blind comparison in the page: what is shown tells nothing, and every vote goes to the variant that was on its side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.app import blind
from t2ilib.app.choices import BASE_ALONE
from t2ilib.app.studio import Studio
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.settings import build_settings
from t2ilib.drawing.voting import export_votes

ASKED = build_settings(
    {"prompt": "a heart", "num_pictures": 2, "num_inference_steps": 2, "guidance_scale": 2, "seed": 3}
)


@pytest.fixture(scope="module")
def studio(results, tmp_path_factory):
    studio = Studio(results, out=tmp_path_factory.mktemp("out"), desk=Desk(results, device=torch.device("cpu")))
    yield studio
    studio.close()
    assert not studio.served.exists()


def begin(results, one="cat", prompts="a heart\na square"):
    choices = [BASE_ALONE, (f"{one} (lora, rank 2)", str(results / one))]
    return blind.start(choices, str(results / one), "", prompts, ASKED, results)


@pytest.fixture(scope="module")
def drawn(results, studio):
    comparison = begin(results)
    pictures = studio.desk.draw(comparison.jobs()).pictures
    for number, picture in enumerate(pictures):
        comparison.add(number, studio.serve_bare(picture.image))
    return comparison, pictures


def test_each_side_is_drawn_by_the_variant_that_stands_there(drawn, results):
    comparison, pictures = drawn
    assert comparison.votes.ballot.names == ("cat", "the base alone")
    lefts = set()
    for pair in comparison.votes.ballot.pairs():
        left, right = pictures[2 * pair.number], pictures[2 * pair.number + 1]
        lefts.add(pair.left)
        assert [bool(picture.settings.adapters) for picture in (left, right)] == [
            pair.left == "cat",
            pair.right == "cat",
        ]
        assert (left.settings.seed, left.settings.first, left.settings.prompt) == (3, pair.first, pair.prompt)
        for shown, picture in zip(comparison.shown[pair.number], (left, right), strict=True):
            assert (np.asarray(Image.open(shown)) == np.asarray(picture.image)).all()
    assert len(lefts) == 2, "sides change from pair to pair"


def test_what_is_shown_tells_nothing(drawn, studio):
    comparison, _ = drawn
    paths = [path for pair in comparison.shown.values() for path in pair]
    assert {path.rsplit("/", 1)[1] for path in paths} == {"picture.png"}
    assert all(Image.open(path).info == {} for path in paths)
    assert b"tEXt" not in b"".join(Path(path).read_bytes() for path in paths)
    assert "cat" not in " ".join(paths).removeprefix(str(studio.served))


def test_votes_are_on_the_pair_that_is_shown(drawn, results):
    comparison = begin(results)
    comparison.shown = dict(drawn[0].shown)
    del comparison.shown[3]
    with pytest.raises(ConfigError, match="no pair to vote on"):
        comparison.vote("left", "")
    seen, votes = [], []
    while pair := comparison.next_pair("ann"):
        seen.append(pair.number)
        comparison.vote("left", "ann")
        votes.append(pair.left)
    assert seen == [0, 1, 2], "what was not drawn cannot be voted on"
    assert [vote.choice for vote in comparison.votes.votes] == votes
    assert comparison.next_pair("bob").number == 0, "another voter has all before them"
    assert comparison.progress() == "3 votes so far, on 3 pairs"
    assert "cat" not in comparison.progress()


def test_votes_go_to_a_file_and_come_back(drawn, results, tmp_path):
    mine, theirs = begin(results), begin(results)
    for comparison, voter in ((mine, "ann"), (theirs, "bob")):
        comparison.shown = dict(drawn[0].shown)
        comparison.next_pair(voter)
        comparison.vote("tie", voter)
    export_votes(theirs.votes, tmp_path / "votes.json")
    assert blind.take_votes(mine, tmp_path / "votes.json") == (mine, 1)
    assert blind.take_votes(mine, tmp_path / "votes.json")[1] == 0
    assert mine.votes.tally().ties == 2
    fresh, count = blind.take_votes(None, tmp_path / "votes.json")
    assert (count, fresh.votes.ballot, fresh.shown) == (1, theirs.votes.ballot, {})
    assert [one.prompt for one in fresh.jobs()] == [one.prompt for one in mine.jobs()], "its pairs can be drawn here"
    other = begin(results, prompts="something else")
    other.shown = {0: ("a", "b")}
    with pytest.raises(ConfigError, match="votes on something else: prompts differ"):
        blind.take_votes(other, tmp_path / "votes.json")
    (tmp_path / "bad.json").write_text(json.dumps({"kind": "pictures"}))
    with pytest.raises(ConfigError, match="holds no votes"):
        blind.take_votes(None, tmp_path / "bad.json")


def test_variants_are_called_as_in_the_list_and_drawn_over_their_base(results):
    words = begin(results, "words")
    assert {one.settings.model.base for one in words.votes.ballot.variants} == {"tiny-sd15"}
    typed = blind.start([BASE_ALONE], f"{results / 'cat'} at step 1", "", "", ASKED, results)
    assert typed.votes.ballot.names == ("cat-000001", "the base alone")
    assert typed.votes.ballot.prompts == ("a heart",)
    with pytest.raises(ConfigError, match="two different names"):
        blind.start([BASE_ALONE], "", "", "", ASKED, results)
    with pytest.raises(ConfigError, match="no adapter at nowhere"):
        blind.start([BASE_ALONE], "nowhere", "", "", ASKED, results)
    with pytest.raises(ConfigError, match="what is to be drawn"):
        blind.start([BASE_ALONE], str(results / "cat"), "", "", ASKED.changed(prompt=""), results)
