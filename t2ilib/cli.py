"""`t2ilib ...`: a thin layer over the library. Heavy imports happen inside the commands, so `--help` answers at once."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which way of fine-tuning Stable Diffusion suits your pictures and your GPU?",
)
study_app = typer.Typer(no_args_is_help=True, help="Run a study of variants, and see how far it is.")
data_app = typer.Typer(no_args_is_help=True, help="Make data sets.")
tiny_app = typer.Typer(no_args_is_help=True, help="Rebuild the tiny models that ship with the package.")
app.add_typer(study_app, name="study")
app.add_typer(data_app, name="data")
app.add_typer(tiny_app, name="tiny")

TERMINAL = ("name", "runs", "concept learned", "base kept", "held-out loss", "trainable parameters", "steps per second")
"""Columns of the report's table that fit a terminal."""

Config = Annotated[
    str | None,
    typer.Option(help="For a single file of unusual size: tiny-sdxl, a diffusers folder or a Hub id with its configs."),
]
Results = Annotated[Path, typer.Option(help="Where results and the default MLflow store lie.")]


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """A mistake of the user's is one message and exit code 2, without a traceback."""
    from pydantic import ValidationError

    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, ValidationError):
            raise
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None


@app.callback()
def main(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings.")] = False) -> None:
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command()
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
        from t2ilib.config import load_run

        run = load_run(config, set)
        from t2ilib.evaluation.metrics import measure
        from t2ilib.tracking import open_tracker
        from t2ilib.training.loop import train

        with open_tracker(run) as tracker:
            result = train(run, tracker)
            metrics = result.metrics
            if run.training.trains not in ("vae", "clip"):
                metrics = measure(run, result.components, tracker, metrics)
        for name, value in sorted(metrics.items()):
            if not name.startswith(("memory/", "learning_rate/", "held_out_loss/")):
                print(f"{name:32s} {value:14.4f}")
        print(f"everything is in {run.output}")


@app.command()
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
        from t2ilib.adapters.load import load_adapter, load_checkpoint_adapter, weigh_adapters
        from t2ilib.config import ConfigError, EvaluationConfig, build_run, load_run
        from t2ilib.evaluation.sampling import draw, save_pictures
        from t2ilib.models.components import load_base

        if not adapter and (checkpoint is not None or scale):
            raise ConfigError("--checkpoint and --scale are about an adapter: give one with --adapter")
        if checkpoint is not None and len(adapter) > 1:
            raise ConfigError("--checkpoint goes with one --adapter")
        if scale and len(scale) != len(adapter):
            raise ConfigError(
                f"{len(adapter)} adapters and {len(scale)} scales: give --scale once for each --adapter, or never"
            )
        recorded = adapter[0] / "run.yaml" if adapter else Path("run.yaml")
        chosen = load_run(recorded).model if adapter and recorded.exists() else build_run({"adapter": {}}).model
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
        save_pictures(pictures, out)
        print(f"{len(pictures)} picture(s) in {out}")


@app.command()
def adapters(
    model: Annotated[
        str,
        typer.Argument(
            help="tiny-sdxl, tiny-sd15, a diffusers folder, a single .safetensors file, a Hub id, or a layout without weights: sd15, sdxl."
        ),
    ],
    config: Config = None,
    targets: Annotated[
        list[str],
        typer.Option(help="attention, many, a regular expression, or several times a module name's ending."),
    ] = ["attention"],
    text_encoder_targets: Annotated[
        list[str], typer.Option(help="The same for the text encoders; without it they get no adapter.")
    ] = [],
    rank: Annotated[int, typer.Option(min=1)] = 8,
    kind: Annotated[str, typer.Option(help="lora or dora.")] = "lora",
) -> None:
    """List the layers an adapter would be attached to, their shapes and the parameters it adds."""
    with readable_errors():
        from t2ilib.adapters.spec import adapter_table
        from t2ilib.config import build_run
        from t2ilib.models.components import load_base
        from t2ilib.models.layouts import build_layout, is_layout
        from t2ilib.report import format_table

        asked = {"kind": kind, "rank": rank, "targets": one_or_more(targets)}
        run = build_run(
            {
                "adapter": asked | {"text_encoder_targets": one_or_more(text_encoder_targets)},
                "model": {"base": model, "config": config},
            },
            "the command",
        )
        components = build_layout(model) if is_layout(model) else load_base(run.model)
        rows = adapter_table(components, run.adapter)
        listed = [
            vars(row)
            | {"shape": " x ".join(map(str, row.shape)), "rank": str(row.rank), "parameters": f"{row.parameters:,}"}
            for row in rows
        ]
        print(format_table(listed))
        print()
        for name, module in components.modules().items():
            of_module = [row.parameters for row in rows if row.component == name]
            size = sum(parameter.numel() for parameter in module.parameters())
            print(f"{name}: {len(of_module)} layers, {sum(of_module):,} parameters on a base of {size:,}")


@app.command()
def quantization(
    model: Annotated[str, typer.Argument(help="What model.base takes, or a layout without weights: sd15, sdxl.")],
    method: Annotated[str, typer.Option(help="nf4 or int8.")] = "nf4",
    convolutions: Annotated[bool, typer.Option(help="The UNet's convolutions too (nf4).")] = False,
    skip: Annotated[list[str], typer.Option(help="Ending of layer names to keep; may be given several times.")] = [],
    worst: Annotated[int, typer.Option(min=0, help="How many of the layers with the largest errors to list.")] = 10,
) -> None:
    """Show what quantizing a base saves, part by part, and what it costs each layer in exactness."""
    with readable_errors():
        from t2ilib.config import build_run, check_choice
        from t2ilib.evaluation.quantization import quantization_errors, quantization_reports
        from t2ilib.models.layouts import is_layout
        from t2ilib.report import format_table

        check_choice(method, ("nf4", "int8"), "--method")
        chosen = {"quantization": method, "quantize_convolutions": convolutions, "quantization_skip": skip}
        config = build_run({"adapter": {}, "model": chosen | {"base": model}}, "the command").model
        rows = [
            {
                "part": name,
                "quantized layers": str(len(report.quantized)),
                "kept": str(len(report.kept)),
                "MB before": f"{report.bytes_before / 1e6:,.1f}",
                "MB after": f"{report.bytes_after / 1e6:,.1f}",
            }
            for name, report in quantization_reports(config).items()
        ]
        print(format_table(rows))
        if is_layout(model) or not worst:
            return
        errors = [
            (e, f"{part}.{name}") for part, layers in quantization_errors(config).items() for name, e in layers.items()
        ]
        print(f"\nrelative error of the output, median {sorted(errors)[len(errors) // 2][0]:.3f}, the largest:")
        print(format_table([{"layer": name, "error": f"{e:.3f}"} for e, name in sorted(errors, reverse=True)[:worst]]))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A run config in YAML, what model.base takes, or a layout: sd15, sdxl.")],
    set: Annotated[list[str], typer.Option("--set", help="section.field=value; may be given several times.")] = [],
    card: Annotated[
        float | None, typer.Option(min=1, help="GB of the card to fit; without it the GPU that is found here, if any.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu: what the run will train on.")] = "cuda",
) -> None:
    """Predict the peak memory of a run by tracing it, without a GPU and without weights, and what would make it fit."""
    with readable_errors():
        from t2ilib.config import check_choice

        check_choice(device, ("cuda", "cpu"), "--device")
        from t2ilib.fitting import describe_plan, planned_run
        from t2ilib.planning import plan_memory

        run = planned_run(model, set)
        for line in describe_plan(run, plan_memory(run, device), card):
            print(line, flush=True)


