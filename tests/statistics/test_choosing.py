"""The checkpoint to keep: a planted best one is found, its doubt is as large as it is, and a flat curve is told to be one."""

import itertools
import statistics

import numpy as np
import pytest

from t2ilib.config import ConfigError
from t2ilib.seeds import numpy_generator_for
from t2ilib.statistics.choosing import Measured, alone, choose_step, draw_weights, harmonic_mean, resample

STEPS = [100, 200, 300, 400, 500, 600]


def planted(truth, num_pictures, seed, num_runs=1, run_noise=0.0, group="concept"):
    """Pictures that are right with the probabilities of `truth`, each prompt as hard at every checkpoint: right where its difficulty, which
    all checkpoints share, lies below the checkpoint's truth."""
    random = numpy_generator_for(seed, "planted", group)
    hard = random.random((num_runs, 1, num_pictures)) * 0.5 + random.random((1, 1, num_pictures)) * 0.5
    own = random.normal(0, run_noise, (num_runs, len(truth), 1)) + random.normal(0, 0.1, (num_runs, len(truth), num_pictures))  # fmt: skip
    pictures = (hard < np.asarray(truth)[None, :, None] + own).astype(float)
    return Measured(pictures.mean(2), pictures, group)


def test_harmonic_mean_is_the_libraries():
    for a, b in itertools.product([0.0, 0.2, 0.5, 1.0], repeat=2):
        assert harmonic_mean({"a": np.array([a]), "b": np.array([b])})[0] == pytest.approx(
            statistics.harmonic_mean([a, b])
        )


def test_a_planted_best_step_is_found():
    learned = planted([0.1, 0.4, 0.7, 0.9, 0.9, 0.9], 200, 0)
    kept = planted([1.0, 1.0, 0.95, 0.9, 0.5, 0.2], 200, 0, group="base_kept")
    choice = choose_step(STEPS, {"learned": learned, "kept": kept}, harmonic_mean)
    assert choice.best == choice.recommended == 400
    assert choice.told_apart
    assert set(choice.behind) >= {100, 200, 600}
    assert choice.sentence().startswith("step 400 (best in ")
    assert choice.share > 0.95
    assert "scored best" in choice.reason()


def test_the_earliest_of_those_that_are_as_good_is_recommended():
    plateau = [0.2, 0.7, 0.7, 0.7, 0.7, 0.7]
    chosen = [choose_step(STEPS, {"learned": planted(plateau, 100, seed)}, alone, resamples=300) for seed in range(40)]
    assert all(choice.best in STEPS[1:] and choice.behind[:1] == (100,) for choice in chosen)
    earlier = [choice for choice in chosen if choice.recommended < choice.best]
    assert len(earlier) > 10
    assert all(choice.recommended in choice.as_good for choice in chosen)
    assert np.mean([choice.recommended for choice in chosen]) < np.mean([choice.best for choice in chosen]) - 40
    assert f"step {earlier[0].recommended}, as good as step {earlier[0].best} (best in" in earlier[0].sentence()
    assert "earliest within one standard error" in earlier[0].reason()


@pytest.mark.parametrize(("num_runs", "count", "share"), [(1, 40, 0.6), (3, 24, 0.6), (1, 24, 0.05), (1, 100, 0.1)])
def test_a_flat_curve_is_told_to_be_flat(num_runs, count, share):
    """In some 5% of flat curves anything is called behind, whatever the number of checkpoints and runs, and where hardly a picture is right."""
    flat = [planted([share] * 6, count, seed, num_runs) for seed in range(100)]
    chosen = [choose_step(STEPS, {"learned": metric}, alone, resamples=400) for metric in flat]
    assert np.mean([choice.told_apart for choice in chosen]) <= 0.09
    assert all(("cannot be told apart" in choice.reason()) != choice.told_apart for choice in chosen)


def test_a_checkpoint_that_is_noisy_hides_none_that_is_surely_behind():
    """Two that never score at all, beside one that scores on most of a few prompts."""
    good = numpy_generator_for(0, "good").random(8) * 0.6 + 0.2
    pictures = np.stack([good * 0.5, good, np.zeros(8), np.zeros(8)])[None]
    choice = choose_step([1, 2, 3, 4], {"x": Measured(pictures.mean(2), pictures, "g")}, alone)
    assert choice.best == 2
    assert set(choice.behind) >= {3, 4}


