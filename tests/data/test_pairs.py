"""Pairs of a chosen and a rejected picture, on their way from a source to samples."""

import csv
import hashlib
import logging
from dataclasses import replace

import pytest

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data import dataset as module
from t2ilib.data.dataset import load_datasets, save_manifest
from t2ilib.data.editing import digest_of
from t2ilib.data.inspection import inspect
from t2ilib.data.manifest import examine
from t2ilib.data.records import Listing, Record
from t2ilib.data.sharding import write_shards
from t2ilib.runfile import build_run

SKIP = DataConfig(on_error="skip")


@pytest.fixture
def pair(tmp_path, picture):
    """`pair(number, caption)`: a record of two pictures of its own."""

    def make(number, caption, **fields):
        for side, seed in (("chosen", 2 * number), ("rejected", 2 * number + 1)):
            picture(seed).save(tmp_path / f"{number}-{side}.png")
        return Record(
            tmp_path / f"{number}-chosen.png", caption, rejected=tmp_path / f"{number}-rejected.png", **fields
        )

    return make


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """`datasets(records, ...)`: training and held-out part of a source of one's own that gives these."""

    def load(records, apart=None, **sections):
        listings = [None if own is None else Listing(tmp_path, tuple(own)) for own in (records, apart)]
        monkeypatch.setattr(module, "load_listings", lambda data: tuple(listings))
        data = {"source": "pairs.py:load", **sections.pop("data", {})}
        run = build_run({"adapter": {}, "data": data, "output": str(tmp_path / "run"), **sections})
        return run, *load_datasets(run)

    return load


def test_both_pictures_are_looked_at_once_and_again_when_they_change(pair, tmp_path, caplog):
    records = [pair(number, f"caption {number}") for number in range(4)]
    records[1].rejected.write_bytes(records[1].rejected.read_bytes()[:90])
    records[2].rejected.unlink()
    records[3].rejected.write_bytes(records[3].path.read_bytes())
    with caplog.at_level(logging.WARNING):
        examined = examine(Listing(tmp_path, tuple(records)), SKIP)
    assert list(examined.pictures) == records[:1]
    told = {path.name: reason for path, reason in examined.rejected}
    assert "rejected picture" in told["1-chosen.png"]
    assert "1-rejected.png: cannot be decoded" in told["1-chosen.png"]
    assert told["2-chosen.png"].endswith("2-rejected.png: missing")
    assert "is the same picture as" in told["3-chosen.png"]
    seen = examined.pictures[records[0]]
    assert seen.rejected.sha256 == hashlib.sha256(records[0].rejected.read_bytes()).digest()
    assert (seen.rejected.height, seen.rejected.width) == (16, 24)


def test_what_was_liked_less_is_part_of_the_digest_and_of_the_manifest(pair, datasets, tmp_path):
    records = [pair(number, f"caption {number}") for number in range(6)]
    _, training, held_out = datasets(records, data={"validation_share": 0.3})
    assert len(training) + len(held_out) == 6
    swapped = [
        (record, replace(seen, rejected=seen)) for record, seen in zip(training.records, training.seen, strict=True)
    ]
    pairs = list(zip(training.records, training.seen, strict=True))
    single = [(record, replace(seen, rejected=None)) for record, seen in pairs]
    assert len({training.digest, digest_of(swapped), digest_of(single)}) == 3
    save_manifest(training, held_out, tmp_path / "manifest.csv")
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert {row["name"].rpartition("/")[2] for row in rows} == {
        path.name for record in records for path in (record.path, record.rejected)
    }
    less = [row for row in rows if row["name"].endswith("rejected.png")]
    assert all(row["reason"].startswith("liked less than ") and row["sha256"] for row in less)


def test_all_pairs_of_a_prompt_are_on_one_side(pair, datasets, caplog):
    records = [pair(number, f"prompt {number % 8}{' ' * (number % 2)} of all") for number in range(32)]
    for data in ({"validation_share": 0.25}, {"validation_share": 0.01}, {"validation_share": 0.3, "part": "tuning"}):
        _, training, held_out = datasets(records, data=data)
        sides = [{" ".join(caption.split()) for caption in part.captions()} for part in (training, held_out)]
        assert all(sides)
        assert not sides[0] & sides[1]
    caplog.clear()
    datasets(records[:24], records[24:])
    assert "8 prompt(s) of held-out pairs are trained on too" in caplog.text


def test_what_does_not_go_with_pairs_is_refused_by_name(pair, datasets, tmp_path, picture):
    records = [pair(number, f"caption {number}") for number in range(4)]
    single = [*records[:3], replace(records[3], rejected=None)]
    with pytest.raises(ConfigError, match=r"3-chosen.png is a single picture, and others are pairs"):
        datasets(single)
    with pytest.raises(ConfigError, match="a data set has pairs or it has none"):
        datasets(records[:3], single[3:])
    picture(9).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match=r"the mask of .*-chosen.png says where the loss of one picture counts"):
        datasets([replace(record, mask=tmp_path / "mask.png") for record in records])
    with pytest.raises(ConfigError, match=r"data\.alpha mask says where"):
        datasets(records, data={"alpha": "mask"})
    with pytest.raises(ConfigError, match="the prior section shows pictures of the class"):
        datasets(records, prior={"prompts": ["a cat"]})
    with pytest.raises(ConfigError, match="has 2 captions, and of a pair it must be known"):
        datasets([replace(record, more=("another",)) for record in records])
    with pytest.raises(ConfigError, match="a sample of a shard is one picture"):
        write_shards(Listing(tmp_path, tuple(records)), SKIP, tmp_path / "shards", 10**6)


def test_an_inspection_tells_what_would_stop_a_run_and_equal_pairs_alone(pair, datasets, tmp_path, picture):
    records = [pair(number, f"caption {number}") for number in range(5)]
    again = replace(records[0], rejected=records[1].rejected, caption="the chosen one in another pair")
    run, *_ = datasets([*records, again])
    found = inspect(run)
    assert not found.alike
    assert not found.stops
    run, *_ = datasets([*records, replace(records[2], caption="a pair again")])
    assert [own.exact for own in inspect(run).alike] == [True]