def one_or_more(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or an adapter file as t2ilib or diffusers write it.")],
    target: Annotated[Path, typer.Argument(help="The file (diffusers, kohya) or folder (peft, merged) to write.")],
    format: Annotated[str, typer.Option(help="diffusers, peft, kohya (A1111, ComfyUI), or merged.")] = "diffusers",
    model: Annotated[str | None, typer.Option(help="The base it goes with; without it that of the run.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of merged weights: auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Write an adapter in the format of another program."""
    with readable_errors():
        from t2ilib.adapters.export import export_adapter
        from t2ilib.config import build_run

        base = None if model is None else build_run({"adapter": {}, "model": {"base": model}}, "the command").model
        print(f"{format}: {export_adapter(source, target, format, base, dtype)}")


@study_app.command("run")
def study_run(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    only: Annotated[list[str], typer.Option(help="Only this variant; may be given several times.")] = [],
    seeds: Annotated[str, typer.Option(help="Other seeds than the preset's, e.g. 0,1,2.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at a time.")] = 1,
    results: Results = Path("results"),
) -> None:
    """Run every variant and seed that is not finished, then write the report."""
    with readable_errors():
        from t2ilib.config import ConfigError
        from t2ilib.study import name_champion, run_study, write_report

        try:
            numbers = [int(seed) for seed in seeds.split(",") if seed.strip()]
        except ValueError:
            raise ConfigError(f"--seeds {seeds!r}: write whole numbers with commas, e.g. 0,1,2") from None
        begun = time.monotonic()
        runs = run_study(file, preset, only, numbers, jobs, results, say=lambda line: print(line, flush=True))
        failed = [run.label for run in runs if run.state != "finished"]
        if any(run.state == "finished" for run in runs):
            page = write_report(file, preset, results)
            from t2ilib.report import format_table, load_report, summary_table

            rows = summary_table(load_report(page.parent))
            print("\n" + format_table([{name: row[name] for name in TERMINAL if name in row} for row in rows]))
            print(f"\nreport:     {page}\n            {page.with_suffix('.md')}")
        champion = name_champion(file, preset, results)
        if champion:
            print(f"champion:   {champion}")
        mlflow = Path(sys.executable).parent / "mlflow"
        print(f"MLflow UI:  {mlflow} ui --backend-store-uri {tracked(results)} --host 127.0.0.1")
        print(f"{len(runs) - len(failed)} of {len(runs)} runs finished, {time.monotonic() - begun:.0f} s")
        if failed:
            typer.secho(f"not finished: {', '.join(failed)}", fg=typer.colors.RED, err=True)
            raise SystemExit(1)


def tracked(results: Path) -> str:
    from t2ilib.tracking import tracking_uri

    return tracking_uri(None, results)


@study_app.command("status")
def study_status(
    file: Annotated[Path, typer.Argument(help="A study file in YAML.")],
    preset: Annotated[str, typer.Option(help="A preset of the study file.")] = "quick",
    results: Results = Path("results"),
) -> None:
    """Show the state of every variant and seed."""
    with readable_errors():
        from t2ilib.report import format_table
        from t2ilib.study import status_rows

        print(format_table(status_rows(file, preset, results)))


@data_app.command("shapes")
def data_shapes(
    folder: Annotated[Path, typer.Argument(help="Where the image folder goes.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 48,
    scenes: Annotated[list[str], typer.Option(help="base, heart, striped, blueprint; may be given several times.")] = [
        "heart",
        "striped",
        "blueprint",
    ],
    split: Annotated[str, typer.Option(help="train, validation or test: no combination is in two of them.")] = "train",
    seed: int = 0,
) -> None:
    """Draw captioned pictures of the shapes world as an image folder with metadata.jsonl."""
    with readable_errors():
        from t2ilib.data import shapes

        shapes.write_folder(folder, shapes.mixed_scenes(count, split, seed, scenes), seed, len(shapes.SOLID_PHRASES))
        print(f"{count} pictures in {folder}")


@tiny_app.command("build")
def tiny_build(
    folder: Annotated[Path, typer.Argument(help="Where the pipeline folder goes.")],
    model: Annotated[str, typer.Option(help="tiny-sdxl or tiny-sd15.")] = "tiny-sdxl",
    seed: int = 0,
) -> None:
    """Write a tiny model with random weights, for its recipes in experiments/ to train."""
    with readable_errors():
        from t2ilib.models.tiny import build

        build(folder, seed, model)
        print(f"random weights in {folder}; next: t2ilib train, with the recipes in experiments/{model}")


@tiny_app.command("pack")
def tiny_pack(
    work: Annotated[Path, typer.Argument(help="The folder with the trained stages.")],
    target: Annotated[Path, typer.Argument(help="Where the shipped pipeline goes.")],
    model: Annotated[str, typer.Option(help="tiny-sdxl or tiny-sd15.")] = "tiny-sdxl",
) -> None:
    """Round a trained tiny model to half precision, measure it, and write it with its model card."""
    with readable_errors():
        from t2ilib.evaluation.card import pack_with_card

        print(pack_with_card(work, target, model))


if __name__ == "__main__":
    app()
