"""What the tests of drawing and of the app share: small runs with checkpoints, trained in seconds."""

import contextlib

import pytest

from t2ilib.runfile import build_run
from t2ilib.tracking.tracker import open_tracker
from t2ilib.training.loop import train

BRIEF = {
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 4},
    "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 2},
    "evaluation": {
        "validate_every": 0,
        "sample_every": 0,
        "validation_timesteps": 1,
        "validation_pictures": 1,
        "prompts": ["a red heart"],
        "num_inference_steps": 1,
    },
}
RUNS = {
    "cat": {
        "adapter": {"rank": 2, "init": "gaussian"},
        "optimizer": {"learning_rate": 3e-2},
        "tracking": {"experiment": "toys"},
    },
    "study-quick/pissa/seed0": {"adapter": {"rank": 2, "init": "pissa"}, "optimizer": {"learning_rate": 1e-2}},
    "words": {
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 2, "tokens": {"<heart>": "heart"}, "text_encoder_targets": "attention"},
        "optimizer": {"learning_rate": 3e-2, "token_learning_rate": 1e-1},
        "data": {"source": "shapes", "captions": [{"trigger": "<heart>"}]},
        "training": BRIEF["training"] | {"keep_adapters": "all", "keep_checkpoints": 1},
    },
}
"""Name -> sections: an adapter logged to MLflow, with its steps in checkpoints; one that changes its base; one with a word, each step kept as a
file."""


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A results folder with the RUNS, and MLflow's store beside them."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, sections in RUNS.items():
            run = build_run(BRIEF | {"output": str(folder / name)} | sections)
            logged = open_tracker(run, folder) if run.tracking.experiment else contextlib.nullcontext()
            with logged as tracker:
                train(run, tracker)
    return folder
