"""Groups of prompts: made of trigger and class, none of them twice, and over a tiny base of the world that it knows."""

import pytest

from t2ilib.config import ConfigError
from t2ilib.config.sections import PromptGroups
from t2ilib.shapes import world
from t2ilib.shapes.models import WORDS
from t2ilib.studies.prompts import UNRELATED, make_groups

CAPTIONS = ["sks dog on a rug", "sks dog asleep"]


def test_trigger_and_class_are_in_every_prompt_that_asks_for_them_and_in_no_other() -> None:
    groups = make_groups(CAPTIONS, "sks", "dog", False)
    assert list(groups) == ["captions", "trigger", "contexts", "styles", "unrelated"]
    assert groups["captions"] == CAPTIONS
    assert groups["trigger"][0] == "a sks dog"
    assert groups["contexts"][0] == "a sks dog on a beach at sunset"
    for kind in ("trigger", "contexts", "styles"):
        assert all("sks dog" in prompt and "{" not in prompt for prompt in groups[kind])
        assert len(set(groups[kind])) == len(groups[kind]) >= 2
    assert not [prompt for prompt in groups["unrelated"] if "sks" in prompt.split() or "dog" in prompt.split()]
    assert make_groups(CAPTIONS, "<cat-toy>", None, False)["contexts"][0] == "<cat-toy> on a beach at sunset"
    assert make_groups(CAPTIONS, None, None, False).keys() == {"captions", "unrelated"}
    PromptGroups(**groups)


def test_there_are_fifty_unrelated_prompts_each_of_its_own_words() -> None:
    assert len(set(UNRELATED)) == len(UNRELATED) >= 50
    words = [frozenset(prompt.split()) - {"a", "an", "in", "on", "of", "the", "with"} for prompt in UNRELATED]
    assert all(len(one & other) <= 2 for i, one in enumerate(words) for other in words[:i])
    drawn = make_groups(CAPTIONS, "heart", None, True)["unrelated"]
    assert len(set(drawn)) == len(drawn) == 50
    tests = {world.caption(scene) for scene in world.all_scenes() if world.split_of(scene) != "validation"}
    assert not tests & set(drawn), "neither what the tiny base was trained on nor what it is tested by"


def test_a_tiny_base_is_asked_in_words_that_it_has() -> None:
    known = {
        *WORDS.split(),
        *" ".join(map(world.caption, world.all_scenes())).replace(",", "").split(),
        "very",
        "slightly",
        "strongly",
    }
    groups = make_groups(CAPTIONS, "heart", None, True)
    asked = [prompt for kind in ("trigger", "contexts", "styles", "unrelated") for prompt in groups[kind]]
    assert not {word for prompt in asked for word in prompt.replace(",", "").replace(":", "").split()} - known


@pytest.mark.parametrize(
    ("trigger", "class_word", "message"),
    [(None, "dog", "--class 'dog' says what the trigger word is one of: give --trigger too"), ("a\nb", None, "--trigger 'a.nb' is no word"), ("sks", " ", "--class ' ' is no word")],
)  # fmt: skip
def test_words_that_make_no_prompt_are_told(trigger, class_word, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_groups(CAPTIONS, trigger, class_word, False)
