"""A blind vote from end to end: the page in a browser, the file that it saves, and the votes among a study's results."""

import json
import re

import pytest
import yaml
from browsing import lacking, open_browser
from stepping import picture, write_measured_run

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import build_settings
from t2ilib.drawing.voting import Votes, build_ballot, count, export_votes, import_votes
from t2ilib.report import balloting
from t2ilib.report.ballot_page import ballot_digest, ballot_page, scramble
from t2ilib.report.balloting import common_prompts, contenders, make_ballot, share_out, step_of, take_votes
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import plan_runs

NAMES = ("plainlora", "weightdora")
SETTINGS = tuple(build_settings({"adapters": [{"path": f"results/{name}"}]}) for name in NAMES)
COLORS = dict(zip(NAMES, (90, 200), strict=True))


def ballot_of(prompts=("a </script> heart", "two “squares”", "a cross"), num_pictures=2, seed=2**62 + 1):
    return build_ballot(tuple(zip(NAMES, SETTINGS, strict=True)), prompts, seed, num_pictures)


@pytest.fixture
def page(tmp_path):
    """The page of six pairs, each variant in a grey of its own."""
    ballot = ballot_of()
    files = [
        tuple(picture(tmp_path / f"{pair.number}{side}.png", COLORS[name]) for side, name in (("l", pair.left), ("r", pair.right)))
        for pair in ballot.pairs()
    ]  # fmt: skip
    path = tmp_path / "ballot.html"
    path.write_text(ballot_page(ballot, files, "my study.yaml"), encoding="utf-8")
    return path, ballot


def test_scrambling_twice_gives_the_content_and_follows_the_papers_generator():
    assert scramble(scramble(b"names \xff\x00", 7), 7) == b"names \xff\x00"
    stream = scramble(bytes(2), 2463534242)  # whose first word is 723471715 (Marsaglia 2003, section 3)
    assert stream[0] == 723471715 & 0xFF


def test_the_source_says_nothing_by_accident(page):
    text = page[0].read_text(encoding="utf-8")
    for name in (*NAMES, "results/"):
        assert name not in text
    assert not re.search(r"https?:", text)
    assert text.count("</script>") == 3, "a prompt cannot end a script"
    assert "tEXt" not in text


needs_browser = pytest.mark.skipif(bool(lacking()), reason=lacking())


def grey(tab, image):
    """The shade of what an image on the page shows."""
    return tab.evaluate(
        """id => { const c = document.createElement('canvas'), i = document.getElementById(id);
        c.width = c.height = 1; const p = c.getContext('2d'); p.drawImage(i, 0, 0, 1, 1); return p.getImageData(0, 0, 1, 1).data[0]; }""",
        image,
    )


def settled(tab):
    tab.wait_for_function("[...document.images].every(image => !image.src || (image.complete && image.naturalWidth))")


@needs_browser
def test_votes_through_the_page_are_read_back(page, tmp_path):
    """Whoever always prefers the darker picture votes for the one that draws it, by keys, buttons and pictures alike."""
    path, ballot = page
    asked = []
    with open_browser() as browser:
        tab = browser.new_page(accept_downloads=True)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: asked.append(message.text))
        tab.goto(path.as_uri())
        assert "6" in tab.inner_text("#count")
        tab.fill("#voter", "ann")
        tab.click("#start")
        for number, pair in enumerate(ballot.pairs()):
            settled(tab)
            assert tab.inner_text("#prompt") == f"“{pair.prompt}”"
            assert tab.inner_text("#place") == f"Pair {number + 1} of 6"
            assert not any(name in tab.content() for name in NAMES)
            left = grey(tab, "left") < grey(tab, "right")
            if number == 0:
                tab.keyboard.press("ArrowRight" if left else "ArrowLeft")  # a slip
                tab.keyboard.press("Backspace")
                settled(tab)
            if number == 5:
                tab.keyboard.press(" ")
            elif number % 2:
                tab.click("#voteLeft" if left else "#voteRight")
            else:
                tab.keyboard.press("ArrowLeft" if left else "ArrowRight")
        assert tab.inner_text("#ended") == "All 6 pairs are voted on."
        assert not tab.is_visible("#outcome")
        tab.click("#show")
        interval = count(NAMES, [NAMES[0]] * 5)
        told = tab.inner_text("#outcome")
        assert told.startswith("5 of 5 decided votes are for plainlora: 100%")
        assert f"95% interval {interval.low:.0%} to {interval.high:.0%}. You prefer plainlora." in told
        with tab.expect_download() as download:
            tab.click("#save")
        assert download.value.suggested_filename == "votes-ann.json"
        download.value.save_as(tmp_path / "votes.json")
        tab.reload()
        assert tab.is_visible("#outcome"), "who has seen the result votes no more"
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()] * 2
    votes = import_votes(tmp_path / "votes.json", ballot)
    assert [vote.choice for vote in votes.votes] == [NAMES[0]] * 5 + ["tie"]
    assert {vote.voter for vote in votes.votes} == {"ann"}
    written = json.loads((tmp_path / "votes.json").read_text(encoding="utf-8"))
    export_votes(votes, tmp_path / "again.json")
    assert written == json.loads((tmp_path / "again.json").read_text()), "the same file as t2ilib writes"
    assert written["ballot"]["seed"] == 2**62 + 1


