"""Adapters as MLflow models: logged by the run that trained them, registered under a name with an alias for the best, and found again.

A logged adapter refers to its base by name or path (MLflow's diffusers flavor stores no base) and has a signature with the
base's own picture size, where MLflow's default is 512. Importing this imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from t2ilib.config import ConfigError, RunConfig
from t2ilib.tracking.store import (
    RETRIES,
    SECONDS_TO_CONNECT,
    as_default,
    connected,
    database_file,
    patience,
    quiet_mlflow,
)

WEIGHTS = "pytorch_lora_weights.safetensors"
"""What an adapter's file is called among artifacts."""
MODEL_TAG = "t2ilib.model"
"""Tag of a run: the URI of the adapter it logged."""


NO_MODEL = "t2ilib.no_model"
"""Tag of a run: why its adapter is not logged as a model."""


def why_unloadable(run: RunConfig, base: str) -> str:
    """Why `mlflow.diffusers` would load this run's adapter and draw otherwise than it was trained, or not load it; "" where it would not.

    It gives the adapter's file to diffusers' loader, onto the base as it is. `base`: a folder, a file or a Hub id.
    """
    adapter, noise = run.adapter, base_noise(base)
    told = {
        "prediction_type": None if run.objective.name == "auto" else run.objective.name,
        "beta_schedule": None if run.objective.beta_schedule == "auto" else run.objective.beta_schedule,
        "rescale_betas_zero_snr": run.objective.zero_terminal_snr,
    }
    other = [f"{name} {value}" for name, value in told.items() if value is not None and value != noise[name]]
    reasons = {
        "MLflow loads no base from a single file": Path(base).is_file(),
        "it loads no new words (adapter.tokens)": adapter is not None and adapter.tokens,
        "diffusers' loader leaves out what DoRA learned on text encoders (adapter.text_encoder_targets)": adapter
        is not None
        and adapter.kind == "dora"
        and adapter.text_encoder_targets,
        "it knows nothing of model.clip_skip": run.model.clip_skip,
        "it would take the base's own VAE, not model.vae": run.model.vae,
        "it draws by the base's own scheduler, and the adapter is drawn by another": run.drawn_by,
        f"the base is of other noise than the run's ({', '.join(other)})": other,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def base_noise(base: str) -> dict[str, Any]:
    """What a base's scheduler says of noise, the published models' where it is not a folder here."""
    file = Path(base) / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    usual = {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False}
    return {name: told.get(name, value) for name, value in usual.items()}


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


def register_version(
    client, name: str, uri: str, run_id: str, alias: str, tags: Mapping[str, str], about: str = ""
) -> str:
    """Makes the adapter of a run a version of the registered model `name`, unless it is one, and gives it the alias; returns
    `models:/<name>@<alias>`. `tags` and `about`, in Markdown, are of the version as they are now, and `about` of the model too."""
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
            version = client.create_model_version(name, uri, run_id, model_id=uri.removeprefix("models:/"))
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    if about:
        client.update_model_version(name, version.version, about)
        client.update_registered_model(name, about)
    client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}"


def find_adapter(uri: str, store: str, cache: Path) -> Path:
    """The adapter's file behind `models:/<name>@<alias>`, `models:/<name>/<version>` or `models:/<id>`.

    Where the run that logged it kept its files, it is the file of the run's artifacts: with the words that were learned beside it, and
    below the run's run.yaml. Artifacts of a store on this machine are read where they lie, others once into `cache`. Raises ConfigError
    for a model that the store does not have, or is no adapter.
    """
    file = database_file(store)
    if file is not None and not file.exists():
        raise ConfigError(
            f"{uri}: there is no MLflow store at {file} yet; set MLFLOW_TRACKING_URI to the one that has it"
        )
    quiet_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        with as_default(store) as mlflow, patience(SECONDS_TO_CONNECT, RETRIES):
            client = mlflow.MlflowClient(store)
            run_id = run_of_model(client, uri)
            found = run_artifacts(mlflow, client, run_id, cache) if run_id else None
            if found is None:
                place = folder_for(cache, uri.replace(":", "").replace("/", "-"))
                found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=place))
    except (MlflowException, OSError) as error:
        known = ", ".join(registered(store)) or "none"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{uri} is not in the MLflow store {store} ({reason}); registered are: {known}") from None
    files = sorted(found.rglob(WEIGHTS))
    if not files:
        raise ConfigError(
            f"{uri} holds no {WEIGHTS}: it is no adapter that t2ilib, or MLflow's diffusers flavor, logged"
        )
    return files[0]


def run_of_model(client, uri: str) -> str | None:
    """The run that a model was logged by; None where MLflow does not know."""
    name = uri.removeprefix("models:/")
    if "@" in name:
        return client.get_model_version_by_alias(*name.rsplit("@", 1)).run_id
    if "/" in name:
        return client.get_model_version(*name.rsplit("/", 1)).run_id
    return client.get_logged_model(name).source_run_id


def run_artifacts(mlflow, client, run_id: str, cache: Path) -> Path | None:
    """The folder of a run's adapter among its artifacts, with the run's config above it; None where the run kept none.

    Asked for by the artifacts' own URI: by the run's id MLflow mixes in the files of the model that is called `adapter` too.
    """
    uri = client.get_run(run_id).info.artifact_uri
    place = None if urlparse(uri).scheme in ("", "file") else folder_for(cache, run_id)
    if place and (Path(place) / "adapter" / WEIGHTS).exists():
        return Path(place) / "adapter"
    kept = {Path(item.path).name for item in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
    if "adapter" not in kept:
        return None
    for path in [path for path in ("run.yaml", "adapter") if path in kept]:
        found = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{path}", dst_path=place))
    return found if (found / WEIGHTS).exists() else None


def folder_for(cache: Path, name: str) -> str:
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def registered(store: str) -> list[str]:
    """`models:/<name>@<alias>` of every registered model with an alias, of others `models:/<name>/<its last version>`; [] where there is no
    store yet. Raises ConfigError for a store that cannot be used."""
    file = database_file(store)
    if file is not None and not file.exists():
        return []
    with connected(store, file) as client:
        names = []
        for model in client.search_registered_models():
            aliases = [f"models:/{model.name}@{alias}" for alias in model.aliases]
            versions = [int(version.version) for version in model.latest_versions or []]
            names += aliases or [f"models:/{model.name}/{max(versions)}" for _ in versions[:1]]
        return names
