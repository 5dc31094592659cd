"""What a run is trained on and measured by, after edits, weights and repeats."""

import csv
import logging
import re

import pytest

from t2ilib.config import ConfigError
from t2ilib.data.dataset import load_datasets, save_manifest
from t2ilib.runfile import build_run


def load(**data):
    return load_datasets(build_run({"adapter": {}, "data": data}))


def caption_of(folder, name, text):
    (folder / name).with_suffix(".txt").write_text(text)


@pytest.fixture
def folder(tmp_path, captioned):
    """Eight pictures: 000 to 007, "caption 0" to "caption 7"."""
    return captioned(tmp_path / "pets", 8)


def test_captions_are_edited_and_which_pictures_are_held_out_stays(folder, caplog):
    caplog.set_level(logging.INFO)
    for index in range(8):
        caption_of(folder, f"{index:03d}", f"a quietly sleeping cat {index}")
    plain, plain_held_out = load(path=folder, validation_share=0.25)
    training, held_out = load(path=folder, validation_share=0.25, captions=["drop_adverbs", {"trigger": "sks"}])
    assert [record.path for record in training.records] == [record.path for record in plain.records]
    assert [record.path for record in held_out.records] == [record.path for record in plain_held_out.records]
    for dataset in (training, held_out):
        assert all(re.fullmatch(r"sks a sleeping cat \d", caption) for caption in dataset.captions())
    assert training.digest != plain.digest
    assert training.edits is None  # nothing is left to do in the steps
    assert "edited by the tagger pattern" in caplog.text


@pytest.mark.parametrize("apart", [False, True])
def test_while_tuning_what_final_runs_hold_out_takes_no_part(tmp_path, captioned, apart):
    """Whether it is a share of the pictures or lies elsewhere; and what is held out is then no part of what is trained on."""
    pictures = captioned(tmp_path / "many", 40)
    told = {"path": pictures, "validation_share": 0.25}
    told |= {"validation_path": captioned(tmp_path / "elsewhere", 5)} if apart else {}
    final, tuning = load(**told), load(**told, part="tuning")
    of_final, of_tuning = ([{record.path for record in part.records} for part in both] for both in (final, tuning))
    assert of_tuning[0] | of_tuning[1] == of_final[0]
    assert not of_tuning[0] & of_tuning[1]
    assert 3 <= len(of_tuning[1]) <= 20
    aside = {path for path, why in tuning[0].aside if why == "held out of final runs"}
    assert aside == (set() if apart else of_final[1])
    assert load(**told, part="tuning", streaming=False)[0].digest == tuning[0].digest


def test_held_out_captions_stay_as_they_were_where_that_is_asked(folder):
    edited, held_out = load(path=folder, validation_share=0.25, captions=["drop_words=caption"], edit_held_out=False)
    assert all(caption.isdigit() for caption in edited.captions())
    assert all(caption.startswith("caption ") for caption in held_out.captions())
    _, also = load(path=folder, validation_share=0.25, captions=["drop_words=caption"])
    assert [caption.removeprefix("caption ") for caption in held_out.captions()] == also.captions()


def test_edits_before_the_first_that_draws_are_made_once(folder):
    for index in range(8):
        caption_of(folder, f"{index:03d}", f"red, very dark, cat {index}")
    edits = ["drop_adverbs", "shuffle_tags", {"template": "a photo of {caption}"}]
    training, _ = load(path=folder, captions=edits, validation_share=0)
    assert training.captions()[0] == "red, dark, cat 0"
    assert [name for name, _ in training.edits.specs] == ["shuffle_tags", "template"]


def test_a_picture_whose_captions_are_emptied_is_left_out_and_counted(folder, tmp_path, caplog):
    caption_of(folder, "003", "caption")
    edits = {"captions": ["drop_words=caption"], "validation_share": 0}
    with pytest.raises(
        ConfigError, match=r"pets: 1 file cannot be used, 7 pictures can:(.|\n)*003\.png: data\.captions"
    ):
        load(path=folder, **edits)
    training, held_out = load(path=folder, **edits, max_rejected=0.13)
    assert [record.path.stem for record in training.records] == ["000", "001", "002", "004", "005", "006", "007"]
    assert len(training.seen) == 7
    assert "pets: 1 picture left out, of whose captions the edits leave nothing" in caplog.text
    save_manifest(training, held_out, tmp_path / "manifest.csv")
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert counts(rows) == {"training": 7, "rejected": 1}
    assert "leaves nothing of its caption 'caption'" in rows[-1]["reason"]


def test_of_several_captions_the_emptied_one_is_left_out(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": ["caption", "a red cat", "a dog"]}\n{"file_name": "001.png", "text": "red"}\n'
    )
    for file in folder.glob("*.txt"):
        file.unlink()
    for index in range(2, 8):
        (folder / f"{index:03d}.png").unlink()
    training, _ = load(path=folder, captions=["drop_words=caption"], validation_share=0)
    assert training.records[0].captions == ("a red cat", "a dog")


def counts(rows):
    return {part: sum(row["part"] == part for row in rows) for part in dict.fromkeys(row["part"] for row in rows)}


