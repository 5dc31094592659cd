"""The report on a results folder that the test writes itself, so every number in it is known."""

import json
import math
import shutil

import numpy as np
import pytest
from reporting import TRUTH, cells, write_own_study, write_run, write_study

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import Metric
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
    plot_learned_kept,
    plot_learning_curves,
    plot_overview,
    plot_pictures,
    plots,
    summary_table,
    texts,
    verdict_table,
    write_markdown,
)
from t2ilib.report.tables import write_number


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
    assert (learned["qlora"].verdict, kept["qlora"].verdict) == ("undecided", "undecided")
    assert learned["dora"].difference.mean == pytest.approx(0.1)
    assert learned["dora"].difference.p_value < 1e-12
    assert learned["dora"].exact.p_value == 2 / 2**8
    assert learned["dora"].crossed is None, "nothing is known of single pictures"
    row = cells(difference_table(report, "concept/learned"), "DORA")
    assert row == {
        "variant": "DORA",
        "difference": "+10.0 pp",
        "95% interval alone": "+9.2 to +10.8 pp",
        "of all together": "+9.1 to +10.9 pp",
        "P(above)": ">99 %",
        "p": "<0.001",
        "exact p": "0.008",
        "seeds": "8",
        "verdict": "better",
    }
    row = cells(difference_table(report, "concept/learned"), "QLORA")
    spread = np.mean([np.var(list(report.values(name, "concept/learned").values()), ddof=1) for name in report.trained])
    half = 100 * 2.079614 * math.sqrt(spread * 2 / 8)  # t(0.975, 21) from a printed table: three variants of eight runs
    assert row["95% interval alone"] == f"{-half:+.1f} to {half:+.1f} pp"
    assert row["verdict"].startswith("undecided (8 seeds would show")
    assert cells(difference_table(report, "held_out_loss"), "BASE")["verdict"] == "not measured"
    assert cells(difference_table(report, "trainable_parameters"), "DORA")["verdict"] == "higher"
    assert cells(difference_table(report, "trainable_parameters"), "QLORA")["verdict"] == "equal"


def test_the_table_of_verdicts_has_a_row_a_variant_and_says_against_whom(folder, tmp_path):
    rows = verdict_table(load_report(folder))
    assert [(row["name"], row["against"]) for row in rows] == [
        ("base", "lora"),
        ("lora", "–"),
        ("dora", "lora"),
        ("qlora", "lora"),
    ]
    assert list(rows[0])[3:] == [
        "concept learned",
        "base kept",
        "held-out loss",
        "trainable parameters",
        "steps per second",
    ]
    dora, qlora, lora = (cells(rows, name) for name in ("DORA", "QLORA", "LORA"))
    assert (dora["concept learned"][-8:], dora["base kept"][-7:]) == (", better", ", worse")
    assert qlora["concept learned"].endswith(" %, undecided")
    assert lora["concept learned"].endswith(" %")
    assert dora["trainable parameters"] == "42,000", "a setting is no verdict"
    assert dora["steps per second"].endswith(", undecided")
    shared = verdict_table(load_report(write_study(tmp_path / "shared", [0, 1], jobs=2)))
    assert cells(shared, "DORA")["concept learned"].endswith(", better"), "two seeds are enough for what is plain"
    assert "," not in cells(shared, "DORA")["steps per second"]


def test_headline_and_descriptions_say_what_was_measured(folder):
    report = load_report(folder)
    text = headline(report)
    assert "**Learned most: DORA**" in text
    assert "lead **shown** against all 2 others" in text
    assert "**Fewest trainable parameters: LORA and QLORA** (40,000); next is DORA (42,000)" in text
    dora, qlora = describe_variant(report, "dora"), describe_variant(report, "qlora")
    for heading, told in (
        ("Overview", "What dora is."),
        ("How it helps", "How dora helps."),
        ("Origin of the idea", "Paper of dora."),
        ("Why", "The hypothesis: “dora learns more.” No claim was made of it, so it is not judged here."),
    ):
        assert f"*{heading}.* {told}" in dora
    assert "*Result.*" in dora
    assert "95% interval of all together +9.1 to +10.9 pp, p <0.001): **better**" in dora
    assert "**undecided (8 seeds would show" in qlora
    with pytest.raises(ConfigError, match="Did you mean 'dora'"):
        describe_variant(report, "dorra")


def test_of_many_that_lead_alike_the_number_is_told(folder, monkeypatch):
    monkeypatch.setattr(texts, "NAMED", 1)
    assert "**Fewest trainable parameters: 2 of 3 variants** (40,000); next is DORA" in headline(load_report(folder))


