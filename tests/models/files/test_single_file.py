"""Single-file checkpoints: what is written is read back bit for bit by diffusers, trains as its folder does, or is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from t2ilib.adapters.attach import attach_adapters
from t2ilib.cli import app
from t2ilib.config import AdapterSpec, ConfigError, EvaluationConfig, ModelConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components
from t2ilib.models.families import FAMILIES
from t2ilib.models.files import layouts, original
from t2ilib.models.files.layouts import build_layout
from t2ilib.models.files.locate import SHIPPED, conversion
from t2ilib.models.files.single_file import VOCABULARY, original_tensors, original_unet_names, save_single_file
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import save_pipeline
from t2ilib.runfile import build_run
from t2ilib.training.loop import NonFiniteLoss, train

CPU = torch.device("cpu")
SETTINGS = EvaluationConfig(num_inference_steps=2)

SMALL_SD15 = {
    "unet": {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64, 64),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "sample_size": 16,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "vocab_size": 2048,
    },
}


def small_sd15(name: str) -> Components:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED["tiny-sdxl"] / "tokenizer")
    config = SMALL_SD15["text_encoder"] | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Components(
        family=FAMILIES["sd15"],
        path=name,
        unet=diffusers.UNet2DConditionModel(**SMALL_SD15["unet"]),
        vae=diffusers.AutoencoderKL(**SMALL_SD15["vae"]),
        text_encoders={"text_encoder": CLIPTextModel(CLIPTextConfig(**config))},
        tokenizers={"tokenizer": tokenizer},
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Name -> folder and single file of the same model."""
    place = tmp_path_factory.mktemp("models")
    folders = {"sdxl": SHIPPED["tiny-sdxl"], "sd15": place / "sd15"}
    save_pipeline(small_sd15("small"), folders["sd15"])
    for name, folder in folders.items():
        save_single_file(load_base(ModelConfig(base=str(folder)), CPU), place / f"{name}.safetensors")
    return {name: (folder, place / f"{name}.safetensors") for name, folder in folders.items()}


def states(components: Components) -> dict[str, torch.Tensor]:
    modules = {**components.modules(), "vae": components.vae}
    return {f"{name}.{key}": x for name, module in modules.items() for key, x in module.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[key].dtype and torch.equal(x, theirs[key]) for key, x in ours.items()
    )


def refused(base: str | Path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        load_base(ModelConfig(base=str(base), **options), CPU)
    return str(error.value)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_diffusers_itself_reads_every_tensor_back_bit_for_bit(models, name: str) -> None:
    folder, file = models[name]
    kind = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd15": diffusers.StableDiffusionPipeline}[name]
    pipeline = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    base = load_base(ModelConfig(base=str(folder)), CPU)
    for part, module in {**base.modules(), "vae": base.vae}.items():
        assert same(module.state_dict(), getattr(pipeline, part).state_dict()), part
        assert any(x.ndim and float(x.float().std()) > 0 for x in module.state_dict().values())


def test_what_is_done_to_the_weights_leaves_the_file_alone(models, tmp_path: Path) -> None:
    """The weights may be a view of the file: training them in place, or quantizing them, must not write to it."""
    folder, file = models["sdxl"]
    before = file.read_bytes()
    with torch.no_grad():
        for parameter in load_base(ModelConfig(base=str(file), config="tiny-sdxl"), CPU).unet.parameters():
            parameter.add_(1)
    loaded, own = (
        load_base(ModelConfig(quantization="nf4", **place), CPU)
        for place in ({"base": str(file), "config": "tiny-sdxl"}, {"base": str(folder)})
    )
    assert same(states(loaded), states(own))
    assert file.read_bytes() == before


def test_the_safety_checker_of_a_published_folder_is_not_asked_for(models, tmp_path: Path) -> None:
    shutil.copytree(models["sd15"][0], tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    listed = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | listed | {"requires_safety_checker": True}))
    components = load_base(ModelConfig(base=str(tmp_path / "model")), CPU)
    assert len(draw(components, ["a red circle"], SETTINGS)) == 1
    loaded = load_base(ModelConfig(base=str(models["sd15"][1]), config=str(tmp_path / "model")), CPU)
    assert same(states(loaded), states(components))


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_the_file_is_the_folder_weights_and_pictures(models, name: str) -> None:
    folder, file = models[name]
    ours = load_base(ModelConfig(base=str(file), config=str(folder)), CPU)
    theirs = load_base(ModelConfig(base=str(folder)), CPU)
    assert same(states(ours), states(theirs))
    assert ours.family is theirs.family
    assert ours.zero_empty == theirs.zero_empty
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert ours.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
    prompts = ["a red circle", "a blue square"]
    pictures = [[p.tobytes() for p in draw(model, prompts, SETTINGS)] for model in (ours, theirs)]
    assert pictures[0] == pictures[1]
    assert pictures[0][0] != pictures[0][1]


