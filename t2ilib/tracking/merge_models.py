"""The models of one MLflow store put into another: adapters that runs logged, and what is registered of them, with versions and aliases.

A model gets a new id, since MLflow chooses it; its MLmodel file and its run's tag are told, and a tag of its own says which it had.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from t2ilib.tracking.joined import MERGED, Ends, Merged, all_pages, now_at
from t2ilib.tracking.store import as_default

SOURCE = "models:/"


def merge_models(ends: Ends, experiment, place: str, merged: Merged) -> None:
    """Puts the logged models of an experiment, whose runs are there already, into the target's experiment `place`."""
    known = {model.tags[MERGED]: model.model_id for model in models_of(ends.target, place) if MERGED in model.tags}
    for model in models_of(ends.source, experiment.experiment_id):
        if model.model_id not in known:
            made = make_model(ends, place, model, merged)
            if made is None:
                continue
            known[model.model_id] = made
        merged.models[model.model_id] = known[model.model_id]


def models_of(client, experiment_id: str) -> list:
    """All logged models of an experiment."""
    return all_pages(lambda token: client.search_logged_models([experiment_id], page_token=token))


def make_model(ends: Ends, place: str, model, merged: Merged) -> str | None:
    """A model with the source's files; its id, or None where its files are nowhere."""
    from mlflow.entities import LoggedModelOutput

    folder = now_at(model.artifact_location, ends.artifacts)
    if folder is None:
        merged.conflicts.append(
            f"model {model.name} ({model.model_id}) is left out: {model.artifact_location} is not here"
        )
        return None
    run = merged.runs.get(model.source_run_id)
    made = ends.target.create_logged_model(
        place, model.name, run, dict(model.tags) | {MERGED: model.model_id}, dict(model.params), model.model_type
    )
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as scratch:
        copy = Path(scratch) / "model"
        renamed = {model.model_id: made.model_id} | ({model.source_run_id: run} if run else {})
        copy_with(folder, copy, renamed)
        ends.target.log_model_artifacts(made.model_id, str(copy))
    ends.target.finalize_logged_model(made.model_id, model.status)
    if run:
        ends.target.log_outputs(run, [LoggedModelOutput(made.model_id, 0)])
    return made.model_id


def copy_with(folder: Path, target: Path, renamed: Mapping[str, str]) -> None:
    """Copies a model's folder; in its MLmodel ids are written as they are now."""
    shutil.copytree(folder, target)
    about = target / "MLmodel"
    if about.exists():
        text = about.read_text()
        for old, new in renamed.items():
            text = text.replace(old, new)
        about.write_text(text)


def merge_registered(ends: Ends, merged: Merged) -> None:
    """Registered models by name, with those versions whose runs came along, and aliases that the target has not given away."""
    from mlflow.exceptions import MlflowException

    for model in all_pages(lambda token: ends.source.search_registered_models(page_token=token)):
        try:
            there = ends.target.get_registered_model(model.name)
        except MlflowException:
            there = ends.target.create_registered_model(model.name, dict(model.tags), model.description)
        versions = merge_versions(ends, model.name, merged)
        for alias, version in model.aliases.items():
            now, other = versions.get(str(version)), there.aliases.get(alias)
            if now and other is None:
                ends.target.set_registered_model_alias(model.name, alias, now)
            elif now and str(other) != now:
                merged.conflicts.append(
                    f"{SOURCE}{model.name}@{alias} is version {other} in the target, and the source's is now version {now}: left as it is"
                )


def merge_versions(ends: Ends, name: str, merged: Merged) -> dict[str, str]:
    """The versions of a registered model, oldest first: number in the source -> number now. Known by the run that they are of."""
    asked = f"name = '{name}'"
    known = {one.run_id: str(one.version) for one in versions_of(ends.target, asked)}
    numbers = {}
    for one in sorted(versions_of(ends.source, asked), key=lambda one: int(one.version)):
        run = merged.runs.get(one.run_id)
        if run is None:
            merged.conflicts.append(f"{SOURCE}{name}/{one.version} is left out: its run is not in the source")
            continue
        if run not in known:
            model = merged.models.get(one.model_id or one.source.removeprefix(SOURCE))
            if model is None:
                merged.conflicts.append(
                    f"{SOURCE}{name}/{one.version} is left out: its model's files did not come along"
                )
                continue
            with as_default(ends.uri):  # which it asks for the model
                made = ends.target.create_model_version(
                    name, f"{SOURCE}{model}", run, dict(one.tags), description=one.description, model_id=model
                )
            known[run] = str(made.version)
        numbers[str(one.version)] = known[run]
    return numbers


def versions_of(client, asked: str) -> list:
    return all_pages(lambda token: client.search_model_versions(asked, page_token=token))
