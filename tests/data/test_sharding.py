"""What is written as shards is read back as it was, by this library and by Python's tarfile, and killing it costs one shard."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.config import ConfigError, DataConfig
from t2ilib.data import sharding
from t2ilib.data.dataset import load_datasets
from t2ilib.data.records import Listing, Record
from t2ilib.data.sharding import write_shards
from t2ilib.data.sources import folder, shardindex, webdataset
from t2ilib.runfile import build_run
from t2ilib.shapes import source as shapes_source
from t2ilib.training.loop import train

SMALL = 20_480
"""Bytes of a shard that holds a few pictures of noise."""


def written(path, out, most=SMALL, shuffle=None, **fields):
    config = DataConfig(path=str(path), **fields)
    return write_shards(folder.load(config), config, out, most, shuffle)


def read(out, **fields):
    return webdataset.load(DataConfig(source="webdataset", path=str(out), **fields))


def by_others(out):
    """Samples by WebDataset's rule: files that follow one another in a tar, up to the first dot of their name."""
    samples = []
    for path in sorted(out.glob("*.tar")):
        last = None
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name).groups()
                if key != last:
                    samples.append({"key": key})
                samples[-1][ending.lower()] = tar.extractfile(member).read()
                last = key
    return samples


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def rich(tmp_path, picture):
    """A folder with subfolders, several captions, masks, weights and repeats, and a name with dots."""
    rows = [
        {"file_name": "sub/one.png", "text": "one\nof two", "weight": 0.5, "times": 2, "mask": ""},
        {"file_name": "b.v1.0.jpg", "text": ["ä", "zweite", "third"], "weight": None, "times": None, "mask": ""},
        {"file_name": "c.png", "text": "\ufeffmarked", "weight": "", "times": 1, "mask": "masks/c.png"},
        {"file_name": "d.webp", "text": "plain", "weight": 1, "times": 1, "mask": ""},
    ]
    pics = tmp_path / "rich"
    for index, name in enumerate(("sub/one.png", "b.v1.0.jpg", "c.png", "d.webp", "masks/c.png")):
        (pics / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(pics / name)
    (pics / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pics


COLUMNS = {"weight_column": "weight", "repeat_column": "times", "mask_column": "mask"}


def what_counts(listing):
    return [
        (r.path.read_bytes(), r.captions, r.mask and r.mask.read_bytes(), r.weight, r.repeats, r.scene) for r in listing
    ]


def test_everything_survives(rich, tmp_path):
    out = tmp_path / "out"
    done = written(rich, out, most=10_240, **COLUMNS)
    before = folder.load(DataConfig(path=str(rich), **COLUMNS))
    assert done.columns == {"weight_column": "weight", "repeat_column": "repeats"}
    after = read(out, **done.columns)
    assert what_counts(after) == what_counts(before)
    assert after.rejected == after.aside == ()
    assert [record.path.member for record in after] == ["b_v1_0.jpg", "c.png", "d.webp", "sub/one.png"]
    assert (done.pictures, done.captions) == (4, 6)
    assert 1 < done.shards == len([*out.glob("*.tar")])
    assert done.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    again = tmp_path / "again"
    write_shards(after, DataConfig(), again, 10_240)  # shards of shards
    assert files_of(again) == files_of(out)


def test_others_read_them(rich, tmp_path):
    written(rich, tmp_path / "out", most=10_240, **COLUMNS)
    samples = {sample.pop("key"): sample for sample in by_others(tmp_path / "out")}
    assert {key: sorted(sample) for key, sample in samples.items()} == {
        "b_v1_0": ["jpg", "json"],
        "c": ["json", "mask.png", "png"],
        "d": ["txt", "webp"],
        "sub/one": ["json", "png"],
    }
    assert samples["d"]["txt"] == b"plain"
    assert json.loads(samples["b_v1_0"]["json"]) == {"caption": ["ä", "zweite", "third"]}
    assert json.loads(samples["sub/one"]["json"]) == {"caption": "one\nof two", "weight": 0.5, "repeats": 2}
    assert samples["sub/one"]["png"] == (rich / "sub/one.png").read_bytes()


def test_the_index_tells_what_the_headers_tell(rich, tmp_path):
    written(rich, tmp_path / "out", **COLUMNS)
    for path in (tmp_path / "out").glob("*.tar"):
        index = shardindex.own_index(str(path), path.stat().st_size)
        scanned = shardindex.scan(str(path), path.stat().st_size)
        assert [member._replace(crc=None) for member in index.members] == list(scanned.members)
        with tarfile.open(path) as tar:
            assert [member.offset_data for member in tar.getmembers()] == [member.offset for member in index.members]


def test_with_its_index_a_shard_is_not_read(captioned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    written(captioned(tmp_path / "p", 8), out)
    monkeypatch.setattr(shardindex, "scan", lambda *_: pytest.fail("read"))
    for path in out.glob("*.tar"):
        size, when = path.stat().st_size, path.stat().st_mtime_ns
        path.write_bytes(bytes(size))
        os.utime(path, ns=(when, when))
    listing = read(out)
    assert [record.caption for record in listing] == [f"caption {i}" for i in range(8)]
    with pytest.raises(OSError, match="not those that the index of its shard tells of"):
        listing[0].path.read_bytes()


def test_a_stale_index_is_not_used_and_told(captioned, tmp_path, caplog):
    out = tmp_path / "out"
    pics = captioned(tmp_path / "p", 4)
    written(pics, out, most=10**6)
    shard = out / "shard-000000.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(pics.iterdir()):
            tar.add(path, path.name, filter=lambda info: info if info.name != "003.txt" else None)
    listing = read(out)
    assert [record.caption for record in listing] == [f"caption {i}" for i in range(3)]
    assert "is stale and not used" in caplog.text
    caplog.clear()
    data = shard.read_bytes()
    shard.write_bytes(data + bytes(10_240))
    assert len(read(out)) == 3
    assert re.search(r"shard-000000.tar.idx.json is stale and not used, for the shard has \d+ bytes", caplog.text)
    caplog.clear()
    (out / "shard-000000.tar.idx.json").write_text('{"t2ilib": 0}')
    assert len(read(out)) == 3
    assert "is not used: it is none of this version" in caplog.text


def test_captions_that_were_changed_in_place_are_noticed(captioned, tmp_path, caplog):
    out = tmp_path / "out"
    written(captioned(tmp_path / "p", 4), out, most=10**6)
    shard = out / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"caption 2", b"caption 9"))
    os.utime(shard, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns + 10**9))
    assert [record.caption for record in read(out)] == ["caption 0", "caption 1", "caption 9", "caption 3"]
    assert "is stale and not used: the shard was written after it, with other members" in caplog.text


