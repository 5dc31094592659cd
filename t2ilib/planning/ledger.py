"""Counting what a computation allocates, tensor by tensor, without allocating it.

A `Ledger` sees every operation and keeps the sizes of all storages that are alive, by weak reference. On fake tensors, which
have shapes and no data, it tells what a model that does not fit would need; on real ones it counts the same, which is how
it is tested. Fake tensors are on "cpu" whatever is planned for: a torch without CUDA cannot differentiate fake CUDA tensors.
What CUDA does otherwise is therefore put in here: autocast that computes norms in float32, blocks of 512 bytes.

Leaves out what a kernel allocates inside itself: cuDNN's and cuBLAS's workspaces, float32 accumulators of flash attention.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CUDA_BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every tensor up to (kMinBlockSize in c10/cuda/CUDACachingAllocator)."""

FLOAT32_ON_CUDA = {
    F.group_norm: "group_norm",
    F.layer_norm: "layer_norm",
    F.softmax: "softmax.int",
    F.interpolate: "upsample_nearest2d",
    torch.linalg.norm: "linalg_vector_norm",
}
"""Functions -> the operator below them that CUDA's autocast computes in float32 and the CPU's leaves alone, of those that UNets,
CLIP and adapters call ("CUDA Ops that can autocast to float32" in torch.amp's documentation)."""


class Ledger(TorchDispatchMode):
    """Bytes of live storages by category, and the categories at the moment when there were most.

    What operations make counts as `category`, "activations" unless said otherwise; what was there before is `hold`-ed.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block, self.category = block, "activations"
        self.entries: dict[int, tuple[weakref.ref, int, str]] = {}
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.total = self.most = 0

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Counts these as `category` from now on, whatever they were counted as."""
        for tensor in tensors:
            self.release([tensor])
            self.track(tensor, category)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Stops counting these: they are elsewhere."""
        for tensor in tensors:
            self.forget(tensor.untyped_storage()._cdata)

    def track(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.entries:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self.entries[key] = (weakref.ref(storage, lambda _: self.forget(key)), size, category)
        self.live[category] += size
        self.total += size
        self.note()

    def forget(self, key: int) -> None:
        if key in self.entries:
            _, size, category = self.entries.pop(key)
            self.live[category] -= size
            self.total -= size

    def note(self, transient: int = 0) -> None:
        """Is this the peak? `transient`: bytes of activations that an operation takes and gives back inside itself."""
        if self.total + transient > self.most:
            self.most, self.peak = self.total + transient, dict(self.live)
            self.peak["activations"] = self.peak.get("activations", 0) + transient

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts what happens in this scope; the peak is afterwards that of this scope alone."""
        self.most = 0
        self.note()
        with self:
            yield

    @contextlib.contextmanager
    def counting_as(self, category: str) -> Iterator[None]:
        """What this scope makes is `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked of fake tensors, twice for every operation
            return args[0].fake_device
        try:
            out = func(*args, **(kwargs or {}))
        except (
            DataDependentOutputException
        ):  # no value: as if it were one, or true. Prodigy then keeps LoRA's B, which is zero, like A
            out = 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "bitsandbytes" and "gemm_4bit" in func.__name__:
            # seen as one operation; with more than a few rows it dequantizes the whole weight, then multiplies
            self.note(transient=prod(args[2]) * args[0].element_size())
        for tensor in [out] if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(tensor, Tensor):
                self.track(tensor, self.category)
        return out


class Float32Functions(TorchFunctionMode):
    """Computes in float32 what CUDA's autocast would: the copies that this makes are a good part of the activations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(as_float32, (args, kwargs))
        return func(*args, **(kwargs or {}))


def as_float32(value):
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Autocast on the CPU as CUDA's would be; peft asks whether CUDA's is on, and does without casts of its own if so."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", torch.is_autocast_enabled("cpu"))
    try:
        with Float32Functions():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextlib.contextmanager
def autocast(dtype: torch.dtype | None, device_type: str) -> Iterator[None]:
    """What accelerate puts around a forward pass on `device_type`, for tensors that are on the CPU; None: no autocast."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype=dtype), as_on_cuda() if device_type == "cuda" else contextlib.nullcontext():
        yield


def checkpoint_options(device_type: str) -> dict[str, Any]:
    """For `torch.utils.checkpoint`: recompute under the same rules as the forward pass, long after its scope has ended."""
    if device_type != "cuda":
        return {}
    return {"context_fn": lambda: (contextlib.nullcontext(), as_on_cuda())}


def quantization_states(model: nn.Module) -> Iterator[Any]:
    """The bitsandbytes states, outer and nested, of all 4-bit weights: of linear layers, and of the codes of convolutions."""
    for module in model.modules():
        codes = module._parameters.get("codes")
        state = vars(module).get("quant_state") or getattr(codes, "quant_state", None)
        while state is not None:
            yield state
            state = state.state2


def state_tensors(model: nn.Module) -> list[Tensor]:
    """What is stored beside the 4-bit codes: block maxima, their own scales, offsets and code tables."""
    return [v for state in quantization_states(model) for v in vars(state).values() if isinstance(v, Tensor)]


def materialize(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors of `mode`, on the CPU, in place of meta ones, outside of the mode: within it this takes four times as long."""

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = new
                new.quant_state = getattr(parameter, "quant_state", None)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    for state in quantization_states(model):
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                setattr(state, name, fake(value))
