"""Who is compared with whom, what of it is shown, and what a study claims."""

import json

import pytest
from reporting import write_study

from t2ilib.report import (
    caveats,
    champion,
    compare,
    describe_variant,
    difference_table,
    headline,
    load_report,
    plot_learned_kept,
    summary_table,
    verdict_table,
)
from t2ilib.report.comparing import DIFFERENT, SHARED, judge_claims, leads_on
from t2ilib.statistics.pooled import leads


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
    before, now = compare(plain, "concept/learned")["dora"].difference, compared["dora"].difference
    assert (now.mean, now.low, now.high) == (before.mean, before.low, before.high)
    assert now.together == pytest.approx(before.together, abs=1e-3), "its family has another pair, and as many"
    rows = difference_table(report, "concept/learned")
    assert [row["against"] for row in rows] == ["LORA", "LORA", "DORA"]
    assert "against" not in difference_table(plain, "concept/learned")[0]
    assert "-10.0 pp against DORA" in describe_variant(report, "qlora")
    assert "against the reference" in describe_variant(report, "dora")
    assert [row["against"] for row in verdict_table(report)] == ["lora", "–", "lora", "dora"]


def judged(folder, **claims):
    """Variant -> the verdicts on its claims, in the study that has them."""
    study = json.loads((folder / "study.json").read_text())
    for name, told in claims.items():
        study["variants"][name]["claims"] = told
    (folder / "study.json").write_text(json.dumps(study))
    report = load_report(folder)
    return {name: [one.verdict for one in judge_claims(report, name)] for name in claims}


def claim(metric, direction, than=None):
    return {"metric": metric, "is": direction, "than": than}


def test_claims_are_judged_by_the_test_of_the_tables(tmp_path):
    folder = write_study(tmp_path / "study", range(8))
    found = judged(
        folder,
        dora=[
            claim("concept/learned", "better"),
            claim("concept/learned", "higher", "qlora"),
            claim("held_out_loss", "lower"),
            claim("held_out_loss", "better"),
            claim("held_out_loss", "worse"),
            claim("base_kept/all", "better"),
            claim("trainable_parameters", "lower"),
            claim("trainable_parameters", "higher"),
            claim("concept/learned", "better", "base"),
        ],
        qlora=[claim("concept/learned", "worse"), claim("trainable_parameters", "lower")],
        lora=[claim("base_kept/all", "lower", "base"), claim("concept/lerned", "better", "base")],
    )
    assert found["dora"] == [
        "shown", "shown", "shown", "shown", "contradicted", "contradicted", "contradicted", "shown", "shown",
    ]  # fmt: skip
    assert found["qlora"] == ["not shown", "contradicted"]
    assert found["lora"] == ["shown", "not measured"]
    report = load_report(folder)
    text = describe_variant(report, "dora")
    assert "Claimed, and judged by the test of the tables:" in text
    assert (
        "- concept learned better than LORA: **shown** (+10.0 pp; 95% interval of all together +9.1 to +10.9 pp)"
        in text
    )
    assert "- trainable parameters higher than LORA: **shown** (+2,000)" in text
    assert "**not measured** (no run has concept/lerned. Did you mean 'concept/learned'?)" in describe_variant(
        report, "lora"
    )
    by_claim = judge_claims(report, "dora")[0].comparison
    assert by_claim == compare(report, "concept/learned")["dora"], "the very test of the table"


def test_claims_of_one_seed_are_not_tested(tmp_path):
    folder = write_study(tmp_path / "study", range(1))
    found = judged(folder, dora=[claim("concept/learned", "better"), claim("trainable_parameters", "higher")])
    assert found == {"dora": ["not tested (one seed)", "shown"]}, "a setting needs no test"


