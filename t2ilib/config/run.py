"""RunConfig: the sections together, what must agree between them, and what a run is known by."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from t2ilib.config.sections import (
    AdapterSpec,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Place,
    Section,
    ShapesConfig,
    TrackingConfig,
    TrainingConfig,
)


class RunConfig(Section):
    """One run. `output` receives the resolved config, checkpoints, adapter, pictures and metrics; without a `name` the run is
    called after it."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    output: Place = Path("results/run")
    model: ModelConfig = ModelConfig()
    adapter: AdapterSpec | None = None
    data: DataConfig = DataConfig()
    shapes: ShapesConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def trains(self) -> str:
        """adapter, unet, vae, clip or nothing."""
        return self.training.trains or (self.shapes and self.shapes.trains) or "adapter"

    @model_validator(mode="before")
    @classmethod
    def what_follows(cls, values: Any) -> Any:
        """`data.source: shapes` brings its section along, with its defaults; a run without a name has that of its folder."""
        if not isinstance(values, Mapping):
            return values
        if values.get("output") and "name" not in values:
            values = {**values, "name": Path(values["output"]).name or "run"}
        data = values.get("data")
        source = data.get("source") if isinstance(data, Mapping) else getattr(data, "source", None)
        return {**values, "shapes": {}} if source == "shapes" and values.get("shapes") is None else values

    @model_validator(mode="after")
    def holds_together(self) -> "RunConfig":
        trains = self.trains
        if self.shapes is not None and self.data.source != "shapes":
            raise ValueError(
                f"the shapes section is about data.source shapes, and data.source is {self.data.source}: set shapes to null"
            )
        if self.data.source == "shapes" and self.data.path is not None:
            raise ValueError("data.path is about picture folders: leave it out, or set data.source to folder")
        if self.shapes is not None and self.shapes.trains and self.training.trains:
            raise ValueError(
                f"training.trains is {self.training.trains} and shapes.trains is {self.shapes.trains}: leave one of them out"
            )
        if (trains == "adapter") != (self.adapter is not None):
            raise ValueError(
                f"this run trains {trains}, so its adapter section must be null: an adapter is trained over a base that stands still"
                if self.adapter is not None
                else "this run has no adapter section: add one, or set training.trains to unet or nothing"
            )
        if self.adapter is not None:
            residual, base = self.adapter.init in ("pissa", "olora"), self.model.quantization
            if residual and base != "none":
                raise ValueError(
                    f"adapter.init {self.adapter.init!r} changes the base, which a quantized one cannot hold exactly: use loftq, or"
                    " set model.quantization to none"
                )
            if self.adapter.init == "loftq" and base != "nf4":
                raise ValueError("adapter.init 'loftq' makes up for quantization: it needs model.quantization nf4")
        if self.optimizer.lora_plus_ratio is not None and trains != "adapter":
            raise ValueError("optimizer.lora_plus_ratio is about the B of adapters, and this run trains none")
        if trains == "nothing" and self.training.steps:
            raise ValueError("training.trains is 'nothing', so training.steps must be 0")
        if self.training.ema_decay and trains == "adapter":
            raise ValueError("training.ema_decay is for training whole models; set it to 0 for an adapter")
        if self.training.keep_adapters == "all" and trains != "adapter":
            raise ValueError(f"training.keep_adapters is about adapters, and this run trains {trains}: leave it out")
        if self.model.quantization != "none" and trains not in ("adapter", "nothing"):
            raise ValueError(
                f"a quantized base cannot be trained itself: set model.quantization to none to train {trains}"
            )
        return self

    def training_digest(self) -> str:
        """12 hex digits of what decides the steps of a run: all but output, name, tracking and evaluation, and, under a constant
        schedule, how many steps there are, so that a finished run can go on."""
        left_out = dict.fromkeys(
            ("checkpoint_every", "keep_checkpoints", "keep_adapters", "require_fit", "deterministic"), True
        )
        values = self.model_dump(
            mode="json",
            exclude={"output": True, "name": True, "tracking": True, "evaluation": True, "training": left_out}
            | {"shapes": {"checked_prompts": True}},
        )
        values["training"]["trains"] = self.trains
        if self.optimizer.schedule == "constant":
            del values["training"]["steps"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def flat(self) -> dict[str, Any]:
        """`section.field` -> JSON-like value; the same keys for every run, whatever it trains."""
        values = self.model_dump(mode="json", exclude={"output", "name", "tracking"})
        values["training"]["trains"] = self.trains
        for section, kind in (("adapter", AdapterSpec), ("shapes", ShapesConfig)):
            values[section] = values[section] or dict.fromkeys(kind.model_fields)
        return {
            f"{section}.{field}" if isinstance(content, dict) else section: value
            for section, content in values.items()
            for field, value in (content.items() if isinstance(content, dict) else [(section, content)])
        }
