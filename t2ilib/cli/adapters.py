"""`t2ilib adapters`, `quantization`, `export`: what an adapter or a 4-bit base touches, and adapters for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import Config


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
        from t2ilib.models.files.layouts import build_layout, is_layout
        from t2ilib.models.load import load_base
        from t2ilib.report import format_table
        from t2ilib.runfile import build_run

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


def quantization(
    model: Annotated[str, typer.Argument(help="What model.base takes, or a layout without weights: sd15, sdxl.")],
    method: Annotated[str, typer.Option(help="nf4 or int8.")] = "nf4",
    convolutions: Annotated[bool, typer.Option(help="The UNet's convolutions too (nf4).")] = False,
    skip: Annotated[list[str], typer.Option(help="Ending of layer names to keep; may be given several times.")] = [],
    worst: Annotated[int, typer.Option(min=0, help="How many of the layers with the largest errors to list.")] = 10,
) -> None:
    """Show what quantizing a base saves, part by part, and what it costs each layer in exactness."""
    with readable_errors():
        from t2ilib.config import check_choice
        from t2ilib.evaluation.quantization import quantization_errors, quantization_reports
        from t2ilib.models.files.layouts import is_layout
        from t2ilib.report import format_table
        from t2ilib.runfile import build_run

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


def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or an adapter file as t2ilib or diffusers write it.")],
    target: Annotated[Path, typer.Argument(help="The file (diffusers, kohya) or folder (peft, merged) to write.")],
    format: Annotated[str, typer.Option(help="diffusers, peft, kohya (A1111, ComfyUI), or merged.")] = "diffusers",
    model: Annotated[str | None, typer.Option(help="The base it goes with; without it that of the run.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the base and of merged weights: auto, float32, bfloat16, float16.")
    ] = "auto",
    program: Annotated[
        str | None,
        typer.Option("--for", help="Whose arithmetic a kohya DoRA is for: comfyui (and Forge), lycoris or a1111."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--as", help="What to write in a DoRA's place: diff (exact, large), or lora (near, of --rank); any program."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA that --as lora approximates a DoRA by.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Write the adapter as it was at this step (SOURCE is a run's folder).")
    ] = None,
) -> None:
    """Write an adapter in the format of another program."""
    with readable_errors():
        from t2ilib.adapters.export import export_adapter
        from t2ilib.drawing.checkpoints import export_step
        from t2ilib.runfile import build_run

        base = None if model is None else build_run({"adapter": {}, "model": {"base": model}}, "the command").model
        options = {"dtype": dtype, "program": program, "form": form, "rank": rank}
        if checkpoint is None:
            written = export_adapter(source, target, format, base, **options)
        else:
            written = export_step(source, checkpoint, target, format, base, **options)
        if written.is_file():
            tell_of(written)
        print(f"{format}: {written}")


def tell_of(file: Path) -> None:
    """Prints an exported file's size, the files of its words, and where it approximates a DoRA, how near every layer of it is."""
    import json

    from t2ilib.adapters.dora import ERROR, ERRORS, SAID, megabytes
    from t2ilib.adapters.load import read_metadata
    from t2ilib.adapters.tokens import stored_words
    from t2ilib.report import format_table

    told = read_metadata(file)
    if ERRORS in told:
        print(format_table([{"layer": n, "error": f"{e:.4f}"} for n, e in json.loads(told[ERRORS]).items()]))
        print(f"\nrelative error of all layers together: {told[ERROR]}")
    if SAID in told:
        print(told[SAID])
    for word, embeddings in stored_words(file).items():
        name = embeddings.stem
        print(
            f"{word}: {embeddings}, for an embeddings folder, where A1111 calls it {name} and ComfyUI embedding:{name}"
        )
    print(megabytes(file.stat().st_size))


def one_or_more(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None
