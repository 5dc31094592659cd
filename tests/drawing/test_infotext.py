"""A1111's text: what its own writer gives is read, and what is written here is read by its rules, whatever the prompt is."""

import json
import random
import time

import pytest

from t2ilib.config import ConfigError
from t2ilib.drawing.infotext import read_infotext, settings_of, shown_name, write_infotext
from t2ilib.drawing.samplers import SAMPLERS
from t2ilib.drawing.settings import AdapterChoice, build_settings

WRITTEN_BY_A1111 = """a castle, (detailed:1.2) <lora:cat-v2:0.8> on a hill <lora:style:-0.5:1>
second line
Negative prompt: ugly, blurry
bad
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3284763712, Size: 768x512, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: "a, b.safetensors", Clip skip: 2, Lora hashes: "cat-v2: 7bb1a5a0b2f3, style: 9c0d", ENSD: 31337, Version: v1.9.4"""
OLD = "a cat\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model hash: 45dee52b"


def test_what_a1111_writes_is_read():
    info = read_infotext(WRITTEN_BY_A1111)
    assert info.prompt == "a castle, (detailed:1.2) on a hill\nsecond line"
    assert info.negative_prompt == "ugly, blurry\nbad"
    assert info.adapters == {"cat-v2": 0.8, "style": -0.5}
    assert info.fields["VAE"] == "a, b.safetensors"
    settings, rest, notes = settings_of(info)
    assert settings == build_settings(
        {
            "prompt": info.prompt,
            "negative_prompt": info.negative_prompt,
            "num_inference_steps": 28,
            "sampler": "DPM++ 2M Karras",
            "guidance_scale": 6.5,
            "seed": 3284763712,
            "width": 768,
            "height": 512,
            "model": {"clip_skip": 1},
        }
    )
    assert set(rest) == {"Model hash", "Model", "VAE hash", "VAE", "Lora hashes", "ENSD", "Version"}
    assert [note.split(":")[0] for note in notes] == [
        "Model 'v1-5-pruned-emaonly'",
        "adapter 'cat-v2' of strength 0.8 is left out",
        "adapter 'style' of strength -0.5 is left out",
    ]


def test_what_older_versions_write_is_read():
    settings, rest, _ = settings_of(read_infotext(OLD))
    assert (settings.sampler, settings.width, settings.seed) == ("DPM++ 2M Karras", 512, 5)
    assert settings.model.clip_skip == 0
    assert list(rest) == ["Model hash"]
    named = read_infotext(OLD.replace("DPM++ 2M Karras", "PLMS"))
    assert settings_of(named)[0].sampler == "PNDM"


def test_the_text_is_a1111s_word_for_word():
    settings = build_settings(
        {
            "prompt": "a red heart",
            "negative_prompt": "blue",
            "seed": 7,
            "sampler": "DPM++ 2M Karras",
            "adapters": [{"path": "results/cat", "strength": 0.8}, {"path": "styles/ink.safetensors"}],
            "model": {"base": "models/my, own: model.safetensors", "clip_skip": 1},
        }
    )
    assert write_infotext(settings, "DPM++ 2M Karras", (512, 768), {"X Values": "1, 2", "VAE": None}) == (
        "a red heart <lora:cat:0.8> <lora:ink:1>\nNegative prompt: blue\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 7, Size: 512x768, Model: my own model, Clip skip: 2,"
        ' X Values: "1, 2"'
    )
    plain = build_settings({"prompt": "x", "model": {"base": "a/b"}})
    assert write_infotext(plain, "PNDM", (64, 64)) == (
        "x\nSteps: 20, Sampler: PLMS, CFG scale: 5.0, Seed: 0, Size: 64x64, Model: b"
    )


BITS = (
    *("cat", "Steps: 3", "\n", '"', ",", ": ", " ", "猫", "é", "\\", "\t", "\r", "-", '"a: b"', "(x:1.2)", "\0"),
    *("Steps: 3, Sampler: Euler, CFG scale: 2, Seed: 4, Size: 8x8", "Negative prompt", "{}", "🐈‍⬛", "<b>"),
)


def lines_of(text):
    """What is left of a prompt that lines of A1111's text are made of: they lose the blanks at their ends, the text those around it."""
    return "\n".join(line.strip() for line in text.replace("\0", " ").split("\n")).strip()


