"""What a run holds: peak memory of a process that encodes and trains on few and on many drawn pictures, which should be about the same.

    python experiments/benchmarks/memory.py [--pictures 500 5000] [--tree WHERE]

The tiny SDXL, 64 pixels, ten steps of 8, `data.cache: all`, nothing encoded before. Each run is a process of its own, which draws nothing:
the pictures are there. `--tree` is another checkout, whose t2ilib is run in place of this one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import json, sys
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

train(build_run(json.loads(sys.argv[1])))
"""
PHASES = ("encoding", "training", "validating", "drawing")


def settings(output: Path, pictures: Path) -> dict:
    return {
        "output": str(output),
        "adapter": {"rank": 4},
        "data": {"path": str(pictures), "validation_share": 0.05},
        "training": {"steps": 10, "batch_size": 8, "checkpoint_every": 10},
        "evaluation": {"validate_every": 0, "sample_every": 0, "validation_pictures": 16, "validation_timesteps": 2,
                       "prompts": ["a red heart"], "num_inference_steps": 1},
    }  # fmt: skip


def measure(folder: Path, count: int, tree: Path) -> dict[str, float]:
    """The process's peaks in MiB, by phase."""
    from t2ilib.shapes import world

    pictures, output = folder / f"pictures-{count}", folder / f"run-{count}"
    if not pictures.exists():
        scenes = world.mixed_scenes(count, "train", 0, ("base", "heart", "striped", "blueprint"))
        world.write_folder(pictures, scenes, 0, num_phrasings=len(world.SOLID_PHRASES))
    environment = os.environ | {"PYTHONPATH": str(tree), "T2ILIB_CACHE": str(folder / f"cache-{count}")}
    command = [sys.executable, "-c", RUN, json.dumps(settings(output, pictures))]
    subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {phase: rows[-1][f"memory/{phase}/peak_process_mib"] for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    arguments = parser.parse_args()
    print(f"{'peak in MiB':>12}" + "".join(f"{phase:>12}" for phase in PHASES), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.pictures:
            found = measure(Path(folder), count, arguments.tree.absolute())
            print(f"{count:>12,}" + "".join(f"{value:>12,.0f}" for value in found.values()), flush=True)


if __name__ == "__main__":
    main()