def test_speed_is_judged_only_of_runs_that_had_the_machine_to_themselves(tmp_path):
    """`jobs` of result.json: 1, 2, and missing as in results of before."""
    for jobs, fair in ((1, True), (2, False), (None, False)):
        folder = write_study(tmp_path / str(jobs), range(8), jobs=jobs)
        assert judged(folder, dora=[claim("steps_per_second", "lower")]) == {"dora": ["not shown" if fair else SHARED]}
        report = load_report(folder)
        assert compare(report, "steps_per_second")["dora"].verdict == ("undecided" if fair else SHARED)
        assert ("Fastest" in headline(report)) == fair
        assert any("speed is not judged" in note for note in caveats(report)) == (not fair)
        assert SHARED not in headline(report)
    result = folder / "dora" / "seed0" / "result.json"
    result.write_text(
        json.dumps({key: value for key, value in json.loads(result.read_text()).items() if key != "jobs"})
    )
    assert not load_report(folder).timed_alone("dora")


def test_leads_pay_for_all_pairs_on_all_metrics_whose_leader_is_named(tmp_path):
    """Three variants have three pairs; learned, kept and speed are asked about, a number of parameters is not."""
    report = load_report(write_study(tmp_path / "study", range(8)))
    found = leads_on(
        report,
        "concept/learned",
        "dora",
        ["concept/learned", "base_kept/all", "trainable_parameters", "steps_per_second"],
    )
    values = {name: report.values(name, "concept/learned") for name in ("lora", "dora", "qlora")}
    assert found == leads(values, "dora", questions=3)


def test_metrics_are_known_by_what_runs_declare_of_them(tmp_path):
    """Another share that speaks for what was learned, and shares beside it that play no role, as the checker may
    have."""
    folder = write_study(tmp_path / "study", range(6))
    about = {"unit": "share", "better": "higher", "table": "Learned and kept"}
    declared = {
        "concept/all": about | {"title": "concept prompt all right", "role": "learned", "headline": "Learned most"},
        "concept/learned": about | {"title": "concept shown"},
        "concept/chance": about | {"title": "concept by chance", "better": None},
        "concept/constant": about | {"title": "concept, one picture for all", "better": None},
    }
    for path in folder.glob("*/seed*/result.json"):
        result = json.loads(path.read_text())
        learned = result["metrics"]["concept/learned"]
        shares = {"concept/all": learned / 2, "concept/chance": 0.2, "concept/constant": 0.33}
        path.write_text(
            json.dumps(result | {"metrics": result["metrics"] | shares, "measures": result["measures"] | declared})
        )
    report = load_report(folder)
    assert report.speaking("learned", "kept") == ["concept/all", "base_kept/all"]
    assert "**Learned most: DORA** (35." in headline(report)
    assert "*concept prompt all right* and *base kept*" in champion(report)
    assert list(verdict_table(report)[0])[3] == "concept prompt all right"
    row = next(row for row in summary_table(report) if row["name"] == "dora")
    assert (row["concept by chance"], row["concept, one picture for all"]) == ("20.0 %", "33.0 %")
    assert plot_learned_kept(report).axes[0].get_ylabel() == "concept prompt all right"


def test_losses_of_different_quantities_are_shown_and_not_compared(tmp_path):
    folder = write_study(tmp_path / "study", range(8))
    assert compare(load_report(folder), "held_out_loss")["dora"].verdict == "better"
    for path in folder.glob("dora/*/result.json"):
        result = json.loads(path.read_text())
        result["measures"]["held_out_loss"]["quantity"] = "epsilon"
        path.write_text(json.dumps(result))
    report = load_report(folder)
    compared = compare(report, "held_out_loss")
    assert (compared["dora"].verdict, compared["qlora"].verdict) == (DIFFERENT, "undecided")
    assert compare(report, "concept/learned")["dora"].verdict == "better"
    assert judged(folder, dora=[claim("held_out_loss", "better")])["dora"] == [DIFFERENT]
    assert any("Not all variants mean the same by held-out loss" in note for note in caveats(report))
    assert "held-out loss" not in headline(report)
    assert "Learned most" in headline(report)
    (row,) = [row for row in verdict_table(report) if row["name"] == "dora"]
    assert "0.19" in row["held-out loss"]
    assert "better" not in row["held-out loss"]
