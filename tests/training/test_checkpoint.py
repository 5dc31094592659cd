import errno
import json
import os
import resource

import pytest
import torch
from torch import nn

from t2ilib.config import OptimizerConfig
from t2ilib.training import checkpoint as module
from t2ilib.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from t2ilib.training.optim import OPTIMIZERS, build_optimizer, build_schedule, parameter_groups

TENSORS = {
    "weights": {"a.b": torch.arange(12.0).view(3, 4), "c": torch.tensor(3, dtype=torch.int64)},
    "other": {"a.b": torch.zeros(2).bfloat16()},
}


def save(folder, step, keep=10):
    return save_checkpoint(folder, Checkpoint(step, TENSORS, {"digest": "abc", "rate": 0.1 + 0.2}), keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, offset=-1):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


class Net(nn.Module):
    """More than 4,096 weights in one tensor, so that 8-bit moments are used there, and few in the others."""

    def __init__(self):
        super().__init__()
        self.big, self.small = nn.Linear(64, 80), nn.Linear(80, 1, bias=False)

    def forward(self, x):
        return self.small(torch.tanh(self.big(x)))


def steps(net, optimizer, schedule, numbers):
    for number in numbers:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number))
        loss = (net(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def fresh(name):
    torch.manual_seed(0)
    net = Net()
    rate = 1.0 if name == "prodigy" else 1e-2
    second = None if name == "prodigy" else 1e-3
    config = OptimizerConfig(
        name=name, learning_rate=rate, text_encoder_learning_rate=second, schedule="cosine", warmup_steps=2
    )
    groups = parameter_groups({"unet": net.big, "text_encoder": net.small}, config)
    optimizer = build_optimizer(groups, config)
    return net, optimizer, build_schedule(optimizer, config, 20)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_resumed_optimizer_is_the_one_that_was_interrupted(name, tmp_path):
    net, optimizer, schedule = fresh(name)
    steps(net, optimizer, schedule, range(5))
    tensors, packed = pack_optimizer(optimizer)
    files = {"weights": dict(net.named_parameters()), "optimizer": tensors}
    save_checkpoint(tmp_path, Checkpoint(5, files, {"optimizer": packed}), 1)
    steps(net, optimizer, schedule, range(5, 8))

    other, resumed, other_schedule = fresh(name)
    loaded = load_latest(tmp_path)
    other.load_state_dict(loaded.tensors["weights"])
    unpack_optimizer(resumed, loaded.tensors["optimizer"], loaded.meta["optimizer"])
    other_schedule.last_epoch = loaded.step  # as the loop does: the rates are part of the optimizer's state
    at_resume = [p.detach().clone() for p in other.parameters()]
    steps(other, resumed, other_schedule, range(5, 8))

    assert not any(torch.equal(a, b) for a, b in zip(at_resume, other.parameters(), strict=True))
    for (where, mine), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), where
    left, right = pack_optimizer(optimizer), pack_optimizer(resumed)
    assert left[0].keys() == right[0].keys()
    assert left[1] == right[1]
    assert all(
        torch.equal(value, right[0][key]) and value.dtype == right[0][key].dtype for key, value in left[0].items()
    )


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimizer_state_matters(name, tmp_path):
    """Without it the same three steps end elsewhere: otherwise the test above would prove nothing."""
    net, optimizer, schedule = fresh(name)
    steps(net, optimizer, schedule, range(5))
    other, forgetful, other_schedule = fresh(name)
    other.load_state_dict(net.state_dict())
    other_schedule.load_state_dict(schedule.state_dict())
    steps(net, optimizer, schedule, range(5, 8))
    steps(other, forgetful, other_schedule, range(5, 8))
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_eight_bit_moments_stay_eight_bits():
    net, optimizer, schedule = fresh("adamw8bit")
    steps(net, optimizer, schedule, range(2))
    tensors, _ = pack_optimizer(optimizer)
    moments = {tuple(tensor.shape): tensor.dtype for name, tensor in tensors.items() if name.endswith("state1")}
    assert moments == {(80, 64): torch.uint8, (80,): torch.float32, (1, 80): torch.float32}


def test_packing_copies():
    net, optimizer, schedule = fresh("adamw")
    steps(net, optimizer, schedule, range(2))
    tensors, _ = pack_optimizer(optimizer)
    before = {key: value.clone() for key, value in tensors.items()}
    steps(net, optimizer, schedule, range(2, 4))
    assert all(torch.equal(before[key], tensors[key]) for key in tensors)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 7)
    assert path == tmp_path / "new" / "checkpoints" / "step-000007"
    assert names(path.parent) == ["step-000007"]
    loaded = load_checkpoint(path)
    assert loaded.step == 7
    assert loaded.meta == {"digest": "abc", "rate": 0.1 + 0.2}
    for stem, tensors in TENSORS.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[stem][name], tensor)
            assert loaded.tensors[stem][name].dtype == tensor.dtype


