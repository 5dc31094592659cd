"""The section about what is minimised: plain denoising, or one of the methods that learn from something else beside pictures and captions.

What a method asks of the other sections stands here too (`require`, of a RunConfig), so that these ask nothing about methods.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from t2ilib.config.drawn import DrawnBy
from t2ilib.config.section import Positive, PositiveFloat, Section, Share

Weight = Annotated[float, Field(ge=0)]


class PreferencesConfig(Section):
    """Learning from pairs of pictures of one caption, of which one was chosen and one rejected (`data.source: preferences`)."""

    loss: Literal["dpo", "mapo"] = "dpo"
    """dpo: Diffusion-DPO (arXiv 2311.12908), against the base; mapo: margin-aware, without a reference (arXiv 2406.06424)."""
    beta: PositiveFloat | None = None
    """dpo: how much leaving the base costs, as the paper's experiments count it (their 2,000 to 5,000 hold T and the timestep's weight). mapo:
    what the margin counts beside denoising the chosen picture. None: the authors' 5000, and 0.1."""

    def require(self, run: Any) -> None:
        """Raises ValueError for a run that cannot be trained so."""
        require_trained_base(run, "preferences")
        if run.prior is not None:
            raise ValueError(
                "objective.preferences is about pairs, and pictures of the class are none: set prior to null; what dpo keeps of the base, beta"
                " says"
            )
        if run.objective.loss != "squared":
            raise ValueError(
                f"objective.preferences compares squared errors, and objective.loss is {run.objective.loss}: leave it out"
            )
        if self.loss == "dpo":
            require_reference(run, "objective.preferences: dpo compares with the base")


class ImitationConfig(Section):
    """A student that learns from its teacher beside the pictures (section `student`; BK-SDM, arXiv 2305.15798, sec. 3.2): what each term counts."""

    task: Weight = 1.0
    """Denoising the pictures, as without a teacher."""
    output: Weight = 1.0
    """The error of the student's prediction where the teacher's is the target, counted as `task` counts."""
    features: Weight = 1.0
    """The mean squared difference between the outputs of the stages that both have, summed over stages."""

    @model_validator(mode="after")
    def something_to_imitate(self) -> "ImitationConfig":
        if not (self.output or self.features):
            raise ValueError(
                "output and features are 0, so nothing of the teacher is imitated: raise one, or leave imitation out"
            )
        return self

    def require(self, run: Any) -> None:
        """Raises ValueError for a run that cannot be trained so."""
        if run.student is None:
            raise ValueError(
                "objective.imitation is about a student that learns from its teacher: add a section student that says what it leaves out"
            )


Guidance = Annotated[float, Field(ge=1)]


class ConsistencyConfig(Section):
    """Fewer sampling steps: latent consistency distillation (arXiv 2310.04378), of an adapter LCM-LoRA (arXiv 2311.05556). The base with
    guidance is the teacher; what is trained is drawn by LCM, in few steps and without guidance."""

    solver_steps: Positive = 50
    """DDIM steps in which the teacher would draw. What is trained knows the timesteps between them, and is drawn at some of them."""
    guidance_scale: tuple[Guidance, Guidance] = (3.0, 15.0)
    """The teacher's, as diffusers counts it: of every sample another, between these two. None is asked for in drawing: it is learned. The
    authors' range, which they count from 2 to 14."""
    huber_c: PositiveFloat = 0.001
    """Of the pseudo-Huber loss: far below this an error counts as its square, far above as itself."""

    @model_validator(mode="after")
    def a_range(self) -> "ConsistencyConfig":
        if self.guidance_scale[0] > self.guidance_scale[1]:
            raise ValueError(f"guidance_scale {self.guidance_scale} is empty: give the least, then the most")
        return self

    @property
    def drawn_by(self) -> DrawnBy:
        """In four steps, where a run does not say otherwise."""
        return DrawnBy(
            scheduler="LCMScheduler",
            num_inference_steps=min(4, self.solver_steps),
            guidance_scale=1.0,
            original_inference_steps=self.solver_steps,
        )

    def require(self, run: Any) -> None:
        """Raises ValueError for a run that cannot be trained so."""
        require_trained_base(run, "consistency")
        require_reference(run, "objective.consistency learns from the base")
        objective = run.objective
        if run.prior is not None:
            raise ValueError(
                "objective.consistency learns nothing but what the base draws, so there is nothing to keep of it: set prior to null"
            )
        if objective.snr_gamma is not None or objective.loss != "squared":
            raise ValueError(
                "objective.snr_gamma and objective.loss are about the error of denoising, and consistency has a loss of its own (huber_c): leave"
                " them out"
            )
        if (objective.name, objective.beta_schedule, objective.zero_terminal_snr) != ("auto", "auto", None):
            raise ValueError(
                "objective.consistency learns from the base, which draws by its own prediction and noise alone: leave name, beta_schedule and"
                " zero_terminal_snr out"
            )
        for field, most in (
            ("num_inference_steps", run.evaluation.num_inference_steps),
            ("step_counts", max(run.evaluation.step_counts, default=0)),
        ):
            if most > self.solver_steps:
                raise ValueError(
                    f"evaluation.{field} {most} is more than objective.consistency.solver_steps {self.solver_steps}, of whose timesteps LCM"
                    " draws at some: lower the one, or raise the other"
                )