def test_an_index_that_was_copied_first_counts(captioned, tmp_path, caplog):
    out = tmp_path / "out"
    written(captioned(tmp_path / "p", 4), out, most=10**6)
    shard = out / "shard-000000.tar"
    os.utime(shard, ns=(0, (out / f"{shard.name}.idx.json").stat().st_mtime_ns + 10**9))
    listing = read(out)
    assert len(listing) == 4
    assert listing[0].path.crc is not None
    assert caplog.text == ""


@pytest.mark.parametrize(
    "rows",
    [[["x.png", -1, 5]], [["x.png", 0, 10**9]], [["x.png", 0.5, 1]], [["x.png"]], [[1, 0, 5]], [["x", 0, 1, None, 3]], 5, [5]],
)  # fmt: skip
def test_an_index_that_does_not_hold_together(captioned, tmp_path, caplog, rows):
    out = tmp_path / "out"
    written(captioned(tmp_path / "p", 2), out, most=10**6)
    place = out / "shard-000000.tar.idx.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"members": rows}))
    assert len(read(out)) == 2
    assert "is not used: it" in caplog.text


def test_bits_that_fell_are_noticed(captioned, tmp_path):
    out = tmp_path / "out"
    written(captioned(tmp_path / "p", 2), out, most=10**6)
    record = read(out)[0]
    with (out / "shard-000000.tar").open("r+b") as shard:
        shard.seek(record.path.offset + 100)
        byte = shard.read(1)[0]
        shard.seek(record.path.offset + 100)
        shard.write(bytes([byte ^ 1]))
    with pytest.raises(OSError, match="not those that the index"):
        record.path.read_bytes()


def test_the_drawn_world_survives(tmp_path):
    run = build_run({"adapter": {}, "data": {"source": "shapes"}, "shapes": {"num_pictures": 6, "scenes": ["heart"]}})
    training, _ = shapes_source.load(run.shapes)
    write_shards(training, run.data, tmp_path / "out", SMALL)
    assert what_counts(read(tmp_path / "out")) == what_counts(training)
    assert all(record.scene["shape"] == "heart" for record in read(tmp_path / "out"))


