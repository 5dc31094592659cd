"""What the loop gives a UNet is what diffusers' pipelines give it: their UNet's every call is recorded and repeated through ours."""

import pytest
import torch

from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import time_ids
from t2ilib.models.pipeline import build_pipeline

PROMPTS = ["a large upright red heart at the center on a white background", "a small blue circle"]
SIZES = {"original_size": (100, 90), "crops_coords_top_left": (3, 5), "target_size": (64, 128)}
GUIDANCE = 4.0


def record(pipeline, **options):
    """The UNet's inputs and outputs of every step, and the latents after it."""
    calls, latents = [], []

    def hook(unet, arguments, keywords, output):
        calls.append((arguments[0], arguments[1], keywords, output[0]))

    handle = pipeline.unet.register_forward_hook(hook, with_kwargs=True)
    pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=GUIDANCE,
        height=64,
        width=128,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, t, values: latents.append(values["latents"]) or {},
        **options,
    )
    handle.remove()
    return calls, latents


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("negative", [None, "a tilted green square"])
@pytest.mark.parametrize("zero_empty", [True, False])
def test_predictions_are_the_pipelines(make, family, negative, zero_empty):
    components = make(family)
    components.zero_empty = zero_empty and family == "sdxl"
    pipeline = build_pipeline(components)
    options = {} if negative is None else {"negative_prompt": [negative] * len(PROMPTS)}
    if family == "sdxl":
        options |= SIZES
        if negative is not None:
            options |= {f"negative_{name}": size for name, size in SIZES.items()}
    with torch.no_grad():
        calls, after = record(pipeline, **options)
        assert len(calls) == 3
        denoiser = Denoiser(components, trains_text=False)
        batch = components.encode_text([negative or ""] * len(PROMPTS) + PROMPTS)
        batch["time_ids"] = time_ids(*SIZES.values()).repeat(2 * len(PROMPTS), 1)
        pipeline.scheduler.set_timesteps(3)
        for (noisy, timestep, keywords, theirs), latents in zip(calls, after, strict=True):
            assert noisy.shape == (4, 4, 8, 16)
            given = keywords["encoder_hidden_states"]
            torch.testing.assert_close(batch["encoder_hidden_states"], given, rtol=1e-5, atol=1e-5)
            if family == "sdxl":
                added = keywords["added_cond_kwargs"]
                torch.testing.assert_close(batch["pooled"], added["text_embeds"], rtol=1e-5, atol=1e-5)
                assert torch.equal(batch["time_ids"], added["time_ids"])
            ours = denoiser(noisy, timestep.expand(4), batch)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            unconditional, conditional = ours.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            stepped = pipeline.scheduler.step(guided, timestep, noisy.chunk(2)[0]).prev_sample
            torch.testing.assert_close(stepped, latents, rtol=1e-4, atol=1e-4)


CAPTIONS = [
    "🐈 on a 🟥 mat 👩‍👩‍👧",
    "一只红色的圆形，赤い円、빨간 원",
    " ".join(f"word{number}" for number in range(480)),
    "  café\u0301\n\tx  ",
    "",
]


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_captions_of_any_script_and_length_are_what_the_pipeline_makes_of_them(make, family):
    """Emoji, letters that the tiny tokenizer does not know, and far more words than an encoder takes, whose rest is left out."""
    components = make(family)
    components.zero_empty = False
    pipeline = build_pipeline(components)
    with torch.no_grad():
        ours = components.encode_text(CAPTIONS)
        theirs = pipeline.encode_prompt(
            CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0], rtol=1e-5, atol=1e-5)
    if family == "sdxl":
        torch.testing.assert_close(ours["pooled"], theirs[2], rtol=1e-5, atol=1e-5)
    assert ours["encoder_hidden_states"].shape[:2] == (
        len(CAPTIONS),
        components.tokenizers["tokenizer"].model_max_length,
    )
    flat = ours["encoder_hidden_states"].flatten(1)
    assert not torch.equal(flat[2], flat[4])
