import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from t2ilib.config import ConfigError, ObjectiveConfig
from t2ilib.runfile import build_run
from t2ilib.seeds import generator_for
from t2ilib.training.objectives import (
    OBJECTIVES,
    addressed_noise,
    build_objective,
    min_snr_weights,
    pseudo_huber,
    trained_part,
)

TIMESTEPS = torch.tensor([0, 3, 250, 700, 999])


def scheduler(prediction="epsilon", **extra):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **extra
    )


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


def perfect(prediction, latents, noise, abar):
    """What a network that knows the answer says, in closed form from the cumulative alphas."""
    a, s = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    return {"epsilon": noise, "v_prediction": a * noise - s * latents, "sample": latents}[prediction]


@pytest.mark.parametrize("prediction", list(OBJECTIVES))
def test_targets_agree_with_the_reverse_process(prediction, drawn):
    """Whatever is predicted, the scheduler's own step, told the target, must recover the clean latents."""
    latents, noise = drawn
    schedule = scheduler(prediction, clip_sample=False)
    target = OBJECTIVES[prediction](schedule, latents, noise, TIMESTEPS)
    noisy = schedule.add_noise(latents, noise, TIMESTEPS)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        recovered = schedule.step(target[i : i + 1], timestep, noisy[i : i + 1]).pred_original_sample
        assert torch.allclose(recovered, latents[i : i + 1], atol=2e-3), timestep


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", list(OBJECTIVES))
def test_a_perfect_denoiser_has_no_loss_and_another_has(prediction, gamma, drawn):
    latents, noise = drawn
    schedule = scheduler(prediction)
    abar = schedule.alphas_cumprod[TIMESTEPS]
    a, s = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    seen = []

    def denoiser(noisy, timesteps, batch):
        seen.append((noisy, timesteps, batch))
        return perfect(prediction, latents, noise, abar)

    objective = build_objective(ObjectiveConfig(snr_gamma=gamma), schedule)
    batch = {"latents": latents, "other": "kept"}
    losses = objective(denoiser, batch, noise, TIMESTEPS)
    assert losses.shape == (5,)
    assert losses.max() < 1e-10
    noisy, timesteps, given = seen[0]
    assert torch.allclose(noisy, a * latents + s * noise, atol=1e-6)  # DDPM, eq. 4
    assert torch.equal(timesteps, TIMESTEPS)
    assert given is batch
    wrong = objective(lambda *_: perfect(prediction, latents, noise, abar) + 2.0, batch, noise, TIMESTEPS)
    weights = torch.ones(5) if gamma is None else min_snr_weights(schedule.alphas_cumprod, prediction, gamma)[TIMESTEPS]
    assert torch.allclose(wrong, 4.0 * weights, rtol=1e-4)


