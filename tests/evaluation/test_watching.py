"""Looking on: called before every step, leaving nothing behind. What it sees, test_denoising proves."""

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.evaluation.sampling import draw
from t2ilib.evaluation.watching import Call, watched
from t2ilib.models.load import load_base


def sample(scheduler, num=5):
    scheduler.set_timesteps(num)
    latents = torch.zeros(1, 4, 8, 8)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample


@pytest.mark.parametrize(
    ("scheduler", "count"),
    [(DDIMScheduler(), 5), (PNDMScheduler(skip_prk_steps=True), 6), (HeunDiscreteScheduler(), 9)],
)
def test_every_call_is_seen_and_each_step_ends_once(scheduler, count):
    calls = []
    with watched(scheduler, calls.append):
        sample(scheduler)
        sample(scheduler)
    assert [call.number for call in calls] == [*range(1, count + 1)] * 2
    assert {call.count for call in calls} == {count}
    ends = [sum(call.ends_step(step, 5) for call in calls[:count]) for step in range(1, 6)]
    assert ends == [1] * 5
    assert calls[count - 1].ends_step(5, 5)
    sample(scheduler)
    assert len(calls) == 2 * count
    assert "step" not in vars(scheduler)


def test_a_call_is_of_the_last_step_alone_where_there_are_as_many_as_steps():
    assert [n for n in range(1, 9) if Call(n, 8, None).ends_step(3, 8)] == [3]


def test_what_is_raised_ends_the_drawing_and_leaves_the_model_as_it_was():
    components, seen = load_base(ModelConfig(base="tiny-sd15")), []
    components.unet.train()

    def look(call: Call) -> None:
        seen.append(call.number)
        if call.number == 2:
            raise ConfigError("enough")

    with pytest.raises(ConfigError, match="enough"):
        draw(components, ["a red circle"], EvaluationConfig(num_inference_steps=4), look=look)
    assert seen == [1, 2]
    assert components.unet.training
    assert "step" not in vars(components.scheduler)
