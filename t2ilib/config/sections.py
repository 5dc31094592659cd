"""The sections of a run config, one for each stage of a run but its data (`data`): every option, with its default and its source."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from t2ilib.config.drawn import FinishedAdapter
from t2ilib.config.section import Duration, Location, Place, Positive, PositiveFloat, Section, Share


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
    clip_skip: Annotated[int, Field(ge=0)] = 0
    """How many of the last layers of SD1.x's text encoder are left out, in training and drawing alike, as diffusers counts them: 1 is what
    others call clip skip 2 (NovelAI, 2022). SDXL reads its penultimate layer already."""

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


class ScratchConfig(Section):
    """A UNet with fresh weights, conditioned on the text encoders of `model.base`, which stay frozen."""

    unet: str = "small"
    """`tiny`, `small`, `base`, `sd15`, `sdxl` (`models.sizes.SIZES`), or a config: a .json file, or a folder or Hub id that has one."""
    space: Literal["latents", "pixels"] = "latents"
    """latents: of the base's VAE, or of `model.vae`. pixels: no VAE; the UNet sees and draws `data.resolution` pixels."""
    text_encoder: Location | None = None
    """Another CLIP text encoder than the base's, with its tokenizer: a folder or Hub id of one, or of a pipeline, whose first is taken. The model
    then has this one alone, as SD1.x has. None: the base's; in pixels its first."""


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
    start: Place | None = None
    """An adapter to go on from: its file, or a run's folder. Its layers, ranks and kind must be those that this section says."""
    tokens: dict[str, str] = {}
    """New words of the text encoders, learned beside the adapter: word -> the words whose embeddings it starts as (textual inversion,
    arXiv 2208.01618; beside an adapter, pivotal tuning, arXiv 2106.05744). Captions use them as they stand here. They have no weight
    decay, which would draw them to nothing instead of to where they started."""
    token_vectors: Positive = 1
    """How many embeddings each of these words is."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the steps, from the first, in which they learn; afterwards they stand still."""
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
        if self.start is not None and self.init != "default":
            raise ValueError(
                f"start brings its own weights, so init {self.init!r} would be lost: leave one of them out"
            )
        if not self.tokens and (self.token_vectors, self.token_share) != (1, 1.0):
            raise ValueError("token_vectors and token_share are about tokens, and there are none")
        for word, start in self.tokens.items():
            if not word or word.split() != [word] or word != word.lower():
                raise ValueError(
                    f"tokens: {word!r} must be one word in small letters, as text encoders read them, such as <cat>"
                )
            if not start.strip():
                raise ValueError(f"tokens: {word} needs words to start as, such as {word}: cat")
            if inside := [other for other in self.tokens if other != word and word in other]:
                raise ValueError(
                    f"tokens: {word} is a part of {inside[0]}, and would be found in it: rename one of them"
                )
        return self