def run_of(output=None, **data):
    return build_run(
        {
            "output": str(output),
            "model": {"base": "tiny-sd15"},
            "adapter": {"rank": 2, "alpha": 2.0},
            "data": data,
            "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
            "evaluation": {"validate_every": 0, "sample_every": 0, "prompts": ["x"], "num_inference_steps": 1},
        }
    )


def test_the_same_data_set_and_the_same_training_from_a_folder_and_from_its_shards(captioned, tmp_path):
    """Names, order and bytes are the same, so are the digest, the held-out pictures and, bit for bit, the adapter."""
    pics, out = captioned(tmp_path / "p", 8), tmp_path / "out"
    written(pics, out)
    sources = {"folder": {"path": str(pics)}, "shards": {"source": "webdataset", "path": str(out)}}
    datasets = {name: load_datasets(run_of(**data)) for name, data in sources.items()}
    for part in (0, 1):
        one, other = (datasets[name][part] for name in sources)
        assert one.digest == other.digest
        assert [r.path.name for r in one.records] == [r.path.name for r in other.records]
    weights = {}
    for name, data in sources.items():
        train(run_of(tmp_path / name, **data))
        files = (tmp_path / name / "checkpoints" / "step-000002").glob("*.safetensors")
        weights[name] = {(file.name, key): tensor for file in files for key, tensor in load_file(file).items()}
    assert weights["folder"].keys() == weights["shards"].keys()
    assert all(torch.equal(tensor, weights["shards"][key]) for key, tensor in weights["folder"].items())
    assert any(tensor.any() for (_, key), tensor in weights["folder"].items() if "lora_B" in key)