def test_a_samples_loss_does_not_depend_on_its_batch(drawn):
    latents, noise = drawn
    objective = build_objective(ObjectiveConfig(), scheduler())

    def denoiser(noisy, timesteps, batch):
        return noisy * 0.3

    together = objective(denoiser, {"latents": latents}, noise, TIMESTEPS)
    alone = [
        objective(denoiser, {"latents": latents[i : i + 1]}, noise[i : i + 1], TIMESTEPS[i : i + 1]) for i in range(5)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)
    expected = (noise - 0.3 * scheduler().add_noise(latents, noise, TIMESTEPS)).flatten(1).square().mean(1)
    weights = min_snr_weights(scheduler().alphas_cumprod, "epsilon", 5.0)[TIMESTEPS]
    assert torch.allclose(together, expected * weights, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_weights_are_those_of_hang_et_al(gamma):
    """Section 3.4: min(SNR, g) on x0's loss; the same objective on epsilon's is divided by SNR, on v's by SNR + 1."""
    schedule = scheduler()
    snr = compute_snr(schedule, torch.arange(1000))  # diffusers' own
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    for prediction, expected in (
        ("epsilon", clipped / snr),
        ("v_prediction", clipped / (snr + 1)),
        ("sample", clipped),
    ):
        weights = min_snr_weights(schedule.alphas_cumprod, prediction, gamma)
        assert weights.shape == (1000,)
        assert torch.allclose(weights, expected, rtol=1e-4), prediction
    assert float(min_snr_weights(schedule.alphas_cumprod, "epsilon", gamma).max()) == pytest.approx(1)


@pytest.mark.parametrize("timestep", [10, 250, 900])
def test_weighted_losses_agree_between_predictions(timestep, drawn):
    """One error in x0, told as epsilon, v or sample, weighs the same: that is what the three weights are for."""
    latents, noise = (tensor[:1] for tensor in drawn)
    t = torch.tensor([timestep])
    losses = []
    for prediction in OBJECTIVES:
        schedule = scheduler(prediction)
        abar = schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        guess = latents.double() + 0.1 * torch.sin(torch.arange(256.0)).view(1, 4, 8, 8)
        implied_noise = (a * latents + s * noise - a * guess) / s
        said = {"epsilon": implied_noise, "v_prediction": a * implied_noise - s * guess, "sample": guess}[prediction]
        objective = build_objective(ObjectiveConfig(), schedule)
        losses.append(objective(lambda *_, said=said: said, {"latents": latents.double()}, noise.double(), t).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_zero_terminal_snr():
    zeroed = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert zeroed[-1] == 0
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        min_snr_weights(zeroed, "epsilon", 5.0)
    for prediction in ("v_prediction", "sample"):
        weights = min_snr_weights(zeroed, prediction, 5.0)
        assert bool(torch.isfinite(weights).all())
        assert weights[-1] == 0


def test_zero_terminal_snr_of_the_training_scheduler():
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        build_objective(ObjectiveConfig(), scheduler("epsilon", rescale_betas_zero_snr=True))


def test_names():
    assert build_objective(ObjectiveConfig(name="sample"), scheduler("epsilon"))
    with pytest.raises(ConfigError, match=r"objective.name: 'epsilom'.*Did you mean 'epsilon'"):
        build_run({"adapter": {}, "objective": {"name": "epsilom"}})


def test_auto_follows_the_base_and_a_name_overrides_it(drawn):
    latents, noise = drawn

    def knows_noise(*_):
        return noise

    def loss(name, prediction):
        objective = build_objective(ObjectiveConfig(name=name), scheduler(prediction))
        return objective(knows_noise, {"latents": latents}, noise, TIMESTEPS).sum()

    assert loss("auto", "epsilon") == 0 == loss("epsilon", "v_prediction")
    assert loss("auto", "v_prediction") > 0
    assert loss("sample", "epsilon") > 0


def test_noise_is_addressed_by_sample_and_step():
    shape = torch.Size((4, 8, 8))
    noise, timesteps = addressed_noise(0, 7, [5, 2, 9], shape, 1000)
    assert noise.shape == (3, 4, 8, 8)
    assert timesteps.shape == (3,)
    assert timesteps.dtype == torch.int64
    for ids in ([9], [2, 5], [9, 2, 5, 11]):
        part_noise, part_timesteps = addressed_noise(0, 7, ids, shape, 1000)
        for row, sample in enumerate(ids):
            if sample in (5, 2, 9):
                there = [5, 2, 9].index(sample)
                assert torch.equal(part_noise[row], noise[there])
                assert part_timesteps[row] == timesteps[there]
    assert torch.equal(noise[0], torch.randn(shape, generator=generator_for(0, "noise", 7, 5)))
    for other in (addressed_noise(1, 7, [5], shape, 1000), addressed_noise(0, 8, [5], shape, 1000)):
        assert not torch.equal(other[0][0], noise[0])


def test_timesteps_cover_the_schedule_evenly():
    _, timesteps = addressed_noise(0, 0, list(range(2000)), torch.Size((1,)), 10)
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10
    assert ((counts - 200).float().square() / 200).sum() < 27.9  # chi squared, 9 degrees of freedom, p = 0.001


def answering(error):
    """A network that is off by `error` from the clean latents."""
    return lambda noisy, timesteps, batch: batch["latents"] + error


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("delta", [0.1, 1.5])
def test_pseudo_huber_weighted_and_masked_is_the_sum_written_out(delta, gamma, drawn):
    """Element by element: 2 d (sqrt(e^2 + d^2) - d), times the mask over its mean, the timestep's and the sample's weight."""
    latents, noise = drawn
    schedule = scheduler("sample")
    mask = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {"latents": latents, "mask": mask, "weights": torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0])}
    objective = build_objective(ObjectiveConfig(loss="huber", huber_delta=delta, snr_gamma=gamma), schedule)
    losses = objective(answering(noise), batch, noise, TIMESTEPS)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        e, m = noise[i].double(), mask[i].double()
        element = 2 * delta * ((e**2 + delta**2) ** 0.5 - delta) * m
        abar = float(schedule.alphas_cumprod[timestep])
        weight = 1.0 if gamma is None else min(abar / (1 - abar), gamma)
        expected = float(element.sum() / (4 * m.sum())) * weight * float(batch["weights"][i])
        assert losses[i].item() == pytest.approx(expected, rel=1e-4)


