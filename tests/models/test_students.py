"""Students against their teachers: which weights come from where, and that diffusers alone takes what is made."""

import logging

import pytest
import torch
from adapting import build_parts, output_of
from diffusers import UNet2DConditionModel

from t2ilib.config import ConfigError, StudentConfig
from t2ilib.models.files.layouts import build_layout
from t2ilib.models.students import RECORD, answering_stages, build_student, first_teacher, fresh_layers, origins
from t2ilib.runfile import build_run

BASE, SMALL, TINY = (
    ("second_layers",),
    ("second_layers", "mid_block"),
    ("second_layers", "mid_block", "innermost_stage"),
)
THREE_STAGES = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": (1, 2, 3),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 6,
    "sample_size": 8,
}


def small_unet(seed: int = 0, **fields) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**THREE_STAGES | fields).eval()


@torch.no_grad()
def said(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    return unet(noisy, torch.tensor([10, 500]), encoder_hidden_states=text).sample


@pytest.mark.parametrize(
    ("leave_out", "count"),
    [(BASE, 579_384_964), (SMALL, 482_346_884), (TINY, 323_384_964)],
    ids=["base", "small", "tiny"],
)
def test_students_of_sd15_are_those_that_were_published(leave_out, count):
    """And all their weights come from SD1.5, whose stages are shaped alike: as many as in the paper's models, table 1 there."""
    teacher = build_layout("sd15").unet
    student = build_student(teacher, leave_out)
    assert sum(p.numel() for p in student.parameters()) == count
    assert fresh_layers(student) == []
    layers, theirs = origins(student), teacher.state_dict()
    assert layers.keys() == {name.rpartition(".")[0] for name in student.state_dict()}
    moved = {name: f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in student.state_dict()}
    assert all(theirs[moved[name]].shape == x.shape for name, x in student.state_dict().items())
    assert len(set(moved.values())) == len(moved), "no layer twice"


@pytest.mark.parametrize(
    ("leave_out", "fresh"),
    [
        (SMALL, set()),
        (TINY, {f"up_blocks.0.resnets.0.{name}" for name in ("norm1", "conv1", "conv_shortcut")}),
        (("innermost_stage",), {f"up_blocks.0.resnets.0.{name}" for name in ("norm1", "conv1", "conv_shortcut")} | {"mid_block"}),
    ],
)  # fmt: skip
def test_in_sdxl_the_layers_that_see_another_width_begin_fresh(leave_out, fresh):
    teacher = build_layout("sdxl").unet
    student = build_student(teacher, leave_out)
    found = set(fresh_layers(student))
    assert {name if not name.startswith("mid_block") else "mid_block" for name in found} == fresh
    layers, theirs = origins(student), teacher.state_dict()
    for name, x in student.state_dict().items():
        layer, _, kind = name.rpartition(".")
        assert (layer in found) != (layer in layers)
        assert layer in found or theirs[f"{layers[layer]}.{kind}"].shape == x.shape


def test_layers_come_from_where_their_skip_connections_do():
    """Written out by hand for three stages of 1, 2 and 3 pairs: decoder layers that follow the second keep the skip connection that they had."""
    teacher = small_unet()
    student = build_student(teacher, BASE)
    assert list(student.config.layers_per_block) == [1, 1, 2]
    whole = {"down_blocks.0": "down_blocks.0", "mid_block": "mid_block", "up_blocks.2": "up_blocks.2"}
    pairs = {
        ("down_blocks.1", 0): 0, ("down_blocks.2", 0): 0, ("down_blocks.2", 1): 1,
        ("up_blocks.0", 0): 0, ("up_blocks.0", 1): 2, ("up_blocks.0", 2): 3,
        ("up_blocks.1", 0): 0, ("up_blocks.1", 1): 2,
    }  # fmt: skip
    expected = {f"{own}.": f"{other}." for own, other in whole.items()}
    for kind in ("resnets", "attentions"):
        expected |= {f"{stage}.{kind}.{own}.": f"{stage}.{kind}.{other}." for (stage, own), other in pairs.items()}
    theirs = teacher.state_dict()
    for name, x in student.state_dict().items():
        prefix = next((own for own in expected if name.startswith(own)), "")
        assert torch.equal(x, theirs[expected.get(prefix, "") + name.removeprefix(prefix)]), name
    assert said(student).shape == said(teacher).shape
    assert not torch.equal(said(student), said(teacher))


def test_without_the_innermost_stage_the_decoder_moves_up_and_the_middle_blocks_answer_no_more():
    teacher = small_unet(block_out_channels=(8, 16, 16))
    student = build_student(teacher, ("innermost_stage",))
    theirs = teacher.state_dict()
    for name, x in student.state_dict().items():
        half, _, rest = name.partition(".")
        there = f"{half}.{int(rest[0]) + 1}{rest[1:]}" if half == "up_blocks" else name
        assert torch.equal(x, theirs[there]), name
    decoder = [("up_blocks.0", "up_blocks.1"), ("up_blocks.1", "up_blocks.2")]
    assert answering_stages(student) == [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(2)] + decoder
    assert ("mid_block", "mid_block") in answering_stages(build_student(teacher, BASE))
    assert said(student).shape == said(teacher).shape


def test_fresh_layers_follow_from_the_seed_and_the_teacher_is_nowhere_shared():
    teacher = small_unet()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    torch.manual_seed(5)
    students = [build_student(teacher, TINY, seed) for seed in (0, 0, 1)]
    drawn = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == drawn, "no random number of the process is taken"
    first, again, other = (student.state_dict() for student in students)
    fresh = fresh_layers(students[0])
    assert fresh
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert {name for name, x in first.items() if not torch.equal(x, other[name])} == {
        f"{layer}.{kind}" for layer in fresh for kind in ("weight", "bias") if "norm" not in layer
    }
    with torch.no_grad():
        for parameter in students[0].parameters():
            parameter.fill_(1.0)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_diffusers_alone_loads_a_student_and_says_nothing(tmp_path, caplog):
    student = build_student(small_unet(), TINY)
    student.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        loaded = UNet2DConditionModel.from_pretrained(tmp_path)
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
    assert torch.equal(said(loaded), said(student))
    assert origins(loaded) == origins(student) != {}
    assert {name: x.shape for name, x in first_teacher(loaded).state_dict().items()} == {
        name: x.shape for name, x in small_unet().state_dict().items()
    }


def test_a_students_student_knows_its_first_teacher():
    teacher = small_unet(block_out_channels=(16, 16, 16))
    once = build_student(teacher, BASE)
    twice = build_student(build_student(once, ("innermost_stage",)), ("mid_block",))
    assert twice.config[RECORD]["leave_out"] == ["mid_block"]
    assert origins(twice)["up_blocks.0.resnets.1.conv1"] == "up_blocks.1.resnets.2.conv1"
    layers, theirs = origins(twice), teacher.state_dict()
    for name, x in twice.state_dict().items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(x, theirs[f"{layers[layer]}.{kind}"]), name
    at_once = build_student(teacher, TINY)
    assert torch.equal(said(at_once), said(twice))
    assert origins(at_once) == origins(twice)


def test_stages_whose_transformers_differ_within_them_keep_those_of_their_layers():
    """As SSD-1B's config has them, with its decoder's depths apart."""
    depths = {"transformer_layers_per_block": [1, [2, 1], [1, 3, 2]], "mid_block_type": None}
    teacher = small_unet(**depths, reverse_transformer_layers_per_block=[[2, 1, 3, 1], [1, 3, 2], 1])
    student = build_student(teacher, BASE)
    assert fresh_layers(student) == []
    deep = [[len(a.transformer_blocks) for a in block.attentions] for block in student.up_blocks[:2]]
    assert deep == [[2, 3, 1], [1, 2]]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_tiny_models_have_two_parts_to_leave_out(family):
    components = build_parts(family)
    with pytest.raises(
        ConfigError, match=r"one pair of layers alone .* what it has to leave out is mid_block, innermost_stage"
    ):
        build_student(components.unet, BASE)
    before = output_of(components)
    components.unet = build_student(components.unet, ("mid_block", "innermost_stage"))
    assert output_of(components).shape == before.shape
    with pytest.raises(ConfigError, match=r"mid_block: model.base has none; what it has to leave out is nothing"):
        build_student(components.unet, ("mid_block",))
    with pytest.raises(ConfigError, match=r"innermost_stage: model.base has one stage alone"):
        build_student(components.unet, ("innermost_stage",))


def test_stages_of_other_kinds_are_refused():
    with pytest.raises(ConfigError, match="stages of the kind AttnDownBlock2D"):
        build_student(small_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")), SMALL)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"student": {"leave_out": []}}, "student.leave_out"),
        ({"student": {"leave_out": ["mid_block", "mid_block"]}}, "mid_block is named twice"),
        ({"student": {"leave_out": ["middle"]}}, "student.leave_out"),
        ({"student": {"leave_out": ["mid_block"]}, "adapter": {}}, "adapter section must be null"),
        ({"student": {"leave_out": ["mid_block"]}, "adapter": {}, "training": {"trains": "adapter"}}, "train that first"),
        ({"student": {"leave_out": ["mid_block"]}, "scratch": {}}, "leave one out"),
        ({"student": {"leave_out": ["mid_block"]}, "model": {"quantization": "nf4"}}, "quantized base cannot be trained"),
    ],
)  # fmt: skip
def test_runs_that_can_have_no_student_are_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        build_run(values)


def test_a_student_is_a_whole_unet_to_train_and_other_runs_are_known_by_what_they_were():
    run = build_run({"student": {"leave_out": list(TINY)}})
    assert run.trains == "unet"
    assert run.student == StudentConfig(leave_out=TINY)
    assert run.training_digest() != build_run({"training": {"trains": "unet"}}).training_digest()
    assert "student" not in build_run({"adapter": {}}).deciding()
    assert build_run({"adapter": {}}).training_digest() == "e4055f32804c"
    assert "student.leave_out" in build_run({"adapter": {}}).flat()
