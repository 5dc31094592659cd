"""Noise schedules: against their definitions, and every sampler draws what was trained, whichever class the base came with."""

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from t2ilib.config import ConfigError
from t2ilib.models.noise import NO_SAMPLES, scheduler_for

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# without those that need torchsde, are about another noise formulation, or take seconds to set up
SAMPLERS = [
    name
    for name in dict.fromkeys(each.name for each in KarrasDiffusionSchedulers)
    if "SDE" not in name and "EDM" not in name and "KDPM2" not in name and "LMS" not in name
]


def base(kind="DDIMScheduler", **changes):
    """As published bases have it: the two that would cut off what lies beyond [-1, 1] are told not to."""
    plain = {"clip_sample": False} if kind in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, kind).from_config(SD15 | plain | changes)


def cumulative(scheduler) -> torch.Tensor:
    return diffusers.DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()


def betas_of(kind: str) -> torch.Tensor:
    """As their papers write them down, for a thousand timesteps."""
    if kind == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cosine = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_those_of_their_papers(kind) -> None:
    came = base(
        **({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02} if kind == "scaled_linear" else {})
    )
    found = cumulative(scheduler_for(came, beta_schedule=kind))
    expected = (1 - betas_of(kind)).cumprod(0)
    assert torch.allclose(found, expected, rtol=1e-3)
    roots = expected.sqrt()  # arXiv 2305.08891, algorithm 1
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    zeroed = scheduler_for(came, "v_prediction", kind, True)
    assert cumulative(zeroed)[-1] == 0
    assert torch.allclose(cumulative(zeroed), rescaled, rtol=1e-3, atol=1e-6)
    assert zeroed.config.timestep_spacing == "trailing"
    assert torch.equal(cumulative(scheduler_for(zeroed, zero_terminal_snr=False)), found)


def test_what_is_not_asked_for_stays_the_bases() -> None:
    came = base("PNDMScheduler", prediction_type="v_prediction")
    assert scheduler_for(came) is came
    assert scheduler_for(came, "v_prediction", "scaled_linear", False) is came
    odd = base(beta_start=0.001, beta_end=0.01)
    assert scheduler_for(odd, "sample", "scaled_linear").config.beta_end == 0.01
    other = scheduler_for(odd, beta_schedule="linear")
    assert (type(other), other.config.beta_end, other.config.steps_offset) == (type(odd), 0.02, 1)
    given = base(trained_betas=[0.1] * 1000)
    assert torch.allclose(cumulative(scheduler_for(given, beta_schedule="scaled_linear")), cumulative(base()))


@pytest.mark.parametrize(
    ("came", "asked"),
    [
        (base(), {"zero_terminal_snr": True}),
        (base(prediction_type="v_prediction"), {"prediction": "epsilon", "zero_terminal_snr": True}),
        (base(prediction_type="v_prediction", rescale_betas_zero_snr=True), {"prediction": "epsilon"}),
    ],
)
def test_noise_is_not_predicted_where_nothing_but_noise_is_left(came, asked) -> None:
    with pytest.raises(
        ConfigError, match=r"predicts noise .* says nothing about the picture: set objective.name to v_"
    ):
        scheduler_for(came, **asked)


def drawn(scheduler, pictures: torch.Tensor, off: float = 0.0, largest: list | None = None) -> torch.Tensor:
    """What 20 steps draw by a network that knows the pictures, and answers as it was trained to, by the closed form, but for an error
    of the size `off`; `largest` takes up the largest value after each step."""
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(20)
    alphas, prediction = cumulative(scheduler), scheduler.config.prediction_type
    x = torch.randn(pictures.shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen, place = scheduler.scale_model_input(x, timestep).double(), float(timestep)
        alpha = torch.lerp(alphas[int(place)], alphas[min(int(place) + 1, 999)], place - int(place))
        noise = (seen - alpha.sqrt() * pictures) / (1 - alpha).sqrt()
        answers = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * pictures}
        answer = answers.get(prediction, pictures.double()).float()
        answer = answer + off * torch.randn(answer.shape, generator=generator)
        stochastic = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(answer, timestep, x, return_dict=False, **stochastic)[0]
        if largest is not None:
            largest.append(float(x.abs().max()))
    return x


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_draws_what_was_trained(kind) -> None:
    """Pictures that reach beyond [-1, 1], as latents do; whatever the base's own sampler can do."""
    pictures = 2 * torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "v_prediction", "sample"):
        for betas in ("auto", "squaredcos_cap_v2"):
            for zero in (None, True):
                if prediction == "epsilon" and zero:
                    continue
                scheduler = scheduler_for(base(kind, timestep_spacing="trailing"), prediction, betas, zero)
                error = (drawn(scheduler, pictures) - pictures).abs().mean()
                assert error < 0.1, (prediction, betas, zero, type(scheduler).__name__, float(error))
                if zero:
                    assert int(scheduler.timesteps[0]) == 999
                assert isinstance(scheduler, diffusers.DDIMScheduler) or type(scheduler).__name__ == kind


def test_small_errors_stay_small_under_the_cosine_schedule() -> None:
    """Its last timestep is next to pure noise: where noise is predicted there, errors are divided by 5e-5, and the next steps see what
    no network has been trained on."""
    pictures, came = torch.ones(2, 4, 2, 2), base(timestep_spacing="trailing")
    largest = {}
    for prediction in ("epsilon", "v_prediction", "careless"):
        scheduler = scheduler_for(came, "epsilon" if prediction == "careless" else prediction, "squaredcos_cap_v2")
        if prediction == "careless":
            scheduler = scheduler.from_config(scheduler.config, timestep_spacing="trailing")
        drawn(scheduler, pictures, 0.01, seen := [])
        largest[prediction] = max(seen)
    assert max(largest["epsilon"], largest["v_prediction"]) < 4 < 20 < largest["careless"]


@pytest.mark.parametrize("kind", [name for name in NO_SAMPLES if name in SAMPLERS])
def test_those_that_cannot_draw_samples_cannot(kind) -> None:
    """What the list says, of diffusers' own: one that learns to is taken out of it."""
    scheduler = base(kind, prediction_type="sample")
    with pytest.raises((ValueError, NotImplementedError)):
        drawn(scheduler, torch.zeros(1, 1, 2, 2))
