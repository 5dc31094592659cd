"""The CLIP score: how well picture and prompt agree according to a contrastive model (arXiv 2104.08718)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from t2ilib.config import RunConfig
from t2ilib.evaluation.context import Context
from t2ilib.evaluation.metrics import Metric
from t2ilib.memory import align
from t2ilib.models.families import tokenize
from t2ilib.models.pipeline import clip_folder, quiet_libraries

METRICS = {
    "clip_score/{group}": Metric("CLIP score, {group}", "score", "higher", table="CLIP scores"),
    "clip_score/concept": Metric("CLIP score, concept", "score", "higher", table=None),
    "clip_score/contexts": Metric(
        "CLIP score in new contexts", "score", "higher", table="Learned and kept", role="followed"
    ),
    "clip_score/prompts": Metric("CLIP score", "score", "higher", table="Learned and kept", role="followed"),
}
"""Of the drawn world's groups it is shown and decides nothing, for there the checker counts. Of the concepts it is
measured and not shown: the tiny models' CLIP has never seen one, and scores a base that draws none of them higher
than a model that does. Of a run's own prompts, the last entry, nothing else judges the pictures."""


def lacks(run: RunConfig) -> str | None:
    """Why a run has no CLIP to be scored by, or None where it has one."""
    known = run.evaluation.clip_model or clip_folder(run.model.base)
    return None if known else "set evaluation.clip_model, since no CLIP lies beside its base"


def load_clip(run: RunConfig, device: torch.device):
    """(CLIP model, tokenizer) for scoring, on `device`."""
    from transformers import AutoTokenizer, CLIPModel

    name = run.evaluation.clip_model or clip_folder(run.model.base)
    with quiet_libraries():
        clip, tokenizer = CLIPModel.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    align(clip)
    return clip.to(device).eval(), tokenizer


def shared_clip(context: Context):
    """The same for the run of a context, loaded once."""
    if "clip" not in context.shared:
        context.shared["clip"] = load_clip(context.run, context.components.device)
    return context.shared["clip"]


@torch.no_grad()
def clip_scores(model, tokenizer, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """Of each picture 100 max(cos(image, text), 0) (CLIPScore without its factor of 2.5, arXiv 2104.08718)."""
    size = model.config.vision_config.image_size
    resized = [picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
    pixels = (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2).to(model.device)
        / 255
    )
    mean, std = pixel_statistics(Path(model.config._name_or_path))
    pixels = (pixels - mean.to(pixels)) / std.to(pixels)
    image = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    ids = tokenize(tokenizer, texts).to(model.device)
    text = F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)
    return (100 * (image * text).sum(-1).clamp(min=0)).tolist()


def pixel_statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel mean and standard deviation (3, 1, 1) a CLIP was trained with; OpenAI's where its folder does not say."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    if (folder / "preprocessor_config.json").exists():
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        mean, std = settings["image_mean"], settings["image_std"]
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