def test_pseudo_huber_is_the_square_of_small_errors_and_linear_in_large_ones():
    error = torch.tensor([1e-5, 1e-3, 30.0, 3000.0], requires_grad=True)
    loss = pseudo_huber(error, 0.1)
    assert loss.tolist() == [
        pytest.approx(expected, rel=rel)
        for expected, rel in ((1e-10, 1e-5), (1e-6, 1e-3), (2 * 0.1 * 30, 1e-2), (2 * 0.1 * 3000, 1e-3))
    ]
    loss.sum().backward()
    assert error.grad.tolist() == [pytest.approx(x, rel=1e-3) for x in (2e-5, 2e-3, 0.2, 0.2)]


def test_min_snr_at_both_ends_of_the_schedule():
    """Where nothing is noise and where nothing else is."""
    ends = torch.tensor([1.0, 0.0])
    assert min_snr_weights(ends, "v_prediction", 5.0).tolist() == [0.0, 0.0]
    assert min_snr_weights(ends, "sample", 5.0).tolist() == [5.0, 0.0]
    assert min_snr_weights(ends[:1], "epsilon", 5.0).tolist() == [0.0]


def test_a_last_timestep_that_has_no_weight_is_told(caplog):
    zeroed = scheduler("v_prediction", rescale_betas_zero_snr=True)
    build_objective(ObjectiveConfig(), zeroed)
    assert "snr_gamma 5 gives the last timestep the weight 0" in caplog.text
    caplog.clear()
    build_objective(ObjectiveConfig(snr_gamma=None), zeroed)
    build_objective(ObjectiveConfig(), scheduler("v_prediction"))
    assert not caplog.records


SHAPE = (4, 8, 8)


def test_offset_noise_moves_channels_as_a_whole_and_the_target_with_them(drawn):
    config = ObjectiveConfig(noise_offset=0.1, snr_gamma=None)
    ids = list(range(200))
    noise, timesteps = addressed_noise(0, 7, ids, SHAPE, 1000, config)
    plain, same = addressed_noise(0, 7, ids, SHAPE, 1000)
    assert torch.equal(timesteps, same)
    moved = noise - plain
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-6)
    offsets = moved[:, :, 0, 0]
    assert float(offsets.std()) == pytest.approx(0.1, rel=0.1)
    assert abs(float(offsets.mean())) < 0.015
    assert abs(float(torch.corrcoef(offsets.T)[0, 1])) < 0.2
    again, _ = addressed_noise(0, 7, ids[5:7], SHAPE, 1000, config)
    assert torch.equal(again, noise[5:7]), "by address, whatever else is in the batch"

    latents, noise = drawn[0], noise[:5]
    seen = []

    def knows(noisy, timesteps, batch):
        seen.append(noisy)
        return noise

    objective = build_objective(config, scheduler("epsilon"))
    assert objective(knows, {"latents": latents}, noise, TIMESTEPS).max() == 0
    abar = scheduler().alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    assert torch.allclose(seen[0], abar.sqrt() * latents + (1 - abar).sqrt() * noise, atol=1e-6)


