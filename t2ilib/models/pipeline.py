"""Parts as a diffusers pipeline again, with whatever adapters are attached: for drawing, and as a folder on disk."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2ilib.models.components import Components
from t2ilib.models.files.locate import SHIPPED

INDEX = "model_index.json"
"""What makes a folder a pipeline's."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps progress bars and notes about optional packages off the screen while models are read or written."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def build_pipeline(components: Components, scheduler: Any = None):
    """The diffusers pipeline of these parts, attached adapters included; without safety checker, progress bar off. `scheduler`: in place
    of the base's own."""
    options = dict(components.family.left_out)
    if components.family.has_vae:
        options["vae"] = components.vae
    if components.family.pooled_conditioning:
        options["force_zeros_for_empty_prompt"] = components.zero_empty
    pipeline = components.family.load_pipeline_class()(
        unet=components.unet,
        scheduler=scheduler or components.scheduler,
        **components.text_encoders,
        **components.tokenizers,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(components: Components, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder, and takes along the base's `clip` folder, if it has one.

    A kill leaves no folder, or what was there, or one without its `model_index.json`, which nobody takes for a whole one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(draft, ignore_errors=True)
    with quiet_libraries():
        build_pipeline(components).save_pretrained(draft)
    clip = clip_folder(components.path)
    if clip is not None:
        shutil.copytree(clip, draft / "clip")
    put_in_place(draft, folder)


def put_in_place(draft: Path, folder: Path) -> None:
    """Gives a pipeline that is whole its name. Where one was, its parts are replaced, and what lies beside them stays."""
    if folder.exists():
        (folder / INDEX).unlink(missing_ok=True)
        parts = [part for part in draft.iterdir() if part.name != INDEX]
        for part in [*parts, draft / INDEX]:
            if (folder / part.name).is_dir():
                shutil.rmtree(folder / part.name)
            part.replace(folder / part.name)
        draft.rmdir()
    else:
        draft.rename(folder)


def clip_folder(base: str) -> Path | None:
    """The contrastive model that lies beside the parts of the tiny models, None for others. tiny-sd15 borrows tiny-sdxl's."""
    if base in SHIPPED:
        return SHIPPED["tiny-sdxl"] / "clip"
    folder = Path(base).expanduser() / "clip"
    return folder if folder.is_dir() else None
