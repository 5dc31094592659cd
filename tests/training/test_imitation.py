"""Students that learn from their teachers: the loss against a plain re-statement, and a run from its start to what is drawn with it."""

import json

import pytest
import torch
from adapting import build_parts
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from t2ilib.config import ConfigError
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.students import build_student
from t2ilib.runfile import build_run
from t2ilib.training.history import read_rows
from t2ilib.training.loop import train
from t2ilib.training.methods import METHODS
from t2ilib.training.methods.method import Parts
from t2ilib.training.objectives import build_objective
from t2ilib.training.others import Frozen, base_as_it_was
from t2ilib.training.setups import checkpoint_gradients, noise_schedule, trained_modules

TIMESTEPS = torch.tensor([100, 800])
FIELDS = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
    "sample_size": 8,
}
BASE, TINY = ["second_layers"], ["second_layers", "mid_block", "innermost_stage"]


class Case:
    """A model of three stages whose student learns from it."""

    def __init__(self, leave_out=TINY, objective=None, **weights):
        self.components = build_parts("sd15")
        torch.manual_seed(0)
        self.teacher = UNet2DConditionModel(**FIELDS).requires_grad_(False).eval()
        self.components.unet = self.teacher
        sections = {"imitation": weights} | (objective or {})
        run = build_run({"student": {"leave_out": leave_out}, "objective": sections})
        self.modules = trained_modules(run, self.components)
        self.student = self.components.unet
        self.denoiser = Denoiser(self.components, trains_text=False)
        self.base = base_as_it_was(run, self.components, self.denoiser)
        self.plain = build_objective(run.objective, noise_schedule(self.components))
        self.parts = Parts(run, self.plain, self.denoiser, self.base)
        self.objective = METHODS["imitation"].objective(self.parts)
        generator = torch.Generator().manual_seed(3)
        self.latents, self.noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        text = torch.randn(2, 7, 64, generator=generator)
        self.batch = {"latents": self.latents, "encoder_hidden_states": text}

    def losses(self, denoiser=None) -> torch.Tensor:
        return self.objective(denoiser or self.denoiser, self.batch, self.noise, TIMESTEPS)

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
        self.student.zero_grad()
        return found

    def by_hand(self, unet) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Prediction, and what every stage of a UNet gives, walked through block by block; of encoder stages also before the downsampler."""
        schedule = noise_schedule(self.components)
        a = schedule.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
        hidden = unet.conv_in(a.sqrt() * self.latents + (1 - a).sqrt() * self.noise)
        time = unet.time_embedding(unet.time_proj(TIMESTEPS))
        text, skips, found = {"encoder_hidden_states": self.batch["encoder_hidden_states"]}, (hidden,), {}
        for number, block in enumerate(unet.down_blocks):
            last = {}
            layer = (getattr(block, "attentions", None) or block.resnets)[-1]
            hook = layer.register_forward_hook(lambda m, i, out, last=last: last.update(out=out))
            hidden, own = block(hidden, time, **(text if hasattr(block, "attentions") else {}))
            hook.remove()
            skips += own
            out = last["out"]
            found |= {f"down {number}": hidden, f"before {number}": out if isinstance(out, torch.Tensor) else out[0]}
        if unet.mid_block is not None:
            hidden = found["mid"] = unet.mid_block(hidden, time, **text)
        for number, block in enumerate(unet.up_blocks):
            taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            hidden = block(hidden, taken, time, **(text if hasattr(block, "attentions") else {}))
            found[f"up {number}"] = hidden
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))), found


def square(one, other) -> torch.Tensor:
    return (one - other).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("leave_out", "answers"),
    [
        (BASE, {name: name for name in ("down 0", "down 1", "down 2", "mid", "up 0", "up 1", "up 2")}),
        (TINY, {"down 0": "down 0", "down 1": "before 1", "up 0": "up 1", "up 1": "up 2"}),
        (["innermost_stage"], {"down 0": "down 0", "down 1": "before 1", "up 0": "up 1", "up 1": "up 2"}),
    ],
    ids=["base", "tiny", "innermost"],
)
def test_the_loss_and_its_gradients_are_those_of_the_paper(leave_out, answers):
    case = Case(leave_out, task=2.0, output=0.5, features=0.25)
    case.denoiser.train()
    losses = case.losses()
    losses.mean().backward()
    found = case.gradients()
    taught, theirs = case.by_hand(case.teacher)
    said, own = case.by_hand(case.student)
    a = noise_schedule(case.components).alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    velocity = case.plain.predicts == "v_prediction"
    target = a.sqrt() * case.noise - (1 - a).sqrt() * case.latents if velocity else case.noise
    features = sum(square(own[mine], theirs[other]) for mine, other in answers.items())
    expected = 2.0 * square(said, target) + 0.5 * square(said, taught) + 0.25 * features
    torch.testing.assert_close(losses, expected)
    expected.mean().backward()
    again = case.gradients()
    assert found.keys() == again.keys() == dict(case.student.named_parameters()).keys()
    for name, gradient in again.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_of_an_equal_teacher_nothing_is_left_to_imitate():
    case = Case(["mid_block"], task=0.0)
    twin = build_student(case.teacher, ["mid_block"])
    parts = Parts(case.parts.run, case.plain, case.denoiser, Frozen(case.components, twin))
    case.objective = METHODS["imitation"].objective(parts)
    assert torch.equal(case.losses(), torch.zeros(2))
    with torch.no_grad():
        case.student.conv_in.bias.add_(0.1)
    assert (case.losses() > 1e-4).all()


class Wrapped(nn.Module):
    """As accelerate and DistributedDataParallel put something around what is trained."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def test_wrapping_and_recomputing_change_nothing_and_no_hook_stays():
    case = Case()
    case.denoiser.train()
    case.losses().mean().backward()
    plain = case.gradients()
    checkpoint_gradients(case.components, case.modules)
    case.losses(Wrapped(case.denoiser)).mean().backward()
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(gradient, plain[name])
    assert not any(m._forward_hooks for unet in (case.teacher, case.student) for m in unet.modules())


