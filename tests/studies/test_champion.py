"""Adapters in MLflow's registry: loaded back by URI in another process, and the champion of a study."""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.sampling import DRAW_SEED, draw
from t2ilib.models.load import load_base
from t2ilib.report import champion, headline, load_report
from t2ilib.runfile import build_run
from t2ilib.seeds import seed_for
from t2ilib.studies.champion import ALIAS, Lead, choose, find_lead, name_champion
from t2ilib.studies.runs import StudyRun
from t2ilib.studies.scoring import TOGETHER
from t2ilib.tracking.models import MODEL_TAG
from t2ilib.tracking.store import open_client, tracking_uri
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.loop import train

PROMPT = "a large upright red heart at the center on a white background"

MEASURES = {
    "held_out_loss": {"title": "held-out loss", "unit": "loss", "better": "lower", "role": "loss"},
    "concept/learned": {"title": "concept learned", "unit": "share", "better": "higher", "role": "learned", "headline": "Learned most"},
    "base_kept/all": {"title": "base kept", "unit": "share", "better": "higher", "role": "kept"},
}  # fmt: skip

LOAD = """
import sys
import mlflow, numpy as np, torch

mlflow.set_tracking_uri(sys.argv[1])
for name, target in zip(sys.argv[2::2], sys.argv[3::2]):
    pipeline = mlflow.diffusers.load_model(name).load_pipeline(device="cpu", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    np.save(target, pipeline(PROMPT, generator=generator, num_inference_steps=3, guidance_scale=2.0).images[0])
    print(mlflow.models.get_model_info(name).signature.params)
assert "t2ilib" not in sys.modules
"""


