"""Before a weight is read: whether the Hub's files fit on the disk, and the model into memory; both in numbers."""

import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from t2ilib.config import ConfigError, ModelConfig
from t2ilib.memory import MIB, available_memory
from t2ilib.models.families import FAMILIES
from t2ilib.models.files import locate
from t2ilib.models.files.locate import SHIPPED, check_folder, fetch_pipeline, folder_bytes, pipeline_weights
from t2ilib.models.files.single_file import save_single_file
from t2ilib.models.load import load_base

CPU = torch.device("cpu")
SDXL = FAMILIES["sdxl"]

FILES = {
    "model_index.json": 1,
    "unet/config.json": 2,
    "unet/diffusion_pytorch_model.safetensors": 1000 * MIB,
    "unet/diffusion_pytorch_model.fp16.safetensors": 500 * MIB,
    "unet/diffusion_pytorch_model.bin": 1000 * MIB,
    "vae/diffusion_pytorch_model.safetensors": 30 * MIB,
    "text_encoder/model-00001-of-00002.safetensors": 20 * MIB,
    "text_encoder/model-00002-of-00002.safetensors": 10 * MIB,
    "text_encoder_2/model.safetensors": 40 * MIB,
    "vae_decoder/model.safetensors": 9000 * MIB,
    "sd_xl_base_1.0.safetensors": 9000 * MIB,
}


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> dict:
    """A Hub with one repository of FILES and a disk with `free` MiB; `downloads` counts what was asked for."""
    state = {"free": 1300, "downloads": 0, "cached": ()}
    usage = namedtuple("usage", "total used free")

    def info(self, repository, revision=None, files_metadata=False):
        assert files_metadata
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in FILES.items()])

    def fetch(repository, **options):
        state["downloads"] += 1
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name, revision=None: name if name in state["cached"] else None,
    )
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.download", fetch)
    monkeypatch.setattr("t2ilib.memory.shutil.disk_usage", lambda path: usage(0, 0, state["free"] * MIB))
    return state


def test_a_model_that_the_disk_cannot_hold_is_not_downloaded(hub: dict) -> None:
    hub["free"] = 1200  # 1,100 MiB and a tenth to spare
    with pytest.raises(ConfigError) as error:
        fetch_pipeline("owner/name", ModelConfig(base="owner/name"), SDXL)
    message = str(error.value)
    assert message.startswith("model.base owner/name: its weights need 1,100 MiB under ")
    assert message.endswith("1,200 MiB are free: free some, or set HF_HOME to a folder on another disk")
    assert hub["downloads"] == 0


def test_what_is_cached_or_of_another_variant_does_not_count(hub: dict) -> None:
    hub["cached"] = ("unet/diffusion_pytorch_model.safetensors",)
    hub["free"] = 120
    fetch_pipeline("owner/name", ModelConfig(base="owner/name"), SDXL)
    hub["cached"] = ()
    with pytest.raises(ConfigError, match="its weights need 600 MiB"):
        fetch_pipeline("owner/name", ModelConfig(base="owner/name", variant="fp16"), SDXL)
    assert hub["downloads"] == 1


def test_a_hub_that_does_not_answer_leaves_it_to_the_download(hub: dict, monkeypatch) -> None:
    def fail(*args, **options):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    hub["free"] = 1
    fetch_pipeline("owner/name", ModelConfig(base="owner/name"), SDXL)
    assert hub["downloads"] == 1
    monkeypatch.setattr("diffusers.StableDiffusionXLPipeline.download", fail)
    with pytest.raises(ConfigError, match=r"model\.base owner/name could not be fetched \(ConnectError: no route\)"):
        fetch_pipeline("owner/name", ModelConfig(base="owner/name"), SDXL)


def test_a_variant_is_taken_where_a_part_has_it() -> None:
    names = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "other/model.safetensors",
    ]
    assert pipeline_weights(names, SDXL, None) == [names[0], names[4], names[6]]
    assert pipeline_weights(names, SDXL, "fp16") == [names[1], names[2], names[5], names[6]]


def test_the_bytes_of_a_folder_are_those_of_the_loaded_model() -> None:
    config = ModelConfig(dtype="bfloat16")
    needed = folder_bytes(check_folder(SHIPPED["tiny-sdxl"], SDXL, config), torch.bfloat16)
    components = load_base(config, CPU)
    loaded = sum(
        p.numel() * p.element_size() for m in (components.vae, *components.modules().values()) for p in m.parameters()
    )
    assert needed == loaded


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_model_that_memory_cannot_hold_is_not_read(tmp_path: Path, monkeypatch, kind: str) -> None:
    components = load_base(ModelConfig(), CPU)
    needed = sum(p.numel() * 4 for m in (components.vae, *components.modules().values()) for p in m.parameters())
    options = {}
    if kind == "file":
        save_single_file(components, tmp_path / "model.safetensors")
        options = {"base": str(tmp_path / "model.safetensors"), "config": "tiny-sdxl"}
    monkeypatch.setattr("t2ilib.memory.available_memory", lambda: needed - 1)
    words = f"needs {needed / MIB:,.0f} MiB of memory, and {(needed - 1) / MIB:,.0f} MiB are available: close other programs"
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_base(ModelConfig(**options), CPU)
    monkeypatch.setattr("t2ilib.memory.available_memory", lambda: needed)
    load_base(ModelConfig(**options), CPU)
    load_base(ModelConfig(**options, dtype="bfloat16"), CPU)


def test_a_chosen_vae_counts_too(tmp_path: Path, monkeypatch) -> None:
    save_file(
        load_file(SHIPPED["tiny-sdxl"] / "vae" / "diffusion_pytorch_model.safetensors"), tmp_path / "v.safetensors"
    )
    monkeypatch.setattr("t2ilib.memory.available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"model\.vae .* MiB of memory"):
        load_base(ModelConfig(vae=str(tmp_path / "v.safetensors")), CPU)


def test_a_containers_limit_counts_as_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\nactive_file 50000\n")
    assert available_memory(tmp_path) == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 10**7
    assert available_memory(tmp_path / "none") > 10**7


def test_hub_ids_folders_and_files_are_told_apart(tmp_path: Path) -> None:
    assert locate.locate("owner/name") == "owner/name"
    assert locate.locate(str(tmp_path)) == str(tmp_path)
    assert locate.locate("tiny-sdxl") == str(SHIPPED["tiny-sdxl"])
    (tmp_path / "model.safetensors").touch()
    assert locate.locate(str(tmp_path / "model.safetensors")) == str(tmp_path / "model.safetensors")
    for name in ("owner/name.safetensors", "models/old.ckpt"):
        with pytest.raises(ConfigError, match="there is no such file"):
            locate.locate(name)
    with pytest.raises(ConfigError, match="Did you mean 'tiny-sdxl'"):
        locate.locate("tiny-sdlx")
