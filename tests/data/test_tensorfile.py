import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t2ilib.data.store.tensorfile import (
    DTYPES,
    Batch,
    ShardError,
    StoreError,
    as_bytes,
    kind_of,
    read_rows,
    read_shard,
    write_shard,
)


def key(number):
    return number.to_bytes(16, "big")


def write(path, *batches):
    """`batches`: (first key, tensors)."""
    by_kind = {}
    for first, tensors in batches:
        count = len(next(iter(tensors.values())))
        batch = Batch.of([key(first + row) for row in range(count)], tensors)
        by_kind.setdefault(kind_of(tensors), []).append(batch)
    with path.open("wb") as stream:
        write_shard(stream, by_kind, "print")
    return path


def read(path, group, rows):
    out = {c.name: torch.empty((len(rows), *c.shape), dtype=c.dtype) for c in group.kind}
    sums = [int(group.checksums[row]) for row in rows]
    read_rows(path, group.kind, rows, sums, [as_bytes(tensor) for tensor in out.values()], range(len(rows)))
    return out


def patterns(dtype):
    """Every pattern of 16 bits, NaNs and infinities among them; wider numbers are put together of them."""
    order = np.random.default_rng(0).permutation(2**16).astype(np.uint16)
    data = torch.from_numpy(order.view(np.uint8))
    return data > 127 if dtype == torch.bool else data.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_bits_come_back_and_safetensors_reads_the_same(dtype, tmp_path):
    values = patterns(dtype).view(32, -1, 4)
    path = write(tmp_path / "x.safetensors", (0, {"values": values[:20]}), (20, {"values": values[20:]}))
    (group,), size = read_shard(path, "print")
    assert size == path.stat().st_size
    rows = [31, 0, 7, 20]
    mine, theirs = read(path, group, rows)["values"], load_file(path)["0/values"]
    assert mine.dtype == theirs.dtype == dtype
    assert mine.view(torch.uint8).equal(values[rows].view(torch.uint8))
    assert theirs.view(torch.uint8).equal(values.view(torch.uint8))


def test_several_kinds_in_one_shard(tmp_path):
    wide, tall = torch.randn(3, 4, 2, 6), torch.randn(2, 4, 6, 2)
    sizes = torch.arange(18).view(3, 6)
    path = write(
        tmp_path / "x.safetensors",
        (0, {"latents": wide, "time_ids": sizes, "odd": torch.tensor([1, 2, 3], dtype=torch.uint8)}),
        (3, {"latents": tall[:1]}),
        (4, {"latents": tall[1:]}),
    )
    groups, _ = read_shard(path, "print")
    by_count = {len(group.keys): group for group in groups}
    assert [group.keys.tobytes() for group in (by_count[3], by_count[2])] == [
        b"".join(map(key, range(3))),
        b"".join(map(key, (3, 4))),
    ]
    first = read(path, by_count[3], [2, 0])
    assert list(first) == ["latents", "odd", "time_ids"]
    assert first["latents"].equal(wide[[2, 0]])
    assert first["odd"].tolist() == [3, 1]
    assert first["time_ids"].equal(sizes[[2, 0]])
    assert read(path, by_count[2], [0, 1])["latents"].equal(tall)
    with safe_open(path, "pt") as file:
        assert {tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
            (3, 4, 2, 6), (2, 4, 6, 2), (3,), (3, 6)
        }  # fmt: skip
        assert len(file.metadata()["0/keys"]) == 3 * 32


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.ones(1, 2).expand(4, 2),
        torch.arange(16.0).view(4, 4)[:, ::2],
        torch.zeros(4, 0, 3),
        torch.arange(4.0).requires_grad_(),
    ],
    ids=["transposed", "expanded", "strided", "empty", "numbers with a gradient"],
)
def test_any_layout(tensor, tmp_path):
    path = write(tmp_path / "x.safetensors", (0, {"x": tensor}))
    (group,), _ = read_shard(path, "print")
    assert read(path, group, [3, 1])["x"].equal(tensor.detach()[[3, 1]])


def test_what_is_added_is_copied(tmp_path):
    tensor = torch.ones(2, 3)
    batch = Batch.of([key(0), key(1)], {"x": tensor})
    tensor.zero_()
    assert batch.values["x"].view("f4").tolist() == [[1, 1, 1]] * 2


def test_a_dtype_that_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"x is torch.complex64; kept are .*torch.bfloat16"):
        kind_of({"x": torch.zeros(1, dtype=torch.complex64)})


def test_every_flipped_bit_is_noticed(tmp_path):
    """One of each byte: of header, padding and data."""
    path = write(
        tmp_path / "x.safetensors",
        (0, {"a": torch.randn(2, 5), "b": torch.arange(2).byte()}),
        (2, {"c": torch.ones(1, 3)}),
    )
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"x\.safetensors .*: delete this file"):  # noqa: PT012
            for group in read_shard(path, "print")[0]:
                read(path, group, range(len(group.keys)))
    path.write_bytes(whole)
    assert sum(len(group.keys) for group in read_shard(path, "print")[0]) == 3


def test_every_truncation_is_noticed(tmp_path):
    path = write(tmp_path / "x.safetensors", (0, {"a": torch.randn(2, 5)}))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ShardError, match=r"x\.safetensors (is no safetensors|is cut off|is damaged)"):
            read_shard(path, "print")
    path.write_bytes(whole + b"\0")
    with pytest.raises(ShardError, match="is too long"):
        read_shard(path, "print")


def test_a_shard_that_is_cut_off_or_deleted_after_it_was_opened(tmp_path):
    path = write(tmp_path / "x.safetensors", (0, {"a": torch.randn(2, 5)}))
    (group,), size = read_shard(path, "print")
    path.write_bytes(path.read_bytes()[: size - 1])
    assert len(read(path, group, [0])["a"]) == 1
    with pytest.raises(ShardError, match="cut off since it was opened"):
        read(path, group, [1])
    path.unlink()
    with pytest.raises(StoreError, match=r"x\.safetensors has been deleted since"):
        read(path, group, [0])


def test_others_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"0/a": torch.zeros(2, 2)}, path, {"0/keys": "00" * 32})
    with pytest.raises(ShardError, match="none of a store"):
        read_shard(path, "print")
    path.write_text("a text file\n")
    with pytest.raises(ShardError, match="is no safetensors file"):
        read_shard(path, "print")
    write(path, (0, {"a": torch.zeros(2, 2)}))
    with pytest.raises(ShardError, match="belongs to another store"):
        read_shard(path, "other")


def test_data_begins_where_safetensors_wants_it(tmp_path):
    """Each tensor at a multiple of its items' size, without holes, whatever was added first."""
    tensors = {"a": torch.ones(3, 1).byte(), "b": torch.ones(3, 1).half(), "c": torch.ones(3, 1).double()}
    path = write(tmp_path / "x.safetensors", (0, tensors), (3, {"a": torch.ones(1, 1)}))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    del table["__metadata__"]
    assert (8 + length) % 8 == 0
    spans = sorted((entry["data_offsets"], DTYPES[entry["dtype"]].itemsize) for entry in table.values())
    assert [begin for (begin, _), _ in spans] == [0, *(end for (_, end), _ in spans[:-1])]
    assert all(begin % size == 0 for (begin, _), size in spans)
