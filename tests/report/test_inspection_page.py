"""An inspection on one screen and on its page, as a new user meets them."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bad_pictures import scenery, write_thirty
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.data.advice import advise
from t2ilib.data.inspection import inspect
from t2ilib.report.inspection_figures import plot_lengths, plot_sizes, plot_words
from t2ilib.report.inspection_page import page_text
from t2ilib.report.inspection_screen import screen
from t2ilib.runfile import build_run

SCREEN = 45
"""Lines of a terminal."""


def inspected(*arguments):
    result = CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.stdout


class Page(HTMLParser):
    """Tags that are not closed, and what the page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.pictures, self.text = [], [], 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)
        self.pictures += tag == "img"
        self.fetched += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def thirty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_thirty(tmp_path / "pics")


def test_fifteen_broken_and_fifteen_good_on_one_screen(thirty, tmp_path):
    text = inspected("pics")
    lines = text.splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 120
    assert all(name in text for name in thirty)
    assert "12 pictures to train on, 3 held out (good00.png, good01.png, good11.png)" in text
    assert "15 of 30" in text
    assert "LEAK" in text  # of good01 and good02 one is held out
    assert "good02.png = good01.png" in text
    assert "good03.png ~ good04.jpg" in text or "good04.jpg ~ good03.png" in text
    assert "the first of 3 frames: good05.gif" in text
    assert "A run STOPS 15 of 30 cannot be used, 50 %" in text
    assert "--set data.max_rejected=0.5" in text
    assert "inspection/index.html" in lines[-1]
    assert sorted(path.name for path in (tmp_path / "inspection").iterdir()) == [
        "index.html",
        "manifest.csv",
        "manifest.json",
    ]


def test_the_page_needs_nothing_else_and_shows_everything(thirty, tmp_path):
    inspected("pics", "--set", "data.max_rejected=0.5", "--out", "seen")
    page = Page((tmp_path / "seen" / "index.html").read_text())
    assert page.open == []
    assert page.fetched == ["manifest.csv", "manifest.json"]
    assert all(name in page.text for name in thirty)
    assert "a plain caption, number 7" in page.text
    assert "A run with these pictures would begin" in page.text
    assert page.pictures == 15 + 2 * 2 + 3  # the grid, two pairs that are alike, three figures
    with (tmp_path / "seen" / "manifest.csv").open(newline="") as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    told = json.loads((tmp_path / "seen" / "manifest.json").read_text())["pictures"]
    assert [parts.count(part) for part in ("training", "held out", "rejected")] == [
        told["training"], told["held_out"], told["rejected"],
    ]  # fmt: skip


def test_what_people_write_is_no_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for number in range(6):
        scenery(number).save(tmp_path / "p" / f"<em>{number}.png")
        (tmp_path / "p" / f"<em>{number}.txt").write_text("<script>alert(1)</script>\nand more")
    (tmp_path / "p" / "<i>.png").write_bytes(b"")
    (tmp_path / "p" / "<i>.txt").write_text("x")
    text = inspected("p")
    page = Page((tmp_path / "inspection" / "index.html").read_text())
    assert page.open == []
    assert page.text.count("<script>alert(1)</script>") >= 6
    markup = (tmp_path / "inspection" / "index.html").read_text()
    assert not any(mark in markup for mark in ("<script", "<em>", "<i>"))
    assert '"<script>alert(1)</script> and more" (6)' in text


def test_what_is_the_users_is_left_alone(thirty, tmp_path, monkeypatch):
    def refused(*arguments):
        result = CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)], env={"COLUMNS": "120"})
        assert result.exit_code == 2
        return result.stderr

    (tmp_path / "inspection").mkdir()
    (tmp_path / "inspection" / "index.html").write_text("<html>my homepage</html>")
    assert "holds other files than an inspection's" in refused("pics")
    assert (tmp_path / "inspection" / "index.html").read_text() == "<html>my homepage</html>"
    assert "is a file" in refused("pics", "--out", "pics/bare.png")
    before = sorted((tmp_path / "pics").iterdir())
    assert "lies among the pictures" in refused("pics", "--out", "pics/seen")
    monkeypatch.chdir(tmp_path / "pics")
    assert "lies among the pictures" in refused(".")
    assert sorted((tmp_path / "pics").iterdir()) == before
    inspected(".", "--out", "../other")
    inspected(".", "--out", "../other", "--set", "data.resolution=64")  # one's own is written over


def test_a_run_config_its_tokenizer_and_mistakes(thirty, tmp_path):
    (tmp_path / "pics" / "good00.txt").write_text("word " * 200)
    (tmp_path / "run.yaml").write_text(
        "model: {base: tiny-sdxl}\nadapter: {}\ndata: {path: pics, resolution: 64, buckets: true, prompt: all}\ntraining: {steps: 3, batch_size: 2}\n"
    )
    text = inspected("run.yaml", "--set", "data.captions=[drop_adjectives]")
    assert '1 caption of more than 77 tokens, whose ends are dropped: "word word' in text
    assert "as data.captions edits them by the tagger pattern textblob" in text
    assert "training.steps is 3" in text
    assert "of 2 sizes" in text or "of 1 size" in text
    assert "assumed" not in text
    result = CliRunner().invoke(app, ["data", "inspect", "nowhere"])
    assert (result.exit_code, "data.path nowhere is not a folder" in result.stderr) == (2, True)


def test_the_drawn_world_and_narrow_terminals():
    found = inspect(build_run({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"num_pictures": 12}}), 8)
    for width in (80, 120):
        text = screen(found, advise(found, 64, 8), Path("out"), width)
        assert max(len(line) for line in text.splitlines() if str(found.root) not in line) <= width
        assert len(text.splitlines()) <= SCREEN
    assert "12 pictures to train on" in " ".join(text.split())
    assert "A run       would begin" in text


def test_nothing_at_all(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(b"")
    (tmp_path / "p" / "x.txt").write_text("x")
    found = inspect(build_run({"adapter": {}, "data": {"path": tmp_path / "p"}}))
    assert plot_sizes(found) is plot_lengths(found) is plot_words(found) is None
    text = screen(found, advise(found), Path("out"))
    assert "0 held out, 1 rejected" in " ".join(text.split())
    assert f"A run STOPS no picture of {tmp_path / 'p'} can be used" in text
    assert Page(page_text(found, [])).pictures == 0
