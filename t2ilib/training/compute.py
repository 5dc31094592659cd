"""How steps are computed, section `compute`: attention kernels, compiled blocks, memory formats, switches of torch, what waits on the host.

A lever is a context manager over a `Setup`, for as long as a run trains; afterwards everything is as it was. All change speed and
memory, and results by rounding alone. Attention and compiled blocks are for steps: what is measured and drawn, in batches of other sizes,
takes torch's own attention and the blocks as they are, so that pictures and held-out losses do not depend on how steps were
computed, and nothing is compiled for them. What pictures and captions are encoded to does not either: it is kept for other runs.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2ilib.config import ComputeConfig, ConfigError, RunConfig
from t2ilib.models.load import choose_dtype
from t2ilib.training.setups import Setup, trained_precision

log = logging.getLogger(__name__)

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of the UNet's blocks that are compiled, each by itself: diffusers' own `compile_repeated_blocks` leaves the residual ones out, half
of SD1.5's work. Compiling the whole UNet gains no more and takes seven times as long."""
COMPILER = "inductor"
MOST_GRAPHS = 1024
"""Of one class of blocks: widths, sizes of pictures, and which layers have adapters. torch's own limit, 8, is under the 14 residual blocks of
SD1.5, and beyond it torch goes on without compiling."""
SMALLEST_AWAY = 2**16
"""Bytes under which an activation stays on the device: moving it costs more than it saves."""
ON_CUDA = ("tf32", "cudnn_benchmark", "offload")
"""Levers that do nothing on another device."""


