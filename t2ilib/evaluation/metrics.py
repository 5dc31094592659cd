"""What a trained model is measured by: concepts learned, base knowledge kept, CLIP score.

In the shapes world prompts are scenes, so "did the picture follow its prompt?" is answered by the checker, exactly. On
other pictures only the CLIP score is measured; a metric that was not measured is missing, never zero.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from t2ilib.config import RunConfig
from t2ilib.data import shapes
from t2ilib.evaluation.sampling import draw, save_pictures
from t2ilib.memory import align
from t2ilib.models.components import Components, clip_folder, quiet_libraries
from t2ilib.models.families import tokenize
from t2ilib.tracking import NullTracker, Tracker

SHOWN = 4
"""Pictures of each group that are kept for the report's grid."""


def measure(
    run: RunConfig, components: Components, tracker: Tracker | None = None, metrics: dict[str, float] | None = None
) -> dict[str, float]:
    """Draws test prompts, measures the pictures, and writes all of a run's final numbers to `metrics.json` in its output.

    `metrics`: what training gave (`TrainResult.metrics`), written along. Also keeps some pictures for the report.
    """
    groups = checked_scenes(run)
    prompts = {name: [shapes.caption(scene) for scene in scenes] for name, scenes in groups.items()}
    if not groups and run.evaluation.prompts:
        prompts = {"prompts": list(run.evaluation.prompts)}
    found: dict[str, float] = {}
    shown: list[tuple[str, Image.Image]] = []
    clip = load_clip(run, components)
    for name, texts in prompts.items():
        pictures = draw(components, texts, run.evaluation, resolution=run.data.resolution)
        shown += list(zip(texts, pictures, strict=True))[:: max(1, len(texts) // SHOWN)][:SHOWN]
        if name in groups:
            found |= checked(name, groups[name], pictures)
        if clip is not None:
            found[f"clip_score/{name}"] = clip_score(*clip, pictures, texts)
    if shown:
        save_pictures([picture for _, picture in shown], run.output / "pictures")
        (run.output / "pictures" / "prompts.json").write_text(json.dumps([text for text, _ in shown], indent=1))
    (tracker or NullTracker()).log_metrics(found, run.training.steps)
    metrics = (metrics or {}) | found
    (run.output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def checked_scenes(run: RunConfig) -> dict[str, list[shapes.Scene]]:
    """Test scenes by group, none of them ever trained on: `concept` (what the run was taught) and `base_kept`."""
    count = run.evaluation.checked_prompts
    if run.data.source != "shapes" or not count:
        return {}
    concepts = [name for name in run.data.scenes if name != "base"]
    groups = {"concept": shapes.mixed_scenes(count, "test", 0, concepts)} if concepts else {}
    return groups | {"base_kept": shapes.mixed_scenes(count, "test", 0, ["base"])}


def checked(group: str, scenes: Sequence[shapes.Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Accuracies in [0, 1] by attribute and of all together; for concepts also the share of pictures with the concept asked for,
    and as `chance` the share when every picture is held against every prompt."""
    result = shapes.check(scenes, pictures)
    found = {f"{group}/{name}": value for name, value in result.accuracy.items()}
    found |= {f"{group}/all": result.all_attributes}
    if group == "concept":
        shown = [set(shapes.read(picture).values()) for picture in pictures]
        asked = [scene.concepts[0] for scene in scenes]
        right = [concept in seen for concept, seen in zip(asked, shown, strict=True)]
        for name in dict.fromkeys(asked):
            found[f"concept/{name}"] = float(
                np.mean([hit for hit, concept in zip(right, asked, strict=True) if concept == name])
            )
        found["concept/learned"] = float(np.mean(right))
        found["concept/chance"] = float(np.mean([[concept in seen for seen in shown] for concept in asked]))
    return found


def load_clip(run: RunConfig, components: Components):
    """(CLIP model, tokenizer) for scoring, or None where neither the run names one nor the base brings one."""
    from transformers import AutoTokenizer, CLIPModel

    name = run.evaluation.clip_model or clip_folder(components)
    if name is None:
        return None
    with quiet_libraries():
        clip, tokenizer = CLIPModel.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    align(clip)
    return clip.to(components.device).eval(), tokenizer


@torch.no_grad()
def clip_score(model, tokenizer, pictures: Sequence[Image.Image], texts: Sequence[str]) -> float:
    """Mean of 100 max(cos(image, text), 0) (CLIPScore without its factor of 2.5, arXiv 2104.08718)."""
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
    return float(100 * (image * text).sum(-1).clamp(min=0).mean())


def pixel_statistics(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel mean and standard deviation (3, 1, 1) a CLIP was trained with; OpenAI's where its folder does not say."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    if (folder / "preprocessor_config.json").exists():
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        mean, std = settings["image_mean"], settings["image_std"]
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