def test_the_report_begins_with_question_pictures_and_verdicts(folder, tmp_path):
    text = write_markdown(load_report(folder), tmp_path / "out").read_text()
    parts = (
        "Which adapter?",
        "](pictures.png)",
        "](learned_kept.png)",
        "## Verdicts",
        "## In short",
        "The champion is",
    )
    later = ("## Before believing it", "## Numbers", "### Cost", "## Differences", "](curves.png)", "## Variants")
    places = [text.index(part) for part in (*parts, *later)]
    assert places == sorted(places)
    for part in parts:
        assert text.count(part) == 1


def test_no_sentence_reasons(folder, tmp_path):
    """Words of reasons that no test here can give, in a report with verdicts of all kinds."""
    text = write_markdown(load_report(folder), tmp_path / "out").read_text()
    for word in ("because", "overfit", "trade", "fits what", "a sign", "supports", "refutes", "holds for", "gap of"):
        assert word not in text, word


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
    assert cells(difference_table(report, "concept/learned"), "DORA")["seeds"] == "2, 3"
    assert cells(difference_table(report, "base_kept/all"), "DORA")["verdict"] == "not measured"
    notes = "\n".join(caveats(report))
    assert "DORA, seed 1: **did not finish**" in notes
    assert "dora, seed 0: held_out_loss is nan" in notes
    assert "something to say from 6 seeds on" in notes
    text = write_markdown(report, tmp_path / "out").read_text()
    assert "DORA, seed 1: **did not finish**" in text
    assert "not measured" in text


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
    assert "lead **not tested (one seed)**" in headline(report)
    assert "One seed: nothing is tested" in caveats(report)[0]
    assert "shown" not in headline(report)


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


def test_pictures_of_ones_own_are_answered_by_loss_score_and_pictures(tmp_path):
    report = load_report(write_own_study(tmp_path / "study", range(8)))
    lines = headline(report).splitlines()
    assert lines[0].startswith("- **Lowest held-out loss: DORA** (0.19")
    assert lines[1].startswith("- **Highest CLIP score: DORA** (30.35")
    assert "**shown** against all 2 others" in lines[0]
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
    assert [axes.get_xlabel() for axes in plot_learned_kept(report).axes] == ["CLIP score"]
    loss, score = cost.axes[0], cost.axes[-1]
    assert loss.yaxis_inverted(), "up is better"
    assert not score.yaxis_inverted()
    assert score.get_ylim()[1] > 30, "cut off as if it were a share"