@needs_browser
def test_stopping_early_a_reload_and_a_nameless_voter(page, tmp_path):
    path, ballot = page
    with open_browser() as browser:
        tab = browser.new_page(accept_downloads=True)
        tab.goto(path.as_uri())
        tab.click("#start")
        tab.keyboard.press("ArrowLeft")
        tab.reload()
        assert tab.inner_text("#start") == "Go on (1 of 6 done)"
        tab.click("#start")
        assert tab.inner_text("#place") == "Pair 2 of 6"
        tab.keyboard.press("ArrowRight")
        tab.click("#leave")
        assert tab.inner_text("#ended") == "2 of 6 pairs are voted on."
        tab.click("#again")
        assert tab.inner_text("#place") == "Pair 3 of 6"
        tab.click("#leave")
        tab.click("#show")
        with tab.expect_download() as download:
            tab.click("#save")
        download.value.save_as(tmp_path / "votes.json")
    votes = import_votes(tmp_path / "votes.json", ballot).votes
    pairs = ballot.pairs()
    assert [(vote.pair, vote.choice) for vote in votes] == [(0, pairs[0].left), (1, pairs[1].right)]
    assert re.fullmatch(r"anonymous-[0-9a-f]{6}", votes[0].voter), "so that voters can be counted"


@needs_browser
def test_the_pages_interval_is_scipys(page):
    with open_browser() as browser:
        tab = browser.new_page()
        tab.goto(page[0].as_uri())
        for wins, of in ((0, 1), (1, 3), (7, 9), (12, 24), (130, 200)):
            expected = count(NAMES, [NAMES[0]] * wins + [NAMES[1]] * (of - wins))
            assert tab.evaluate(f"wilson({wins}, {of})") == pytest.approx([expected.low, expected.high])


def test_prompts_are_shared_out_evenly():
    prompts = [f"p{i}" for i in range(10)]
    assert share_out({"a": prompts}, 4) == (["p0", "p2", "p5", "p7"], 1)
    assert share_out({"a": prompts}, 20) == (prompts, 2)
    assert share_out({"a": ["a", "b", "a"]}, 24) == (["a", "b"], 12)
    some, each = share_out({"a": prompts}, 24)
    assert (len(some), each) == (8, 3), "24 and no more"
    other = [f"q{i}" for i in range(10)]
    assert share_out({"a": prompts, "b": other}, 4) == (["p0", "q0", "p5", "q5"], 1)
    some, each = share_out({"a": prompts, "few": ["x"], "b": other}, 9)
    assert (some, each) == (["p0", "q0", "x", "p2", "q2", "p5", "q5", "p7", "q7"], 1)
    assert step_of("lora@400", "400") == 400
    with pytest.raises(ConfigError, match="lora@400"):
        step_of("lora@last", "last")


