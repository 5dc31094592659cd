"""Shipping the tiny model: round it to half precision, measure what is shipped, and write the numbers into its card.

Guidance is chosen once, on validation prompts; the accuracy in the card is then measured on test prompts, on the packed
half-precision weights as users load them. Every number in the card comes from this code or from the stages' own logs.
"""

import json
from pathlib import Path

import numpy as np
import torch

from t2ilib.config import EvaluationConfig, ModelConfig, check_choice
from t2ilib.evaluation.sampling import draw
from t2ilib.models.components import Components
from t2ilib.models.load import load_base
from t2ilib.runfile import load_yaml
from t2ilib.shapes import checker, world
from t2ilib.shapes.models import pack
from t2ilib.shapes.pretraining import reconstruct

GUIDANCE = (1.5, 2.0, 3.0, 5.0, 7.5)
NUM_TEST, NUM_CHOOSING = 256, 96
STAGES = {
    "tiny-sdxl": ("vae", "vae-whole", "clip", "unet", "clip-again", "unet-again"),
    "tiny-sd15": ("unet",),
}
ABOUT = {
    "tiny-sdxl": """A Stable Diffusion XL pipeline small enough to ship and to train on a CPU. The `clip` folder is the
contrastive model that scores pictures.""",
    "tiny-sd15": """A Stable Diffusion 1.5 pipeline small enough to ship and to train on a CPU. Its autoencoder and text encoder are
tiny-sdxl's autoencoder and first text encoder as they ship there; trained here is the UNet.""",
}


def accuracy(components: Components, split: str, count: int, guidance: float) -> checker.CheckResult:
    """The checker's verdict on `count` pictures drawn from base-world prompts of a split, 20 steps."""
    scenes = world.sample_scenes(count, split, 0)
    settings = EvaluationConfig(guidance_scale=guidance, num_inference_steps=20)
    return checker.check(
        scenes, draw(components, [world.caption(scene, i) for i, scene in enumerate(scenes)], settings)
    )


def pack_with_card(work: Path, target: Path, name: str = "tiny-sdxl") -> str:
    """Packs the last stage of model `name` in `work` to `target`, measures it, writes its card; returns the card."""
    stages = STAGES[check_choice(name, STAGES, "tiny model")]
    size = pack(work / stages[-1] / "model", target, "")
    components = load_base(ModelConfig(base=str(target)))
    chosen = max(GUIDANCE, key=lambda g: accuracy(components, "validation", NUM_CHOOSING, g).all_attributes)
    drawn = accuracy(components, "test", NUM_TEST, chosen)
    kinds = {"base world": ("base",), "concepts (heart, striped, blueprint)": world.CONCEPTS}
    coded = {name: reconstruction_accuracy(components, scenes) for name, scenes in kinds.items()}
    card = write_card(work, name, size, chosen, drawn, coded)
    (target / "README.md").write_text(card)
    return card


def reconstruction_accuracy(components: Components, kinds: tuple[str, ...]) -> float:
    """Share of pictures whose attributes are all read right after the VAE's encode and decode."""
    scenes = world.mixed_scenes(NUM_TEST, "test", 0, kinds)
    pixels = np.stack([np.asarray(world.render(scene, index)) for index, scene in enumerate(scenes)])
    pictures, _ = reconstruct(components.vae, torch.from_numpy(pixels).permute(0, 3, 1, 2).to(components.device))
    return checker.check(scenes, pictures).all_attributes


def write_card(
    work: Path, name: str, size: int, guidance: float, drawn: checker.CheckResult, coded: dict[str, float]
) -> str:
    rows = "\n".join(f"| {key} | {share:.1%} | {drawn.chance[key]:.1%} |" for key, share in drawn.accuracy.items())
    stages = "\n".join(stage_row(work / stage) for stage in STAGES[name])
    codes = "\n".join(f"- {kind}: {share:.1%} of {NUM_TEST} pictures" for kind, share in coded.items())
    return f"""# {name}

{ABOUT[name]}

{size / 1e6:.1f} MB in half precision. It draws the shapes world of `t2ilib.shapes.world` (one object on a plain ground, 64x64
pixels) and exists so that everything that works on the real model can be tried and tested without a GPU or a network. It is
good for nothing else.

Trained by `t2ilib train` on procedurally drawn pictures alone; the recipes are in experiments/{name}. The UNet and the
text encoders have never seen a heart, a striped object or a blueprint, which are for fine-tuning to teach; the autoencoder,
as a general codec, has seen them without captions.

| stage | steps | batch | seconds in steps | held-out result |
|---|---|---|---|---|
{stages}

After the autoencoder's encode and decode the checker reads all attributes right in
{codes}

{NUM_TEST} pictures of held-out prompts, 20 steps, guidance {guidance:g} (chosen on other prompts): all attributes right in
**{drawn.all_attributes:.1%}**.

| attribute | right | chance |
|---|---|---|
{rows}
"""


def stage_row(folder: Path) -> str:
    """One line of the card from what the stage itself logged, up to the checkpoint it ended on."""
    reached = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    last: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        last |= row if row["step"] <= reached else {}
    keys = ("checker/all", "retrieval/second", "near_misses/second", "held_out_loss")
    result = ", ".join(f"{key} {last[key]:.3f}" for key in keys if key in last)
    seconds = f"{reached / last['steps_per_second']:.0f}" if "steps_per_second" in last else "not recorded"
    batch = load_yaml(folder / "run.yaml")["training"]["batch_size"]
    return f"| {folder.name} | {reached} | {batch} | {seconds} | {result} |"
