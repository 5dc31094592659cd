"""The report on a results folder that the test writes itself, so every number in it is known."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.evaluation import clip
from t2ilib.report import (
    caveats,
    compare,
    describe_variant,
    difference_table,
    explain_metrics,
    format_table,
    headline,
    load_report,
    markdown_table,
    plot_cost_quality,
    plot_learning_curves,
    plot_pictures,
    plots,
    summary_table,
    write_markdown,
)
from t2ilib.shapes import checker
from t2ilib.training.history import COSTS
from t2ilib.training.validation import HELD_OUT

MEASURES = {name: asdict(metric) for name, metric in {**checker.METRICS, **HELD_OUT, **COSTS}.items()}
PROMPTS = [
    "a small red striped circle at the top left on a white background",
    "a large blue heart",
    "a blueprint of a cross",
]
# learned, kept, held-out loss, trainable parameters: far enough apart that eight seeds tell them from noise of 0.01
TRUTH = {
    "base": (0.10, 0.90, None, None),
    "lora": (0.60, 0.80, 0.200, 40_000),
    "dora": (0.70, 0.70, 0.190, 42_000),
    "qlora": (0.60, 0.80, 0.200, 40_000),
}


def write_run(folder, variant, seed, truth):
    """Seed noise is shared by all variants, with alternating +-0.004 on top that leaves qlora equal to lora on average."""
    learned, kept, loss, parameters_trained = truth
    shared, own = 0.01 * math.sin(seed), 0.004 * (-1) ** seed * (variant == "qlora")
    metrics = {
        "concept/learned": learned + shared + own,
        "base_kept/all": kept + shared + own,
        "peak_process_mib": 900.0 + seed,
    }
    path = folder / variant / f"seed{seed}"
    (path / "pictures").mkdir(parents=True)
    if loss is not None:
        metrics |= {"held_out_loss": loss + (shared + own) / 10, "trainable_parameters": parameters_trained}
        metrics["steps_per_second"] = 2.0 + shared + own
        lines = [{"step": 0, "held_out_loss": 0.5}]
        lines += [{"step": step, "loss": 0.3 - 0.001 * step, "grad_norm": 1.0} for step in range(1, 101)]
        lines += [{"step": step, "held_out_loss": loss + (100 - step) / 1000 + shared / 10} for step in (50, 100)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "pictures" / "prompts.json").write_text(json.dumps(PROMPTS))
    for index in range(len(PROMPTS)):
        Image.fromarray(np.full((16, 16, 3), 40 * index + seed, np.uint8)).save(path / "pictures" / f"{index:02d}.png")
    result = {"variant": variant, "seed": seed, "status": "finished", "seconds": 60.0, "mlflow_run_id": None}
    (path / "result.json").write_text(json.dumps(result | {"run": {}, "metrics": metrics, "measures": MEASURES}))


def write_study(folder, seeds, truth=TRUTH, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    variants = {
        name: {
            "title": name.upper(),
            "overview": f"What {name} is.",
            "hypothesis": f"{name} learns more.",
            "how_it_helps": f"How {name} helps.",
            "origin": f"Paper of {name}.",
        }
        for name in truth
    }
    study = {
        "name": "adapters",
        "question": "Which adapter?",
        "preset": "quick",
        "reference": "lora",
        "base": "base",
        "seeds": list(seeds),
    }
    (folder / "study.json").write_text(json.dumps(study | {"variants": variants} | changes))
    for name, numbers in truth.items():
        for seed in seeds:
            write_run(folder, name, seed, numbers)
    return folder


def cells(rows, variant):
    return next(row for row in rows if row["variant"].startswith(variant))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), range(8))


def test_summary_has_means_intervals_and_dashes(folder):
    rows = summary_table(load_report(folder))
    assert [row["variant"] for row in rows] == ["BASE (untouched)", "LORA (reference)", "DORA", "QLORA"]
    shares = [100 * (0.6 + 0.01 * math.sin(seed)) for seed in range(8)]
    half = 2.364624 * np.std(shares, ddof=1) / math.sqrt(8)  # t(0.975, 7) from a printed table
    assert cells(rows, "LORA")["concept learned"] == f"{np.mean(shares):.1f} ± {half:.1f} %"
    assert cells(rows, "LORA")["trainable parameters"] == "40,000"
    assert cells(rows, "LORA")["runs"] == "8/8"
    assert cells(rows, "BASE")["held-out loss"] == cells(rows, "BASE")["trainable parameters"] == "–"
    assert "CLIP score, base" not in rows[0]
    assert "nan" not in str(rows).lower()


def test_differences_find_what_is_there_and_nothing_else(folder):
    report = load_report(folder)
    learned, kept = compare(report, "concept/learned"), compare(report, "base_kept/all")
    assert (learned["dora"].verdict, kept["dora"].verdict) == ("better", "worse")
    assert (learned["qlora"].verdict, kept["qlora"].verdict) == ("no difference shown", "no difference shown")
    assert learned["dora"].difference.mean == pytest.approx(0.1)
    assert learned["dora"].difference.p_value == 2 / 2**8
    assert learned["dora"].adjusted_p == 4 / 2**8  # two more patterns make qlora as steady
    assert learned["base"].adjusted_p == learned["base"].difference.p_value  # outside the family
    row = cells(difference_table(report, "concept/learned"), "DORA")
    assert (row["difference"], row["pairs"], row["p"], row["p (adjusted)"], row["verdict"]) == (
        "+10.0 pp",
        "8",
        "0.008",
        "0.016",
        "better",
    )
    assert cells(difference_table(report, "held_out_loss"), "BASE")["verdict"] == "not measured"
    assert cells(difference_table(report, "trainable_parameters"), "DORA")["verdict"] == "higher"
    assert cells(difference_table(report, "trainable_parameters"), "QLORA")["verdict"] == "equal"


def test_headline_and_descriptions_say_what_was_measured(folder):
    report = load_report(folder)
    text = headline(report)
    assert "**Learned most: DORA**" in text
    assert "**distinguishable** against all 2 others" in text
    assert "**Fewest trainable parameters: LORA and QLORA** (40,000); next is DORA (42,000)" in text
    dora, qlora = describe_variant(report, "dora"), describe_variant(report, "qlora")
    for heading, told in (
        ("Overview", "What dora is."),
        ("How it helps", "How dora helps."),
        ("Origin of the idea", "Paper of dora."),
    ):
        assert f"*{heading}.* {told}" in dora
    assert "*Result.*" in dora
    assert "*Why.*" in dora
    assert "**better**" in dora
    assert "dora learns more." in dora
    assert "a trade, not a gain" in dora
    assert "1.1 times the reference's parameters (42,000 against 40,000)" in dora
    assert "no difference shown" in qlora
    assert "neither supports nor refutes" in qlora
    assert "because" not in (dora + qlora)
    with pytest.raises(ConfigError, match="Did you mean 'dora'"):
        describe_variant(report, "dorra")


def test_missing_runs_and_metrics_are_named_never_zero(tmp_path):
    folder = write_study(tmp_path / "study", range(3))
    (folder / "dora" / "seed1" / "result.json").unlink()
    for path in ("dora/seed0", "dora/seed2"):
        result = json.loads((folder / path / "result.json").read_text())
        result["metrics"] |= {"base_kept/all": None, "held_out_loss": float("nan")}
        (folder / path / "result.json").write_text(json.dumps(result))
    report = load_report(folder)
    assert report.missing == (("dora", 1),)
    row = cells(summary_table(report), "DORA")
    assert (row["runs"], row["base kept"], row["held-out loss"]) == ("2/3", "–", "–")
    assert cells(difference_table(report, "concept/learned"), "DORA")["pairs"] == "2"
    assert cells(difference_table(report, "base_kept/all"), "DORA")["verdict"] == "not measured"
    notes = "\n".join(caveats(report))
    assert "DORA, seed 1: **did not finish**" in notes
    assert "dora, seed 0: held_out_loss is nan" in notes
    assert "at least 6 seeds" in notes  # two variants compared: 2 * 2/2^7 is the first below 0.05
    text = write_markdown(report, tmp_path / "out").read_text()
    assert "DORA, seed 1: **did not finish**" in text
    assert "no other verdict was possible" in text


def test_seeds_beyond_the_study_file_count(tmp_path):
    folder = write_study(tmp_path / "study", [0, 1])
    write_run(folder, "dora", 7, TRUTH["dora"])
    report = load_report(folder)
    assert report.seeds == (0, 1, 7)
    assert report.missing == ()
    assert [cells(summary_table(report), name)["runs"] for name in ("LORA", "DORA")] == ["2/3", "3/3"]


def test_one_seed_is_not_tested(tmp_path):
    report = load_report(write_study(tmp_path / "study", [0]))
    assert {row["verdict"] for row in difference_table(report, "concept/learned")} == {"not tested (one seed)"}
    assert "±" not in format_table(summary_table(report))
    assert "lead **not tested** (one seed)" in headline(report)
    assert "One seed: nothing is tested" in caveats(report)[0]
    assert "distinguishable" not in headline(report)


def test_nothing_finished_still_makes_a_report(tmp_path):
    folder = write_study(tmp_path / "study", [0, 1])
    for path in folder.glob("*/seed*/result.json"):
        path.unlink()
    report = load_report(folder)
    assert len(report.missing) == 8
    assert headline(report) == "- Nothing was measured yet."
    text = write_markdown(report, tmp_path / "out").read_text()
    assert "nothing was measured" in text
    assert "## Numbers" not in text, "a heading over nothing"
    assert plot_cost_quality(report) is None


def write_own_study(folder, seeds, scores=True):
    """As `write_study`, of pictures of one's own: nobody counts what was learned, there is held-out loss and perhaps a CLIP score."""
    write_study(folder, seeds)
    for path in folder.glob("*/seed*/result.json"):
        result = json.loads(path.read_text())
        name, seed = path.parts[-3], int(path.parent.name.removeprefix("seed"))
        kept = {
            key: value for key, value in result["metrics"].items() if key not in ("concept/learned", "base_kept/all")
        }
        kept |= {"held_out_loss": 0.5} if name == "base" else {}
        score = {"clip_score/prompts": {"base": 20.0, "lora": 25.0, "dora": 30.0, "qlora": 24.0}[name] + seed / 10}
        measures = {key: asdict(metric) for key, metric in {**HELD_OUT, **COSTS, **clip.METRICS}.items()}
        path.write_text(json.dumps(result | {"metrics": kept | (score if scores else {}), "measures": measures}))
    return folder


