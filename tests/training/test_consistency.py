"""Latent consistency distillation against plain re-statements, closed forms, and the scheduler of diffusers that draws what it gives."""

import pytest
import torch
from adapting import CAPTIONS, batch_of, build_parts, copy_parts
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.fused import fuse_adapters
from t2ilib.config import ConfigError, ModelConfig, ObjectiveConfig
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.load import quantize_parts
from t2ilib.runfile import build_run
from t2ilib.training.methods import METHODS
from t2ilib.training.methods.consistency import (
    GUIDANCE,
    WITHOUT,
    Distilling,
    boundary,
    captionless,
    more,
    neighbours,
    shrunk,
)
from t2ilib.training.methods.method import Parts
from t2ilib.training.objectives import build_objective
from t2ilib.training.others import base_as_it_was
from t2ilib.training.setups import noise_schedule

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([3, 805])
"""The first step of the grid, whose neighbour is timestep 0, and one in its middle."""
HERE, BEFORE = torch.tensor([19, 819]), torch.tensor([0, 799])
ADAPTERS = {
    "lora": {"dropout": 0.0},
    "dora": {"kind": "dora"},
    "text encoders": {"text_encoder_targets": "attention"},
    "nf4 dora": {"kind": "dora"},
}


class Case:
    """A model with an adapter, or trained as a whole, away from its base, with the objective, a batch, and the same base loaded apart."""

    def __init__(self, adapter: dict | None, prediction: str = "v_prediction", family: str = "sdxl", nf4: bool = False):
        self.components = build_parts(family)
        self.components.noise_as(prediction)
        if nf4:
            quantize_parts(self.components, ModelConfig(quantization="nf4"), torch.float32, torch.device("cpu"))
        self.apart = None if nf4 else copy_parts(self.components)
        training = {"training": {"trains": "unet"}} if adapter is None else {}
        adapter = None if adapter is None else {"rank": 2, "alpha": 2.0, **adapter}
        run = build_run({"adapter": adapter, "objective": {"consistency": {}}} | training)
        self.trains_text = bool(run.adapter and run.adapter.text_encoder_targets)
        generator = torch.Generator().manual_seed(3)
        latents, self.noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        encoded = batch_of(self.components)
        with torch.no_grad():
            empty = self.components.encode_text(["", ""])
        text = {name: encoded[name] for name in ("captions",)} if self.trains_text else {
            **{name: x for name, x in encoded.items() if name != "captions"},
            **{f"{WITHOUT}{name}": x for name, x in empty.items()},
        }  # fmt: skip
        self.batch = {"latents": latents, "time_ids": encoded["time_ids"], GUIDANCE: torch.tensor([2.0, 7.0]), **text}
        if adapter is None:
            self.modules = {"unet": self.components.unet.requires_grad_(True)}
        else:
            self.modules = attach_adapters(self.components, run.adapter, 0)
            for module in self.modules.values():
                fuse_adapters(module)
        self.denoiser = Denoiser(self.components, self.trains_text)
        self.base = base_as_it_was(run, self.components, self.denoiser)
        self.schedule = noise_schedule(self.components)
        plain = build_objective(ObjectiveConfig(snr_gamma=None), self.schedule)
        self.objective = METHODS["consistency"].objective(Parts(run, plain, self.denoiser, self.base))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{part}.{name}": p for part, m in self.modules.items() for name, p in m.named_parameters() if p.requires_grad}  # fmt: skip

    def losses(self) -> torch.Tensor:
        return self.objective(self.denoiser, self.batch, self.noise, TIMESTEPS)

    def gradients(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        losses.mean().backward()
        found = {key: p.grad.clone() for key, p in self.parameters().items()}
        for parameter in self.parameters().values():
            parameter.grad = None
        return found

    def restated(self, teacher) -> torch.Tensor:
        """The losses, one picture at a time, of what diffusers' own schedulers make of teacher and student."""
        found = []
        solver = DDIMScheduler.from_config(self.schedule.config, set_alpha_to_one=False, clip_sample=False)
        solver.num_inference_steps = 50
        ending = LCMScheduler.from_config(self.schedule.config)
        ending.set_timesteps(1)
        for i in range(2):
            batch = {name: value[i : i + 1] for name, value in self.batch.items()}
            t, s = HERE[i], BEFORE[i]
            a = self.schedule.alphas_cumprod[t]
            noisy = a.sqrt() * batch["latents"] + (1 - a).sqrt() * self.noise[i : i + 1]
            with torch.no_grad():
                asked, empty = (teacher(noisy, t[None], b) for b in (batch, captionless(batch)))
                guided = empty + batch[GUIDANCE] * (asked - empty)
                earlier = solver.step(guided, int(t), noisy).prev_sample if s else self.onto_zero(guided, noisy, t)
                target = self.ended(ending, earlier, s, batch)
            distance = self.ended(ending, noisy, t, batch) - target
            found.append(((distance.square() + 0.001**2).sqrt() - 0.001).mean())
        return torch.stack(found)

    def onto_zero(self, said: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The last step, which DDIM would take to no noise at all: to timestep 0."""
        solver = DDIMScheduler.from_config(self.schedule.config, set_alpha_to_one=True, clip_sample=False)
        solver.set_timesteps(50)
        picture = solver.step(said, int(t), noisy).pred_original_sample
        a, zero = self.schedule.alphas_cumprod[t], self.schedule.alphas_cumprod[0]
        noise = (noisy - a.sqrt() * picture) / (1 - a).sqrt()
        return zero.sqrt() * picture + (1 - zero).sqrt() * noise

    def ended(self, scheduler: LCMScheduler, noisy: torch.Tensor, t: torch.Tensor, batch: dict) -> torch.Tensor:
        scheduler.set_timesteps(1)
        scheduler._step_index = 0
        return scheduler.step(self.denoiser(noisy, t[None], batch), int(t), noisy).denoised


def case_of(name: str, **options) -> Case:
    return Case(None if name == "whole" else ADAPTERS[name], nf4="nf4" in name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("lora", {"prediction": prediction}) for prediction in PREDICTIONS),
        ("lora", {"family": "sd15"}),
        ("dora", {}),
        ("nf4 dora", {}),
        ("text encoders", {}),
        ("whole", {}),
    ],
)
def test_losses_and_gradients_are_those_of_diffusers_schedulers(name, options):
    case = case_of(name, **options)
    teacher = case.base if case.apart is None else Denoiser(case.apart, case.trains_text).eval()
    case.denoiser.eval()
    losses, expected = case.losses(), case.restated(teacher)
    torch.testing.assert_close(losses, expected, rtol=2e-4, atol=1e-6)
    found, expected = case.gradients(losses), case.gradients(expected)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_under_autocast_all_that_learns_has_its_gradient(name):
    """A pass without gradient leaves weights in autocast's cache that have none: against the same with nothing kept between passes."""
    case = case_of(name)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = case.gradients(case.losses())
    with torch.autocast("cpu", torch.bfloat16):
        found = case.gradients(case.losses())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))


