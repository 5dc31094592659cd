"""`t2ilib train`, `t2ilib generate`: one run, and pictures with what it trained."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import Config


def train(
    config: Annotated[Path, typer.Argument(help="A run config in YAML.")],
    set: Annotated[
        list[str],
        typer.Option(
            "--set", help="section.field=value, e.g. model.base=model.safetensors; may be given several times."
        ),
    ] = [],
) -> None:
    """Train one run, resuming if it was interrupted, then measure it."""
    with readable_errors():
        from t2ilib.runfile import load_run

        run = load_run(config, set)
        from t2ilib.evaluation.measures import measure
        from t2ilib.models.load import choose_device
        from t2ilib.planning.fit import check_fit
        from t2ilib.tracking.tracker import open_tracker
        from t2ilib.training.checkpoint import list_checkpoints
        from t2ilib.training.loop import train

        if not list_checkpoints(run.output / "checkpoints"):  # one that has begun has shown that it fits
            check_fit(run, choose_device())

        with open_tracker(run) as tracker:
            result = train(run, tracker)
            metrics = result.metrics
            if run.trains not in ("vae", "clip"):
                metrics = measure(run, result.components, tracker, metrics, result.prompts)
        for name, value in sorted(metrics.items()):
            if not name.startswith(("memory/", "learning_rate/", "held_out_loss/")):
                print(f"{name:32s} {value:14.4f}")
        print(f"everything is in {run.output}")


def generate(
    prompt: Annotated[list[str], typer.Option(help="What to draw; may be given several times.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny-sdxl, tiny-sd15, a diffusers folder, a single .safetensors file or a Hub id; without it the base of the adapter's run."
        ),
    ] = None,
    config: Config = None,
    adapter: Annotated[
        list[Path], typer.Option(help="A run's folder or an adapter file; may be given several times.")
    ] = [],
    checkpoint: Annotated[
        int | None, typer.Option(help="Take the adapter as it was at this step (--adapter names a run's folder).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Starting noise.")] = 0,
    scale: Annotated[
        list[float], typer.Option(help="Strength of each adapter, in their order: 0 switches it off, 1 is as trained.")
    ] = [],
    quantization: Annotated[
        str | None, typer.Option(help="none or nf4; without it as the adapter's run had its base.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 5.0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """Draw pictures with a base model and, if given, an adapter."""
    with readable_errors():
        from t2ilib.adapters.load import load_adapter, recorded_run, weigh_adapters
        from t2ilib.config import ConfigError, EvaluationConfig
        from t2ilib.evaluation.sampling import draw, save_pictures
        from t2ilib.models.load import load_base
        from t2ilib.runfile import build_run, load_run
        from t2ilib.training.state import load_checkpoint_adapter

        if not adapter and (checkpoint is not None or scale):
            raise ConfigError("--checkpoint and --scale are about an adapter: give one with --adapter")
        if checkpoint is not None and len(adapter) > 1:
            raise ConfigError("--checkpoint goes with one --adapter")
        if scale and len(scale) != len(adapter):
            raise ConfigError(
                f"{len(adapter)} adapters and {len(scale)} scales: give --scale once for each --adapter, or never"
            )
        recorded = recorded_run(adapter[0]) if adapter else None
        chosen = load_run(recorded).model if recorded else build_run({"adapter": {}}).model
        asked = {"base": model, "config": config, "quantization": quantization}
        changes = {name: value for name, value in asked.items() if value is not None}
        if model not in (None, chosen.base):
            of_its_own = {"config": config, "vae": None, "revision": None, "variant": None, "quantization_skip": ()}
            changes |= of_its_own  # those of the adapter's run belong to its own base
        if quantization == "none":
            changes |= {"quantize_convolutions": False, "quantization_skip": ()}
        components = load_base(build_run({"adapter": {}, "model": chosen.model_dump() | changes}, "the command").model)
        names = ["default", *(f"adapter{number}" for number in range(2, 1 + len(adapter)))][: len(adapter)]
        if checkpoint is not None:
            load_checkpoint_adapter(components, adapter[0], checkpoint)
        else:
            for name, path in zip(names, adapter, strict=True):
                load_adapter(components, path, name)
        if adapter:
            weigh_adapters(components, dict(zip(names, scale or [1.0] * len(adapter), strict=True)))
        pictures = draw(components, prompt, EvaluationConfig(guidance_scale=guidance, num_inference_steps=steps), seed)
        save_pictures(pictures, out, after=True)
        print(f"{len(pictures)} picture(s) in {out}")
