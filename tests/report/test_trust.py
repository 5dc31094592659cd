"""What a report says of measures without a checker: what they mean, how strong they are, which runs they flag."""

import json
from dataclasses import replace

import pytest
from reporting import write_run

from t2ilib.evaluation import strength
from t2ilib.evaluation.metrics import Metric, as_written
from t2ilib.report import load_report
from t2ilib.report.trust import explain_declared, flags, weak

NUMBERS = {"rank_correlation": 0.9, "low": 0.8, "high": 0.95, "runs": 40}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    numbers = {
        "learned/clip-patches": {"learned": NUMBERS},
        "kept/clip": {"kept": NUMBERS | {"rank_correlation": 0.5, "low": 0.3}},
        "drift/pixels": {"kept": NUMBERS, "learned": NUMBERS | {"low": 0.1}},
    }
    monkeypatch.setattr(strength, "strengths", lambda: numbers)


def test_a_metric_is_told_by_the_model_that_was_checked_and_by_no_other_as_its_own(told) -> None:
    assert strength.passes("learned/clip-patches", "learned")
    assert not strength.passes("learned/dinov2-base", "learned"), "of which nobody knows"
    assert not strength.passes("kept/clip", "kept")
    assert not strength.passes("kept/clip", "learned")
    said = "Over 40 runs on the drawn world its rank correlation{} with the checker is: what was learned 0.90 (0.80 to 0.95)."
    assert strength.told_strength("learned/clip-patches") == said.format("")
    assert strength.told_strength("learned/dinov2-base") == said.format(" by the tiny models' CLIP")
    assert (
        "what was kept 0.90 (0.80 to 0.95); what was learned 0.90 (0.10 to 0.95), which is **weak**."
        in strength.told_strength("drift/pixels")
    )
    assert strength.told_strength("drift/pixels", "kept").count("0.90") == 1
    assert strength.told_strength("gained/clip") == strength.told_strength("learned/dinov2-base/more") == ""


def test_a_report_tells_meaning_strength_and_flags(told, tmp_path) -> None:
    study = {
        "name": "toy",
        "reference": "lora",
        "seeds": [0, 1],
        "variants": {"lora": {"title": "LoRA"}, "dora": {"title": "DoRA"}},
    }
    declared = {
        "learned/clip": Metric("learned, by clip", "share", "higher", role="learned", note="a share of the way."),
        "kept/clip": Metric("kept, by clip", "share", "higher", role="kept"),
        "copied/clip": Metric(
            "copied", "share", ceiling="copied/clip/most", table="By heart", flag="learned by heart", note="copies."
        ),
        "drift/pixels": Metric("copied more", table="By heart", note="copies."),
    }
    for variant in study["variants"]:
        for seed in (0, 1):
            write_run(tmp_path, variant, seed, (0.5, 0.5, None, None))
            path = tmp_path / variant / f"seed{seed}" / "result.json"
            result = json.loads(path.read_text())
            by_heart = 0.9 if variant == "dora" else 0.5
            result["metrics"] = {
                "learned/clip": 0.5,
                "kept/clip": 0.9,
                "copied/clip": by_heart,
                "copied/clip/most": 0.6,
                "drift/pixels": 0.1,
            }
            result["measures"] = {name: as_written(metric) for name, metric in declared.items()}
            path.write_text(json.dumps(result))
    (tmp_path / "study.json").write_text(json.dumps(study))
    report = load_report(tmp_path)
    assert flags(report) == ["DoRA, seeds 0, 1: **learned by heart** (copied)."]
    assert flags(replace(report, base="dora")) == [], "the untouched base has learned nothing"
    lines = explain_declared(report)
    assert lines[0].startswith("- **learned, by clip**: a share of the way. Over 40 runs on the drawn world")
    assert lines[1:] == ["- **By heart**: copies.", "  - copied more: " + strength.told_strength("drift/pixels")]
    assert weak(report) == [
        "kept, by clip is a weak measure of what was kept: Over 40 runs on the drawn world its rank correlation with the checker is: what was kept"
        " 0.50 (0.30 to 0.95), which is **weak**."
    ]


def test_what_speaks_for_learned_and_kept_was_shown_to(tmp_path) -> None:
    """The numbers that ship: a measure with such a role orders runs as the checker does."""
    from t2ilib.evaluation import drift, likeness

    roles = {
        name: metric.role for module in (likeness, drift) for name, metric in module.METRICS.items() if metric.role
    }
    assert set(roles.values()) == {"learned", "kept"}
    weak = [name for name, role in roles.items() if not strength.passes(name.format(model=strength.CHECKED), role)]
    assert not weak
