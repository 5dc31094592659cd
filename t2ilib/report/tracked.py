"""A report where its runs are: on the study's parent run in MLflow, and on the champion that it names.

The parent has report.md with its pictures, the report as a page, and a note with the headline, the champion and the first pictures; all of
it is written over when the study goes on or is reported again. The champion's card says what it was chosen for, over what, by which
numbers, and how it is loaded.
"""

from pathlib import Path

from t2ilib.evaluation.metrics import Metric
from t2ilib.report.comparing import chosen
from t2ilib.report.contents import StudyReport
from t2ilib.report.reading import load_report
from t2ilib.report.tables import markdown_table, verdict_table, write_interval, write_mean, write_number
from t2ilib.report.texts import champion, headline, settings_text
from t2ilib.statistics.pooled import Difference, leads
from t2ilib.studies.champion import Choice
from t2ilib.studies.file import load_study
from t2ilib.studies.parent import PARENT, describe_parent
from t2ilib.studies.runs import plan_runs
from t2ilib.tracking.outbox import Outbox
from t2ilib.tracking.store import connected, database_file, tracking_uri

UNDER = "report"
"""Of the parent's artifacts."""
SHOWN = ("pictures.png", "learned_kept.png")


def log_report(path: Path, preset: str, results: Path) -> str:
    """Puts a study's report on its parent run; returns a sentence where not all of it arrived. Raises ConfigError for a store that
    cannot be used."""
    study, results = load_study(path), results.absolute()
    folder = results / f"{study.name}-{preset}"
    uri = tracking_uri(None, results)
    parent = (folder / PARENT).read_text()
    with connected(uri, database_file(uri)) as client:
        experiment = client.get_run(parent).info.experiment_id
        told = told_of(load_report(folder), experiment, parent)
        describe_parent(client, parent, study, plan_runs(study, path, preset, results), told)
    outbox = Outbox(folder, uri, parent, client)
    for file in sorted([*folder.glob("*.md"), *folder.glob("*.png"), *folder.glob("report.html")]):
        outbox.add("artifact", path=str(file), under=UNDER)
    return outbox.close()


def told_of(report: StudyReport, experiment: str, parent: str) -> str:
    """Markdown for the parent's note: headline, champion, verdicts, pictures, and where the whole report is."""
    place = f"get-artifact?run_uuid={parent}&path={UNDER}/"
    pictures = [f"![{name}]({place}{name})" for name in SHOWN if (report.folder / name).exists()]
    page = f"#/experiments/{experiment}/runs/{parent}/artifacts/{UNDER}/report.html"
    whole = f"[The whole report]({page}), among the artifacts of this run in `{UNDER}`."
    parts = (headline(report), champion(report), whole, *pictures, markdown_table(verdict_table(report)))
    return "\n\n".join(filter(None, parts))


def champion_card(folder: Path, name: str) -> tuple[str, dict[str, str]]:
    """Markdown for the registered model `name` and its version, and tags: ("", {}) where nothing decides."""
    report = load_report(folder)
    choice = chosen(report)
    if choice is None:
        return "", {}
    values = choice.values[choice.leader]
    tags = {
        "chosen_by": choice.metric.title,
        "value": write_mean(values, choice.metric),
        "seeds": str(len(values)),
    }
    parts = (
        f"{report.variants[choice.leader].title}: the champion of the study *{report.name}* ({report.preset}).",
        report.question,
        champion(report),
        f"## Over what\n\n{markdown_table(rivals(report, choice))}",
        settings_text(report, choice.leader),
        f"## Loading it\n\n```python\n{LOADING.format(name=name)}```",
    )
    return "\n\n".join(filter(None, parts)), tags


LOADING = """import mlflow

pipeline = mlflow.diffusers.load_model("models:/{name}@champion").load_pipeline()
pipeline("a prompt").images[0].save("picture.png")
"""


def rivals(report: StudyReport, choice: Choice) -> list[dict[str, str]]:
    """A row a trained variant: its mean, and by how much the leader is ahead of it, with the interval that all pairs pay for."""
    ahead = leads(choice.values, choice.leader)
    rows = []
    for name, values in choice.values.items():
        row = {"name": report.variants[name].title, choice.metric.title: write_mean(values, choice.metric)}
        difference = ahead.get(name)
        row["the champion's lead"] = write_number(difference.mean, choice.metric, signed=True) if difference else ""
        row["95% interval, of all pairs together"] = told_interval(difference, choice.metric)
        rows.append(row)
    return rows


def told_interval(difference: Difference | None, metric: Metric) -> str:
    """The interval that decides, which two seeds and more have."""
    return write_interval(difference.together, metric) if difference and difference.together else ""
