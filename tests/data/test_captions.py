import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.data.captions import TRANSFORMS, build_captions
from t2ilib.data.tagging.sentence import COLORS
from t2ilib.seeds import numpy_generator_for
from t2ilib.shapes import world

LABELLED = [json.loads(line)["caption"] for line in (Path(__file__).parent / "adverbs.jsonl").read_text().splitlines()]
PARTS = [name for name in TRANSFORMS if name.startswith("drop_") and name != "drop_words"]


def edited(caption, *specs, rng=None):
    (text,) = build_captions(specs).edit((caption,), rng)
    return text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A man is slowly riding a horse.", "A man is riding a horse."),
        ("An extremely large dog sleeps", "A large dog sleeps"),
        ("A slightly open door", "An open door"),
        ("A very old SUV", "An old SUV"),
        ("Very old trucks, very rusty, in a field", "Old trucks, rusty, in a field"),
        ("A train moves quickly , smoothly and quietly through a tunnel .", "A train moves through a tunnel ."),
        ("A couple dances again and again.", "A couple dances."),
        ("A man stops and then crosses the road", "A man stops and crosses the road"),
        ("A man, slowly, walks.", "A man walks."),
        ("A boy runs, slowly.", "A boy runs."),
        ("Outside, two men dig", "Two men dig"),
        ("Slowly a man walks. Then he sits down.", "A man walks. He sits."),
        ("The room looks a little messy with toys", "The room looks messy with toys"),
        ("A boy (slowly) eats", "A boy eats"),
        ('A sign says "very good" twice', 'A sign says "good"'),
        ("A man isn't looking", "A man isn't looking"),
        ("Quickly.", ""),
        ("", ""),
        ("two  spaces, and nothing to drop ,", "two  spaces, and nothing to drop ,"),
        ("two  spaces, slowly  walking", "two spaces, walking"),
        ("Emily’s dog sits quietly on an old, friendly man’s lap", "Emily’s dog sits on an old, friendly man’s lap"),
    ],
)
def test_adverbs_leave_a_sentence(before, after):
    assert edited(before, "drop_adverbs") == after


@pytest.mark.parametrize(
    ("transform", "before", "after"),
    [
        ("drop_adjectives", "a very red ball", "a ball"),
        ("drop_adjectives", "a red and green ball", "a ball"),
        ("drop_adjectives", "An old, rusty, very big truck", "A truck"),
        ("drop_adjectives", "The bus is red and very shiny.", "The bus."),
        ("drop_adjectives", "A horse, seemingly tired, rests", "A horse rests"),
        ("drop_adjectives", "A table full of food", "A table of food"),
        ("drop_adjectives", "a dog and a cat", "a dog and a cat"),
        ("drop_nouns", "a dog on a mat", ""),
        ("drop_nouns", "A man rides a red bike on the street.", "Rides a red."),
        ("drop_verbs", "A man is slowly riding a parked bike", "A man a parked bike"),
        ("drop_verbs", "A dog sits down to eat a bone", "A dog a bone"),
        ("drop_prepositions", "A dog on a mat in the sun", "A dog a mat the sun"),
        ("drop_determiners", "The dog on an old mat", "Dog on old mat"),
        ("drop_numerals", "About twenty dogs and 3 cats", "Dogs and cats"),
        ("drop_numerals", "Two of the dogs", "The dogs"),
        ("drop_pronouns", "A man and his dog next to him.", "A man and dog."),
        ("drop_conjunctions", "A man and a dog wait while it rains", "A man a dog wait it rains"),
        ("drop_colors", "A dark blue car and an orange cat", "A car and a cat"),
        ("drop_colors", "an orange and a kiwi", "an orange and a kiwi"),
        ("drop_colors", "The bus is red and very shiny.", "The bus is very shiny."),
        ("drop_colors", "a black and white photo", "a photo"),
        ("drop_colors", "a blue-green vase", "a vase"),
        ("drop_words=red, Ball", "a red ball and a RED cube", "a cube"),
        ("drop_words=red", "a red and white ball", "a white ball"),
        ("drop_words=white", "three red and white balls", "three red balls"),
        ("drop_words=huge", "a huge apple", "an apple"),
        ("drop_words=huge", "a huge unicorn", "a unicorn"),
        ("trigger=sks", "a dog", "sks a dog"),
        ("trigger=sks", "", ""),
        ("template=a photo of {caption}, {x}", "a dog", "a photo of a dog, {x}"),
        ("lower", "A Dog", "a dog"),
    ],
)  # fmt: skip
def test_transforms_by_value(transform, before, after):
    assert edited(before, transform) == after


