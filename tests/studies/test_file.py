"""Study files: what a hypothesis claims is read and checked before anything starts."""

from pathlib import Path

import pytest
import yaml

from t2ilib.config import ConfigError
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import plan_runs
from t2ilib.studies.study import write_study


def study_of(folder: Path, claims: dict[str, list]) -> Path:
    path = folder / "toy.yaml"
    content = {
        "name": "toy",
        "question": "?",
        "reference": "plain",
        "presets": {"quick": {"seeds": [0]}},
        "run": {"adapter": {"rank": 2}},
        "variants": {name: {"title": name, "claims": claims.get(name, [])} for name in ("plain", "other")},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_claims_are_read_and_reach_the_report(tmp_path: Path) -> None:
    from t2ilib.report import load_report

    told = [{"metric": "held_out_loss", "is": "better"}, {"metric": "adapter_mib", "is": "lower", "than": "plain"}]
    study = load_study(study_of(tmp_path, {"other": told}))
    claims = study.variants["other"].claims
    assert [(one.metric, one.direction, one.than) for one in claims] == [
        ("held_out_loss", "better", None),
        ("adapter_mib", "lower", "plain"),
    ]
    write_study(study, "quick", tmp_path / "toy-quick")
    assert load_report(tmp_path / "toy-quick").variants["other"].claims == claims


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (
            {"other": [{"metric": "x", "is": "nicer"}]},
            r"variants.other.claims.0.is: .*'higher', 'lower', 'better' or 'worse'",
        ),
        ({"other": [{"is": "better"}]}, r"variants.other.claims.0.metric: Field required"),
        ({"other": [{"metric": "x", "is": "better", "then": "plain"}]}, r"variants.other.claims.0.then: Extra inputs"),
        (
            {"other": [{"metric": "x", "is": "better", "than": "plane"}]},
            r"variant 'plane' does not exist.* Did you mean 'plain'",
        ),
        (
            {"plain": [{"metric": "x", "is": "better"}]},
            r"variants.plain.claims.0.than: say which other variant plain is held",
        ),
        (
            {"other": [{"metric": "x", "is": "better", "than": "other"}]},
            r"variants.other.claims.0.than: say which other",
        ),
    ],
)
def test_a_claim_that_nobody_could_judge_is_refused(tmp_path: Path, claims: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(study_of(tmp_path, claims))


def test_a_run_finds_what_another_studys_run_of_its_seed_left(tmp_path: Path) -> None:
    path = study_of(tmp_path, {})
    content = yaml.safe_load(path.read_text())
    drawn = {"adapter": None, "training": {"trains": "nothing", "steps": 0}}
    drawn["evaluation"] = {
        "adapters": [{"path": "before/seed{seed}/adapter"}],
        "prompts": ["a {red|blue} cat", "{seed}"],
    }
    content["presets"]["quick"]["seeds"] = [3, 4]
    content["variants"]["other"]["run"] = drawn
    path.write_text(yaml.safe_dump(content))
    runs = {run.label: run for run in plan_runs(load_study(path), path, "quick", tmp_path)}
    evaluation = runs["other seed 4"].config().evaluation
    assert evaluation.adapters[0].path == "before/seed4/adapter"
    assert evaluation.prompts == ("a {red|blue} cat", "4")
    assert runs["other seed 3"].digest != runs["other seed 4"].digest
    assert runs["other seed 3"].parameters(None)["evaluation"]["adapters"] == [{"path": "before/seed3/adapter"}]
