"""Pictures that were drawn outside any training, in MLflow: a run of their own, with the settings as parameters and the files as artifacts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2ilib.tracking.sending import MAX_PARAMS, MAX_VALUE
from t2ilib.tracking.store import open_client, tracking_uri

FOLDER = "drawn"
"""Of a run's artifacts."""


def log_pictures(
    experiment: str,
    files: Sequence[Path],
    settings: Mapping[str, Any],
    results: Path = Path("results"),
    uri: str | None = None,
    name: str = "pictures",
) -> str:
    """Logs files to a new run of an MLflow experiment; returns the run's id.

    `settings`: become parameters. `results`: where the default store lies, see `store.tracking_uri`. Raises ConfigError for a store that
    cannot be used.
    """
    client, experiment_id = open_client(tracking_uri(uri, Path(results)), experiment, Path(results))
    from mlflow.entities import Param

    run_id = client.create_run(experiment_id, run_name=name).info.run_id
    params = [Param(key, str(value)[:MAX_VALUE]) for key, value in settings.items()]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
    for file in files:
        client.log_artifact(run_id, str(file), FOLDER)
    client.set_terminated(run_id)
    return run_id
