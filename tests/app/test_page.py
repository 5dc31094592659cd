"""The app as a person uses it: one server in a process of its own, a headless Chromium, and requests that no page would make."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from browsing import lacking, open_browser
from mlflow import MlflowClient
from PIL import Image, PngImagePlugin

from t2ilib.drawing.pngtext import read_picture, texts_of
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.sampling import save_png
from t2ilib.tracking.models import MODEL_TAG, register_version
from t2ilib.tracking.store import tracking_uri

pytestmark = pytest.mark.skipif(bool(lacking("gradio")), reason=lacking("gradio"))
ROOT = Path(__file__).parents[2]
PATIENCE = 60_000
LONG = 400
"""Steps that nobody waits for."""


@pytest.fixture(scope="module")
def champion(results):
    """The run `cat` as a study's champion in the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        client = MlflowClient(tracking_uri(None, results))
        (run,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
        return register_version(client, "shown-full", run.data.tags[MODEL_TAG], run.info.run_id, "champion", {})


@pytest.fixture(scope="module")
def server(results, champion, tmp_path_factory):
    """The app as a program, begun on a port that is taken: its address, the folder of its pictures, and what it has written so far."""
    out, place = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("place")
    (place / "temporary").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--results", results, "--out", out, "--port", port, "--adapter", results / "cat"]
        with open(place / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, ROOT / "inference" / "app.py", *map(str, words)],
                cwd=place,
                env=environment
                | {
                    "PYTHONPATH": str(ROOT),
                    "GRADIO_ALLOWED_PATHS": "/",
                    "PYTHONUNBUFFERED": "1",
                    "TMPDIR": str(place / "temporary"),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        told = (place / "log").read_text
        until = time.monotonic() + 180
        while not (found := re.search(r"the app is at (http://127\.0\.0\.1:(\d+)) ", told())):
            assert process.poll() is None, told()
            assert time.monotonic() < until, told()
            time.sleep(0.1)
        assert f"port {port} is taken, so it is {found[2]}" in told()
    yield found[1], out, told
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "something went wrong" not in told()
    assert list((place / "temporary").glob("t2ilib-*")) == [], "what was served is gone"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser, server):
    """Opens the page as a new visitor."""
    contexts = []

    def opened(brief=True):
        contexts.append(browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.elsewhere = []
        page.on("request", lambda r: page.elsewhere.append(r.url) if is_elsewhere(r.url, server[0]) else None)
        page.goto(server[0])
        page.get_by_label("Prompt", exact=True).wait_for()
        if brief:
            for label, value in (("Steps", "2"), ("Guidance", "2"), ("Prompt", "a red heart")):
                fill(page, label, value)
        return page

    yield opened
    for context in contexts:
        assert context.pages[0].elsewhere == [], "the page asks no other server"
        context.close()


def is_elsewhere(url, own):
    return not url.startswith((own, "data:", "blob:"))


def fill(page, label, value):
    field = page.get_by_label(label, exact=True)
    field.fill(str(value))
    field.blur()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def told(page, place, words):
    """What stands in a place as soon as it has these words."""
    spot = page.locator(place).get_by_text(re.compile(words, re.IGNORECASE))
    spot.wait_for()
    return page.locator(place).inner_text()


def drawn(page, words="written to"):
    return told(page, "#draw-told", words)


def shown(page):
    """The bytes of the pictures that the gallery in sight shows."""
    sources = [image.get_attribute("src") for image in page.locator(".grid-wrap img").filter(visible=True).all()]
    return [requests.get(source, timeout=30).content for source in sources]


def settings_in(content):
    return read_picture(io.BytesIO(content)).settings


def drop(page, place, name, content):
    page.locator(f"{place} input[type=file]").set_input_files({"name": name, "mimeType": "", "buffer": content})


def test_a_drawing_is_shown_as_the_file_that_was_written(visit, server, results):
    page, (_, out, _) = visit(), server
    fill(page, "Seed", 7)
    fill(page, "Pictures", 2)
    page.get_by_label("The base alone beside it, from the same noise").check()
    press(page, "Draw")
    said = drawn(page)
    assert "2 pictures, seed 7" in said
    pictures = shown(page)
    written = {path.read_bytes(): path for path in out.glob("*.png")}
    assert len(pictures) == 4
    assert all(content in written for content in pictures), "with every byte, text chunks too"
    settings = [settings_in(content) for content in pictures]
    assert [(one.seed, one.first, len(one.adapters)) for one in settings] == [
        (7, 0, 1),
        (7, 0, 0),
        (7, 1, 1),
        (7, 1, 0),
    ]
    assert settings[0].adapters[0].path == str(results / "cat"), "the adapter that the app was started with"
    page.get_by_label("Random seed").check()
    press(page, "Draw")
    page.wait_for_function("document.querySelector('#field-seed textarea, #field-seed input').value.length > 4")
    drawn(page, "written to")
    seed = page.get_by_label("Seed", exact=True).input_value()
    assert f"seed {seed}" in drawn(page, f"seed {seed}")


def test_two_adapters_each_with_its_strength(visit, champion, results):
    page = visit()
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name=champion, exact=True).click()
    press(page, "Add an adapter")
    second = page.get_by_label("Adapter 2", exact=True)
    second.fill(f"{results / 'cat'} at step 1")
    second.press("Enter")
    strength = page.get_by_label("number input for Strength", exact=True)
    strength.fill("0.5")
    strength.blur()
    slider = page.get_by_label("range slider for Strength 2", exact=True)
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
    page.get_by_role("button", name="Draw", exact=True).press("Enter")
    drawn(page)
    (settings,) = map(settings_in, shown(page))
    assert [(a.path, a.step, round(a.strength, 3)) for a in settings.adapters] == [
        (champion, None, 0.5),
        (str(results / "cat"), 1, 0.8),
    ]


def test_an_adapter_brings_its_base_and_what_is_none_is_told(visit, results):
    page = visit()
    box = page.get_by_label("Adapter", exact=True)
    box.fill(str(results / "words"))
    box.press("Enter")
    told(page, "#panel-told", "the base is tiny-sd15 now")
    press(page, "Draw")
    said = drawn(page)
    assert "in prompts it is called" not in said
    assert settings_in(shown(page)[0]).model.base == "tiny-sd15"
    box.fill("/etc/passwd")
    box.press("Enter")
    press(page, "Draw")
    said = drawn(page, "/etc/passwd")
    assert "root:" not in page.content()
    assert page.locator("#draw-told .bad[role=alert]").count() == 1
    box.fill(str(results / "cat"))
    box.press("Enter")
    told(page, "#panel-told", "the base is tiny-sdxl now")
    fill(page, "Steps", 0)
    fill(page, "Seed", "many")
    press(page, "Draw")
    said = drawn(page, "mistakes")
    assert "Steps: " in said
    assert "Seed: " in said
    fill(page, "Steps", 1)
    fill(page, "Seed", 1)
    press(page, "Draw")
    assert "1 picture, seed 1" in drawn(page)


def test_two_visitors_at_once_take_turns_and_either_can_stop(visit, server):
    one, other = visit(), visit()
    fill(one, "Steps", LONG)
    press(one, "Draw")
    drawn(one, f"step \\d+ of {LONG}")
    assert one.locator("#draw-told progress").count() == 1
    fill(other, "Prompt", "a blue square")
    press(other, "Draw")
    drawn(other, "waiting for what is being drawn")
    press(other, "Stop")
    assert "Stopped: 0 pictures of 1 were whole" in drawn(other, "stopped")
    press(other, "Draw")
    drawn(other, "waiting for what is being drawn")
    one.locator(".grid-wrap img").first.wait_for()  # what is expected so far
    press(one, "Stop")
    assert "Stopped: 0 pictures of 1 were whole" in drawn(one, "stopped")
    drawn(other)
    assert [settings_in(content).prompt for content in shown(other)] == ["a blue square"]
    assert one.locator(".grid-wrap img").filter(visible=True).count() == 0, (
        "nothing of the other's, and no half picture"
    )
    press(one, "Stop")
    drawn(one, "nothing is being drawn")


def test_who_leaves_stops_what_was_drawn_for_them(visit, server):
    one, other = visit(), visit()
    fill(one, "Steps", LONG)
    press(one, "Draw")
    drawn(one, f"step \\d+ of {LONG}")
    press(other, "Draw")
    drawn(other, "waiting for what is being drawn")
    one.goto("about:blank")
    drawn(other)


def test_checkpoints_on_a_slider_and_one_kept_as_a_file(visit, server, results):
    page, (_, out, _) = visit(), server
    page.get_by_role("tab", name="Checkpoints").click()
    run = page.get_by_label("Run", exact=True)
    run.click()
    page.get_by_role("option", name=re.compile("^cat ")).click()
    press(page, "Draw at every checkpoint")
    told(page, "#steps-told", "which step is to be kept")
    told(page, "#steps-title", r"Step 2 \(3 of 3\)")
    steps = []
    slider = page.get_by_label("range slider for Checkpoint", exact=True)
    for words in ("Step 2", "Step 1", "The base alone"):
        told(page, "#steps-title", words)
        page.wait_for_timeout(300)
        (content,) = shown(page)
        steps.append([adapter.step for adapter in settings_in(content).adapters])
        slider.press("ArrowLeft")
    assert steps == [[2], [1], []]
    page.get_by_text("Keep this one").click()
    press(page, "Write the file")
    told(page, "#steps-kept", "this is the base alone")
    slider.press("ArrowRight")
    told(page, "#steps-title", "Step 1")
    press(page, "Write the file")
    told(page, "#steps-kept", "Step 1 of cat lies in")
    with page.expect_download() as download:
        page.locator("#steps-files a").filter(visible=True).first.click()
    file = out / "exports" / "cat-step-000001" / "cat-step-000001.safetensors"
    assert Path(download.value.path()).read_bytes() == file.read_bytes()


def test_a_grid_is_one_sheet_in_a_file_and_in_mlflow(visit, server, results, monkeypatch):
    page, (_, out, _) = visit(), server
    page.get_by_role("tab", name="Grid").click()
    assert page.get_by_label("Values from column to column").get_attribute("placeholder") == "such as 0-1 [5]"
    press(page, "Draw the grid")
    assert "has no values: write some, such as '0-1 [5]'" in told(page, "#grid-told", "no values")
    fill(page, "Values from column to column", "0, 1")
    fill(page, "Values from row to row", "3, 4")
    fill(page, "MLflow experiment", "looked")
    press(page, "Draw the grid")
    said = told(page, "#grid-told", "4 of 4 pictures, written to")
    assert "Logged to the MLflow experiment looked" in said
    sheet = out / "grid-00.png"
    page.locator("#grid-sheet img").wait_for()
    assert requests.get(page.locator("#grid-sheet img").get_attribute("src"), timeout=30).content == sheet.read_bytes()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(tracking_uri(None, results))
    (run,) = client.search_runs([client.get_experiment_by_name("looked").experiment_id])
    assert [item.path for item in client.list_artifacts(run.info.run_id, "drawn")] == ["drawn/grid-00.png"]
    other = visit(brief=False)
    drop(other, "#drop", "sheet.png", sheet.read_bytes())
    told(other, "#panel-told", "taken over: a sheet's settings, with the axes of its grid")
    assert other.get_by_role("tab", name="Grid").get_attribute("aria-selected") == "true"
    assert other.get_by_label("Values from row to row").input_value() == "3, 4"
    press(other, "Draw the grid")
    told(other, "#grid-told", "4 of 4 pictures")
    assert (Image.open(out / "grid-01.png").tobytes()) == Image.open(sheet).tobytes()


def test_a_picture_that_is_dropped_is_drawn_again(visit, results):
    asked = build_settings(
        {
            "prompt": "a red heart, <em>really</em>",
            "negative_prompt": "blue",
            "seed": 2**62 + 1,
            "first": 2,
            "num_inference_steps": 2,
            "guidance_scale": 2.5,
            "width": 96,
            "height": 64,
            "sampler": "Euler a",
            "adapters": [
                {"path": str(results / "study-quick/pissa/seed0"), "strength": 2.5},
                {"path": str(results / "cat"), "step": 1, "strength": -0.5},
            ],
        }
    )
    content = io.BytesIO()
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts_of(asked, "Euler a", (96, 64)).items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=chunks)
    page = visit(brief=False)
    drop(page, "#drop", "mine.png", content.getvalue())
    told(page, "#panel-told", "taken over: the picture's settings")
    press(page, "Draw")
    drawn(page)
    settings = settings_in(shown(page)[0])
    assert settings.model_copy(update={"adapters": ()}) == asked.model_copy(update={"adapters": ()})
    assert [(a.path, a.step, a.strength) for a in settings.adapters] == [
        (a.path, a.step, a.strength) for a in asked.adapters
    ]


