"""Adapters on bases of other layers: a teacher's on its student, a student's on its own, and what is left out only where it is asked for."""

import json
import logging

import pytest
import torch
from adapting import build_parts, copy_parts, output_of
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.export import save_adapter
from t2ilib.adapters.formats import write_kohya
from t2ilib.adapters.load import FILE_NAME, load_adapter
from t2ilib.adapters.placing import STUDENT, about_student
from t2ilib.adapters.weights import read_layers
from t2ilib.cli import app
from t2ilib.config import AdapterSpec, ConfigError, ModelConfig
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import save_pipeline
from t2ilib.models.students import build_student, fresh_layers, origins
from t2ilib.runfile import build_run
from t2ilib.training.loop import train
from t2ilib.training.state import load_checkpoint_adapter

BASE, TINY = ("second_layers",), ("second_layers", "mid_block", "innermost_stage")
FIELDS = {
    "sd15": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": 2,
    },
}


def deep_parts(family: str):
    """A model of three stages of two pairs, as the real ones have them."""
    components = build_parts(family)
    fields = dict(components.unet.config) | FIELDS[family] | {"layers_per_block": 2}
    torch.manual_seed(0)
    known = {name: value for name, value in fields.items() if not name.startswith("_")}
    components.unet = UNet2DConditionModel(**known).requires_grad_(False).eval()
    return components


def student_of(components, leave_out):
    student = copy_parts(components)
    student.unet = build_student(components.unet, leave_out).requires_grad_(False)
    return student


def adapted(components, **spec):
    """An adapter whose every layer acts, no two alike, and the layers by name."""
    attach_adapters(components, AdapterSpec(rank=2, alpha=3.0, targets="many", **spec), 0)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in components.unet.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return by_module(components)


def by_module(components):
    return {layer.module: layer for layer in read_layers(components) if layer.component == "unet"}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("family", "kind", "leave_out"), [("sd15", "lora", TINY), ("sdxl", "dora", TINY), ("sdxl", "lora", BASE)]
)
def test_a_teachers_adapter_lands_on_the_layers_that_came_from_the_adapted_ones(
    tmp_path, caplog, layout, family, kind, leave_out
):
    teacher = deep_parts(family)
    student = student_of(teacher, leave_out)
    there = set(origins(student.unet).values())
    theirs = adapted(teacher, kind=kind, ranks={"to_q": 4})
    file = tmp_path / FILE_NAME
    save_adapter(teacher, tmp_path) if layout == "diffusers" else write_kohya(read_layers(teacher), teacher, file, {})
    missing = [module for module in theirs if module not in there]
    assert missing
    with pytest.raises(
        ConfigError, match=rf"{len(missing)} of the {len(theirs)} layers .* are not in test: .*\(--partial\)"
    ):
        load_adapter(copy_parts(student), file)
    before = output_of(student)
    load_adapter(student, file, partial=True)
    assert f"{len(missing)} of the {len(theirs)} layers" in caplog.text
    found = by_module(student)
    expected = {own: theirs[other] for own, other in origins(student.unet).items() if other in theirs}
    assert found.keys() == expected.keys()
    for module, layer in found.items():
        other = expected[module]
        assert (layer.rank, layer.alpha) == (other.rank, other.alpha)
        assert torch.equal(layer.up, other.up)
        assert torch.equal(layer.down, other.down)
        assert (layer.magnitude is None) == (kind == "lora")
        assert layer.magnitude is None or torch.allclose(layer.magnitude, other.magnitude)
    assert not torch.allclose(output_of(student), before, atol=1e-4)


