"""`t2ilib data shapes`, `t2ilib tiny ...`: pictures of the drawn world, and the tiny models anew."""

from pathlib import Path
from typing import Annotated

import typer

from t2ilib.cli.errors import readable_errors


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
    layout: Annotated[
        str,
        typer.Option(help="folder, or coco: zips as COCO's server has them, for `data download coco --server FOLDER`."),
    ] = "folder",
) -> None:
    """Draw captioned pictures of the shapes world as an image folder with metadata.jsonl, or as zips in the form of COCO."""
    with readable_errors():
        from t2ilib.config import ConfigError, check_choice
        from t2ilib.shapes import coco, world

        if check_choice(layout, ("folder", "coco"), "--layout") == "coco":
            if split != "train":
                raise ConfigError("--layout coco has the parts train and val: leave --split out")
            counts = coco.write_coco(folder, count, scenes, seed)
            print(f"{counts['train']} pictures to train on and {counts['val']} others in {folder}")
            return
        world.write_folder(folder, world.mixed_scenes(count, split, seed, scenes), seed, len(world.SOLID_PHRASES))
        print(f"{count} pictures in {folder}")


def tiny_build(
    folder: Annotated[Path, typer.Argument(help="Where the pipeline folder goes.")],
    seed: int = 0,
) -> None:
    """Write the tiny SDXL with random weights, for its recipes in experiments/ to train."""
    with readable_errors():
        from t2ilib.shapes.models import build

        build(folder, seed)
        print(f"random weights in {folder}; next: t2ilib train, with the recipes in experiments/tiny-sdxl")


def tiny_pack(
    work: Annotated[Path, typer.Argument(help="The folder with the trained stages.")],
    target: Annotated[Path, typer.Argument(help="Where the shipped pipeline goes.")],
    model: Annotated[str, typer.Option(help="tiny-sdxl or tiny-sd15.")] = "tiny-sdxl",
) -> None:
    """Round a trained tiny model to half precision, measure it, and write it with its model card."""
    with readable_errors():
        from t2ilib.shapes.card import pack_with_card

        print(pack_with_card(work, target, model))
