"""One MLflow store put into another: what was logged on a lent machine, with what was logged at home.

Experiments by name; runs with their parameters, tags, data sets, artifacts, and every point of every metric; their adapters as models and
what is registered (`merge_models`). A SQLite store takes runs under their own ids, so that what names them still does; a server gives new ones,
and a tag says which each was. Merged again, only what has come since is added: points are compared one by one, and of a run that
went on, its later state counts. Deleted runs stay behind. The source is read from a copy, so it may be read-only.
"""

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from t2ilib.config import ConfigError
from t2ilib.tracking.joined import ARTIFACTS, MERGED, Ends, Merged, all_pages, local, now_at
from t2ilib.tracking.merge_models import merge_models, merge_registered
from t2ilib.tracking.mlflow_run import FORKED
from t2ilib.tracking.models import MODEL_TAG
from t2ilib.tracking.sending import MAX_METRICS, MAX_PARAMS
from t2ilib.tracking.store import HEARTBEAT, as_default, connected, database_file, open_client, sqlite_uri

PARENT = "mlflow.parentRunId"
DEFAULT = "Default"
"""MLflow's own experiment, which every store has."""


def merge_store(file: Path, uri: str, results: Path) -> Merged:
    """Puts all that the SQLite store `file` holds into the store `uri`; its artifacts are in the folder beside it.

    `results`: where the artifacts of a new SQLite store go. Raises ConfigError for a store that cannot be used, and for one that is to be
    merged into itself.
    """
    target = database_file(uri)
    if target is not None and target.exists() and target.samefile(file):
        raise ConfigError(f"{file} is the store that it is to be merged into: name another folder, or another --into")
    merged = Merged()
    with copied(file) as draft, connected(sqlite_uri(draft), draft) as source:
        experiments = [one for one in source.search_experiments() if one.name != DEFAULT or runs_of(source, one)]
        for experiment in experiments:
            client, place = open_client(uri, experiment.name, results)
            ends = Ends(source, client, uri, file.parent / ARTIFACTS, results)
            with connected(uri, target):
                merge_experiment(ends, experiment, place, merged)
        if experiments:
            with connected(uri, target):
                merge_registered(ends, merged)
    return merged


@contextlib.contextmanager
def copied(file: Path) -> Iterator[Path]:
    """A consistent copy of a SQLite database for as long as the scope lasts, also of one that is in use, or must not be written to."""
    with tempfile.TemporaryDirectory(prefix="t2ilib-") as folder:
        draft = Path(folder) / "mlflow.db"
        backup(file, draft)
        yield draft


def backup(file: Path, copy: Path) -> None:
    """Writes a consistent copy of a SQLite database; raises ConfigError for a file that is none."""
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as old,
            contextlib.closing(sqlite3.connect(copy)) as new,
        ):
            old.backup(new)
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{file} cannot be read as an MLflow store ({error})") from None


def runs_of(client, experiment) -> list:
    """All runs of an experiment that are not deleted, those without a parent first."""
    asked = [experiment.experiment_id]
    found = all_pages(lambda token: client.search_runs(asked, max_results=1000, page_token=token))
    return sorted(found, key=lambda run: (PARENT in run.data.tags, run.info.start_time))


def merge_experiment(ends: Ends, experiment, place: str, merged: Merged) -> None:
    """`place`: the id of the experiment in the target."""
    for name, value in experiment.tags.items():
        if name not in ends.target.get_experiment(place).tags:
            ends.target.set_experiment_tag(place, name, value)
    runs, new = runs_of(ends.source, experiment), set()
    for run in runs:
        old = run.info.run_id
        known = find_run(ends.target, place, old)
        if known is None:
            known = make_run(ends, place, run)
            new.add(old)
        merged.runs[old] = known
    merged.added += len(new)
    merge_models(ends, experiment, place, merged)
    for run in runs:
        merge_run(ends, run, merged, run.info.run_id in new)