@pytest.mark.parametrize(("name", "prefix"), [("sd15", "cond_stage_model."), ("sdxl", "conditioner.embedders.0.")])
def test_text_encoders_without_text_model_in_their_names_load(models, tmp_path: Path, name: str, prefix: str) -> None:
    """As some converters write them: the same weights under shorter names, with the old buffer of positions among them."""
    folder, file = models[name]
    bare = {
        key.replace(f"{prefix}transformer.text_model.", f"{prefix}transformer."): x
        for key, x in load_file(file).items()
    }
    assert sum(key.startswith(f"{prefix}transformer.encoder.layers.") for key in bare) >= 32
    bare[f"{prefix}transformer.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(bare, tmp_path / "bare.safetensors")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (
            load_base(ModelConfig(base=str(base), config=str(folder), dtype=dtype), CPU)
            for base in (tmp_path / "bare.safetensors", file)
        )
        assert same(states(ours), states(theirs))
        with torch.no_grad():
            encoded = [model.encode_text(["a red circle"]) for model in (ours, theirs)]
        assert same(*encoded)


def test_what_lies_beside_the_weights_is_left_alone(models, tmp_path: Path) -> None:
    """An average of the UNet, the old buffer of positions, the schedule and the logit scale, as published files have them."""
    folder, file = models["sd15"]
    tensors = load_file(file)
    average = {
        f"model_ema.diffusion_model{key.removeprefix('model.diffusion_model').replace('.', '')}": x + 1
        for key, x in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    assert len(average) > 100  # from how many on diffusers takes them for an average
    others = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "alphas_cumprod": torch.ones(1000, dtype=torch.float64),
        "betas": torch.ones(1000),
    }
    save_file(tensors | average | others, tmp_path / "full.safetensors")
    loaded = load_base(ModelConfig(base=str(tmp_path / "full.safetensors"), config=str(folder)), CPU)
    assert same(states(loaded), states(load_base(ModelConfig(base=str(folder)), CPU)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_whatever_precision_a_file_is_stored_in_it_is_loaded_in_the_one_asked_for(models, tmp_path, stored) -> None:
    folder, file = models["sd15"]
    save_file({name: x.to(stored) for name, x in load_file(file).items()}, tmp_path / "small.safetensors")
    full = states(load_base(ModelConfig(base=str(folder)), CPU))
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        base = ModelConfig(base=str(tmp_path / "small.safetensors"), config=str(folder), dtype=name)
        expected = {key: x.to(stored).to(torch.float32 if key.startswith("vae.") else dtype) for key, x in full.items()}
        assert same(states(load_base(base, CPU)), expected)


def test_weights_that_are_not_numbers_stop_a_run_at_its_first_step(models, tmp_path: Path) -> None:
    folder, file = models["sdxl"]
    tensors = load_file(file)
    name = "model.diffusion_model.out.2.bias"
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, tmp_path / "broken.safetensors")
    values = {
        "output": str(tmp_path / "run"),
        "model": {"base": str(tmp_path / "broken.safetensors"), "config": str(folder)},
        "adapter": {"rank": 2},
        "data": {"source": "shapes"},
        "shapes": {"num_pictures": 4},
        "training": {"steps": 3, "batch_size": 2},
        "evaluation": {"validation_timesteps": 1, "prompts": ["a red circle"], "num_inference_steps": 1},
    }
    with pytest.raises(NonFiniteLoss, match=r"the loss of 2 sample\(s\) is not finite at step 0"):
        train(build_run(values))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_endings_in_capitals_are_endings(models, tmp_path: Path) -> None:
    """Of a model, of a VAE, and of what is written; a pickle in capitals is a pickle."""
    folder, file = models["sdxl"]
    model, vae = tmp_path / "MODEL.SAFETENSORS", tmp_path / "vae.SafeTensors"
    shutil.copyfile(file, model)
    (tmp_path / "MODEL.safetensors").write_bytes(b"another file")
    own = load_base(ModelConfig(base=str(folder)), CPU)
    weights = {f"first_stage_model.{key}": x + 1 for key, x in own.vae.state_dict().items()}
    save_file(weights, vae)
    loaded = load_base(ModelConfig(base=str(model), config=str(folder)), CPU)
    assert same(states(loaded), states(own))
    chosen = load_base(ModelConfig(base=str(folder), vae=str(vae)), CPU)
    assert same(chosen.vae.state_dict(), {key.removeprefix("first_stage_model."): x for key, x in weights.items()})
    save_single_file(own, tmp_path / "written.SAFETENSORS")
    assert same(load_bytes((tmp_path / "written.SAFETENSORS").read_bytes()), load_file(file))
    assert refused(tmp_path / "none.SAFETENSORS").endswith("none.SAFETENSORS: there is no such file")
    torch.save({}, tmp_path / "model.CKPT")
    assert "model.CKPT is a pickle" in refused(tmp_path / "model.CKPT")


def test_training_from_the_file_gives_the_losses_of_the_folder(models, tmp_path: Path) -> None:
    folder, file = models["sdxl"]
    losses, adapters = {}, {}
    for name, model in {"file": {"base": str(file), "config": "tiny-sdxl"}, "folder": {"base": str(folder)}}.items():
        run = build_run(
            {
                "output": str(tmp_path / name),
                "model": model,
                "adapter": {"rank": 2, "alpha": 2.0, "text_encoder_targets": "attention"},
                "data": {"source": "shapes"},
                "shapes": {"scenes": ["heart"], "num_pictures": 8},
                "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
                "evaluation": {
                    "validate_every": 2,
                    "validation_timesteps": 1,
                    "sample_every": 0,
                    "prompts": ["a red heart"],
                },
            }
        )
        metrics = train(run).metrics
        losses[name] = {k: v for k, v in metrics.items() if "loss" in k}
        adapters[name] = load_file(next((tmp_path / name).glob("adapter/*.safetensors")))
    assert losses["file"]
    assert losses["file"] == losses["folder"]
    assert same(adapters["file"], adapters["folder"])


def test_the_names_are_the_published_ones() -> None:
    """Against the published files: 686 + 248 + 197 tensors in v1-5-pruned-emaonly and 1680 + 248 + 197 + 390 in
    sd_xl_base_1.0, of which position ids (both) and the logit scale (SDXL) have no place in the modules."""
    parts = {name: build_layout(name) for name in ("sd15", "sdxl")}
    tensors = {n: original_tensors({"vae": c.vae, **c.modules()}) for n, c in parts.items()}
    assert len(tensors["sd15"]) == 686 + 248 + 197 - 1
    assert len(tensors["sdxl"]) == 1680 + 248 + 197 - 1 + 390 - 1
    names = original_unet_names(parts["sdxl"].unet)
    assert len(set(names.values())) == len(names)
    assert names["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert names["mid_block.resnets.0.conv1"] == "middle_block.0.in_layers.2"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["add_embedding.linear_1"] == "label_emb.0.0"
    assert original_unet_names(parts["sd15"].unet)["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    shapes = {n: {k: tuple(x.shape) for k, x in t.items()} for n, t in tensors.items()}
    assert shapes["sdxl"]["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] == (1280,)
    assert shapes["sdxl"]["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["sd15"]["model.diffusion_model.output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert shapes["sd15"]["first_stage_model.decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes["sd15"]["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)


def test_an_attached_adapter_leaves_the_names_as_they_were() -> None:
    components = load_base(ModelConfig(), CPU)
    before = original_unet_names(components.unet)
    attach_adapters(components, AdapterSpec(kind="dora", rank=2, targets="many"), seed=0)
    assert original_unet_names(components.unet) == before


def test_the_sizes_of_the_published_model_need_no_config(models, monkeypatch) -> None:
    folder, file = models["sd15"]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    small = SMALL_SD15 | {"text_encoder": SMALL_SD15["text_encoder"] | {"vocab_size": len(tokenizer)}}
    monkeypatch.setitem(layouts.LAYOUTS, "sd15", layouts.LAYOUTS["sd15"] | small)
    message = refused(file)
    assert f"holds no tokenizer, and that of {VOCABULARY} is not in the local cache" in message
    assert message.endswith("or set model.config to a diffusers folder that has tokenizers")
    cached = folder.parent / "nothing"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: {VOCABULARY: cached}[name])
    cached.mkdir()
    assert f"in {cached} has 2 tokens, not {len(tokenizer)}" in refused(file)
    cached = folder / "tokenizer"
    components = load_base(ModelConfig(base=str(file)), CPU)
    assert same(states(components), states(load_base(ModelConfig(base=str(folder)), CPU)))
    assert type(components.scheduler) is diffusers.PNDMScheduler


def test_sdxl_of_the_published_sizes_pads_its_second_encoder_as_it_was_trained(models, monkeypatch) -> None:
    folder, file = models["sdxl"]
    own = load_base(ModelConfig(), CPU)
    parts = {**own.text_encoders, "unet": own.unet, "vae": own.vae}
    configs = {
        name: {k: v for k, v in dict(c if name in ("unet", "vae") else c.to_dict()).items() if not k.startswith("_")}
        for name, c in ((name, part.config) for name, part in parts.items())
    }
    monkeypatch.setitem(layouts.LAYOUTS, "sdxl", layouts.LAYOUTS["sdxl"] | configs)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: folder / "tokenizer")
    components = load_base(ModelConfig(base=str(file)), CPU)
    assert same(states(components), states(own))
    assert components.zero_empty
    assert components.scheduler.config.prediction_type == "v_prediction"  # the file's mark
    assert type(components.scheduler) is diffusers.EulerDiscreteScheduler
    assert [components.tokenizers[name].pad_token for name in ("tokenizer", "tokenizer_2")] == ["<|endoftext|>", "!"]


def test_sd2_loads_by_its_config_and_says_so(models, tmp_path: Path, monkeypatch) -> None:
    folder, _ = models["sd15"]
    monkeypatch.setattr(original, "SD2_TEXT_WIDTH", 64)
    base = load_base(ModelConfig(base=str(folder)), CPU)
    save_single_file(base, tmp_path / "sd2.safetensors")
    assert "cond_stage_model.model.ln_final.weight" in load_file(tmp_path / "sd2.safetensors")
    message = refused(tmp_path / "sd2.safetensors")
    assert (
        "is an SD2 model, and its file does not say whether it predicts noise or velocity: set model.config" in message
    )
    loaded = load_base(ModelConfig(base=str(tmp_path / "sd2.safetensors"), config=str(folder)), CPU)
    assert same(states(loaded), states(base))


def test_marks_for_velocity_are_written_and_honoured(models, tmp_path: Path) -> None:
    folder, file = models["sd15"]
    assert "v_pred" in load_file(models["sdxl"][1])
    assert "v_pred" not in load_file(file)
    empty = torch.tensor([])
    save_file(load_file(file) | {"v_pred": empty}, tmp_path / "v.safetensors")
    save_file(load_file(file) | {"v_pred": empty, "ztsnr": empty}, tmp_path / "z.safetensors")
    velocity, zero = (
        load_base(ModelConfig(base=str(tmp_path / f"{name}.safetensors"), config=str(folder)), CPU).scheduler
        for name in "vz"
    )
    assert (type(velocity), velocity.config.prediction_type) == (diffusers.PNDMScheduler, "v_prediction")
    assert (type(zero), zero.config.prediction_type) == (diffusers.DDIMScheduler, "v_prediction")
    assert float(zero.alphas_cumprod[-1]) == 0.0
    assert float(velocity.alphas_cumprod[-1]) > 0.0
    assert not zero.config.clip_sample  # DDIM's own default cuts off what lies beyond [-1, 1], as latents do
    base = load_base(ModelConfig(base=str(folder)), CPU)
    base.noise_as("v_prediction", zero_terminal_snr=True)
    save_single_file(base, tmp_path / "written.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "written.safetensors").keys()


def test_half_precision_is_kept_but_for_the_vae(models, tmp_path: Path) -> None:
    folder, file = models["sdxl"]
    save_file({name: x.half() for name, x in load_file(file).items()}, tmp_path / "half.safetensors")
    loaded = load_base(ModelConfig(base=str(tmp_path / "half.safetensors"), config=str(folder), dtype="bfloat16"), CPU)
    assert {x.dtype for name, x in states(loaded).items() if not name.startswith("vae.")} == {torch.bfloat16}
    assert {x.dtype for x in loaded.vae.state_dict().values()} == {torch.float32}


def test_the_commands_take_a_file(models, tmp_path: Path) -> None:
    _, file = models["sdxl"]
    shape = ["--steps", "1", "--prompt", "a red circle"]
    for name, model in {"file": [str(file), "--config", "tiny-sdxl"], "folder": ["tiny-sdxl"]}.items():
        result = CliRunner().invoke(app, ["generate", "--model", *model, *shape, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    drawn = [Image.open(tmp_path / name / "00.png") for name in ("file", "folder")]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    result = CliRunner().invoke(app, ["adapters", str(file), "--config", "tiny-sdxl"])
    assert result.exit_code == 0, result.output
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k" in result.output
    result = CliRunner().invoke(app, ["adapters", str(file)])
    assert result.exit_code == 2
    assert "set model.config to a diffusers folder, tiny-sdxl or a Hub id" in result.output


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "is an adapter (a LoRA or one of its kin), not a model"),
        ({"unet.down_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "is an adapter"),
        ({"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": (4, 8)}, "is an SD3 model"),
        ({"double_blocks.0.img_attn.proj.weight": (4, 8)}, "is a Flux model"),
        ({"transformer_blocks.0.attn.add_q_proj.weight": (4, 8)}, "is an SD3 or Flux transformer"),
        ({"control_model.time_embed.0.weight": (4, 8)}, "is a ControlNet"),
        ({"conditioner.embedders.0.model.text_projection": (4, 8)}, "is the SDXL refiner"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 9, 3, 3)}, "is an inpainting model: its UNet takes 9"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 8, 3, 3)}, "is an editing model"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3)}, "a UNet without its text encoders"),
        ({"down_blocks.0.resnets.0.conv1.weight": (4, 8)}, "is only a UNet in diffusers' layout"),
        ({"decoder.conv_in.weight": (4, 8)}, "is only a VAE: give it as model.vae"),
        ({"embeddings.token_embedding.weight": (4, 8)}, "is only a text encoder: give the whole model"),
        ({"blocks.0.weight": (4, 8)}, "is no Stable Diffusion checkpoint (its tensors: blocks.0.weight, ...)"),
    ],
)
def test_what_is_no_base_model_is_named(tmp_path: Path, names: dict, words: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "x.safetensors")
    message = refused(tmp_path / "x.safetensors")
    assert message.startswith(f"model.base {tmp_path / 'x.safetensors'} ")
    assert words in message


