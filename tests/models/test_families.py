"""What the loop gives a UNet is what diffusers' pipelines give it: their UNet's every call is recorded and repeated through ours."""

import pytest
import torch

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.data.cache import text_encoder_of
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.families import skip_layers, time_ids, tokenize
from t2ilib.models.files.single_file import save_single_file
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline, save_pipeline
from t2ilib.planning.unloaded import build_unloaded

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


@pytest.mark.parametrize("count", [0, 1, 2])
def test_skipped_layers_are_what_diffusers_skips(make, count):
    """Against the whole encoder's hidden states, and diffusers' own `clip_skip`, which looks for the parts of transformers 5's
    encoder where they were before."""
    whole, components = make("sd15"), make("sd15")
    skip_layers(components.family, components.text_encoders, count)
    encoder = whole.text_encoders["text_encoder"]
    encoder.__dict__["text_model"] = encoder
    with torch.no_grad():
        ours = components.encode_text(CAPTIONS)["encoder_hidden_states"]
        states = encoder(tokenize(whole.tokenizers["tokenizer"], CAPTIONS), output_hidden_states=True)
        assert torch.equal(ours, encoder.final_layer_norm(states.hidden_states[-(count + 1)]))
        theirs, _ = build_pipeline(whole).encode_prompt(CAPTIONS, "cpu", 1, False, clip_skip=count)
        assert torch.equal(ours, theirs)
        if count:
            assert not torch.allclose(ours, whole.encode_text(CAPTIONS)["encoder_hidden_states"], atol=1e-2)
    assert components.text_encoders["text_encoder"].config.num_hidden_layers == 3 - count


def test_layers_that_cannot_be_skipped(make):
    sdxl, sd15 = make("sdxl"), make("sd15")
    with pytest.raises(ConfigError, match=r"model.clip_skip 1: a base of the family sdxl .* penultimate layer"):
        skip_layers(sdxl.family, sdxl.text_encoders, 1)
    with pytest.raises(ConfigError, match=r"model.clip_skip 3: the text encoder has 3 layers"):
        skip_layers(sd15.family, sd15.text_encoders, 3)


def test_what_is_kept_and_saved_knows_of_skipped_layers(tmp_path):
    """Text that is kept has another key; a folder draws so by itself; a single file, which others fill up, is refused; a plan counts
    what is there."""
    plain, skipped = (load_base(ModelConfig(base="tiny-sd15", clip_skip=count)) for count in (0, 1))
    assert text_encoder_of(plain) != text_encoder_of(skipped)
    save_pipeline(skipped, tmp_path / "model")
    again = load_base(ModelConfig(base=str(tmp_path / "model")))
    assert text_encoder_of(again) == text_encoder_of(skipped)
    with pytest.raises(ConfigError, match=r"model.clip_skip has left out 1 of the text encoder's layers"):
        save_single_file(skipped, tmp_path / "model.safetensors")
    counts = {
        name: sum(p.numel() for p in model.text_encoders["text_encoder"].parameters())
        for name, model in (
            ("planned", build_unloaded(ModelConfig(base="tiny-sd15", clip_skip=1), torch.float32)),
            ("skipped", skipped),
            ("plain", plain),
        )
    }
    assert counts["planned"] == counts["skipped"] < counts["plain"]
    with pytest.raises(ConfigError, match="penultimate layer"):
        build_unloaded(ModelConfig(base="sdxl", clip_skip=1), torch.float32)
