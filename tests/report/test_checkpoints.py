"""What runs' checkpoints measured becomes one choice a variant, numbers that can be read back, and a page that needs nothing else."""

import json
import re

import numpy as np
import pytest
from browsing import lacking, open_browser
from stepping import TRUTH, picture, write_measured_run

from t2ilib.config import ConfigError
from t2ilib.drawing.settings import settings_of_run
from t2ilib.drawing.stepgrid import columns, plan_sheet
from t2ilib.report.checkpoints import read_variant_steps, summary
from t2ilib.report.checkpoints_figures import plot_curves, plot_path
from t2ilib.report.checkpoints_page import page_text
from t2ilib.runfile import load_run


@pytest.fixture
def lora(tmp_path):
    folders = [write_measured_run(tmp_path / "lora" / f"seed{seed}", seed) for seed in (0, 1)]
    return read_variant_steps("lora", "LoRA & co", folders, (0, 1))


def test_the_planted_checkpoint_is_chosen_and_the_loss_would_choose_another(lora):
    assert lora.steps == (0, 100, 200, 300, 400, 500)
    assert lora.deciding.parts == ("concept/all", "base_kept/all")
    assert (lora.choice.best, lora.choice.recommended, lora.by_loss.recommended) == (300, 300, 500)
    assert lora.choice.score_of(300) == pytest.approx(0.9)
    assert lora.choice.told_apart
    assert lora.choice.num_runs == 2
    assert lora.per_run().shape == (2, 6)
    assert list(lora.metrics) == ["concept/all", "base_kept/all", "held_out_loss"]
    assert lora.metrics["concept/all"].pictures.shape == (2, 6, 60)


def test_a_formula_decides_in_the_rules_place(tmp_path):
    folder = write_measured_run(tmp_path / "run")
    learned = read_variant_steps("x", "X", [folder], (0,), formula="learned")
    assert learned.choice.recommended == learned.choice.best == 400, "500 is not better"
    weighed = read_variant_steps("x", "X", [folder], (0,), formula="0.5 * learned + 0.5 * kept - loss / 100")
    assert weighed.choice.recommended == 300
    assert weighed.choice.score_of(300) == pytest.approx(0.9 - lora_loss(weighed, 300) / 100)
    with pytest.raises(ConfigError, match="learnt"):
        read_variant_steps("x", "X", [folder], (0,), formula="learnt")


def lora_loss(own, step):
    return own.metrics["held_out_loss"].values[0, own.steps.index(step)]


def test_without_a_checker_the_loss_decides(tmp_path):
    folder = write_measured_run(tmp_path / "own", metrics=())
    own = read_variant_steps("own", "Own", [folder], (0,))
    assert own.deciding.metric.role == "loss"
    assert own.choice.recommended == 500
    assert own.choice.over_base[0] == pytest.approx(1.5), "lower is better"
    assert plot_path(own) is None
    assert "all that decided" in page_text("T", "", [own], {}, {})


def test_checkpoints_above_a_ceiling_are_flagged(tmp_path):
    measured = ("concept/all", "base_kept/all", "copies")
    own = read_variant_steps("x", "X", [write_measured_run(tmp_path / "x", metrics=measured)], (0,))
    assert own.flags == {400: ("copies: learned by heart",), 500: ("copies: learned by heart",)}
    text = page_text("T", "", [own], {}, {})
    assert "The chosen step is not flagged. copies: learned by heart (step 400, 500)" in text
    late = read_variant_steps("x", "X", own.runs, (0,), formula="learned")
    assert "<b>Step 400 is flagged</b>" in page_text("T", "", [late], {}, {})


def test_what_cannot_be_chosen_is_told(tmp_path):
    nothing = write_measured_run(tmp_path / "nothing", metrics=(), losses=False)
    with pytest.raises(ConfigError, match="hold pictures out"):
        read_variant_steps("nothing", "N", [nothing], (0,))
    early = write_measured_run(tmp_path / "a", truth={0: TRUTH[0], 100: TRUTH[100]})
    late = write_measured_run(tmp_path / "b", 1, truth={0: TRUTH[0], 500: TRUTH[500]})
    with pytest.raises(ConfigError, match="no checkpoint was measured of all its runs"):
        read_variant_steps("x", "X", [early, late], (0, 1))
    both = write_measured_run(tmp_path / "c", 2)
    own = read_variant_steps("x", "X", [early, both], (0, 2))
    assert (own.steps, own.left_out) == ((0, 100), (200, 300, 400, 500))


