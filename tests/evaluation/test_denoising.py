"""Predictions on the way: what the schedulers that tell theirs tell, and, for a network that knows the picture, the picture."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.evaluation.denoising import chosen_steps, draw_denoising, predictions, save_strips
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample")
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, KINDS),
    "ddpm": (DDPMScheduler, {"clip_sample": False}, KINDS),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}, KINDS[:2]),
    "dpm-solver++": (DPMSolverMultistepScheduler, {}, KINDS),
    "dpm-solver++ karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, KINDS),
    "unipc": (UniPCMultistepScheduler, {}, KINDS),
    "euler": (EulerDiscreteScheduler, {}, KINDS),
    "euler trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, KINDS),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}, KINDS[:2]),
    "heun": (HeunDiscreteScheduler, {}, KINDS[:2]),
    "kdpm2": (KDPM2DiscreteScheduler, {}, KINDS[:1]),
}
"""Name -> scheduler, options, and the kinds of predictions that it can sample with."""
NUM = 6


def build(name: str, kind: str):
    made, options, _ = SCHEDULERS[name]
    return made(**BETAS, prediction_type=kind, **options)


def sample_with(scheduler, network, num=NUM, steps=range(1, NUM + 1)):
    """As pipelines do: scale, ask the network, step. Returns the predictions, the last latents, and what each step returned."""
    scheduler.set_timesteps(num)
    generator = torch.Generator().manual_seed(0)
    latents, told = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma, []
    with predictions(scheduler, steps, num) as found:
        for timestep in scheduler.timesteps:
            output = network(scheduler.scale_model_input(latents, timestep), timestep)
            told.append(scheduler.step(output, timestep, latents))
            latents = told[-1].prev_sample
    return {step: torch.cat(parts) for step, parts in found.items()}, latents, told


def knowing(picture: torch.Tensor, kind: str):
    """The perfect network for a world of one picture: it knows x0, and so which noise is in what it is given, at timesteps that
    lie between two of training's too."""
    levels = DDPMScheduler(**BETAS).alphas_cumprod.double()
    sigmas = ((1 - levels) / levels).sqrt().numpy()

    def network(seen, timestep):
        sigma = float(np.interp(float(timestep), range(len(sigmas)), sigmas))
        a = (1 + sigma**2) ** -0.5
        s = sigma * a
        noise = (seen - a * picture) / s
        return {"epsilon": noise, "sample": picture, "v_prediction": a * noise - s * picture}[kind]

    return network


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_network_that_knows_the_picture_is_seen_to_know_it(name):
    picture = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for kind in SCHEDULERS[name][2]:
        found, latents, _ = sample_with(build(name, kind), knowing(picture, kind))
        assert list(found) == list(range(1, NUM + 1))
        rounded = (
            name == "dpm-solver++ karras"
        )  # asks the network at whole timesteps, and works with levels between them
        assert all((x0 - picture).abs().max() < (1e-2 if rounded else 1e-4) for x0 in found.values())
        assert (latents - picture).abs().max() < 0.2


def guessing(seen, timestep):
    return (3 * seen + float(timestep) / 100).sin()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler trailing", "heun", "euler ancestral"])
def test_it_is_what_schedulers_say_that_say_it(name):
    for kind in SCHEDULERS[name][2]:
        found, _, told = sample_with(build(name, kind), guessing)
        said = [output.pred_original_sample for output in told]
        calls = [-(-step * len(said) // NUM) for step in found]
        for x0, call in zip(found.values(), calls, strict=True):
            assert torch.allclose(x0, said[call - 1].float(), rtol=1e-4, atol=1e-4), (kind, call)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dpm-solver++", "dpm-solver++ karras", "unipc"])
def test_it_is_what_multistep_solvers_work_with(name, kind, monkeypatch):
    scheduler, said = build(name, kind), []
    convert = scheduler.convert_model_output
    monkeypatch.setattr(scheduler, "convert_model_output", lambda *a, **k: said.append(convert(*a, **k)) or said[-1])
    found, latents, _ = sample_with(scheduler, guessing)
    assert all(torch.allclose(x0, x, rtol=1e-4, atol=1e-4) for x0, x in zip(found.values(), said, strict=True))
    assert torch.allclose(found[NUM], latents, atol=1e-4), "the last step ends at its prediction"


def test_the_last_prediction_is_where_sampling_ends():
    for scheduler in (build("euler", "v_prediction"), DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)):
        found, latents, _ = sample_with(scheduler, guessing)
        assert torch.allclose(found[NUM], latents, rtol=1e-4, atol=1e-4)


def test_steps_are_the_samplers_own_however_often_it_asks():
    """PNDM asks NUM + 1 times, Heun 2 NUM - 1 times."""
    for name in ("ddim", "pndm", "heun"):
        few, _, told = sample_with(build(name, "epsilon"), guessing, steps=(1, NUM))
        many, _, _ = sample_with(build(name, "epsilon"), guessing)
        assert [len(few), len(many)] == [2, NUM]
        assert torch.equal(few[NUM], many[NUM])
        assert len({float(x0.sum()) for x0 in many.values()}) == NUM
        if name == "heun":
            assert torch.allclose(few[NUM], told[-1].pred_original_sample, atol=1e-5)


def test_which_steps():
    assert chosen_steps(EvaluationConfig(strip_steps=(), num_inference_steps=20)) == [1, 4, 6, 9, 12, 15, 17, 20]
    assert chosen_steps(EvaluationConfig(strip_steps=(), num_inference_steps=3)) == [1, 2, 3]
    assert chosen_steps(EvaluationConfig(strip_steps=(), num_inference_steps=1)) == [1]
    assert chosen_steps(EvaluationConfig(strip_steps=(7, 2, 7))) == [2, 7]


def test_a_scheduler_without_a_noise_schedule_is_refused():
    with (
        pytest.raises(ConfigError, match=r"EDMEulerScheduler has no noise schedule .* set strip_steps to null"),
        predictions(EDMEulerScheduler(), [1], 1),
    ):
        pass


@pytest.fixture(scope="module")
def components():
    return load_base(ModelConfig(base="tiny-sd15"))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "dpm-solver++", "unipc", "euler ancestral"])
def test_strips_end_with_the_picture_that_is_drawn(name, components, tmp_path, monkeypatch):
    """Of samplers that draw noise as they go too, from the pipeline's own generators."""
    components.scheduler = SCHEDULERS[name][0].from_config(components.scheduler.config)
    prompts, settings = ["a red circle", "a blue square"], EvaluationConfig(num_inference_steps=4, strip_steps=(1, 4))
    monkeypatch.setattr("t2ilib.evaluation.sampling.pictures_at_once", lambda side, most: 1)  # a batch a prompt
    strips = draw_denoising(components, prompts, settings, resolution=64)
    pictures = draw(components, prompts, settings, resolution=64)
    assert [len(strip) for strip in strips] == [3, 3]
    for (first, last, drawn), picture in zip(strips, pictures, strict=True):
        assert np.array_equal(drawn, picture)
        distances = [np.abs(np.asarray(x, int) - np.asarray(picture, int)).mean() for x in (first, last)]
        assert distances[1] < 4 < distances[0]
    assert "step" not in vars(components.scheduler), "the scheduler is as it was"
    whole = save_strips(strips, [1, 4], prompts, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.png", "01.png", "grid.png"]
    assert whole.width > 3 * 128
