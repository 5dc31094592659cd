"""Axes: values as A1111's X/Y/Z plot takes them, and what they change."""

import pytest

from t2ilib.config import ConfigError
from t2ilib.drawing.axes import EXAMPLES, KINDS, parse_axis, parse_values
from t2ilib.drawing.settings import build_settings

CAT = {"path": "results/cat", "strength": 0.5, "step": 100}
SETTINGS = build_settings({"prompt": "a cat on a mat", "negative_prompt": "no cat", "adapters": [CAT, {"path": "ink"}]})


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        ("steps", "10, 20,40", [10, 20, 40]),
        ("steps", "1-5", [1, 2, 3, 4, 5]),
        ("steps", "1-10 (+2)", [1, 3, 5, 7, 9]),
        ("steps", "10-1 (-3)", [10, 7, 4, 1]),
        ("steps", "1-10 [5]", [1, 3, 5, 7, 10]),
        ("steps", "1-3, 10 - 12, 20", [1, 2, 3, 10, 11, 12, 20]),
        ("strength", "0-1 [5]", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("strength", "0-1 (+0.1)", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("strength", "0-1 (+0.3)", [0.0, 0.3, 0.6, 0.9]),
        ("strength", "-1-1 [3]", [-1.0, 0.0, 1.0]),
        ("strength", "-.5, 1e-1", [-0.5, 0.1]),
        ("guidance", "1-3", [1.0, 2.0, 3.0]),
        ("guidance", "7 [1]", None),
        ("checkpoint", "100-300 (+100), last", [100, 200, 300, None]),
        ("prompt", 'cat, "a dog, asleep", "say ""hi"""', ["cat", "a dog, asleep", 'say "hi"']),
        ("prompt", "cat\ndog", ["cat", "dog"]),
        ("prompt", "1-3", ["1-3"]),
        ("adapter", "none, results/cat", ["none", "results/cat"]),
        ("sampler", "Euler a, DDIM", ["Euler a", "DDIM"]),
        ("seed", "5-5", [5]),
    ],
)
def test_values_are_what_people_mean(kind, text, values):
    if values is None:
        with pytest.raises(ConfigError, match=f"axis {kind}: {text[:1]}|no value"):
            parse_values(kind, text)
    else:
        assert parse_values(kind, text) == values


def test_random_seeds_are_settled_when_they_are_read():
    axis = parse_axis("seed: random, -1, 3")
    assert len(axis.values) == 3
    assert axis.values[2] == 3
    assert len(set(axis.values)) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("strength", r"axis 'strength': write what changes and its values, such as 'strength: 0-1 \[5\]'"),
        ("stren: 1", r"axis 'stren' does not exist; choose from prompt, .*Did you mean 'strength'"),
        ("seed: ", r"axis seed has no values: write some, such as '1-4'"),
        ("seed: ,,", r"axis seed has no values"),
        ("seed: a", r"axis seed: 'a' is no value of it"),
        ("steps: 1.5", r"axis steps: '1.5' is no value of it"),
        ("seed: 5-1", r"'5-1' never gets from 5 to 1: write \(\+2\), or \(-2\) for a range that falls"),
        ("seed: 1-5 (+0)", r"never gets from"),
        ("seed: 1-1000000", r"is 1000000 values: take at most 200"),
        ("strength: 0-1 (+0.0000001)", r"values: take at most 200"),
        ("strength: 0-1 [100000]", r"asks for 100000 values: ask for 1 to 200"),
        ("strength: 0-1 [0]", r"ask for 1 to 200"),
        ("seed 2: 1", r"seed 2 counts adapters, and seed is not about them"),
        ("strength 0: 1", r"adapters are counted from 1"),
        ('prompt: "cat, dog', r"unexpected end of data; a quote in a quoted value is written twice"),
    ],
)
def test_what_is_no_axis_is_told(text, told):
    with pytest.raises(ConfigError, match=told):
        parse_axis(text)


def test_examples_are_axes():
    assert EXAMPLES.keys() == KINDS.keys()
    for name, example in EXAMPLES.items():
        axis = parse_axis(f"{name}: {example}")
        assert len(axis.labels()) == len(axis.values) > 1


def test_words_are_sought_and_replaced_in_both_prompts():
    changed = parse_axis("prompt: cat, dog").applied(SETTINGS)
    assert [(one.prompt, one.negative_prompt) for one in changed] == [
        ("a cat on a mat", "no cat"),
        ("a dog on a mat", "no dog"),
    ]
    with pytest.raises(
        ConfigError, match="'bird', its first value, is neither in the prompt nor in the negative prompt"
    ):
        parse_axis("prompt: bird, dog").applied(SETTINGS)
    whole = parse_axis("prompt: a cat, a dog").applied(SETTINGS.changed(prompt=""))
    assert [one.prompt for one in whole] == ["a cat", "a dog"]


def test_adapters_their_strengths_and_steps():
    taken = parse_axis("adapter: none, other").applied(SETTINGS)
    assert [[(a.path, a.strength, a.step) for a in one.adapters] for one in taken] == [
        [("ink", 1.0, None)],
        [("other", 0.5, None), ("ink", 1.0, None)],
    ]
    second = parse_axis("adapter 2: none, other").applied(SETTINGS)
    assert [[a.path for a in one.adapters] for one in second] == [["results/cat"], ["results/cat", "other"]]
    third = parse_axis("adapter 3: other").applied(SETTINGS)
    assert [a.path for a in third[0].adapters] == ["results/cat", "ink", "other"]
    weighed = parse_axis("strength 2: 0.25").applied(SETTINGS)[0]
    assert [a.strength for a in weighed.adapters] == [0.5, 0.25]
    stepped = parse_axis("checkpoint: 7, last").applied(SETTINGS)
    assert [one.adapters[0].step for one in stepped] == [7, None]
    for text in ("strength 3: 1", "checkpoint 3: 1"):
        with pytest.raises(ConfigError, match="there is no adapter number 3; the settings have 2"):
            parse_axis(text).applied(SETTINGS)


def test_fields_are_checked_as_settings_are():
    assert [one.sampler for one in parse_axis("sampler: euler a, plms").applied(SETTINGS)] == ["Euler a", "PNDM"]
    with pytest.raises(ConfigError, match="sampler: 'foo' does not exist"):
        parse_axis("sampler: foo").applied(SETTINGS)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        parse_axis("steps: 5000").applied(SETTINGS)


def test_labels_say_what_they_are_about():
    assert parse_axis("strength: 0-1 [3]").labels() == ["strength 0", "strength 0.5", "strength 1"]
    assert parse_axis("strength 2: 1").labels() == ["strength (2) 1"]
    assert parse_axis("checkpoint: 5, last").labels() == ["checkpoint 5", "checkpoint last"]
    assert parse_axis("adapter: none, results/cat/adapter").labels() == ["none", "cat"]
    assert parse_axis("prompt: cat").labels() == ["cat"]
