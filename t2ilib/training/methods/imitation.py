"""Learning from a teacher: a student without some of its blocks is brought to predict what it does, stage by stage (BK-SDM, arXiv 2305.15798,
eq. 1 to 4).

    loss = w_task |s(x_t) - target|^2 + w_output |s(x_t) - t(x_t)|^2 + w_features sum_l |s_l - t_l|^2

with s the student and t the teacher on the same noisy pictures, each square a mean over a sample's elements, and l the stages that both have
(`models.students.answering_stages`). The first two are counted alike: by the run's loss, mask and weights of timesteps. Features
are not pictures, so these have no say in the third.

What a stage gives is what it hands to the next one, after its downsampler or upsampler. Where the innermost stage is left out, the
student's last stage has no downsampler any more; of the teacher's, what goes into that is taken. The features are read by hooks that are
there for the time of a call, on the networks themselves: whoever wraps the student, or computes its blocks again, changes nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from t2ilib.config import RunConfig
from t2ilib.config.objective import ImitationConfig
from t2ilib.evaluation.metrics import Metric
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.students import answering_stages
from t2ilib.training.methods.method import Method, Parts
from t2ilib.training.objectives import OBJECTIVES, Denoising, Objective
from t2ilib.training.others import Frozen

TABLE = "Imitation"
METRICS = {
    "imitation/output": Metric(
        "distance from the teacher's prediction",
        "loss",
        "lower",
        table=TABLE,
        note="mean squared difference of what student and teacher predict of held-out pictures",
    ),
    "imitation/features": Metric(
        "distance from the teacher's stages",
        "loss",
        "lower",
        table=TABLE,
        note="mean squared difference of the outputs of the stages that both have, summed over stages, on held-out pictures",
    ),
}


@dataclass(frozen=True)
class Imitating:
    """The loss of each sample (B,). `plain`: what an error counts; `student`: what is trained, as it is beneath what wraps it; `teacher`: the base
    as it was."""

    plain: Denoising
    weights: ImitationConfig
    student: Denoiser
    teacher: Frozen

    def __call__(self, denoiser: nn.Module, batch: Mapping[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        latents, plain = batch["latents"], self.plain
        noisy = plain.schedule.add_noise(latents, noise, timesteps)
        pairs = answering_stages(self.student.unet) if self.weights.features else []
        with outputs(self.teacher.unet, [theirs for _, theirs in pairs]) as of_teacher:
            taught = self.teacher(noisy, timesteps, batch)
        with outputs(self.student.unet, [own for own, _ in pairs]) as of_student:
            said = denoiser(noisy, timesteps, batch)
        target = OBJECTIVES[plain.predicts](plain.schedule, latents, noise, timesteps)
        losses = self.weights.task * plain.count(said - target, batch, timesteps)
        losses = losses + self.weights.output * plain.count(said - taught, batch, timesteps)
        features = sum(apart(of_student[own], of_teacher[theirs]) for own, theirs in pairs)
        return losses + self.weights.features * (features * batch["weights"] if "weights" in batch else features)


@contextlib.contextmanager
def outputs(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
    """Stage -> what it handed on (B, C, h, w) when the network was called in this scope; and where it has a downsampler, what went into that."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> None:
        if isinstance(output, tuple):  # of the encoder: what is handed on, and all that the decoder gets
            found[name] = output[0], output[1][-2] if len(output[1]) > 1 else None
        else:
            found[name] = output, None

    hooks = [
        unet.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def apart(own: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> Tensor:
    """(B,): the mean squared difference of what two stages give."""
    given = theirs[0] if own[0].shape == theirs[0].shape else theirs[1]
    return (own[0].float() - given.float()).square().mean(dim=(1, 2, 3))


def objective(parts: Parts) -> Imitating:
    return Imitating(parts.plain, parts.run.objective.imitation, parts.denoiser, parts.base)


def terms(imitating: Imitating, plain: Denoising) -> dict[str, tuple[Metric, Objective]]:
    """Both distances alone, whatever they count in the loss."""
    alone = {"imitation/output": {"features": 0.0}, "imitation/features": {"output": 0.0}}
    return {
        name: (METRICS[name], replace(imitating, plain=plain, weights=ImitationConfig(task=0.0, **weights)))
        for name, weights in alone.items()
    }


def always(run: RunConfig) -> bool:
    return True


def passes(run: RunConfig) -> tuple[int, int]:
    return 1, 1


IMITATION = Method(objective, always, passes=passes, terms=terms)
