"""Adapters as MLflow models: logged by the run that trained them, and a study's winner registered as its champion.

A logged adapter refers to its base by name or path (MLflow's diffusers flavor stores no base) and has a signature with the
base's own picture size, where MLflow's default is 512. A study registers one version for each new winner under its name, and
moves the alias `champion` to it: `models:/<study>-<preset>@champion`. Importing this imports no torch.
"""

import contextlib
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2ilib.tracking import quiet_mlflow

if TYPE_CHECKING:
    from t2ilib.study import Run

log = logging.getLogger(__name__)

ALIAS = "champion"
MODEL_TAG = "t2ilib.model"
"""Tag of a run: the URI of the adapter it logged."""
CRITERIA = (("concept/learned", 1), ("base_kept/all", 1), ("held_out_loss", -1))
"""What decides a study: the first of these that its runs measured; the others break ties. The sign says which way is better."""


@contextlib.contextmanager
def store(uri: str) -> Iterator:
    """The mlflow module with `uri` as its own store for as long as the scope lasts: not all of it takes one as an argument."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # which mlflow's own setting overwrites
    mlflow.set_tracking_uri(uri)
    try:
        yield mlflow
    finally:
        mlflow.set_tracking_uri(before)


def log_adapter(tracker, file: Path, base: str, side: int, requirements: Sequence[str]) -> str:
    """Logs an adapter file as a model of the tracker's run; returns its URI, `models:/<id>`. A run logs one.

    `base`: folder or Hub id. `side`: pixels of the pictures it draws.
    """
    quiet_mlflow()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    run = tracker.client.get_run(tracker.run_id)
    if MODEL_TAG in run.data.tags:
        return run.data.tags[MODEL_TAG]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.integer, 20),
                ParamSpec("guidance_scale", DataType.double, 5.0),
                ParamSpec("height", DataType.integer, side),
                ParamSpec("width", DataType.integer, side),
                ParamSpec("negative_prompt", DataType.string, ""),
            ]
        ),
    )
    with store(tracker.client.tracking_uri) as mlflow:
        info = mlflow.diffusers.log_model(
            str(file),
            base,
            name="adapter",
            signature=signature,
            pip_requirements=list(requirements),
            run_id=tracker.run_id,
        )
    uri = f"models:/{info.model_id}"
    tracker.client.set_tag(tracker.run_id, MODEL_TAG, uri)
    return uri


def choose_winner(runs: Sequence["Run"]) -> "Run | None":
    """The best run of the variant with the best mean over its seeds, by CRITERIA; None where no run measured any of them."""
    results = [(run, run.result()["metrics"]) for run in runs]
    criteria = [(key, sign) for key, sign in CRITERIA if results and all(key in metrics for _, metrics in results)]
    if not criteria:
        return None

    def mean(variant: str) -> tuple[float, ...]:
        own = [metrics for run, metrics in results if run.variant == variant]
        return tuple(sign * statistics.fmean(metrics[key] for metrics in own) for key, sign in criteria)

    best = max(dict.fromkeys(run.variant for run, _ in results), key=mean)
    own = [(run, metrics) for run, metrics in results if run.variant == best]
    return max(own, key=lambda pair: tuple(sign * pair[1][key] for key, sign in criteria))[0]


def register_champion(client, name: str, runs: Sequence["Run"]) -> tuple["Run", str] | None:
    """Registers the winner's adapter as a version of the model `name` and gives it the alias; returns the run and its URI.

    `runs`: finished runs. Those without a logged adapter, such as the base alone, cannot win. None where none can. A winner that is the
    champion already gets no second version.
    """
    from mlflow.exceptions import MlflowException

    ids = [run.result().get("mlflow_run_id") for run in runs]
    try:
        uris = [client.get_run(run_id).data.tags.get(MODEL_TAG) if run_id else None for run_id in ids]
    except MlflowException as error:
        log.warning("no champion is named, because the runs were logged to another store: %s", error)
        return None
    winner = choose_winner([run for run, uri in zip(runs, uris, strict=True) if uri])
    if winner is None:
        return None
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id = winner.result()["mlflow_run_id"]
    uri = uris[ids.index(run_id)]
    known = [version for version in client.search_model_versions(f"name = '{name}'") if version.run_id == run_id]
    if known:
        version = known[0]
    else:
        tags = {"variant": winner.variant, "seed": str(winner.seed)}
        with store(client.tracking_uri):
            version = client.create_model_version(name, uri, run_id, tags=tags, model_id=uri.removeprefix("models:/"))
    client.set_registered_model_alias(name, ALIAS, version.version)
    return winner, f"models:/{name}@{ALIAS}"