def timesteps_of(count=4000, num_timesteps=10, **options):
    return addressed_noise(0, 0, list(range(count)), (1,), num_timesteps, ObjectiveConfig(**options))[1]


def test_uniform_timesteps_are_the_draws_they_were():
    _, timesteps = addressed_noise(3, 2, [4, 9], SHAPE, 1000)
    assert timesteps.tolist() == [
        int(torch.randint(1000, (), generator=generator_for(3, "timestep", 2, i))) for i in (4, 9)
    ]


def chi_squared(found, shares):
    counts = torch.bincount(found, minlength=len(shares)).double()
    assert counts[shares == 0].sum() == 0
    expected = shares[shares > 0] * counts.sum()
    return float(((counts[shares > 0] - expected).square() / expected).sum())


def test_a_range_of_timesteps_is_drawn_evenly_and_nothing_beside_it():
    shares = torch.zeros(10, dtype=torch.float64)
    shares[2:6] = 0.25
    assert chi_squared(timesteps_of(timestep_range=(0.2, 0.6)), shares) < 16.3  # 3 degrees of freedom, p = 0.001
    assert set(timesteps_of(200, 1000, timestep_range=(0.999, 1.0)).tolist()) == {999}


@pytest.mark.parametrize(
    ("mean", "deviation", "part"), [(0.0, 1.0, (0.0, 1.0)), (-0.8, 0.6, (0.0, 1.0)), (1.0, 2.0, (0.3, 0.9))]
)
def test_logit_normal_timesteps_have_its_density(mean, deviation, part):
    """exp(-(logit(t) - m)^2 / 2 s^2) / (s sqrt(2 pi) t (1 - t)), integrated over each timestep (arXiv 2403.03206)."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = torch.exp(-((torch.logit(t) - mean) ** 2) / (2 * deviation**2)) / (t * (1 - t))
    shares = density.view(10, -1).sum(1)
    first, end = (round(10 * share) for share in part)
    shares[:first], shares[end:] = 0, 0
    options = {"timestep_mean": mean, "timestep_std": deviation, "timestep_range": part}
    found = timesteps_of(timesteps="logit_normal", **options)
    assert chi_squared(found, shares / shares.sum()) < 27.9  # 9 degrees of freedom at most, p = 0.001
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_range": (0.5, 0.5004)}, r"timestep_range \(0.5, 0.5004\) leaves none of the schedule's 1000"),
        (
            {"timesteps": "logit_normal", "timestep_std": 0.1, "timestep_range": (0.9, 1.0)},
            "lies where logit_normal of mean 0 and deviation 0.1 has no timesteps",
        ),
    ],
)
def test_a_part_of_the_schedule_without_timesteps_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        trained_part(ObjectiveConfig(**options), 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"zero_terminal_snr": True, "name": "epsilon"}}, "the last timestep is noise alone"),
        ({"objective": {"zero_terminal_snr": True, "timestep_range": [0, 0.5]}}, "changes all of it"),
        ({"objective": {"beta_schedule": "linear", "timestep_range": [0.1, 1]}}, "changes all of it"),
        ({"objective": {"timestep_range": [0.6, 0.5]}}, "is empty"),
        ({"objective": {"huber_delta": 0.2}}, "huber_delta is about loss huber"),
        ({"objective": {"timestep_mean": 0.2}}, "are about timesteps logit_normal"),
        ({"adapter": None, "scratch": {}, "objective": {"timestep_range": [0, 0.5]}}, "a network that begins with fresh weights"),
        ({"evaluation": {"negative_prompt": "blurred", "guidance_scale": 1}}, "at guidance_scale 1 there is none"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run({"adapter": {}} | changes)
