"""Students: a UNet without some of its teacher's blocks, which begins with the weights of the others (BK-SDM, arXiv 2305.15798, sec. 3.1).

A student is a plain UNet2DConditionModel, so diffusers alone loads what is saved of it. Under RECORD its config keeps what was left out, and
the fields that its teacher has otherwise: from these follow the names that its layers had in the teacher, which adapters of the teacher
go by. diffusers carries a field whose name begins with an underscore along and asks nothing about it.

Which layer of the student is which of the teacher's is decided by where skip connections come from. Of a stage of n pairs (a residual block,
and attention where there is any) the decoder has n + 1: number 0 takes what leaves the encoder's stage, number k what its pair n - 1 - k
gives, and the last what enters it.

    second_layers    encoder 0 .. n - 2 are the teacher's; its pair n - 1 goes.
                     Decoder 0 is the teacher's 0, which now sees pair n - 2 in place of n - 1, as what leaves the stage; decoder k is the
                     teacher's k + 1, which sees what it saw. The teacher's 1, the middle of SD's three, goes.
    innermost_stage  stages keep their number in the encoder; decoder stage j is the teacher's j + 1. The last stage that is left has no
                     downsampler: its output goes to the decoder as it is.
    mid_block        nothing moves.

A layer whose weights have another shape in the student begins fresh, all of it (`fresh_layers`). In SD1.x there is none. In SDXL, whose
stages differ in width, `innermost_stage` makes three fresh in the first residual block of the decoder (norm1, conv1 and
conv_shortcut, which see the narrower stage), and the whole middle block where that is kept.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from t2ilib.config import ConfigError
from t2ilib.seeds import seed_for

log = logging.getLogger(__name__)

RECORD = "_t2ilib_student"
"""Of a student's config: `leave_out`, and `teacher`, the fields of the teacher's that are others."""
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
"""Kinds of stages whose layers are known here."""
BY_STAGE = (
    *(
        "block_out_channels",
        "down_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
    ),
    *("num_attention_heads", "cross_attention_dim", "only_cross_attention"),
)
"""Fields that may have a value for each stage of the encoder, the deepest last."""
FROM_THE_DEEPEST = ("up_block_types", "reverse_transformer_layers_per_block")
"""Likewise of the decoder, the deepest first."""
LAYER = re.compile(r"(?P<half>down|up)_blocks\.(?P<stage>\d+)\.(?:(?P<kind>resnets|attentions)\.(?P<pair>\d+))?")


def build_student(teacher: nn.Module, leave_out: Sequence[str], seed: int = 0) -> nn.Module:
    """A UNet without the parts `leave_out` (see `StudentConfig`) of `teacher`, in eval mode, in its precision and on its device, which may be
    "meta". Its weights are copies of the teacher's; those of `fresh_layers` are addressed by `seed`.

    Raises ConfigError for parts that the teacher does not have.
    """
    student = unloaded(teacher, student_config(teacher.config, leave_out))
    theirs, fresh = dict(teacher.named_modules()), fresh_layers(student)
    for name, layer in own_layers(student):
        if name in fresh:
            begin_fresh(layer.to(teacher.dtype), name, teacher.device, seed)
            continue
        origin = theirs[teacher_name(name, student.config)]
        copies = {key: tensor.detach().clone() for key, tensor in own_tensors(origin).items()}
        layer.load_state_dict(copies, strict=False, assign=True)
    count = sum(parameter.numel() for parameter in student.parameters())
    of = sum(parameter.numel() for parameter in teacher.parameters())
    log.info("a student without %s: %s of %s parameters", ", ".join(leave_out), f"{count:,}", f"{of:,}")
    if fresh:
        log.warning(
            "%d layers of the student have another shape than the teacher's and begin fresh, such as %s",
            len(fresh),
            fresh[0],
        )
    return student.eval()


def begin_fresh(layer: nn.Module, name: str, device: torch.device, seed: int) -> None:
    """Gives a layer on the meta device weights as torch initialises them."""
    layer.to_empty(device="cpu" if device.type != "meta" else device, recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "student weights", name))
        layer.reset_parameters()
    layer.to(device)


def student_config(config: Mapping[str, Any], leave_out: Iterable[str]) -> dict[str, Any]:
    """The config of the student of a UNet of this config. Raises ConfigError for parts that it does not have."""
    known = plain(config)
    kinds = {kind for kind in (*known["down_block_types"], *known["up_block_types"]) if kind not in BLOCKS}
    if kinds:
        raise ConfigError(
            f"student: model.base has stages of the kind {', '.join(sorted(kinds))}, and what a layer of these answers is not known here:"
            f" known are {', '.join(BLOCKS)}"
        )
    changed = known
    for part in ("second_layers", "mid_block", "innermost_stage"):
        if part in leave_out:
            changed = LEAVING[part](changed)
    teacher = {field: value for field, value in known.items() if changed.get(field) != value}
    if RECORD in config:
        teacher[RECORD] = config[RECORD]
    return changed | {RECORD: {"leave_out": list(leave_out), "teacher": teacher}}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that decide a UNet, with lists as JSON has them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


def without_second_layers(config: dict[str, Any]) -> dict[str, Any]:
    counts = layers_by_stage(config)
    if max(counts) < 2:
        raise ConfigError(
            "student.leave_out second_layers: every stage of model.base has one pair of layers alone (layers_per_block"
            f" {config['layers_per_block']}); what it has to leave out is {', '.join(others(config))}"
        )
    fewer = [max(count - 1, 1) for count in counts]
    # where stages have transformers of different depths within them, those of the pairs that stay
    depths, upwards = config["transformer_layers_per_block"], config.get("reverse_transformer_layers_per_block")
    if isinstance(depths, list):
        depths = [own[:count] if isinstance(own, list) else own for own, count in zip(depths, fewer, strict=True)]
    if upwards is not None:
        pairs = zip(upwards, reversed(counts), strict=True)
        upwards = [[own[0], *own[2:]] if isinstance(own, list) and count > 1 else own for own, count in pairs]
    return config | {
        "layers_per_block": fewer if isinstance(config["layers_per_block"], list) else fewer[0],
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": upwards,
    }


def without_mid_block(config: dict[str, Any]) -> dict[str, Any]:
    if config["mid_block_type"] is None:
        raise ConfigError(
            f"student.leave_out mid_block: model.base has none; what it has to leave out is {', '.join(others(config))}"
        )
    return config | {"mid_block_type": None}


def without_innermost_stage(config: dict[str, Any]) -> dict[str, Any]:
    if len(config["block_out_channels"]) < 2:
        raise ConfigError(
            "student.leave_out innermost_stage: model.base has one stage alone; what it has to leave out is"
            f" {', '.join(others(config))}"
        )
    shorter = {name: config[name][:-1] for name in BY_STAGE if isinstance(config.get(name), list)}
    return (
        config | shorter | {name: config[name][1:] for name in FROM_THE_DEEPEST if isinstance(config.get(name), list)}
    )


LEAVING = {
    "second_layers": without_second_layers,
    "mid_block": without_mid_block,
    "innermost_stage": without_innermost_stage,
}
"""Part -> the config without it, of one that has it."""


def others(config: Mapping[str, Any]) -> list[str]:
    """The parts that a UNet of this config has to leave out."""
    there = {
        "second_layers": max(layers_by_stage(config)) > 1,
        "mid_block": config["mid_block_type"] is not None,
        "innermost_stage": len(config["block_out_channels"]) > 1,
    }
    return [part for part, has in there.items() if has] or ["nothing"]


def layers_by_stage(config: Mapping[str, Any]) -> list[int]:
    """Pairs of layers of each stage of the encoder."""
    count = config["layers_per_block"]
    return list(count) if isinstance(count, list | tuple) else [count] * len(config["block_out_channels"])


def teacher_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a student's teacher had, of the student's."""
    return plain(config) | config[RECORD]["teacher"]


