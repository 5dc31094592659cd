"""What verdicts are worth: a pool of short runs whose truth many seeds tell, and studies of few seeds drawn from it.

python experiments/benchmarks/verdicts.py pool [--processes 2]
python experiments/benchmarks/verdicts.py tables
python experiments/benchmarks/verdicts.py widths results/adapters-full-tuned
"""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy import stats

from t2ilib.environment import read_environments
from t2ilib.evaluation.metrics import DECLARATIONS
from t2ilib.report import load_report, markdown_table
from t2ilib.report.comparing import noise_of
from t2ilib.report.contents import StudyReport
from t2ilib.report.parquet import ROWS, write_parquet
from t2ilib.report.tables import write_number
from t2ilib.seeds import numpy_generator_for
from t2ilib.statistics import pooled
from t2ilib.statistics.crossed import cross, table
from t2ilib.statistics.pooled import Difference, Values, differences
from t2ilib.statistics.signs import exact_difference
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import StudyRun, plan_runs
from t2ilib.studies.study import write_study

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "planted.yaml"
SIZES = (2, 3, 6, 12)
METRICS = ("concept/all", "concept/shown", "base_kept/all", "held_out_loss")
STUDIES = 1000
"""Drawn of each size from the pool."""
COPY = "the same again"


def run_alone(run: StudyRun) -> str:
    """Trains and measures one run in this process, and writes its result as a study does."""
    from t2ilib.evaluation.measures import measure
    from t2ilib.training.loop import train

    logging.disable(logging.INFO)
    began, config = time.monotonic(), run.config()
    config = config.model_copy(update={"tracking": type(config.tracking)()})
    trained = train(config, resume="never")
    metrics = measure(config, trained.components, metrics=trained.metrics)
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "status": "finished",
        "seconds": time.monotonic() - began,
        "jobs": None,
        "mlflow_run_id": None,
        "digest": run.digest,
        "run": run.settings,
        "environment": read_environments(run.folder),
        "metrics": metrics,
        "measures": json.loads((run.folder / DECLARATIONS).read_text()),
    }
    for place in ("checkpoints", "adapter", "samples"):
        shutil.rmtree(run.folder / place, ignore_errors=True)
    (run.folder / "result.json").write_text(json.dumps(result, indent=1))
    return f"{run.label}: {metrics['concept/all']:.3f} {metrics['base_kept/all']:.3f}, {result['seconds']:.0f} s"