def test_whatever_a_prompt_is_its_text_gives_it_back():
    drawn = random.Random(0)
    for _ in range(1500):
        prompt, negative = ("".join(drawn.choices(BITS, k=drawn.randint(0, 8))) for _ in range(2))
        settings = build_settings(
            {
                "prompt": prompt,
                "negative_prompt": negative,
                "seed": drawn.randrange(2**63),
                "num_inference_steps": drawn.randint(1, 1000),
                "guidance_scale": round(drawn.uniform(1.1, 30), 2),
                "width": drawn.randint(1, 100) * 8,
                "height": drawn.randint(1, 100) * 8,
                "sampler": drawn.choice(list(SAMPLERS)),
                "model": {"base": drawn.choice(["tiny-sdxl", "tiny-sd15"]), "clip_skip": drawn.randint(0, 2)},
            }
        )
        more = {"X Values": drawn.choice(BITS) + drawn.choice(BITS), "Y Type": "a: b"}
        text = write_infotext(settings, settings.sampler, (settings.width, settings.height), more)
        if "\nNegative prompt:" in f"\n{lines_of(prompt)}":
            continue
        read, rest, notes = settings_of(read_infotext(text))
        expected = settings.changed(prompt=lines_of(prompt), negative_prompt=lines_of(negative))
        assert read == expected, text
        assert not notes
        told, expected = ({n: value.replace("\0", " ").strip() for n, value in d.items()} for d in (rest, more))
        assert told == expected, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "Steps: 3",
        "a prompt alone, with: colons, and: more",
        "x\nSteps: many, Sampler: Restart, CFG scale: nan, Seed: -1, Size: big",
        "x\nSteps: , Sampler: , CFG scale: , Seed: , Size: ",
        'x\nSteps: 3, Sampler: "Euler, CFG scale: 5, Seed: 1',
        "Negative prompt: only this\nSteps: 20, CFG scale: 1, Seed: 3",
        "<lora:a:b:c:d> <lora:::> <lora:x:>\nSteps: 20, CFG scale: 0.5, Seed: " + "9" * 5000,
        "x\nSteps: 20, Sampler: Euler, Schedule type: Align Your Steps, Seed: 1, Clip skip: 0",
    ],
)
def test_odd_texts_are_told_and_raise_nothing(text):
    info = read_infotext(text)
    settings, rest, notes = settings_of(info)
    assert settings.num_inference_steps in (None, 3, 20)
    left = {name for name in info.fields if name in rest}
    said = " ".join(notes)
    for name in {"Steps", "CFG scale", "Seed", "Sampler"} & left:
        assert name.lower() in said.lower(), (name, notes)


@pytest.mark.parametrize(
    "field", ["Steps: 99999999", "Size: 99999x64", "CFG scale: 9999", "Seed: 99999999999999999999"]
)
def test_absurd_values_are_refused(field):
    with pytest.raises(ConfigError, match="in the picture's text"):
        settings_of(read_infotext(f"x\nModel hash: 1, Version: 2, {field}"))


@pytest.mark.parametrize("piece", ["a", " ", 'ab:"', "<lora:", "ab: c, ", "\n", '"', "\\"])
def test_texts_of_any_length_are_read_in_no_time(piece):
    begun = time.perf_counter()
    read_infotext("x\n" + piece * (3 * 10**5 // len(piece)) + "x")
    assert time.perf_counter() - begun < 5


def test_adapters_are_called_by_what_tells_them_apart():
    paths = {
        "results/cat": "cat",
        "results/cat/adapter": "cat",
        "results/cat/adapter/pytorch_lora_weights.safetensors": "cat",
        "results/adapters-full/dora/seed0": "dora-seed0",
        "loras/ink v1.2.safetensors": "ink v1.2",
        "models:/adapters-full@champion": "adapters-full@champion",
        "models:/adapters-full/3": "adapters-full-3",
        "a<b:c>": "a_b_c_",
    }
    assert {path: shown_name(AdapterChoice(path=path)) for path in paths} == paths
    assert shown_name(AdapterChoice(path="results/cat", step=500)) == "cat-000500"


def test_quoting_is_jsons():
    text = write_infotext(build_settings({}), "Euler", (8, 8), {"Note": 'a, "b": é\n'})
    assert f"Note: {json.dumps('a, ' + chr(34) + 'b' + chr(34) + ': é' + chr(10), ensure_ascii=False)}" in text
