import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import store as benchmark
import torch
from filelock import FileLock

from t2ilib.config import ConfigError
from t2ilib.data import store as module
from t2ilib.data.store import TensorStore, content_key
from t2ilib.data.store.tensorfile import ShardError, StoreError

SAME = {"vae": "madebyollin/sdxl-vae-fp16-fix", "dtype": "float16", "size": (64, 64)}


def keys(*numbers):
    return [content_key("entry", number) for number in numbers]


def values(*numbers):
    """Another value in every place of every entry."""
    return {
        "latents": torch.stack([torch.arange(24.0).view(2, 3, 4) + 100 * number for number in numbers]),
        "pooled": torch.tensor([[number, -number] for number in numbers], dtype=torch.bfloat16),
    }


def fill(folder, *batches, description=SAME):
    """A shard for each of `batches`."""
    store = TensorStore(folder, description)
    with store.writing() as writer:
        for numbers in batches:
            writer.add(keys(*numbers), values(*numbers))
            writer.commit()
    return store


def shards(folder):
    return sorted(folder.glob("[!.]*.safetensors"))


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].equal(expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


# Keys


def test_different_parts_give_different_keys():
    parts = [
        (), ("",), (b"",), ("", ""), ("ab",), ("a", "b"), (b"ab",), ("b", "a"), (1,), (1.0,), ("1",), (True,), (0,), (0.0,), (-0.0,),
        (("a", "b"),), (("a",), ("b",)), (("a",), "b"), ((("a", "b"),),), ((),), ((), ()), (12, 3), (1, 23), ("s\1\0\0",), (10**30,),
    ]  # fmt: skip
    found = {content_key(*some) for some in parts}
    assert len(found) == len(parts)
    assert {len(key) for key in found} == {16}


def test_keys_stay_what_they_are():
    """A store of yesterday is found today: this value was written down."""
    assert content_key("sdxl", b"\0\1", 7, 0.5, ("a", (1,)), True).hex() == "3df9862ac399c3ec8eccadd446cdf10c"


def test_a_key_is_not_made_of_what_may_change():
    with pytest.raises(TypeError, match="got NoneType: None"):
        content_key("a", None)
    with pytest.raises(TypeError, match="got list"):
        content_key(("a", ["b"]))


# Reading


def test_entries_come_back_in_any_order_from_several_shards(tmp_path):
    store = fill(tmp_path / "new" / "store", range(5), [7], range(10, 13))
    assert len(store) == 9
    assert len(shards(store.folder)) == 3
    assert store.bytes == sum(path.stat().st_size for path in shards(store.folder))
    for opened in (store, TensorStore(store.folder, SAME), pickle.loads(pickle.dumps(store))):
        numbers = [12, 0, 7, 4, 4, 10]
        located = opened.locate(keys(*numbers))
        assert len(located) == 6
        assert equal(located.read(range(6)), values(*numbers))
        assert equal(located.read([5, 2, 2]), values(10, 7, 7))
        assert equal(pickle.loads(pickle.dumps(located)).read([1]), values(0))


def test_what_is_read_is_aligned_and_its_readers_own(tmp_path):
    store = TensorStore(tmp_path, {})
    with store.writing() as writer:
        writer.add(
            keys(*range(9)), {"a": torch.arange(9).byte(), "b": torch.randn(9, 3).half(), "c": torch.randn(9, 5)}
        )
    located = store.locate(keys(*range(9)))
    for count in range(1, 9):
        found = located.read(range(count))
        assert [tensor.data_ptr() % 64 for tensor in found.values()] == [0, 0, 0]
        assert all(tensor.is_contiguous() for tensor in found.values())
    before = located.read([3])["c"].clone()
    located.read([3])["c"].zero_()
    assert located.read([3])["c"].equal(before)


def test_threads_read_at_once(tmp_path):
    located = fill(tmp_path, range(40), range(40, 80)).locate(keys(*range(80)))
    asked = [[(start * 7 + step) % 80 for step in range(0, 60, 5)] for start in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert all(
            equal(found, values(*rows)) for rows, found in zip(asked, pool.map(located.read, asked), strict=True)
        )


def test_entries_of_different_shape(tmp_path):
    store = TensorStore(tmp_path, {})
    with store.writing() as writer:
        for number, shape in enumerate([(4, 2, 6), (4, 6, 2), (4, 2, 6)]):
            writer.add(keys(number), {"latents": torch.full((1, *shape), float(number))})
    assert len(shards(tmp_path)) == 1
    located = store.locate(keys(0, 1, 2))
    assert located.read([2, 0])["latents"][:, 0, 0, 0].tolist() == [2, 0]
    assert located.read([1])["latents"].shape == (1, 4, 6, 2)
    with pytest.raises(ValueError, match=r"latents \(4, 2, 6\) float32 and latents \(4, 6, 2\) float32"):
        located.read([0, 1])


def test_rows_that_are_not_there(tmp_path):
    located = fill(tmp_path, range(3)).locate(keys(0, 1))
    for rows in ([2], [-1], [0, 5]):
        with pytest.raises(IndexError, match="rows are 0 to 1"):
            located.read(rows)
    with pytest.raises(ValueError, match="no rows"):
        located.read([])


def test_missing_entries_are_named(tmp_path):
    store = fill(tmp_path, range(3))
    with pytest.raises(KeyError) as error:
        store.locate(keys(0, 50, 1, 51, 52, 53))
    first = ", ".join(key.hex() for key in keys(50, 51, 52))
    assert str(error.value) == f"4 of 6 entries are not in {tmp_path}: {first}, ..."
    assert isinstance(error.value, StoreError)
    assert store.missing(keys(50, 0, 51, 50)) == [0, 2]  # each once
    with pytest.raises(ValueError, match="16 bytes"):
        store.missing([b"short"])
    empty = TensorStore(tmp_path / "absent", {})
    assert (len(empty), empty.bytes, empty.missing(keys(1)), len(empty.locate([]))) == (0, 0, [0], 0)
    assert not empty.folder.exists()


def test_what_others_write_and_delete_is_noticed(tmp_path):
    mine = fill(tmp_path, range(3))
    fill(tmp_path, [5])
    assert len(mine) == 3
    assert equal(mine.locate(keys(5, 0)).read([0, 1]), values(5, 0))
    fill(tmp_path, [6])
    assert mine.missing(keys(6, 7)) == [1]
    (tmp_path / f"._{shards(tmp_path)[0].name}").write_bytes(b"what macOS leaves on foreign disks")
    shards(tmp_path)[0].unlink()
    assert mine.missing(keys(0, 5)) == [0]
    assert equal(mine.locate(keys(6, 5)).read([0, 1]), values(6, 5))


def test_of_a_key_that_is_twice_there_all_take_the_older(tmp_path):
    store = TensorStore(tmp_path, {})
    with store.writing() as writer:
        for value in (1.0, 2.0):
            writer.add(keys(0), {"x": torch.tensor([value])})
            writer.commit()
    assert len(store) == 1
    for opened in (store, TensorStore(tmp_path, {})):
        assert opened.locate(keys(0)).read([0])["x"].item() == 1


# Damage


def test_a_damaged_entry_names_its_shard_and_others_are_read(tmp_path):
    store = fill(tmp_path, range(3), range(3, 6))
    path = shards(tmp_path)[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 4  # the last value of `pooled` of the last entry
    path.write_bytes(data)
    located = TensorStore(tmp_path, SAME).locate(keys(*range(6)))
    assert equal(located.read(range(5)), values(*range(5)))
    with pytest.raises(ShardError, match=rf"{path} is damaged .*delete this file, and what it held is encoded again"):
        located.read([0, 5])
    path.unlink()
    with pytest.raises(StoreError, match=f"{path} has been deleted"):
        located.read([3])
    assert store.missing(keys(*range(6))) == [3, 4, 5]  # as was promised


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    fill(tmp_path, range(3), range(3, 6))
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=f"{path} is cut off"):
        TensorStore(tmp_path, SAME)


def test_an_error_of_a_worker_keeps_its_kind():
    error = ShardError.of("x.safetensors", "is damaged")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ShardError
    assert str(again) == str(error)
    assert str(type(error)("Caught in worker 0. " + str(error))).startswith("Caught in worker 0. x.safetensors is")


# Whose it is


def test_another_description_or_format_is_refused(tmp_path):
    fill(tmp_path, [0])
    with pytest.raises(StoreError) as error:
        TensorStore(tmp_path, {"vae": SAME["vae"], "dtype": "float32", "flip": True, "size": [64, 64]})
    assert str(error.value).startswith(
        f'{tmp_path} was made with something else (dtype is "float16" there and "float32" here; flip is nothing there and true here)'
    )
    assert "delete this one" in str(error.value)
    path = tmp_path / "store.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"format": 2}))
    with pytest.raises(StoreError, match="has format 2, and this version reads 1"):
        TensorStore(tmp_path, SAME)
    path.write_text('{"format": 1')
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        TensorStore(tmp_path, SAME)
    path.unlink()
    with pytest.raises(StoreError, match=r"has shards and no store\.json"):
        TensorStore(tmp_path, SAME)
    path.write_text(json.dumps(known | {"description": {}}))
    with pytest.raises(ShardError, match="belongs to another store"):
        TensorStore(tmp_path, {})


def test_two_that_disagree_and_start_together(tmp_path):
    first, second = TensorStore(tmp_path, {"a": 1}), TensorStore(tmp_path, {"a": 2})
    with first.writing():
        pass
    entered = []
    with pytest.raises(StoreError, match="a is 1 there and 2 here"), second.writing():
        entered.append("it is told before anything is encoded")
    assert not entered


# Writing


def test_shards_are_committed_by_size_number_and_time(tmp_path, monkeypatch):
    store = TensorStore(tmp_path, {})
    with store.writing() as writer:
        monkeypatch.setattr(module, "SHARD_BYTES", 1000)
        writer.add(keys(*range(25)), {"x": torch.zeros(25, 25)})  # 100 bytes each
        assert len(shards(tmp_path)) == 2
        writer.add(keys(*range(25, 30)), {"x": torch.zeros(5, 25)})
        assert len(shards(tmp_path)) == 3
        monkeypatch.setattr(module, "SHARD_ENTRIES", 4)
        writer.add(keys(*range(30, 39)), {"x": torch.zeros(9, 1)})
        assert len(shards(tmp_path)) == 5
        monkeypatch.setattr(module, "SECONDS_BETWEEN_COMMITS", 0.0)
        writer.add(keys(39), {"x": torch.zeros(1, 1)})
        assert len(shards(tmp_path)) == 6
        writer.commit()  # nothing to do
        assert len(shards(tmp_path)) == 6
    assert len(store) == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError("x")])
