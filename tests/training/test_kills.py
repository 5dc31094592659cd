"""kill -9, again and again, at drawn moments: nothing that was committed is lost, and the end is that of a run that nothing disturbed.

T2ILIB_KILLS: so many kills of each kind of run, T2ILIB_KILLS_SEED: other moments, both for a longer search.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from killing import EVERY, LATE, STEPS

from t2ilib.training.checkpoint import list_checkpoints
from t2ilib.training.history import read_rows

KILLS = int(os.environ.get("T2ILIB_KILLS", "8"))
SEED = int(os.environ.get("T2ILIB_KILLS_SEED", "0"))
WEIGHTS = {
    "adapter": "adapter/pytorch_lora_weights.safetensors",
    "unet": "model/unet/diffusion_pytorch_model.safetensors",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path, kind: str) -> None:
    """Over load, encoding, steps, checkpoints, saving and measuring. Weights, average, optimizer, schedule, losses, to the bit."""
    script = Path(__file__).parents[1] / "killing.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, kind, str(KILLS), str(SEED)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = tmp_path / "output.txt"
    what = f"seed {SEED}\n{done.stdout}{done.stderr[-3000:]}{said.read_text()[-3000:] if said.exists() else ''}"
    assert done.returncode == 0, what
    found = [json.loads(line) for line in done.stdout.splitlines()][1:]
    during = Counter(kill["place"] for kill in found)
    redone = sum(kill["redone"] for kill in found)
    print(f"{len(found)} kills of a run that trains {kind}, seed {SEED}: {dict(during)}; {redone} steps redone")
    assert len(found) - during[LATE] == KILLS
    assert during["saving"] >= 2, f"too few kills in saves to prove anything: {what}"
    assert redone, f"no kill cost a step, so nothing was resumed: {what}"

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert [path.name for path in list_checkpoints(killed / "checkpoints")] == [
        f"step-{step:06d}" for step in (STEPS - EVERY, STEPS)
    ], what
    last = f"checkpoints/step-{STEPS:06d}"
    files = [f"{last}/{path.name}" for path in (straight / last).iterdir()]
    assert f"{last}/optimizer.safetensors" in files
    assert (f"{last}/ema.safetensors" in files) == (kind == "unet")
    for file in (*files, WEIGHTS[kind]):
        assert (killed / file).read_bytes() == (straight / file).read_bytes(), f"{file} differs: {what}"
    assert measured(killed) == measured(straight), what
    assert not [*killed.rglob("*.saving*")], what


def measured(output: Path) -> list[tuple[int, str, float]]:
    """Everything that the steps and the pictures gave, without how long it took; the last evaluation may stand there twice."""
    cost = ("memory/", "peak_", "steps_per_second", "data_wait_share", "drawing/")
    rows = read_rows(output / "metrics.jsonl")
    steps = [row["step"] for row in rows if "grad_norm" in row]
    assert steps == [*range(1, STEPS + 1)]
    final = json.loads((output / "metrics.json").read_text())
    values = {
        (row["step"], name, value)
        for row in [*rows, {"step": STEPS, **final}]
        for name, value in row.items()
        if not name.startswith(cost)
    }
    assert len(values) == len({(step, name) for step, name, _ in values}), (
        "a number that differs when it is measured again"
    )
    return sorted(values)
