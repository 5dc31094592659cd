"""What verdicts are worth: a pool of short runs whose truth many seeds tell, and studies of few seeds drawn from it.

    python experiments/benchmarks/verdicts.py pool [--processes 2]
"""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from t2ilib.evaluation.metrics import DECLARATIONS
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import StudyRun, plan_runs
from t2ilib.studies.study import write_study

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "planted.yaml"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pool = commands.add_parser("pool", help="train the runs")
    pool.add_argument("--processes", type=int, default=1)
    pool.add_argument("--only", action="append", default=[])
    pool.add_argument("--seeds", default="", help="first:last+1, in place of the preset's")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    given = parser.parse_args()
    first, _, last = getattr(given, "seeds", "").partition(":")
    make_pool(STUDY, given.results.absolute(), given.processes, given.only, range(int(first), int(last)) if last else ())


if __name__ == "__main__":
    main()