def make_pool(file: Path, results: Path, processes: int, only: Sequence[str], seeds: Sequence[int]) -> None:
    study = load_study(file)
    runs = plan_runs(study, file, "pool", results, only, seeds)
    write_study(study, "pool", runs[0].folder.parents[1])
    pending = [run for run in runs if run.state != "finished"]
    print(f"{len(runs)} runs, {len(pending)} to do", flush=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for number, line in enumerate(pool.map(run_alone, pending), start=1):
            print(f"{number}/{len(pending)} {line}", flush=True)


@dataclass
class Count:
    """How often something came out as it should not, or should, of `of` times."""

    hits: int = 0
    of: int = 0

    def add(self, hit: bool) -> None:
        self.hits, self.of = self.hits + bool(hit), self.of + 1

    def __add__(self, other: "Count") -> "Count":
        return Count(self.hits + other.hits, self.of + other.of)

    def __str__(self) -> str:
        if not self.of:
            return "–"
        low, high = stats.binomtest(self.hits, self.of).proportion_ci(method="exact")
        return f"{100 * self.hits / self.of:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def against_itself(values: Values, size: int) -> dict[str, Count]:
    """Every variant against itself by other seeds, `size` each, in a study of the others by as many seeds; no run in two comparisons
    of its own variant."""
    counts = {name: Count() for name in ("called", "covered", "exact")}
    for name, own in values.items():
        seeds = numpy_generator_for(0, "against itself", name, size).permutation(sorted(own)).tolist()
        for start in range(0, len(seeds) - 2 * size + 1, 2 * size):
            first, second = seeds[start : start + size], seeds[start + size : start + 2 * size]
            study = {COPY: {i: own[seed] for i, seed in enumerate(second)}}
            for other, theirs in values.items():
                chosen = first if other == name else sorted(theirs)[start // 2 : start // 2 + size]
                study[other] = {i: theirs[seed] for i, seed in enumerate(chosen)}
            pairs = [(COPY, name), *((other, name) for other in values if other != name)]
            found = differences(study, pairs)[0]
            counts["called"].add(found.shown != 0)
            counts["covered"].add(found.low <= 0 <= found.high)
            counts["exact"].add(exact_difference(study[COPY], study[name]).p_value < 0.05)
    return counts


def planted(values: Values, size: int, reference: str) -> dict[str, dict[str, Count]]:
    """Variant -> how often studies of `size` seeds find its difference to the reference, call its opposite, and have it within their
    intervals; and how often the exact test alone finds it."""
    truth = {name: np.mean([*own.values()]) - np.mean([*values[reference].values()]) for name, own in values.items()}
    counts = {
        name: {key: Count() for key in ("found", "opposite", "covered", "exact")}
        for name in values
        if name != reference
    }
    for number in range(STUDIES):
        rng = numpy_generator_for(0, "planted", size, number)
        study = {
            name: {i: own[int(seed)] for i, seed in enumerate(rng.permutation(sorted(own))[:size])}
            for name, own in values.items()
        }
        for name, found in zip(counts, differences(study, [(name, reference) for name in counts]), strict=True):
            sign = int(np.sign(truth[name]))
            counts[name]["found"].add(found.shown == sign)
            counts[name]["opposite"].add(found.shown == -sign)
            counts[name]["covered"].add(found.low <= truth[name] <= found.high)
            exact = exact_difference(study[name], study[reference])
            counts[name]["exact"].add(exact.p_value < 0.05 and np.sign(exact.mean) == sign)
    return counts


def half_widths(report: StudyReport, metric: str, size: int) -> list[float]:
    """For studies of `size` seeds, the first, the second, ...: half-widths of intervals over seeds and prompts that pair by prompt, in
    units of those that pair by seed alone."""
    found = []
    others = [name for name in report.trained if name != report.reference]
    for start in range(0, len(report.seeds) - size + 1, size):
        seeds = report.seeds[start : start + size]
        runs = {
            name: {run.seed: run.by_prompt(metric) for run in report.runs_of(name) if run.seed in seeds}
            for name in report.trained
        }
        values = {name: {seed: report.values(name, metric)[seed] for seed in own} for name, own in runs.items()}
        for name, alone in zip(others, differences(values, [(name, report.reference) for name in others]), strict=True):
            crossed = cross(runs[name], runs[report.reference], alone)
            by_seed = np.array([values[name][seed] - values[report.reference][seed] for seed in values[name]])
            of_seeds = by_seed.var(ddof=1) / size
            sides = [table(runs[one], sorted(next(iter(runs[one].values())))) for one in (name, report.reference)]
            of_prompts = sum(side.mean(0).var(ddof=1) / side.shape[1] for side in sides)
            df = (of_seeds + of_prompts) ** 2 / (of_seeds**2 / (size - 1) + of_prompts**2 / (sides[0].shape[1] - 1))
            apart = float(stats.t.isf(0.025, df)) * np.sqrt(of_seeds + of_prompts)
            found.append((crossed.high - crossed.mean) / apart)
    return found


NOISES = {
    "alike": lambda variants: np.ones(variants),
    "one five times": lambda variants: np.r_[np.ones(variants - 1), 5.0],
    "half three times": lambda variants: np.where(np.arange(variants) % 2, 3.0, 1.0),
}
LEADS = ((3, "alike"), (5, "alike"), (3, "one five times"))
"""Deviations ahead, and whose noise: of neither the one that leads nor the first."""
RULES = {
    "pooled alone": (0.0, 0.0),
    "noisier by an F test at 10 %": (0.10, 0.0),
    "and out of the pool by one at 0.1 %": (0.10, 0.001),
    "whoever lies above the pool": (1.0, 0.0),
}
"""What makes a variant stand with its own noise, and what takes it out of the pool: `pooled.UNLIKE`, `pooled.FAR`."""


def simulated(studies: int = 1000, variants: int = 8) -> list[dict[str, str]]:
    """Of drawn studies in which all variants are the same but for their noise, the share in which anything is called against the
    first; and how often one that is so many deviations ahead is found (LEADS)."""
    rows, as_it_is = [], (pooled.UNLIKE, pooled.FAR)
    for size in SIZES:
        for rule, (unlike, far) in RULES.items():
            pooled.UNLIKE, pooled.FAR = unlike, far
            row = {"name": rule, "seeds": str(size)}
            for noise, scales in NOISES.items():
                called = Count()
                for number in range(studies):
                    drawn = numpy_generator_for(0, "simulated", noise, size, number).normal(size=(variants, size))
                    called.add(any(one.shown for one in against_the_first(drawn * scales(variants)[:, None])))
                row[f"called: {noise}"] = f"{100 * called.hits / called.of:.0f} %"
            for ahead, noise in LEADS:
                found = Count()
                for number in range(studies):
                    drawn = numpy_generator_for(0, "simulated", noise, size, number).normal(size=(variants, size))
                    drawn *= NOISES[noise](variants)[:, None]
                    drawn[1] += ahead
                    found.add(against_the_first(drawn)[0].shown == 1)
                row[f"found: {ahead} deviations, {noise}"] = f"{100 * found.hits / found.of:.0f} %"
            rows.append(row)
    pooled.UNLIKE, pooled.FAR = as_it_is
    return rows


def against_the_first(drawn: np.ndarray) -> list[Difference]:
    values = {str(name): dict(enumerate(row)) for name, row in enumerate(drawn)}
    return differences(values, [(name, "0") for name in values if name != "0"])


def whole_pool(results: Path) -> StudyReport:
    """All runs of the pool: those of the file that is kept of them, and those that lie in its folder."""
    kept, folder = results / "verdicts" / ROWS, results / "planted-pool"
    found = [load_report(place) for place in (kept, folder) if place.exists()]
    if not found:
        raise SystemExit(f"there is no pool: neither {kept} nor {folder}. Run `pool` first")
    runs = {place: run for report in found for place, run in report.runs.items()}
    seeds = tuple(sorted({seed for _, seed in runs}))
    return replace(found[-1], runs=dict(sorted(runs.items())), seeds=seeds, missing=(), not_run=())


def make_tables(report: StudyReport) -> str:
    """Markdown of all tables, and of what they come from."""
    reference = report.reference
    parts = [
        f"# What a verdict is worth\n\n{report.question} {len(report.runs)} short runs of {len(report.variants)} variants."
    ]
    rows = []
    for metric in METRICS:
        values = {name: report.values(name, metric) for name in report.variants}
        by_size = {str(size): against_itself(values, size) for size in SIZES}
        every = {key: sum((counts[key] for counts in by_size.values()), Count()) for key in by_size["2"]}
        for size, counts in (by_size | {"all": every}).items():
            rows.append(
                {
                    "name": report.about(metric).title,
                    "seeds": size,
                    "comparisons": str(counts["called"].of),
                    "called better or worse": str(counts["called"]),
                    "intervals that hold zero": str(counts["covered"]),
                    "by flipping signs alone": str(counts["exact"]),
                }
            )
    parts.append(f"## A/A: a variant against itself\n\n{markdown_table(rows)}")
    for metric in METRICS:
        known, noise = report.about(metric), noise_of(report, metric)
        values = {name: report.values(name, metric) for name in report.variants}
        by_size = {size: planted(values, size, reference) for size in SIZES}
        mean = {name: float(np.mean([*own.values()])) for name, own in values.items()}
        rows = []
        for name in by_size[SIZES[0]]:
            row = {
                "variant": report.variants[name].title,
                "true difference": write_number(mean[name] - mean[reference], known, signed=True),
            }
            for size, counts in by_size.items():
                row[f"{size} seeds"] = f"{100 * counts[name]['found'].hits / counts[name]['found'].of:.0f} %"
            for size, counts in by_size.items():
                row[f"flipped, {size}"] = f"{100 * counts[name]['exact'].hits / counts[name]['exact'].of:.0f} %"
            every = [counts[name] for counts in by_size.values()]
            row["opposite, at most"] = f"{max(100 * one['opposite'].hits / one['opposite'].of for one in every):.1f} %"
            row["intervals that hold it, at least"] = (
                f"{min(100 * one['covered'].hits / one['covered'].of for one in every):.1f} %"
            )
            rows.append(row)
        parts.append(
            f"## Planted: {known.title}\n\nOne run ± {write_number(noise.deviation, known, signed=True).removeprefix('+')}; how often"
            f" {STUDIES:,} studies of so many seeds find the difference, by noise pooled over {len(values)} variants, and by flipping"
            f" signs alone.\n\n{markdown_table(rows)}"
        )
    widths = {metric: half_widths(report, metric, 6) for metric in ("concept/all", "concept/shown", "base_kept/all")}
    lines = [
        f"- {report.about(name).title}: {np.median(own):.2f} times as wide ({len(own)} comparisons)"
        for name, own in widths.items()
    ]
    parts.append(
        "## What pairing by prompt saves\n\n95% intervals over seeds and prompts, of six seeds, beside those that pair by seed and not"
        " by prompt:\n\n" + "\n".join(lines)
    )
    parts.append(
        "## Whose noise?\n\n1,000 drawn studies of 8 variants against the first: in how many anything is called where all are the same but"
        f" for their noise, and how often a true lead is found.\n\n{markdown_table(simulated())}"
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pool = commands.add_parser("pool", help="train the runs")
    pool.add_argument("--processes", type=int, default=1)
    pool.add_argument("--only", action="append", default=[])
    pool.add_argument("--seeds", default="", help="first:last+1, in place of the preset's")
    commands.add_parser("tables", help="studies of few seeds, drawn from the pool")
    widths = commands.add_parser("widths", help="what pairing by prompt gives a study")
    widths.add_argument("study", type=Path, help="the folder of its preset, such as results/adapters-full-tuned")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    given = parser.parse_args()
    results = given.results.absolute()
    if given.command == "widths":
        report = load_report(given.study)
        for metric in ("concept/all", "base_kept/all"):
            found = half_widths(report, metric, len(report.seeds))
            print(
                f"{metric}: 95% intervals over seeds and prompts, paired by prompt and noise, in units of those paired by seed alone: median"
                f" {np.median(found):.2f}, {min(found):.2f} to {max(found):.2f}, {len(found)} differences to {report.reference}"
            )
    elif given.command == "tables":
        target = results / "verdicts" / "report.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        report = whole_pool(results)
        target.write_text(make_tables(report))
        write_parquet(report, target.with_name(ROWS))
        print(target.read_text())
    else:
        first, _, last = given.seeds.partition(":")
        make_pool(STUDY, results, given.processes, given.only, range(int(first), int(last)) if last else ())


if __name__ == "__main__":
    main()