def test_the_share_of_resamples_is_how_often_the_step_is_best_in_other_prompts():
    """The doubt that is told is about as large as that of the same checkpoints asked other prompts of the same kind."""
    truth = [0.5, 0.62, 0.68, 0.66, 0.6, 0.5]
    chosen = [choose_step(STEPS, {"x": planted(truth, 60, seed)}, alone, resamples=300) for seed in range(60)]
    inside = np.mean([choice.earliest <= 300 <= choice.latest for choice in chosen])
    assert inside >= 0.9
    told, right = np.mean([choice.share for choice in chosen]), np.mean([choice.best == 300 for choice in chosen])
    assert abs(told - right) < 0.15


def test_the_error_of_a_resample_is_that_of_a_mean():
    """n - 1 of n drawn: the variance over resamples is s^2 / n, for as few as three runs (closed form)."""
    values = np.array([[1.0], [2.0], [6.0]])
    drawn = resample({"x": Measured(values)}, alone, 3, 200_000, 0)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.02)
    assert drawn.mean() == pytest.approx(values.mean(), rel=0.01)
    pictures = np.arange(12.0).reshape(1, 1, 12)
    drawn = resample({"x": Measured(pictures.mean(2), pictures, "g")}, alone, 1, 100_000, 0)
    assert drawn.var() == pytest.approx(pictures.var(ddof=1) / 12, rel=0.03)


def test_prompts_are_paired_over_checkpoints_and_metrics():
    """Prompts that are hard at both checkpoints alike: the scores are far from sure, which is better is sure."""
    random = numpy_generator_for(0, "hard")
    hard = random.random(30)
    pictures = np.stack([hard, hard + 0.01])[None]
    choice = choose_step([1, 2], {"x": Measured(pictures.mean(2), pictures, "g")}, alone)
    assert choice.best == choice.recommended == 2
    assert choice.share == 1.0
    assert choice.behind == (1,)
    assert choice.high[0] - choice.low[0] > 0.1
    opposite = {
        "x": Measured(pictures.mean(2), pictures, "g"),
        "y": Measured(1 - pictures.mean(2), 1 - pictures, "g"),
    }
    drawn = resample(opposite, lambda m: m["x"] + m["y"], 1, 100, 0)
    assert np.allclose(drawn, 1.0), "what one metric gains the other loses, prompt by prompt"


def test_lower_may_be_better_and_the_base_is_no_candidate():
    losses = np.array([[[0.1] * 8, [0.5] * 8, [0.3] * 8, [0.4] * 8]]) + np.linspace(0, 0.05, 8)
    measured = {"held_out_loss": Measured(losses.mean(2), losses, "held out")}
    choice = choose_step([0, 10, 20, 30], measured, alone, higher_is_better=False, base=0)
    assert choice.best == 20
    assert choice.candidates == (10, 20, 30)
    assert choice.low[1] < choice.score_of(10) < choice.high[1]
    assert choice.score_of(10) == pytest.approx(0.525)
    assert choice.over_base[0] == pytest.approx(-0.2), "the base has the lower loss"
    assert choice.behind == (10, 30)


def test_what_cannot_be_resampled_is_said_to_be_so():
    values = np.array([[0.2, 0.5, 0.4]])
    choice = choose_step([1, 2, 3], {"x": Measured(values)}, alone)
    assert (choice.recommended, choice.share, choice.low, choice.told_apart) == (2, None, None, None)
    assert "cannot be told" in choice.sentence()
    several = choose_step([1, 2, 3], {"x": Measured(values + np.array([[0.0], [0.1], [0.05]]))}, alone)
    assert several.share == 1.0, "runs can be resampled"
    with pytest.raises(ConfigError, match="no checkpoint to choose"):
        choose_step([0], {"x": Measured(values[:, :1])}, alone, base=0)
    with pytest.raises(ConfigError, match="other runs or checkpoints"):
        choose_step([1, 2], {"x": Measured(values)}, alone)


def test_pictures_that_a_metric_is_not_about_are_left_out():
    pictures = np.array([[[1.0, np.nan, 0.0, 1.0], [1.0, np.nan, 1.0, 1.0]]])
    choice = choose_step([1, 2], {"x": Measured(np.nanmean(pictures, 2), pictures, "g")}, alone)
    assert choice.best == 2
    assert np.isfinite(choice.low).all()


def test_weights_are_shares():
    weights = draw_weights(5, 50, 0, "x")
    assert np.allclose(weights.sum(1), 1)
    assert weights.std() > 0
    assert np.allclose(draw_weights(1, 3, 0, "x"), 1)