def test_boundary_conditions_and_grid_are_those_of_diffusers():
    scheduler = LCMScheduler()
    timesteps = torch.arange(1000)
    skip, out = boundary(timesteps)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    torch.testing.assert_close(skip.flatten().double(), torch.tensor([e[0] for e in expected]).double())
    torch.testing.assert_close(out.flatten().double(), torch.tensor([e[1] for e in expected]).double())
    for count in (50, 30):  # which does not divide 1000: the last timesteps are left out, as they are in drawing
        scheduler.set_timesteps(count, original_inference_steps=count)
        here, before = neighbours(timesteps, count, 1000)
        assert here.unique().tolist() == scheduler.timesteps.flip(0).tolist()
        assert before.unique().tolist() == [0, *scheduler.timesteps.flip(0).tolist()[:-1]]
        assert (here - timesteps >= 0)[: 1000 // count * count].all()


def toy(prediction: str) -> tuple[DDPMScheduler, dict, torch.Tensor]:
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    latents, noise, point, other = (torch.randn(4, 2, 4, 4, generator=generator) for _ in range(4))
    batch = {"latents": latents, "points": point, f"{WITHOUT}points": other, GUIDANCE: torch.tensor([1.0, 2, 4, 8])}
    return schedule, batch, noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_consistency_function_of_a_teacher_that_knows_one_picture_costs_nothing(prediction):
    """Where all data are one picture p, the path through x at t is sqrt(a) p + sqrt(1 - a) e of one e: in closed form, guidance included, which
    makes another picture of it."""
    schedule, batch, noise = toy(prediction)
    objective, student = Distilling(schedule, OfOnePicture(schedule), 50, 0.001), ItsEnd(schedule)
    another = lambda noisy, timesteps, batch: 0.9 * student(noisy, timesteps, batch) + 0.1 * noisy  # noqa: E731
    for timesteps in (torch.tensor([0, 19, 20, 45]), torch.tensor([300, 500, 980, 999])):
        losses = objective(student, batch, noise, timesteps)
        assert losses.max() < 1e-6
        assert objective(another, batch, noise, timesteps).min() > 1e-5, "which is not it"


class OfOnePicture:
    """Predicts what is right where the picture is `points`, by closed form."""

    def __init__(self, schedule: DDPMScheduler):
        self.schedule = schedule

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict) -> torch.Tensor:
        a = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return self.said(batch["points"], noisy, a)

    def said(self, picture: torch.Tensor, noisy: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        noise = (noisy - a.sqrt() * picture) / (1 - a).sqrt()
        kind = self.schedule.config.prediction_type
        return {"epsilon": noise, "sample": picture, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * picture}[kind]


class ItsEnd(OfOnePicture):
    """Says of a point on the path what makes f its end at timestep 0."""

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict) -> torch.Tensor:
        a, zero = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1), self.schedule.alphas_cumprod[0]
        guidance = batch[GUIDANCE].view(-1, 1, 1, 1)
        picture = batch[f"{WITHOUT}points"] + guidance * (batch["points"] - batch[f"{WITHOUT}points"])
        end = zero.sqrt() * picture + (1 - zero).sqrt() * (noisy - a.sqrt() * picture) / (1 - a).sqrt()
        skip, out = boundary(timesteps)
        return self.said((end - skip * noisy) / out.clamp(min=1e-6), noisy, a)