def test_a_damaged_file_is_refused_before_it_is_read(models, tmp_path: Path) -> None:
    whole = models["sd15"][1].read_bytes()
    file = tmp_path / "x.safetensors"
    header = int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:-100])
    assert f"is cut off: it has {len(whole) - 100:,} of {len(whole):,} bytes" in refused(file)
    file.write_bytes(whole[: header // 2])
    assert "is damaged (it ends within its header): download it again" in refused(file)
    file.write_bytes(whole[:8] + b"x" * header + whole[8 + header :])
    assert "is damaged: download it again" in refused(file)
    for content in (b"", b"<html>not found</html>"):
        file.write_bytes(content)
        assert "is no safetensors file, or is damaged" in refused(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in refused(file)


def test_a_damaged_file_in_a_folder_is_refused_too(models, tmp_path: Path) -> None:
    shutil.copytree(models["sd15"][0], tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"model.base: {weights} is cut off" in refused(tmp_path / "model")


def test_a_pickle_is_refused_and_the_way_to_convert_it_works(models, tmp_path: Path) -> None:
    folder, file = models["sd15"]
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(file), "global_step": 7}, pickled)
    message = refused(pickled)
    assert "is a pickle, which can run any code when it is opened" in message
    assert conversion(pickled) in message
    script = conversion(pickled).removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", script], check=True)
    loaded = load_base(ModelConfig(base=str(pickled.with_suffix(".safetensors")), config=str(folder)), CPU)
    assert same(states(loaded), states(load_base(ModelConfig(base=str(folder)), CPU)))


def test_other_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "a single file must be .safetensors, not .gguf" in refused(tmp_path / "model.gguf")
    assert refused("models/none.safetensors") == "model.base models/none.safetensors: there is no such file"


def test_sizes_that_no_config_describes_are_refused(models, tmp_path: Path) -> None:
    _, file = models["sd15"]
    message = refused(file)
    assert "of the published model of its kind" in message
    assert "set model.config to a diffusers folder, tiny-sdxl or a Hub id" in message
    tensors = load_file(file)
    name = "model.diffusion_model.out.2.weight"
    save_file(tensors | {name: torch.zeros(4, 16, 3, 3)}, tmp_path / "sizes.safetensors")
    message = refused(tmp_path / "sizes.safetensors", config=str(models["sd15"][0]))
    assert f"{name} is 4 x 16 x 3 x 3, not 4 x 32 x 3 x 3" in message
    del tensors[name]
    save_file(tensors, tmp_path / "lacking.safetensors")
    message = refused(tmp_path / "lacking.safetensors", config=str(models["sd15"][0]))
    assert f"lacks 1 of the {len(tensors) + 1} tensors of model.config" in message
    assert name in message


def test_a_config_must_describe_the_file(models, tmp_path: Path) -> None:
    (sdxl_folder, sdxl), (sd15_folder, sd15) = models["sdxl"], models["sd15"]
    assert "is a StableDiffusionPipeline, but model.base" in refused(sdxl, config=str(sd15_folder))
    assert "is a file: give a diffusers folder" in refused(sd15, config=str(sdxl))
    assert "describes a single file, but model.base tiny-sdxl has configs" in refused("tiny-sdxl", config="tiny-sdxl")
    shutil.copytree(sdxl_folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    assert "is incomplete, it lacks tokenizer/vocab.json" in refused(sdxl, config=str(tmp_path / "configs"))


def test_what_the_layout_cannot_hold_is_not_written(tmp_path: Path) -> None:
    components = load_base(ModelConfig(), CPU)
    with pytest.raises(ConfigError, match="a single file is written as"):
        save_single_file(components, tmp_path / "model.ckpt")
    components.text_encoders["text_encoder_2"].config.hidden_size = 64
    with pytest.raises(ConfigError, match="both text encoders are 64 wide"):
        save_single_file(components, tmp_path / "model.safetensors")
    components.noise_as(beta_schedule="linear")
    with pytest.raises(ConfigError, match=r"trained by the betas linear, 0.0001 to 0.02: those who read it take"):
        save_single_file(components, tmp_path / "model.safetensors")
    components.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="cannot say that its UNet predicts sample"):
        save_single_file(components, tmp_path / "model.safetensors")
    attach_adapters(components, AdapterSpec(rank=2), seed=0)
    with pytest.raises(ConfigError, match="unet of tiny-sdxl carry an adapter"):
        save_single_file(components, tmp_path / "model.safetensors")
    quantized = load_base(ModelConfig(quantization="nf4"), CPU)
    with pytest.raises(ConfigError, match="is quantized"):
        save_single_file(quantized, tmp_path / "model.safetensors")
    other = diffusers.UNet2DConditionModel(**SMALL_SD15["unet"], time_cond_proj_dim=8)
    with pytest.raises(ConfigError, match=r"no place for time_embedding\.cond_proj of this UNet2DConditionModel"):
        original_unet_names(other)
    assert not list(tmp_path.iterdir())
