"""The held-out loss of a run's checkpoints, on the grid of timesteps and noise that its training measured it on.

Training measures it every so many steps and writes it by picture; what it did so stays. Here the rest is measured, in the run's own
precision, and written to the same place (`held_out/step-000100.json`). Leaves out the base alone, which every training measures before its
first step.
"""

import contextlib
import json

import torch

from t2ilib.config import ObjectiveConfig, RunConfig
from t2ilib.data.cache import EncodedDataset, FreshText, encoded_folder, keep_latents
from t2ilib.data.dataset import Dataset, load_datasets
from t2ilib.data.samples import Samples
from t2ilib.evaluation.steps import losses_file
from t2ilib.models.components import Components
from t2ilib.models.denoiser import Denoiser
from t2ilib.text import shown, write_whole
from t2ilib.training.loop import build_accelerator
from t2ilib.training.objectives import build_objective
from t2ilib.training.setups import measured_part, noise_schedule, trains_text
from t2ilib.training.validation import held_out_loss


def load_held_out(run: RunConfig) -> Dataset:
    """The pictures that a run's held-out loss is of; none where it holds none out. Raises ConfigError as reading them does."""
    training, held_out = load_datasets(run)
    with contextlib.closing(training):
        return measured_part(held_out, run.evaluation.validation_pictures)


@torch.no_grad()
def write_held_out(run: RunConfig, held_out: Dataset, components: Components, step: int) -> None:
    """Measures `held_out` with a model as it is and writes the losses, by picture, as those of `step`."""
    samples = Samples(held_out, run.data, run.seed, multiple=components.side_multiple, held_out=True)
    latents = keep_latents(components, (samples,), encoded_folder(run.data.cache_path))[0]
    with_text = trains_text(run)
    encoded = EncodedDataset(samples, latents, None if with_text else FreshText(components))
    plain = build_objective(
        ObjectiveConfig(name=run.objective.name, snr_gamma=None), schedule := noise_schedule(components)
    )
    accelerator = build_accelerator(run)
    with components.awake(), accelerator.autocast():
        result = held_out_loss(
            Denoiser(components, with_text).eval(),
            plain,
            encoded,
            schedule.config.num_train_timesteps,
            run.evaluation.validation_timesteps,
            components.device,
        )
    rows = [
        {"picture": shown(record.path.name), "caption": record.caption, "loss": loss}
        for record, loss in zip(held_out.records, result.by_picture(), strict=True)
    ]
    path = losses_file(run.output, step)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(rows, indent=1))
