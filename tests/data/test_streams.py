"""Streams: the order by value, resumed at every step, through whole runs, over a server, and when they are not what they were."""

import contextlib
import csv
import http.server
import io
import json
import logging
import re
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data import opening
from t2ilib.data.blocks import ENOUGH_TO_TELL
from t2ilib.data.dataset import load_datasets, save_manifest
from t2ilib.data.records import Held, Listing, Record
from t2ilib.data.sources import huggingface, huggingface_stream, shardindex, webdataset_stream
from t2ilib.data.sources.webdataset_stream import LongAnswer, ShardStream
from t2ilib.data.streamed import StepOrder, StreamedSamples
from t2ilib.data.streams import StreamError, block_order
from t2ilib.runfile import build_run
from t2ilib.seeds import numpy_generator_for
from t2ilib.training.checkpoint import CheckpointError
from t2ilib.training.loop import train
from t2ilib.training.setups import needed_in_steps, with_its_cache

ADAPTER = "pytorch_lora_weights.safetensors"
SIZE = 4
"""Of blocks."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(opening, "BLOCK", SIZE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    block_order.cache_clear()


@pytest.fixture
def pngs(picture):
    """`pngs(count, start)`: bytes of different pictures."""

    def make(count, start=0, size=(24, 16)):
        found = []
        for seed in range(start, start + count):
            data = io.BytesIO()
            picture(seed, size).save(data, "PNG")
            found.append(data.getvalue())
        return found

    return make


def reading_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("t2ilib")]


class Given:
    """A stream of bytes, in memory, or of what is said of them; counts what was asked of it."""

    folder, hint = "given", ""

    def __init__(self, items):
        self.items, self.asked = items, []

    def read(self, cursor=None):
        for number in range(cursor["n"] if cursor else 0, len(self.items)):
            self.asked.append(number)
            item, place = self.items[number], Held(f"{number:03d}.png", f"given/{number}", "given", b"")
            if isinstance(item, bytes):
                record = Record(Held(place.name, place.told, "given", item), f"caption {number}")
                yield Listing("given", (record,)), {"n": number + 1}
            else:
                yield Listing("given", rejected=((place, item),)), {"n": number + 1}


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """`opened(items)` gives the data sets of a run on such a stream, and the stream."""
    stack = contextlib.ExitStack()

    def make(items, name="run", **data):
        stream = Given(items)
        monkeypatch.setitem(opening.STREAMS, "webdataset", lambda config: stream)
        values = {"source": "webdataset", "path": "given", "streaming": True, "validation_share": 0} | data
        run = build_run({"output": str(tmp_path / name), "adapter": {}, "data": values, "training": {"batch_size": 3}})
        training, held_out = load_datasets(run)
        stack.enter_context(contextlib.closing(training))
        return training, held_out, stream

    yield make
    stack.close()
    assert not reading_threads()


def names_at(training, order, step):
    return [training.records[i].path.name for i in order(step)]


def expected_order(seed, num, passes):
    """What each place of the order shows, from the definition."""
    shown = []
    for turn in range(passes):
        for block, first in enumerate(range(0, num, SIZE)):
            size = min(SIZE, num - first)
            order = numpy_generator_for(seed, "order of a block", turn, block).permutation(size)
            shown += [f"{first + i:03d}.png" for i in order]
    return shown


@pytest.mark.parametrize("num", [11, 12, 4, 3])
def test_the_order_by_value_and_from_every_step(opened, pngs, num):
    pictures, steps = pngs(num), 14
    expected = expected_order(5, num, 50)
    training, held_out, _ = opened(pictures)
    assert len(held_out) == 0
    order = StepOrder(training.stream, 5, 3, steps)
    straight = [names_at(training, order, step) for step in range(steps)]
    assert [name for names in straight for name in names] == expected[: 3 * steps]
    ids = [i for step in range(steps) for i in order(step)]
    assert len(set(ids)) == len(ids)
    assert training.stream.length == num
    for start in range(steps):
        again, _, _ = opened(pictures)
        order = StepOrder(again.stream, 5, 3, steps)
        assert [names_at(again, order, step) for step in range(start, steps)] == straight[start:]


def run_through(training, held_out, folder, steps, seed=0):
    """What steps see, with the run's files kept in `folder`."""
    folder.mkdir(exist_ok=True)
    save_manifest(training, held_out, folder / "manifest.csv")
    order = StepOrder(training.stream, seed, 3, steps[1])
    found = [names_at(training, order, step) for step in range(*steps)]
    training.close()
    return found


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_reads_little_and_leaves_the_same_files(opened, pngs, tmp_path):
    items = pngs(22)
    items[9:9], items[2:2] = ["is broken"], [b"no picture"]
    steps = 14
    straight = run_through(*opened(items, "straight", max_rejected=0.2)[:2], tmp_path / "straight", (0, steps))
    for stop in range(1, steps):
        name = f"stopped at {stop}"
        run_through(*opened(items, name, max_rejected=0.2)[:2], tmp_path / name, (0, stop))
        (tmp_path / name / "manifest.csv").open("a").write("half a ro")  # as a kill leaves it
        training, held_out, stream = opened(items, name, max_rejected=0.2)
        stream.asked.clear()
        assert run_through(training, held_out, tmp_path / name, (stop, steps)) == straight[stop:]
        for file in ("manifest.csv", "manifest.json", "stream.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
        if stop == 6:  # the pictures from 16 on
            assert stream.asked[0] >= 16
    rows = rows_of(tmp_path / "straight" / "manifest.csv")
    assert [row["part"] for row in rows].count("training") == 22
    assert {row["name"]: row["reason"][:17] for row in rows if row["part"] == "rejected"} == {
        "given/2": "cannot be decoded",
        "given/10": "is broken",
    }
    totals = json.loads((tmp_path / "straight" / "manifest.json").read_text())
    assert totals["pictures"] | {"training": 22, "rejected": 2, "held_out": 0} == totals["pictures"]
    assert totals["samples_of_an_epoch"] == 22
    assert sum(totals["rejected"].values()) == 2
    assert totals["stream"] == {"blocks": 6, "ended": True}
    (tmp_path / "straight" / "stream.jsonl").unlink()
    again = run_through(*opened(items, "straight", max_rejected=0.2)[:2], tmp_path / "straight", (7, steps))
    assert again == straight[7:]
    assert rows_of(tmp_path / "straight" / "manifest.csv") == rows


def test_memory_is_of_two_blocks_however_long_the_stream_is(opened, pngs):
    few = pngs(10)
    training, _, stream = opened([few[i % 10] for i in range(400)])
    order, held = StepOrder(training.stream, 0, 3, 120), []
    for step in range(120):
        order(step)
        if training.stream.ahead:
            training.stream.ahead[1].result()
            assert max(stream.asked) >= (step + 1) * 3  # the next block is fetched while this one is trained on
        being_read = training.stream.ahead is not None
        held.append(sum(map(len, training.stream.blocks.values())) + SIZE * being_read)
    assert max(held) == 2 * SIZE
    assert max(stream.asked) < 120 * 3 + 20  # and nothing behind the last step but what was being decoded


def test_held_out_pictures_never_come_in_training(opened, pngs, tmp_path):
    few = pngs(8)
    items = few + pngs(5, 50) + few[:4]
    training, held_out, _ = opened(items, validation_share=0.5)
    names = {record.path.name for record in held_out.records}
    assert 0 < len(names) < SIZE
    assert names <= {f"{i:03d}.png" for i in range(SIZE)}
    bytes_held = {seen.sha256 for seen in held_out.seen}
    order = StepOrder(training.stream, 0, 3, 12)
    tmp_path.joinpath("run").mkdir()
    save_manifest(training, held_out, tmp_path / "run" / "manifest.csv")
    shown = [training.seen[i].sha256 for step in range(12) for i in order(step)]
    assert not bytes_held & set(shown)
    assert training.stream.length == len(items) - 2 * len(names)
    rows = rows_of(tmp_path / "run" / "manifest.csv")
    parts = [row["part"] for row in rows]
    assert (parts.count("held out"), parts.count("left aside")) == (len(names), len(names))
    assert {row["reason"][:11] for row in rows if row["part"] == "left aside"} == {"is held out"}
    training.close()
    edited, apart, _ = opened(items, "edited", validation_share=0.5, captions=[{"trigger": "sks"}], edit_held_out=False)
    assert edited.captions()[0].startswith("sks caption")
    assert {record.path.name for record in apart.records} == names
    assert apart.captions()[0].startswith("caption")


def test_edits_that_vary_are_made_in_every_block(opened, pngs):
    class Tags(Given):
        def read(self, cursor=None):
            for listing, after in super().read(cursor):
                yield Listing("given", tuple(replace(record, caption="a, b, c, d, e") for record in listing)), after

    training, _, stream = opened(pngs(4), captions=["shuffle_tags"], views=4)
    stream.__class__, stream.items = Tags, pngs(12)
    samples = StreamedSamples(training, training.stream.config, 0, 3)
    order = StepOrder(training.stream, 0, 3, 8)
    later = [samples.caption(i, samples.number(i, step), step) for step in (2, 3) for i in order(step)]
    assert all(sorted(caption) == sorted("a, b, c, d, e") for caption in later)
    assert "a, b, c, d, e" not in later[:3]
    assert samples.weights(order(7), (2.0, 3.0)) == [2.0] * 3
    assert samples.view(order(7)[0], 1).size == (64, 64)


def test_too_many_rejections_stop_the_run_with_the_table(opened, pngs, tmp_path):
    good = pngs(1)[0]
    few = [good] * 30 + ["is odd"] * 2
    with pytest.raises(
        ConfigError, match=r"(?s)2 of the first 32 pictures .* cannot be used.*given/30: is odd.*max_rej"
    ):
        drive(opened(few)[0], 12)
    drive(opened(few, "enough", max_rejected=0.07)[0], 12)
    bad = [good] * 40 + ["is odd"] * 200 + [good] * 400
    training, _, stream = opened(bad)
    with pytest.raises(ConfigError, match=rf"160 of the first {ENOUGH_TO_TELL} pictures"):
        drive(training, 100)
    assert max(stream.asked) < ENOUGH_TO_TELL + 20
    training, _, _ = opened(bad, "skip", on_error="skip")
    drive(training, 30)
    with pytest.raises(ConfigError, match=r"2 of the first 2 pictures"):
        opened(["is odd"] * 2, "none", on_error="skip")
    with pytest.raises(ConfigError, match=r"has no picture"):
        opened([], "empty")


def drive(training, steps):
    order = StepOrder(training.stream, 0, 3, steps)
    for step in range(steps):
        order(step)


def test_a_stream_that_has_changed_is_refused(opened, pngs, tmp_path):
    items = pngs(13)
    run_through(*opened(items)[:2], tmp_path / "run", (0, 5))
    changed = items[:9] + pngs(1, 90) + items[10:]
    training, held_out, _ = opened(changed)
    with pytest.raises(StreamError, match=r"given has changed since this run met its pictures 9 to 12"):
        run_through(training, held_out, tmp_path / "run", (2, 5))
    training, held_out, stream = opened(items)  # and one that changes while the run goes on
    order = StepOrder(training.stream, 0, 3, 20)
    order(0)
    order(5)
    stream.items = changed
    with pytest.raises(StreamError, match="pictures 9 to 12"):
        drive(training, 20)
    assert opened(pngs(13, 1))[0].digest != training.digest


def test_what_a_stream_cannot_do_is_said(opened, pngs):
    items = pngs(5)
    for fields, told in (({"buckets": True}, "t2ilib data shard"), ({"repeat_column": "n"}, "shows each picture once")):
        with pytest.raises(ConfigError, match=told):
            opened(items, **fields)
    for section, told in (({"prior": {"prompts": ["a"]}}, "prior"), ({"training": {"trains": "vae"}}, "vae")):
        values = {"adapter": {} if "prior" in section else None} | section
        data = {"source": "webdataset", "path": "given", "streaming": True}
        with pytest.raises(ConfigError, match=told):
            load_datasets(build_run({"data": data} | values))


def test_errors_come_where_their_block_is_asked_for(opened, pngs):
    class Breaks(Given):
        def read(self, cursor=None):
            for part in super().read(cursor):
                if self.asked[-1] == 9:
                    raise OSError("the line is dead")
                yield part

    training, _, stream = opened(pngs(16))
    stream.__class__ = Breaks
    order = StepOrder(training.stream, 0, 2, 8)
    for step in range(4):
        order(step)
    with pytest.raises(OSError, match="the line is dead"):
        order(4)
    stream.__class__ = Given
    assert len(order(4)) == 2  # asked again, it goes on


# Real sources


def settings(output, data, steps, **more):
    return {
        "output": str(output),
        "model": {"base": "tiny-sd15"},
        "adapter": {"rank": 1, "alpha": 1.0, "dropout": 0.2},
        "data": {"streaming": True, "resolution": 32} | data,
        "objective": {"caption_dropout": 0.2},
        "training": {"steps": steps, "batch_size": 3, "checkpoint_every": 1} | more,
        "evaluation": {
            "validate_every": 0,
            "validation_timesteps": 1,
            "sample_every": 0,
            "num_inference_steps": 1,
            "prompts": ["a picture"],
        },
    }


@pytest.fixture
def rows(tmp_path, pngs):
    """A folder of Parquet in two files of small row groups: eleven pictures, two captions each, of which one cannot be decoded."""
    from datasets import Dataset, Features, Image, List, Value

    pictures = [{"bytes": data, "path": None} for data in pngs(11)]
    pictures[6] = {"bytes": b"no picture", "path": None}
    columns = {"image": pictures, "captions": [[f"one {i}", f"two {i}"] for i in range(11)], "w": [1.0, 0.5] * 5 + [1]}
    features = Features({"image": Image(), "captions": List(Value("string")), "w": Value("float32")})
    table = Dataset.from_dict(columns, features=features)
    folder = tmp_path / "rows"
    folder.mkdir()
    table.select(range(7)).to_parquet(folder / "train-00000-of-00002.parquet", batch_size=2)
    table.select(range(7, 11)).to_parquet(folder / "train-00001-of-00002.parquet", batch_size=3)
    return folder


def test_a_run_that_breaks_off_resumes_bit_for_bit(tmp_path, rows, caplog, monkeypatch):
    """Four steps are three, of which the last is committed where it breaks off, and one more; and nothing is left behind there."""
    from t2ilib.training import loop

    class Breaks(loop.Progress):
        def __call__(self, step, loss, seconds):
            if step == 3:
                raise KeyboardInterrupt

    data = {"source": "huggingface", "path": str(rows), "weight_column": "w", "crop": "random", "flip": 0.5, "views": 3}
    data |= {"max_rejected": 0.2, "captions": [{"trigger": "sks"}], "validation_share": 0.2}
    with caplog.at_level(logging.INFO, "t2ilib"):
        train(build_run(settings(tmp_path / "straight", data, 4, checkpoint_every=2)))
    assert "data.cache all is off for it" in caplog.text
    assert "1 rejected:\n  train[6]: cannot be decoded" in caplog.text
    assert "11 pictures of the stream were met: 10 can be used, 1 rejected" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Breaks)
        with pytest.raises(KeyboardInterrupt):
            train(build_run(settings(tmp_path / "resumed", data, 4, checkpoint_every=2)))
    assert not reading_threads()
    result = train(build_run(settings(tmp_path / "resumed", data | {"workers": 3}, 4, checkpoint_every=2)))
    assert result.resumed_from == 3
    state = "checkpoints/step-000004"
    kept = ("manifest.csv", "manifest.json", "stream.jsonl")
    for file in (f"{state}/weights.safetensors", f"{state}/optimizer.safetensors", *kept):
        found = [tmp_path / name / file for name in ("straight", "resumed")]
        assert found[0].read_bytes() == found[1].read_bytes(), file
    adapters = [load_file(tmp_path / name / "adapter" / ADAPTER) for name in ("straight", "resumed")]
    assert all(np.array_equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    told = rows_of(tmp_path / "straight" / "manifest.csv")
    assert sorted(row["part"] for row in told) == ["held out"] * 2 + ["rejected"] + ["training"] * 8
    assert not reading_threads()


def test_held_out_pictures_of_their_own_part_masks_and_the_steps_cache(tmp_path, pngs, picture):
    from datasets import Dataset, DatasetDict, Features, Image, Value

    def part(count, start):
        masks = []
        for seed in range(start, start + count):
            data = io.BytesIO()
            PIL.Image.new("L", (24, 16), 255).save(data, "PNG")
            masks.append({"bytes": data.getvalue(), "path": None} if seed % 2 else None)
        columns = {"image": [{"bytes": data, "path": None} for data in pngs(count, start)], "mask": masks}
        columns["text"] = [f"text {i}" for i in range(start, start + count)]
        return Dataset.from_dict(
            columns, features=Features({"image": Image(), "mask": Image(), "text": Value("string")})
        )

    DatasetDict({"train": part(9, 0), "test": part(6, 20)}).save_to_disk(tmp_path / "parts")
    data = {"source": "huggingface", "path": str(tmp_path / "parts"), "validation_split": "test", "mask_column": "mask"}
    values = settings(tmp_path / "run", data, 4)
    values["evaluation"]["validation_pictures"] = 5
    run = build_run(values)
    training, held_out = load_datasets(run)
    assert [record.caption for record in held_out.records] == [f"text {i}" for i in range(20, 25)]
    assert [record.mask is not None for record in training.records] == [False, True, False, True]
    assert needed_in_steps(with_its_cache(run), SimpleNamespace(text_encoders={"t": None})) == ("t", "vae")
    train(run)
    told = rows_of(tmp_path / "run" / "manifest.csv")
    assert sorted(row["part"] for row in told) == ["held out"] * 5 + ["training"] * 9


def test_pictures_of_the_hub_are_fetched(monkeypatch, pngs):
    """By a protocol of tests in place of the Hub's: all others stay where they are."""
    import fsspec

    path = "memory://hub/a.png"
    fsspec.filesystem("memory").pipe_file("/hub/a.png", pngs(1)[0])
    cell = huggingface_stream.RowPicture("train[0]", "x", {"path": path, "bytes": None}, None)
    with pytest.raises(ValueError, match="is not fetched"):
        cell.read_bytes()
    monkeypatch.setattr(huggingface_stream, "FETCHED", ("memory",))
    assert cell.read_bytes() == pngs(1)[0]


def test_a_changed_first_block_is_refused_by_the_checkpoint(tmp_path, rows, pngs):
    from datasets import Dataset, Features, Image, Value

    folder = tmp_path / "other"
    folder.mkdir()
    for start in (0, 20):
        columns = {"image": [{"bytes": data, "path": None} for data in pngs(6, start)], "text": list("abcdef")}
        table = Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))
        table.to_parquet(folder / "train.parquet")
        run = build_run(settings(tmp_path / "run", {"source": "huggingface", "path": str(folder)}, 1 + start // 20))
        if not start:
            train(run)
    with pytest.raises(CheckpointError, match="have changed"):
        train(run)


@pytest.mark.parametrize("kind", ["parquet", "imagefolder", "csv", "jsonl", "saved"])
def test_rows_from_every_place(tmp_path, rows, picture, kind):
    """Every form of a data set goes on from every row, and its rows are those of the whole data set."""
    import datasets

    path = tmp_path / "d"
    if kind == "parquet":
        path = rows
    elif kind == "saved":
        datasets.load_dataset(str(rows))["train"].save_to_disk(path)
    else:
        path.mkdir()
        table = []
        for i in range(5):
            picture(i).save(path / f"{i}.png")
            table.append({"file_name" if kind == "imagefolder" else "image": f"{i}.png", "text": f"c {i}"})
        if kind == "csv":
            (path / "train.csv").write_text("image,text\n" + "".join(f"{i}.png,c {i}\n" for i in range(5)))
        else:
            name = "metadata.jsonl" if kind == "imagefolder" else "train.jsonl"
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in table))
        path = path if kind == "imagefolder" else path / f"train.{kind}"
    config = DataConfig(source="huggingface", path=str(path))
    whole = huggingface.load(config)
    stream = huggingface_stream.open_stream(config)

    def told(parts):
        return [(str(r.path), r.captions, r.path.read_bytes()) for listing, _ in parts for r in listing]

    everything = list(stream.read())
    assert told(everything) == [(str(r.path), r.captions, r.path.read_bytes()) for r in whole]
    for number, (_, cursor) in enumerate(everything):
        assert told(stream.read(json.loads(json.dumps(cursor)))) == told(everything[number + 1 :])


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges but when told to; breaks off in the middle of what it sends as often as told to."""

    breaks, ranges = 0, None

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or self.ranges is None:
            super().do_GET()
            return
        first, last = map(int, wanted.groups())
        self.ranges.append((first, last))
        data = Path(self.translate_path(self.path)).read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        data = source.read()
        if type(self).breaks:
            type(self).breaks -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        outputfile.write(data)


@pytest.fixture
def shards(tmp_path, pngs):
    """Two shards of samples that lie together, the last without its caption, behind a server: folder and URL."""
    folder, pictures = tmp_path / "shards", pngs(9, size=(90, 80))
    folder.mkdir()
    for shard, part in enumerate((range(5), range(5, 9))):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in part:
                for ending, data in (("png", pictures[i]), ("json", json.dumps({"caption": f"it {i}"}).encode())):
                    if (i, ending) != (8, "json"):
                        info = tarfile.TarInfo(f"{'x' * 120}/{i:03d}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    handler = type("Own", (Handler,), {})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_a_run_from_shards_behind_a_server(tmp_path, shards, monkeypatch):
    folder, url, handler = shards
    monkeypatch.setattr(webdataset_stream, "FIRST_WAIT", 0.001)
    outputs = {}
    for name, path in (("local", str(folder)), ("remote", f"{url}/s-{{0..1}}.tar")):
        data = {"source": "webdataset", "path": path, "max_rejected": 0.2, "validation_share": 0}
        handler.breaks = 2
        train(build_run(settings(tmp_path / name, data, 2, accumulation=3)))
        train(build_run(settings(tmp_path / name, data, 4, accumulation=3)))
        outputs[name] = next((tmp_path / name / "adapter").glob("*.safetensors"))
    assert handler.breaks == 0

    local, remote = (load_file(path) for path in outputs.values())
    assert local.keys() == remote.keys()
    assert all(np.array_equal(local[name], remote[name]) for name in local)
    told = [(row["part"], row["name"].rpartition("/")[2]) for row in rows_of(tmp_path / "remote" / "manifest.csv")]
    assert sorted(told) == [("rejected", "008.png"), *(("training", f"{i:03d}.png") for i in range(8))]


@pytest.mark.parametrize("where", ["local", "without ranges", "with ranges"])
def test_shards_go_on_from_every_place(shards, pngs, where, monkeypatch):
    folder, url, handler = shards
    monkeypatch.setattr(shardindex, "REMOTE_BLOCK", 5000)
    handler.ranges = [] if where == "with ranges" else None
    for path in (str(folder) if where == "local" else f"{url}/s-{{0..1}}.tar",):
        stream = ShardStream(DataConfig(source="webdataset", path=path, streaming=True))

        def told(parts):
            return [([(r.path.name, r.caption, r.path.read_bytes()) for r in x], len(x.rejected)) for x, _ in parts]

        everything = list(stream.read())
        assert [name for x, _ in told(everything) for name, *_ in x] == [f"{i:03d}.png" for i in range(8)]
        assert [data for x, _ in told(everything) for *_, data in x] == pngs(8, size=(90, 80))
        for number, (_, cursor) in enumerate(everything):
            assert told(stream.read(cursor)) == told(everything[number + 1 :])
    if where == "with ranges":
        handler.ranges.clear()
        assert told(stream.read(everything[-3][1])) == told(everything[-2:])
        assert min(first for first, last in handler.ranges if last) >= 20000  # nothing of what came before


def test_a_long_answer_that_breaks_is_asked_for_again(shards, monkeypatch):
    folder, url, handler = shards
    monkeypatch.setattr(webdataset_stream, "FIRST_WAIT", 0.001)
    data = (folder / "s-0.tar").read_bytes()
    handler.breaks = 2
    with contextlib.closing(LongAnswer(f"{url}/s-0.tar")) as answer:
        assert b"".join(answer.read(at, 1000) for at in range(0, len(data), 1000)) == data
        assert answer.read(len(data), 10) == b""
    handler.breaks = 3
    with contextlib.closing(LongAnswer(f"{url}/s-0.tar")) as answer, pytest.raises(OSError, match="in 3 tries"):
        answer.read(len(data) - 10, 10)


def test_shards_that_are_cut_off_or_not_sorted(tmp_path, shards):
    def load(path, **fields):
        return list(ShardStream(DataConfig(source="webdataset", path=str(path), streaming=True, **fields)).read())

    folder, _, _ = shards
    cut = tmp_path / "cut.tar"
    cut.write_bytes((folder / "s-0.tar").read_bytes()[:-20000])
    with pytest.raises(ConfigError, match=r"cut.tar cannot be read to its end: it is cut off"):
        load(cut)
    found = load(cut, on_error="skip")
    assert "cut off" in found[-1][0].rejected[0][1]
    assert found[-1][1] == {"shard": 1, "byte": 0}
    with tarfile.open(tmp_path / "apart.tar", "w") as tar:
        for name in ("a.png", "b.png", "._a.txt", "b.txt", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    found = [listing for listing, _ in load(tmp_path / "apart.tar")]
    assert [record.path.name for listing in found for record in listing] == ["b.png"]
    assert [path.name for listing in found for path, _ in listing.rejected] == ["a.png", "a.txt"]
    assert sum(len(listing.hidden) for listing in found) == 1
    with pytest.raises(ConfigError, match=r"data.weight_column: no .json of a sample has 'w' \(they have caption\)"):
        load(folder, weight_column="w")
    with pytest.raises(ConfigError, match=r"gone.tar is not there"):
        load(tmp_path / "gone.tar")