def test_what_holds_no_settings_is_told_and_changes_nothing(visit, tmp_path):
    page = visit()
    save_png(Image.new("RGB", (8, 8)), tmp_path / "bare.png", {})
    bare = (tmp_path / "bare.png").read_bytes()
    drop(page, "#drop", "bare.png", bare)
    told(page, "#panel-told", "bare.png carries no settings")
    drop(page, "#drop", "notes.txt", b"not a picture")
    told(page, "#panel-told", "notes.txt cannot be read as a PNG")
    drop(page, "#drop", "half.png", bare[:20])
    told(page, "#panel-told", "half.png cannot be read as a PNG")
    theirs = "a heart\nSteps: 3, Sampler: DPM adaptive, CFG scale: 2, Seed: 5, Size: 64x64, Model: other"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "theirs.png", {"parameters": theirs})
    drop(page, "#drop", "theirs.png", (tmp_path / "theirs.png").read_bytes())
    said = told(page, "#panel-told", "taken over")
    assert "sampler 'DPM adaptive' is not known here" in said
    assert page.get_by_label("Steps", exact=True).input_value() == "3"
    assert page.get_by_label("Prompt", exact=True).input_value() == "a heart"


def test_a_blind_comparison_ends_in_votes_that_others_can_add_to(visit, server, results):
    page, (_, out, _) = visit(), server
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One variant", exact=True).click()
    page.get_by_role("option", name=re.compile("^cat ")).click()
    fill(page, "Prompts to compare them on, one a line", "a red heart\na blue square")
    press(page, "Draw the pairs")
    told(page, "#vote-told", "which is better")
    seen = []
    for number in (1, 2):
        told(page, "#vote-prompt", f"Pair {number} of 2")
        for side in ("left", "right"):
            image = page.locator(f"#vote-{side}-picture img")
            image.wait_for()
            source = image.get_attribute("src")
            assert source.endswith("/picture.png")
            assert Image.open(io.BytesIO(requests.get(source, timeout=30).content)).info == {}
            seen.append(source)
        assert not re.search(
            "cat|base alone", page.locator("#vote-prompt").inner_text() + page.locator("#vote-told").inner_text()
        )
        press(page, "Left is better" if number == 1 else "No difference")
        page.wait_for_timeout(200)
    assert len(set(seen)) == 4
    told(page, "#vote-told", "all pairs are voted on")
    assert "1 tie" in told(page, "#vote-tally", "95% interval")
    page.get_by_text("Votes: result, file").click()
    press(page, "Write the votes to a file")
    told(page, "#vote-tally", "2 votes written to")
    votes = json.loads((out / "votes-00.json").read_text())
    assert [vote["choice"] for vote in votes["votes"]] == [votes["votes"][0]["left"], "tie"]
    assert {variant["name"] for variant in votes["ballot"]["variants"]} == {"cat", "the base alone"}
    for vote in votes["votes"]:
        vote["voter"] = "ann"
    drop(page, "#vote-drop", "ann.json", json.dumps(votes).encode())
    assert "2 ties" in told(page, "#vote-tally", "2 votes added")
    drop(page, "#vote-drop", "bad.json", b"{}")
    told(page, "#vote-tally", "holds no votes")
    other = visit()
    other.get_by_role("tab", name="Compare").click()
    other.get_by_text("Votes: result, file").click()
    drop(other, "#vote-drop", "ann.json", json.dumps(votes).encode())
    told(other, "#vote-tally", "2 votes added")
    press(other, "Draw the pairs of these votes")
    told(other, "#vote-told", "who else votes writes their name")
    fill(other, "Your name", "bob")
    told(other, "#vote-prompt", "Pair 1 of 2: a red heart")
    press(other, "Right is better")
    told(other, "#vote-told", "3 votes so far, on 2 pairs")


