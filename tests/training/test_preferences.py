"""Diffusion-DPO and MaPO against plain re-statements, and the base that they are held to."""

import math

import pytest
import torch
from adapting import CAPTIONS, batch_of, build_parts, copy_parts

from t2ilib.adapters.attach import attach_adapters
from t2ilib.adapters.fused import fuse_adapters
from t2ilib.config import ConfigError, ModelConfig, ObjectiveConfig
from t2ilib.models.denoiser import Denoiser
from t2ilib.models.load import quantize_parts
from t2ilib.runfile import build_run
from t2ilib.training.methods import METHODS
from t2ilib.training.methods.method import Parts
from t2ilib.training.methods.preferences import SCALE, likelihood
from t2ilib.training.objectives import build_objective
from t2ilib.training.others import base_as_it_was
from t2ilib.training.pairs import HeldOutPairs, of_both
from t2ilib.training.setups import noise_schedule
from t2ilib.training.validation import HeldOutLoss

KINDS = {
    "lora": {"dropout": 0.5},
    "dora": {"kind": "dora", "dropout": 0.5},
    "gaussian": {"init": "gaussian"},
    "text encoders": {"text_encoder_targets": "attention", "dropout": 0.5},
    "nf4": {},
    "nf4 dora": {"kind": "dora"},
}
TIMESTEPS = torch.tensor([100, 800])


def run_of(adapter: dict | None, **preferences):
    training = {} if adapter is not None else {"training": {"trains": "unet"}}
    return build_run({"adapter": adapter, "objective": {"preferences": preferences}} | training)


def pairs_of(components, trains_text: bool) -> tuple[dict, torch.Tensor]:
    """A batch of two pairs, and its noise."""
    generator = torch.Generator().manual_seed(3)
    latents, rejected, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    batch = batch_of(components)
    batch = {name: batch[name] for name in ("captions", "time_ids")} if trains_text else batch
    return {"latents": latents, "rejected": rejected, "rejected_time_ids": 2 * batch["time_ids"], **batch}, noise


class Case:
    """A model with an adapter, or trained as a whole, its objective, and the same base loaded apart."""

    def __init__(self, adapter: dict | None, quantization: str = "none", **preferences):
        self.components = build_parts()
        if quantization != "none":
            quantize_parts(self.components, ModelConfig(quantization=quantization), torch.float32, torch.device("cpu"))
        self.apart = self.components if quantization != "none" else copy_parts(self.components)
        run = run_of(None if adapter is None else {"rank": 2, "alpha": 2.0, **adapter}, **preferences)
        self.trains_text = bool(run.adapter and run.adapter.text_encoder_targets)
        self.batch, self.noise = pairs_of(self.components, self.trains_text)
        self.before = Denoiser(self.apart, self.trains_text).eval()
        self.expected = self.base_says() if quantization != "none" else None
        if adapter is None:
            self.modules = {"unet": self.components.unet.requires_grad_(True)}
        else:
            self.modules = attach_adapters(self.components, run.adapter, 0)
            for module in self.modules.values():
                fuse_adapters(module)
        self.denoiser = Denoiser(self.components, self.trains_text)
        self.base = base_as_it_was(run, self.components, self.denoiser)
        self.plain = build_objective(run.objective, noise_schedule(self.components))
        base = self.base if METHODS["preferences"].needs_base(run) else None
        self.objective = METHODS["preferences"].objective(Parts(run, self.plain, self.denoiser, base))

    @torch.no_grad()
    def base_says(self) -> torch.Tensor:
        return self.before(self.batch["latents"], TIMESTEPS, self.batch)

    def move(self) -> None:
        """Away from the base, as training would."""
        torch.manual_seed(1)
        with torch.no_grad():
            for module in self.modules.values():
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{name}": p
            for part, m in self.modules.items()
            for name, p in m.named_parameters()
            if p.requires_grad
        }

    def losses(self, train: bool = False) -> torch.Tensor:
        self.denoiser.train(train)
        return self.objective(self.denoiser, self.batch, self.noise, TIMESTEPS)

    def errors(self, denoiser) -> list[torch.Tensor]:
        """Squared errors (B,) of chosen and rejected pictures, stated again: DDPM's noise in closed form, one picture at a time."""
        schedule, found = noise_schedule(self.components), []
        for latents, ids in (("latents", "time_ids"), ("rejected", "rejected_time_ids")):
            latents, batch = self.batch[latents], {**self.batch, "time_ids": self.batch[ids]}
            a = schedule.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
            noisy = a.sqrt() * latents + (1 - a).sqrt() * self.noise
            target = a.sqrt() * self.noise - (1 - a).sqrt() * latents
            target = target if schedule.config.prediction_type == "v_prediction" else self.noise
            said = [
                denoiser(
                    noisy[i : i + 1],
                    TIMESTEPS[i : i + 1],
                    {name: value[i : i + 1] for name, value in batch.items()},
                )
                for i in range(2)
            ]
            found.append((torch.cat(said) - target).square().mean(dim=(1, 2, 3)))
        return found


