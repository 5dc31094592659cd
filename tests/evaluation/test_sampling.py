"""Drawing: a picture depends on its own prompt and place, not on its company; grids show what they should."""

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.config import EvaluationConfig, ModelConfig
from t2ilib.evaluation.clip import clip_score
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.sampling import draw, load_pictures, make_grid, save_pictures
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run

SETTINGS = EvaluationConfig(num_inference_steps=2, guidance_scale=2.0)
PROMPTS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def components():
    return load_base(ModelConfig(base="tiny-sdxl"))


def test_pictures_do_not_depend_on_the_batch(components) -> None:
    together = draw(components, PROMPTS, SETTINGS)
    alone = draw(components, PROMPTS, SETTINGS, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_same_seed_same_picture_other_seed_another(components) -> None:
    first, again, other = (np.asarray(draw(components, PROMPTS[:1], SETTINGS, seed=seed)[0], int) for seed in (0, 0, 1))
    assert (first == again).all()
    assert abs(first - other).max() > 8


def test_drawing_leaves_training_mode_as_it_was(components) -> None:
    components.unet.train()
    draw(components, PROMPTS[:1], SETTINGS)
    assert components.unet.training
    components.unet.eval()


def test_the_vae_takes_a_few_pictures_at_a_time_and_gives_the_same(components, monkeypatch) -> None:
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = (127.5 + 40 * noise).clamp(0, 255).to(torch.uint8)
    latents, pictures = components.encode_pictures(pixels), None
    with torch.no_grad():
        whole = components.vae.encode(pixels / 127.5 - 1).latent_dist.mode() * components.vae.config.scaling_factor
        pictures = components.decode_latents(latents)
        assert torch.allclose(latents, whole, atol=1e-5)
        monkeypatch.setattr("t2ilib.models.components.VAE_PIXELS", 64 * 64)
        sizes = []
        hook = components.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        assert torch.allclose(components.encode_pictures(pixels), whole, atol=1e-5)
        assert torch.allclose(components.decode_latents(latents), pictures, atol=1e-5)
        hook.remove()
    assert sizes == [1, 1, 1, 1]


def test_tiles_are_what_was_asked_and_leave_nothing_behind(components) -> None:
    vae, sides = components.vae, []
    latents = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: sides.append(max(inputs[0].shape[-2:])))
    with torch.no_grad():
        tiled, whole = components.decode_latents(latents, tiled=True), components.decode_latents(latents)
        small = components.decode_latents(latents[..., :8, :8], tiled=True)
        same = components.decode_latents(latents[..., :8, :8])
    hook.remove()
    assert sides == [32, 32, 32, 16, 40, 8, 8]  # two by two, 24 apart: the last row and column are 16 high and wide
    assert tiled.shape == whole.shape
    assert torch.equal(small, same), "a picture that fits one tile is decoded whole"
    assert not vae.use_tiling


def test_grid_places_pictures_and_labels() -> None:
    colors = [["red", "green"], ["blue", "white"]]
    rows = [[Image.new("RGB", (8, 8), color) for color in row] for row in colors]
    grid = make_grid(rows, ["base", "step 10"], ["a prompt that is long enough to be wrapped", "short"], cell=64)
    seen = {grid.getpixel((x, y)) for x in range(0, grid.width, 4) for y in range(0, grid.height, 4)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= seen
    right = grid.width - 6 - 32
    assert grid.getpixel((right, grid.height - 64 * 2 - 12 + 20)) == (0, 128, 0)


def test_a_wide_grid_goes_on_below() -> None:
    rows = [[Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]] * 2
    wide, folded = (make_grid(rows, ["a", "b"], ["one", "two", "three"], cell=32, most_columns=n) for n in (3, 2))
    assert folded.width < wide.width
    assert folded.height == 2 * wide.height
    below = {folded.getpixel((x, y)) for x in range(folded.width) for y in range(wide.height, folded.height)}
    assert (0, 0, 255) in below
    assert (255, 0, 0) not in below


def test_pictures_come_back_in_order(tmp_path) -> None:
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(11)]
    save_pictures(pictures, tmp_path)
    assert [picture.getpixel((0, 0))[0] for picture in load_pictures(tmp_path)] == list(range(11))


def test_clip_score_is_the_cosine_of_transformers(components) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPModel

    from t2ilib.models.files.locate import SHIPPED

    folder = SHIPPED["tiny-sdxl"] / "clip"
    clip, tokenizer = CLIPModel.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)
    picture = draw(components, PROMPTS[:1], SETTINGS)[0]
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    ids = tokenizer(PROMPTS[0], padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image / clip.logit_scale.exp()
    assert clip_score(clip, tokenizer, [picture], PROMPTS[:1]) == pytest.approx(100 * max(0.0, float(logits)), abs=1e-2)


def test_measure_writes_what_it_found(components, tmp_path) -> None:
    settings = {"num_inference_steps": 2}
    run = build_run(
        {
            "output": str(tmp_path),
            "adapter": {},
            "data": {"source": "shapes"},
            "shapes": {"scenes": ["heart"], "checked_prompts": 6},
            "evaluation": settings,
        }
    )
    metrics = measure(run, components, metrics={"held_out_loss": 0.5, "peak_process_mib": 1.0})
    assert metrics["held_out_loss"] == 0.5
    assert metrics["peak_process_mib"] == metrics["memory/measuring/peak_process_mib"] > 100
    for name in (
        "concept/all",
        "concept/shown",
        "concept/heart",
        "concept/chance",
        "base_kept/all",
        "clip_score/concept",
    ):
        assert name in metrics
    assert len(load_pictures(tmp_path / "pictures")) == 8
