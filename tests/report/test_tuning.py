"""The report of a tuning, from a tuning.json whose every number is known."""

import json
from pathlib import Path

import pytest

from t2ilib.config import ConfigError
from t2ilib.report.tuning import (
    load_tuning,
    plot_hours,
    plot_values,
    sentences,
    tuning_figures,
    tuning_markdown,
    tuning_table,
)

RATE = "optimizer.learning_rate"
SEARCH = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def trial(number: int, rate: float | None, score: float | None, minutes: float = 60, state: str = "scored") -> dict:
    values = {} if rate is None else {RATE: rate}
    return {
        "number": number,
        "state": state,
        "values": values,
        "score": score,
        "seconds": 60 * minutes,
        "extends": False,
    }


def variant(title: str, scores: list[float | None], minutes: float, best: int | None, **told) -> dict:
    trials = [trial(i, RATES[i], s, minutes, "diverged" if s is None else "scored") for i, s in enumerate(scores)]
    usual = {"class": "tuned", "search": SEARCH, "at_end": {}, "ended": "its 5 trials are made"}
    return {"title": title, "trials": trials, "best": best} | usual | told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`quick` has the same five scores as `slow` in half the time; `steady` beats it at first; `open` is best at its end."""
    content = {
        "study": "toy",
        "preset": "full",
        "score": {"title": "learned and kept together", "unit": "share", "better": "higher"},
        "parts": ["concept/all", "base_kept/all"],
        "order": ["base", "quick", "slow", "steady", "open", "itself"],
        "budget": {"trials": 5, "hours": None, "seeds": [1000], "extensions": 4},
        "variants": {
            "quick": variant("Quick", [0.1, 0.2, 0.8, 0.3, 0.2], 30, 2),
            "slow": variant("Slow", [0.1, 0.2, 0.8, 0.3, 0.2], 60, 2),
            "steady": variant("Steady", [0.5, 0.5, 0.5, 0.5, None], 30, 1),
            "open": variant("Open", [0.1, 0.1, 0.1, 0.1, 0.2], 30, 4, at_end={RATE: "high"}, ended=None),
            "itself": {
                "title": "Itself",
                "class": "tunes itself",
                "search": {},
                "trials": [trial(0, None, 0.4, 45)],
                "best": 0,
                "at_end": {},
                "ended": "there is nothing to search",
            },
        },
    }
    (tmp_path / "tuning.json").write_text(json.dumps(content))
    return tmp_path


def test_the_table_says_what_is_best_and_how_each_search_ended(folder: Path) -> None:
    rows = {row["variant"]: row for row in tuning_table(load_tuning(folder))}
    assert rows["quick"] == {
        "variant": "quick",
        "class": "tuned",
        "best values": "learning_rate 0.001",
        "learned and kept together": "80.0 %",
        "trials": "5",
        "hours": "2.5",
        "search": "its 5 trials are made",
        "best inside": "yes",
    }
    assert rows["steady"]["trials"] == "5 (1 diverged)"
    assert rows["open"]["best inside"] == "no: learning_rate at its high end"
    assert rows["open"]["search"] == "not ended"
    assert (rows["itself"]["class"], rows["itself"]["best inside"]) == ("tunes itself", "")


def test_who_leads_from_when_on_is_said_in_hours(folder: Path) -> None:
    """Quick's expected bests of 1 to 5 are by hand 0.32, 0.47, 0.59, 0.7 and 0.8: it passes Steady's 0.42, 0.5, 0.5 ... at the third."""
    curve = load_tuning(folder).curve("quick")
    assert curve.best == pytest.approx((0.32, 0.47, 0.59, 0.7, 0.8))
    assert load_tuning(folder).curve("steady").best[0] == pytest.approx((4 * 0.5 + 0.1) / 5), (
        "diverged: as bad as the worst"
    )
    said = sentences(load_tuning(folder))
    assert said == [
        "Quick leads Slow from 1 h of tuning on, as soon as both have a trial.",
        "Quick and Steady cross at 1.5 h; Quick leads from 1.5 h on.",
        "Quick leads Open from 0.5 h of tuning on, as soon as both have a trial.",
        "Itself, which tunes itself, takes 0.75 h; Quick is expected to be ahead of it once 1 h are searched.",
    ]


def test_the_section_says_what_a_reader_must_know(folder: Path) -> None:
    text = tuning_markdown(load_tuning(folder))
    assert text.startswith("## Tuning\n\nBefore the seeds of the preset *full* were spent")
    for told in (
        "with the same budget: 5 trials",
        "with seed 1000",
        "No trial was stopped early",
        "- Open: its best optimizer.learning_rate is the highest that was tried",
        "- Steady: training diverged at learning_rate 0.01, which counts as worse than all else.",
        "- Itself: a class of its own",
        "- Open: its search has not ended.",
        "cross at 1.5 h",
    ):
        assert told in text
    assert text.count("\n| quick |") == 1 + 5, "its row, and all its trials"


def test_figures_have_a_panel_a_variant_and_a_line_each(folder: Path) -> None:
    tuning = load_tuning(folder)
    values, hours = plot_values(tuning), plot_hours(tuning)
    shown = [axes for axes in values.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["quick", "slow", "steady", "open"]
    assert all(axes.get_xscale() == "log" for axes in shown)
    assert list(shown[0].lines[0].get_xdata()) == list(RATES)
    assert [line.get_marker() for line in shown[2].lines] == ["o", "x", "o"]
    assert shown[0].lines[-1].get_xdata()[0] == 1e-3
    lines = hours.axes[0].lines
    assert len(lines) == 5
    assert list(lines[0].get_xdata())[:2] == [0.5, 1.0]
    assert lines[-1].get_linestyle() == "--"
    assert [plot.file for plot in tuning_figures(load_tuning(folder))] == ["tuning_values.png", "tuning_hours.png"]


def test_where_less_is_better_the_lowest_is_the_best(folder: Path) -> None:
    told = json.loads((folder / "tuning.json").read_text())
    told["score"] = {"title": "held-out loss", "unit": "loss", "better": "lower"}
    (folder / "tuning.json").write_text(json.dumps(told))
    tuning = load_tuning(folder)
    assert tuning.curve("quick").best[-1] == -0.1
    assert plot_hours(tuning).axes[0].yaxis_inverted()


def test_a_folder_without_a_tuning_has_nothing_to_show(tmp_path: Path) -> None:
    assert (load_tuning(tmp_path), tuning_markdown(None), tuning_figures(None)) == (None, "", [])
    (tmp_path / "tuning.json").write_text('{"score": {}}')
    with pytest.raises(ConfigError, match="is not what `t2ilib study tune` writes"):
        load_tuning(tmp_path)
