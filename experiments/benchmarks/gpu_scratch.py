"""Rows about training a UNet from fresh weights: SD1.5's layout at 256 and 512, first as it is, then with one lever pulled at a time.

Weights are float32 under autocast to what the GPU has, AdamW is fused, attention is torch's own: each row changes what its name says.
The compiled row comes last, as its first step takes a minute. Where there is no GPU, the tiny SD1.5 stands in.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from gpu_background import Background
from gpu_record import Figures, NotHere, Row
from gpu_speed import Sizes, Speed

from t2ilib.config import ConfigError, RunConfig
from t2ilib.runfile import build_run, merge

REAL = Sizes({"sd15": (512, (12, 5, 0))}, steps=6)
TINY = Sizes({"tiny-sd15": (64, (5, 5, 0))}, steps=3)
BATCH = 8
COMPILING = 75.0
"""Seconds that compiling is expected to take."""
FLOAT32 = {"training": {"mixed_precision": "no"}}
LEVERS: dict[str, Mapping[str, Any]] = {
    "": {},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "8-bit AdamW": {"optimizer": {"name": "adamw8bit"}},
    "channels last": {"compute": {"channels_last": True}},
    "attention math": {"compute": {"attention": "math"}},
    "attention flash": {"compute": {"attention": "flash"}},
    "cudnn benchmark": {"compute": {"cudnn_benchmark": True}},
    "float32": FLOAT32,
    "float32, tf32": merge(FLOAT32, {"compute": {"tf32": True}}),
    "activations on the host": {"compute": {"offload": ["activations"]}},
}
"""What the name says -> sections of a run config, over the plain row's."""
COMPILED: dict[str, Mapping[str, Any]] = {"compile": {"compute": {"compile": True}}}
BATCHES = (1, 32)
"""At 512 beside BATCH, with checkpointing where they are more."""


class Scratch(Speed):
    """As `Speed`, of a whole UNet."""

    group = "scratch"

    def run(self, side: int, batch: int, changes: Mapping[str, Any]) -> RunConfig:
        (layout,) = self.sizes.layouts
        sections = {
            "model": {"base": layout},
            "data": {"resolution": side},
            "training": {"trains": "unet", "batch_size": batch, "steps": 1000},
            "optimizer": {"learning_rate": 1e-6},
        }
        return build_run(merge(sections, changes))

    def train(self, run: RunConfig, figures: Figures) -> None:
        try:
            super().train(run, figures)
        except ConfigError as reason:  # a kernel or a compiler that this machine has not
            raise NotHere(str(reason)) from None

    def rows(self) -> list[Row]:
        ((side, (building, training, _)),) = self.sizes.layouts.values()
        rows = [self.lever(side, BATCH, name, changes, training) for name, changes in LEVERS.items()]
        for batch in BATCHES:
            more = "checkpointing" if batch > BATCH else ""
            rows.append(self.lever(side, batch, more, LEVERS[more], training))
        half = side // 2, 4 * BATCH  # for which the base is built again
        rows.append(self.lever(*half, "", {}, building + training))
        rows += [self.lever(*half, name, changes, COMPILING) for name, changes in COMPILED.items()]
        return [self.row("from scratch: build", building, self.build, self.run(side, BATCH, {}), "encoding"), *rows]

    def build(self, run: RunConfig, figures: Figures) -> None:
        figures["build_seconds"] = self.timed(partial(self.ready, run))
        figures["unet_parameters"] = sum(p.numel() for p in self.ready(run).components.unet.parameters())

    def lever(self, side: int, batch: int, name: str, changes: Mapping[str, Any], expected: float) -> Row:
        label = f"from scratch {side} batch {batch}{', ' * bool(name)}{name}"
        return self.row(label, expected, self.train, self.run(side, batch, changes), "training")


def scratch_rows(background: Background) -> list[Row]:
    return Scratch(background, REAL if torch.cuda.is_available() else TINY).rows()