@pytest.mark.parametrize("name", PARTS)
def test_what_is_left_is_clean_and_was_there(name):
    """Nothing but what was there, in order, and the spelling of a sentence: checked without a tagger."""
    captions = build_captions([name])
    for caption in LABELLED:
        (left,) = captions.edit((caption,))
        assert "  " not in left
        assert left == left.strip()
        assert not re.search(r"^\W|,\s*[,.]|,$|\(\s*\)|[(]\s", left), (caption, left)
        assert " ," not in left or " ," in caption
        words = iter(["a" if word == "an" else word for word in re.findall(r"\w+", caption.lower())])
        assert all(("a" if word == "an" else word) in words for word in re.findall(r"\w+", left.lower()))
        if caption[0].isupper() and left:
            assert left[0].isupper() or not left[0].isalpha()


@pytest.mark.parametrize("concept", [None, *world.CONCEPTS])
def test_sentences_of_the_drawn_world(concept):
    """What is left of them is what the world's own grammar says without those words."""
    adverbs, colors = build_captions(["drop_adverbs"]), build_captions(["drop_colors"])
    for scene in world.sample_scenes(40, "train", 0, concept):
        for phrasing in range(len(world.SOLID_PHRASES)):
            caption = world.caption(scene, phrasing)
            expected = re.sub(r"\b(very|slightly|strongly) ", "", caption)
            assert adverbs.edit((caption,)) == (expected,)
            without = re.sub(rf"\b({'|'.join((*world.COLORS, *world.BACKGROUNDS))}) ", "", caption)
            without = re.sub(r"\ba (?=upright)", "an ", without)
            assert colors.edit((caption,)) == (without,)


def test_adjectives_of_the_drawn_world():
    scene = world.Scene("square", "red", "very small", "top left", "white", "slightly tilted")
    assert [edited(world.caption(scene, phrasing), "drop_adjectives") for phrasing in range(4)] == [
        "a square at the top left on a background",
        "a square, at the top left, background",
        "background, top left: a square",
        "on a background at the top left there is a square",
    ]
    heart = world.Scene("heart", "cyan", "large", "bottom", "black", "upright")
    assert edited(world.caption(heart, 0), "drop_adjectives") == "a heart at the bottom on a background"
    striped = world.Scene("circle", "", "large", "right", "grey", "", fill="striped")
    assert edited(world.caption(striped, 0), "drop_adjectives") == "a circle at the right on a background"


def test_the_worlds_colors_are_colors():
    assert {*world.COLORS, *world.BACKGROUNDS} <= COLORS


def test_order_is_that_of_the_list():
    assert edited("Dog", {"template": "a big {caption}"}, "drop_adjectives", {"trigger": "Zz"}, "lower") == "zz a dog"
    assert (
        edited("Dog", "lower", {"trigger": "Zz"}, "drop_adjectives", {"template": "a big {caption}"}) == "a big Zz dog"
    )


def test_choosing_among_captions():
    captions = ("a dog", "a big brown dog", "dog")
    for asked, expected in {
        "first": "a dog",
        "longest": "a big brown dog",
        "shortest": "dog",
        2: "a big brown dog",
        "3": "dog",
    }.items():
        assert build_captions([{"choose": asked}]).edit(captions) == (expected,)
    assert build_captions(["choose=first"]).edit(()) == ()
    assert build_captions(["lower"]).edit(("A", "B")) == ("a", "b")
    with pytest.raises(ConfigError, match=r"asks for caption 4 of a picture that has 3 \('a dog'"):
        build_captions([{"choose": 4}]).edit(captions)


def test_tags_are_shuffled_by_address_alone():
    captions = build_captions([{"shuffle_tags": 2}])
    tags = "zz, girl, red hair, hat,, smile , rain"
    assert captions.varies
    drawn = [captions.edit((tags,), numpy_generator_for(0, "captions", step, 7))[0] for step in range(40)]
    again = [captions.edit((tags,), numpy_generator_for(0, "captions", step, 7))[0] for step in reversed(range(40))]
    assert drawn == again[::-1]
    assert all(text.startswith("zz, girl, ") for text in drawn)
    assert {tuple(sorted(text.split(", "))) for text in drawn} == {("girl", "hat", "rain", "red hair", "smile", "zz")}
    assert len(set(drawn)) > 12  # of 24 orders
    order = np.random.default_rng(3).permutation(3)
    assert build_captions(["shuffle_tags"]).edit(("a,b,c",), np.random.default_rng(3)) == (
        ", ".join("abc"[i] for i in order),
    )
    with pytest.raises(ValueError, match="give a generator"):
        captions.edit((tags,))
    with pytest.raises(ValueError, match="draw at every step"):
        captions.edit_all([(tags,)])