def test_weights_and_repeats_of_training_pictures(folder, tmp_path):
    lines = [
        f'{{"file_name": "{i:03d}.png", "text": "caption {i}", "w": {1 + i / 2}, "n": {1 + i % 3}}}' for i in range(8)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for file in folder.glob("*.txt"):
        file.unlink()
    training, held_out = load(path=folder, weight_column="w", repeat_column="n", validation_share=0.25)
    numbers = [int(record.path.stem) for record in training.records]
    own = list(dict.fromkeys(numbers))
    assert numbers == [i for i in own for _ in range(1 + i % 3)]
    assert [record.weight for record in training.records] == [1 + i / 2 for i in numbers]
    # what is measured counts once, and alike: the same loss whatever training makes of the pictures
    assert len(held_out) == 8 - len(own) == len(set(held_out.records))
    assert {(record.weight, record.repeats) for record in held_out.records} == {(1.0, 1)}
    plain, plain_held_out = load(path=folder, validation_share=0.25)
    assert [record.path for record in plain_held_out.records] == [record.path for record in held_out.records]
    assert len({training.digest, plain.digest}) == 2
    assert held_out.digest == plain_held_out.digest

    save_manifest(training, held_out, tmp_path / "manifest.csv")
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert counts(rows) == {"training": len(own), "held out": len(held_out)}
    assert [int(row["repeats"]) for row in rows] == [*(1 + i % 3 for i in own), *[1] * len(held_out)]
    assert [float(row["weight"]) for row in rows] == [*(1 + i / 2 for i in own), *[1] * len(held_out)]
    assert [row["sha256"] for row in rows[: len(own)]] == list(
        dict.fromkeys(seen.sha256.hex() for seen in training.seen)
    )


def test_a_mask_counts_into_the_digest_and_may_not_be_black(folder, picture):
    def write(value):
        (folder / "masks").mkdir(exist_ok=True)
        picture(0).convert("L").point(lambda _: value).save(folder / "masks" / "0.png")
        lines = [f'{{"file_name": "{i:03d}.png", "text": "caption {i}", "mask": ""}}' for i in range(1, 8)]
        lines.append('{"file_name": "000.png", "text": "caption 0", "mask": "masks/0.png"}')
        (folder / "metadata.jsonl").write_text("\n".join(lines))

    for file in folder.glob("*.txt"):
        file.unlink()
    digests = []
    for value in (255, 128):
        write(value)
        training, _ = load(path=folder, mask_column="mask", validation_share=0)
        assert [bool(seen.mask) for seen in training.seen] == [bool(r.mask) for r in training.records]
        assert sum(bool(seen.mask) for seen in training.seen) == 1
        digests.append(training.digest)
    assert len(set(digests)) == 2
    write(0)
    with pytest.raises(ConfigError, match="black everywhere"):
        load(path=folder, mask_column="mask", validation_share=0)


def test_the_digest_is_of_contents_in_order(folder):
    first, _ = load(path=folder, validation_share=0)
    (folder / "000.png").rename(folder / "aaa.png")
    (folder / "000.txt").rename(folder / "aaa.txt")  # now last
    assert load(path=folder, validation_share=0)[0].digest != first.digest
    (folder / "aaa.png").rename(folder / "00.png")
    (folder / "aaa.txt").rename(folder / "00.txt")  # first again: another name alone is nothing
    assert load(path=folder, validation_share=0)[0].digest == first.digest
    caption_of(folder, "007", "another")
    assert load(path=folder, validation_share=0)[0].digest != first.digest


def test_a_part_and_pictures_of_the_class(folder, tmp_path, captioned):
    own, _ = load(path=folder, validation_share=0)
    of_class, _ = load(path=captioned(tmp_path / "class", 4), validation_share=0)
    both = own.joined(of_class)
    assert (len(both), both.num_class) == (12, 4)
    assert both.digest not in (own.digest, of_class.digest)
    part = own.part([1, 7])
    assert part.records == (own.records[1], own.records[7])
    assert part.seen == (own.seen[1], own.seen[7])
    save_manifest(both, of_class.part([]), tmp_path / "manifest.csv")
    assert counts(list(csv.DictReader((tmp_path / "manifest.csv").open()))) == {"training": 8, "class": 4}


def test_each_seed_draws_its_own_sample_of_the_pictures(tmp_path, captioned):
    """The same ones whenever it is asked; held-out pictures stay; what is not drawn is told in the manifest."""
    folder = captioned(tmp_path / "pets", 16)

    def drawn(seed, sample=4):
        data = {"path": folder, "validation_share": 0.25, "sample": sample}
        return load_datasets(build_run({"seed": seed, "adapter": {}, "data": data}))

    everything, apart = drawn(0, None)
    names = {seed: [record.path.name for record in drawn(seed)[0].records] for seed in range(6)}
    assert all(len(own) == 4 and own == sorted(own) for own in names.values())
    assert len({tuple(own) for own in names.values()}) > 1
    assert names[3] == [record.path.name for record in drawn(3)[0].records]
    assert {name for own in names.values() for name in own} <= {record.path.name for record in everything.records}
    training, held_out = drawn(0)
    assert held_out.digest == apart.digest
    save_manifest(training, held_out, tmp_path / "manifest.csv")
    rows = list(csv.reader((tmp_path / "manifest.csv").open()))
    assert sum("not among the 4 that seed 0 draws" in row for row in rows) == len(everything.records) - 4
    assert len(drawn(0, len(everything.records))[0].records) == len(everything.records)
    with pytest.raises(ConfigError, match=r"data.sample 17: there are \d+ training pictures"):
        drawn(0, 17)


def test_a_stream_has_no_sample():
    with pytest.raises(ConfigError, match="sample draws among all pictures"):
        load(source="webdataset", path="x", streaming=True, sample=4)