def test_pictures_of_ones_own_are_answered_by_loss_score_and_pictures(tmp_path):
    report = load_report(write_own_study(tmp_path / "study", range(8)))
    lines = headline(report).splitlines()
    assert lines[0].startswith("- **Lowest held-out loss: DORA** (0.19")
    assert lines[1].startswith("- **Highest CLIP score: DORA** (30.35")
    assert "**distinguishable** against all 2 others" in lines[0]
    row = cells(summary_table(report, report.tables()["Learned and kept"]), "DORA")
    assert row["CLIP score"].startswith("30.35 ± ")
    text = write_markdown(report, tmp_path / "out").read_text()
    assert "**CLIP score**, against LORA" in text
    assert "concept" not in explain_metrics(report)
    assert "**CLIP score**" in explain_metrics(report)
    cost = plot_cost_quality(report)
    assert [axes.get_ylabel() for axes in cost.axes if axes.get_ylabel()] == [
        "held-out loss (lower is better)",
        "CLIP score",
    ]
    loss, score = cost.axes[0], cost.axes[-1]
    assert loss.yaxis_inverted(), "up is better"
    assert not score.yaxis_inverted()
    assert score.get_ylim()[1] > 30, "cut off as if it were a share"


def test_how_many_pictures_are_held_out_is_a_caveat(tmp_path):
    """The same for all seeds, by design, and a warning where they are few."""
    folder = write_own_study(tmp_path / "study", [0, 1])
    assert not any("Held-out loss is measured on" in note for note in caveats(load_report(folder)))

    def hold_out(count):
        for path in folder.glob("*/seed*/result.json"):
            result = json.loads(path.read_text())
            result["metrics"]["held_out_pictures"] = float(count)
            path.write_text(json.dumps(result))
        (folder / "lora" / "seed0" / "held_out").mkdir(exist_ok=True)
        rows = [{"picture": f"{number}.png", "loss": 0.1} for number in range(count)]
        (folder / "lora" / "seed0" / "held_out" / "step-000100.json").write_text(json.dumps(rows))
        return next(note for note in caveats(load_report(folder)) if note.startswith("Held-out loss is measured on"))

    assert hold_out(1).startswith(
        "Held-out loss is measured on 1 picture (0.png), the same for every seed, so that all runs"
    )
    assert "**That is few**: below 8" in hold_out(1)
    assert "on 3 pictures (0.png, 1.png, 2.png)" in hold_out(3)
    assert "on 48 pictures, the same for every seed" in hold_out(48)
    assert "few" not in hold_out(48)


