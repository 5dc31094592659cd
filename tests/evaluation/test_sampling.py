"""Drawing: a picture depends on its own prompt and place, not on its company; grids show what they should."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from t2ilib.config import EvaluationConfig, ModelConfig
from t2ilib.evaluation.clip import clip_scores
from t2ilib.evaluation.measures import measure
from t2ilib.evaluation.sampling import draw, free_path, load_pictures, make_grid, save_pictures
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline
from t2ilib.runfile import build_run
from t2ilib.seeds import generator_for

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


def test_a_negative_prompt_is_the_pipelines_own(components) -> None:
    """For every picture of every batch; an empty one leaves the base's way of saying nothing, which for SDXL is zeros."""
    away = SETTINGS.model_copy(update={"negative_prompt": "a red circle"})
    ours = draw(components, PROMPTS, away, batch_size=2)
    pipeline = build_pipeline(components)
    for number, (prompt, picture) in enumerate(zip(PROMPTS, ours, strict=True)):
        generator = generator_for(0, "picture", number)
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator}
        theirs = pipeline(prompt, negative_prompt="a red circle", **options).images[0]
        assert abs(np.asarray(picture, int) - np.asarray(theirs, int)).max() <= 1
    plain = draw(components, PROMPTS[1:2], SETTINGS, first=1)[0]
    assert abs(np.asarray(ours[1], int) - np.asarray(plain, int)).max() > 8


def test_noise_by_address_sides_and_another_sampler_are_the_pipelines_own(components) -> None:
    """Pictures of several seeds in one batch, wide, by another scheduler, which the base's own does not notice."""
    scheduler, before = EulerDiscreteScheduler.from_config(components.scheduler.config), components.scheduler
    noise = [(3, 1), (4, 0)]
    ours = draw(components, PROMPTS[:2], SETTINGS, size=(96, 64), noise=noise, scheduler=scheduler)
    pipeline = build_pipeline(components)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(components.scheduler.config)
    for prompt, picture, (seed, number) in zip(PROMPTS, ours, noise, strict=False):
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator_for(seed, "picture", number)}
        theirs = pipeline(prompt, width=96, height=64, **options).images[0]
        assert picture.size == theirs.size == (96, 64)
        assert abs(np.asarray(picture, int) - np.asarray(theirs, int)).max() <= 1
    assert components.scheduler is before


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


def test_a_grid_keeps_proportions_and_long_labels_in_their_place() -> None:
    rows = [[Image.new("RGB", (64, 32), "red"), Image.new("RGB", (16, 32), "blue")]]
    words = "a label of a row that is so long that it would push the pictures out of sight, and goes on"
    grid = make_grid(rows, [words], ["", ""], cell=128)
    red = [(x, y) for x in range(grid.width) for y in range(grid.height) if grid.getpixel((x, y)) == (255, 0, 0)]
    blue = [(x, y) for x in range(grid.width) for y in range(grid.height) if grid.getpixel((x, y)) == (0, 0, 255)]
    assert len(red) == 128 * 64
    assert len(blue) == 64 * 128
    assert min(x for x, _ in red) <= 240 + 12, "the label is wrapped"
    assert min(x for x, _ in blue) - min(x for x, _ in red) == 128 + 6


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


def test_pictures_are_written_behind_others_with_their_texts(tmp_path) -> None:
    pictures, texts = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(2)], [{"a": "é, ü"}, {"a": "猫", "b": "x\ny"}]
    assert [path.name for path in save_pictures(pictures, tmp_path, after=True, texts=texts)] == ["00.png", "01.png"]
    (tmp_path / "grid-07.png").touch()
    (again,) = save_pictures(pictures[:1], tmp_path, after=True)
    assert again.name == "02.png"
    found = [Image.open(tmp_path / f"0{i}.png").info for i in range(3)]
    assert [{key: text for key, text in info.items() if key in "ab"} for info in found] == [*texts, {}]
    raw = (tmp_path / "00.png").read_bytes(), (tmp_path / "01.png").read_bytes()
    assert b"tEXta\0" + "é, ü".encode("latin-1") in raw[0], "where it can, as every program reads it"
    assert b"iTXta\0" in raw[1]


def test_a_free_path_is_taken_once(tmp_path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "04.png").touch()
    (tmp_path / "new" / "05-base.png").touch()
    assert [free_path(tmp_path / "new").name for _ in range(2)] == ["05.png", "06.png"]


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
    assert clip_scores(clip, tokenizer, [picture], PROMPTS[:1])[0] == pytest.approx(
        100 * max(0.0, float(logits)), abs=1e-2
    )


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
