"""Preference pairs that are made: ranked by a measure, or drawn again as people voted."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.sources import preferences as source
from t2ilib.drawing.desk import Desk
from t2ilib.drawing.preferences import Prompts, draw_ranked, draw_votes, read_prompts
from t2ilib.drawing.ranking import build_ranker, ranked_pairs, share_right
from t2ilib.drawing.settings import build_settings
from t2ilib.drawing.voting import Votes, build_ballot, export_votes
from t2ilib.runfile import build_run
from t2ilib.shapes.checker import checked_scenes
from t2ilib.shapes.world import Scene, render

BRIEF = {"num_inference_steps": 1, "guidance_scale": 1.0}
MEASURE = """
import numpy as np
from t2ilib.evaluation.context import Measure
from t2ilib.evaluation.metrics import Metric

def darkness(pictures, prompts, context):
    dark = [255 - float(np.asarray(picture).mean()) for picture in pictures]
    return {"dark/{group}".format(group=context.group): dark, "all": 1.0, "bright": [-d for d in dark], "index": list(range(len(pictures)))}

DARK = Measure(darkness, {"dark/{group}": Metric("dark", better="higher"), "bright": Metric("bright", better="lower"), "all": Metric("all"), "index": Metric("index")})
ONE = Measure(lambda *told: {"index": list(darkness(*told)["index"])}, {"index": Metric("index", better="lower")})
"""


@pytest.fixture(scope="module")
def desk(results):
    return Desk(results, device=torch.device("cpu"))


@pytest.fixture
def measure(tmp_path):
    (tmp_path / "dark.py").write_text(MEASURE)
    return f"{tmp_path / 'dark.py'}:DARK"


def table(out):
    return [json.loads(line) for line in (out / "preferences.jsonl").read_text().splitlines()]


def darkness(path):
    return 255 - np.asarray(Image.open(path), float).mean()


def test_best_against_worst_or_all_that_differ():
    assert ranked_pairs([0.5, 1.0, 0.25, 1.0]) == [(1, 2)]
    assert ranked_pairs([0.5, 1.0, 0.25, 1.0], every=True) == [(0, 2), (1, 0), (1, 2), (3, 0), (3, 2)]
    assert ranked_pairs([0.5, 1.0, 0.25, 1.0], least=0.5, every=True) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert ranked_pairs([0.5, 1.0], least=0.51) == ranked_pairs([1.0, 1.0]) == ranked_pairs([None, None]) == []
    assert ranked_pairs([None, 2 / 3, 1 - 1 / 3]) == [], "equal but for rounding"
    assert ranked_pairs([None, 1.0, 3.0]) == [(2, 1)]


def test_the_checkers_share_is_of_what_was_asked_for(tmp_path):
    scene = Scene("square", "red", "large", "center", "white", "upright")
    for name, shown in (("right", scene), ("blue", Scene("square", "blue", "large", "center", "white", "upright"))):
        render(shown, 0).save(tmp_path / f"{name}.png")
    assert share_right(tmp_path / "right.png", scene) == 1.0
    assert share_right(tmp_path / "blue.png", scene) == 7 / 8, (
        "of shape, colour, size, position, background, tilt, fill and style"
    )


def test_prompts_of_the_drawn_world_are_none_that_are_tested(tmp_path):
    prompts = read_prompts(["shapes"], 200, ["base", "heart"], 0)
    run = build_run(
        {"adapter": {}, "data": {"source": "shapes"}, "shapes": {"scenes": ["base", "heart"], "checked_prompts": 200}}
    )
    tested = {scene for scenes in checked_scenes(run).values() for scene in scenes}
    assert len({*prompts.scenes}) == len({*prompts.texts}) == 200
    assert not tested & {*prompts.scenes}
    (tmp_path / "prompts.txt").write_text("a heart\n\n a square \na heart\n")
    assert read_prompts([str(tmp_path / "prompts.txt")], 4, [], 0) == Prompts(("a heart", "a square"))
    for sources, told in (
        ([], "nothing to draw"),
        (["nowhere.txt"], "no such file; write shapes"),
        (["shapes", "x"], "give it alone"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_prompts(sources, 4, ["base"], 0)
    with pytest.raises(ConfigError, match="the drawn world has fewer"):
        read_prompts(["shapes"], 20_000, ["base"], 0)


def test_pairs_by_a_measure_of_ones_own_are_what_the_source_reads(desk, measure, tmp_path):
    settings, out = build_settings({"num_pictures": 3, "seed": 5, **BRIEF}), tmp_path / "out"
    ranker, prompts = build_ranker(measure, "dark/prompts", settings, scenes=False), Prompts(("a heart", "a square"))
    made = draw_ranked(desk, out, prompts, settings, ranker)
    assert made.sentence() == "2 pairs of 2 prompts"
    listing = source.load(DataConfig(source="preferences", path=out))
    assert [record.caption for record in listing] == ["a heart", "a square"]
    assert Counter(why for _, why in listing.aside)["no row of preferences.jsonl names it"] == 2
    for record, line in zip(listing, table(out), strict=True):
        assert [darkness(path) for path in (record.path, record.rejected)] == pytest.approx(line["values"])
        assert darkness(record.path) > darkness(record.rejected)
    drawn = desk.draw([settings.changed(prompt="a heart"), settings.changed(prompt="a square", first=3)]).pictures
    values = sorted(255 - np.asarray(picture.image, float).mean() for picture in drawn[:3])
    assert table(out)[0]["values"] == pytest.approx([values[-1], values[0]], abs=0.1)
    assert "data: {source: preferences, path:" in (out / "README.md").read_text()

    turned = build_ranker(measure, "bright", settings, scenes=False)
    draw_ranked(desk, out, prompts, settings, turned, every=True)
    assert len(table(out)) == 6
    assert table(out)[0]["chosen"] in {line["chosen"] for line in table(out)}
    assert all(darkness(out / line["chosen"]) > darkness(out / line["rejected"]) for line in table(out)), (
        "lower is better"
    )


def test_what_is_there_is_not_drawn_again(desk, measure, tmp_path):
    settings, out, told = build_settings({"num_pictures": 2, **BRIEF}), tmp_path / "out", []
    ranker = build_ranker(measure, "dark/prompts", settings, scenes=False)
    draw_ranked(desk, out, Prompts(("a heart", "a square")), settings, ranker, watch=told.append)
    assert told[-1].total == 4
    before = table(out)
    (out / "preferences.jsonl").unlink()
    (out / before[1]["rejected"]).unlink()
    told.clear()
    draw_ranked(desk, out, Prompts(("a heart", "a square")), settings, ranker, watch=told.append)
    assert told[-1].total == 1
    assert table(out) == before
    told.clear()
    draw_ranked(desk, out, Prompts(("a heart", "a square", "a cross")), settings, ranker, watch=told.append)
    assert told[-1].total == 2
    assert table(out)[:2] == before


def test_what_cannot_be_ranked_is_told(desk, measure, tmp_path):
    settings, prompts = build_settings({"num_pictures": 2, **BRIEF}), Prompts(("a heart",))
    with pytest.raises(ConfigError, match=r"--num-pictures 1: a pair is two pictures"):
        draw_ranked(desk, tmp_path, prompts, build_settings(BRIEF), build_ranker("clip", None, settings, False))
    with pytest.raises(
        ConfigError, match=r"says several things of single pictures \(dark/prompts, bright\): name one by --metric"
    ):
        draw_ranked(desk, tmp_path / "a", prompts, settings, build_ranker(measure, None, settings, False))
    with pytest.raises(
        ConfigError, match=r"--metric of .*dark.py:DARK: 'dork' does not exist; choose from dark/prompts, bright"
    ):
        draw_ranked(desk, tmp_path / "a", prompts, settings, build_ranker(measure, "dork", settings, False))
    with pytest.raises(ConfigError, match="--rank-by checker knows the drawn world alone"):
        build_ranker("checker", None, settings, scenes=False)
    with pytest.raises(ConfigError, match=r"'clap' does not exist.*Did you mean 'clip'"):
        build_ranker("clap", None, settings, scenes=False)
    with pytest.raises(
        ConfigError, match="0 pairs of 1 prompts; left out: 1 prompts whose pictures differ by less than 500"
    ):
        draw_ranked(
            desk, tmp_path / "a", prompts, settings, build_ranker(measure, "dark/prompts", settings, False), least=500
        )
    assert not (tmp_path / "a" / "preferences.jsonl").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "preferences.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="was not written by this command"):
        draw_ranked(desk, tmp_path / "mine", prompts, settings, build_ranker("clip", None, settings, False))


@pytest.fixture
def voted(results):
    """Three voters on four pairs of an adapter and its base: two decided, a tie, and one that nobody saw."""
    base = build_settings(BRIEF)
    variants = (("cat", base.changed(adapters=[{"path": str(results / "cat")}])), ("base", base))
    ballot = build_ballot(variants, ["a heart", "a square"], seed=3, num_pictures=2)
    votes = Votes(ballot)
    for number, choices in enumerate((("cat", "cat", "base"), ("base", "tie"), ("cat", "base"))):
        pair = ballot.pairs()[number]
        for voter, choice in zip(("ann", "bob", "cy"), choices, strict=False):
            votes.vote(pair, {pair.left: "left", pair.right: "right"}.get(choice, "tie"), voter)
    return votes


def test_votes_become_the_pairs_that_were_seen(desk, voted, tmp_path):
    export_votes(voted, tmp_path / "votes.json")
    export_votes(Votes(voted.ballot, voted.votes[:2]), tmp_path / "some.json")
    made = draw_votes(desk, tmp_path / "out", [tmp_path / "some.json", tmp_path / "votes.json"])
    assert (
        made.sentence()
        == "2 pairs of 4 that were to be voted on; left out: 1 that no majority decided, 1 that nobody voted on"
    )
    first, second = table(tmp_path / "out")
    assert (first["text"], first["variants"], first["votes"]) == ("a heart", ["cat", "base"], [2, 1])
    assert (second["text"], second["variants"], second["votes"]) == ("a heart", ["base", "cat"], [1, 0])
    for line, pair in zip((first, second), voted.ballot.pairs(), strict=False):
        seen = dict(zip((pair.left, pair.right), desk.draw(list(pair.settings())).pictures, strict=True))
        for side, name in zip(("chosen", "rejected"), line["variants"], strict=True):
            ours, theirs = (
                np.asarray(image, int) for image in (Image.open(tmp_path / "out" / line[side]), seen[name].image)
            )
            assert abs(ours - theirs).max() <= 1
    assert len(source.load(DataConfig(source="preferences", path=tmp_path / "out"))) == 2


def test_votes_on_another_adapter_are_refused(desk, voted, results, tmp_path):
    one, other = voted.ballot.variants
    stale = one.settings.changed(adapters=[{"path": str(results / "cat"), "digest": "0" * 12}])
    ballot = build_ballot((("cat", stale), ("base", other.settings)), ["a heart"])
    votes = Votes(ballot)
    votes.vote(ballot.pairs()[0], "left")
    export_votes(votes, tmp_path / "votes.json")
    with pytest.raises(
        ConfigError, match=r"cat is another adapter now \(\w{12}\) than the one that was voted on \(0{12}\)"
    ):
        draw_votes(desk, tmp_path / "out", [tmp_path / "votes.json"])


def test_the_command(results, measure, voted, tmp_path):
    def run(*words, code=0):
        done = CliRunner().invoke(app, ["data", "preferences", *map(str, words)])
        assert done.exit_code == code, done.output
        return done.output

    one = measure.replace(":DARK", ":ONE")  # whose number is that of the picture, lower the better
    words = (
        "--prompts",
        "shapes",
        "--count",
        "2",
        "--scenes",
        "heart",
        "--num-pictures",
        "2",
        "--steps",
        "1",
        "--guidance",
        "1",
    )
    told = run(tmp_path / "out", *words, "--adapter", results / "cat", "--rank-by", one)
    assert f"2 pairs of 2 prompts\nin {tmp_path / 'out'}" in told
    assert all("heart" in line["text"] and line["by"] == "index" for line in table(tmp_path / "out"))
    export_votes(voted, tmp_path / "votes.json")
    assert run(tmp_path / "voted", "--votes", tmp_path / "votes.json").startswith("2 pairs of 4 that were")
    assert "give nothing but OUT beside them" in run(tmp_path / "x", "--votes", tmp_path / "votes.json", *words, code=2)
    assert "--count and --scenes are about --prompts shapes" in run(tmp_path / "x", *words[2:], code=2)
    assert "there is nothing to draw" in run(tmp_path / "x", code=2)