class OptimizerConfig(Section):
    """How it is minimised. `text_encoder_learning_rate` None: as the UNet's."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    """Left out, it is 1 for prodigy, which estimates the step size itself and multiplies it by this."""
    text_encoder_learning_rate: PositiveFloat | None = None
    token_learning_rate: PositiveFloat | None = None
    """Of `adapter.tokens`; None: as the UNet's."""
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
        apart = ("text_encoder_learning_rate", "token_learning_rate")
        if self.name == "prodigy" and (given := [name for name in apart if getattr(self, name) is not None]):
            raise ValueError(
                f"prodigy estimates one step size for all parameters together, so a separate {given[0]}"
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
    ema_horizon: Annotated[int, Field(ge=0)] = 0
    """Steps that an average of the weights reaches back: its decay is 1 - 1 / horizon, less in the first steps. It is what is measured, drawn
    and saved. 0: no average."""
    require_fit: bool = False
    """Refuse a run whose predicted memory (`t2ilib plan`) the device has not, instead of warning of it."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; on a GPU others are faster. A kernel that has no such form is an error."""
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    keep_adapters: Literal["last", "all"] = "last"
    """`all`: the adapter of every checkpoint too, each as a file under `steps/`, to choose among."""
    time_budget: Duration | None = None
    """What a call of `train` may take, such as 11h30m: before that the run stops with a checkpoint, with time left to write it and to end,
    and the same command goes on in another session. At least one step is taken. None: as long as it takes."""
    least_free_disk_mib: Annotated[int, Field(ge=0)] = 256
    """Of the disk under `output`, besides what a checkpoint takes. A run that finds less warns, then writes a checkpoint and stops."""
    least_free_memory_mib: Annotated[int, Field(ge=0)] = 256
    """The same of the memory that the system can still give (not the GPU's)."""

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


class ComputeConfig(Section):
    """How steps are computed: what changes speed and memory, and results by rounding alone, so that a run may go on with other settings."""

    attention: Literal["sdpa", "math", "xformers", "flash"] = "sdpa"
    """Of the UNet in training steps. sdpa: torch's scaled dot product attention, which chooses its kernel; math: the same by plain matrix
    products; xformers: the package of that name; flash: torch's flash kernel or none (arXiv 2307.08691)."""
    compile: bool = False
    """torch.compile, of the UNet's repeated blocks, in training steps; once for each size of pictures, in the first step that has it."""
    channels_last: bool = False
    """The weights of the UNet's convolutions lie pixel by pixel, as tensor cores want them. Dropout of what they give draws in another order."""
    fused_adapters: bool = True
    """Adapters' forward and backward pass as one function of ours instead of peft's modules; equal to rounding."""
    tf32: bool = False
    """Products of float32 matrices on an NVIDIA GPU in TF32: 10 bits of mantissa, several times as fast. Convolutions are computed so in any case,
    unless torch is told otherwise."""
    cudnn_benchmark: bool = False
    """cuDNN tries its kernels at each new shape and keeps the fastest."""
    shard: bool = False
    """Of several processes each holds a slice of every weight, moment and average (FSDP, arXiv 2304.11277): for whole UNets that do not fit
    one GPU, at the price of putting each block together whenever it is computed."""
    offload: tuple[Literal["activations", "average"], ...] = ()
    """What waits in a GPU's host memory: activations between forward and backward pass, and the average of the weights between steps. (Text
    encoders and VAE are there whenever a step does not need them.)"""


class PromptGroups(Section):
    """Kinds of prompts that a run on pictures of one's own is judged by, as `t2ilib study new` writes them, in the order in which they speak
    for what a report says in a word."""

    contexts: tuple[str, ...] = ()
    """What was taught, in places where no training picture shows it."""
    captions: tuple[str, ...] = ()
    """Captions as they stand beside the pictures. Those of held-out pictures say what was learned: what is drawn of one is held against
    its picture."""
    trigger: tuple[str, ...] = ()
    """The words that call it up, and nothing else."""
    styles: tuple[str, ...] = ()
    """The same in other styles."""
    unrelated: tuple[str, ...] = ()
    """What has nothing to do with the training, and should be drawn as the base draws it; fifty or more."""

    @model_validator(mode="after")
    def something_is_asked(self) -> "PromptGroups":
        if not any(self.named().values()):
            raise ValueError(f"all groups are empty: give prompts to one of {', '.join(type(self).model_fields)}")
        return self

    def named(self) -> dict[str, tuple[str, ...]]:
        """Group -> prompts, of those that have any."""
        return {name: prompts for name, prompts in self if prompts}


class EvaluationConfig(Section):
    """What is measured and drawn, and when. Step counts of 0 mean only before and after training."""

    validate_every: Annotated[int, Field(ge=0)] = 50
    validation_timesteps: Positive = 8
    validation_pictures: Positive = 64
    """How many of the held-out pictures are measured at most: always the same ones."""
    sample_every: Annotated[int, Field(ge=0)] = 100
    sample_every_epochs: Annotated[int, Field(ge=0)] = 0
    """The same in passes over the training pictures, in place of `sample_every`."""
    animation: Literal["none", "gif", "webp"] = "gif"
    """What the samples of a run become at its end, under `progress/`: every prompt's picture as it changes with the steps. gif has 256
    colours and plays everywhere; webp has all of them, for photographs."""
    strip_steps: tuple[Positive, ...] | None = None
    """At the end, for each prompt, the picture that the network predicts in each of these sampling steps (the first is 1), under
    `denoising/`; empty: in eight, spread evenly. None: no strips."""
    prompts: tuple[str, ...] = ()
    """Fixed prompts of the sample grids; empty takes captions, held-out ones first. On pictures of one's own they are also what is drawn
    and measured at the end."""
    negative_prompt: str = ""
    """What guidance leads away from, in everything that a run draws."""
    num_inference_steps: Positive = 20
    guidance_scale: Annotated[float, Field(ge=1)] = 3.0
    adapters: tuple[FinishedAdapter, ...] = ()
    """Of a run that trains nothing: adapters that are there already, which it draws and is measured with."""
    step_counts: tuple[Positive, ...] = ()
    """The measure `step_counts` draws the test prompts in each of these numbers of steps too, by the same sampler and guidance."""
    vae_tiling: bool = False
    """Pictures are decoded in overlapping tiles of half the side that the VAE was made for (32 latents at least): a fraction of the
    memory, more time, and tones that may differ from tile to tile. What is trained on is always encoded whole."""
    measures: tuple[str, ...] | None = None
    """What judges the pictures that are drawn at the end: names from `evaluation.measures.MEASURES`, of entry points, or of objects
    in Python files (`my_measures.py:sharpness`). None: all that come with t2ilib and apply."""
    clip_model: str | None = None
    """Folder or Hub id of the CLIP that scores pictures; None takes the base's own `clip` folder, if it has one."""
    prompt_groups: PromptGroups | None = None
    """Pictures of one's own: what is drawn and judged at the end, by kind, in place of `prompts`."""
    embedding_models: tuple[Location, ...] = ()
    """Folders or Hub ids of the models that say how alike pictures are: DINOv2, a CLIP, another vision transformer. With
    `:patches` behind it all its patches are compared, each in its place, not its one vector. The first decides. Empty takes `clip_model`, or the
    patches of the base's own `clip` folder."""
    copy_detector: Place | None = None
    """A TorchScript file of SSCD (arXiv 2202.10261), which finds copied pictures. Only open one that you trust."""

    @model_validator(mode="after")
    def holds_together(self) -> "EvaluationConfig":
        if self.sample_every_epochs and self.sample_every not in (0, 100):
            raise ValueError(
                f"sample_every {self.sample_every} and sample_every_epochs {self.sample_every_epochs} both say when to draw: leave one of"
                " them out"
            )
        if self.strip_steps and max(self.strip_steps) > self.num_inference_steps:
            raise ValueError(
                f"strip_steps names sampling step {max(self.strip_steps)}, and num_inference_steps is {self.num_inference_steps}: name"
                " steps up to it"
            )
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError(
                "negative_prompt is what guidance leads away from, and at guidance_scale 1 there is none: raise it, or leave it out"
            )
        if len(set(self.step_counts)) < len(self.step_counts):
            raise ValueError(f"step_counts names a number twice: {', '.join(map(str, self.step_counts))}")
        if self.step_counts and self.measures is not None and "step_counts" not in self.measures:
            raise ValueError(
                "step_counts is what the measure of this name draws, and measures does not name it: add it, or leave one out"
            )
        return self


class TrackingConfig(Section):
    """Where the run is logged. `experiment` None: not to MLflow."""

    experiment: str | None = None
    uri: str | None = None
    """None: MLFLOW_TRACKING_URI, else SQLite beside the results."""
    beside: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that are told the same, beside MLflow or without it; they write below `output`, wandb without a login only there."""
    parent_run_id: str | None = None
    tags: dict[str, str] = {}
