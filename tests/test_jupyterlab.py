"""Notebooks as a person runs them: JupyterLab in a browser, Run All Cells, seen to end without an error; and Stop in the middle of a training.

The two that are fast enough and that no study runs. base.ipynb is run by papermill (test_golden), train, scratch and compare by the studies' tests.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from jupyter_client import KernelManager

from t2ilib.training.checkpoint import list_steps

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOKEN = "tests"
SECONDS_TO_RUN = 300
WANTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET = ("--disable-background-networking", "--disable-component-update")
PROMPTS = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on copies of the notebooks, whose results are in a folder of their own; and that folder."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "inference").mkdir()
    for notebook in ROOT.glob("inference/*.ipynb"):
        shutil.copy(notebook, folder / "inference")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / "jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    threads = {"OMP_NUM_THREADS": "2"} if "PYTEST_XDIST_WORKER" not in os.environ else {}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None"]
    environment = os.environ | own | threads | {"T2ILIB_RESULTS": str(folder / "results"), "T2ILIB_BATCH": ""}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def asked(address: str, path: str):
    """What the server says; it may not be there yet, or not yet know its own kernel."""
    request = urllib.request.Request(address + path, headers={"Authorization": f"token {TOKEN}"})
    for _ in range(240):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return json.load(urllib.request.urlopen(request, timeout=30))
        time.sleep(0.25)
    return pytest.fail(f"{path} was not answered")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install Debian's package chromium")
def test_run_all_cells_in_jupyterlab(lab) -> None:
    """look_inside trains an adapter, and draw finds it: the newest under the results."""
    from playwright.sync_api import sync_playwright

    address, folder = lab
    asked(address, "/api/status")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*WANTS, *QUIET])
        page = browser.new_page(viewport={"width": 1300, "height": 1400})
        for number, name in enumerate(("look_inside", "draw"), 1):
            run_all(page, address, folder / "inference" / f"{name}.ipynb", number)
        browser.close()
    outputs = {name: outputs_of(folder / "inference" / f"{name}.ipynb") for name in ("look_inside", "draw")}
    for name, found in outputs.items():
        assert not [output for output in found if output["output_type"] == "error"], name
        assert sum("image/png" in output.get("data", {}) for output in found) >= 3, f"pictures of {name}"
    drawn = "".join("".join(output.get("text", "")) for output in outputs["draw"])
    assert f"drawing with tiny-sdxl and {folder / 'results' / 'look_inside'} at 1" in drawn
    assert int(re.search(r"at most (\d+) of 255 apart", drawn)[1]) <= 1, "the restored picture"
    panel = [
        output
        for output in outputs["look_inside"]
        if "done, 120 steps" in "".join(output.get("data", {}).get("text/plain", ""))
    ]
    assert len(panel) == 1, "of the training, the last state"
    assert len(list((folder / "results" / "drawn").glob("*.png"))) == 4 + 4 + 1, "pictures, the base's, a grid"


def run_all(page, address: str, notebook: Path, number: int) -> None:
    """Opens a notebook, the so-manieth, chooses Run All Cells, and saves it when all are done."""
    page.goto(f"{address}/lab/workspaces/{number}/tree/inference/{notebook.name}?token={TOKEN}", timeout=120_000)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    until(lambda: [kernel["execution_state"] for kernel in asked(address, "/api/kernels")] == ["idle"] * number)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    until(lambda: all(re.fullmatch(r"\[\d+\]:", prompt) for prompt in page.evaluate(PROMPTS)))
    page.keyboard.press("Control+s")
    until(lambda: all_done(notebook))


def until(true) -> None:
    limit = time.monotonic() + SECONDS_TO_RUN
    while not true():
        assert time.monotonic() < limit, "it did not come to an end"
        time.sleep(0.5)


def outputs_of(path: Path) -> list[dict]:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [output for cell in cells for output in cell["outputs"]]


def all_done(path: Path) -> bool:
    """Whether the saved notebook has every cell executed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return all(cell["execution_count"] for cell in cells)


TRAIN = """
import t2ilib
run = t2ilib.build_run({
    "output": "cat", "model": {"base": "tiny-sd15"}, "adapter": {"rank": 2}, "data": {"source": "shapes"},
    "shapes": {"scenes": ["heart"], "num_pictures": 8}, "training": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 1000},
    "evaluation": {"validate_every": 0, "sample_every": 0, "validation_timesteps": 1, "prompts": ["a heart"], "num_inference_steps": 1},
})
result = t2ilib.train(run)
print("from", result.resumed_from)
"""


def test_interrupting_the_kernel_commits_a_checkpoint_and_the_cell_goes_on_from_it(tmp_path: Path, monkeypatch) -> None:
    """As Stop does in JupyterLab, which has the kernel's manager interrupt it. Held against the panel, which says how far it is."""
    monkeypatch.delenv("T2ILIB_BATCH", raising=False)
    manager = KernelManager()
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(120)
        told: list[str] = []

        def listen(message: dict) -> None:
            content = message["content"]
            told.append("".join(content.get("data", {}).get("text/plain", "")) or content.get("text", ""))
            found = re.match(r"step (\d+) of 4000", told[-1])
            if found and int(found[1]) >= 3 and not any("ended" in text for text in told) and not stopped:
                stopped.append(int(found[1]))
                manager.interrupt_kernel()

        stopped: list[int] = []
        reply = client.execute_interactive(TRAIN.replace("STEPS", "4000"), timeout=240, output_hook=listen)
        assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "Interrupted")
        (step,) = [int(path.name.removeprefix("step-")) for path in list_steps(tmp_path / "cat" / "checkpoints")]
        assert stopped[0] <= step < 4000
        ended = next(text for text in told if "ended at step" in text)
        assert f"SIGINT after step {step}, of which there is a checkpoint" in ended
        assert "Run this cell again" in ended
        told.clear()
        reply = client.execute_interactive(
            TRAIN.replace("STEPS", str(step + 2)),
            timeout=240,
            output_hook=lambda message: told.append(message["content"].get("text", "")),
        )
        assert reply["content"]["status"] == "ok", "the kernel lives"
        assert f"from {step}\n" in "".join(told)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
