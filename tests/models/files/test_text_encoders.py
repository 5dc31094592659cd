"""A text encoder by name: of a pipeline, alone, or of the whole CLIP; and what is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from t2ilib.config import ConfigError
from t2ilib.models.files.locate import SHIPPED
from t2ilib.models.files.text_encoders import find_text_encoder, load_text_encoder

TINY = SHIPPED["tiny-sdxl"]


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """An encoder and its tokenizer in one folder, as on the Hub."""
    shutil.copytree(TINY / "text_encoder", tmp_path / "alone")
    for file in (TINY / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "alone")
    return tmp_path / "alone"


def refused(name: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_text_encoder(str(name), torch.float32)
    return str(error.value)


def test_it_is_found_in_a_pipeline_alone_and_in_the_whole_clip(alone: Path) -> None:
    reference = CLIPTextModel.from_pretrained(TINY / "text_encoder", dtype=torch.float32)
    ids = CLIPTokenizer.from_pretrained(TINY / "tokenizer")(["a red circle"], return_tensors="pt").input_ids
    for name in ("tiny-sdxl", alone):
        encoder, tokenizer = load_text_encoder(str(name), torch.float32)
        assert torch.equal(tokenizer(["a red circle"], return_tensors="pt").input_ids, ids)
        with torch.no_grad():
            assert torch.equal(encoder(ids).last_hidden_state, reference(ids).last_hidden_state)
    second = CLIPTextModel.from_pretrained(TINY / "text_encoder_2", dtype=torch.float32)
    whole, _ = load_text_encoder(str(TINY / "clip"), torch.float32)
    with torch.no_grad():
        assert torch.equal(whole(ids).last_hidden_state, second(ids).last_hidden_state)


def test_configs_are_enough_where_weights_are_not_wanted(alone: Path) -> None:
    (alone / "model.safetensors").unlink()
    assert find_text_encoder(str(alone), with_weights=False) == (alone, alone)
    assert "lacks model.safetensors" in refused(alone)


def test_what_is_none_is_refused_by_name(alone: Path, tmp_path: Path) -> None:
    config = alone / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"model_type": "t5"}))
    assert "is a t5" in refused(alone)
    config.write_text(json.dumps(said))
    (alone / "tokenizer.json").unlink()
    assert "lacks vocab.json, merges.txt" in refused(alone)
    assert "is a file without a config" in refused(TINY / "text_encoder" / "model.safetensors")
    assert "scratch.text_encoder" in refused("nowhere")
    assert "lacks config.json" in refused(tmp_path)
