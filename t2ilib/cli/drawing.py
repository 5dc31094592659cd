"""`t2ilib generate`: pictures, and grids of them, with what was trained."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import (
    Adapters,
    Checkpoint,
    Config,
    Guidance,
    Height,
    Model,
    NegativePrompt,
    Partial,
    Quantization,
    Results,
    Sampler,
    Scales,
    Steps,
    Width,
)

if TYPE_CHECKING:
    from t2ilib.config import ModelConfig
    from t2ilib.drawing.desk import Desk, Progress, Watch
    from t2ilib.drawing.pngtext import Restored
    from t2ilib.drawing.settings import AdapterChoice, DrawSettings

GRID = "Grid"
RANDOM = "random"


def generate(
    prompt: Annotated[
        list[str], typer.Option(help="What to draw; may be given several times. Without it that of --like.")
    ] = [],
    model: Model = None,
    config: Config = None,
    adapter: Adapters = [],
    embedding: Annotated[
        list[Path],
        typer.Option(
            help="A word's embeddings, a .safetensors file; may be given several times. An adapter brings its own along."
        ),
    ] = [],
    checkpoint: Checkpoint = None,
    scale: Scales = [],
    partial: Partial = False,
    beside_base: Annotated[
        bool, typer.Option("--beside-base", help="Draw the same noise by the base alone too (00-base.png).")
    ] = False,
    quantization: Quantization = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Leave out so many of SD1.x's last text layers (model.clip_skip); without it as the adapter's run did.",
        ),
    ] = None,
    negative_prompt: NegativePrompt = None,
    number: Annotated[int | None, typer.Option(help="Pictures of each prompt (1).")] = None,
    seed: Annotated[str | None, typer.Option(help="Starting noise (0); random takes any, and says which.")] = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    steps: Steps = None,
    width: Width = None,
    height: Height = None,
    like: Annotated[
        Path | None,
        typer.Option(help="A picture whose settings to take, as t2ilib or A1111 wrote it; other options change them."),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            help="A grid: what changes from column to column, such as 'strength: 0-1 [5]'. Of prompt, adapter, strength, checkpoint,"
            " seed, guidance, steps, sampler.",
            rich_help_panel=GRID,
        ),
    ] = None,
    y: Annotated[
        str | None, typer.Option("--y", help="The same from row to row: 'seed: 1, 2, 3'.", rich_help_panel=GRID)
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Log what is drawn to this MLflow experiment too, as artifacts.")
    ] = None,
    results: Results = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
) -> None:
    """Draw pictures with a base model and, if given, adapters; each says in its file how it was drawn."""
    with readable_errors():
        from t2ilib.drawing.desk import Desk

        restored = read_like(like) if like else None
        if restored and not (x or y):
            x, y = restored.grid.get("x"), restored.grid.get("y")
        choices = chosen_adapters(adapter, scale, checkpoint, restored, partial)
        changes = {"base": model, "config": config, "quantization": quantization, "clip_skip": clip_skip}
        asked = {
            "model": chosen_base(choices, restored, changes, results).model_dump(),
            "adapters": [choice.model_dump() for choice in choices],
            "embeddings": [str(path) for path in embedding] or None,
            "negative_prompt": negative_prompt,
            "num_pictures": number,
            "seed": None if seed is None else parse_seed(seed),
            "sampler": sampler,
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "width": width,
            "height": height,
        }
        settings = all_settings({name: v for name, v in asked.items() if v is not None}, prompt, restored, bool(x or y))
        desk = Desk(results)
        if x or y:
            written = [write_grid(desk, settings[0], len(settings), x, y, beside_base, out)]
        else:
            written = write_pictures(desk, settings, beside_base, out)
        for file, word in desk.loaded.words.items():
            print(f"{Path(file).name}: in prompts it is called {word}")
        if experiment:
            from t2ilib.tracking.pictures import log_pictures

            log_pictures(experiment, written, settings[0].model_dump(mode="json"), results, name=written[0].stem)
        print(f"{len(written)} picture(s) in {out}")


def read_like(picture: Path) -> "Restored":
    """The settings of a picture; prints what could not be taken as it stands."""
    from t2ilib.drawing.pngtext import read_picture

    restored = read_picture(picture)
    for note in restored.notes:
        print(f"{picture.name}: {note}")
    if restored.unknown:
        print(f"{picture.name}: nothing here has {', '.join(restored.unknown)}")
    return restored


def parse_seed(text: str) -> int | str:
    """A number, or for "random" any, which is printed; what is neither is refused with the other mistakes."""
    from t2ilib.seeds import fresh_seed

    if text.lower() != RANDOM:
        return text
    seed = fresh_seed()
    print(f"seed {seed}")
    return seed


def chosen_adapters(
    adapters: Sequence[str],
    scales: Sequence[float],
    checkpoint: int | None,
    restored: "Restored | None",
    partial: bool = False,
) -> list["AdapterChoice"]:
    """The adapters that are named, or else the picture's, with the strengths and the checkpoint that are given."""
    from t2ilib.config import ConfigError
    from t2ilib.drawing.settings import build_settings

    kept = [choice.model_dump() for choice in restored.settings.adapters] if restored else []
    values: list[dict[str, Any]] = [{"path": path} for path in adapters] or kept
    if not values and (checkpoint is not None or scales or partial):
        raise ConfigError("--checkpoint, --scale and --partial are about an adapter: give one with --adapter")
    if checkpoint is not None and len(values) > 1:
        raise ConfigError("--checkpoint goes with one --adapter")
    if scales and len(scales) != len(values):
        raise ConfigError(
            f"{len(values)} adapters and {len(scales)} scales: give --scale once for each --adapter, or never"
        )
    for value, strength in zip(values, scales, strict=False):
        value["strength"] = strength
    for value in values if partial else ():
        value["partial"] = True
    if checkpoint is not None:
        values[0] |= {"step": checkpoint, "digest": None}
    return list(build_settings({"adapters": values}, "the command").adapters)


