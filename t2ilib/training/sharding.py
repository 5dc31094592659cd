"""A whole network that is too large for one device, spread over several processes (FSDP, arXiv 2304.11277, by torch's `fully_shard`).

With `compute.shard` each process holds a slice of every weight, of its gradient, its moments and its average. The weights of a block are
put together just before it is computed, forward and backward, and let go afterwards. For measuring, drawing and saving the main
process gets a plain copy of the whole network, and checkpoints hold whole tensors: they do not tell how many processes wrote them, and
go on in any number, sharded or not.

An adapter has nothing to gain: its base stands still, and putting it together in every step costs 3 to 6 times the time of averaging
the adapter's few gradients. Accelerate's own FSDP and DeepSpeed plugins are refused: they hold weights in ways of their own, which
checkpoints and averages here do not read, and on a CPU the first is silently left out.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2ilib.config import ConfigError, RunConfig
from t2ilib.models.components import Components

PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Of accelerate, each switched on by its launcher through ACCELERATE_USE_<name>."""


def require_no_plugin() -> None:
    """Raises ConfigError where accelerate was told to spread weights in its own ways."""
    for name in PLUGINS:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"accelerate was launched with {name}, whose weights are not where checkpoints and averages here look for them: launch"
                " with experiments/accelerate/ddp.yaml, and to spread a whole UNet over the processes set compute.shard"
            )


def require_shardable(run: RunConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError for what `compute.shard` does not go with."""
    compute = run.compute
    refused = {
        "one process: launch several (experiments/accelerate/ddp.yaml), or leave it out": accelerator.num_processes == 1,
        f"training {run.trains}: it is for whole UNets (training.trains unet), whose weights and moments are large": run.trains != "unet",
        f"optimizer.name {run.optimizer.name}, which wants whole tensors: use adamw": run.optimizer.name != "adamw",
        "fp16, whose loss scale each process would choose by its own slices: use bf16": accelerator.scaler is not None,
        "compute.compile, channels_last or offload: leave these out": compute.compile or compute.channels_last or bool(compute.offload),
    }  # fmt: skip
    for reason, applies in refused.items():
        if compute.shard and applies:
            raise ConfigError(f"compute.shard does not go with {reason}")


def shard(unet: nn.Module, accelerator: Accelerator) -> None:
    """Spreads the weights of a UNet over all processes, in place: parameters become DTensors, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    parts = [part for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) if part is not None]
    for part in parts:
        for block in (*getattr(part, "attentions", ()), *part.resnets):
            if block is not None:
                fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread, put together; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, put together one at a time, in host memory where they were spread; {} in a process that does not `keep`
    them."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full if full is tensor else full.cpu()
    return found


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds its slice, where `like`, of the same shape, is spread."""
    if not isinstance(like, torch.distributed.tensor.DTensor) or tensor.shape != like.shape:
        return tensor
    local = tensor.to(like.device)
    return torch.distributed.tensor.distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def become_whole(components: Components, model: nn.Module, main: bool) -> None:
    """Puts a plain copy of the network in the place of one that is spread, in the main process; the others take part in gathering it."""
    unet = components.unet
    weights = gathered(dict(unet.named_parameters()), keep=main)
    if main:
        with torch.device("meta"):
            plain = type(unet).from_config(unet.config)
        plain.load_state_dict({name: tensor.to(components.device) for name, tensor in weights.items()}, assign=True)
        components.unet = model.unet = plain.requires_grad_(False).eval()


@contextlib.contextmanager
def whole_network(components: Components, model: nn.Module, main: bool) -> Iterator[None]:
    """`become_whole` for as long as the scope lasts."""
    unet = components.unet
    become_whole(components, model, main)
    try:
        yield
    finally:
        components.unet = model.unet = unet