def test_what_never_began_is_one_line_and_no_rows(tmp_path):
    """Variants left out by --only and seeds left out by --seeds; what began and did not finish is told run by run, as before."""
    folder = write_study(tmp_path / "study", range(6))
    for name in ("dora", "qlora"):
        shutil.rmtree(folder / name)
    for seed in (3, 4, 5):
        shutil.rmtree(folder / "lora" / f"seed{seed}")
        shutil.rmtree(folder / "base" / f"seed{seed}")
    shutil.rmtree(folder / "base" / "seed2")
    (folder / "lora" / "seed1" / "result.json").unlink()
    report = load_report(folder)
    assert (report.present, report.trained, report.seeds) == (["base", "lora"], ["lora"], (0, 1, 2))
    assert report.missing == (("lora", 1),)
    assert [row["name"] for row in summary_table(report)] == ["base", "lora"]
    assert [row["runs"] for row in summary_table(report)] == ["2/3", "2/3"]
    notes = [note for note in caveats(report) if "did not finish" in note or note.startswith("Not run")]
    assert notes == [
        "LORA, seed 1: **did not finish**, so it is in no number here.",
        "Not run (left out by `--only` or `--seeds`, or not reached yet), so in no number here: DORA; QLORA; seeds 3, 4, 5 of all"
        " variants; BASE, seed 2.",
    ]
    text = write_markdown(report, tmp_path / "out").read_text()
    assert text.count("DORA") == 1
    assert len(plot_pictures(report).axes) == 2 * 3
    assert any("With 3 seeds no p-value" in note for note in caveats(report)), "of six seeds three were run"
    shutil.rmtree(folder / "lora")
    assert "LORA, the reference, was not run." in write_markdown(load_report(folder), tmp_path / "out").read_text()


