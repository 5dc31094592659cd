"""What pictures carry: settings come back exactly from our own text, from A1111's where there is no other, and never as an odd error."""

import io
import json
import random
import zlib

import pytest
from PIL import Image, PngImagePlugin

from t2ilib.config import ConfigError
from t2ilib.drawing.pngtext import A1111, OWN, read_picture, texts_of
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.sampling import save_png

NASTY = (
    *(
        'a "b"',
        "Steps: 3, Sampler: Euler, CFG scale: 1, Seed: 2\nNegative prompt: x",
        "\n",
        " ",
        "\0",
        "猫🐈‍⬛",
        "\\",
        "\r\n",
    ),
    *("<lora:x:1>", "{'a': 1}", "é\u2028", "\x1b[31m", "Negative prompt: y"),
)


def saved(path, texts):
    save_png(Image.new("RGB", (4, 4)), path, texts)
    return path


def test_everything_comes_back_exactly(tmp_path):
    drawn = random.Random(1)
    for number in range(60):
        texts = ["".join(drawn.choices(NASTY, k=drawn.randint(0, 6))) for _ in range(4)]
        settings = build_settings(
            {
                "prompt": texts[0],
                "negative_prompt": texts[1],
                "seed": drawn.randrange(2**63),
                "first": number,
                "guidance_scale": drawn.uniform(1.001, 20),
                "adapters": [{"path": "x" + texts[2], "strength": drawn.uniform(-2, 2), "step": 3, "digest": "ab"}],
                "model": {"base": "b" + texts[3], "quantization": "nf4"},
            }
        )
        path = saved(tmp_path / "x.png", texts_of(settings, "DDIM", (64, 64)))
        restored = read_picture(path)
        assert restored.settings == settings
        assert (restored.source, restored.notes, restored.unknown) == ("t2ilib", (), {})
        with path.open("rb") as stream:
            assert read_picture(stream).settings == settings


def test_without_our_own_text_a1111s_is_taken(tmp_path):
    asked = {"prompt": "a cat", "seed": 9, "sampler": "UniPC", "num_inference_steps": 20, "guidance_scale": 5.0}
    settings = build_settings(asked)
    texts = texts_of(settings, "UniPC", (64, 96))
    assert texts[A1111].endswith("Model: tiny-sdxl, Version: t2ilib 0.1.0")
    alone = read_picture(saved(tmp_path / "a.png", {A1111: texts[A1111]}))
    assert (alone.source, alone.settings) == ("A1111", settings.changed(width=64, height=96))
    theirs = read_picture(saved(tmp_path / "b.png", {A1111: "a cat\nSteps: 9, Seed: 3, ENSD: 1, Version: v1.9.4"}))
    assert theirs.unknown == {"ENSD": "1", "Version": "v1.9.4"}
    assert theirs.notes[-1].startswith("another program drew it, from other noise")


@pytest.mark.parametrize(
    "own", ["{", "[]", '{"version": 1}', '{"settings": {}, "version": 2}', "[" * 100_000, "null", '{"settings": 3}']
)
def test_damaged_or_later_text_of_our_own_is_told_and_the_other_taken(tmp_path, own):
    texts = texts_of(build_settings({"prompt": "a cat"}), "Euler", (8, 8)) | {OWN: own}
    restored = read_picture(saved(tmp_path / "a.png", texts))
    assert restored.source == "A1111"
    assert restored.notes[0].startswith("its own settings are")
    with pytest.raises(ConfigError, match=r"a.png carries no settings: its own settings are"):
        read_picture(saved(tmp_path / "a.png", {OWN: own}))


@pytest.mark.parametrize(
    "change", [{"num_inference_steps": 10**9}, {"width": 10**9}, {"num_pictures": 10**6}, {"extra": 1}]
)
def test_absurd_settings_are_refused(tmp_path, change):
    texts = texts_of(build_settings({}), "Euler", (8, 8))
    own = json.loads(texts[OWN])
    own["settings"] |= change
    with pytest.raises(ConfigError, match=f"in what a.png says:\n.*{next(iter(change))}"):
        read_picture(saved(tmp_path / "a.png", texts | {OWN: json.dumps(own)}))


def test_what_is_no_picture_of_ours_is_one_sentence(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(plain)
    with pytest.raises(
        ConfigError, match=r"plain.png carries no settings, as programs that edit .* leave them: take the file"
    ):
        read_picture(plain)
    for name, content in (("no.png", b"not a picture"), ("half.png", plain.read_bytes()[:20]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be read as a PNG"):
            read_picture(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    with pytest.raises(ConfigError, match=r"photo.jpg cannot be read as a PNG"):
        read_picture(tmp_path / "photo.jpg")
    with pytest.raises(ConfigError, match=r"gone.png does not exist"):
        read_picture(tmp_path / "gone.png")


def test_text_that_would_fill_the_memory_is_refused(tmp_path):
    """A zTXt chunk of a few kilobytes that unpacks to 100 MB, and one that says a size that no picture has."""
    chunk = zlib.compress(b"a" * 10**8)
    packed = PngImagePlugin.PngInfo()
    packed.add(b"zTXt", b"parameters\0\0" + chunk)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=packed)
    with pytest.raises(ConfigError, match=r"bomb.png cannot be read as a PNG"):
        read_picture(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = (10**6).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(ConfigError, match="the picture cannot be read as a PNG"):
        read_picture(io.BytesIO(bytes(content)))


def test_a_sheet_gives_back_its_axes(tmp_path):
    texts = texts_of(build_settings({"prompt": "a"}), "Euler", (8, 8), grid={"x": "seed: 1, 2"})
    assert read_picture(saved(tmp_path / "a.png", texts)).grid == {"x": "seed: 1, 2"}
