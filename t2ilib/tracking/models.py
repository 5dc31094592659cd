"""Adapters as MLflow models: logged by the run that trained them, registered under a name with an alias for the best.

A logged adapter refers to its base by name or path (MLflow's diffusers flavor stores no base) and has a signature with the
base's own picture size, where MLflow's default is 512. Importing this imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path

from t2ilib.tracking.store import as_default, quiet_mlflow

MODEL_TAG = "t2ilib.model"
"""Tag of a run: the URI of the adapter it logged."""


def log_adapter(client, run_id: str, file: Path, base: str, side: int) -> str:
    """Logs an adapter file as a model of a run; returns its URI, `models:/<id>`. A run logs one.

    `base`: folder or Hub id. `side`: pixels of the pictures it draws.
    """
    from importlib.metadata import version

    quiet_mlflow()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    run = client.get_run(run_id)
    if MODEL_TAG in run.data.tags:
        return run.data.tags[MODEL_TAG]
    needed = ("diffusers", "transformers", "torch", "peft", "safetensors", "accelerate")
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
    with as_default(client.tracking_uri) as mlflow:
        mlflow.set_experiment(experiment_id=run.info.experiment_id)  # or the model would lie in MLflow's default one
        info = mlflow.diffusers.log_model(
            str(file),
            base,
            name="adapter",
            signature=signature,
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in needed],
            run_id=run_id,
        )
    uri = f"models:/{info.model_id}"
    client.set_tag(run_id, MODEL_TAG, uri)
    return uri


def register_version(client, name: str, uri: str, run_id: str, alias: str, tags: Mapping[str, str]) -> str:
    """Makes the adapter of a run a version of the registered model `name`, unless it is one, and gives it the alias; returns
    `models:/<name>@<alias>`."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [version for version in client.search_model_versions(f"name = '{name}'") if version.run_id == run_id]
    if known:
        version = known[0]
    else:
        with as_default(client.tracking_uri):
            version = client.create_model_version(
                name, uri, run_id, tags=dict(tags), model_id=uri.removeprefix("models:/")
            )
    client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}"