def chosen_base(
    choices: Sequence["AdapterChoice"], restored: "Restored | None", changes: dict[str, Any], results: Path
) -> "ModelConfig":
    """The picture's base, or that of the first adapter's run, with what is asked for otherwise."""
    from t2ilib.config import ModelConfig
    from t2ilib.drawing.finding import base_of, change_base

    told = restored.settings.model if restored else ModelConfig()
    of_run = base_of(choices[0], results) if choices and not (restored and restored.source == "t2ilib") else None
    return change_base(of_run or told, **changes)


def all_settings(
    asked: dict[str, Any], prompts: Sequence[str], restored: "Restored | None", grid: bool
) -> list["DrawSettings"]:
    """Settings of each prompt: noise is numbered over all of them."""
    from t2ilib.config import ConfigError
    from t2ilib.drawing.settings import build_settings

    kept = restored.settings.model_dump() if restored else {}
    if not prompts and restored is None and not grid:
        raise ConfigError("there is nothing to draw: give --prompt, or --like with a picture")
    one = build_settings(kept | asked | ({"prompt": prompts[0]} if prompts else {}), "the command")
    return [one, *(one.changed(prompt=p, first=one.first + i * one.num_pictures) for i, p in enumerate(prompts) if i)]


def write_pictures(desk: "Desk", settings: Sequence["DrawSettings"], beside_base: bool, out: Path) -> list[Path]:
    """Draws, and writes every picture as soon as it is whole."""
    written: list[Path] = []
    with drawing_bar() as move:

        def watch(progress: "Progress") -> None:
            written.extend(picture.save(out) for picture in progress.finished)
            move(progress)

        desk.draw(settings, beside_base=beside_base, watch=watch)
    return written


@contextlib.contextmanager
def drawing_bar() -> Iterator["Watch"]:
    """A bar on a terminal, which a drawing moves."""
    from tqdm import tqdm

    with tqdm(total=100, unit="%", bar_format="{desc} {percentage:3.0f}%|{bar}|", disable=None, leave=False) as bar:

        def move(progress: "Progress") -> None:
            bar.set_description_str(progress.doing, refresh=False)
            bar.update(100 * progress.share - bar.n)

        yield move


def write_grid(
    desk: "Desk", settings: "DrawSettings", count: int, x: str | None, y: str | None, beside_base: bool, out: Path
) -> Path:
    """Draws a grid and writes its sheet."""
    from t2ilib.config import ConfigError
    from t2ilib.drawing.axes import parse_axis
    from t2ilib.drawing.grid import draw_grid, plan_grid

    if count > 1:
        raise ConfigError("a grid has one --prompt: for several write --y 'prompt: ...' and leave --prompt out")
    if settings.num_pictures > 1:
        raise ConfigError("a cell of a grid has one picture: leave --number out, and write --y 'seed: 1-4' for several")
    if beside_base:
        raise ConfigError("--beside-base goes with single pictures: in a grid write --y 'adapter: none, ...'")
    columns, rows = (x, y) if x else (y, None)
    sheet = draw_grid(desk, plan_grid(settings, parse_axis(columns), parse_axis(rows) if rows else None))
    return sheet.save(out)