def test_the_teacher_is_the_base_itself_and_stands_still():
    case = Case()
    assert case.components.teacher is case.teacher is case.base.unet
    shared = {p.data_ptr() for p in case.teacher.parameters()} & {p.data_ptr() for p in case.student.parameters()}
    assert not shared
    case.denoiser.train()
    case.losses().mean().backward()
    assert not case.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in case.teacher.parameters())
    assert all(p.requires_grad for p in case.student.parameters())


def test_masks_and_weights_of_timesteps_are_about_pictures_and_weights_of_samples_about_all():
    case = Case(objective={"snr_gamma": 1.0})
    parts = {name: Case(objective={"snr_gamma": 1.0}, **{"task": 0.0, "output": 0.0, name: 1.0} | off) for name, off in
             (("output", {"features": 0.0}), ("features", {}))}  # fmt: skip
    plain = {name: part.losses() for name, part in parts.items()}
    unweighted = Case(task=0.0, output=0.0).losses()
    torch.testing.assert_close(plain["features"], unweighted)
    assert not torch.allclose(plain["output"], Case(task=0.0, features=0.0).losses())
    masks = {"mask": torch.ones(2, 1, 8, 8).tril(), "weights": torch.tensor([1.0, 3.0])}
    for part in parts.values():
        part.batch |= masks
    torch.testing.assert_close(parts["features"].losses(), plain["features"] * masks["weights"])
    assert not torch.allclose(parts["output"].losses(), plain["output"] * masks["weights"])
    assert case.losses().shape == (2,)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"objective": {"imitation": {}}, "training": {"trains": "unet"}}, "add a section student"),
        ({"objective": {"imitation": {"output": 0, "features": 0}}, "student": {"leave_out": TINY}}, "nothing of the teacher"),
        ({"objective": {"preferences": {}}, "student": {"leave_out": TINY}}, "a student begins apart from it"),
        ({"objective": {"preferences": {}, "imitation": {}}, "student": {"leave_out": TINY}}, "different objectives"),
    ],
)  # fmt: skip
def test_what_cannot_be_imitated_is_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        build_run(values)


def run_of(output, **sections):
    values = {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "student": {"leave_out": ["mid_block", "innermost_stage"]},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 6},
        "objective": {"imitation": {}},
        "training": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "gradient_checkpointing": True, "ema_horizon": 2},
        "evaluation": {"validate_every": 0, "validation_timesteps": 2, "validation_pictures": 2, "prompts": ["a heart"]}
        | {"num_inference_steps": 1, "sample_every": 0},
    }  # fmt: skip
    return build_run(values | sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("student") / "run")
    return run, train(run)


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(run.output / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_resumes_to_the_bit(trained, tmp_path):
    run, _ = trained
    first = {"training": run.training.model_dump(mode="json") | {"steps": 2}}
    train(run_of(tmp_path, **first))
    result = train(run_of(tmp_path))
    assert result.resumed_from == 2
    straight, resumed = weights_of(run), weights_of(run_of(tmp_path))
    assert all(torch.equal(x, resumed[name]) for name, x in straight.items())


def test_how_far_it_is_from_its_teacher_is_measured_and_declared(trained):
    run, result = trained
    rows = {row["step"]: row for row in read_rows(run.output / "metrics.jsonl") if "imitation/output" in row}
    about = json.loads((run.output / "metrics.about.json").read_text())
    for name in ("imitation/output", "imitation/features"):
        assert rows[4][name] < rows[0][name]
        assert about[name]["better"] == "lower"
    assert result.components.teacher is None


def test_what_is_saved_is_a_pipeline_of_diffusers_and_a_base_to_train_an_adapter_on(trained, tmp_path):
    run, result = trained
    pipeline = StableDiffusionPipeline.from_pretrained(run.output / "model", safety_checker=None)
    assert pipeline.unet.mid_block is None
    assert len(pipeline.unet.down_blocks) == 1
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in result.components.unet.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a heart", num_inference_steps=1).images[0].size == (64, 64)
    sections = {"student": None, "objective": {}, "adapter": {"rank": 2}, "model": {"base": str(run.output / "model")}}
    further = run_of(tmp_path, **sections, training={"steps": 1, "batch_size": 2})
    assert train(further).metrics["trainable_parameters"] > 0


def test_its_card_says_what_it_is(trained):
    run, result = trained
    card = (run.output / "model" / "README.md").read_text()
    count = sum(p.numel() for p in result.components.unet.parameters())
    for words in (
        f"A UNet of {count:,} parameters, which began with weights of that of tiny-sd15, without the mid block and the innermost stage",
        "| objective | imitation (task 1.0, output 1.0, features 1.0) |",
        "- pruning",
        "- imitation",
    ):
        assert words in card


def test_its_control_is_trained_without_a_teacher(tmp_path):
    run = run_of(tmp_path, objective={"snr_gamma": None}, training={"steps": 1, "batch_size": 2})
    components = build_parts("sd15")
    trained_modules(run, components)
    assert components.teacher is None
    assert components.side_multiple == build_parts("sd15").side_multiple, "pictures are cut as with it"
    assert METHODS[run.objective.method].needs_base(run) is False