def test_nothing_lands_on_layers_that_began_fresh(tmp_path):
    teacher = deep_parts("sdxl")
    student = student_of(teacher, ("innermost_stage",))
    fresh = set(fresh_layers(student.unet))
    theirs = adapted(teacher)
    assert fresh & theirs.keys(), "layers of the same name"
    save_adapter(teacher, tmp_path)
    load_adapter(student, tmp_path, partial=True)
    assert not fresh & by_module(student).keys()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_adapter_of_a_student_is_the_students_alone(tmp_path, layout):
    teacher = deep_parts("sd15")
    student = student_of(teacher, TINY)
    own, saying = copy_parts(student), about_student(student.unet)
    theirs = adapted(own)
    file = tmp_path / FILE_NAME
    save_adapter(own, tmp_path, metadata=saying) if layout == "diffusers" else write_kohya(
        read_layers(own), own, file, saying
    )
    load_adapter(student, file)
    assert by_module(student).keys() == theirs.keys()
    assert torch.allclose(output_of(student), output_of(own), atol=1e-5)
    for other in (teacher, student_of(teacher, BASE)):
        with pytest.raises(ConfigError, match="trained on a student without second_layers, mid_block, innermost_stage"):
            load_adapter(other, file, partial=True)
    assert json.loads(saying[STUDENT])["leave_out"] == list(TINY)
    assert about_student(teacher.unet) == {}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_of_any_base_layers_are_left_out_only_where_it_is_asked_for(tmp_path, layout, caplog):
    """A UNet that never had a middle block and knows of no teacher."""
    whole = build_parts("sd15")
    lacking = copy_parts(whole)
    fields = {name: value for name, value in whole.unet.config.items() if not name.startswith("_")}
    lacking.unet = UNet2DConditionModel(**fields | {"mid_block_type": None}).requires_grad_(False)
    theirs = adapted(whole, text_encoder_targets="attention")
    file = tmp_path / FILE_NAME
    save_adapter(whole, tmp_path) if layout == "diffusers" else write_kohya(read_layers(whole), whole, file, {})
    with pytest.raises(ConfigError, match="mid_block"):
        load_adapter(copy_parts(lacking), file)
    with caplog.at_level(logging.WARNING):
        load_adapter(lacking, file, partial=True)
    assert "are left out" in caplog.text
    assert "mid_block" in caplog.text
    assert by_module(lacking).keys() == {module for module in theirs if not module.startswith("mid_block")}
    text = [[layer.module for layer in read_layers(parts) if layer.component != "unet"] for parts in (whole, lacking)]
    assert text[0] == text[1] != []


def test_an_adapter_of_which_nothing_fits_is_refused_all_the_same(tmp_path):
    teacher = deep_parts("sd15")
    student = student_of(teacher, TINY)
    adapted(teacher)
    save_adapter(teacher, tmp_path)
    gone = [key for key in load_file(tmp_path / FILE_NAME) if key.startswith("unet.mid_block")]
    tensors = load_file(tmp_path / FILE_NAME)
    save_file({key: tensors[key] for key in gone}, tmp_path / "mid.safetensors")
    with pytest.raises(ConfigError, match=r"trained on another base$"):
        load_adapter(student, tmp_path / "mid.safetensors", partial=True)


def test_a_checkpoint_goes_with_its_own_base_alone(tmp_path):
    run = build_run(
        {
            "output": str(tmp_path / "run"),
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 2, "targets": "many"},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "num_pictures": 4},
            "training": {"steps": 1, "batch_size": 2},
            "evaluation": {"validation_timesteps": 1, "num_inference_steps": 1, "prompts": ["a heart"]},
        }
    )
    train(run)
    base = load_base(run.model)
    student = student_of(base, ("mid_block",))
    with pytest.raises(ConfigError, match="a checkpoint of it goes with that base alone"):
        load_checkpoint_adapter(student, run.output, 1)
    load_checkpoint_adapter(base, run.output, 1)
    load_adapter(student_of(load_base(run.model), ("mid_block",)), run.output, partial=True)


def test_generate_leaves_out_by_partial(tmp_path):
    teacher = build_parts("sd15")
    student = student_of(teacher, ("mid_block",))
    save_pipeline(student, tmp_path / "model")
    adapted(teacher)
    save_adapter(teacher, tmp_path / "adapter")
    command = ["generate", "--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--steps", "1"]
    command += ["--prompt", "a heart", "--out", str(tmp_path / "drawn")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0
    assert "--partial" in " ".join((refused.output + str(refused.stderr)).split())
    drawn = CliRunner().invoke(app, [*command, "--partial"])
    assert drawn.exit_code == 0, drawn.output
    like = ["generate", "--like", str(tmp_path / "drawn" / "00.png"), "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(app, like).exit_code == 0, "its file says so too"
    assert (tmp_path / "again" / "00.png").is_file()


def test_a_run_that_trains_nothing_is_drawn_with_a_teachers_adapter_on_its_student(tmp_path):
    teacher = load_base(ModelConfig(base="tiny-sd15"))
    student = student_of(teacher, ("mid_block",))
    save_pipeline(student, tmp_path / "model")
    adapted(teacher)
    save_adapter(teacher, tmp_path / "adapter")

    def trained(**adapter):
        values = {
            "output": str(tmp_path / "run"),
            "model": {"base": str(tmp_path / "model")},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["base"], "num_pictures": 4},
            "training": {"trains": "nothing", "steps": 0},
            "evaluation": {"prompts": ["a red heart"], "num_inference_steps": 1, "adapters": [{"path": str(tmp_path / "adapter"), **adapter}]},
        }  # fmt: skip
        return train(build_run(values)).components

    with pytest.raises(ConfigError, match="partial"):
        trained()
    plain, drawn = output_of(student), output_of(trained(partial=True))
    load_adapter(student, tmp_path / "adapter", partial=True)
    assert torch.equal(drawn, output_of(student))
    assert not torch.allclose(drawn, plain, atol=1e-3)