def test_what_was_added_is_kept_when_something_stops_the_scope(error, tmp_path):
    store = TensorStore(tmp_path, {})
    with pytest.raises((KeyboardInterrupt, ConfigError)), store.writing() as writer:  # noqa: PT012
        writer.add(keys(1), values(1))
        raise error
    assert equal(TensorStore(tmp_path, {}).locate(keys(1)).read([0]), values(1))
    with store.writing():  # the lock is free again
        pass


def test_an_interrupt_while_a_shard_is_written(tmp_path, monkeypatch):
    """Ctrl-C in the middle of it: the file is removed, and the scope's end writes it again."""
    store, sync, interrupts = fill(tmp_path, [0]), os.fsync, [1]

    def interrupted(descriptor):
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt), store.writing() as writer:  # noqa: PT012
        writer.add(keys(1), values(1))
        writer.commit()
    assert len(shards(tmp_path)) == 2
    assert list(tmp_path.glob(".writing-*")) == []
    assert equal(store.locate(keys(0, 1)).read([0, 1]), values(0, 1))


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    store = fill(tmp_path, [0])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"), store.writing() as writer:  # noqa: PT012
        patch.setattr(module, "write_shard", full)
        writer.add(keys(1), values(1))
    assert list(tmp_path.glob(".writing-*")) == []
    assert equal(store.locate(keys(0)).read([0]), values(0))


