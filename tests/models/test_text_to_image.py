"""The pipeline of pixel models: it draws what a plain restatement of the sampler and StableDiffusionPipeline draw, by any scheduler. That it
comes back from disk in another process, with t2ilib and without, is in tests/training/test_scratch.py."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

import t2ilib
from t2ilib.config import EvaluationConfig, ModelConfig, ScratchConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline, quiet_libraries, save_pipeline
from t2ilib.models.scratch import CLIPPED, build_base
from t2ilib.models.text_to_image import TextToImagePipeline

CPU = torch.device("cpu")
SIDE, PROMPTS = 8, ["a red circle", "a blue square"]
SAMPLERS = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
KINDS = ("epsilon", "sample", "v_prediction")


@pytest.fixture(scope="module")
def components():
    """A pixel model with random weights, whose output is not small: of a fresh UNet it would hardly change the noise."""
    made = build_base(ModelConfig(), ScratchConfig(unet="tiny", space="pixels"), SIDE, 0, CPU)
    with torch.no_grad():
        made.unet.conv_out.weight.mul_(3)
    return made


@pytest.fixture
def pipeline(components):
    return build_pipeline(components)


def noise(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_ddim_with_classifier_free_guidance(components, kind: str, clipped: bool) -> None:
    """Against arXiv 2010.02502, equation 12 with sigma 0, and arXiv 2207.12598, equation 6; in float64, for the first steps of epsilon prediction
    divide what rounding left by 0.07."""
    options = {"prediction_type": kind} | ({} if clipped else {"thresholding": False})
    components = replace(components, unet=copy.deepcopy(components.unet).double())
    pipeline = build_pipeline(components)
    pipeline.scheduler = scheduler = DDIMScheduler.from_config(components.scheduler.config, **options)
    found = pipeline(PROMPTS, latents=noise(), num_inference_steps=4, guidance_scale=3.0, output_type="latent").images

    with torch.no_grad():
        text = components.encode_text(PROMPTS)["encoder_hidden_states"].double()
        nothing = components.encode_text(["", ""])["encoder_hidden_states"].double()
        x, alphas = noise().double(), torch.cumprod(1 - scheduler.betas, 0)
        for step in (999, 749, 499, 249):  # trailing spacing
            a, before = alphas[step], alphas[step - 250] if step > 250 else torch.tensor(1.0)
            with_text, without = (components.unet(x, step, hidden).sample for hidden in (text, nothing))
            out = without + 3.0 * (with_text - without)
            picture, e = {
                "epsilon": lambda a, x, out: ((x - (1 - a).sqrt() * out) / a.sqrt(), out),
                "sample": lambda a, x, out: (out, (x - a.sqrt() * out) / (1 - a).sqrt()),
                "v_prediction": lambda a, x, out: (
                    a.sqrt() * x - (1 - a).sqrt() * out,
                    a.sqrt() * out + (1 - a).sqrt() * x,
                ),
            }[kind](a, x, out)
            if clipped:
                picture = picture.clamp(-1, 1)
            x = before.sqrt() * picture + (1 - before).sqrt() * e
    assert (found - x).abs().max() < 1e-5 * x.abs().max()
    assert not clipped or found.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_draws_as_stable_diffusion_with_a_vae_that_does_nothing(components, sampler, kind: str) -> None:
    parts = {"unet": components.unet, **components.text_encoders, **components.tokenizers}
    scheduler = sampler.from_config(components.scheduler.config, prediction_type=kind)
    with quiet_libraries():
        reference = StableDiffusionPipeline(
            vae=components.vae,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
        reference.set_progress_bar_config(disable=True)
    own = TextToImagePipeline(scheduler=sampler.from_config(scheduler.config), **parts)
    own.set_progress_bar_config(disable=True)
    asked = {
        "prompt": PROMPTS,
        "negative_prompt": ["a cross", ""],
        "num_images_per_prompt": 2,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "height": SIDE,
        "width": 2 * SIDE,
    }
    drawn = [
        pipe(generator=[torch.Generator().manual_seed(i) for i in range(4)], output_type="latent", **asked).images
        for pipe in (own, reference)
    ]
    assert drawn[0].shape == (4, 3, SIDE, 2 * SIDE)
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].std() > 0.1


def test_clip_skip_leaves_out_the_last_layers(components, pipeline) -> None:
    encoder, shorter = components.text_encoders["text_encoder"], copy.deepcopy(components.text_encoders["text_encoder"])
    layers = shorter.encoder.layers
    del layers[-1:]
    found, _ = pipeline.encode_prompt(PROMPTS, CPU, 1, False, clip_skip=1)
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(found, shorter(ids).last_hidden_state)
        whole, _ = pipeline.encode_prompt(PROMPTS, CPU, 1, False)
        assert torch.equal(whole, encoder(ids).last_hidden_state)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_goes_along_into_other_schedulers(components, sampler) -> None:
    scheduler = sampler.from_config(components.scheduler.config)
    assert CLIPPED.items() <= dict(components.scheduler.config).items()
    assert scheduler.config.thresholding
    far = torch.full((1, 3, 8, 8), 5.0) * torch.linspace(-1, 1, 8)
    assert torch.equal(scheduler._threshold_sample(far), far.clamp(-1, 1))


def test_a_callback_sees_changes_and_ends_the_steps(pipeline) -> None:
    seen = []

    def watch(pipe, number, timestep, tensors):
        seen.append((number, int(timestep), sorted(tensors), tensors["latents"].shape))
        if number == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    drawn = pipeline(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert seen == [(n, t, sorted(names), (1, 3, SIDE, SIDE)) for n, t in ((0, 999), (1, 749))]
    assert not drawn.any()


def test_what_comes_out_is_what_was_asked_for(pipeline) -> None:
    asked = {"prompt": PROMPTS[0], "latents": noise(1), "num_inference_steps": 1}
    found = {kind: pipeline(output_type=kind, **asked).images for kind in ("latent", "pt", "np", "pil")}
    scaled = (found["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(found["pt"], scaled)
    assert np.array_equal(found["np"], scaled.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(found["pil"][0]), (found["np"][0] * 255).round().astype(np.uint8))
    assert torch.equal(pipeline(return_dict=False, output_type="pt", **asked)[0], scaled)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"height": 10}, "multiples of 8"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 pictures"),
        ({"negative_prompt": ["a"]}, "2 prompts and 1 negative prompts"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "what is asked for is"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "noise_pred"),
        ({"prompt": []}, "no prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline, asked: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline(**({"prompt": PROMPTS, "num_inference_steps": 1, "guidance_scale": 2.0} | asked))


def test_it_is_a_base_again(components, tmp_path: Path) -> None:
    save_pipeline(components, tmp_path)
    assert "custom_pipeline" in (tmp_path / "README.md").read_text()
    loaded = load_base(ModelConfig(base=str(tmp_path)), CPU)
    assert loaded.family.name == "pixels"
    settings = EvaluationConfig(num_inference_steps=2)
    first, second = (draw(parts, PROMPTS, settings) for parts in (components, loaded))
    assert [np.array_equal(a, b) for a, b in zip(first, second, strict=True)] == [True, True]
    assert t2ilib.TextToImagePipeline is TextToImagePipeline
