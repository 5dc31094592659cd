"""A run's folder on its way to the Hub: what goes along, what the card says, and an upload to a Hub on this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import serving
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from t2ilib.adapters.load import UNPROVEN, read_metadata
from t2ilib.cli import app
from t2ilib.config import ConfigError
from t2ilib.evaluation.measures import measure
from t2ilib.hub.card import matter
from t2ilib.hub.folder import prepare
from t2ilib.hub.upload import push
from t2ilib.models.files.locate import SHIPPED
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

TOKEN = "hf_" + "x" * 30


def trained(folder: Path, **sections) -> Path:
    """A short run over a base that is known by its place on this machine."""
    values = {
        "output": str(folder / "run"),
        "name": "hearts",
        "model": {"base": str(SHIPPED["tiny-sd15"].absolute())},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 4, "checked_prompts": 1},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {
            "validation_timesteps": 1,
            "prompts": ['a heart, "so": red', "a star"],
            "num_inference_steps": 1,
        },
    }
    run = build_run(
        {
            key: values.get(key, {}) | value if isinstance(value, dict) else value
            for key, value in (values | sections).items()
        }
    )
    result = train(run)
    measure(run, result.components, metrics=result.metrics)
    return run.output


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    spec = {
        "kind": "dora",
        "rank": 3,
        "alpha": 6.0,
        "ranks": {"to_k": 2},
        "trigger_words": ["zkw"],
        "text_encoder_targets": "attention",
    }
    return trained(tmp_path_factory.mktemp("adapter"), adapter=spec)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return trained(
        tmp_path_factory.mktemp("whole"), adapter=None, training={"steps": 2, "batch_size": 2, "trains": "unet"}
    )


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_adapter_is_ready_with_its_card_and_nothing_private(adapter: Path, tmp_path: Path) -> None:
    folder = prepare(adapter, "ann/hearts", "mit")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("README.md", "run.yaml", "pytorch_lora_weights.safetensors"),
        *("pictures/00.png", "pictures/01.png", "pictures/grid.png"),
    }
    for private in (str(adapter.parent), str(SHIPPED["tiny-sd15"].parent), "tracking"):
        assert private.encode() not in all_bytes(folder), private
    assert {"output", "tracking"}.isdisjoint(yaml.safe_load((folder / "run.yaml").read_text()))
    card = (folder / "README.md").read_text()
    front = front_of(card)
    assert (front["license"], front["library_name"], front["instance_prompt"]) == ("mit", "diffusers", "zkw")
    assert {"lora", "dora", "text-to-image"} <= {*front["tags"]}
    assert "base_model" not in front  # it is nothing that the Hub knows
    assert [item["text"] for item in front["widget"]] == ['a heart, "so": red', "a star"]
    for item in front["widget"]:
        Image.open(folder / item["output"]["url"]).verify()
    for told in (
        "rank 3, alpha 6",
        "`to_k` 2",
        "2 of 2 pictures",
        "DoRA",
        "`tiny-sd15` is not on the Hub",
        "`t2ilib.load_adapter`",
    ):
        assert told in card, told
    measured = json.loads((adapter / "metrics.json").read_text())
    assert f"| held-out loss | {measured['held_out_loss']:.4f} | lower is better |" in " ".join(card.split()).replace(
        "  ", " "
    )
    assert "—" not in card

    original = adapter / "adapter" / "pytorch_lora_weights.safetensors"
    sent = folder / original.name
    assert read_metadata(sent)["ss_sd_model_name"] == "tiny-sd15"
    assert all(torch.equal(tensor, load_file(original)[name]) for name, tensor in load_file(sent).items())
    told, said = read_metadata(sent), read_metadata(original)
    assert {name for name in said if told.get(name) != said[name]} == {"ss_sd_model_name"}


def test_a_base_of_the_hub_is_named_in_the_front_matter() -> None:
    run = build_run({"model": {"base": "stabilityai/stable-diffusion-xl-base-1.0"}, "adapter": {"kind": "lora"}})
    front = matter(run, {"pictures/00.png": "a cat"}, None)
    assert front["base_model"] == run.model.base
    assert "lora" in front["tags"]
    assert "dora" not in front["tags"]
    assert "license" not in front
    assert "instance_prompt" not in front


def test_a_model_is_a_folder_that_diffusers_loads(whole: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = prepare(whole, "ann/hearts")
    card = (folder / "README.md").read_text()
    front = front_of(card)
    assert "license" not in front
    assert "full-fine-tuning" in front["tags"]
    assert card.count("\n---\n") == 1
    for told in ("## Drawing", "## Training", "## Pictures", "## Results"):
        assert card.count(told) == 1, told
    assert str(SHIPPED["tiny-sd15"].parent).encode() not in all_bytes(folder)
    loaded = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    original = DiffusionPipeline.from_pretrained(whole / "model").unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


def test_what_is_not_whole_or_private_is_not_made(adapter: Path, whole: Path, tmp_path: Path) -> None:
    for source in (adapter, whole):
        shutil.copytree(source, tmp_path / source.parent.name, ignore=shutil.ignore_patterns("checkpoints", "hub"))
    own, model = tmp_path / adapter.parent.name, tmp_path / whole.parent.name
    with pytest.raises(ConfigError, match=r"is no run's folder: it has no run.yaml"):
        prepare(tmp_path, "ann/x")
    (model / "model" / "model_index.json").unlink()
    with pytest.raises(ConfigError, match="has no whole model: run `t2ilib train` to its end"):
        prepare(model, "ann/x")
    (own / "samples" / "step-000002" / "prompts.json").write_text(json.dumps([f"a heart {TOKEN}", "x"]))
    with pytest.raises(ConfigError, match=r"README.md, line \d+: an access token") as error:
        prepare(own, "ann/x")
    assert TOKEN not in str(error.value)
    assert not (own / "hub").exists()
    (own / "adapter" / UNPROVEN).write_text("a weight changed")
    with pytest.raises(ConfigError, match="marked as unproven: a weight changed"):
        prepare(own, "ann/x")
    shutil.rmtree(own / "adapter")
    with pytest.raises(ConfigError, match="no adapter at"):
        prepare(own, "ann/x")


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        _http.close_session()
        yield hub
        _http.close_session()


def test_the_command_shows_first_and_uploads_then_and_again(adapter: Path, hub) -> None:
    def t2ilib(*arguments: str):
        return CliRunner().invoke(app, ["push", str(adapter), "--to", "ann/hearts", *arguments])

    dry = t2ilib("--dry-run")
    assert dry.exit_code == 0, dry.output
    for told in (
        "pytorch_lora_weights.safetensors",
        "pictures/grid.png",
        "# hearts",
        "no licence",
        f"{adapter / 'hub'} is ready",
    ):
        assert told in dry.output, told
    assert hub.asked == []

    hub.refuse["POST", "/commit/"] = 403
    refused = t2ilib("--private")
    assert refused.exit_code == 2
    assert "may not write to ann/hearts (not today)" in " ".join(refused.output.split())
    done = t2ilib("--private")  # the repository is there, and empty
    assert done.exit_code == 0, done.output
    assert f"uploaded: {hub.address}/ann/hearts" in done.output
    assert hub.private["ann/hearts"]
    folder = adapter / "hub"
    sent = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.repositories["ann/hearts"] == sent
    assert t2ilib().exit_code == 0


def test_what_the_hub_refuses_is_one_sentence(tmp_path: Path, hub, monkeypatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "run.yaml").write_text("seed: 0\n")
    hub.repositories["ann/theirs"], hub.private["ann/theirs"] = {"model.bin": b"1", ".gitattributes": b""}, False
    with pytest.raises(
        ConfigError, match=r"ann/theirs exists, and holds files that t2ilib did not push \(model.bin\): choose"
    ):
        push(tmp_path, "ann/theirs")
    assert "run.yaml" not in hub.repositories["ann/theirs"]
    hub.repositories["ann/ours"], hub.private["ann/ours"] = {"run.yaml": b""}, False
    with pytest.raises(ConfigError, match="ann/ours exists and is public"):
        push(tmp_path, "ann/ours", private=True)
    push(tmp_path, "ann/ours")
    assert hub.repositories["ann/ours"]["run.yaml"] == b"seed: 0\n"
    for status, told in (
        (401, "does not know this token"),
        (403, "may not write to bob/x .* of a member of bob"),
        (404, "check 'bob'"),
    ):
        hub.refuse["POST", "/api/repos/create"] = status
        with pytest.raises(ConfigError, match=told) as error:
            push(tmp_path, "bob/x")
        assert TOKEN not in str(error.value)
    for name in ("bob", "bob/a b", "a/b/c"):
        with pytest.raises(ConfigError, match=r"no repository: write user/name|cannot be a repository's name"):
            push(tmp_path, name)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be reached .* the same command goes on"):
        push(tmp_path, "bob/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push(tmp_path, "bob/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match="needs a token that may write: `hf auth login`, or the environment's HF_TOKEN"
    ):
        push(tmp_path, "bob/x")
