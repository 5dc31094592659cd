"""`t2ilib data inspect`: what a run would train on, before it is run."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2ilib.cli.errors import readable_errors

if TYPE_CHECKING:
    from t2ilib.config import RunConfig

WIDEST, NARROWEST = 120, 80


def data_inspect(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN.yaml | PICTURES", help="A run config, or what data.path takes; --set can say both."
        ),
    ] = None,
    set: Annotated[list[str], typer.Option("--set", help="section.field=value; may be given several times.")] = [],
    out: Annotated[Path, typer.Option(help="The folder for the page and the manifest.")] = Path("inspection"),
) -> None:
    """Show what a run would train on: every picture and caption, what cannot be used and why, duplicates, and what could be set."""
    with readable_errors():
        from t2ilib.cli.shards import described
        from t2ilib.data.advice import advise
        from t2ilib.data.inspection import inspect
        from t2ilib.report.inspection_page import require_free, write_page
        from t2ilib.report.inspection_screen import screen

        run = described(source, set)
        require_free(out, run)
        whole = source is not None and Path(source).suffix.lower() in (".yaml", ".yml")
        chosen = whole or run.data.source == "shapes" or "base" in run.model.model_fields_set
        native, multiple, cut = known_of_base(run) if chosen else (None, None, None)
        guessed = not chosen and "resolution" not in run.data.model_fields_set
        found = inspect(run, multiple, cut, choose_resolution=guessed)
        suggestions = advise(found, native, multiple)
        write_page(found, suggestions, out)
        columns = shutil.get_terminal_size((WIDEST, 0)).columns
        print(screen(found, suggestions, out, max(NARROWEST, min(WIDEST, columns))))


def known_of_base(run: "RunConfig") -> tuple[int | None, int | None, Callable[[Sequence[str]], list[str]] | None]:
    """The side of the pictures that the run's base was made for, what sides of buckets are multiples of, and what finds captions that are
    too long for it, if its tokenizers are here. One whose configs are on the Hub is judged by its name."""
    from functools import partial

    from t2ilib.config import ConfigError
    from t2ilib.models.families import cut_captions
    from t2ilib.models.files.locate import locate
    from t2ilib.planning.unloaded import begin_unloaded, config_folder, native_resolution, read_config

    place = Path(locate((run.scratch and run.scratch.text_encoder) or run.model.base))
    if run.scratch is not None:
        import torch

        tokenizers = load_tokenizers(place)
        multiple = begin_unloaded(run, torch.float32).side_multiple
        return run.data.resolution, multiple, partial(cut_captions, tokenizers) if tokenizers else None
    if place.exists():
        with (
            contextlib.suppress(ConfigError, OSError),
            config_folder(run.model) as (folder, _),
        ):  # a file's may be on the Hub
            has = [part for part in ("unet", "vae") if (folder / part).is_dir()]  # on pixels there is no VAE
            parts = [read_config(folder, f"{part}/config.json") for part in has]
            multiple = min(64, 2 ** sum(len(part["block_out_channels"]) - 1 for part in parts))
            tokenizers = load_tokenizers(place)
            return native_resolution(run.model), multiple, partial(cut_captions, tokenizers) if tokenizers else None
    return (1024, 32, None) if "xl" in run.model.base.lower() else (512, 64, None)


def load_tokenizers(folder: Path) -> dict[str, object]:
    from transformers import CLIPTokenizer

    return {
        name: CLIPTokenizer.from_pretrained(folder / name)
        for name in ("tokenizer", "tokenizer_2")
        if (folder / name).is_dir()
    }
