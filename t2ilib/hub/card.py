"""The card of a run on the Hub: front matter, how to draw with it, what it was trained by, what was measured. All of it is the run's own word.

Leaves out what a run does not know: what the pictures may be used for and under which licence, which is for the person who publishes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from t2ilib import __version__
from t2ilib.config import RunConfig
from t2ilib.evaluation.metrics import DECLARATIONS, Metric
from t2ilib.report.tables import markdown_table, write_number
from t2ilib.text import shown
from t2ilib.training.card import front_matter, is_id, known_as

KINDS = {"lora": "LoRA (arXiv 2106.09685)", "dora": "DoRA (arXiv 2402.09353)"}
DRAWING = """```python
from diffusers import {classes}

pipeline = DiffusionPipeline.from_pretrained({base}){scheduler}
pipeline.load_lora_weights({repository}, weight_name={file})
pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0].save("picture.png")
```"""
LOST = """
diffusers' loader loses a DoRA's magnitudes of text encoders: load this one with `t2ilib.load_adapter`, or `t2ilib generate --adapter`.
"""


def matter(run: RunConfig, pictures: Mapping[str, str], license: str | None) -> dict[str, Any]:
    """The front matter. `pictures`: file in the folder -> the prompt that it was drawn for."""
    told: dict[str, Any] = {"license": license} if license else {}
    told |= front_matter(run)
    if run.adapter and run.adapter.trigger_words:
        told["instance_prompt"] = ", ".join(run.adapter.trigger_words)
    if pictures:
        told["widget"] = [{"text": prompt, "output": {"url": file}} for file, prompt in pictures.items()]
    return told


def with_matter(told: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(told), sort_keys=False, allow_unicode=True, width=1000).strip()}\n---\n\n{body.strip()}\n"


def body_of(card: str) -> str:
    """A card without its front matter."""
    parts = card.split("---\n", 2)
    return parts[2] if card.startswith("---\n") and len(parts) == 3 else card


def adapter_card(
    run: RunConfig, repository: str, file: Path, prompts: Sequence[str], metadata: Mapping[str, str]
) -> str:
    """The text about an adapter. `metadata`: what its file says of itself; `prompts`: of its pictures."""
    base, spec = known_as(run.model.base), run.adapter
    words = ", ".join(f"`{word}`" for word in spec.trigger_words)
    drawn = run.drawn_by
    own = f", original_inference_steps={drawn.original_inference_steps}" if drawn else ""
    code = DRAWING.format(
        classes=f"DiffusionPipeline, {drawn.scheduler}" if drawn else "DiffusionPipeline",
        scheduler=f"\npipeline.scheduler = {drawn.scheduler}.from_config(pipeline.scheduler.config{own})"
        if drawn
        else "",
        base=json.dumps(base),
        repository=json.dumps(repository),
        file=json.dumps(file.name),
        prompt=json.dumps(prompts[0] if prompts else "a photo", ensure_ascii=False),
        steps=run.evaluation.num_inference_steps,
        guidance=run.evaluation.guidance_scale,
    )
    of_its_own = (
        ""
        if is_id(run.model.base)
        else f"\n`{base}` is not on the Hub under this name; it is what the run was given.\n"
    )
    lost = LOST if spec.kind == "dora" and spec.text_encoder_targets else ""
    return f"""# {shown(run.name)}

An adapter for {base}: {KINDS[spec.kind]}, rank {spec.rank}, alpha {spec.alpha:g}.

<Gallery />
{f"{chr(10)}Words that call up what it learned: {words}{chr(10)}" if words else ""}
## Drawing

{code}
{of_its_own}{lost}
## Training

| | |
|---|---|
{rows_of(facts(run, metadata))}
"""


def facts(run: RunConfig, metadata: Mapping[str, str]) -> dict[str, object]:
    """How an adapter was trained; what has no say in the run is left out."""
    spec, optimizer, objective, steps = run.adapter, run.optimizer, run.objective, run.training
    divisor = "the root of the rank" if spec.rank_stabilized else "the rank"
    rate = f"learning rate {optimizer.learning_rate:g}"
    if optimizer.text_encoder_learning_rate is not None:
        rate += f" ({optimizer.text_encoder_learning_rate:g} of the text encoders)"
    found: dict[str, object] = {
        "kind": spec.kind,
        "rank": spec.rank,
        "alpha": f"{spec.alpha:g}, divided by {divisor}",
        "other ranks": worded(spec.ranks) or None,
        "other alphas": worded(spec.alphas) or None,
        "layers of the UNet": worded(spec.targets),
        "layers of the text encoders": worded(spec.text_encoder_targets) if spec.text_encoder_targets else None,
        "left out": worded(spec.exclude) or None,
        "began as": None if spec.init == "default" else spec.init,
        "began with": known_as(str(spec.start)) if spec.start else None,
        "new words": worded(spec.tokens) or None,
        "dropout": f"{spec.dropout:g} ({spec.dropout_kind})" if spec.dropout else None,
        "over a base in": None if run.model.quantization == "none" else run.model.quantization,
        "predicts": metadata.get("modelspec.prediction_type"),
        "resolution": run.data.resolution,
        "digest of pictures and captions": f"`{digest}`" if (digest := metadata.get("t2ilib.data_digest")) else None,
        "objective": objective.method,
        "loss": objective.loss + (f", min-SNR weights at {objective.snr_gamma:g}" if objective.snr_gamma else ""),
        "captions dropped": f"{objective.caption_dropout:g}" if objective.caption_dropout else None,
        "steps": f"{steps.steps:,} of {steps.batch_size} pictures",
        "optimizer": f"{optimizer.name}, {rate}, {optimizer.schedule}, {optimizer.warmup_steps} steps of warm-up",
        "seed": run.seed,
        "trained by": f"t2ilib {__version__}",
    }
    return {what: value for what, value in found.items() if value is not None}


def worded(value: Any) -> str:
    """Names and what belongs to them as they stand in a table."""
    if isinstance(value, str):
        return f"`{value}`"
    pairs = (
        [f"`{key}` {part}" for key, part in value.items()] if isinstance(value, Mapping) else [f"`{v}`" for v in value]
    )
    return ", ".join(pairs)


def rows_of(values: Mapping[str, object]) -> str:
    return "\n".join(f"| {what} | {str(value).replace('|', chr(92) + '|')} |" for what, value in values.items())


def results(folder: Path) -> str:
    """What a run measured of what it declared to play a part in a report; "" where it was not measured."""
    measured, about = folder / "metrics.json", folder / DECLARATIONS
    if not measured.exists() or not about.exists():
        return ""
    values = json.loads(measured.read_text())
    declared = {name: Metric(**fields) for name, fields in json.loads(about.read_text()).items() if name in values}
    direction = {"higher": "higher is better", "lower": "lower is better", None: ""}
    rows = [
        {"name": metric.title, "value": write_number(values[name], metric), "": direction[metric.better]}
        for name, metric in declared.items()
        if metric.role
    ]
    if not rows:
        return ""
    return f"## Results\n\nMeasured by the run itself, at its end, on one seed.\n\n{markdown_table(rows)}\n"
