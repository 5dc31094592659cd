"""Embedding models: real classes with random weights, prepared and read as the libraries' own code does it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.evaluation.clip import clip_scores, load_clip
from t2ilib.evaluation.embeddings import (
    Thumbnails,
    embedders,
    embedding_models,
    lacks_models,
    load_embedder,
    read_preparation,
    vectors_of,
)
from t2ilib.models.pipeline import clip_folder
from t2ilib.runfile import build_run

CPU = torch.device("cpu")
DINO = {  # as facebook/dinov2-base has it, smaller
    "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
    "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}, "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}


def run_of(**evaluation):
    return build_run({"adapter": {}, "evaluation": evaluation})


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((64, 64), (40, 71), (90, 33))
    ]


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "DINOv2-small"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(patch_size=14, **SIZES)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINO))
    return folder


def test_pictures_are_prepared_as_the_models_own_processors_do(pictures, dino: Path, tmp_path: Path) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = {
        "size": 224,
        "crop_size": 224,
        "resample": 3,
        "do_center_crop": True,
        "do_resize": True,
    }  # as openai's has it
    clip |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    for folder, processor in ((dino, BitImageProcessorPil(**DINO)), (tmp_path, CLIPImageProcessorPil(**clip))):
        prepare = read_preparation(folder, 224)
        theirs = processor(pictures, return_tensors="np")["pixel_values"]
        ours = np.stack([prepare(picture) for picture in pictures])
        assert np.abs(ours - np.asarray(theirs)).max() < 1e-5


def test_dinov2_gives_its_class_token(pictures, dino: Path) -> None:
    from transformers import AutoModel

    embedder = load_embedder("dinov2-small", str(dino), CPU)
    found = embedder(pictures)
    assert found.shape == (3, 32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3))
    pixels = torch.from_numpy(np.stack([embedder.prepare(picture) for picture in pictures]))
    with torch.no_grad():
        token = AutoModel.from_pretrained(dino)(pixels).pooler_output  # the class token after the last norm
    assert found == pytest.approx(torch.nn.functional.normalize(token, dim=-1).numpy(), abs=1e-5)


def test_dinov2_with_registers_is_read_too(pictures, tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, **SIZES)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINO))
    assert load_embedder("it", str(tmp_path), CPU)(pictures).shape == (3, 32)
    assert load_embedder("it", f"{tmp_path}:patches", CPU)(pictures).shape == (3, 4 * 32), "without the registers"


def test_patches_tell_where_something_is(dino: Path) -> None:
    """Of two pictures that differ in one of four patches, three are alike: with other positions left out of it, exactly."""
    from transformers import AutoModel

    corner = Image.new("RGB", (28, 28), "black")
    corner.paste("white", (0, 0, 14, 14))
    pictures = [corner, corner.rotate(180)]
    whole = load_embedder("it", f"{dino}:patches", CPU)
    assert whole.prepare(corner).shape == (3, 28, 28)
    found = whole(pictures)
    pixels = torch.from_numpy(np.stack([whole.prepare(picture) for picture in pictures]))
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(dino)(pixels).last_hidden_state[:, 1:]
    flat = tokens.reshape(2, -1).numpy()
    assert found == pytest.approx(flat / np.linalg.norm(flat, axis=1, keepdims=True), abs=1e-5)
    one = load_embedder("it", str(dino), CPU)(pictures)
    assert float(found[0] @ found[1]) < float(one[0] @ one[1]), "its one vector says less of where"


def test_a_clip_gives_what_its_score_is_made_of(pictures) -> None:
    """The shipped one: its picture's vector, times the text's, is the CLIP score."""
    run = run_of()
    (embedder,) = embedders(run_of(embedding_models=[str(clip_folder("tiny-sdxl"))]), CPU, {})
    model, tokenizer = load_clip(run, CPU)
    square = [picture.resize((64, 64)) for picture in pictures]
    ids = tokenizer(
        ["a red circle"], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        text = torch.nn.functional.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)[0]
    scores = 100 * np.maximum(embedder(square) @ text.double().numpy(), 0)
    assert scores == pytest.approx(clip_scores(model, tokenizer, square, ["a red circle"] * 3), abs=1e-3)
    assert embedder.prepare.side == 64


def test_which_models_a_run_has(dino: Path) -> None:
    assert embedding_models(run_of()) == {"clip-patches": f"{clip_folder('tiny-sdxl')}:patches"}
    assert embedding_models(run_of(clip_model="owner/Some-CLIP")) == {"some-clip": "owner/Some-CLIP"}
    named = embedding_models(run_of(embedding_models=[str(dino), "owner/clip"], clip_model="owner/other"))
    assert list(named) == ["dinov2-small", "clip"]
    other = build_run({"adapter": {}, "model": {"base": "owner/name"}})
    assert lacks_models(other) == "set evaluation.embedding_models, since no CLIP lies beside its base"
    assert lacks_models(run_of()) is None
    with pytest.raises(ConfigError, match="one/dino and two/dino would both be called dino"):
        embedding_models(run_of(embedding_models=["one/dino", "two/dino"]))


def test_what_cannot_be_loaded_is_told(dino: Path, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    with pytest.raises(ConfigError, match="'nowhere' is neither a folder nor a Hub id such as facebook/dinov2-base"):
        load_embedder("it", "nowhere", CPU)
    with pytest.raises(ConfigError, match=r"evaluation.embedding_models facebook/dinov2-base .*HF_HUB_OFFLINE"):
        load_embedder("it", "facebook/dinov2-base", CPU)
    with pytest.raises(ConfigError, match=r"holds no config.json and no preprocessor_config.json"):
        load_embedder("it", str(tmp_path), CPU)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINO))
    with pytest.raises(
        ConfigError, match="is a ResNetModel, whose pictures have no class token: take DINOv2 or a CLIP"
    ):
        load_embedder("it", str(tmp_path), CPU)


def test_a_list_of_pictures_is_looked_at_once(pictures) -> None:
    calls, shared = [], {}

    class Counting:
        name = "counting"

        def __call__(self, given):
            calls.append(len(given))
            return np.eye(len(given))

    base = pictures[:2]
    for _ in range(2):
        assert vectors_of(Counting(), pictures, shared).shape == (3, 3)
        assert vectors_of(Counting(), base, shared).shape == (2, 2)
    assert calls == [3, 2]
    vectors_of(Counting(), pictures[:1], shared)
    assert calls == [3, 2, 1]
    assert len(shared["vectors"]["counting"]) == 2, "pictures of every checkpoint would fill the memory"


def test_thumbnails_are_alike_where_pictures_are_painted_alike() -> None:
    left = Image.new("RGB", (64, 64), "black")
    left.paste("white", (0, 0, 32, 64))
    found = Thumbnails()([left, left.resize((256, 256)), left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert found @ found.T == pytest.approx(np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]), abs=0.05)
