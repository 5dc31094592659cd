"""Steps of a run as adapter files: what the checkpoint itself draws, for adapters of every kind of start."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t2ilib.adapters.load import load_adapter, read_metadata
from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.drawing.checkpoints import adapter_steps, export_step, kept_adapter, require_step, write_step
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.training.state import load_checkpoint_adapter

CPU = torch.device("cpu")


def drawn(components):
    return np.asarray(
        draw(components, ["a red heart"], EvaluationConfig(num_inference_steps=2, guidance_scale=2))[0], int
    )


def test_steps_are_those_of_checkpoints_and_of_files_that_are_kept(results, tmp_path):
    assert adapter_steps(results / "cat") == [1, 2]
    assert adapter_steps(results / "words") == [1, 2], "of which one checkpoint is there"
    assert kept_adapter(results / "words", 1).is_file()
    assert kept_adapter(results / "cat", 1) is None
    assert adapter_steps(tmp_path) == adapter_steps(tmp_path / "nowhere") == []
    require_step(results / "words", 1)
    with pytest.raises(ConfigError, match="has no checkpoint of step 3; there are 1, 2"):
        require_step(results / "cat", 3)
    with pytest.raises(ConfigError, match="has no checkpoint of step 3; there are none: give the folder of a run"):
        require_step(tmp_path, 3)


@pytest.mark.parametrize("name", ["cat", "study-quick/pissa/seed0"])
def test_a_step_becomes_a_file_that_draws_as_its_checkpoint_does(results, tmp_path, name):
    expected = load_base(ModelConfig(), CPU)
    load_checkpoint_adapter(expected, results / name, 1)
    target = export_step(results / name, 1, tmp_path / "step1.safetensors")
    other = export_step(results / name, 2, tmp_path / "step2.safetensors")
    finished = results / name / "adapter" / "pytorch_lora_weights.safetensors"
    pictures = []
    for file in (target, other, finished):
        components = load_base(ModelConfig(), CPU)
        load_adapter(components, file)
        pictures.append(drawn(components))
    assert abs(pictures[0] - drawn(expected)).max() <= 1
    assert abs(pictures[1] - pictures[2]).max() <= 1, "the last step is what was saved at the end"
    assert abs(pictures[0] - pictures[1]).max() > 1
    told = read_metadata(target)
    assert (told["ss_steps"], told["ss_sd_model_name"]) == ("1", "tiny-sdxl")
    assert told["t2ilib.data_digest"] == read_metadata(finished)["t2ilib.data_digest"]


def test_a_step_is_bit_for_bit_what_training_keeps(results, tmp_path):
    components = load_base(ModelConfig(base="tiny-sd15"), CPU)
    file = write_step(components, results / "words", 2, tmp_path)
    written, kept = load_file(file), load_file(kept_adapter(results / "words", 2))
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[key], kept[key]) for key in kept)
    words = [load_file(f.with_name("heart.safetensors")) for f in (file, kept_adapter(results / "words", 2))]
    assert all(torch.equal(words[0][key], words[1][key]) for key in words[1])


def test_other_formats_and_kept_files(results, tmp_path):
    kohya = export_step(results / "words", 1, tmp_path / "a" / "cat.safetensors", "kohya")
    assert any(key.startswith("lora_unet_") for key in load_file(kohya))
    assert {path.name for path in kohya.parent.iterdir()} == {"cat.safetensors", "heart.safetensors"}
    with pytest.raises(ConfigError, match="exists already"):
        export_step(results / "words", 1, kohya)
    with pytest.raises(ConfigError, match="has no checkpoint of step 9"):
        export_step(results / "words", 9, tmp_path / "b.safetensors")


def test_a_damaged_checkpoint_is_told(results, tmp_path):
    run = tmp_path / "cat"
    shutil.copytree(results / "cat", run)
    file = run / "checkpoints" / "step-000001" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.safetensors is damaged"):
        export_step(run, 1, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
