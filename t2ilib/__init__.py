"""t2ilib: which way of fine-tuning Stable Diffusion suits your pictures and your GPU, answered with evidence.

The public API, imported lazily: `import t2ilib` costs no torch. `t2ilib.train` is resolved on first use.
"""

import importlib
import logging
import os
import warnings
from typing import Any

__version__ = "0.1.0"

EXPORTS = {
    "RunConfig": "t2ilib.config",
    "AdapterSpec": "t2ilib.config",
    "build_run": "t2ilib.runfile",
    "load_run": "t2ilib.runfile",
    "merge": "t2ilib.runfile",
    "preset": "t2ilib.presets",
    "tell_place": "t2ilib.places",
    "results_folder": "t2ilib.places",
    "summarize": "t2ilib.report.summary",
    "load_base": "t2ilib.models.load",
    "build_pipeline": "t2ilib.models.pipeline",
    "TextToImagePipeline": "t2ilib.models.text_to_image",
    "load_adapter": "t2ilib.adapters.load",
    "save_single_file": "t2ilib.models.files.single_file",
    "attach_adapters": "t2ilib.adapters.attach",
    "train": "t2ilib.training.loop",
    "open_tracker": "t2ilib.tracking.tracker",
    "load_datasets": "t2ilib.data.dataset",
    "open_picture": "t2ilib.data.pictures",
    "measure": "t2ilib.evaluation.measures",
    "draw": "t2ilib.evaluation.sampling",
    "make_grid": "t2ilib.evaluation.sampling",
    "Desk": "t2ilib.drawing.desk",
    "DrawSettings": "t2ilib.drawing.settings",
    "show_progress": "t2ilib.evaluation.showing",
    "run_study": "t2ilib.studies.study",
    "load_study": "t2ilib.studies.file",
}
__all__ = ["EXPORTS", "__version__", *EXPORTS]

# bitsandbytes reports a missing optional CPU kernel on import, whoever imports it; its absence is expected here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Tokenizers warn at every fork that they were used before it; parallelism inside them is worth nothing to us.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tqdm asks for ipywidgets wherever a notebook imports it; its bars are off, the loop shows its own progress.
warnings.filterwarnings("ignore", message="IProgress not found")
# IPython says so of a run that ended early, which is no wish to leave the notebook.
warnings.filterwarnings("ignore", message="To exit: use 'exit'")


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 't2ilib' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