def case_of(name: str, **preferences) -> Case:
    return Case(KINDS[name], "nf4" if "nf4" in name else "none", **preferences)


@pytest.mark.parametrize("name", [*KINDS, "whole"])
def test_at_the_start_the_loss_is_log_2_whatever_is_dropped(name):
    case = Case(None) if name == "whole" else case_of(name)
    rounding = 1e-3  # of a DoRA's norms, 2,500 times
    torch.testing.assert_close(case.losses(train=True), torch.full((2,), math.log(2)), rtol=rounding, atol=0)


@pytest.mark.parametrize("name", [*KINDS, "whole"])
def test_the_reference_is_the_base_whatever_was_learned(name):
    """To the bit, in the middle of training, with dropout; and everything trains afterwards that did before."""
    case = Case(None) if name == "whole" else case_of(name)
    before = set(case.parameters())
    case.move()
    case.denoiser.train()
    said = case.base(case.batch["latents"], TIMESTEPS, case.batch)
    expected = case.base_says() if case.expected is None else case.expected
    assert torch.equal(said, expected)
    assert not said.requires_grad
    assert set(case.parameters()) == before
    assert not torch.equal(case.denoiser.eval()(case.batch["latents"], TIMESTEPS, case.batch), expected)


@pytest.mark.parametrize("name", ["lora", "dora", "text encoders", "whole"])
def test_dpo_and_its_gradients_are_those_of_equation_14(name):
    case = Case(None, beta=3.0) if name == "whole" else case_of(name, beta=3.0)
    case.move()
    losses = case.losses()
    losses.mean().backward()
    found = {key: p.grad.clone() for key, p in case.parameters().items()}
    for parameter in case.parameters().values():
        parameter.grad = None
    chosen, rejected = case.errors(case.denoiser.eval())
    with torch.no_grad():
        chosen_before, rejected_before = case.errors(case.before)
    inside = -3.0 / 2 * ((chosen - chosen_before) - (rejected - rejected_before))
    expected = -torch.log(torch.sigmoid(inside))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    expected.mean().backward()
    assert any(p.grad.abs().max() > 0 for p in case.parameters().values())
    for key, parameter in case.parameters().items():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-5)


def test_mapo_is_its_equation_and_has_no_reference():
    case = case_of("lora", loss="mapo", beta=0.2)
    case.move()
    assert case.objective.reference is None
    chosen, rejected = (errors.double() for errors in case.errors(case.denoiser.eval()))
    odds = [SCALE * errors / ((SCALE * errors).exp() - 1) for errors in (chosen, rejected)]
    expected = chosen - 0.2 * torch.log(torch.sigmoid(1000 * (odds[0] - odds[1])))
    torch.testing.assert_close(case.losses().double(), expected, rtol=1e-3, atol=1e-3)