def test_the_same_shards_every_time_and_in_an_order_of_ones_own(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 12)
    written(pics, tmp_path / "a")
    written(pics, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    names = {}
    for name, seed in (("c", 5), ("d", 5), ("e", 6)):
        written(pics, tmp_path / name, shuffle=seed)
        names[name] = [record.caption for record in read(tmp_path / name)]
    assert names["c"] == names["d"] != names["e"]
    assert sorted(names["e"]) == sorted(names["c"]) == sorted(f"caption {i}" for i in range(12))


def test_shards_are_no_larger_than_asked(captioned, tmp_path):
    done = written(captioned(tmp_path / "p", 20), tmp_path / "out")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert max(sizes) <= SMALL
    assert len(sizes) == done.shards == 4
    one_each = written(tmp_path / "p", tmp_path / "tiny", most=1)
    assert one_each.shards == 20


def test_names_that_meet(tmp_path, picture):
    """Two pictures of one name are two samples; dots, and bytes that are not UTF-8, mislead no reader."""
    listing = []
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        for name in ("a.b.png", "a_b.png", os.fsdecode(b"K\xfc.png"), "nameless"):
            picture(len(listing)).save(tmp_path / place / name, "PNG")
            listing.append(Record(tmp_path / place / name, f"{len(listing)}"))
    write_shards(Listing(tmp_path / "elsewhere", tuple(listing)), DataConfig(), tmp_path / "out", 10**6)
    after = read(tmp_path / "out")
    assert [record.path.name for record in after] == [
        *("a_b.png", "a_b-2.png", "K_xfc.png", "nameless.png"),
        *("a_b-3.png", "a_b-4.png", "K_xfc-2.png", "nameless-2.png"),
    ]
    assert what_counts(after) == what_counts(listing)
    assert len(by_others(tmp_path / "out")) == 8


def test_rejected_pictures_are_not_written_and_told(captioned, tmp_path):
    pics = captioned(tmp_path / "p", 4)
    (pics / "001.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"001\.png: cannot be decoded: the file is empty"):
        written(pics, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert written(pics, tmp_path / "out", on_error="skip").pictures == 3
    assert [record.path.name for record in read(tmp_path / "out")] == ["000.png", "002.png", "003.png"]


def test_a_folder_with_other_shards_is_left_alone(captioned, tmp_path):
    pics, out = captioned(tmp_path / "p", 8), tmp_path / "out"
    written(pics, out)
    before = files_of(out)
    (pics / "007.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"shard-000001\.tar is there, of other pictures or captions"):
        written(pics, out)
    with pytest.raises(ConfigError, match=r"shard-000000\.tar is there, .* --max-mb"):
        written(pics, out, most=2 * SMALL)
    assert files_of(out) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="remove it, or"):
        written(pics, foreign)
    assert (foreign / "shard-000000.tar").read_bytes() == b"mine"


def test_damaged_shards_are_written_anew_and_whole_ones_kept(captioned, tmp_path, caplog):
    pics, out = captioned(tmp_path / "p", 12), tmp_path / "out"
    written(pics, out)
    before, inode = files_of(out), (out / "shard-000000.tar").stat().st_ino
    data = bytearray((out / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (out / "shard-000001.tar").write_bytes(data)
    assert written(pics, out).kept == 1
    assert files_of(out) == before
    assert (out / "shard-000000.tar").stat().st_ino == inode
    assert "shard-000001.tar is damaged, and written anew" in caplog.text


def test_a_full_disk_is_told_before_anything_is_written(captioned, tmp_path, monkeypatch):
    pics = captioned(tmp_path / "p", 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ConfigError, match=r"the shards need .* MiB .* are free: free some, or write them elsewhere"):
        written(pics, tmp_path / "out")
    assert files_of(tmp_path / "out") == {}


def test_a_picture_that_changes_meanwhile(captioned, tmp_path, picture, monkeypatch):
    pics, out = captioned(tmp_path / "p", 4), tmp_path / "out"
    require = sharding.require_disk
    monkeypatch.setattr(sharding, "require_disk", lambda *args: (picture(9).save(pics / "002.png"), require(*args)))
    with pytest.raises(ConfigError, match=r"002\.png was changed while shards were written"):
        written(pics, out)
    assert [*out.glob("*.tar")] == []


def test_two_processes_do_not_write_to_one_folder(captioned, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / sharding.LOCK),
        pytest.raises(ConfigError, match="another process writes shards there"),
    ):
        written(captioned(tmp_path / "p", 2), tmp_path / "out")
    assert written(tmp_path / "p", tmp_path / "out").pictures == 2


SLOW = """
import sys, time
from t2ilib.data import sharding
from t2ilib.data.sharding import File
read = File.read
File.read = lambda self: (time.sleep(0.02), read(self))[1]
from t2ilib.cli import app
app(sys.argv[1:])
"""


def test_killed_while_writing_it_goes_on(captioned, tmp_path):
    pics, out = captioned(tmp_path / "p", 30), tmp_path / "out"
    written(pics, tmp_path / "straight")
    command = ["data", "shard", str(pics), str(out), "--max-mb", str(SMALL / 10**6)]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len([*out.glob("shard-*.tar")]) < 2 or not [*out.glob(".shard-*.part")]:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-*.tar")}
    assert 2 <= len(kept) < 5
    assert [*out.glob(".*.part")]  # what it was writing
    listing = read(out)  # and what is whole is read meanwhile
    assert listing.rejected == ()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"({len(kept)} were there)" in result.output
    assert files_of(out) == files_of(tmp_path / "straight")
    assert {name: (out / name).stat().st_ino for name in kept} == kept


def test_the_command_takes_a_folder_a_run_config_or_set(captioned, rich, tmp_path):
    def told(*command):
        result = CliRunner().invoke(app, ["data", "shard", *map(str, command)])
        assert result.exit_code == 0, result.output
        return result.output

    pics = captioned(tmp_path / "p", 4)
    output = told(pics, tmp_path / "a")
    assert output.startswith(f"4 pictures with 4 captions in 1 shard(s), 0.0 MB, in {tmp_path / 'a'}\n")
    assert f"data:\n  source: webdataset\n  path: {tmp_path / 'a'}\n" in output
    (tmp_path / "run.yaml").write_text(f"adapter: {{}}\ndata: {{path: {pics}}}")
    told(tmp_path / "run.yaml", tmp_path / "b")
    told(tmp_path / "c", "--set", f"data.path={pics}")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")
    columns = [part for field, name in COLUMNS.items() for part in ("--set", f"data.{field}={name}")]
    output = told(rich, tmp_path / "d", *columns)
    assert "  weight_column: weight\n  repeat_column: repeats" in output
    output = told(tmp_path / "e", "--set", "data.source=shapes", "--set", "shapes.num_pictures=4")
    assert f"path: {tmp_path / 'e' / 'train'}\n  validation_path: {tmp_path / 'e' / 'held-out'}" in output
    held_out = read(tmp_path / "e" / "held-out")
    assert len(held_out) == shapes_source.NUM_VALIDATION
    result = CliRunner().invoke(app, ["data", "shard", "a", "b", "c"])
    assert (result.exit_code, "give a source and a folder" in result.output) == (2, True)
