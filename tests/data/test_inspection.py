"""What inspecting sees is what a run sees, it stops for nothing, and what it tells of pictures is so."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from bad_pictures import scenery, write_thirty
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.data.advice import advise, usual
from t2ilib.data.captions.counting import count_captions, tokens
from t2ilib.data.dataset import load_datasets
from t2ilib.data.inspection import inspect
from t2ilib.data.likeness import MOST_BITS, MOST_COLOUR, Likeness, groups, likeness, near
from t2ilib.runfile import build_run

WEIGHTS = Path(__file__).parents[2] / "t2ilib" / "models" / "weights"


def run_of(training=None, model=None, **data):
    return build_run({"adapter": {}, "training": training or {}, "model": model or {}, "data": data})


def names(found, numbers):
    return [found.records[number].path.name for number in numbers]


@pytest.fixture
def scenes(tmp_path):
    """`scenes(count, size, ...)`: a folder of captioned pictures that are not alike."""

    def make(count, size=(96, 72), caption="a plain caption", folder="pics"):
        (tmp_path / folder).mkdir()
        for number in range(count):
            scenery(number, size).save(tmp_path / folder / f"{number:03d}.png")
            (tmp_path / folder / f"{number:03d}.txt").write_text(f"{caption} {number}")
        return tmp_path / folder

    return make


def test_it_sees_what_a_run_sees(tmp_path):
    write_thirty(tmp_path / "pics")
    asked = {"path": tmp_path / "pics", "captions": ["drop_adjectives", {"trigger": "sks"}], "validation_share": 0.3}
    found = inspect(run_of(**asked))
    training, held_out = load_datasets(run_of(**asked, on_error="skip"))
    assert (found.training.digest, found.held_out.digest) == (training.digest, held_out.digest)
    assert found.records == (*training.records, *held_out.records)
    assert [seen.sha256 for seen in found.seen] == [seen.sha256 for seen in (*training.seen, *held_out.seen)]
    assert found.rejected == training.rejected
    assert found.training.records[0].caption.startswith("sks ")
    assert found.stops == ("15 of 30 cannot be used, 50 %, and data.max_rejected is 5 %: repair or remove them",)
    assert not inspect(run_of(**asked, max_rejected=0.5)).stops


def test_nothing_stops_it_and_what_stops_a_run_is_told(tmp_path, scenes):
    pics = scenes(1)
    (stop, batch) = inspect(run_of(path=pics)).stops
    with pytest.raises(ConfigError) as error:
        load_datasets(run_of(path=pics))
    assert stop == str(error.value)
    assert batch == "training.batch_size 4 is more than the 1 training pictures: lower it"
    assert not inspect(run_of({"batch_size": 1}, path=pics, validation_share=0)).stops
    (stop,) = inspect(run_of({"batch_size": 1}, path=pics, validation_share=0, buckets=True, resolution=72), 64).stops
    assert "a multiple of 64" in stop

    (pics / "000.png").write_bytes(b"")
    found = inspect(run_of(path=pics))
    assert found.stops == (f"no picture of {pics} can be used",)
    assert (found.records, len(found.rejected), advise(found)) == ((), 1, [])
    with pytest.raises(ConfigError, match="is not a folder"):
        inspect(run_of(path=tmp_path / "nowhere"))


def test_captions_of_which_nothing_is_left(scenes):
    pics = scenes(20)
    (pics / "000.txt").write_text("slowly")
    (pics / "001.txt").write_text("slowly")
    found = inspect(run_of(path=pics, captions=["drop_adverbs"]))
    assert len(found.records) == 18
    assert [path.name for path, _ in found.rejected] == ["000.png", "001.png"]
    assert found.stops == (
        "data.captions leaves nothing of the captions of 2 pictures, more than data.max_rejected allows",
    )
    for number in range(20):
        (pics / f"{number:03d}.txt").write_text("slowly")
    found = inspect(run_of(path=pics, captions=["drop_adverbs"], validation_share=0))
    assert len(found.stops) == 1
    assert "0 pictures can" in found.stops[0]


def test_pictures_that_come_twice_are_found_above_all_on_both_sides(scenes):
    pics = scenes(24)
    held = inspect(run_of(path=pics)).held_out.records[0].path
    other = next(path for path in sorted(pics.glob("*.png")) if path != held)
    other.write_bytes(held.read_bytes())
    Image.open(pics / "020.png").resize((48, 36), Image.Resampling.LANCZOS).save(pics / "zz.jpg", quality=70)
    (pics / "zz.txt").write_text("the same again")
    found = inspect(run_of(path=pics))
    exact, close = found.alike
    assert (sorted(names(found, exact.numbers)), exact.exact, exact.leaks) == (
        sorted([held.name, other.name]), True, True,
    )  # fmt: skip
    assert (sorted(names(found, close.numbers)), close.exact) == (["020.png", "zz.jpg"], False)


def test_near_is_what_all_pairs_say():
    """Of pictures whose hashes and colours lie near one another, the pairs that a comparison of all with all finds."""
    rng = np.random.default_rng(0)
    bits = rng.random((6, 64))[rng.integers(0, 6, 300)] < 0.5
    bits ^= rng.random(bits.shape) < 0.04
    colours = (100 + 20 * rng.integers(0, 4, (300, 1)) + rng.integers(0, 12, (300, 768))).astype(np.uint8)
    pictures = [Likeness(*pair) for pair in zip(bits, colours, strict=True)]
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if (bits[i] != bits[j]).sum() <= MOST_BITS
        and max(abs(int(a) - int(b)) for a, b in zip(colours[i], colours[j], strict=True)) <= MOST_COLOUR
    ]
    assert 100 < len(expected) < 20_000
    assert near(pictures) == expected
    assert near(pictures[:1]) == near([]) == []


def test_groups_are_what_pairs_join():
    assert groups([(0, 3), (1, 2), (3, 7), (5, 7)]) == [[0, 3, 5, 7], [1, 2]]
    assert groups([]) == []


def test_colours_and_small_things_tell_pictures_apart():
    plain = Image.new("RGB", (64, 64), (240, 240, 240))
    marked, other = plain.copy(), plain.copy()
    marked.paste((200, 30, 30), (40, 20, 50, 30))
    other.paste((30, 30, 200), (40, 20, 50, 30))
    alike = [likeness(picture) for picture in (marked, other, marked.resize((128, 128), Image.Resampling.NEAREST))]
    assert (alike[0].bits != alike[1].bits).sum() <= MOST_BITS  # so the hash alone would call them near
    assert near(alike) == [(0, 2)]


def test_captions_by_value():
    counts = count_captions(
        [("A cat's whiskers.", "a cat, a cat"), ("A cat's whiskers.",), ("Nothing-much else in 1999!",)]
    )
    assert (counts.captions, counts.of_a_picture, counts.length) == (4, (1, 1, 2), (3, 3, 4))
    assert counts.lengths == {3: 2, 4: 2}
    assert dict(counts.words) == {
        "a": 4,
        "cat's": 2,
        "cat": 2,
        "whiskers": 2,
        "nothing-much": 1,
        "else": 1,
        "in": 1,
        "1999": 1,
    }
    assert (counts.num_words, counts.repeated, counts.num_repeated) == (8, (("A cat's whiskers.", 2),), 1)
    assert count_captions([]).length == (0, 0, 0)


@pytest.mark.parametrize("model", ["tiny-sdxl", "tiny-sd15"])
def test_no_caption_has_fewer_tokens_than_is_said(model):
    """A CLIP tokenizer whose merges are others than CLIP's cuts into the same pieces."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / model / "tokenizer")
    pieces = ["a red circle", "don't", "1999", "well-known", "snake_case", "(brackets), and more...", "café", "x" * 30]
    for seed in range(40):
        caption = " ".join(np.random.default_rng(seed).choice(pieces, 40))
        least, _ = tokens(caption)
        assert 2 < least <= len(tokenizer(caption, truncation=False, verbose=False).input_ids)
    assert tokens("a red circle")[0] == 2  # too short to matter