def stages_of(unet: nn.Module) -> int:
    """How many stages the network has that began it all, be it a student's or the UNet itself: pictures of the sizes that it halves evenly suit
    all that were made of it."""
    config = unet.config
    while RECORD in config:
        config = teacher_config(config)
    return len(config["block_out_channels"])


def teacher_name(name: str, config: Mapping[str, Any]) -> str:
    """What a layer or parameter of a student of this config is called in its teacher. Whether its weights have the shape that they have there
    is not asked."""
    found = LAYER.match(name)
    if not found:
        return name
    theirs, left_out = teacher_config(config), config[RECORD]["leave_out"]
    counts, half, stage, pair = layers_by_stage(theirs), found["half"], int(found["stage"]), found["pair"]
    if half == "up" and "innermost_stage" in left_out:
        stage += 1
    if pair is None:
        return f"{half}_blocks.{stage}.{name[found.end() :]}"
    count = counts[stage] if half == "down" else counts[len(counts) - 1 - stage]
    moved = half == "up" and "second_layers" in left_out and count > 1 and int(pair) > 0
    return f"{half}_blocks.{stage}.{found['kind']}.{int(pair) + moved}{name[found.end() :]}"


def origins(unet: nn.Module) -> dict[str, str]:
    """Layer of a student -> its name in the network that began it all (of a student's student the first teacher), for every layer whose
    weights come from there. Attached adapters change nothing."""
    config, names = unet.config, None
    while RECORD in config:
        student = unloaded(unet, config)
        fresh, names = set(fresh_layers(student)), names or {name: name for name, _ in own_layers(student)}
        names = {own: teacher_name(name, config) for own, name in names.items() if name not in fresh}
        config = teacher_config(config)
    return names or {}


def first_teacher(unet: nn.Module) -> nn.Module:
    """The network that began a student, on the meta device."""
    config = unet.config
    while RECORD in config:
        config = teacher_config(config)
    return unloaded(unet, config)


def unloaded(unet: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A UNet of this config on the meta device."""
    with torch.device("meta"):
        return type(unet).from_config(dict(config))


def fresh_layers(student: nn.Module) -> list[str]:
    """The layers of a student whose weights have another shape than in its teacher, or are not there."""
    theirs = {name: shapes_of(x) for name, x in own_layers(unloaded(student, teacher_config(student.config)))}
    return [name for name, x in own_layers(student) if theirs.get(teacher_name(name, student.config)) != shapes_of(x)]


def answering_stages(student: nn.Module) -> list[tuple[str, str]]:
    """(module of the student, module of its teacher) of every stage that both have, by whose output they can be compared: the stages of the
    encoder by their number, the middle block where it works on the same stage as the teacher's, those of the decoder counted from the picture."""
    left_out = student.config[RECORD]["leave_out"]
    names = [f"down_blocks.{number}" for number in range(len(student.down_blocks))]
    if student.mid_block is not None and "innermost_stage" not in left_out:
        names.append("mid_block")
    names += [f"up_blocks.{number}" for number in range(len(student.up_blocks))]
    return [(name, teacher_name(f"{name}.", student.config).removesuffix(".")) for name in names]


def own_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of everything that owns weights itself."""
    return [(name, module) for name, module in model.named_modules() if own_tensors(module)]


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in (*module._parameters.items(), *module._buffers.items()) if x is not None}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in own_tensors(module).items()}
