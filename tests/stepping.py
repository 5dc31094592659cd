"""What the tests of checkpoints share: runs' folders that they write themselves, so what every checkpoint measured is known."""

import json
from dataclasses import asdict

import numpy as np
from PIL import Image

from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.rows import Row, write_rows
from t2ilib.evaluation.steps import losses_file
from t2ilib.runfile import build_run, save_run
from t2ilib.seeds import numpy_generator_for

ABOUT = {
    "concept/all": Metric("concept learned", "share", "higher", table="Learned and kept", role="learned"),
    "base_kept/all": Metric("base kept", "share", "higher", table="Learned and kept", role="kept"),
    "clip_score/concept": Metric("CLIP score", "score", "higher", role="followed"),
    "copies": Metric("copies", "share", "lower", ceiling="copies/most", flag="learned by heart"),
}
LOSS = {"held_out_loss": asdict(Metric("held-out loss", "loss", "lower", table="Learned and kept", role="loss"))}
# step -> learned, kept, held-out loss: 300 is best by far, and the loss goes on falling
TRUTH = {0: (0.0, 1.0, 3.0), 100: (0.2, 0.98, 2.2), 200: (0.6, 0.95, 1.9), 300: (0.9, 0.9, 1.7), 400: (0.92, 0.4, 1.6), 500: (0.92, 0.2, 1.5)}  # fmt: skip
RUN = {
    "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart", "base"], "checked_prompts": 4},
    "adapter": {"rank": 2},
    "training": {"steps": 500, "checkpoint_every": 100},
}


def write_measured_run(folder, seed=0, truth=TRUTH, count=60, metrics=("concept/all", "base_kept/all"), losses=True):
    """A run whose checkpoints measured `truth`, on so many prompts of each group, each as hard at every checkpoint."""
    folder.mkdir(parents=True)
    save_run(build_run(RUN | {"seed": seed, "output": str(folder), "name": folder.name}), folder / "run.yaml")
    (folder / "metrics.about.json").write_text(json.dumps(LOSS if losses else {}))
    rows, steps = [], {}
    for step, (learned, kept, loss) in truth.items():
        values = {}
        for name, share in (("concept/all", learned), ("base_kept/all", kept)):
            if name not in metrics:
                continue
            group = name.split("/")[0]
            hard = numpy_generator_for(seed, "hard", group).permutation(count) / count
            right = (hard < share).astype(float)
            values[name] = float(right.mean())
            rows += [Row(step, group, i, f"{group} {i}", {name: right[i]}) for i in range(count)]
        if "copies" in metrics:
            values |= {"copies": step / 500, "copies/most": 0.7}
        steps[str(step)] = {"how": "x", "metrics": values}
        path = losses_file(folder, step)
        path.parent.mkdir(exist_ok=True)
        noise = numpy_generator_for(seed, "loss").normal(0, 0.3, 12)
        told = [{"picture": f"{i}.png", "caption": "?", "loss": loss + float(noise[i])} for i in range(12)]
        if losses:
            path.write_text(json.dumps(told))
    write_rows(folder, rows)
    about = {name: asdict(ABOUT[name]) for name in metrics}
    (folder / "steps.json").write_text(json.dumps({"version": 1, "about": about, "steps": steps}))
    return folder


def picture(file, color, side=64):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), color, np.uint8)).save(file)
    return file