def test_what_cannot_be_added(tmp_path):
    with TensorStore(tmp_path, {}).writing() as writer:
        with pytest.raises(
            ValueError, match=r"2 keys need tensors whose first dimension is that, got \{'x': \(3, 1\)\}"
        ):
            writer.add(keys(0, 1), {"x": torch.zeros(3, 1)})
        with pytest.raises(ValueError, match="2 keys need tensors"):
            writer.add(keys(0, 1), {})
        with pytest.raises(ValueError, match="complex"):
            writer.add(keys(0), {"x": torch.zeros(1, dtype=torch.complex64)})
    assert shards(tmp_path) == []


def test_disk_is_asked_for_before_anything_is_encoded(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**15, 0, 100 * 2**30))
    with TensorStore(tmp_path, {}).writing() as writer:
        writer.require(118_000, 32 * 2**10)
        with pytest.raises(ConfigError) as error:
            writer.require(590_000, 77 * 768 * 4)
    told = str(error.value)
    assert f"590,000 encoded entries need 133,118 MiB under {tmp_path}, and 102,400 MiB are free" in told
    assert "data.cache to latents" in told
    assert "to off" in told


def test_halves_of_dead_processes_are_removed_and_no_others(tmp_path):
    store = fill(tmp_path, [0])
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    here = module.platform.node()
    dead, living = f".writing-{done.pid}-00-{here}", f".writing-{os.getppid()}-00-{here}"
    elsewhere, abandoned = f".writing-{done.pid}-00-some-where", f".writing-{done.pid}-01-some-where"
    for name in (dead, living, elsewhere, abandoned):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / abandoned, (0, 0))
    with store.writing():
        pass
    assert {path.name for path in tmp_path.glob(".writing-*")} == {living, elsewhere}
    assert len(store) == 1


