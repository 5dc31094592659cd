"""Results do not hang on where in memory a weight lies: whatever is read from files ends at addresses that torch itself gives.

Tensors in a memory-mapped file lie where the file has them; a file is written here so that they lie askew on purpose. On most
CPUs the numbers would be equal all the same, so it is the addresses that are tested.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2ilib.config import ModelConfig
from t2ilib.memory import ALIGNMENT, align, aligned
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from t2ilib.training.loop import train


def askew(tensors) -> list[str]:
    return [name for name, tensor in tensors if tensor.data_ptr() % ALIGNMENT]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, four bytes behind an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = room[1:].view(tensor.shape)
    return view.copy_(tensor)


def skew_file(path: Path) -> None:
    """Writes a safetensors file anew with a header of another length, and a first tensor of five bytes: all others move."""
    tensors = load_file(path)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"padding": "x" * 13})


def test_aligned_copies_what_lies_askew_and_nothing_else() -> None:
    straight = torch.arange(7.0)
    assert aligned(straight) is straight
    moved = shifted(straight)
    assert moved.data_ptr() % ALIGNMENT == 4
    assert torch.equal(aligned(moved), straight)
    assert aligned(moved).data_ptr() % ALIGNMENT == 0


def test_modules_keep_their_parameters_while_they_move() -> None:
    layer = torch.nn.Linear(5, 3)
    layer.weight.data = shifted(layer.weight.data)
    before, values = layer.weight, layer.weight.detach().clone()
    align(layer)
    assert layer.weight is before
    assert not askew(layer.named_parameters())
    assert torch.equal(layer.weight, values)


@pytest.fixture(scope="module")
def float32_folder(tmp_path_factory) -> Path:
    """A pipeline whose weights need no conversion, so that loaders hand over the mapped file itself."""
    from t2ilib.models.pipeline import save_pipeline

    folder = tmp_path_factory.mktemp("base") / "model"
    save_pipeline(load_base(ModelConfig()), folder)
    for path in folder.rglob("*.safetensors"):
        skew_file(path)
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_of_a_base_are_aligned(float32_folder: Path, quantization: str) -> None:
    mapped = load_file(float32_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert askew(mapped.items()), "the file lies straight, so the test shows nothing"
    components = load_base(ModelConfig(base=str(float32_folder), quantization=quantization))
    for module in (*components.modules().values(), components.vae):
        assert not askew((*module.named_parameters(), *module.named_buffers()))


def test_a_checkpoint_comes_back_aligned(tmp_path: Path) -> None:
    tensors = {"weights": {"a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(64)}}
    path = save_checkpoint(tmp_path, Checkpoint(1, tensors, {}), keep=1)
    assert askew(load_file(path / "weights.safetensors").items())
    assert not askew(load_checkpoint(path).tensors["weights"].items())


def test_adapters_and_resumed_state_are_aligned(float32_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """What a resumed run trains on, optimizer state included, and an adapter that was read from its file."""
    from t2ilib.adapters.load import load_adapter
    from t2ilib.training.resume import Beginning
    from t2ilib.training.state import TrainState

    states, resume = [], TrainState.resume

    def watched(state: TrainState, beginning: Beginning) -> int:
        states.append(state)
        return resume(state, beginning)

    monkeypatch.setattr(TrainState, "resume", watched)
    values = {
        "output": str(tmp_path / "run"),
        "model": {"base": str(float32_folder)},
        "adapter": {"rank": 3, "alpha": 3.0, "text_encoder_targets": "attention"},
        "data": {"source": "shapes"},
        "shapes": {"num_pictures": 4},
        "training": {"steps": 1, "batch_size": 1},
        "evaluation": {"validate_every": 0, "sample_every": 0, "prompts": ["a"], "num_inference_steps": 1},
    }
    train(build_run(values))
    train(build_run(values))
    state = states[-1]
    assert not askew((str(i), p) for i, p in enumerate(state.parameters))
    moments = [t for entry in state.raw_optimizer.state.values() for t in entry.values() if torch.is_tensor(t)]
    assert not askew((str(i), t) for i, t in enumerate(moments))
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    assert askew(load_file(file).items())
    components = load_base(ModelConfig(base=str(float32_folder)))
    load_adapter(components, file)
    for module in components.modules().values():
        assert not askew(module.named_parameters())
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