@pytest.fixture
def study(tmp_path):
    """A study of two variants that finished, seed 1 of the second not."""
    content = {
        "name": "toy",
        "question": "?",
        "reference": "lora",
        "run": {"data": {"source": "shapes"}, "adapter": {"rank": 2}},
        "presets": {"quick": {"seeds": [1, 0]}},
        "variants": {"lora": {"title": "LoRA"}, "dora": {"title": "DoRA", "run": {"adapter": {"kind": "dora"}}}},
    }
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(content))
    results = tmp_path / "results"
    for run in plan_runs(load_study(file), file, "quick", results):
        if run.label != "dora seed 1":
            write_measured_run(run.folder, run.seed, count=8)
            (run.folder / "result.json").write_text(json.dumps({"digest": run.digest, "run": run.settings}))
            (run.folder / "adapter").mkdir()
            (run.folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(run.label.encode())
    return file, results


@pytest.fixture
def made(study, monkeypatch, tmp_path):
    """Its ballot, of pictures that nobody drew."""
    file, results = study
    drawn = lambda ballot, *more: [(picture(tmp_path / "l.png", 9), picture(tmp_path / "r.png", 99)) for _ in ballot.pairs()]  # noqa: E731  # fmt: skip
    monkeypatch.setattr(balloting, "draw_pairs", drawn)
    return make_ballot(file, "quick", ["lora", "dora"], 5, results)


def test_a_ballot_is_of_one_training_seed_and_of_prompts_that_were_measured(study, made):
    file, results = study
    page, ballot = made
    assert page == results / "toy-quick" / "ballots" / f"{ballot_digest(ballot)}.html"
    assert import_votes(page.with_suffix(".json"), ballot).votes == []
    paths = [variant.settings.adapters[0].path for variant in ballot.variants]
    assert [path.rsplit("/", 2)[1:] for path in paths] == [["lora", "seed0"], ["dora", "seed0"]]
    assert all(len(variant.settings.adapters[0].digest) == 12 for variant in ballot.variants)
    assert len(ballot.prompts) == 5
    assert {prompt.split()[0] for prompt in ballot.prompts} == {"concept", "base_kept"}, "of both groups"
    runs = plan_runs(load_study(file), file, "quick", results)
    groups = common_prompts(runs[2], runs[3])
    assert {name: len(prompts) for name, prompts in groups.items()} == {"concept": 8, "base_kept": 8}
    with pytest.raises(ConfigError, match="no finished training seed in common"):
        contenders(file, "quick", ["lora", "dora"], results, 1)
    with pytest.raises(ConfigError, match="between two variants"):
        make_ballot(file, "quick", ["lora"], 5, results)
    with pytest.raises(ConfigError, match="Did you mean 'dora'"):
        make_ballot(file, "quick", ["lora", "dorra"], 5, results)


def votes_by(ballot, voter, choices):
    votes = Votes(ballot)
    for pair, choice in zip(ballot.pairs(), choices, strict=False):
        votes.vote(pair, "tie" if choice == "tie" else "left" if pair.left == choice else "right", voter)
    return votes


def test_votes_are_taken_once_and_only_those_on_the_studys_own_pictures(study, made, tmp_path):
    file, results = study
    ballot = made[1]
    export_votes(votes_by(ballot, "ann", ["lora"] * 5), tmp_path / "ann.json")
    export_votes(votes_by(ballot, "bob", ["dora", "tie"]), tmp_path / "bob.json")
    taken = take_votes(file, "quick", [tmp_path / "ann.json", tmp_path / "bob.json"], results)
    assert [new for *_, new in taken] == [5, 2]
    target = results / "toy-quick" / "votes" / f"{ballot_digest(ballot)}.json"
    assert {target} == {path for path, *_ in taken}
    assert import_votes(target, ballot).tally().wins == {"lora": 5, "dora": 1}
    assert [new for *_, new in take_votes(file, "quick", [tmp_path / "ann.json"], results)] == [0]
    before = target.read_bytes()
    retrained = results / "toy-quick" / "dora" / "seed0" / "adapter" / "pytorch_lora_weights.safetensors"
    retrained.write_bytes(b"another training")
    other = make_ballot(file, "quick", ["lora", "dora"], 5, results)[1]
    assert other != ballot, "other adapters are another ballot"
    for path in (results / "toy-quick" / "ballots").glob(f"{ballot_digest(ballot)}.*"):
        path.unlink()
    export_votes(votes_by(other, "cat", ["lora"]), tmp_path / "cat.json")
    with pytest.raises(ConfigError, match="what dora is drawn with differs"):
        take_votes(file, "quick", [tmp_path / "cat.json", tmp_path / "bob.json"], results)
    assert target.read_bytes() == before
    assert len(list(target.parent.iterdir())) == 1, "all or nothing"


def test_without_a_ballot_there_is_nothing_to_take_votes_on(study, tmp_path):
    with pytest.raises(ConfigError, match="has no ballot to vote on"):
        take_votes(study[0], "quick", [tmp_path / "x.json"], study[1])