def test_what_does_not_vary_needs_no_generator_and_says_its_tagger():
    plain, tagged = build_captions(["lower"]), build_captions(["lower", "drop_colors"])
    assert (plain.varies, plain.tagger, plain.version) == (False, None, None)
    assert (tagged.varies, tagged.tagger) == (False, "pattern")
    assert tagged.version.startswith("textblob ")
    assert build_captions([]).edit(("As it is ",)) == ("As it is ",)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("drop_adverb", "data.captions: the caption transform 'drop_adverb' does not exist; choose from .*Did you mean 'drop_adverbs'"),
        ({"drop_adverbs": "very"}, "drop_adverbs takes no argument"),
        ({"lower": True}, "lower takes no argument"),
        ("drop_words", "drop_words needs the words"),
        ({"drop_words": []}, "drop_words needs the words"),
        ("trigger", "trigger needs the word"),
        ("trigger= ", "trigger needs the word"),
        ("template", "template needs a sentence"),
        ("template=a photo", r"has no \{caption\}"),
        ("shuffle_tags=-1", "at least 0"),
        ({"shuffle_tags": True}, "takes a whole number"),
        ({"shuffle_tags": 1.5}, "takes a whole number"),
        ("choose", "choose needs which caption: first, longest, shortest"),
        ("choose=last", "choose 'last' does not exist; choose from first, longest, shortest"),
        ("choose=0", "at least 1"),
        ({"lower": None, "trigger": "x"}, "one {name: argument} an item"),
        (3, "is no transform"),
    ],
)  # fmt: skip
def test_mistakes_are_told(spec, told):
    with pytest.raises(ConfigError, match=told):
        build_captions([spec])


def test_a_list_is_asked_for():
    with pytest.raises(ConfigError, match="must be a list"):
        build_captions("drop_adverbs")


def test_many_are_edited_in_order_and_the_same_once(monkeypatch):
    captions = build_captions(["drop_adverbs", {"drop_words": ["red", "blue"]}, {"choose": 2}])
    pictures = [
        (f"{i}", f"A very naïve {color} dog – number {i}") for i in range(25) for color in ("red", "blue", "green")
    ]
    edited = captions.edit_all(pictures * 2)
    assert edited[:3] == [("A naïve dog – number 0",)] * 2 + [("A naïve green dog – number 0",)]
    assert edited == [captions.edit(picture) for picture in pictures] * 2
    asked = []
    monkeypatch.setattr(type(captions), "edit", lambda self, captions: asked.append(captions) or captions)
    captions.edit_all(pictures * 2)
    assert asked == pictures


def test_transforms_can_be_handed_to_another_process():
    captions = pickle.loads(pickle.dumps(build_captions(["drop_colors", {"trigger": "zz"}])))
    assert captions.edit(("a red dog",)) == ("zz a dog",)
    assert captions.specs == (("drop_colors", None), ("trigger", "zz"))


def command(*arguments, data=b""):
    return CliRunner().invoke(app, ["data", "captions", *arguments], input=data)


def test_the_command_gives_a_line_for_a_line():
    ran = command(
        "drop_adverbs", "template=a photo of {caption}", data=b"A very red ball\r\n\nQuickly.\n\xc3\xa9clair slowly"
    )
    assert ran.exit_code == 0
    assert ran.stdout == "a photo of A red ball\n\n\na photo of éclair\n"
    assert command("lower", data=b"").stdout == ""
    assert command("lower", data=b"\xef\xbb\xbfA\nB\x0bC\xe2\x80\xa8D\n").stdout == "a\nb\x0bc\u2028d\n"


def test_the_command_draws_by_seed_and_line():
    data = b"a, b, c, d, e\n" * 20
    runs = [command("shuffle_tags=1", "--seed", seed, data=data).stdout for seed in ("4", "4", "5")]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0].splitlines())) > 5
    assert all(line.startswith("a, ") for line in runs[0].splitlines())


@pytest.mark.parametrize(
    ("arguments", "data", "told"),
    [
        (["drop_adverb"], b"a", "Did you mean 'drop_adverbs'"),
        (["drop_nouns", "--tagger", "patern"], b"a", "the tagger 'patern' does not exist"),
        (["lower"], b"one\ntwo\ncaf\xe9\n", "line 3 of standard input: byte 3 (0xe9) is not UTF-8"),
        (["lower"], b"one\nt\0w\0o\0\n", "line 2 of standard input holds a zero byte"),
    ],
)
def test_the_command_tells_mistakes(arguments, data, told):
    ran = command(*arguments, data=data)
    assert ran.exit_code == 2
    assert told in ran.stderr
    assert "Traceback" not in ran.output


def test_the_command_ends_quietly_when_nobody_reads(tmp_path):
    """As in `t2ilib data captions lower < captions.txt | head -1`."""
    (tmp_path / "captions.txt").write_text("A dog runs.\n" * 100_000)
    code = "import sys; from t2ilib.cli import app; app()"
    with (tmp_path / "captions.txt").open() as lines:
        ran = subprocess.Popen(
            [sys.executable, "-c", code, "data", "captions", "lower"],
            stdin=lines,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert ran.stdout.readline() == b"a dog runs.\n"
    ran.stdout.close()
    assert b"Traceback" not in ran.stderr.read()
    ran.stderr.close()
    assert ran.wait() == 141