def test_suggestions_follow_from_what_is_there(scenes):
    def sets(native=None, multiple=None, choose=False, **fields):
        found = inspect(run_of(**fields), multiple, choose_resolution=choose)
        return [one for suggestion in advise(found, native, multiple) for one in suggestion.sets]

    pics = scenes(40, (320, 160))
    told = sets(path=pics, choose=True)
    assert "data.resolution=128" in told
    assert "data.buckets=true" in told
    assert "data.flip=0.5" in told
    assert any(re.fullmatch(r"data\.validation_share=0\.\d+", one) for one in told)
    assert not any("buckets" in one for one in sets(path=pics, choose=True, buckets=True))
    assert "data.resolution=512" in sets(native=512, path=pics, resolution=64)
    assert not any("resolution" in one for one in sets(native=64, path=pics, resolution=64))
    assert "data.resolution=128" in sets(native=512, path=pics, resolution=512)
    assert not any("max_rejected" in one for one in told)
    (pics / "000.txt").write_text("the cat on the left")
    assert not any("flip" in one for one in sets(path=pics))
    assert "data.flip=0" in sets(path=pics, flip=0.5, views=2)
    assert "training.batch_size=40" in sets(path=pics, training={"batch_size": 64}, validation_share=0)


@pytest.mark.parametrize(("pictures", "low", "high"), [(5, 800, 2400), (833, 11_662, 59_976), (1000, 14_000, 60_000), (118_000, 14_400, 60_000)])  # fmt: skip
def test_how_many_pictures_trainings_show(pictures, low, high):
    assert usual(pictures) == (low, high)


def test_steps_that_are_usual_are_not_remarked_on(scenes):
    pics = scenes(10)

    def steps(training):
        found = inspect(run_of(training, path=pics, validation_share=0))
        return [one for suggestion in advise(found) for one in suggestion.sets if one.startswith("training.steps")]

    assert steps({"batch_size": 4}) == ["training.steps=200"]  # 800 pictures at the least
    assert steps({"batch_size": 4, "steps": 400}) == []
    assert steps({"batch_size": 4, "steps": 5000}) == ["training.steps=200"]
    assert steps({"batch_size": 1}) == ["training.steps=800"]


def test_sizes_of_samples(scenes):
    pics = scenes(12, (96, 48))
    found = inspect(run_of(path=pics, resolution=64))
    np.testing.assert_allclose(found.magnified, 64 / 48)
    np.testing.assert_allclose(found.cut_off, 0.5)
    found = inspect(run_of({"batch_size": 2}, path=pics, resolution=64, buckets=True), 8)
    assert {tuple(size) for size in found.assigned.targets.tolist()} == {(48, 80)}
    np.testing.assert_allclose(found.cut_off, 1 / 6)
    found = inspect(run_of(path=pics), choose_resolution=True)
    assert (found.assumed, found.run.data.resolution) == (True, 64)


def test_repeats_count_once(scenes):
    pics = scenes(12)
    (pics / "10_cat").mkdir()
    scenery(70).save(pics / "10_cat" / "x.png")
    (pics / "10_cat" / "x.txt").write_text("a cat")
    found = inspect(run_of(path=pics, folder_repeats=True, validation_share=0))
    assert (found.num_training, len(found.training), len(found.sizes)) == (13, 22, 13)
    assert found.alike == ()
