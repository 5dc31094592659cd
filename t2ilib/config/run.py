"""RunConfig: the sections together, what must agree between them, and what a run is known by."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from t2ilib.config.data import DataConfig, PriorConfig, ShapesConfig
from t2ilib.config.drawn import DrawnBy
from t2ilib.config.objective import METHODS, ObjectiveConfig, drawn_so
from t2ilib.config.section import Place, Section
from t2ilib.config.sections import (
    AdapterSpec,
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ScratchConfig,
    TrackingConfig,
    TrainingConfig,
)
from t2ilib.config.student import StudentConfig

LEFT_OUT = (
    *("checkpoint_every", "keep_checkpoints", "keep_adapters", "require_fit", "deterministic"),
    *("time_budget", "least_free_disk_mib", "least_free_memory_mib"),
)
"""Fields of `training` that decide no step."""
LATER = {"student": None, "data.part": "final", "shapes.captioned": None} | {
    f"objective.{name}": None for name in METHODS
}
"""What came later, and what it is in a run that began before it was there: such a run goes on."""


class RunConfig(Section):
    """One run. `output` receives the resolved config, checkpoints, adapter, pictures and metrics; without a `name` the run is
    called after it."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    output: Place = Path("results/run")
    model: ModelConfig = ModelConfig()
    scratch: ScratchConfig | None = None
    student: StudentConfig | None = None
    adapter: AdapterSpec | None = None
    data: DataConfig = DataConfig()
    shapes: ShapesConfig | None = None
    prior: PriorConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def trains(self) -> str:
        """adapter, unet, vae, clip or nothing."""
        return (
            self.training.trains
            or (self.shapes and self.shapes.trains)
            or ("unet" if self.scratch or self.student else None)
            or "adapter"
        )

    @property
    def drawn_by(self) -> DrawnBy | None:
        """How what it trains is drawn; None: as its base is."""
        drawn, asked = self.objective.drawn_by, self.evaluation
        said = {"num_inference_steps": asked.num_inference_steps, "guidance_scale": asked.guidance_scale}
        return drawn and drawn.model_copy(update=said)

    @property
    def evaluation_of_base(self) -> EvaluationConfig:
        """How the base alone is drawn, to be held against: as the run is, or where that is drawn in a way of its own, as any base."""
        usual = EvaluationConfig().model_dump(include={"num_inference_steps", "guidance_scale"})
        return self.evaluation.model_copy(update=usual) if self.drawn_by else self.evaluation

    @model_validator(mode="before")
    @classmethod
    def what_follows(cls, values: Any) -> Any:
        """`data.source: shapes` brings its section along, with its defaults; a run without a name has that of its folder; what is trained to
        be drawn in a way of its own is drawn so, where `evaluation` does not say otherwise."""
        if not isinstance(values, Mapping):
            return values
        if drawn := drawn_so(values.get("objective") or {}):
            usual = drawn.model_dump(include={"num_inference_steps", "guidance_scale"})
            told = values.get("evaluation") or {}
            told = told if isinstance(told, Mapping) else told.model_dump(exclude_unset=True)
            values = {**values, "evaluation": {**usual, **told}}
        if values.get("output") and "name" not in values:
            values = {**values, "name": Path(values["output"]).name or "run"}
        data = values.get("data")
        source = data.get("source") if isinstance(data, Mapping) else getattr(data, "source", None)
        return {**values, "shapes": {}} if source == "shapes" and values.get("shapes") is None else values

    @model_validator(mode="after")
    def holds_together(self) -> "RunConfig":
        trains = self.trains
        of_pairs = self.data.source == "preferences" and self.shapes is not None and self.shapes.trains is None
        if self.shapes is not None and self.data.source != "shapes" and not of_pairs:
            raise ValueError(
                f"the shapes section is about data.source shapes, and data.source is {self.data.source}: set shapes to null"
            )
        if self.data.source == "shapes" and self.data.path is not None:
            raise ValueError("data.path is about pictures that are there: leave it out, or set data.source to folder")
        if self.prior is not None and trains in ("vae", "clip", "nothing"):
            raise ValueError(
                f"the prior section is about adapters and the UNet, and this run trains {trains}: leave it out"
            )
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
        if self.scratch is not None and trains != "unet":
            raise ValueError(
                f"the scratch section is about training a UNet, and this run trains {trains}: set scratch to null"
            )
        if self.student is not None:
            self.student.require(self)
        if self.scratch is not None and self.objective.timestep_range != (0.0, 1.0):
            raise ValueError(
                "objective.timestep_range leaves timesteps untrained, and a network that begins with fresh weights knows none of them: leave"
                " it out"
            )
        if self.scratch is not None and self.scratch.space == "pixels" and self.model.vae is not None:
            raise ValueError("model.vae is about latents, and scratch.space is pixels: leave one of them out")
        if self.scratch is not None and self.prior is not None and self.prior.path is None:
            raise ValueError(
                "prior.path: a network that begins with fresh weights can draw no pictures of the class; give them"
            )
        if sum(self.data.stages.values()) >= self.training.steps and self.data.stages and self.training.steps:
            raise ValueError(
                f"data.stages takes {sum(self.data.stages.values())} steps, and training.steps is {self.training.steps}: none is left for"
                f" data.resolution {self.data.resolution}"
            )
        if self.evaluation.sample_every_epochs and self.data.streaming:
            raise ValueError(
                "evaluation.sample_every_epochs: how long a pass over a stream is, is not known before its end; use sample_every"
            )
        if self.optimizer.token_learning_rate is not None and not (self.adapter and self.adapter.tokens):
            raise ValueError("optimizer.token_learning_rate is about adapter.tokens, and there are none")
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
        self.objective.require(self)
        if self.evaluation.adapters and trains != "nothing":
            raise ValueError(
                f"evaluation.adapters is about adapters that are there already, and this run trains {trains}: set training.trains to nothing,"
                " or, to train over them, export them merged (t2ilib export --format merged) and name that in model.base"
            )
        if trains == "nothing" and self.training.steps:
            raise ValueError("training.trains is 'nothing', so training.steps must be 0")
        if self.training.keep_adapters == "all" and trains not in ("adapter", "nothing"):
            raise ValueError(f"training.keep_adapters is about adapters, and this run trains {trains}: leave it out")
        of_unet = [name for name in ("compile", "channels_last") if getattr(self.compute, name)]
        of_unet += ["attention"] if self.compute.attention != "sdpa" else []
        if of_unet and trains in ("vae", "clip"):
            raise ValueError(f"compute.{of_unet[0]} is about the UNet, and this run trains {trains}: leave it out")
        if self.compute.channels_last and trains == "unet" and self.optimizer.name == "adamw8bit":
            raise ValueError(
                "compute.channels_last: bitsandbytes' 8-bit optimizer lays the weights that it trains out channel by channel again, in every"
                " step: leave one of them out"
            )
        if self.compute.cudnn_benchmark and self.training.deterministic:
            raise ValueError(
                "compute.cudnn_benchmark may choose other kernels in every process, and training.deterministic asks for the same bits:"
                " leave one of them out"
            )
        if "average" in self.compute.offload and not self.training.ema_horizon:
            raise ValueError(
                "compute.offload: there is no average to wait in host memory; set training.ema_horizon, or leave it out"
            )
        if self.model.quantization != "none" and trains not in ("adapter", "nothing"):
            raise ValueError(
                f"a quantized base cannot be trained itself: set model.quantization to none to train {trains}"
            )
        return self

    def training_digest(self) -> str:
        """12 hex digits of what decides the steps of a run."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()[:12]

    def deciding(self) -> dict[str, Any]:
        """What decides the steps of a run: all but output, name, tracking, evaluation and compute, and, under a constant schedule, how
        many steps there are, so that a finished run can go on (unless a share of them is asked for)."""
        left_out = dict.fromkeys(LEFT_OUT, True)
        values = self.model_dump(
            mode="json",
            exclude=dict.fromkeys(("output", "name", "tracking", "evaluation", "compute"), True)
            | {"training": left_out}
            | {"shapes": {"checked_prompts": True}, "data": dict.fromkeys(("cache", "cache_path", "workers"), True)},
        )
        values["training"]["trains"] = self.trains
        for name, before in LATER.items():
            section, _, field = name.rpartition(".")
            place = (values[section] if section else values) or {}
            if place.get(field) == before:
                place.pop(field, None)
        if self.optimizer.schedule == "constant" and (self.adapter is None or self.adapter.token_share == 1):
            del values["training"]["steps"]
        return values

    def flat(self) -> dict[str, Any]:
        """`section.field` -> JSON-like value; the same keys for every run, whatever it trains."""
        values = self.model_dump(mode="json", exclude={"output", "name", "tracking"})
        values["training"]["trains"] = self.trains
        kinds = {"adapter": AdapterSpec, "scratch": ScratchConfig, "student": StudentConfig}
        kinds |= {"shapes": ShapesConfig, "prior": PriorConfig}
        for section, kind in kinds.items():
            values[section] = values[section] or dict.fromkeys(kind.model_fields)
        return {
            f"{section}.{field}" if isinstance(content, dict) else section: value
            for section, content in values.items()
            for field, value in (content.items() if isinstance(content, dict) else [(section, content)])
        }