def test_a_likelihood_falls_from_one_to_nothing_without_a_gap():
    losses = torch.tensor([0.0, 1e-10, 1e-7, 2e-6, 0.0199, 0.0201, 1.0, 10.0, 200.0], requires_grad=True)
    found = likelihood(losses)
    found.sum().backward()
    torch.testing.assert_close(found[:4].detach(), torch.ones(4), rtol=0, atol=2e-6)
    assert (found.diff() <= 1e-7).all()
    assert torch.isfinite(losses.grad).all()
    assert (losses.grad <= 0).all()
    assert (losses.grad.diff() >= -1e-4).all(), "steepest at 0, where it is -1/4"
    assert losses.grad[0] == -0.25


def test_weights_are_of_pairs_and_captions_are_words_or_tensors():
    case = case_of("lora")
    case.batch["weights"] = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(case.losses().detach(), math.log(2) * case.batch["weights"])
    both, noise, timesteps = of_both({**case.batch, "captions": CAPTIONS}, case.noise, TIMESTEPS)
    assert both["captions"] == CAPTIONS * 2
    assert "weights" not in both
    assert torch.equal(both["latents"], torch.cat([case.batch["latents"], case.batch["rejected"]]))
    assert torch.equal(noise[:2], noise[2:])
    assert timesteps.tolist() == [100, 800, 100, 800]


def test_held_out_pairs_say_how_far_a_model_went_and_where_to():
    case = case_of("lora")

    def on_grid(denoiser, objective):
        return HeldOutLoss(objective(denoiser, case.batch, case.noise, TIMESTEPS)[:, None], TIMESTEPS[:1])

    pairs = HeldOutPairs(case.plain, case.base, on_grid)
    case.denoiser.eval()
    with torch.no_grad():
        chosen = case.plain(case.denoiser, case.batch, case.noise, TIMESTEPS)[:, None]
        assert pairs.measure(case.denoiser, chosen) | {"pairs/ranked": 0, "pairs/held_out": 2} == {
            "pairs/ranked": 0,
            "pairs/held_out": 2,
            "pairs/accuracy": 0.5,
            "pairs/margin": 0.0,
            "pairs/distance": 0.0,
        }
        before = [errors for errors in case.errors(case.before)]
        case.move()
        chosen = case.plain(case.denoiser, case.batch, case.noise, TIMESTEPS)[:, None]
        found, now = pairs.measure(case.denoiser, chosen), case.errors(case.denoiser)
    gained = (now[1] - now[0]) - (before[1] - before[0])
    assert found["pairs/margin"] == pytest.approx(gained.mean().item(), rel=1e-4, abs=1e-6)
    assert found["pairs/accuracy"] == (gained > 0).float().mean().item()
    assert found["pairs/ranked"] == (now[1] > now[0]).float().mean().item()
    assert found["pairs/distance"] > 0
    assert found.keys() == pairs.declared().keys()
    assert HeldOutPairs(case.plain, None, on_grid).declared().keys() == {"pairs/ranked", "pairs/held_out"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"adapter": {"init": "pissa"}}, "init 'pissa' has changed"),
        ({"adapter": {"init": "loftq"}, "model": {"quantization": "nf4"}}, "init 'loftq'"),
        ({"adapter": {"tokens": {"<c>": "cat"}}}, "does not know new words"),
        ({"adapter": {}, "prior": {"prompts": ["a dog"]}}, "set prior to null"),
        ({"scratch": {}}, "starts from a base that can draw"),
        ({"training": {"trains": "nothing", "steps": 0}}, "this run trains nothing"),
        ({"adapter": {}, "objective": {"loss": "huber"}}, "compares squared errors, and objective.loss is huber"),
    ],
)
def test_what_cannot_be_compared_with_the_base_is_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        build_run(values | {"objective": values.get("objective", {}) | {"preferences": {}}})
    if "init" in values.get("adapter", {}):
        assert build_run(values | {"objective": {"preferences": {"loss": "mapo"}}})


def test_a_method_is_not_weighted_by_min_snr_and_leaves_other_runs_as_they_were():
    assert ObjectiveConfig(preferences={}).snr_gamma is None
    assert ObjectiveConfig(preferences={}, snr_gamma=5.0).snr_gamma == 5.0
    assert "preferences" not in build_run({"adapter": {}}).deciding()["objective"]
    assert "preferences" in run_of({}).deciding()["objective"]
