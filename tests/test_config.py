import subprocess
import sys
from typing import get_args

import pytest

from t2ilib.config import (
    AdapterSpec,
    ConfigError,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ShapesConfig,
    TrackingConfig,
    TrainingConfig,
    check_choice,
)
from t2ilib.runfile import build_run, load_run, load_yaml, merge, parse_value, save_run

ADAPTER = {"adapter": {}}


def test_yaml_round_trip_keeps_every_value(tmp_path):
    run = build_run(
        {
            "name": "trip", "seed": 7, "output": "somewhere/else",
            "model": {"base": "owner/model", "dtype": "bfloat16", "quantization": "nf4"},
            "adapter": {"kind": "dora", "rank": 3, "alpha": 1.5, "targets": ["to_q", "to_k"], "text_encoder_targets": "many"},
            "data": {"source": "shapes"}, "shapes": {"scenes": ["heart", "base"]},
            "objective": {"snr_gamma": None},
            "optimizer": {"learning_rate": 1e-5, "betas": [0.0, 0.95]},
            "evaluation": {"prompts": ["a red: 'circle'", "yes", "3e-4"]},
            "tracking": {"tags": {"why": "no"}},
        }
    )  # fmt: skip
    save_run(run, tmp_path / "new" / "run.yaml")
    assert load_run(tmp_path / "new" / "run.yaml") == run
    assert run.adapter.targets == ("to_q", "to_k")
    save_run(load_run(tmp_path / "new" / "run.yaml"), tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "new" / "run.yaml").read_text()


def test_overrides_reach_nested_sections_and_missing_ones(tmp_path):
    (tmp_path / "run.yaml").write_text("adapter: {rank: 4}\noptimizer: {learning_rate: 1e-2}\n")
    assert load_run(tmp_path / "run.yaml").optimizer.learning_rate == 0.01  # YAML 1.1 reads 1e-2 as text
    overrides = [
        "optimizer.learning_rate=3e-4", "adapter.rank=16", "training.steps=12", "name=other", "adapter.targets=[to_q, to_v]",
        "objective.snr_gamma=null", "training.gradient_checkpointing=true", "seed=0",
    ]  # fmt: skip
    run = load_run(tmp_path / "run.yaml", overrides)
    assert run.optimizer.learning_rate == 3e-4
    assert (run.adapter.rank, run.adapter.targets) == (16, ("to_q", "to_v"))
    assert (run.training.steps, run.training.gradient_checkpointing) == (12, True)
    assert (run.name, run.seed, run.objective.snr_gamma) == ("other", 0, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E3", 1000.0), ("-2e1", -20.0), ("2e", "2e"), ("eager", "eager"), ("10", 10), ("", None)],
)
def test_values_of_overrides(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("override", "named"), [("optimizer", "write section"), ("=3", "write section"), ("name.x=1", "name is a value")]
)
def test_malformed_overrides(tmp_path, override, named):
    (tmp_path / "run.yaml").write_text("name: run\nadapter: {}\n")
    with pytest.raises(ConfigError, match=named):
        load_run(tmp_path / "run.yaml", [override])


def test_override_that_is_broken_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("adapter: {}\n")
    with pytest.raises(ConfigError, match=r"adapter.targets"):
        load_run(tmp_path / "run.yaml", ["adapter.targets=[to_q"])


@pytest.mark.parametrize(
    ("values", "field", "near"),
    [
        ({"optimiser": {}} | ADAPTER, "optimiser", "optimizer"),
        ({"optimizer": {"learning_rat": 1}} | ADAPTER, "optimizer.learning_rat", "learning_rate"),
        ({"adapter": {"rnak": 8}}, "adapter.rnak", "rank"),
    ],
)
def test_typo_names_the_field_and_the_near_one(values, field, near):
    with pytest.raises(ConfigError) as error:
        build_run(values)
    assert f"{field}: no such field" in str(error.value)
    assert f"Did you mean '{near}'?" in str(error.value)


def test_several_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as error:
        build_run(
            {
                "seed": -1, "adapter": {"rank": 0, "kind": "dorra"}, "training": {"batch_size": 5, "accumulation": 2},
                "optimizer": {"learning_rate": float("nan")}, "data": {"resolution": 60, "nonsense": 1},
            }
        )  # fmt: skip
    text = str(error.value)
    assert text.startswith("7 mistakes in the run config")
    fields = (
        "seed",
        "adapter.rank",
        "adapter.kind",
        "training",
        "optimizer.learning_rate",
        "data.resolution",
        "data.nonsense",
    )
    assert all(f"\n  {field}:" in text for field in fields)
    assert "'dorra'" in text
    assert "'lora'" in text