def test_many_variants_that_never_began_are_counted(tmp_path):
    folder = write_study(tmp_path / "study", [0], {"lora": TRUTH["lora"], "base": TRUTH["base"]})
    study = json.loads((folder / "study.json").read_text())
    study["variants"] |= {f"v{number}": {"title": f"V{number}"} for number in range(12)}
    (folder / "study.json").write_text(json.dumps(study))
    note = next(note for note in caveats(load_report(folder)) if note.startswith("Not run"))
    assert note.endswith("here: V0; V1; V2; V3; V4; V5; V6; V7; 4 other variants.")


def test_runs_measured_before_the_prompts_changed_are_told_apart(tmp_path):
    now, before = {"evaluation": {"prompts": ["a cat"]}, "optimizer": {}}, {"evaluation": {"prompts": ["a dog"]}}
    folder = write_study(tmp_path / "study", [0, 1], run=now)
    for path in folder.glob("*/seed*/result.json"):
        changed = path.parts[-3] == "qlora" or path.parts[-3:-1] == ("dora", "seed1")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": before if changed else now}))
    report = load_report(folder)
    assert report.outdated == (("dora", 1), ("qlora", 0), ("qlora", 1))
    note = next(note for note in caveats(report) if "not comparable with the others" in note)
    assert note.endswith("until the study is run again: DORA, seed 1; QLORA.")


def test_what_has_nothing_to_show_is_left_out(tmp_path):
    """No empty frame, no heading over nothing: a study on a base without CLIP, validated on nothing, that drew nothing."""
    folder = write_own_study(tmp_path / "study", [0], scores=False)
    for path in (*folder.glob("*/seed0/metrics.jsonl"), *folder.glob("*/seed0/pictures/prompts.json")):
        path.unlink()
    for path in folder.glob("*/seed*/result.json"):
        result = json.loads(path.read_text())
        del result["metrics"]["held_out_loss"]
        path.write_text(json.dumps(result))
    report = load_report(folder)
    assert plots(report) == []
    assert plot_learning_curves(report) is plot_cost_quality(report) is plot_pictures(report) is None
    assert explain_metrics(report) == ""
    text = write_markdown(report, tmp_path / "out").read_text()
    assert "## Figures" not in text
    assert "Nothing was measured yet that could be compared." in text
    assert not list((tmp_path / "out").glob("*.png"))
    assert list(report.tables()) == ["Cost"]