def test_a_file_system_without_locks_is_told_of_and_written_to(tmp_path, monkeypatch, caplog):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with caplog.at_level(logging.WARNING):
        assert len(fill(tmp_path, [0])) == 1
    assert "there are no locks on this file system" in caplog.text


# Processes. They are forked from one that has loaded torch, which a test's own would do slowly, many times.

PROCESSES = """
import json, logging, multiprocessing, os, random, sys, time
from contextlib import nullcontext
from pathlib import Path

import torch
from t2ilib.data import store as module
from t2ilib.data.store import TensorStore, content_key

folder = Path(sys.argv[1])
module.SHARD_BYTES = 8 * 4096
fork = multiprocessing.get_context("fork")
keys = [content_key(number) for number in range(1600)]


def values(numbers):
    return {"latents": torch.tensor(numbers).view(-1, 1, 1).expand(-1, 32, 32).float()}


def write(where, count, tell=lambda name: None, seconds=0.0, barrier=None, lock=True, log=None):
    if log:
        logging.basicConfig(filename=log, level=logging.INFO)
    if not lock:
        module.locked = lambda folder: nullcontext()
    sync, commit_file = os.fsync, module.commit_file
    os.fsync = lambda descriptor: (time.sleep(seconds), sync(descriptor))  # so that kills find files half done

    def commit(path, write):
        commit_file(path, write)
        tell(path.name)

    module.commit_file = commit
    store = TensorStore(where, {})
    with store.writing() as writer:
        missing = store.missing(keys[:count])
        tell("begun")
        if barrier:
            barrier.wait()
        for number in missing:
            writer.add([keys[number]], values([number]))


def check(where, count):
    store = TensorStore(where, {})
    missing = set(store.missing(keys[:count]))
    there = [number for number in range(count) if number not in missing]
    located = store.locate([keys[number] for number in there])
    for start in range(0, len(there), 100):
        rows = range(start, min(start + 100, len(there)))
        assert located.read(rows)["latents"].equal(values([there[row] for row in rows])["latents"])
    return len(there)


def written(where):
    "Entries in all shards, those twice there counted twice."
    total = 0
    for path in where.glob("*.safetensors"):
        data = path.read_bytes()
        total += json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["0/latents"]["shape"][0]
    return total


def kills():
    where, draw = folder / "kills", random.Random(0)
    reader, writer = fork.Pipe(duplex=False)
    committed, halves, counts = set(), 0, [0]
    for _ in range(25):
        process = fork.Process(target=write, args=(where, len(keys), writer.send, 0.002))
        process.start()
        while reader.recv() != "begun":  # store.json, the first time
            pass
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        while reader.poll():
            committed.add(reader.recv())
        halves += len(list(where.glob(".writing-*")))
        assert committed <= {path.name for path in where.iterdir()}
        counts.append(check(where, len(keys)))
    assert counts == sorted(counts)
    before = counts[-1]
    write(where, len(keys))
    assert check(where, len(keys)) == written(where) == len(keys)
    return {"before": before, "halves": halves, "left": len(list(where.glob(".writing-*")))}


def together(number, lock):
    where = folder / f"together-{number}-{lock}"
    barrier = None if lock else fork.Barrier(number)
    some = [fork.Process(target=write, args=(where, 200), kwargs={"lock": lock, "barrier": barrier, "seconds": 0.001}) for _ in range(number)]
    [process.start() for process in some]
    [process.join() for process in some]
    assert [process.exitcode for process in some] == [0] * number
    assert check(where, 200) == 200
    return written(where)


def hold(where, ready):
    with TensorStore(where, {}).writing() as writer:
        writer.add(keys[:1], values([0]))
        writer.commit()
        ready.set()
        time.sleep(60)


def wait():
    where, log, ready = folder / "wait", folder / "wait.log", fork.Event()
    holder = fork.Process(target=hold, args=(where, ready), daemon=True)
    holder.start()
    ready.wait()
    second = fork.Process(target=write, args=(where, 5), kwargs={"log": log})
    second.start()
    while second.is_alive() and not (log.exists() and "waiting" in log.read_text()):
        time.sleep(0.01)
    time.sleep(0.1)
    assert second.is_alive()
    holder.kill()
    second.join(10)
    assert second.exitcode == 0
    assert check(where, 5) == written(where) == 5
    lines = [line for line in log.read_text().splitlines() if "waiting" in line]
    return {"lines": len(lines), "named": f"waiting for process {holder.pid} on " in lines[0]}


print(json.dumps({
    "kills": kills(),
    "with the lock": [together(2, True), together(3, True)],
    "without": [together(2, False), together(3, False)],
    "wait": wait(),
}))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if sys.platform == "win32":
        pytest.skip("there is no fork")
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(tmp_path_factory.mktemp("processes"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kills_lose_nothing_that_was_committed(processes):
    found = processes["kills"]
    assert 0 < found["before"] < 1600  # they came while it was being written
    assert found["halves"] > 0  # and in the middle of a file
    assert found["left"] == 0


def test_processes_that_write_together(processes):
    assert processes["with the lock"] == [200, 200]  # nothing made twice
    assert processes["without"] == [400, 600]  # everything, which is harmless


def test_one_waits_for_the_other_says_so_and_goes_on_when_it_is_killed(processes):
    assert processes["wait"] == {"lines": 1, "named": True}


MEMORY = """
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from t2ilib.data import store as module
from t2ilib.data.store import TensorStore, content_key


