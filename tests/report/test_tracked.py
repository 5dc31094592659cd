"""A report on its study's parent run in MLflow: what it says, what it holds, and that it is written over, not doubled."""

import base64
import json
import zlib
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from t2ilib.report.tracked import champion_card, log_report
from t2ilib.studies.file import load_study
from t2ilib.studies.parent import NOTE, PARENT, parent_run
from t2ilib.studies.runs import COLOUR, plan_runs
from t2ilib.studies.study import write_study
from t2ilib.tracking.naming import shown_name
from t2ilib.tracking.store import open_client, tracking_uri
from t2ilib.tracking.views import SHARED

MEASURES = {
    "concept/all": {"title": "concept learned", "unit": "share", "better": "higher", "role": "learned", "headline": "Learned most", "table": "Learned"},
    "base_kept/all": {"title": "base kept", "unit": "share", "better": "higher", "role": "kept", "table": "Kept"},
}  # fmt: skip
SEEDS = range(6)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study whose runs are finished: DoRA learned more than LoRA with every seed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    content = {
        "name": "toy",
        "question": "Does DoRA learn more?",
        "notebook": "train.ipynb",
        "reference": "lora",
        "run": {"adapter": {"rank": 4}, "data": {"source": "shapes"}, "training": {"steps": 24}},
        "presets": {"full": {"seeds": list(SEEDS)}},
        "variants": {
            "lora": {"title": "LoRA"},
            "dora": {"title": "DoRA, a | rank", "run": {"adapter": {"kind": "dora"}}},
        },
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    results, loaded = tmp_path / "results", load_study(path)
    client, experiment = open_client(tracking_uri(None, results), "toy", results)
    write_study(loaded, "full", results / "toy-full")
    parent = parent_run(client, experiment, loaded, "full", results / "toy-full")
    for run in plan_runs(loaded, path, "full", results):
        run.folder.mkdir(parents=True)
        learned = (0.9 if run.variant == "dora" else 0.5) + run.seed / 100
        metrics = {"concept/all": learned, "base_kept/all": 0.5}
        tags = run.tags | {"mlflow.parentRunId": parent, "seed": str(run.seed)}
        child = client.create_run(experiment, tags=tags, run_name=run.label).info.run_id
        for name, value in (metrics | {"memory/start": 1.0}).items():
            client.log_metric(child, shown_name(name), value, step=24)
        told = {"status": "finished", "digest": run.digest, "run": run.settings, "metrics": metrics}
        (run.folder / "result.json").write_text(json.dumps(told | {"measures": MEASURES, "mlflow_run_id": child}))
    (results / "toy-full" / "report.md").write_text("# toy\n")
    (results / "toy-full" / "report.html").write_text("<h1>toy</h1>")
    (results / "toy-full" / "pictures.png").write_bytes(b"a picture")
    return path


def view_of(tags: dict[str, str], key: str) -> dict:
    kind, packed = tags[SHARED + key].split(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_parent_tells_what_was_found_and_opens_the_runs_side_by_side(study: Path) -> None:
    results = study.parent / "results"
    assert log_report(study, "full", results) == ""
    client = MlflowClient(tracking_uri(None, results))
    parent = (results / "toy-full" / PARENT).read_text()
    run = client.get_run(parent)
    note = run.data.tags[NOTE]
    address = f"#/experiments/{run.info.experiment_id}/runs?viewStateShareKey=toy-full-runs"
    assert note.startswith(f"Does DoRA learn more?\n\n**[pictures and curves]({address}&compareRunsMode=CHART&")
    for told in (
        "**Learned most: DoRA, a | rank** (92.5 ± 2.0 %); lead **shown**",
        "leads (64.9 ± 0.5 %), with the run of seed 3.",
        f"](#/experiments/{run.info.experiment_id}/runs/{parent}/artifacts/report/report.html)",
        f"![pictures.png](get-artifact?run_uuid={parent}&path=report/pictures.png)",
        "| dora | DoRA, a / rank | `adapter.kind: dora` |",
    ):
        assert told in note, told
    held = {item.path for item in client.list_artifacts(parent, "report")}
    assert held == {"report/report.md", "report/report.html", "report/pictures.png"}

    tags = client.get_experiment(run.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags[NOTE].startswith("Does DoRA learn more?")
    runs, means = (view_of(tags, f"toy-full-{name}") for name in ("runs", "means"))
    matching = client.search_runs([run.info.experiment_id], runs["searchFilter"])
    assert len(matching) == 12
    assert {child.data.tags[COLOUR] for child in matching if child.data.tags["variant"] == "dora"} == {"#ff7f0e"}
    shown = [*map(shown_name, ("concept/all", "base_kept/all"))]
    columns = [f"metrics.`{name}`" for name in shown]
    assert runs["selectedColumns"] == ["tags.`variant`", "tags.`seed`", "params.`adapter.kind`", *columns]
    assert [(card["type"], card.get("step")) for card in runs["compareRunCharts"][:1]] == [("IMAGE", 24)]
    assert sorted(card["metricKey"] for card in runs["compareRunCharts"][1:]) == sorted(shown)
    sections = {section["name"]: section for section in runs["compareRunSections"]}
    assert [(name, section["display"]) for name, section in sections.items()] == [
        ("A first look", True), ("memory", False), ("Model metrics", False), ("System metrics", False),
    ]  # fmt: skip
    assert {card["metricSectionId"] for card in runs["compareRunCharts"]} == {sections["A first look"]["uuid"]}
    assert means["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "variant"}]
    assert "IMAGE" not in {card["type"] for card in means["compareRunCharts"]}


def test_what_is_reported_again_is_written_over(study: Path) -> None:
    results = study.parent / "results"
    log_report(study, "full", results)
    client = MlflowClient(tracking_uri(None, results))
    parent = (results / "toy-full" / PARENT).read_text()
    before = client.get_run(parent).data.tags
    result = results / "toy-full" / "dora" / "seed0" / "result.json"
    told = json.loads(result.read_text())
    told["metrics"]["concept/all"] = 0.5
    result.write_text(json.dumps(told))
    (results / "toy-full" / "report.md").write_text("# toy, again\n")
    log_report(study, "full", results)
    after = client.get_run(parent).data.tags
    assert before.keys() == after.keys()
    assert "92.5" in before[NOTE]
    assert "92.5" not in after[NOTE]
    path = client.download_artifacts(parent, "report/report.md", str(study.parent))
    assert Path(path).read_text() == "# toy, again\n"
    assert len(client.search_runs(["1"])) == 13


def test_the_card_of_a_champion_says_what_it_was_chosen_for_and_over_what(study: Path) -> None:
    about, tags = champion_card(study.parent / "results" / "toy-full", "toy-full")
    assert about.startswith("DoRA, a | rank: the champion of the study *toy* (full).\n\nDoes DoRA learn more?")
    assert "DoRA, a | rank leads (64.9 ± 0.5 %), with the run of seed 3." in about
    row = next(line for line in about.splitlines() if line.startswith("| LoRA "))
    assert row == "| LoRA | 51.2 ± 0.9 % | +13.7 pp | +12.7 to +14.7 pp |"
    assert 'mlflow.diffusers.load_model("models:/toy-full@champion")' in about
    assert tags == {"chosen_by": "learned and kept together", "value": "64.9 ± 0.5 %", "seeds": "6"}