def test_adamw8bit_on_a_cpu_is_warned_about(tmp_path):
    folder = write_study(tmp_path / "study", [0])
    assert not any("8-bit" in note for note in caveats(load_report(folder)))
    result = json.loads((folder / "dora/seed0/result.json").read_text())
    eight_bit = {"run": {"optimizer": {"name": "adamw8bit"}}}
    (folder / "dora/seed0/result.json").write_text(json.dumps(result | eight_bit))
    assert any(note.startswith("DORA: on a CPU, 8-bit AdamW") for note in caveats(load_report(folder)))
    result["metrics"]["peak_device_mib"] = 4000.0
    (folder / "dora/seed0/result.json").write_text(json.dumps(result | eight_bit))
    assert not any("8-bit" in note for note in caveats(load_report(folder)))


def test_a_variant_is_compared_with_the_neighbour_that_it_names(tmp_path):
    folder = write_study(tmp_path / "study", range(8))
    plain = load_report(folder)
    study = json.loads((folder / "study.json").read_text())
    study["variants"]["qlora"]["against"] = "dora"
    (folder / "study.json").write_text(json.dumps(study))
    report = load_report(folder)
    compared = compare(report, "concept/learned")
    assert compared["qlora"].difference.mean == pytest.approx(-0.10)
    assert compared["qlora"].verdict == "worse"
    assert compared["dora"].difference == compare(plain, "concept/learned")["dora"].difference
    rows = difference_table(report, "concept/learned")
    assert [row["against"] for row in rows] == ["LORA", "LORA", "DORA"]
    assert "against" not in difference_table(plain, "concept/learned")[0]
    assert "-10.0 pp against DORA" in describe_variant(report, "qlora")
    assert "against the reference" in describe_variant(report, "dora")


def test_written_report_has_its_figures(folder, tmp_path):
    path = write_markdown(load_report(folder), tmp_path / "out")
    text = path.read_text()
    for name in ("curves.png", "cost_quality.png", "pictures.png"):
        assert f"]({name})" in text
        with Image.open(path.parent / name) as picture:
            assert min(picture.size) > 300


def test_figures_show_every_variant(folder):
    report = load_report(folder)
    curves = plot_learning_curves(report).axes[0]
    assert [text.get_text() for text in curves.texts] == ["dora", "lora", "qlora"]  # by final loss, lowest first
    assert list(curves.lines[0].get_xdata()) == [0, 50, 100]
    assert len(plot_pictures(report).axes) == 4 * 3
    assert [plot.file for plot in plots(report)] == ["curves.png", "cost_quality.png", "pictures.png"]


def test_a_long_prompt_does_not_push_the_pictures_away(tmp_path):
    folder = write_study(tmp_path / "study", [0])
    for path in folder.glob("*/seed0/pictures/prompts.json"):
        path.write_text(json.dumps(["a long caption " * 30, *PROMPTS[1:]]))
    titles = [axes.get_title() for axes in plot_pictures(load_report(folder)).axes[:3]]
    assert titles[0].endswith("…")
    assert max(map(len, titles)) < 110
    assert titles[1].replace("\n", " ") == PROMPTS[1]


def test_labels_of_crowded_points_do_not_overlap(tmp_path):
    truth = {f"variant-{i}": (0.6 + 0.001 * i, 0.8, 0.2, 40_000) for i in range(9)} | {
        "lora": TRUTH["lora"],
        "base": TRUTH["base"],
    }
    figure = plot_cost_quality(load_report(write_study(tmp_path / "study", [0, 1], truth)))
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader lines
        assert len(boxes) == 11
        assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i))


def test_tables_align_and_escape():
    rows = [{"variant": "a|b", "runs": "3/3"}, {"variant": "longer name", "runs": "–"}]
    assert format_table(rows).splitlines() == [
        "variant      runs",
        "-----------  ----",
        "a|b           3/3",
        "longer name     –",
    ]
    assert "| a\\|b | 3/3 |" in markdown_table(rows)
    assert format_table([]) == "(nothing to show)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"reference": "lorra"}, "reference 'lorra' is not among"), ({"base": "bass"}, "base 'bass' is not among")],
)
def test_a_wrong_study_file_is_an_error(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_report(write_study(tmp_path / "study", [0], **changes))


def test_a_folder_without_a_study_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no study\.json"):
        load_report(tmp_path)