def test_a_tiny_clip_is_no_judge_of_ones_own_pictures(tmp_path):
    folder = write_own_study(tmp_path / "study", [0])

    def warned(run):
        for path in folder.glob("*/seed*/result.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"run": run}))
        return any("**it says nothing**" in note for note in caveats(load_report(folder)))

    assert warned({"model": {"base": "tiny-sdxl"}})
    assert warned({"optimizer": {}}), "the default base is a tiny one"
    assert not warned({"model": {"base": "tiny-sdxl"}, "evaluation": {"clip_model": "openai/clip-vit-large-patch14"}})
    assert not warned({"model": {"base": "stabilityai/stable-diffusion-xl-base-1.0"}})


def test_how_many_pictures_are_held_out_is_a_caveat(tmp_path):
    """The same for all seeds, by design, and a warning where they are few."""
    folder = write_own_study(tmp_path / "study", [0, 1])
    assert not any("held-out picture" in note for note in caveats(load_report(folder)))

    def hold_out(count):
        for path in folder.glob("*/seed*/result.json"):
            result = json.loads(path.read_text())
            result["metrics"]["held_out_pictures"] = float(count)
            path.write_text(json.dumps(result))
        (folder / "lora" / "seed0" / "held_out").mkdir(exist_ok=True)
        rows = [{"picture": f"{number}.png", "loss": 0.1} for number in range(count)]
        (folder / "lora" / "seed0" / "held_out" / "step-000100.json").write_text(json.dumps(rows))
        return next(note for note in caveats(load_report(folder)) if "held-out picture" in note)

    assert "the 1 held-out picture (0.png). Of other prompts" in hold_out(1)
    assert "**1 held-out is few**: below 8" in hold_out(1)
    assert "the 3 held-out pictures (0.png, 1.png, 2.png)" in hold_out(3)
    assert "the 48 held-out pictures. Of other prompts" in hold_out(48)
    assert "few" not in hold_out(48)


def test_what_no_run_varied_is_a_caveat(tmp_path):
    """As far as runs say it, defaults included (48 pictures, 48 prompts); of a folder nobody counted the pictures."""
    folder = write_study(tmp_path / "study", [0, 1])

    def fixed(run):
        for path in folder.glob("*/seed*/result.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"run": run(path.parts[-3])}))
        return next(note for note in caveats(load_report(folder)) if note.startswith("The same for every seed"))

    shapes = fixed(lambda name: {"data": {"source": "shapes"}, "shapes": {"checked_prompts": 96}})
    assert "the 48 training pictures; the 96 test prompts of each kind, and the one starting noise of each" in shapes
    sizes = {"lora": 48, "dora": 1000}
    several = fixed(lambda name: {"data": {"source": "shapes"}, "shapes": {"num_pictures": sizes.get(name, 48)}})
    assert "the 48 to 1,000 training pictures; the 48 test prompts" in several
    assert "the training pictures; the 2 test prompts" in fixed(lambda name: {"evaluation": {"prompts": ["a", "b"]}})
    priors = {"dora": {"prompts": ["a"]}, "qlora": {"prompts": ["a"], "num_pictures": 50}}
    drawn = fixed(lambda name: {"data": {"source": "shapes"}, "prior": priors.get(name)})
    assert "the 48 training pictures; the 50 to 200 pictures of the class; the 48 test prompts" in drawn
    assert "pictures; the pictures of the class;" in fixed(lambda name: {"prior": {"path": "a"}, "evaluation": {}})


def test_a_variant_is_described_with_every_setting_by_which_it_differs(tmp_path):
    """As its runs recorded it, or where one of the two has not run, as the study file says; prompts included."""
    settings = {
        "lora": {"adapter": {"kind": "lora"}, "shapes": {"num_pictures": 8}, "objective": {"snr_gamma": 5.0}},
        "dora": {
            "adapter": {"kind": "lora"},
            "shapes": {"num_pictures": 6},
            "objective": {"snr_gamma": None},
            "prior": {"prompts": ["a {red|green} circle"], "share": 0.25},
        },
        "qlora": {"adapter": {}, "shapes": {"num_pictures": 8}, "objective": {"snr_gamma": 5.0}},
        "base": {"adapter": None, "shapes": {"num_pictures": 8}, "objective": {"snr_gamma": 5.0}},
    }
    folder = write_study(tmp_path / "study", [0])
    for path in folder.glob("*/seed*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": settings[path.parts[-3]]}))
    report = load_report(folder)
    told = {name: describe_variant(report, name) for name in settings}
    assert (
        '*Settings.* Other than LORA: `objective.snr_gamma: null` instead of `5.0`; `prior.prompts: ["a {red|green} circle"]`;'
        " `prior.share: 0.25`; `shapes.num_pictures: 6` instead of `8`.\n" in told["dora"]
    )
    assert "*Settings.* Other than LORA: no `adapter.kind`.\n" in told["qlora"]
    assert "*Settings.* Other than LORA: no `adapter`.\n" in told["base"]
    assert "*Settings.*" not in told["lora"]
    study = json.loads((folder / "study.json").read_text())
    study["variants"]["dora"]["run"] = {"prior": {"weight": 0.5}}
    (folder / "study.json").write_text(json.dumps(study))
    shutil.rmtree(folder / "lora")
    assert "*Settings.* Other than LORA: `prior.weight: 0.5`.\n" in describe_variant(load_report(folder), "dora")


def test_what_never_began_is_one_line_and_no_rows(tmp_path):
    """Variants left out by --only and seeds left out by --seeds; what began and did not finish is told run by run, as
    before."""
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
    assert any("With 3 seeds verdicts rest on noise" in note for note in caveats(report)), "of six seeds three were run"
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
    """No empty frame, no heading over nothing: a study on a base without CLIP, validated on nothing, that drew
    nothing."""
    folder = write_own_study(tmp_path / "study", [0], scores=False)
    for path in (*folder.glob("*/seed0/metrics.jsonl"), *folder.glob("*/seed0/pictures/prompts.json")):
        path.unlink()
    for path in folder.glob("*/seed*/result.json"):
        result = json.loads(path.read_text())
        del result["metrics"]["held_out_loss"]
        path.write_text(json.dumps(result))
    report = load_report(folder)
    assert plots(report) == []
    drawn = [plot(report) for plot in (plot_learning_curves, plot_cost_quality, plot_pictures, plot_learned_kept)]
    assert drawn == [None] * 4
    assert plot_overview(report) is None
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


def test_nothing_is_written_as_less_than_nothing():
    assert write_number(-0.0001, Metric("x", "share")) == "0.0 %"
    assert write_number(-0.0001, Metric("x", "share"), signed=True) == "-0.0 pp"
    assert write_number(-1234.4, Metric("x", "count")) == "-1,234"
