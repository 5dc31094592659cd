"""The tiny models: real diffusers pipelines small enough to ship and to train on a CPU.

`tiny-sdxl` has every part that SDXL has, under the same class and module names: two CLIP text encoders (the second with a
projection) with tokenizers of their own small vocabulary, a factor-8 AutoencoderKL, and a UNet with `text_time`
conditioning and transformer blocks with linear projections. All linear widths are multiples of 64, so NF4 quantizes them.
A `clip` folder beside them holds the whole contrastive model, for scoring pictures offline.

`tiny-sd15` is a Stable Diffusion 1.5 in the same way: one text encoder whose last hidden state is read, convolutional
projections around its transformer blocks. It shares the autoencoder and the first text encoder with tiny-sdxl, so of it only
the UNet is trained, and its pictures are scored with tiny-sdxl's `clip`.

`build` writes tiny-sdxl's folder with random weights; the training loop fills it (`trains: vae`, `clip`); both UNets are of the size `tiny`
and trained from scratch, as any other is; `pack` rounds a model to half precision for shipping.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from t2ilib.config import ConfigError
from t2ilib.models import sizes
from t2ilib.models.pipeline import quiet_libraries
from t2ilib.models.sizes import Surroundings
from t2ilib.seeds import seed_for
from t2ilib.shapes import world

MAX_TOKENS = 32
PROJECTION = 128
TEXT_WIDTHS = {"text_encoder": (64, 3), "text_encoder_2": (128, 3)}
"""Text encoder -> hidden size and number of layers."""

WORDS = (
    "a an the of at in on is there with and drawn as style picture photo painting drawing sketch small large big tiny huge "
    "tilted upright background heart star striped dotted plain blueprint top bottom left right center middle orange pink "
    "brown circle square triangle cross"
)


def build(folder: Path, seed: int = 0) -> None:
    """Writes the pipeline folder of tiny-sdxl with random weights."""
    import diffusers
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed_for(seed, "tiny weights"))
    tokenizer = build_tokenizer()
    text = {name: build_text_encoder(name, tokenizer) for name in TEXT_WIDTHS}
    clip = CLIPModel(
        CLIPConfig(
            text_config=text["text_encoder_2"].config.to_dict(),
            vision_config={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": world.RESOLUTION,
                "patch_size": 8,
                "projection_dim": PROJECTION,
                "hidden_act": "gelu",
            },
            projection_dim=PROJECTION,
        )
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=build_vae(),
        unet=build_unet(),
        scheduler=build_scheduler(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **text,
    )
    with quiet_libraries():
        pipeline.save_pretrained(folder)
        save_clip(clip, tokenizer, folder / "clip")


def save_clip(clip: nn.Module, tokenizer, folder: Path) -> None:
    """The whole contrastive model with its tokenizer and the pixel range it was trained on, [-1, 1]."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


def build_tokenizer():
    """A CLIP tokenizer whose vocabulary holds the world's words, some others, and every byte for the rest."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    values = (*world.SHAPES, *world.COLORS, *world.SIZES, *world.POSITIONS, *world.BACKGROUNDS, *world.TILTS)
    corpus = sorted({word for value in (*values, WORDS) for word in value.split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([word for word in corpus for _ in range(8)], trainer)
    state = json.loads(bpe.to_str())["model"]
    vocabulary = dict(state["vocab"])
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(character + "</w>", len(vocabulary))
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in state["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def build_text_encoder(name: str, tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, layers = TEXT_WIDTHS[name]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=PROJECTION,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)


def build_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=world.RESOLUTION,
        force_upcast=True,
    )


def build_unet(name: str = "tiny-sdxl") -> nn.Module:
    """The size `tiny`, between the parts of a tiny model."""
    width, _ = TEXT_WIDTHS["text_encoder"]
    latents = {"channels": 4, "side": world.RESOLUTION // 8}
    around = {
        "tiny-sdxl": Surroundings(width + TEXT_WIDTHS["text_encoder_2"][0], PROJECTION, **latents),
        "tiny-sd15": Surroundings(width, None, **latents),
    }
    return sizes.build_unet("tiny", around[name])


def build_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def pack(source: Path, target: Path, card: str) -> int:
    """Writes `source` in half precision to `target` with its model card; returns the bytes of the whole folder."""
    import diffusers
    from transformers import CLIPModel, CLIPTokenizer

    if target.exists():
        if not (target / "model_index.json").exists():
            raise ConfigError(f"{target} exists and is not a pipeline folder: name another one")
        shutil.rmtree(target)
    with quiet_libraries():
        diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16).save_pretrained(target)
        if (source / "clip").is_dir() and (source / "text_encoder_2").is_dir():  # whose contrastive model it is
            clip = CLIPModel.from_pretrained(source / "clip", dtype=torch.float16)
            save_clip(clip, CLIPTokenizer.from_pretrained(source / "clip"), target / "clip")
    declare_float32(target)
    (target / "README.md").write_text(card)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def declare_float32(folder: Path) -> None:
    """Has transformers load the packed half-precision weights as float32, as diffusers does with the other parts: half
    precision is how they are stored, not how a CPU should compute."""
    for path in (*folder.glob("text_encoder*/config.json"), *folder.glob("clip/config.json")):
        config = json.loads(path.read_text())
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
