"""Tunes a study with stand-ins for notebooks, and kills it with kill -9 again and again: `python tuning_killing.py FILE RESULTS JOBS KILLS`.

Imports take most of the time, so one process imports all, computes nothing, and forks the tunings that are killed. It kills each at a drawn
moment after one more trial has begun, and prints what it killed; the last tuning it lets end.
"""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store
import optuna.samplers
import optuna.storages

from t2ilib.studies import executor, where
from t2ilib.studies.tuning import tune_study

IMPORTED = (mlflow.store.tracking.sqlalchemy_store, optuna.samplers, optuna.storages)
"""What the children would import each for itself."""


def tune(file: Path, results: Path, jobs: int) -> None:
    """In a child that never returns."""
    status = 1
    try:
        tune_study(file, results=results, jobs=jobs)
        status = 0
    finally:
        os._exit(status)


def main(file: Path, results: Path, jobs: int, kills: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "studies"))
    from test_tuning import stand_in

    where.execute_notebook = partial(stand_in, pause=0.1)
    executor.export_html = lambda notebook, hide_code: notebook
    chance, killed = random.Random(jobs), 0
    while True:
        begun = len(list(results.rglob("checkpoints")))
        child = os.fork()
        if child == 0:
            tune(file, results, jobs)
        while killed < kills and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if len(list(results.rglob("checkpoints"))) > begun:
                time.sleep(chance.uniform(0, 0.4))
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.005)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(os.WEXITSTATUS(status))
        killed += 1
        print("killed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
