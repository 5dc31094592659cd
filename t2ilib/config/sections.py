"""The sections of a run config, one for each stage of a run, and one for the drawn world: every option, with its default and its source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[Path, AfterValidator(Path.expanduser)]
"""A file or folder; `~` is the user's own, as in a shell."""


class ModelConfig(Section):
    """Which base model, and how its frozen weights are kept."""

    base: str = "tiny-sdxl"
    """`tiny-sdxl`, `tiny-sd15`, a local diffusers folder, a Hub id, or a single .safetensors file in the original layout."""
    config: str | None = None
    """For a single file: a diffusers folder, `tiny-sdxl` or Hub id whose configs, scheduler and tokenizers describe it. None
    takes the published SD1.5 or SDXL, and CLIP's tokenizer from the Hub's cache or the Hub."""
    vae: str | None = None
    """Another VAE than the base's: a VAE folder, a pipeline folder with `vae/`, `tiny-sdxl`, a Hub id, or a .safetensors file.
    A file has no config, so it must be built as the base's and shares its scaling factor."""
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen base; "auto" is float32 on CPU, bfloat16 on a GPU whose hardware has it, float16 on another."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of linear layers: nf4, 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314), or int8 (arXiv 2208.07339)."""
    quantize_convolutions: bool = False
    """The UNet's convolutions in NF4 too: 69% of SD1.5's UNet and 13% of SDXL's. Saves memory, costs time in every pass."""
    quantize_text_encoders: bool = True
    quantization_skip: tuple[str, ...] = ()
    """Module names, or endings of them, that keep their precision, such as `conv_in` or `time_embedding.linear_1`."""

    def in_full(self) -> "ModelConfig":
        """The same base without quantization."""
        plain = {"quantization": "none", "quantize_convolutions": False, "quantization_skip": ()}
        return self.model_copy(update=plain)

    @model_validator(mode="after")
    def something_to_quantize(self) -> "ModelConfig":
        if self.quantization != "nf4" and self.quantize_convolutions:
            raise ValueError(f"quantize_convolutions goes with quantization nf4, not with {self.quantization}")
        if self.quantization == "none" and self.quantization_skip:
            raise ValueError("quantization_skip names layers, but quantization is none")
        return self


class AdapterSpec(Section):
    """What is attached, where, and how big.

    `targets`, `text_encoder_targets`: a name from `adapters.spec.TARGETS`, a list of module name endings, or a regular
    expression over whole module names. The keys of `ranks` and `alphas` and what `exclude` lists are endings or expressions too.
    """

    kind: Literal["lora", "dora"] = "lora"
    """LoRA (arXiv 2106.09685), or DoRA, which learns a magnitude beside the direction (arXiv 2402.09353)."""
    rank: Positive = 8
    alpha: PositiveFloat = 8.0
    """The update is alpha / rank times B A."""
    rank_stabilized: bool = False
    """Divide by the square root of the rank instead (rsLoRA, arXiv 2312.03732)."""
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = "default"
    """How A and B start. default: A uniform, B zero; gaussian: A normal, B zero; pissa (arXiv 2404.02948) and olora (arXiv
    2406.01775): from the base's own largest directions; loftq (arXiv 2310.08659): from what quantizing the base lost."""
    targets: str | tuple[str, ...] = "attention"
    exclude: tuple[str, ...] = ()
    """Layers of any component to leave out of what the targets mean."""
    ranks: dict[str, Positive] = {}
    """Other ranks for some layers; the first key that matches counts."""
    alphas: dict[str, PositiveFloat] = {}
    text_encoder_targets: str | tuple[str, ...] | None = None
    text_encoder_rank: Positive | None = None
    """None: as the UNet's; likewise the alpha."""
    text_encoder_alpha: PositiveFloat | None = None
    dropout: Share = 0.0
    dropout_kind: Literal["input", "rank", "rows_columns"] = "input"
    """What `dropout` zeroes in training: elements of the adapter's input (peft's `lora_dropout`), elements of its rank
    activations (kohya's `network_dropout`), or whole columns of A and rows of B (LoRA Dropout, arXiv 2404.09610)."""
    trigger_words: tuple[str, ...] = ()
    """Words of the captions that call up what was learned; written into the adapter's files, nothing else."""

    @model_validator(mode="after")
    def holds_together(self) -> "AdapterSpec":
        if self.kind == "dora" and self.dropout and self.dropout_kind != "input":
            raise ValueError(
                f"dropout_kind {self.dropout_kind!r} would also act on the weight norm that DoRA computes from A and B: use"
                " input dropout with dora"
            )
        of_text = (self.text_encoder_rank, self.text_encoder_alpha)
        if self.text_encoder_targets is None and any(value is not None for value in of_text):
            raise ValueError("text_encoder_rank and text_encoder_alpha need text_encoder_targets")
        return self


class DataConfig(Section):
    """Which captioned pictures."""

    source: Literal["folder", "shapes"] = "folder"
    path: Place | None = None
    """For `folder`: an image folder with metadata.jsonl, metadata.csv, or a .txt caption beside each picture."""
    validation_path: Place | None = None
    """Held-out pictures; without it `validation_share` of the pictures is held out."""
    validation_share: Share = 0.125
    image_column: str = "file_name"
    caption_column: str = "text"
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    on_error: Literal["stop", "skip"] = "stop"
    """What a file that cannot be used does (a corrupt picture, one without caption): stop the run, or be rejected, counted, logged."""
    ground: str = "white"
    """What is transparent in a picture is laid over this colour: a name, or "#rrggbb" in quotes."""

    @field_validator("ground", mode="before")
    @classmethod
    def an_opaque_colour(cls, value: Any) -> Any:
        from PIL import ImageColor

        hint = """name a colour as CSS does, or write "#rrggbb" with its quotes, without which YAML reads a comment or a number"""
        try:
            channels = ImageColor.getrgb(value)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{value!r} is not a colour: {hint}") from None
        if len(channels) > 3:
            raise ValueError(f"{value!r} has alpha, and nothing lies below the ground: leave it out")
        return value