def require_trained_base(run: Any, method: str) -> None:
    """Raises ValueError for a run that trains no adapter, nor the UNet of a base that can draw."""
    if run.trains not in ("adapter", "unet"):
        raise ValueError(
            f"objective.{method} is about adapters and the UNet, and this run trains {run.trains}: leave it out"
        )
    if run.scratch is not None:
        raise ValueError(
            f"objective.{method} starts from a base that can draw, and a network with fresh weights cannot: set scratch to null"
        )


def require_reference(run: Any, why: str) -> None:
    """Raises ValueError for a run that does not begin as the base, or whose base, with its adapter switched off, is another."""
    if run.student is not None:
        raise ValueError(
            f"{why}, and a student begins apart from it: train the student first, then name it in model.base"
        )
    if run.adapter is None:
        return
    if run.adapter.init in ("pissa", "olora", "loftq"):
        raise ValueError(
            f"{why}, which an adapter of init {run.adapter.init!r} has changed or begins apart from: use default or gaussian"
        )
    if run.adapter.tokens:
        raise ValueError(
            f"{why}, which does not know new words: leave adapter.tokens out, or learn them in a run of their own"
        )


class ObjectiveConfig(Section):
    """What is minimised: with none of METHODS given, the error of denoising."""

    name: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """What the network predicts; "auto" takes what the base model predicts."""
    snr_gamma: Annotated[float, Field(gt=0)] | None = 5.0
    """min-SNR weighting (arXiv 2303.09556); None for the plain mean squared error."""
    caption_dropout: Share = 0.0
    """Probability of an empty caption, for classifier-free guidance (arXiv 2207.12598)."""
    beta_schedule: Literal["auto", "linear", "scaled_linear", "squaredcos_cap_v2"] = "auto"
    """How noise grows with the timestep: linear (DDPM, arXiv 2006.11239), scaled_linear (latent diffusion, arXiv 2112.10752),
    squaredcos_cap_v2 (arXiv 2102.09672); "auto" takes the base's."""
    zero_terminal_snr: bool | None = None
    """Whether nothing of the picture is left at the last timestep (arXiv 2305.08891, sec. 3.1); None takes the base's."""
    loss: Literal["squared", "huber"] = "squared"
    """huber: the pseudo-Huber loss, which a few large errors sway less (arXiv 2403.16728; in diffusion since arXiv 2310.14189, sec. 3.3)."""
    huber_delta: PositiveFloat = 0.1
    """Far below this an error counts as its square, far above as twice this times itself."""
    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """So much noise of one value a channel on top, for pictures that are dark or bright as a whole (N. Guttenberg, "Diffusion with Offset
    Noise", 2023)."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How often each timestep is trained; logit_normal: those in the middle more often (arXiv 2403.03206, sec. 3.1)."""
    timestep_mean: float = 0.0
    timestep_std: PositiveFloat = 1.0
    """Of the normal distribution whose logistic function says where in the schedule a timestep lies."""
    timestep_range: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]] = (0.0, 1.0)
    """Which part of the schedule is trained, as shares of it: (0.0, 0.5) is its less noisy half."""

    preferences: PreferencesConfig | None = None
    imitation: ImitationConfig | None = None
    consistency: ConsistencyConfig | None = None

    @property
    def method(self) -> str:
        """Its name among METHODS, or `denoising`."""
        return next((name for name in METHODS if getattr(self, name) is not None), "denoising")

    @property
    def drawn_by(self) -> DrawnBy | None:
        """How what is trained so is drawn; None: as its base is."""
        return getattr(getattr(self, self.method, None), "drawn_by", None)

    def require(self, run: Any) -> None:
        """Raises ValueError for a run to which the method does not fit."""
        if self.method != "denoising":
            getattr(self, self.method).require(run)

    @model_validator(mode="before")
    @classmethod
    def what_follows(cls, values: Any) -> Any:
        """A method's loss is not weighted by min-SNR, unless that is asked for."""
        if isinstance(values, Mapping) and any(values.get(name) is not None for name in METHODS):
            return {"snr_gamma": None, **values}
        return values

    @model_validator(mode="after")
    def holds_together(self) -> "ObjectiveConfig":
        given = [name for name in METHODS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different objectives: leave one of them out")
        if self.name == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "with zero_terminal_snr the last timestep is noise alone, of which predicting the noise (epsilon) says nothing about the"
                " picture: take name v_prediction or sample, or leave zero_terminal_snr out"
            )
        if self.loss != "huber" and self.huber_delta != 0.1:
            raise ValueError(f"huber_delta is about loss huber, and loss is {self.loss}: leave it out")
        if self.timesteps != "logit_normal" and (self.timestep_mean, self.timestep_std) != (0.0, 1.0):
            raise ValueError(f"timestep_mean and timestep_std are about timesteps logit_normal, not {self.timesteps}")
        if self.timestep_range[0] >= self.timestep_range[1]:
            raise ValueError(f"timestep_range {self.timestep_range} is empty: give a share from, and a larger one to")
        if self.timestep_range != (0.0, 1.0) and (self.beta_schedule != "auto" or self.zero_terminal_snr):
            raise ValueError(
                f"timestep_range {self.timestep_range} trains a part of the schedule, and beta_schedule or zero_terminal_snr changes all of"
                " it: what is not trained would be drawn by noise it never saw. Leave one of them out"
            )
        return self


METHODS = ("preferences", "consistency", "imitation")
"""Fields of `objective` that each are an objective of its own (`training.methods`)."""


def drawn_so(objective: Any) -> DrawnBy | None:
    """`ObjectiveConfig.drawn_by` of a section as it is written; None too where it is wrong, which is told when it is read."""
    try:
        return ObjectiveConfig.model_validate(objective).drawn_by
    except ValidationError:
        return None