def test_at_the_end_of_the_path_the_student_is_the_identity_whatever_it_says():
    schedule, batch, noise = toy("epsilon")
    objective = Distilling(schedule, OfOnePicture(schedule), 50, 0.001)
    said = lambda noisy, timesteps, batch: 1e3 * torch.ones_like(noisy)  # noqa: E731
    assert torch.equal(objective.end(said, noise, torch.zeros(4, dtype=torch.long), batch), noise)


def test_the_loss_keeps_small_errors_and_counts_masks_and_weights():
    error = torch.tensor([0.0, 1e-6, 1e-5, 0.001, 1.0, 30.0])
    exact = (error.double().square() + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(shrunk(error, 0.001).double(), exact, rtol=1e-5, atol=0)
    schedule, batch, noise = toy("epsilon")
    objective = Distilling(schedule, teacher := OfOnePicture(schedule), 50, 0.001)
    timesteps = torch.tensor([100, 300, 500, 700])
    plain = objective(teacher, batch, noise, timesteps)
    torch.testing.assert_close(objective(teacher, {**batch, "weights": torch.arange(4.0)}, noise, timesteps), plain * torch.arange(4.0))  # fmt: skip
    halves = [torch.zeros(4, 1, 4, 4) for _ in range(2)]
    halves[0][..., :2], halves[1][..., 2:] = 1.0, 1.0
    masked = [objective(teacher, {**batch, "mask": mask}, noise, timesteps) for mask in halves]
    torch.testing.assert_close((masked[0] + masked[1]) / 2, plain)


class Encoded:
    """What `more` asks of encoded pictures."""

    def __init__(self, text=None):
        self.text = text


def test_guidance_has_an_address_and_an_empty_caption_comes_along():
    run = build_run({"adapter": {}, "seed": 5, "objective": {"consistency": {"guidance_scale": [2, 4]}}})
    components = build_parts()
    encoded = Encoded(lambda captions: components.encode_text(captions))
    with torch.no_grad():
        batch = more(run, encoded, [7, 8, 9], 3)
        empty = components.encode_text([""])
    assert torch.equal(batch[GUIDANCE][1:2], more(run, encoded, [8], 3)[GUIDANCE]), "whatever is beside it"
    assert not torch.equal(batch[GUIDANCE], more(run, encoded, [7, 8, 9], 4)[GUIDANCE])
    many = more(run, Encoded(), list(range(500)), 0)
    assert many.keys() == {GUIDANCE}
    assert 2 <= many[GUIDANCE].min() < 2.05 < 3.95 < many[GUIDANCE].max() <= 4
    assert {name.removeprefix(WITHOUT) for name in batch} == {GUIDANCE, *empty}
    for name, value in empty.items():
        assert torch.equal(batch[f"{WITHOUT}{name}"], value.expand(3, *value.shape[1:]))
    assert captionless({"captions": CAPTIONS})["captions"] == ["", ""]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"adapter": {"init": "pissa"}}, "init 'pissa' has changed"),
        ({"adapter": {"tokens": {"<c>": "cat"}}}, "does not know new words"),
        ({"adapter": {}, "prior": {"prompts": ["a dog"]}}, "set prior to null"),
        ({"scratch": {}}, "starts from a base that can draw"),
        ({"training": {"trains": "nothing", "steps": 0}}, "this run trains nothing"),
        ({"adapter": {}, "objective": {"snr_gamma": 5.0}}, "a loss of its own"),
        ({"adapter": {}, "objective": {"name": "v_prediction"}}, "by its own prediction"),
        ({"adapter": {}, "objective": {"preferences": {}}}, "different objectives"),
        ({"adapter": {}, "objective": {"consistency": {"guidance_scale": [4, 2]}}}, "is empty"),
        ({"adapter": {}, "evaluation": {"num_inference_steps": 51}}, "LCM draws at some"),
    ],
)
def test_what_cannot_be_distilled_is_refused(values, reason):
    objective = {"consistency": {}, **values.get("objective", {})}
    with pytest.raises(ConfigError, match=reason):
        build_run(values | {"objective": objective})


def test_a_run_is_drawn_in_few_steps_unless_it_says_otherwise_and_others_are_as_they_were():
    run = build_run({"adapter": {}, "objective": {"consistency": {}}})
    assert (run.evaluation.num_inference_steps, run.evaluation.guidance_scale) == (4, 1.0)
    asked = {"evaluation": {"num_inference_steps": 2, "guidance_scale": 1.5}}
    run = build_run({"adapter": {}, "objective": {"consistency": {"solver_steps": 25}}} | asked)
    assert (run.evaluation.num_inference_steps, run.evaluation.guidance_scale) == (2, 1.5)
    drawn = run.drawn_by
    assert (drawn.num_inference_steps, drawn.guidance_scale, drawn.original_inference_steps) == (2, 1.5, 25)
    plain = build_run({"adapter": {}})
    assert plain.drawn_by is None
    assert "consistency" not in plain.deciding()["objective"]
    assert "consistency" in run.deciding()["objective"]
    assert (plain.evaluation.num_inference_steps, plain.evaluation.guidance_scale) == (20, 3.0)