class ShapesConfig(Section):
    """The drawn world, for `data.source: shapes`: which pictures are drawn, how many are checked, and which part of a tiny model
    is trained on them alone."""

    scenes: tuple[Literal["base", "heart", "striped", "blueprint"], ...] = ("base",)
    """What is drawn, in equal shares: `base` and the concepts outside it."""
    num_pictures: Positive = 48
    """How many training pictures are drawn."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How far position, size, tilt and colour stray from their nominal values."""
    seed: int = 0
    """Which pictures are drawn. Apart from the run's seed, so that all seeds of a study share their data."""
    checked_prompts: Annotated[int, Field(ge=0)] = 48
    """How many prompts of the concepts, and of the base world, the checker judges at the end."""
    trains: Literal["vae", "clip"] | None = None
    """The parts of a tiny model that come before its UNet, in place of what `training.trains` names."""
    crop: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """For the VAE: the side of random crops; None trains on whole pictures."""

    @field_validator("scenes")
    @classmethod
    def each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"name each kind once, and at least one, not {', '.join(value) or 'none'}")
        return value

    @model_validator(mode="after")
    def crops_are_the_autoencoders(self) -> "ShapesConfig":
        if self.crop is not None and self.trains != "vae":
            raise ValueError("crop is about training the VAE: set trains to vae, or leave it out")
        return self


class ObjectiveConfig(Section):
    """What is minimised."""

    name: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """What the network predicts; "auto" takes what the base model predicts."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """min-SNR weighting (arXiv 2303.09556); None for the plain mean squared error."""
    caption_dropout: Share = 0.0
    """Probability of an empty caption, for classifier-free guidance (arXiv 2207.12598)."""


class OptimizerConfig(Section):
    """How it is minimised. `text_encoder_learning_rate` None: as the UNet's."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    """Left out, it is 1 for prodigy, which estimates the step size itself and multiplies it by this."""
    text_encoder_learning_rate: PositiveFloat | None = None
    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (arXiv 2402.12354): the learning rate of B is this many times that of A."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    betas: tuple[Share, Share] = (0.9, 0.99)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def rate_of_its_own(cls, values: Any) -> Any:
        estimates = isinstance(values, Mapping) and values.get("name") == "prodigy" and "learning_rate" not in values
        return {**values, "learning_rate": 1.0} if estimates else values

    @model_validator(mode="after")
    def one_rate_for_prodigy(self) -> "OptimizerConfig":
        if self.name == "prodigy" and self.text_encoder_learning_rate is not None:
            raise ValueError(
                "prodigy estimates one step size for all parameters together, so a separate text_encoder_learning_rate"
                " would only distort that estimate: leave it out, or use adamw"
            )
        if self.name == "prodigy" and self.lora_plus_ratio is not None:
            raise ValueError(
                "prodigy estimates one step size for A and B together: leave lora_plus_ratio out, or use adamw"
            )
        return self


class TrainingConfig(Section):
    """How long, in what batches, and what is kept."""

    trains: Literal["adapter", "unet", "nothing"] | None = None
    """None: the adapter, or what `shapes.trains` names. `nothing` measures the base as it is."""
    steps: Annotated[int, Field(ge=0)] = 200
    batch_size: Positive = 4
    """Pictures a step, over all accumulated micro-batches."""
    accumulation: Positive = 1
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    ema_decay: Share = 0.0
    require_fit: bool = False
    """Refuse a run whose predicted memory (`t2ilib plan`) the device has not, instead of warning of it."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; on a GPU others are faster. A kernel that has no such form is an error."""
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    keep_adapters: Literal["last", "all"] = "last"
    """`all`: the adapter of every checkpoint too, each as a file under `steps/`, to choose among."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def unquoted_no(cls, value: Any) -> Any:
        """YAML reads `no` as false."""
        return "no" if value is False else value

    @model_validator(mode="after")
    def batch_divides(self) -> "TrainingConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self


class EvaluationConfig(Section):
    """What is measured and drawn, and when. Step counts of 0 mean only before and after training."""

    validate_every: Annotated[int, Field(ge=0)] = 50
    validation_timesteps: Positive = 8
    validation_pictures: Positive = 64
    """How many of the held-out pictures are measured at most: always the same ones."""
    sample_every: Annotated[int, Field(ge=0)] = 100
    prompts: tuple[str, ...] = ()
    """Fixed prompts of the sample grids; empty takes captions, held-out ones first. On pictures of one's own they are also what is drawn
    and measured at the end."""
    num_inference_steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    vae_tiling: bool = False
    """Pictures are decoded in overlapping tiles of half the side that the VAE was made for (32 latents at least): a fraction of the
    memory, more time, and tones that may differ from tile to tile. What is trained on is always encoded whole."""
    measures: tuple[str, ...] | None = None
    """What judges the pictures that are drawn at the end: names from `evaluation.measures.MEASURES`, of entry points, or of objects
    in Python files (`my_measures.py:sharpness`). None: all that come with t2ilib and apply."""
    clip_model: str | None = None
    """Folder or Hub id of the CLIP that scores pictures; None takes the base's own `clip` folder, if it has one."""


class TrackingConfig(Section):
    """Where the run is logged. `experiment` None: not to MLflow."""

    experiment: str | None = None
    uri: str | None = None
    """None: MLFLOW_TRACKING_URI, else SQLite beside the results."""
    parent_run_id: str | None = None
    tags: dict[str, str] = {}
