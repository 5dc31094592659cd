"""A study of one's own pictures: what is written is what was read, holds for every base, and runs as it is from any folder."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.data.dataset import load_datasets
from t2ilib.evaluation.measures import measure
from t2ilib.runfile import build_run, merge
from t2ilib.shapes import world
from t2ilib.studies import new
from t2ilib.studies.comparisons import COMPARISONS
from t2ilib.studies.file import load_study
from t2ilib.studies.new import SETTINGS, Base, choose_share, new_study, scalar
from t2ilib.studies.runs import check_notebooks, plan_runs
from t2ilib.studies.study import check_data
from t2ilib.training.loop import train

BASES = {
    "tiny": Base("tiny-sdxl", 64, False),
    "sd15": Base("owner/sd15", 512, True),
    "sdxl": Base("owner/sdxl", 1024, True),
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "My pictures"
    world.write_folder(folder, world.mixed_scenes(12, "train", 0, ["heart", "striped"]), 0)
    return folder


def captions(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_what_is_written_runs_as_it_is_from_any_folder(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(pictures.parent)
    done = CliRunner().invoke(app, ["-q", "study", "new", pictures.name, "--compare", "dora,prodigy"])
    assert done.exit_code == 0, done.output
    file = pictures.parent / "my-pictures.yaml"
    assert "t2ilib study run my-pictures.yaml --preset quick  # 1 seed, 100 steps each" in done.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    study = load_study(file)
    assert (study.reference, study.base, list(study.variants)) == ("dora", "base", ["base", "dora", "prodigy"])
    assert [len(preset.seeds) for preset in study.presets.values()] == [1, 6]
    for preset in study.presets:
        runs = plan_runs(study, file, preset, Path("results"))
        check_notebooks(runs)
        check_data(runs)
    few = {"training": {"steps": 2}, "evaluation": {"num_inference_steps": 1, "validation_timesteps": 1}}
    run = build_run(merge(plan_runs(study, file, "quick", tmp_path, ["prodigy"])[0].values(), few, {"tracking": {}}))
    result = train(run)
    assert {"held_out_loss", "clip_score/captions", "learned/clip-patches", "kept/clip-patches"} <= measure(
        run, result.components, metrics=result.metrics
    ).keys()
    history = (run.output / "metrics.jsonl").read_text()
    asked = merge(run.model_dump(mode="json"), {"evaluation": {"prompts": ["a circle"], "measures": []}})
    again = train(build_run(asked))
    assert (again.resumed_from, again.prompts) == (2, ("a circle",)), "other prompts are drawn by what was trained"
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    assert sum('"grad_norm"' in line for line in lines) == history.count('"grad_norm"') == 2, "a step was taken again"


def test_prompts_are_captions_from_all_over_and_the_split_is_told(pictures: Path, tmp_path: Path) -> None:
    file, study = new_study(pictures, "tiny-sdxl", ["lora"], tmp_path / "own.yaml")
    prompts, known = study.run["evaluation"]["prompts"], captions(pictures)
    assert prompts == [known[index] for index in (0, 1, 3, 4, 6, 7, 9, 10)]
    run = build_run(plan_runs(study, file, "quick", tmp_path, ["lora"])[0].values())
    training, held_out = load_datasets(run)
    names = [record.path.name for record in held_out.records]
    text = file.read_text()
    assert f"# holds out {len(names)} of 12 by their names: {', '.join(names)}\n" in text
    assert re.findall(r'- "(.*)"  # of a held-out picture', text) == [p for p in prompts if p in held_out.captions()]
    assert run.training.batch_size == min(8, len(training))
    again, _ = new_study(pictures, "tiny-sdxl", ["lora"], tmp_path / "again.yaml")
    assert again.read_text() == text.replace("own.yaml", "again.yaml")


def test_groups_of_prompts_are_written_of_trigger_and_class(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "own.yaml"
    told = [
        "-q",
        "study",
        "new",
        str(pictures),
        "--compare",
        "lora",
        "--trigger",
        "striped",
        "--class",
        "heart",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0, done.output
    study = load_study(out)
    run = build_run(plan_runs(study, out, "quick", tmp_path, ["lora"])[0].values())
    groups = run.evaluation.prompt_groups.named()
    _, held_out = load_datasets(run)
    assert groups["captions"][:8] == tuple(held_out.captions() * 8)[:8], "each as often, from other noise"
    assert set(groups["captions"]) <= set(captions(pictures))
    assert len(set(groups["captions"]) - set(held_out.captions())) == 8
    assert groups["trigger"][0] == "a striped heart"
    assert len(groups["unrelated"]) >= 50
    assert f"{sum(map(len, groups.values()))} pictures a run" in out.read_text()
    monkeypatch.setattr(new, "look_at_base", lambda name: BASES["sd15"])
    _, study = new_study(pictures, "owner/sd15", ["lora"], tmp_path / "real.yaml", "sks", "dog")
    asked = study.run["evaluation"]
    assert asked["embedding_models"] == ["facebook/dinov2-base"]
    assert "a sks dog on a beach at sunset" in asked["prompt_groups"]["contexts"]
    assert not {*asked["prompt_groups"]["unrelated"]} & {*groups["unrelated"]}
    with pytest.raises(ConfigError, match="give --trigger too"):
        new_study(pictures, "tiny-sdxl", ["lora"], tmp_path / "other.yaml", None, "dog")


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_every_comparison_is_another_run_over_every_base(
    pictures: Path, tmp_path: Path, monkeypatch, base: Base
) -> None:
    monkeypatch.setattr(new, "look_at_base", lambda name: base)
    same = {"tiny": "unquantized", "sd15": "unquantized", "sdxl": "nf4"}
    names = [name for name in COMPARISONS if name != same[next(key for key in BASES if BASES[key] == base)]]
    file, study = new_study(pictures, base.name, names, tmp_path / "own.yaml")
    assert list(study.variants) == ["base", *names]
    digests = {run.config().training_digest() for run in plan_runs(study, file, "quick", tmp_path)}
    assert len(digests) == 1 + len(names)
    run = build_run(study.settings("quick", "lora"))
    assert (run.model.base, run.data.resolution) == (base.name, base.resolution)
    assert (run.evaluation.clip_model is not None) == base.on_hub
    assert run.training.gradient_checkpointing == (base.resolution == 1024)
    with pytest.raises(
        ConfigError, match=f"--compare: lora and {set(COMPARISONS).difference(names).pop()} are the same run"
    ):
        new_study(pictures, base.name, list(COMPARISONS), tmp_path / "other.yaml")


def test_a_base_is_looked_at_before_it_is_loaded(tmp_path: Path, monkeypatch) -> None:
    from t2ilib.models.files.locate import SHIPPED

    assert new.look_at_base("tiny-sd15") == ("tiny-sd15", 64, False)
    (tmp_path / "base").symlink_to(SHIPPED["tiny-sdxl"])
    monkeypatch.chdir(tmp_path)
    assert new.look_at_base("base") == (str(tmp_path / "base"), 64, False)
    for name, side in (("owner/some-xl-model", 1024), ("owner/another", 512)):
        assert new.look_at_base(name) == (name, side, True), "the Hub cannot be asked in tests"
    with pytest.raises(ConfigError, match=r"--base .*'sdxl' does not exist; choose from tiny-sdxl"):
        new.look_at_base("sdxl")
    assert SETTINGS[-1].side >= 2048


def test_what_cannot_be_written_is_told_and_nothing_is(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.yaml"
    for compare, message in (
        (["lora", "dorra"], r"--compare: 'dorra' does not exist; choose from lora, dora, .*Did you mean 'dora'"),
        (["lora", "lora"], "each thing once"),
        ([], "name something"),
    ):
        with pytest.raises(ConfigError, match=message):
            new_study(pictures, "tiny-sdxl", compare, out)
    (pictures / "another.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"another.png: no row of metadata.jsonl names it"):
        new_study(pictures, "tiny-sdxl", ["lora"], out)
    assert not list(tmp_path.glob("*own*"))
    (pictures / "another.png").unlink()
    new_study(pictures, "tiny-sdxl", ["lora"], out)
    with pytest.raises(ConfigError, match=r"own.yaml exists already"):
        new_study(pictures, "tiny-sdxl", ["lora"], out)


def test_odd_names_and_captions_come_through(pictures: Path, tmp_path: Path) -> None:
    odd = ['it\'s: "quoted" # no comment', "- a\nb\tc", "{x}: [y] & *z", "üñî 猫 \u2028\x85 \x07", "no", "3", "x" * 300]
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"text": odd[number % len(odd)]} for number, row in enumerate(rows)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = pictures.rename(tmp_path / "Süße: #2 'x'")
    _, study = new_study(folder, "tiny-sdxl", ["lora"], tmp_path / "own.yaml")
    assert study.name == "susse-2-x"
    assert study.run["data"]["path"] == str(folder)
    assert study.run["evaluation"]["prompts"] == [" ".join(caption.split()) for caption in odd]
    for value in (*odd, 1e-4, True, 3):
        assert yaml.safe_load(f"x: {scalar(value)}") == {"x": value}


def test_the_share_holds_out_eight_or_of_few_a_quarter(pictures: Path) -> None:
    from t2ilib.config import DataConfig
    from t2ilib.data.sources import folder

    records = list(folder.read_folder(pictures, DataConfig()))
    assert choose_share(records[:1]) == (0.0, [])
    for count in (2, 5, 12):
        share, held_out = choose_share(records[:count])
        assert held_out == folder.hold_out(records[:count], share)[1]
        assert 1 <= len(held_out) <= count // 2
    many = [folder.Record(Path(f"{number}.png"), "x") for number in range(200)]
    share, held_out = choose_share(many)
    assert share == 0.125
    assert len(held_out) >= 8