def test_tensors_that_are_views_or_not_contiguous(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = save_checkpoint(
        tmp_path, Checkpoint(1, {"x": {"t": base.t(), "row": base[1], "p": nn.Parameter(base.clone())}}, {}), 1
    )
    loaded = load_checkpoint(path).tensors["x"]
    assert torch.equal(loaded["t"], base.t())
    assert torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["p"], base)


@pytest.mark.parametrize("name", ["weights.safetensors", "meta.json", "other.safetensors"])
def test_a_flipped_bit_is_noticed_and_the_older_checkpoint_taken(tmp_path, name, caplog):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert load_latest(tmp_path).step == 2
    flip(newest / name, len((newest / name).read_bytes()) // 2)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged or missing"):
        load_checkpoint(newest)
    assert load_latest(tmp_path).step == 1
    assert name in caplog.text


@pytest.mark.parametrize("harm", ["missing file", "cut file", "broken manifest"])
def test_other_damage_is_noticed(tmp_path, harm):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    if harm == "missing file":
        (newest / "weights.safetensors").unlink()
    elif harm == "cut file":
        (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:-1])
    else:
        (newest / "manifest.json").write_text('{"meta.json": "')
    with pytest.raises(CheckpointError):
        load_checkpoint(newest)
    assert load_latest(tmp_path).step == 1


def test_a_manifest_that_lists_nothing_is_damage(tmp_path):
    newest = save(tmp_path, 2)
    (newest / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError):
        load_checkpoint(newest)


def test_nothing_left_to_read_is_an_error_and_nothing_there_is_none(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    for step in (1, 2):
        flip(save(tmp_path, step) / "weights.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"every checkpoint .* is damaged \(step-000002, step-000001\): start again with --resume never",
    ):
        load_latest(tmp_path)


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 10, 100, 20000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000100", "step-020000"]
    save(tmp_path, 20001, keep=1)
    assert names(tmp_path) == ["step-020001"]
    assert load_latest(tmp_path).step == 20001


def test_pruning_past_a_million_steps(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=1)
    assert load_latest(tmp_path).step == 1_000_000


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    save_checkpoint(tmp_path, Checkpoint(3, TENSORS, {"digest": "new"}), 2)
    assert load_latest(tmp_path).meta == {"digest": "new"}


def test_leftovers_of_a_kill_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".saving-000002-99").mkdir()
    (tmp_path / ".saving-000002-99" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "step-000009").mkdir()  # a pruning that was killed half way
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert load_latest(tmp_path).step == 1
    save(tmp_path, 2)
    assert not list(tmp_path.glob(".saving-*"))


def test_a_half_pruned_folder_does_not_stay_for_ever(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "manifest.json").unlink()
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-000004"]


def test_a_full_disk_leaves_the_older_checkpoint_and_no_draft(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real, calls = module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert len(calls) == 2  # the first file had been written
    assert names(tmp_path) == ["step-000001"]
    assert load_latest(tmp_path).step == 1


def test_a_real_limit_of_the_disk(tmp_path):
    """The kernel itself refuses to write more than 64 KiB into a file."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(Exception, match="File too large") as error:
            save_checkpoint(tmp_path, Checkpoint(2, {"weights": {"a": torch.zeros(2**18)}}, {}), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_latest(tmp_path).step == 1
    assert names(tmp_path) == ["step-000001"]
    assert isinstance(error.value, OSError)


def test_an_interrupt_while_saving_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(module, "sync", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert load_latest(tmp_path).step == 1


def test_everything_is_synced_before_it_is_renamed_and_pruned_last(tmp_path, monkeypatch):
    """The order that makes a commit: files, folder, rename, parent, and only then the old ones go."""
    save(tmp_path, 1)
    events = []
    real_sync, real_rename, real_remove = module.sync, module.Path.rename, module.shutil.rmtree
    monkeypatch.setattr(module, "sync", lambda path: (events.append(("sync", path.name)), real_sync(path)))
    monkeypatch.setattr(
        module.Path, "rename", lambda self, to: (events.append(("rename", to.name)), real_rename(self, to))[1]
    )
    monkeypatch.setattr(
        module.shutil, "rmtree", lambda path, **kw: (events.append(("remove", path.name)), real_remove(path, **kw))
    )
    save(tmp_path, 2, keep=1)
    rename = events.index(("rename", "step-000002"))
    synced = {name for kind, name in events[:rename] if kind == "sync"}
    assert {
        "weights.safetensors",
        "other.safetensors",
        "meta.json",
        "manifest.json",
        f".saving-000002-{os.getpid()}",
    } == synced
    pruned = ".saving-pruned-step-000001"
    assert events[rename + 1 :] == [("sync", tmp_path.name), ("rename", pruned), ("remove", pruned)]


def test_a_checkpoint_holds_no_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((path / "manifest.json").read_text())) == {
        "meta.json",
        "other.safetensors",
        "weights.safetensors",
    }
