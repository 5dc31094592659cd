"""The noise of a study and how many seeds a difference needs, from studies whose noise is known."""

import json

import numpy as np
import pytest
from reporting import cells, write_study
from scipy import stats
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.report import caveats, compare, difference_table, load_report
from t2ilib.report.noise import noise_markdown, noise_table, power_tables
from t2ilib.statistics.power import seeds_needed


def drawn(folder, seeds: int, deviation: float, louder: float = 1.0, **changes):
    """Independent seed noise of this deviation; dora's is `louder` times as large."""
    rng = np.random.default_rng(0)
    write_study(folder, range(seeds), **changes)
    for name, level in (("lora", 0.6), ("dora", 0.62), ("qlora", 0.6)):
        for seed, noise in enumerate(stats.zscore(rng.normal(size=seeds), ddof=1) * deviation):
            path = folder / name / f"seed{seed}" / "result.json"
            result = json.loads(path.read_text())
            result["metrics"]["concept/learned"] = level + noise * (louder if name == "dora" else 1)
            path.write_text(json.dumps(result))
    return load_report(folder)


def test_the_noise_floor_is_the_reference_against_itself(tmp_path) -> None:
    row = noise_table(drawn(tmp_path / "study", 4, 0.02))[0]
    assert (row["name"], row["one run"], row["runs beyond the first"]) == ("concept learned", "± 2.0 pp", "9")
    half = 2.262157 * 2.0 * np.sqrt(2 / 4)  # t(0.975, 9) from a printed table
    assert row["noise floor"] == f"± {half:.1f} pp"
    assert row["correlation by prompt"] == "–", "nothing is known of single pictures"


def test_power_is_told_for_what_would_matter_and_an_undecided_difference_names_its_seeds(tmp_path) -> None:
    report = drawn(tmp_path / "study", 3, 0.05, margins={"concept/learned": 0.06})
    compared = compare(report, "concept/learned")["dora"]
    assert (compared.verdict, compared.wanted) == ("undecided", 0.06)
    assert compared.seeds == seeds_needed(0.06, 0.05, 3, compared.difference.alpha)
    row = cells(difference_table(report, "concept/learned"), "DORA")
    assert row["verdict"] == f"undecided ({compared.seeds} seeds would show 6.0 pp)"
    told, rows = power_tables(report)[0]
    assert told.startswith(
        "concept learned (one run ± 5.0 pp): how often a difference is shown. With the 3 seeds of this study"
    )
    assert [row["name"] for row in rows] == ["5.0 pp", "6.0 pp (what would matter)", "10.0 pp", "20.0 pp"]
    assert rows[1]["seeds for 80 %"] == str(compared.seeds)
    shares = [int(row["3 seeds"].strip("<> %")) for row in rows]
    assert shares == sorted(shares)
    assert "## Noise" in noise_markdown(report)


def test_seeds_are_counted_by_the_noise_of_the_two_that_are_compared(tmp_path) -> None:
    """One varies by 16 points, the others by 2."""
    report = drawn(tmp_path / "study", 6, 0.02, louder=8, margins={"concept/learned": 0.06})
    compared = compare(report, "concept/learned")
    assert compared["dora"].difference.noisier == ("dora",)
    of_both = float(np.sqrt((0.02**2 + 0.16**2) / 2))
    assert compared["dora"].seeds == seeds_needed(0.06, of_both, 2, compared["dora"].difference.alpha)
    assert compared["dora"].seeds > 5 * seeds_needed(0.06, 0.02, 3, compared["dora"].difference.alpha)
    assert compared["qlora"].difference.error == pytest.approx(0.02 * np.sqrt(2 / 6)), "the loud one has no say in it"


def test_small_differences_are_equivalent_where_a_margin_is_named(tmp_path) -> None:
    report = drawn(tmp_path / "study", 8, 0.004, margins={"concept/learned": 0.04})
    assert compare(report, "concept/learned")["dora"].verdict == "equivalent", "2 pp, shown, and less than would matter"
    assert compare(drawn(tmp_path / "plain", 8, 0.004), "concept/learned")["dora"].verdict == "better"


def test_a_variant_that_varies_more_is_told(tmp_path) -> None:
    report = drawn(tmp_path / "study", 6, 0.01, louder=6)
    (note,) = [note for note in caveats(report) if "vary more than the others" in note]
    assert "concept learned" in note
    assert "DORA (one run ± 6.0 pp" in note


def test_pairing_by_seed_that_saves_nothing_is_told(tmp_path) -> None:
    apart = drawn(tmp_path / "apart", 40, 0.02)
    assert any("Sharing seeds between variants saves nothing here (concept learned)" in note for note in caveats(apart))
    shared = load_report(write_study(tmp_path / "shared", range(8)))
    assert not any("Sharing seeds" in note and "concept learned" in note for note in caveats(shared))
    assert float(noise_table(shared)[0]["correlation by seed"]) > 0.8


@pytest.mark.parametrize("seeds", [1, 3])
def test_study_power_says_how_many_seeds(tmp_path, seeds: int) -> None:
    drawn(tmp_path / "results" / "adapters-quick", seeds, 0.05) if seeds > 1 else write_study(
        tmp_path / "results" / "adapters-quick", [0]
    )
    file = tmp_path / "study.yaml"
    variants = "\n".join(f"  {name}: {{title: {name}}}" for name in ("base", "lora", "dora", "qlora"))
    file.write_text(
        f"name: adapters\nquestion: Which?\nreference: lora\nbase: base\nrun: {{adapter: {{}}}}\npresets: {{quick: {{seeds: [0]}}}}\nvariants:\n{variants}\n"
    )
    done = CliRunner().invoke(app, ["study", "power", str(file), "--results", str(tmp_path / "results")])
    if seeds == 1:
        assert done.exit_code == 2
        assert "from two finished seeds" in done.output
    else:
        assert done.exit_code == 0, done.output
        assert "concept learned (one run ± 5.0 pp)" in done.output
        assert "seeds for 80 %" in done.output


def test_a_margin_of_no_metric_is_told(tmp_path) -> None:
    report = drawn(tmp_path / "study", 3, 0.05, margins={"concept/lerned": 0.06, "base_kept/all": 0.05})
    (note,) = [note for note in caveats(report) if "margins" in note]
    assert note.startswith("`margins` names concept/lerned, which no run measured")
    assert "Did you mean 'concept/learned'?" in note
