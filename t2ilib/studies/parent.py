"""A study's parent run in MLflow: what was asked, over which variants, and the way from there to everything else.

Made once a preset and taken up again; its note, and the views that it links to (`tracking.views`), are written anew whenever the study goes
on or is reported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from t2ilib.studies.file import Study
from t2ilib.studies.runs import StudyRun, addressed
from t2ilib.tracking.naming import telling_fields
from t2ilib.tracking.sending import MAX_TAG
from t2ilib.tracking.views import KIND, RUNS, study_view, view_address, view_tag

NOTE = "mlflow.note.content"
PARENT = "mlflow-parent.txt"
"""In a study's folder: the id of its parent run."""


def parent_run(client, experiment: str, study: Study, preset: str, folder: Path) -> str:
    """The MLflow run that holds the children of this preset, made once and taken up again later."""
    from mlflow.exceptions import MlflowException

    note = folder / PARENT
    if note.exists():
        try:
            client.update_run(note.read_text(), status="RUNNING")
            return note.read_text()
        except MlflowException:
            pass  # another store than last time: the parent is made anew there
    tags = {"study": study.name, "preset": preset}
    run = client.create_run(experiment, run_name=f"{study.name} ({preset})", tags=tags)
    note.write_text(run.info.run_id)
    return run.info.run_id


def describe_parent(client, parent: str, study: Study, runs: Sequence[StudyRun], told: str = "") -> None:
    """Writes the parent's note, the experiment's, and the views of its runs. `told`: what a report says, in Markdown, {} in it being
    where the run's artifacts are."""
    experiment = client.get_run(parent).info.experiment_id
    views = views_of(client, parent, runs)
    links = {title: view_address(experiment, key) for title, (key, _) in views.items()}
    links["runs in a table"] = view_address(experiment, next(iter(views.values()))[0], charts=False)
    shown = " · ".join(f"[{title}]({address})" for title, address in links.items())
    note = f"{study.question}\n\n**{shown}**\n\n{told}\n\n{variants_table(study, runs)}"
    for key, state in views.values():
        for name, value in view_tag(key, state).items():
            client.set_experiment_tag(experiment, name, value)
    for name, value in (KIND | {NOTE: f"{study.question}\n\n**{shown}**"}).items():
        client.set_experiment_tag(experiment, name, value)
    client.set_tag(parent, NOTE, note if len(note) <= MAX_TAG else f"{note[: MAX_TAG - 2]} …")


def views_of(client, parent: str, runs: Sequence[StudyRun]) -> dict[str, tuple[str, dict]]:
    """Title -> the key and the state of a view."""
    columns, steps = different_fields(runs), max(run.config().training.steps for run in runs)
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=50)
    metrics = sorted({name for child in children for name in child.data.metrics})
    place = "-".join(runs[0].tags[name] for name in ("study", "preset"))
    views = {"pictures and curves": (f"{place}{RUNS}", study_view(parent, columns, metrics, steps))}
    if len({run.seed for run in runs}) > 1:
        views["means over seeds"] = (f"{place}-means", study_view(parent, columns, metrics, steps, grouped=True))
    return views


def different_fields(runs: Sequence[StudyRun]) -> list[str]:
    """The parameters by which runs differ, beside their seed, in RunConfig's order."""
    told = [telling_fields(run.config()) for run in runs]
    names = dict.fromkeys(name for fields in told for name in fields)
    values = {name: {str(fields.get(name)) for fields in told} for name in names}
    return [name for name, found in values.items() if len(found) > 1 and name not in ("name", "seed", "output")]


def variants_table(study: Study, runs: Sequence[StudyRun]) -> str:
    """Markdown: the variants that run, what each is, and what it changes."""
    present: Mapping[str, None] = dict.fromkeys(run.variant for run in runs)
    preset = runs[0].tags["preset"]
    rows = ["| variant | | what it changes |", "|---|---|---|"]
    for name in present:
        changed = addressed(study.delta(preset, name) if preset in study.presets else study.variants[name].run)
        told = ", ".join(f"`{field}: {value}`" for field, value in changed.items()) or "nothing"
        cells = (name, study.variants[name].title, told)
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)