def find_run(client, experiment_id: str, run_id: str) -> str | None:
    """The run's id in the target, if it is there, by its own id or that which it had."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.run_id
    except MlflowException:
        found = client.search_runs([experiment_id], f"tags.`{MERGED}` = '{run_id}'")
        return found[0].info.run_id if found else None


def make_run(ends: Ends, experiment_id: str, run) -> str:
    """A run with nothing in it, under the id that it had where the target is a SQLite file."""
    old, file = run.info.run_id, database_file(ends.uri)
    made = ends.target.create_run(
        experiment_id, start_time=run.info.start_time, run_name=run.info.run_name, tags={MERGED: old}
    ).info.run_id
    if file is None:
        return made
    # MLflow chooses ids itself. What names a new run is its row, its folder's name in it, and its tags.
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as database, database:
        database.execute(
            "UPDATE runs SET run_uuid = ?, artifact_uri = replace(artifact_uri, ?, ?) WHERE run_uuid = ?",
            (old, made, old, made),
        )
        database.execute("UPDATE tags SET run_uuid = ? WHERE run_uuid = ?", (old, made))
    ends.target.delete_tag(old, MERGED)
    return old


def merge_run(ends: Ends, run, merged: Merged, new: bool) -> None:
    """Brings the run in the target up to the source's, and leaves what it has beyond that."""
    known = ends.target.get_run(merged.runs[run.info.run_id])
    place = known.info.run_id
    if known.info.lifecycle_stage != "active":
        merged.conflicts.append(f"run {run.info.run_name} ({place}) was deleted in the target: it stays deleted")
        return
    later = new or last_sign(run) > last_sign(known)
    merge_params(ends, run, known, merged)
    merged.points += merge_metrics(ends, run, place, new)
    tags = {name: mapped(name, value, merged) for name, value in run.data.tags.items()}
    for name, value in tags.items():
        if known.data.tags.get(name) != value and (later or name not in known.data.tags):
            ends.target.set_tag(place, name, value)
    there = {(one.dataset.name, one.dataset.digest) for one in known.inputs.dataset_inputs}
    lacking = [one for one in run.inputs.dataset_inputs if (one.dataset.name, one.dataset.digest) not in there]
    if lacking:
        ends.target.log_inputs(place, lacking)
    folder = now_at(run.info.artifact_uri, ends.artifacts)
    if folder is not None:
        merge_artifacts(ends, folder, known, later)
    elif not known_empty(run):
        merged.conflicts.append(
            f"run {run.info.run_name} ({place}) comes without artifacts: {run.info.artifact_uri} is not here"
        )
    if later and (run.info.status, run.info.end_time) != (known.info.status, known.info.end_time):
        if run.info.end_time is None:
            ends.target.update_run(place, status=run.info.status)
        else:
            ends.target.set_terminated(place, status=run.info.status, end_time=run.info.end_time)


def last_sign(run) -> float:
    """When a run last said something, in seconds."""
    return max(float(run.data.tags.get(HEARTBEAT, 0)), (run.info.end_time or 0) / 1000)


def known_empty(run) -> bool:
    """Whether a run says of itself that it never got so far as to keep a file."""
    return not run.data.params and not run.data.metrics


def merge_params(ends: Ends, run, known, merged: Merged) -> None:
    from mlflow.entities import Param

    lacking = [Param(name, value) for name, value in run.data.params.items() if name not in known.data.params]
    for start in range(0, len(lacking), MAX_PARAMS):
        ends.target.log_batch(known.info.run_id, params=lacking[start : start + MAX_PARAMS])
    for name, value in run.data.params.items():
        other = known.data.params.get(name, value)
        if other != value:
            merged.conflicts.append(
                f"run {run.info.run_name} ({known.info.run_id}): {name} is {other} in the target, {value} in the source"
            )


def merge_metrics(ends: Ends, run, place: str, new: bool) -> int:
    """Logs the points that the target lacks; returns how many those are."""
    from mlflow.entities import Metric

    lacking = []
    for name in run.data.metrics:
        there = set() if new else {told(point) for point in ends.target.get_metric_history(place, name)}
        points = [point for point in ends.source.get_metric_history(run.info.run_id, name) if told(point) not in there]
        lacking += [Metric(name, point.value, point.timestamp, point.step) for point in points]
    for start in range(0, len(lacking), MAX_METRICS):
        ends.target.log_batch(place, metrics=lacking[start : start + MAX_METRICS])
    return len(lacking)


def told(point) -> tuple[int, int, str]:
    """What a point is known by; of its value the text, because NaN equals nothing."""
    return point.step, point.timestamp, repr(float(point.value))


def mapped(name: str, value: str, merged: Merged) -> str:
    """A tag's value, with ids as they are now."""
    if name == PARENT:
        return merged.runs.get(value, value)
    if name == MODEL_TAG:
        model = value.removeprefix("models:/")
        return f"models:/{merged.models.get(model, model)}"
    if name == FORKED:
        origin, space, rest = value.partition(" ")
        return merged.runs.get(origin, origin) + space + rest
    return value


def merge_artifacts(ends: Ends, folder: Path, known, again: bool) -> None:
    """Copies the files that the target lacks, or with `again` all of them. On this machine by hand: MLflow remembers where a run of this id kept
    its files before."""
    home = local(known.info.artifact_uri)
    there = set() if again or home else set(listed(known.info.artifact_uri, ends.uri))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if home is None and name not in there:
            ends.target.log_artifact(known.info.run_id, str(path), name.rpartition("/")[0] or None)
        elif home is not None and (again or not (home / name).exists()):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / name)


def listed(uri: str, store: str) -> Iterator[str]:
    """The paths of all files of a run's artifacts. Asked for by the artifacts' own URI: by the run's id MLflow mixes in models' files."""
    with as_default(store) as mlflow:
        folders = [""]
        while folders:
            for item in mlflow.artifacts.list_artifacts(artifact_uri=f"{uri}/{folders.pop()}".rstrip("/")):
                if item.is_dir:
                    folders.append(item.path)
                else:
                    yield item.path