def study_run(variant: str, seed: int, folder: Path) -> StudyRun:
    return StudyRun(
        variant, seed, {}, folder, Path("train.ipynb"), {"study": "toy", "preset": "quick", "variant": variant}
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_logged_adapter_comes_back_by_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = build_run(
        {
            "output": str(tmp_path / "results" / kind),
            "adapter": {"kind": kind, "rank": 4},
            "optimizer": {"learning_rate": 1e-2},
            "data": {"source": "shapes", "validation_share": 0.25},
            "shapes": {"scenes": ["heart"], "num_pictures": 4, "checked_prompts": 0},
            "training": {"steps": 3, "batch_size": 2},
            "evaluation": {
                "prompts": [PROMPT],
                "num_inference_steps": 3,
                "guidance_scale": 2.0,
                "validation_timesteps": 1,
            },
            "tracking": {"experiment": "registry"},
        }
    )
    with open_tracker(run) as tracker:
        result = train(run, tracker)
    uri = tracking_uri(None, run.output.parent)
    client = MlflowClient(uri)
    (run.output / "result.json").write_text(
        json.dumps({"mlflow_run_id": tracker.run_id, "metrics": {"held_out_loss": 0.5}, "measures": MEASURES})
    )
    model = client.get_run(tracker.run_id).data.tags[MODEL_TAG]
    logged = client.get_logged_model(model.removeprefix("models:/"))
    assert logged.experiment_id == client.get_run(tracker.run_id).info.experiment_id
    assert Path(logged.artifact_location.removeprefix("file://")).is_relative_to(run.output.parent)
    lead = Lead(study_run(kind, 0, run.output), Metric(**MEASURES["held_out_loss"]), "")
    champion = f"models:/registry@{ALIAS}"
    for about in ("as it was", "as it is"):
        line = name_champion(client, "registry", lead, about, {"chosen_by": about})
        assert line == f"{champion} ({kind} seed 0)"
    versions = client.search_model_versions("name = 'registry'")
    assert [(version.description, version.tags["chosen_by"]) for version in versions] == [("as it is", "as it is")]
    assert versions[0].tags.items() >= {"variant": kind, "seed": "0", "study": "toy", "preset": "quick"}.items()
    assert client.get_registered_model("registry").description == "as it is"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    targets = {name: str(tmp_path / f"{number}.npy") for number, name in enumerate((model, champion))}
    words = [word for pair in targets.items() for word in pair]
    code = LOAD.replace("PROMPT", repr(PROMPT)).replace("SEED", str(seed_for(DRAW_SEED, "picture", 0)))
    done = subprocess.run([sys.executable, "-c", code, uri, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("'height': integer (default: 64)") == 2

    ours = np.asarray(draw(result.components, [PROMPT], run.evaluation)[0], int)
    base = np.asarray(draw(load_base(run.model), [PROMPT], run.evaluation)[0], int)
    assert abs(ours - base).max() > 8, "the adapter changes nothing, so the comparison shows nothing"
    for target in targets.values():
        assert abs(np.load(target).astype(int) - ours).max() <= 1


def finished(folder: Path, variant: str, seed: int, **metrics: float) -> StudyRun:
    run = study_run(variant, seed, folder / variant / str(seed))
    run.folder.mkdir(parents=True)
    names = {"learned": "concept/learned", "kept": "base_kept/all", "loss": "held_out_loss"}
    values = {names[name]: value for name, value in metrics.items()}
    (run.folder / "result.json").write_text(json.dumps({"mlflow_run_id": "x", "metrics": values, "measures": MEASURES}))
    return run


def trial(folder: Path, seeds: int, **learned: float) -> list[StudyRun]:
    """Runs of variants with these means; the noise of a seed is shared by all but for a hundredth."""
    return [
        finished(
            folder, name, seed, learned=mean + 0.1 * (seed % 3) + zlib.crc32(f"{name} {seed}".encode()) % 100 / 1e4
        )
        for seed in range(seeds)
        for name, mean in learned.items()
    ]


def test_the_leader_is_the_best_variant_by_its_mean_and_its_median_run_stands_for_it(tmp_path: Path) -> None:
    learned = {"lucky": (0.9, 0.1, 0.1), "steady": (0.9, 0.6, 0.5)}
    runs = [
        finished(tmp_path, name, seed, learned=value, kept=0.5, loss=0.1)
        for name, values in learned.items()
        for seed, value in enumerate(values)
    ]
    lead = find_lead(runs)
    assert (lead.run.label, lead.metric.title) == ("steady seed 1", "learned and kept together")
    assert lead.doubt == "its lead is not shown against lucky"
    assert find_lead([]) is None


def test_what_was_kept_counts_and_what_learned_nothing_cannot_win() -> None:
    """Harmonic means by hand: 2 * 0.5 * 0.4 / 0.9, 2 * 0.6 * 0.1 / 0.7, and 0 for a run that only kept."""
    declared = {name: Metric(**about) for name, about in MEASURES.items()}

    def named(learned: float, kept: float, loss: float) -> dict[str, float]:
        return {"concept/learned": learned, "base_kept/all": kept, "held_out_loss": loss}

    results = {
        "both": {0: named(0.5, 0.4, 0.3)},
        "forgetful": {0: named(0.6, 0.1, 0.2)},
        "lazy": {0: named(0.0, 1.0, 0.1)},
    }
    choice = choose(results, declared)
    assert (choice.leader, choice.metric) == ("both", TOGETHER)
    assert {name: own[0] for name, own in choice.values.items()} == pytest.approx(
        {"both": 0.4 / 0.9, "forgetful": 0.12 / 0.7, "lazy": 0.0}
    )
    assert choose(results, declared, score="concept/learned + 0 * kept").leader == "forgetful", "the study's own word"
    assert choose(results, declared, score="-loss").leader == "lazy"
    for metrics in results.values():
        del metrics[0]["base_kept/all"]
    assert choose(results, declared).leader == "forgetful", "what was learned decides alone"
    del results["both"][0]["concept/learned"]
    assert choose(results, declared).leader == "lazy", "the loss, since not every run has the other"


def test_a_lead_is_shown_against_every_other_or_not_at_all(tmp_path: Path) -> None:
    assert find_lead(trial(tmp_path / "far", 6, long=0.6, short=0.3)).doubt == ""
    close = find_lead(trial(tmp_path / "near", 6, long=0.6, near=0.597, short=0.3))
    assert close.doubt == "its lead is not shown against near"
    three = find_lead(trial(tmp_path / "three", 3, long=0.9, short=0.1))
    assert three.doubt == "", "what is plain needs few seeds"
    one = find_lead(trial(tmp_path / "one", 1, long=0.6, short=0.3))
    assert one.doubt == "its lead is not tested (one seed): two are needed"
    assert find_lead(trial(tmp_path / "alone", 6, long=0.6)).doubt.startswith("it is the only trained variant")


def test_the_untouched_base_does_not_compete(tmp_path: Path) -> None:
    runs = trial(tmp_path, 6, long=0.6, short=0.3)
    base = [
        replace(run, variant="base", settings={"training": {"trains": "nothing"}})
        for run in trial(tmp_path / "b", 6, base=0.9)
    ]
    lead = find_lead(runs + base)
    assert (lead.run.variant, lead.doubt) == ("long", "")


@pytest.mark.parametrize("near", [0.597, 0.3])
def test_the_report_states_the_rule_and_what_came_of_it(tmp_path: Path, near: float) -> None:
    folder = tmp_path / "toy"
    runs = trial(folder, 6, long=0.6, near=near, short=0.3)
    for run in runs:
        run.folder.rename(run.folder.with_name(f"seed{run.seed}"))
        path = run.folder.with_name(f"seed{run.seed}") / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "finished"}))
    variants = {name: {"title": name} for name in ("long", "near", "short")}
    (folder / "study.json").write_text(
        json.dumps({"name": "toy", "reference": "short", "seeds": [*range(6)], "variants": variants})
    )
    report = load_report(folder)
    moved = [replace(run, folder=run.folder.with_name(f"seed{run.seed}")) for run in runs]
    lead = find_lead(moved)
    assert ("**shown** against all 2 others" in headline(report)) == (lead.doubt == "") == (near == 0.3)
    rule, outcome = champion(report).split("stands for it. ")
    assert rule.startswith("The champion is the trained variant with the best *concept learned*")
    if near == 0.3:
        assert outcome.endswith(f", with the run of seed {lead.run.seed}.")
    else:
        assert outcome.startswith("None: long leads (")
        assert outcome.endswith("its lead is not shown against near.")