def test_prodigy_with_a_second_learning_rate_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="one step size for all parameters"):
        build_run({"adapter": {}, "optimizer": {"name": "prodigy", "text_encoder_learning_rate": 1e-4}})
    assert build_run({"adapter": {}, "optimizer": {"name": "prodigy", "learning_rate": 1}}).optimizer.name == "prodigy"
    assert OptimizerConfig(name="adamw", text_encoder_learning_rate=1e-4).text_encoder_learning_rate == 1e-4


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "this run has no adapter section: add one, or set training.trains"),
        ({"adapter": {}, "training": {"trains": "unet"}}, "trains unet, so its adapter section must be null"),
        ({"adapter": {}, "training": {"trains": "nothing", "steps": 0}}, "trains nothing, so its adapter section must be null"),
        ({"training": {"trains": "nothing"}}, "steps must be 0"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"captioned": ["color"]}}, "name the shape, and each attribute once"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"captioned": ["shape", "form"]}}, "'form' does not exist"),
        ({"data": {"source": "shapes"}, "shapes": {"captioned": ["shape"], "trains": "clip"}}, "learns from captions that say all"),
        ({"training": {"trains": "unet"}, "model": {"quantization": "nf4"}}, "quantized base cannot be trained"),
        ({"adapter": {}, "training": {"batch_size": 6, "accumulation": 4}}, "6 is not a multiple of accumulation 4"),
        ({"adapter": {}, "training": {"batch_size": 0}}, "batch_size"),
        ({"adapter": {}, "shapes": {}}, "data.source is folder: set shapes to null"),
        ({"adapter": {}, "data": {"source": "shapes", "path": "x"}}, "data.path is about pictures that are there"),
        ({"data": {"source": "shapes"}, "shapes": {"trains": "vae"}, "training": {"trains": "unet"}}, "leave one of them out"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"trains": "clip"}}, "trains clip, so its adapter section"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"crop": 32}}, "crop is about training the VAE"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"scenes": []}}, "at least one"),
        ({"adapter": {}, "training": {"trains": "adapter"}, "scratch": {}}, "this run trains adapter: set scratch to null"),
        ({"scratch": {}, "adapter": {}}, "adapter section must be null"),
        ({"scratch": {}, "prior": {"prompts": ["a dog"]}}, "begins with fresh weights"),
        ({"scratch": {}, "model": {"quantization": "nf4"}}, "quantized base cannot be trained"),
        ({"scratch": {}, "objective": {"name": "epsilon", "zero_terminal_snr": True}}, "says nothing about the picture"),
        ({"scratch": {}, "objective": {"huber_delta": 0.2}}, "huber_delta is about loss huber"),
        ({"scratch": {}, "objective": {"timestep_std": 2.0}}, "about timesteps logit_normal"),
        ({"scratch": {}, "objective": {"timestep_range": [0.5, 0.5]}}, "is empty"),
        ({"scratch": {}, "data": {"stages": {"32": 400}}, "training": {"steps": 400}}, "none is left for data.resolution"),
        ({"scratch": {}, "data": {"stages": {"64": 10, "32": 10}}}, "must rise to resolution 64"),
        ({"scratch": {}, "data": {"stages": {"32": 10}, "source": "webdataset", "streaming": True}}, "read twice"),
        ({"adapter": {}, "optimizer": {"token_learning_rate": 1e-3}}, "about adapter.tokens, and there are none"),
        ({"adapter": {"token_vectors": 2}}, "about tokens, and there are none"),
        ({"adapter": {"start": "a", "init": "pissa"}}, "would be lost"),
        ({"adapter": {"tokens": {"<c>": "cat"}}, "optimizer": {"name": "prodigy", "token_learning_rate": 1.0}}, "one step size"),
        ({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"scenes": ["base", "base"]}}, "name each kind once"),
        ({"adapter": {}, "evaluation": {"sample_every": 50, "sample_every_epochs": 1}}, "both say when to draw"),
        ({"adapter": {}, "evaluation": {"strip_steps": [1, 21]}}, "sampling step 21, and num_inference_steps is 20"),
        ({"adapter": {}, "data": {"part": "tuning", "source": "webdataset", "streaming": True}}, "leave streaming out"),
        ({"adapter": {}, "evaluation": {"sample_every_epochs": 1}, "data": {"source": "webdataset", "streaming": True}}, "not known before its end"),
    ],
)  # fmt: skip
def test_sections_that_contradict_each_other(values, reason):
    with pytest.raises(ConfigError, match=reason):
        build_run(values)


@pytest.mark.parametrize(
    "values",
    [
        {"adapter": {}, "training": {"batch_size": 6, "accumulation": 3}},
        {"training": {"trains": "unet", "ema_horizon": 10}},
        {"adapter": {}, "training": {"ema_horizon": 10}},
        {"training": {"trains": "nothing", "steps": 0}, "model": {"quantization": "nf4"}},
        {"adapter": {}, "model": {"quantization": "nf4"}},
        {"adapter": {}, "evaluation": {"sample_every": 0, "sample_every_epochs": 2, "strip_steps": [1, 20]}},
    ],
)
def test_sections_that_agree(values):
    build_run(values)


