"""The report's statistics on numbers that were not made here: 21 fine-tunings of Stable Diffusion 1.5 with three seeds each.

    python experiments/benchmarks/lycoris.py lycoris_metrics.csv.gz --epoch 50

They were released with the LyCORIS paper (arXiv 2309.14859) as `results/metrics/ddim_sd15_metrics_mean.csv` of the repository
cyber-meow/LyCORIS-evaluation (MIT); the table that this reads has one row for each configuration, seed (a, b, c), epoch,
category and concept, with columns `dino_*` (mean cosine of DINOv2-L features to training pictures), `centroid_*` (squared
distance of their centroids), `text_*` (CLIP text similarity) and `vendi_*` (diversity), on training prompts and in new contexts.
Every configuration is compared with the one that it differs from in one thing, LoHa and LoKr as they come with LoRA as it comes;
the five categories stand in the place of prompts. Writes results/lycoris/report.md; the table itself is not kept.
"""

import argparse
import csv
import gzip
import json
import math
import shutil
import tempfile
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import Row, write_rows
from t2ilib.report import format_table, load_report, markdown_table, verdict_table, write_markdown
from t2ilib.report.comparing import compare, noise_of
from t2ilib.report.contents import StudyReport
from t2ilib.statistics.pooled import leads
from t2ilib.statistics.signs import exact_difference

ROOT = Path(__file__).parents[2]
TABLE = "Fidelity, text and diversity"
METRICS = {
    "dino_new": Metric("fidelity in new contexts", "loss", "higher", table=TABLE, role="learned", headline="Most faithful"),
    "text_new": Metric("text followed in new contexts", "loss", "higher", table=TABLE, role="kept", headline="Followed text best"),
    "dino_train": Metric("fidelity on training prompts", "loss", "higher", table=TABLE),
    "centroid_new": Metric("distance of centroids, new contexts", "loss", "lower", table=TABLE),
    "text_train": Metric("text followed on training prompts", "loss", "higher", table=TABLE),
    "vendi_train": Metric("diversity on training prompts", "score", "higher", table=TABLE),
    "vendi_new": Metric("diversity in new contexts", "score", "higher", table=TABLE),
}  # fmt: skip
MARGINS = {"dino_new": 0.02, "text_new": 0.005}
"""Some 4% of what these measures are: what one would hardly see in pictures."""
REFERENCE, DEFAULTS = (
    "lora8a4",
    {"lora": "lora8a4", "loha": "loha4a2", "lokr": "lokrf8"},
)
SEEDS = "abc"


def write_study(table: Path, epoch: int, folder: Path) -> None:
    """The table's rows of an epoch as a study's folder."""
    with gzip.open(table, "rt") if table.suffix == ".gz" else table.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["epoch"] == str(epoch)]
    for row in rows:
        row["configuration"] = row["configuration"].split("-", 2)[2]  # without its number and the base, which all share
    if not rows:
        raise SystemExit(f"{table} has no rows of epoch {epoch}")
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    variants = {name: {"title": name, "against": neighbour(name)} for name in names}
    study = {
        "name": "lycoris",
        "question": f"Which of LyCORIS's 21 released fine-tunings of SD1.5 differ, by three seeds each (epoch {epoch})?",
        "preset": f"epoch-{epoch}",
        "reference": REFERENCE,
        "seeds": list(range(len(SEEDS))),
        "margins": MARGINS,
        "variants": variants,
    }
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    declared = {name: asdict(metric) for name, metric in METRICS.items()}
    for name in names:
        for seed, letter in enumerate(SEEDS):
            own = [row for row in rows if (row["configuration"], row["seed"]) == (name, letter)]
            place = folder / name / f"seed{seed}"
            place.mkdir(parents=True)
            (whole,) = [row for row in own if row["category"] == "all"]
            result = {"status": "finished", "metrics": values_of(whole), "measures": declared}
            (place / "result.json").write_text(json.dumps(result))
            categories = sorted(
                (row for row in own if row["concept"] == "all" != row["category"]), key=lambda row: row["category"]
            )
            write_rows(
                place, [Row(epoch, "category", i, row["category"], values_of(row)) for i, row in enumerate(categories)]
            )


def neighbour(name: str) -> str:
    kind = next(kind for kind in DEFAULTS if name.startswith(kind))
    return REFERENCE if name == DEFAULTS[kind] else DEFAULTS[kind]


def values_of(row: dict[str, str]) -> dict[str, float]:
    return {name: float(row[name]) for name in METRICS if row[name]}


def all_pairs(report: StudyReport) -> list[dict[str, str]]:
    """A row a measure: of the 210 pairs how many are shown by pooled noise, how many lie over three standard errors apart, and
    how many the exact test could show."""
    rows = []
    for metric, known in METRICS.items():
        values = {name: report.values(name, metric) for name in report.variants}
        noise = noise_of(report, metric)
        pairs = list(combinations(values, 2))
        shown = sum(bool(leads(values, one)[other].shown) for one, other in pairs)
        error = noise.deviation * math.sqrt(2 / len(SEEDS))
        mean = {name: sum(own.values()) / len(own) for name, own in values.items()}
        apart = sum(abs(mean[one] - mean[other]) > 3 * error for one, other in pairs)
        exact = sum(exact_difference(values[one], values[other]).p_value < 0.05 for one, other in pairs)
        compared = compare(report, metric)
        said = [compared[name].verdict for name in compared]
        rows.append(
            {
                "name": known.title,
                "one run": f"± {noise.deviation:.4f}",
                "pairs shown": f"{shown} of {len(pairs)}",
                "over 3 standard errors": str(apart),
                "by flipping signs": str(exact),
                "of 20 to a neighbour: better": str(said.count("better")),
                "worse": str(said.count("worse")),
                "equivalent": str(said.count("equivalent")) if metric in MARGINS else "–",
                "undecided": str(said.count("undecided")),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--epoch", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "lycoris")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "lycoris"
        write_study(given.table, given.epoch, folder)
        report = load_report(folder)
        text = write_markdown(report, folder).read_text()
        pairs = all_pairs(report)
        given.out.mkdir(parents=True, exist_ok=True)
        for picture in folder.glob("*.png"):
            shutil.copy(picture, given.out / picture.name)
    told = f"## All pairs\n\n{markdown_table(pairs)}\n\n## Before believing it"
    (given.out / "report.md").write_text(text.replace("## Before believing it", told))
    print(format_table(verdict_table(report)), "\n")
    print(format_table(pairs))


if __name__ == "__main__":
    main()
