"""Marks: what a step depended on, and a file that is whole or not there."""

import json

from t2ilib.pipeline.marks import digest_of, mark_path, read_mark, write_mark


def test_a_mark_is_read_as_it_was_written(tmp_path) -> None:
    path = mark_path(tmp_path, "train", "with")
    assert read_mark(path) is None
    written = write_mark(path, "abc", {"weights": "f00", "loss": 0.5}, 12.34)
    assert read_mark(path) == written
    assert (written.digest, written.result, written.seconds) == ("abc", {"weights": "f00", "loss": 0.5}, 12.3)
    assert path == tmp_path / "marks" / "train-with.json"
    assert mark_path(tmp_path, "draw", None).name == "draw.json"


def test_one_that_is_not_whole_is_none(tmp_path) -> None:
    path = mark_path(tmp_path, "draw", None)
    write_mark(path, "abc", None, 1.0)
    for text in (path.read_text()[:-5], "[]", json.dumps({"digest": "abc"}), ""):
        path.write_text(text)
        assert read_mark(path) is None


def test_a_digest_is_of_the_step_its_settings_and_everything_before() -> None:
    plain = digest_of("train", {"steps": 4, "rate": 0.5}, [("d", {"pictures": 3})])
    assert digest_of("train", {"rate": 0.5, "steps": 4}, [("d", {"pictures": 3})]) == plain
    others = [
        digest_of("draw", {"steps": 4, "rate": 0.5}, [("d", {"pictures": 3})]),
        digest_of("train", {"steps": 5, "rate": 0.5}, [("d", {"pictures": 3})]),
        digest_of("train", {"steps": 4, "rate": 0.5}, [("e", {"pictures": 3})]),
        digest_of("train", {"steps": 4, "rate": 0.5}, [("d", {"pictures": 4})]),
        digest_of("train", {"steps": 4, "rate": 0.5}, [("d", None)]),
        digest_of("train", {"steps": 4, "rate": 0.5}, []),
    ]
    assert len({plain, *others}) == 7
