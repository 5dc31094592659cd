"""Verdicts at one common rate beside those of each variant at its own best."""

from pathlib import Path

import pytest
from reporting import TRUTH, write_study

from t2ilib.config import ConfigError
from t2ilib.report import load_report
from t2ilib.report.changed import changed_markdown, verdicts


def study(folder: Path, truth: dict, **changes) -> Path:
    return write_study(folder, range(8), truth, **changes)


def test_verdicts_that_change_are_counted_and_named(tmp_path: Path) -> None:
    """Once tuned, DoRA learns what LoRA learns, and the rest stays: its verdict on what was learned changes, its others do not."""
    common = load_report(study(tmp_path / "common", TRUTH))
    learned, *others = TRUTH["lora"][0], *TRUTH["dora"][1:]
    tuned = load_report(study(tmp_path / "tuned", TRUTH | {"dora": (learned, *others)}))
    pairs = verdicts(tuned, common)
    changed = [(pair.metric, pair.variant) for pair in pairs if pair.changed]
    assert changed == [("concept/learned", "dora")]
    text = changed_markdown(tuned, common)
    assert text.startswith(f"**1 of {len(pairs)} verdicts change**")
    assert "DORA" in text
    assert "better" in text
    assert changed_markdown(common, common).startswith("**0 of ")


def test_what_was_run_in_one_of_them_alone_is_told_and_other_studies_are_refused(tmp_path: Path) -> None:
    common = load_report(study(tmp_path / "common", TRUTH))
    fewer = load_report(study(tmp_path / "fewer", {name: TRUTH[name] for name in ("base", "lora", "dora")}))
    assert "Run in one of them alone: qlora." in changed_markdown(fewer, common)
    other = load_report(study(tmp_path / "other", TRUTH, name="another"))
    with pytest.raises(ConfigError, match="compare a study with itself"):
        verdicts(other, common)
