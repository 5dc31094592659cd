"""A table of LyCORIS's form becomes a study with neighbours, rows and verdicts; the real one is read where it is at hand."""

import csv
from itertools import product
from pathlib import Path

import lycoris
import pytest

from t2ilib.report import compare, load_report

REAL = Path(__file__).parents[2] / "shared" / "data" / "lycoris_metrics.csv.gz"


def test_a_table_becomes_a_study(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as lines:
        rows = csv.DictWriter(lines, ["configuration", "seed", "epoch", "category", "concept", *lycoris.METRICS])
        rows.writeheader()
        names = ("1001-sd15-lora8a4", "1005-sd15-lora8a4-attnonly", "1021-sd15-lokrf8", "1022-sd15-lokrf4")
        for place, (name, seed, category) in enumerate(product(names, "abc", ("all", "anime", "people"))):
            noise = 0.001 * ((place * 7919) % 11 - 5) + 0.3 * (name == names[1])
            rows.writerow(
                {"configuration": name, "seed": seed, "epoch": 50, "category": category, "concept": "all"}
                | dict.fromkeys(lycoris.METRICS, 0.5 + noise)
            )
    lycoris.write_study(table, 50, tmp_path / "lycoris")
    report = load_report(tmp_path / "lycoris")
    assert [report.against(name) for name in report.variants] == ["lora8a4", "lora8a4", "lora8a4", "lokrf8"]
    compared = compare(report, "dino_new")
    assert [compared[name].verdict for name in compared] == ["better", "equivalent", "equivalent"]
    assert compared["lokrf8"].crossed.num_prompts == 2
    assert lycoris.all_pairs(report)[0]["pairs shown"] == "3 of 6"
    with pytest.raises(SystemExit, match="no rows of epoch 7"):
        lycoris.write_study(table, 7, tmp_path / "other")


@pytest.mark.skipif(not REAL.exists(), reason="the released table is not at hand")
def test_three_seeds_show_what_lies_far_apart_and_the_exact_test_nothing(tmp_path: Path) -> None:
    lycoris.write_study(REAL, 50, tmp_path / "lycoris")
    report = load_report(tmp_path / "lycoris")
    assert len(report.runs) == 21 * 3
    row = lycoris.all_pairs(report)[0]
    assert row["over 3 standard errors"] == "119"
    assert row["by flipping signs"] == "0"
    assert int(row["pairs shown"].split()[0]) > 60
    assert {"lora32a16", "lokrf8-lr5e-3"} <= set(lycoris.noise_of(report, "text_new").own), (
        "seen to vary more than the others"
    )