def test_without_known_concepts_the_held_out_loss_decides(tmp_path: Path) -> None:
    runs = [finished(tmp_path, "a", 0, loss=0.3), finished(tmp_path, "b", 0, loss=0.2)]
    assert find_lead(runs).run.variant == "b"


def test_what_is_no_champion_is_told_with_who_leads_and_why(tmp_path: Path) -> None:
    client, _ = open_client(tracking_uri(None, tmp_path), "other", tmp_path)
    lead = find_lead(trial(tmp_path, 6, long=0.6, short=0.3))
    assert "long leads on concept learned, but its run was logged to another store" in name_champion(
        client, "x-full", lead
    )
    assert name_champion(client, "x-full", None) == "none: no run measured what could decide"
    doubtful = replace(lead, doubt="its lead is not tested (one seed): two are needed")
    (lead.run.folder / "result.json").write_text(json.dumps({"mlflow_run_id": None}))
    assert name_champion(client, "x-full", doubtful) == (
        "none: long leads on concept learned, but its lead is not tested (one seed): two are needed"
    )
    assert name_champion(client, "x-full", lead).endswith("its run logged no adapter to register")


def test_a_champion_of_before_loses_its_alias_where_no_lead_is_shown_any_more(tmp_path: Path) -> None:
    client, experiment = open_client(tracking_uri(None, tmp_path), "other", tmp_path)
    client.create_registered_model("x-full")
    run = client.create_run(experiment)
    client.create_model_version("x-full", str(tmp_path), run.info.run_id)
    client.set_registered_model_alias("x-full", ALIAS, 1)
    assert name_champion(client, "x-full", None).startswith("none")
    assert client.get_registered_model("x-full").aliases == {}
    assert len(client.search_model_versions("name = 'x-full'")) == 1, "what was registered stays"
