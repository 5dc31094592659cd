"""Scores: a small language over metrics, held against arithmetic done by hand, and nothing else is understood."""

import pytest

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import Metric
from t2ilib.studies.scoring import TOGETHER, parse_formula, scoring

DECLARED = {
    "held_out_loss": Metric("held-out loss", "loss", "lower", role="loss"),
    "concept/all": Metric("concept", "share", "higher", role="learned"),
    "base_kept/all": Metric("kept", "share", "higher", role="kept"),
    "steps_per_second": Metric("speed", "rate", "higher", role="speed"),
}
RUN = {"held_out_loss": 1.5, "concept/all": 0.5, "base_kept/all": 0.75, "steps_per_second": 4.0, "odd name-2": 3.0}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("harmonic_mean(learned, kept)", 2 / (1 / 0.5 + 1 / 0.75)),
        ("concept/all", 0.5),
        ("mean(concept/all, base_kept/all, 1)", 0.75),
        ("concept/all / base_kept/all", 0.5 / 0.75),
        ("1/2 * learned + 0.5*kept", 0.625),
        ("-held_out_loss", -1.5),
        ("min(learned, kept) - max(0, loss - 1) * (2 + 1)", 0.5 - 0.5 * 3),
        ("'odd name-2' + steps_per_second", 7.0),
        ('"concept/all" - 1e-1', 0.4),
    ],
)
def test_formulas_are_worth_what_they_say(formula: str, value: float) -> None:
    assert scoring([RUN], DECLARED, formula).of(RUN) == pytest.approx(value)


def test_the_metrics_that_play_the_roles_are_named() -> None:
    scored = scoring([RUN], DECLARED, "harmonic_mean(learned, kept)")
    assert scored.parts == ("concept/all", "base_kept/all")
    assert (scored.metric.title, scored.metric.unit) == ("harmonic_mean(learned, kept)", "share")
    assert scoring([RUN], DECLARED, "learned - loss").metric.unit == "score"
    assert scoring([RUN | {"loss": 9.0}], DECLARED, "-'loss'").of(RUN | {"loss": 9.0}) == -9.0


def test_without_a_formula_it_is_the_champions_rule() -> None:
    assert (both := scoring([RUN], DECLARED)).metric is TOGETHER
    assert both.of(RUN) == pytest.approx(0.6)
    assert both.of(RUN | {"concept/all": 0.0}) == 0
    alone = {"held_out_loss": 1.5}
    assert scoring([RUN, alone], DECLARED).metric is DECLARED["held_out_loss"]
    assert scoring([RUN, alone], DECLARED).of(alone) == 1.5
    assert scoring([{"steps_per_second": 1.0}], DECLARED) is None
    assert scoring([], DECLARED) is None


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "learned.real",
        "[learned][0]",
        "learned if kept else 0",
        "learned ** 99",
        "learned < kept",
        "mean(*learned)",
        "mean(learned, default=1)",
        "mean()",
        "mean",
        "f'{learned}'",
        "learned; kept",
        "learned +",
        "True + learned",
        "3j * learned",
        "1 + 2",
        "",
    ],
)
def test_nothing_else_is_understood(formula: str) -> None:
    with pytest.raises(ConfigError, match="score"):
        parse_formula(formula)


def test_mistakes_are_told_with_what_is_right() -> None:
    with pytest.raises(
        ConfigError, match=r"no function harmonic; choose mean, harmonic_mean.*Did you mean 'harmonic_mean'"
    ):
        parse_formula("harmonic(learned, kept)")
    with pytest.raises(ConfigError, match=r"concept/al: it was not measured by every run.*Did you mean 'concept/all'"):
        scoring([RUN], DECLARED, "concept/al")
    with pytest.raises(ConfigError, match="followed: no metric of this role was measured by every run"):
        scoring([RUN], DECLARED, "followed")
    with pytest.raises(ConfigError, match=r"has no value where learned = 0.5, kept = 0"):
        scoring([RUN], DECLARED, "learned / kept").of(RUN | {"base_kept/all": 0.0})
    with pytest.raises(ConfigError, match="a run did not measure base_kept/all"):
        scoring([RUN], DECLARED, "kept").of({})
