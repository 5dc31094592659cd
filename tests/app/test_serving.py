"""The server around the page: who reaches it, what it gives out, what one page knows of another. Real requests are in test_page."""

import asyncio
import logging
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2ilib.app.serving import PORTS, Guard, Options, free_port, require_gradio, settle, warnings
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitors
from t2ilib.app.wording import told, told_error, told_progress
from t2ilib.config import ConfigError, ModelConfig
from t2ilib.drawing.desk import Progress
from t2ilib.drawing.pngtext import read_picture
from t2ilib.drawing.settings import DrawSettings, build_settings


def test_the_next_free_port_is_taken_and_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = free_port("127.0.0.1", port)
    assert port < found < port + PORTS
    assert capsys.readouterr().out == f"port {port} is taken, so it is {found}\n"
    assert free_port("127.0.0.1", found) == found
    assert capsys.readouterr().out == ""


def test_a_host_that_is_not_here_is_told():
    with pytest.raises(ConfigError, match=r"--host 203\.0\.113\.7: it cannot be listened on"):
        free_port("203.0.113.7", 7860)
    with pytest.raises(ConfigError, match=r"--host no.such.host.invalid: there is no such address here"):
        free_port("no.such.host.invalid", 7860)


def test_whoever_else_can_reach_it_is_warned_about():
    assert Options().host == "127.0.0.1"
    assert not Options().share
    assert warnings(Options()) == []
    assert "no password" in warnings(Options(host="0.0.0.0"))[0]
    assert "public address" in warnings(Options(share=True))[0]


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"the app needs Gradio: pip install 't2ilib\[app\]'"):
        require_gradio()


def test_the_environment_opens_no_folder(monkeypatch, tmp_path):
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "/")
    settle(tmp_path)
    import os

    assert "GRADIO_ALLOWED_PATHS" not in os.environ
    assert "GRADIO_SHARE" not in os.environ
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=https://example.com/a.png", 403),
        ("/gradio_api/file=%68ttp://10.0.0.1", 403),
        ("/gradio_api/proxy=https://example.com", 403),
        ("/gradio_api/file=/tmp/a.png", 200),
        ("/", 200),
    ],
)
def test_nothing_is_fetched_from_elsewhere_for_a_visitor(path, status):
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app)({"type": "http", "path": path}, None, send))
    assert sent[0]["status"] == status
    if status == 200:
        assert b"default-src 'self'" in dict(sent[0]["headers"])[b"content-security-policy"]


def test_a_page_knows_nothing_of_another_and_is_forgotten_with_its_work():
    visitors = Visitors(lambda: ModelConfig())
    one, other = visitors.of("a"), visitors.of("b")
    one.model = ModelConfig(base="mine")
    assert (visitors.of("a"), visitors.of("b").model.base) == (one, "tiny-sdxl")
    with one.at_work() as mine, other.at_work() as theirs:
        assert one.stop()
        assert (mine.is_set(), theirs.is_set()) == (True, False)
        visitors.leave("b")
        assert theirs.is_set()
    assert not one.stop()
    assert visitors.of("b") is not other
    visitors.leave("never came")
    with visitors.of("a").at_work() as work:
        visitors.close()
        assert work.is_set()


def test_the_end_waits_for_no_drawing(results, tmp_path):
    """Which may be at a step of minutes."""
    studio = Studio(results, out=tmp_path)
    with studio.desk.line.turn():
        studio.close()
    assert not studio.served.exists()


def test_what_others_wrote_is_text_and_what_nobody_foresaw_is_told(caplog):
    assert "<script>" not in told("<script>x</script>\nnext")
    assert told("one\ntwo").count("<br>") == 1
    said = told_progress(Progress("loading <b>", 1, 4, 0.25, step=2, num_steps=8))
    assert 'value="0.250"' in said
    assert "Loading &lt;b&gt;, step 2 of 8, 1 of 4 pictures are done" in said
    assert 'role="alert"' in told_error(ConfigError("seed is odd"))
    assert "Something went wrong that nobody foresaw (KeyError: &#x27;x&#x27;)" in told_error(KeyError("x"))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_button_survives_whatever_happens(results, tmp_path):
    pytest.importorskip("gradio")
    from t2ilib.app.answering import answer

    class Request:
        session_hash = "a"

    def fails(visitor, value):
        yield {"place": f"begun with {value} over {visitor.model.base}"}
        raise RuntimeError("the card fell out")

    studio = Studio(results, out=tmp_path)
    begun, ended = list(answer(studio, "place", fails)(Request(), 7))
    assert begun == {"place": "begun with 7 over tiny-sdxl"}
    assert "the card fell out" in ended["place"]
    studio.close()


def test_what_a_page_begins_with(results, tmp_path):
    assert Studio(results).model.base == "tiny-sdxl"
    assert Studio(results).out == results / "app"
    assert Studio(results, adapters=[str(results / "words")]).model.base == "tiny-sd15"
    assert Studio(results, "tiny-sdxl", [str(results / "words")]).model.base == "tiny-sdxl"
    with pytest.raises(ConfigError, match="no adapter at nowhere"):
        Studio(results, adapters=["nowhere"])
    empty = Studio(tmp_path / "nothing-here")
    assert (empty.runs(), empty.registered(), empty.first_adapters([])) == ([], [], ())


def test_only_the_samplers_that_fit_the_base_are_offered(results, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    from t2ilib.app.asking import form_of
    from t2ilib.app.panel import Panel

    studio = Studio(results, out=tmp_path)
    fits = {"tiny-sdxl": ["DDIM", "Euler"], "tiny-sd15": ["DDIM"]}
    monkeypatch.setattr(studio.desk, "samplers", lambda model: fits[model.base])
    with gradio.Blocks():
        panel = Panel(studio)
    visitor = studio.visitors.of("a")
    for base, names in fits.items():
        (update,) = panel.samplers(visitor, form_of(DrawSettings()) | {"base": base}).values()
        assert update["choices"] == ["auto", *names]
    studio.close()


def test_what_is_served_is_the_very_file(results, tmp_path):
    pytest.importorskip("gradio")
    studio = Studio(results, out=tmp_path)
    drawn = studio.desk.draw(build_settings({"prompt": "x", "num_inference_steps": 1})).pictures[0]
    path = studio.keep(drawn)
    copy = studio.serve(path)
    assert copy.startswith(str(studio.served))
    assert Path(copy).read_bytes() == path.read_bytes()
    assert read_picture(copy).settings == drawn.settings
    assert Image.open(studio.serve_bare(drawn.image)).info == {}
    assert [studio.numbered("votes", ".json").name for _ in range(2)] == ["votes-00.json", "votes-01.json"]
    assert [studio.free_folder("exports/a").name for _ in range(2)] == ["a", "a-2"]
    studio.close()
