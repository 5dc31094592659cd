"""Which view and which caption a step sees, and what they are known by."""

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from t2ilib.config import DataConfig
from t2ilib.data.captions import build_captions
from t2ilib.data.dataset import Dataset
from t2ilib.data.pictures import examine_picture
from t2ilib.data.records import Record
from t2ilib.data.samples import Samples

TAGS = "red, green, blue, grey"


@pytest.fixture
def build(tmp_path, picture):
    """`build(sizes, ...)` -> samples of pictures of these (width, height)."""

    def of(sizes=((40, 24),) * 3, seed=0, captions=("a", "b", "c"), edits=None, num_class=0, held_out=False, **data):
        records = []
        for index, size in enumerate(sizes):
            path = tmp_path / f"{index}-{size}.png"
            picture(index, size).save(path)
            records.append(Record(path, captions[0], more=tuple(captions[1:])))
        seen = tuple(examine_picture(record.path) for record in records)
        dataset = Dataset("x", tuple(records), "digest", seen=seen, edits=edits)
        if num_class:
            ids = range(len(records))
            dataset = dataset.part(ids[:-num_class]).joined(dataset.part(ids[-num_class:]))
        return Samples(dataset, DataConfig(**{"resolution": 16, **data}), seed, held_out=held_out)

    return of


def test_view_and_caption_are_a_function_of_seed_step_and_sample(build):
    def seen(samples, steps):
        return [[(samples.number(i, step), samples.caption(i, 0, step)) for i in range(3)] for step in steps]

    data = {"crop": "random", "views": 4}
    first = seen(build(**data), range(300))
    assert seen(build(**data), reversed(range(300))) == first[::-1]
    assert seen(build(seed=1, **data), range(300)) != first
    for i in range(3):  # all of them are seen, about equally often, and independently of each other
        numbers, captions = zip(*(step[i] for step in first), strict=True)
        assert all(abs(Counter(numbers)[number] - 75) < 30 for number in range(4))
        assert all(abs(Counter(captions)[caption] - 100) < 35 for caption in "abc")
        assert len(set(zip(numbers, captions, strict=True))) == 12
    assert len({tuple(step) for step in first}) > 250


def test_views_belong_to_the_pictures_bytes_whatever_the_run(build):
    data = {"crop": "random", "flip": 0.5, "views": 6}
    samples, other = build(**data), build(seed=7, **data)
    views = [[samples.view(i, number) for number in range(6)] for i in range(3)]
    assert views == [[other.view(i, number) for number in range(6)] for i in range(3)]
    assert samples.keys().tolist() == other.keys().tolist()
    assert len({view for of_picture in views for view in of_picture}) > 8
    assert {view.flipped for of_picture in views for view in of_picture} == {True, False}
    copy = samples.dataset.records[0].path
    (copy.parent / "elsewhere.png").write_bytes(copy.read_bytes())
    renamed = replace(samples.dataset, records=(Record(copy.parent / "elsewhere.png", "z"),), seen=())
    assert Samples(renamed, samples.config, 0).keys().tolist() == samples.keys()[:6].tolist()


def test_whatever_changes_pixels_changes_the_key(build):
    def key(**changes):
        return build(sizes=((90, 24),), **changes).key(0, 0)

    keys = [key(), key(resolution=24), key(crop="random"), key(flip=1.0), key(ground="black"), key(alpha="mask")]
    assert len(set(keys)) == len(keys)
    assert key(seed=3, captions=("z",), views=2, crop="random") == key(crop="random")  # nor what does not


def test_equal_views_have_one_key(build):
    samples = build(sizes=((16, 16),), flip=0.5, views=8)  # of a picture that fits there are two: itself, and mirrored
    assert len(set(samples.keys().tolist())) == 2
    assert [samples.key(0, number) for number in range(8)] == [
        samples.keys()[number : number + 1].tobytes() for number in range(8)
    ]


def test_what_is_measured_is_always_the_middle_and_the_first_caption(build):
    samples = build(held_out=True, crop="random", flip=1.0, views=5)
    views = {(samples.number(0, step), samples.view(0, samples.number(0, step))) for step in range(20)}
    ((number, view),) = views
    assert (number, view.flipped, view.scaled, (view.top, view.left)) == (0, False, (16, 27), (0, 5))
    assert {samples.caption(0, 0, step) for step in range(20)} == {"a"}
    assert list(samples.all_captions()) == ["a"] * 3
    assert len(samples.keys()) == 3


def test_an_order_of_tags_belongs_to_a_view(build):
    edits = build_captions(["shuffle_tags"])
    samples = build(captions=(TAGS, "one, two"), edits=edits, crop="random", views=5)
    allowed = set(samples.all_captions())
    found = {(i, number): samples.edited(i, number) for i in range(3) for number in range(5)}
    assert all(set(first.split(", ")) == set(TAGS.split(", ")) for first, _ in found.values())
    assert len({first for first, _ in found.values()}) > 3
    again = build(seed=5, captions=(TAGS, "one, two"), edits=edits, crop="random", views=5)
    assert found == {(i, number): again.edited(i, number) for i in range(3) for number in range(5)}
    used = {samples.caption(i, samples.number(i, step), step) for i in range(3) for step in range(200)}
    assert used == allowed  # what is encoded beforehand is what any step asks for, all of it and nothing else


def test_sizes_are_told_and_chance_with_one_view_is_warned_about(build, caplog):
    caplog.set_level(logging.INFO)
    samples = build(sizes=((40, 24), (24, 40), (24, 24), (25, 41)), resolution=64, buckets=True)
    samples.tell()
    assert "3 sizes (width x height): 48x80: 2" in caplog.text
    assert samples.targets.tolist() == [[48, 80], [80, 48], [64, 64], [80, 48]]
    assert samples.of_one_size() == [[0], [2], [1, 3]]
    assert samples.buckets.tolist() == [0, 2, 1, 2]
    assert "data.views" not in caplog.text
    for chance in ({"crop": "random"}, {"flip": 0.5}, {"edits": build_captions(["shuffle_tags"])}):
        caplog.clear()
        build(**chance).tell()
        assert "each picture has one view" in caplog.text
        caplog.clear()
        build(**{"crop": "random", **chance, "views": 4}).tell()
        assert not caplog.text


def test_sizes_without_a_full_batch_are_told(build, caplog):
    caplog.set_level(logging.INFO)
    samples = build(sizes=((40, 24), (24, 24), (24, 24)), resolution=64, buckets=True)
    assigned = Samples(samples.dataset, samples.config, 0, batch_size=2)
    assigned.tell()
    assert assigned.targets.tolist() == [[64, 64]] * 3
    assert assigned.buckets is None
    assert "1 picture(s) are cropped to the next size" in caplog.text


def test_weights_are_the_pictures_own_and_that_of_the_class(build):
    samples = build(num_class=1)
    records = samples.dataset.records
    weighed = (replace(records[0], weight=0.5), records[1], replace(records[2], weight=3.0))
    samples.dataset = replace(samples.dataset, records=weighed)
    assert samples.weights([2, 0, 1]) == [3.0, 0.5, 1.0]
    assert samples.weights([2, 0, 1], (2.0, 0.1)) == [pytest.approx(0.3), 1.0, 2.0]


def test_no_pictures_are_no_samples():
    samples = Samples(Dataset("none", (), "digest"), DataConfig(), 0, held_out=True)
    assert (len(samples), len(samples.keys()), list(samples.all_captions())) == (0, 0, [])
    assert samples.buckets is None or not len(samples.buckets)
    assert isinstance(samples.keys(), np.ndarray)
