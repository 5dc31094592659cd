"""Gradient checkpointing inside `train`: activations are really computed again, with the same dropout, and nothing else changes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t2ilib.runfile import build_run
from t2ilib.training import loop

STEPS = 2
UNET_BLOCKS = ("down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.resnets.1", "up_blocks.0.resnets.0")
ADAPTERS = {
    "unet": {"dropout": 0.3},
    "rank": {"dropout": 0.3, "dropout_kind": "rank", "text_encoder_targets": "attention"},
    "rows_columns": {"dropout": 0.3, "dropout_kind": "rows_columns", "text_encoder_targets": "attention"},
    "dora": {"kind": "dora", "dropout": 0.3, "text_encoder_targets": "attention"},
    "whole": None,
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Part -> how often it was run while training, of blocks of the UNet and of a layer in each text encoder."""
    count: Counter = Counter()
    setup = loop.SETUPS["adapter"]

    def counting(run, components, *rest) -> Any:
        made = setup(run, components, *rest)
        blocks = {name: components.unet.get_submodule(name) for name in UNET_BLOCKS}
        # within the layer, because transformers runs again what is inside it
        for name, encoder in components.text_encoders.items():
            blocks[name] = next(m for path, m in encoder.named_modules() if path.endswith("layers.0.layer_norm1"))
        # before it is run, because what is run again stops as soon as nothing more of it is needed
        for name, block in blocks.items():
            block.register_forward_pre_hook(lambda block, _, name=name: count.update([name] if block.training else []))
        return made

    for trains in ("adapter", "unet"):
        monkeypatch.setitem(loop.SETUPS, trains, counting)
    return count


def train(output: Path, adapter: dict | None, checkpointing: bool) -> None:
    values = {
        "output": str(output),
        "adapter": adapter and {"rank": 2, "alpha": 2.0, **adapter},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["heart"], "num_pictures": 6},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": STEPS, "batch_size": 2, "gradient_checkpointing": checkpointing},
        "evaluation": {"validation_timesteps": 1, "prompts": ["a red heart"], "num_inference_steps": 1},
    }
    if adapter is None:
        values["training"]["trains"] = "unet"
    loop.train(build_run(values))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_computed_again_is_what_was_computed(tmp_path: Path, passes: Counter, kind: str) -> None:
    """Bit for bit the losses, norms, weights and moments of a run that keeps its activations, whatever kind of dropout there is;
    blocks on the way of a gradient are run twice a step, encoders that nothing trains never."""
    adapter = ADAPTERS[kind]
    blocks = [*UNET_BLOCKS, *(("text_encoder", "text_encoder_2") if "text_encoder_targets" in (adapter or ()) else ())]
    counts = {}
    for name in ("kept", "again"):
        passes.clear()
        train(tmp_path / name, adapter, name == "again")
        counts[name] = dict(passes)
    assert counts["kept"] == dict.fromkeys(blocks, STEPS)
    assert counts["again"] == dict.fromkeys(blocks, 2 * STEPS)

    kept, again = (tmp_path / name / "checkpoints" / f"step-{STEPS:06d}" for name in ("kept", "again"))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(again / file), load_file(kept / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    rows = [[json.loads(row) for row in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in counts]
    told = [[(row["loss"], row["grad_norm"]) for row in of_run if "grad_norm" in row] for of_run in rows]
    assert told[0] == told[1]
    assert len(told[0]) == STEPS