def test_every_field_has_a_label(visit):
    page = visit(brief=False)
    page.get_by_text("Base model, and what is rarely needed").click()
    nameless = """() => [...document.querySelectorAll('input, textarea, button, select')].filter(e => e.offsetParent !== null
        && !(e.labels && e.labels.length) && !e.ariaLabel && !e.innerText.trim() && !e.title).map(e => e.outerHTML)"""
    for tab in ("Draw", "Checkpoints", "Grid", "Compare"):
        page.get_by_role("tab", name=tab).click()
        for closed in page.get_by_text(re.compile("^(Keep this one|Votes:)")).filter(visible=True).all():
            closed.click()
        assert page.evaluate(nameless) == []


@pytest.mark.parametrize("spelled", ["{}", "..{}", "{} ", "%2e%2e%2f%2e%2e{}", "file://{}"])
def test_no_file_is_given_out_by_its_path(server, results, spelled):
    address, out, _ = server
    (results / "link.png").unlink(missing_ok=True)
    (results / "link.png").symlink_to("/etc/passwd")
    for path in (
        "/etc/passwd",
        results / "link.png",
        results / "mlflow.db",
        results / "cat" / "run.yaml",
        out / "00.png",
        Path(__file__),
    ):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            answer = requests.get(f"{address}/{route}{spelled.format(path)}", timeout=30)
            assert answer.status_code in (403, 404), (route, path, answer.status_code)


def test_a_path_that_was_not_uploaded_is_read_by_no_button(server, results):
    """As the page asks, but with a path of one's own in the place of a file's."""
    address, _, _ = server
    config = requests.get(f"{address}/config", timeout=30).json()
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    taking = {
        names[d["inputs"][0]]: d["id"]
        for d in config["dependencies"]
        if d["inputs"] and names[d["inputs"][0]] in ("drop", "vote-drop")
    }
    assert len(taking) == 2
    for number in taking.values():
        session = {"session_hash": "stranger", "fn_index": number}
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        asked = requests.post(f"{address}/gradio_api/queue/join", json={"data": [file], **session}, timeout=30)
        assert asked.ok
        with requests.get(f"{address}/gradio_api/queue/data", params=session, stream=True, timeout=30) as stream:
            said = b"".join(line for line in stream.iter_lines() if b"process_" in line or b"close" in line).decode()
        assert '"success":false' in said.replace(" ", "")
        assert "root:" not in said
    assert requests.get(f"{address}/gradio_api/file=https://example.com/", timeout=30).status_code == 403
    assert "default-src 'self'" in requests.get(address, timeout=30).headers["content-security-policy"]