def test_a_run_is_frozen():
    run = build_run(ADAPTER)
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        run.adapter.rank = 3


def test_flat_has_the_same_keys_for_every_run():
    with_adapter, without = build_run(ADAPTER).flat(), build_run({"training": {"trains": "unet"}}).flat()
    assert list(with_adapter) == list(without)
    assert with_adapter["adapter.rank"] == 8
    assert without["adapter.rank"] is None
    assert with_adapter["optimizer.learning_rate"] == 1e-3
    assert with_adapter["seed"] == 0
    assert {f"adapter.{field}" for field in AdapterSpec.model_fields} <= set(with_adapter)
    assert {name for name, value in with_adapter.items() if isinstance(value, dict)} == {
        "adapter.ranks",
        "adapter.alphas",
        "adapter.tokens",
        "data.repeats",
        "data.stages",
        "data.weights",
    }


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("optimizer.learning_rate=2e-3", True), ("seed=1", True), ("adapter.rank=4", True), ("model.quantization=nf4", True),
        ("training.steps=7", False), ("optimizer.schedule=cosine", True), ("data={source: shapes}", True),
        ("output=elsewhere", False), ("name=other", False), ("evaluation.sample_every=3", False),
        ("evaluation.prompts=[a cat]", False), ("training.checkpoint_every=3", False), ("training.keep_checkpoints=3", False),
        ("tracking.experiment=x", False),
    ],
)  # fmt: skip
def test_training_digest_follows_what_decides_the_weights(tmp_path, override, changes):
    (tmp_path / "run.yaml").write_text("adapter: {}\n")
    before, after = load_run(tmp_path / "run.yaml"), load_run(tmp_path / "run.yaml", [override])
    assert before != after
    assert (before.training_digest() != after.training_digest()) is changes


@pytest.mark.parametrize(
    ("text", "named"), [("a: [1", "not valid YAML"), ("- 1\n", "not list"), (None, "does not exist")]
)
def test_unusable_files(tmp_path, text, named):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_yaml(tmp_path / "run.yaml")


def test_check_choice_names_the_right_ones():
    assert check_choice("b", ("a", "b"), "letter") == "b"
    with pytest.raises(
        ConfigError, match=r"letter 'alpah' does not exist; choose from alpha, beta\. Did you mean 'alpha'"
    ):
        check_choice("alpah", ("alpha", "beta"), "letter")
    with pytest.raises(ConfigError) as error:
        check_choice("zzz", ("alpha", "beta"), "letter")
    assert "Did you mean" not in str(error.value)