def resident():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024


folder = Path(sys.argv[1])
module.SHARD_BYTES = 16 * 2**20
keys = [content_key(number) for number in range(3200)]
store = TensorStore(folder, {})
with store.writing() as writer:
    for number in range(0, 3200, 16):
        writer.add(keys[number : number + 16], {"latents": torch.full((16, 4, 64, 64), float(number))})
located = TensorStore(folder, {}).locate(keys)
before = peak = resident()
for number in range(0, 3200, 16):
    found = located.read(range(number, number + 16))
    peak = max(peak, resident())
    assert (found["latents"] == number).all()
read = peak - before
mapped, kept = resident(), []
for path in folder.glob("*.safetensors"):
    kept.append(safe_open(path, "pt"))
    kept[-1].get_tensor("0/latents").sum()
print(read, resident() - mapped)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from /proc")
def test_memory_does_not_grow_with_what_is_read(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, mapped = map(float, done.stdout.split())
    assert read < 30  # of 200 MiB
    assert mapped > 100  # as it would by mapping: the measure sees it


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "AT_ONCE", 8)
    monkeypatch.setattr(benchmark, "forget", lambda folder: None)
    benchmark.compare(tmp_path, "small", 16, {"latents": (4, 2, 2), "pooled": (3,)})
    lines = capsys.readouterr().out.splitlines()
    assert [line[:46].split() for line in lines[:2]] == [["small", "written"], ["read"]]
    assert lines[-1].endswith("bytes an entry on disk")
