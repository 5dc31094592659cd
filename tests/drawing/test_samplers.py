"""Samplers: each draws what diffusers draws with the scheduler of that name, and for networks that it can draw for alone."""

import inspect
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)

from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.drawing.samplers import AUTO, SAMPLERS, build_sampler, known_sampler, name_of, samplers_for
from t2ilib.evaluation.sampling import draw
from t2ilib.evaluation.watching import shares
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.load import load_base
from t2ilib.seeds import generator_for

THEIRS = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LCM": ("LCMScheduler", {}),
}
"""A1111's names as diffusers' documentation has them ("A1111/k-diffusion"), each with its class's defaults."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def components():
    return load_base(ModelConfig())


@pytest.fixture(scope="module")
def pipeline():
    """The base as diffusers alone loads it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        SHIPPED["tiny-sdxl"], torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_draws_what_diffusers_draws(name, components, pipeline):
    own = components.scheduler
    kind, options = THEIRS[name]
    config = {key: own.config[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    config |= {"timestep_spacing": "trailing", "steps_offset": 1}
    made = getattr(diffusers, kind)
    latents = {"clip_sample": False, "set_alpha_to_one": False}
    config |= {key: value for key, value in latents.items() if key in inspect.signature(made.__init__).parameters}
    pipeline.scheduler = made(**config, **options)
    settings = EvaluationConfig(num_inference_steps=3, guidance_scale=2.0)
    ours = draw(components, ["a red circle"], settings, seed=4, scheduler=build_sampler(own, name))[0]
    theirs = pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=2.0, generator=[generator_for(4, "picture", 0)]
    ).images[0]
    assert abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert components.scheduler is own
    assert name_of(build_sampler(own, name)) == name


def base_of(kind="epsilon", zero=False, **more):
    return DDIMScheduler(
        **BETAS,
        prediction_type=kind,
        rescale_betas_zero_snr=zero,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        **more,
    )


def error_of(scheduler, picture, kind, num=8):
    """How far from `picture` a scheduler ends with a network that knows it, whatever the noise."""
    scheduler.set_timesteps(num)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        a, s = (float(x) for x in shares(scheduler, timestep))
        noise = (seen - a * picture) / max(s, 1e-8)
        output = {"epsilon": noise, "sample": picture, "v_prediction": a * noise - s * picture}[kind]
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
    return float((latents - picture).abs().max())


@pytest.mark.parametrize(
    ("kind", "zero"),
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True), ("sample", True)],
)
def test_those_that_are_offered_find_the_picture_and_the_others_cannot(kind, zero):
    base = base_of(kind, zero)
    picture = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    offered = samplers_for(base)
    for name in offered:
        sampler = build_sampler(base, name)
        assert error_of(sampler, picture, kind) < 0.5, name  # noise is 3 or more away; PNDM is rough in so few steps
        assert torch.allclose(sampler.alphas_cumprod[:-1], base.alphas_cumprod[:-1]), name
        assert (sampler.config.prediction_type, sampler.config.timestep_spacing) == (kind, "trailing")
    for name in SAMPLERS.keys() - set(offered):
        made = getattr(diffusers, SAMPLERS[name].scheduler)
        sampler = made.from_config(base.config, **SAMPLERS[name].changes)
        schedule_lost = not torch.allclose(sampler.alphas_cumprod[:-1], base.alphas_cumprod[:-1])
        if not schedule_lost:
            with pytest.raises((NotImplementedError, ValueError)):
                error_of(sampler, picture, kind)
        with pytest.raises(ConfigError, match=r"cannot draw for this base, which .*: choose from auto, Euler"):
            build_sampler(base, name)
    assert {"Euler", "DPM++ 2M", "DPM++ 2M Karras", "DDIM", "DDPM", "UniPC"} <= set(offered)


def test_what_a_base_leaves_to_its_class_lives_on():
    """PNDM's own defaults, as SD1.5's file leaves them out, are not those of the classes that take its place."""
    base = PNDMScheduler()
    for name in samplers_for(base):
        sampler = build_sampler(base, name)
        assert torch.allclose(sampler.alphas_cumprod, base.alphas_cumprod), name
        assert sampler.config.timestep_spacing == "leading", name
        assert not sampler.config.get("clip_sample", False), name


def test_karras_of_the_base_does_not_stick_to_samplers_without():
    base = DPMSolverMultistepScheduler(
        **BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", solver_order=3
    )
    plain = build_sampler(base, "DPM++ 2M").config
    assert (plain.use_karras_sigmas, plain.algorithm_type, plain.solver_order) == (False, "dpmsolver++", 2)
    assert build_sampler(base, AUTO) is base
    assert name_of(base) == "DPM++ 2M SDE Karras"


def test_pixels_are_drawn_by_those_that_clip():
    base = base_of("v_prediction", thresholding=True, sample_max_value=1.0)
    offered = samplers_for(base)
    assert {"DDIM", "DDPM", "DPM++ 2M", "UniPC"} <= set(offered)
    assert not {"Euler", "Heun", "LMS", "PNDM"} & set(offered)
    beyond = torch.full((2, 3, 8, 8), 1.5)
    for name in offered:
        assert error_of(build_sampler(base, name), beyond, "v_prediction") == pytest.approx(0.5, abs=0.2), name


def test_the_page_says_which_sampler_is_for_what():
    page = (Path(__file__).parents[2] / "inference" / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (`.+`) \|$", page, re.MULTILINE)
    fits = {
        (kind, zero): set(samplers_for(base_of(kind, zero))) for kind in ("v_prediction", "sample") for zero in (0, 1)
    }
    told = {name: row for row, (_, names) in enumerate(rows) for name in re.findall("`(.+?)`", names)}
    assert told.keys() == SAMPLERS.keys()
    for name, row in told.items():
        sample, zero = name in fits["sample", 0], name in fits["v_prediction", 1]
        assert (sample, zero) == ((True, True), (False, True), (False, False), (True, False))[row], name
        assert name in fits["v_prediction", 0]


def test_names_are_read_as_people_write_them():
    assert [known_sampler(name) for name in ("euler A", "plms", "dpm++  2m karras", "AUTO")] == [
        "Euler a",
        "PNDM",
        "DPM++ 2M Karras",
        "auto",
    ]
    assert known_sampler("DPM adaptive") is None
    with pytest.raises(
        ConfigError, match=r"sampler 'Euler b' does not exist; choose from Euler, .*Did you mean 'Euler a'"
    ):
        build_sampler(DDPMScheduler(), "Euler b")