@dataclass(frozen=True)
class AttentionInSteps:
    """An attention processor of diffusers: `fast` in training mode, otherwise `usual`."""

    fast: Callable[..., Tensor]
    usual: Callable[..., Tensor]

    def __call__(self, attention: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        return (self.fast if attention.training else self.usual)(attention, *inputs, **options)


@dataclass(frozen=True)
class OneKernel:
    """An attention processor whose scaled dot products one of torch's kernels computes, or none does: then it raises RuntimeError.

    diffusers' `set_attention_backend` has no effect on the processors of these UNets, without a word.
    """

    kernel: SDPBackend
    usual: Callable[..., Tensor]

    def __call__(self, attention: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        with sdpa_kernel(self.kernel):  # inside the layer, so that it holds where activations are computed again, too
            return self.usual(attention, *inputs, **options)


def xformers(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """xFormers' memory-efficient attention (arXiv 2112.05682)."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    return XFormersAttnProcessor()


ATTENTIONS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "math": lambda usual: OneKernel(SDPBackend.MATH, usual),
    "flash": lambda usual: OneKernel(SDPBackend.FLASH_ATTENTION, usual),
    "xformers": xformers,
}
"""Name -> from a layer's own attention processor that which computes its steps."""


def require_possible(run: RunConfig, accelerator: Accelerator) -> None:
    """Raises ConfigError, before anything is loaded, for an attention or a compiler that does not work here, after trying it; says which
    levers do nothing on this device."""
    if not run.training.steps:
        return
    device = accelerator.device
    idle = [name for name in chosen(run.compute) if name in ON_CUDA and device.type != "cuda"]
    if idle:
        log.info("%s: nothing on %s", ", ".join(f"compute.{name}" for name in idle), device.type)
    if run.compute.attention in ATTENTIONS:
        require_attention(run.compute.attention, device, dtype_of_steps(run, accelerator))
    if run.compute.compile:
        require_compiler(device)


def chosen(compute: ComputeConfig) -> list[str]:
    """The levers that are not at their default, in the order in which they are pulled."""
    return [name for name in LEVERS if getattr(compute, name) != ComputeConfig.model_fields[name].default]


def dtype_of_steps(run: RunConfig, accelerator: Accelerator) -> torch.dtype:
    """What attention computes in: autocast's, or without it the base's."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return half or choose_dtype(trained_precision(run).dtype, accelerator.device)


def require_attention(name: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = (64,)) -> None:
    """Raises ConfigError where the attention `name` cannot be computed, forward and backward, with heads of these sizes."""
    from diffusers.models.attention_processor import Attention
    from diffusers.utils import is_xformers_available

    if name == "xformers" and not is_xformers_available():
        raise ConfigError(
            "compute.attention xformers needs the package xformers, which is not installed: run pip install xformers (the version"
            f" for torch {torch.__version__}), or set compute.attention to sdpa, torch's own"
        )
    for size in sizes:
        with warnings.catch_warnings(record=True) as told, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            try:
                layer = Attention(size, heads=1, dim_head=size).to(device, dtype)
                layer.set_processor(ATTENTIONS[name](layer.processor))
                layer(torch.ones(1, 8, size, device=device, dtype=dtype, requires_grad=True)).sum().backward()
            except Exception as error:  # a kernel that is not there is told in many ways; why, in warnings
                why = [str(warning.message).split(" (Triggered")[0] for warning in told]
                reason = " ".join([first_line(error), *why])
                raise ConfigError(
                    f"compute.attention {name} does not work on {device.type} in {str(dtype).removeprefix('torch.')} with heads of"
                    f" {size}: {reason} Set compute.attention to sdpa, which takes the fastest kernel that does"
                    + ("; flash wants training.mixed_precision bf16 or fp16 on a GPU" if name == "flash" else "")
                ) from None


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile cannot compile even a sum: it needs a C++ compiler for a CPU, Triton for a GPU."""
    try:
        torch.compile(lambda x: x.sin() + x, backend=COMPILER)(torch.ones(8, device=device))
    except Exception as error:  # what compilers and their drivers raise has no common ancestor
        needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler (g++, or what CXX names)"
        raise ConfigError(
            f"compute.compile needs {needs} and Python's headers, and torch.compile failed here: {first_line(error)} Install them, or set"
            " compute.compile to false"
        ) from None


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' if lines else '.'}{lines[0] if lines else ''}"


@contextlib.contextmanager
def computing(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
    """The setup as section `compute` has it computed, for as long as the scope lasts.

    Raises ConfigError for an attention that has no kernel for the size of this UNet's heads.
    """
    with contextlib.ExitStack() as scope:
        for name in chosen(run.compute) if setup.modules else ():
            if name not in ON_CUDA or accelerator.device.type == "cuda":
                setup = scope.enter_context(LEVERS[name](run, setup, accelerator))
        yield setup


@contextlib.contextmanager
def attention_in_steps(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
    name, unet = run.compute.attention, setup.components.unet
    sizes = sorted({layer.inner_dim // layer.heads for layer in attention_layers(unet)})
    require_attention(name, accelerator.device, dtype_of_steps(run, accelerator), sizes)
    with attending(unet, name):
        yield setup


@contextlib.contextmanager
def attending(unet: nn.Module, name: str) -> Iterator[None]:
    """In this scope the attention layers of `unet` compute their steps by the attention `name`."""
    usual = {layer: layer.processor for layer in attention_layers(unet)}
    for layer, processor in usual.items():
        layer.set_processor(AttentionInSteps(ATTENTIONS[name](processor), processor))
    try:
        yield
    finally:
        for layer, processor in usual.items():
            layer.set_processor(processor)


def attention_layers(unet: nn.Module) -> list[nn.Module]:
    from diffusers.models.attention_processor import Attention

    return [module for module in unet.modules() if isinstance(module, Attention)]


@contextlib.contextmanager
def compiled_blocks(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
    """Each block's forward is compiled when it is first run in a step, once for each shape. In place: no name of a module or a
    parameter changes. Dropout draws what it would draw uncompiled."""
    import torch._dynamo
    import torch._inductor.config

    blocks = [module for module in setup.components.unet.modules() if type(module).__name__ in BLOCKS]
    log.info(
        "%d blocks of the UNet are compiled in the first step, and again at the first step with pictures of another size: that can"
        " take minutes",
        len(blocks),
    )
    limits = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": MOST_GRAPHS * len(blocks)}
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **limits),
        torch._inductor.config.patch(fallback_random=True),
    ):
        for block in blocks:
            block.forward = compiled_in_steps(block)
        try:
            yield setup
        finally:
            for block in blocks:
                del block.forward


def compiled_in_steps(block: nn.Module) -> Callable[..., Tensor]:
    plain = block.forward
    fast = torch.compile(plain, dynamic=False, backend=COMPILER)

    def forward(*inputs: Any, **options: Any) -> Tensor:
        return (fast if block.training else plain)(*inputs, **options)

    return forward


@contextlib.contextmanager
def channels_last(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
    """The weights of the UNet's convolutions, but for an adapter's own, which are small. What is saved lies as always."""
    weights = [p for p in setup.components.unet.parameters() if p.ndim == 4 and not (run.adapter and p.requires_grad)]

    def lay(form: torch.memory_format) -> None:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=form)

    def save(folder: Path) -> None:
        lay(torch.contiguous_format)  # safetensors takes nothing else
        try:
            setup.save(folder)
        finally:
            lay(torch.channels_last)

    lay(torch.channels_last)
    try:
        yield replace(setup, save=save)
    finally:
        lay(torch.contiguous_format)


def switch(place: Any, name: str) -> Callable[..., contextlib.AbstractContextManager[Setup]]:
    """A lever that turns on what torch has in `place`."""

    @contextlib.contextmanager
    def switched(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
        before = getattr(place, name)
        setattr(place, name, True)
        try:
            yield setup
        finally:
            setattr(place, name, before)

    return switched


@contextlib.contextmanager
def activations_on_host(run: RunConfig, setup: Setup, accelerator: Accelerator) -> Iterator[Setup]:
    """Whether the average rests there is `TrainState`'s own business."""
    if "activations" in run.compute.offload:
        setup = activations_elsewhere(setup, to_host, lambda host: host.to(accelerator.device, non_blocking=True))
    yield setup


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which the device goes on without waiting for."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def activations_elsewhere(setup: Setup, put: Callable[[Tensor], Any], fetch: Callable[[Any], Tensor]) -> Setup:
    """The setup with an objective whose forward pass gives what it keeps for the backward pass to `put`, and has it back from `fetch`.

    Weights stay where they are, which `torch.autograd.graph.save_on_cpu` would copy in every step, and so does what is small.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in setup.model.parameters()}

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        stays = tensor.untyped_storage()._cdata in weights or tensor.nbytes < SMALLEST_AWAY
        return (False, tensor) if stays else (True, put(tensor))

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        away, kept = packed
        return fetch(kept) if away else kept

    def objective(*inputs: Any) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return setup.objective(*inputs)

    return replace(setup, objective=objective)


LEVERS: dict[str, Callable[..., contextlib.AbstractContextManager[Setup]]] = {
    "attention": attention_in_steps,
    "channels_last": channels_last,
    "compile": compiled_blocks,
    "tf32": switch(torch.backends.cuda.matmul, "allow_tf32"),
    "cudnn_benchmark": switch(torch.backends.cudnn, "benchmark"),
    "offload": activations_on_host,
}
"""Field of section `compute` -> what pulls it, `(run, setup, accelerator)` -> a context that gives the setup to train with."""