def test_configs_cost_no_torch():
    program = (
        "import sys, t2ilib, t2ilib.config; t2ilib.RunConfig; dir(t2ilib)\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'peft', 'mlflow', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


def test_defaults_of_sections_are_valid_and_not_shared():
    first, second = RunConfig(adapter=AdapterSpec()), RunConfig(adapter=AdapterSpec())
    first.tracking.tags["x"] = "y"
    assert second.tracking.tags == {}


def test_no_needs_no_quotes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("adapter: {}\ntraining: {mixed_precision: no}\n")
    assert load_run(path).training.mixed_precision == "no"
    assert load_run(path, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_the_drawn_world_brings_its_section_along():
    assert build_run({"adapter": {}, "data": {"source": "shapes"}}).shapes == ShapesConfig()
    assert build_run({"adapter": {}}).shapes is None
    drawn = build_run({"data": {"source": "shapes"}, "shapes": {"trains": "vae"}})
    assert (drawn.trains, build_run({"adapter": {}}).trains) == ("vae", "adapter")


def test_a_field_of_another_section_is_told_where_it_lives():
    with pytest.raises(ConfigError, match=r"data.num_pictures: no such field. It is a field of shapes."):
        build_run({"adapter": {}, "data": {"num_pictures": 3}})


def test_merged_parts_lie_over_one_another_field_by_field():
    parts = ({"a": {"x": 1, "d": {"k": 1}}, "b": {"y": 1}}, {"a": {"d": {"m": 2}}, "b": None}, {"c": 3})
    assert merge(*parts) == {"a": {"x": 1, "d": {"m": 2}}, "b": None, "c": 3}
    assert parts[0]["a"]["d"] == {"k": 1}, "a part was changed"
    assert merge({"b": None}, {"b": {"y": 2}}) == {"b": {"y": 2}}


def test_names_in_the_config_are_those_of_the_dictionaries():
    from t2ilib.adapters.dropout import DROPOUTS
    from t2ilib.config import data as config_data
    from t2ilib.data.manifest import SOURCES
    from t2ilib.evaluation.measures import MEASURES
    from t2ilib.evaluation.metrics import BUILT_IN
    from t2ilib.models.noise import BETAS
    from t2ilib.models.quantize import METHODS
    from t2ilib.tracking.beside import BESIDE
    from t2ilib.training.loop import SETUPS
    from t2ilib.training.objectives import LOSSES, OBJECTIVES, TIMESTEPS
    from t2ilib.training.optim import OPTIMIZERS

    def named(section, field):
        annotation = section.model_fields[field].annotation
        inner = [kind for kind in get_args(annotation) if get_args(kind)] or [annotation]
        return set(get_args(inner[0]))

    assert set(config_data.SOURCES) == {*SOURCES, "shapes"}
    assert named(OptimizerConfig, "name") == set(OPTIMIZERS)
    assert named(ObjectiveConfig, "name") == {"auto", *OBJECTIVES}
    assert named(ObjectiveConfig, "beta_schedule") == {"auto", *BETAS}
    assert named(ObjectiveConfig, "loss") == set(LOSSES)
    assert named(ObjectiveConfig, "timesteps") == set(TIMESTEPS)
    assert named(ModelConfig, "quantization") == {"none", *METHODS}
    assert named(AdapterSpec, "dropout_kind") == {"input", *DROPOUTS}
    assert named(TrainingConfig, "trains") | named(ShapesConfig, "trains") == set(SETUPS)
    assert named(TrackingConfig, "beside") == set(BESIDE)
    assert set(BUILT_IN) == set(MEASURES)


def test_steps_are_part_of_a_run_whose_schedule_is_laid_out_over_them():
    def digest(schedule, steps):
        return build_run(
            {"adapter": {}, "optimizer": {"schedule": schedule}, "training": {"steps": steps}}
        ).training_digest()

    assert digest("constant", 5) == digest("constant", 7)
    assert digest("cosine", 5) != digest("cosine", 7)


def test_a_run_without_a_name_has_that_of_its_folder(tmp_path):
    assert build_run({"adapter": {}, "output": "results/my cat"}).name == "my cat"
    assert build_run({"adapter": {}, "output": "results/my cat", "name": "other"}).name == "other"
    assert build_run({"adapter": {}}).name == "run"


def test_the_users_own_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = build_run({"adapter": {}, "output": "~/out", "data": {"path": "~/pics", "validation_path": "~/held"}})
    assert (run.output, run.data.path, run.data.validation_path) == (
        tmp_path / "out",
        str(tmp_path / "pics"),
        str(tmp_path / "held"),
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output=out/cat #2", "out/cat #2"),
        ("output='quoted #3'", "quoted #3"),
        ("output=a?b#c", "a?b#c"),
    ],
)
def test_an_override_is_taken_as_it_stands(tmp_path, override, value):
    (tmp_path / "run.yaml").write_text("adapter: {}\n")
    run = load_run(tmp_path / "run.yaml", [override])
    assert str(getattr(run, override.split("=")[0])) == value


def test_prodigys_rate_is_one_unless_it_is_given():
    prodigy = {"adapter": {}, "optimizer": {"name": "prodigy"}}
    assert build_run(prodigy).optimizer.learning_rate == 1.0
    assert build_run({"adapter": {}}).optimizer.learning_rate == 1e-3
    assert (
        build_run({"adapter": {}, "optimizer": {"name": "prodigy", "learning_rate": 0.5}}).optimizer.learning_rate
        == 0.5
    )


@pytest.mark.parametrize(("text", "seconds"), [("11h30m", 41400), ("90m", 5400), ("45s", 45), ("1h1m1s", 3661)])
def test_a_length_of_time_says_of_what(text: str, seconds: int) -> None:
    from t2ilib.config.section import seconds_in

    run = build_run({"adapter": {}, "training": {"time_budget": text}})
    assert seconds_in(run.training.time_budget) == seconds
    assert build_run(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("value", [90, "90", "", "0m", "1.5h", "30m11h", "ten minutes"])
def test_a_length_of_time_that_does_not_is_refused(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"training.time_budget: .* is no length of time: write it as 11h30m, 45m or 90s"
    ):
        build_run({"adapter": {}, "training": {"time_budget": value}})


def test_when_a_run_stops_decides_none_of_its_steps() -> None:
    plain = build_run({"adapter": {}})
    stops = {"time_budget": "1h", "least_free_disk_mib": 9, "least_free_memory_mib": 0}
    assert build_run({"adapter": {}, "training": stops}).training_digest() == plain.training_digest()
    assert (
        build_run({"adapter": {}, "training": {"steps": 9, "batch_size": 3}}).training_digest()
        != plain.training_digest()
    )