def test_runs_of_other_pictures_are_resampled_by_run_alone(tmp_path):
    one = write_measured_run(tmp_path / "one", 0)
    other = write_measured_run(tmp_path / "other", 1, count=40)
    own = read_variant_steps("x", "X", [one, other], (0, 1))
    assert own.metrics["concept/all"].pictures is None
    assert own.metrics["held_out_loss"].pictures is not None
    assert own.choice.recommended == 300


def test_numbers_are_json_and_say_what_the_page_says(lora):
    told = json.loads(json.dumps(summary([lora], {"study": "s", "preset": "quick"}), allow_nan=False))
    own = told["variants"]["lora"]
    assert (told["study"], own["recommended"], own["steps"]) == ("s", 300, [0, 100, 200, 300, 400, 500])
    assert own["sentence"] == lora.choice.sentence()
    assert np.shape(own["choice"]["scores_of_runs"]) == (2, 6)
    assert own["metrics"]["base_kept/all"]["values"][0] == pytest.approx([1.0, 59 / 60, 0.95, 0.9, 0.4, 0.2])
    assert own["by_held_out_loss"]["recommended"] == 500


def test_a_grid_has_the_base_in_front_and_one_noise_a_row(lora):
    settings = settings_of_run(load_run(lora.runs[0] / "run.yaml"))
    sheet = plan_sheet(settings, "a red heart", "results/lora", [100, 300], [0.5, 1], [0, 7])
    assert [(row.strength, row.noise) for row in sheet.rows] == [(0.5, 0), (0.5, 7), (1, 0), (1, 7)]
    for row in sheet.rows:
        base, first, second = row.cells
        assert not base.adapters
        assert [cell.adapters[0].step for cell in (first, second)] == [100, 300]
        assert {cell.adapters[0].strength for cell in (first, second)} == {row.strength}
        assert {cell.seed for cell in row.cells} == {row.noise}
        assert first.without_adapters() == base
    assert sheet.rows[0].cells[0] == sheet.rows[2].cells[0], "the base is drawn once for all strengths"
    with pytest.raises(ConfigError, match="at least"):
        plan_sheet(settings, "x", "run", [], [1], [0])
    some = columns([10, 20, 30, 40, 50, 60, 70, 80], [30], 5)
    assert len(some) == 5
    assert {10, 30, 80} < set(some)
    assert columns([10, 20], [20], 6) == [10, 20]
    assert columns([10, 20, 30, 40], [30], 1) == [30]


@pytest.fixture
def page(lora, tmp_path):
    settings = settings_of_run(load_run(lora.runs[0] / "run.yaml"))
    sheet = plan_sheet(settings, 'a "red" <heart>', lora.runs[0], [100, 300, 500], [0.5, 1], [0])
    files = [picture(tmp_path / "drawn" / f"{i}.png", 20 * i) for i in range(len(sheet.jobs()))]
    path = tmp_path / "checkpoints.html"
    left_out = {"dora seed 0": "it is failed"}
    path.write_text(page_text("Which <one>", "Why?", [lora, lora], {"lora": [sheet.filled(files)]}, left_out))
    return path


def test_the_page_says_what_to_keep_and_how_sure_that_is(page):
    text = page.read_text()
    assert "<b>Keep step 300</b>" in text
    assert "best in 100% of resamples" in text
    assert "The held-out loss would have chosen step 500, which scores 33 % and is shown to be behind the best" in text
    assert "LoRA &amp; co" in text
    assert "“a &quot;red&quot; &lt;heart&gt;”" in text
    assert "--checkpoint 300 --format kohya" in text
    assert "it is failed" in text
    assert text.count("<img") >= 2 * 2 + 2 * 8
    assert text.count("without<br>adapter") == 2


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page.read_text())
    assert "url(" not in page.read_text().split("</style>")[0]


@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_a_browser_asks_nobody_for_anything(page):
    asked = []
    with open_browser() as browser:
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: asked.append(message.text))
        tab.goto(page.as_uri())
        broken = tab.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
        assert broken == 0
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def test_a_flat_run_is_said_to_tell_nothing(tmp_path):
    flat = {step: (0.5, 0.9, 2.0) for step in (0, 100, 200, 300)}
    folder = write_measured_run(tmp_path / "flat", truth=flat)
    own = read_variant_steps("flat", "Flat", [folder], (0,))
    assert own.choice.told_apart is False
    assert own.choice.recommended == 100
    text = page_text("T", "", [own], {}, {})
    assert "cannot be told apart" in text
    assert "Not shown to be better than the base" in text


def test_figures_have_something_to_show(lora):
    assert len(plot_curves(lora).axes) == 2, "shares and the score in one, the loss in another"
    assert plot_path(lora) is not None
