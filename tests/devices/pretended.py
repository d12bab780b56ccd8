"""A pretended GPU for machines without one: the numbers of the CPU under the rules of CUDA.

All tensors stay in host memory. The storages of those that would be on ``cuda:0`` are kept in a table. Two modes use it:

- `_Questions` answers Python: ``x.device``, ``x.to("cuda")``, ``torch.zeros(3, device="cuda")``.
- `_Operators` sees each operator, also of the backward pass. It raises `WrongDevice` where CUDA would, and counts where the
  host would wait for the device.

What it cannot show: CUDA's kernels, their rounding and their speed; and C++ code that asks for the device sees the CPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
# Operators that take tensors of both devices: copies between them, and indices that may be on the host.
EITHER = {"copy_", "_to_copy", "set_", "index", "index_put", "index_put_", "_index_put_impl_"}
# Operators that are not pointwise and still take a number as a host tensor without dimensions.
NUMBERS = {"masked_fill", "masked_fill_", "fill", "fill_", "where", "_foreach_mul_", "_foreach_add_", "_foreach_div_"}


class WrongDevice(RuntimeError):
    """What CUDA would refuse."""


class PretendedGPU:
    """The GPU within a ``with`` block. `waits` counts per line of the package where the host waited."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._table: dict[int, StorageWeakRef] = {}
        self.unfinished: dict[int, StorageWeakRef] = {}
        """The host memory of copies that may not be complete, until an event behind them has been waited for."""
        self._stack = ExitStack()
        self._counting = True

    def __enter__(self) -> "PretendedGPU":
        # Autocast of CUDA becomes that of the CPU, where the kernels are.
        cls = torch.amp.autocast_mode.autocast
        begin = cls.__init__

        def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        self._stack.enter_context(mock.patch.object(cls, "__init__", autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, name)
            on_cpu = lambda *kind, real=real: real(*("cpu" if one == "cuda" else one for one in kind))  # noqa: E731
            self._stack.enter_context(mock.patch.object(torch, name, on_cpu))
        # The generator of the GPU is that of the CPU, which is kept anyway where both are.
        self._stack.enter_context(mock.patch("torch.cuda.get_rng_state", lambda device: torch.get_rng_state()))
        self._stack.enter_context(mock.patch("torch.cuda.set_rng_state", lambda state, device: None))
        self._stack.enter_context(mock.patch("torch.cuda.Event", lambda *_, **__: _Event(self)))
        self._stack.enter_context(
            mock.patch("lightning_align.generation.looks.has_events", lambda device: device.type == "cuda")
        )
        self._stack.enter_context(_Questions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def has(self, tensor: Tensor) -> bool:
        found = self._table.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def put(self, result: Any, on_gpu: bool) -> Any:
        """Place the tensors of a result."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if on_gpu:
                    self._table[storage._cdata] = StorageWeakRef(storage)
                else:
                    self._table.pop(storage._cdata, None)
        return result

    def wait(self, reason: str) -> None:
        if self._counting:
            self.waits[f"{_line()}: {reason}"] += 1

    def check_finished(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found = self.unfinished.get(storage._cdata)
        if found is not None and not found.expired():
            raise WrongDevice(f"{_line()}: reading this copy to the host before it is complete gives anything")

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def move(self, tensor: Tensor, to_gpu: bool, non_blocking: bool) -> Tensor:
        if self.has(tensor) == to_gpu:
            return tensor
        if non_blocking and not to_gpu:
            raise WrongDevice(f"{_line()}: reading this copy to the host before it is complete gives anything")
        if not non_blocking:
            self.wait("copy to the device" if to_gpu else "copy to the host")
        with self.not_counting():
            return _Move.apply(tensor, self, to_gpu)  # type: ignore[no-any-return]


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: PretendedGPU, to_gpu: bool) -> Tensor:
        ctx.gpu, ctx.to_gpu = gpu, to_gpu
        return gpu.put(tensor.clone(), to_gpu)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.gpu.put(grad.clone(), not ctx.to_gpu), None, None


class _Event:
    """An event of CUDA, which the host may wait for."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu, self.copies = gpu, dict[int, StorageWeakRef]()

    def record(self) -> None:
        self.copies = dict(self.gpu.unfinished)

    def synchronize(self) -> None:
        self.gpu.wait("an event")
        for key in self.copies:
            self.gpu.unfinished.pop(key, None)


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [self.gpu.has(tensor) for tensor in tensors]
        for tensor in tensors if self.gpu.unfinished else ():
            self.gpu.check_finished(tensor)
        if not any(on_gpu):
            return func(*args, **kwargs)
        space, _, name = func._schema.name.partition("::")
        if space in ("mkldnn", "quantized"):
            raise WrongDevice(f"{_line()}: {func} exists on the CPU only")
        if name in EITHER:
            self._copy_or_index(name, args, kwargs)
        else:
            numbers = name in NUMBERS or torch.Tag.pointwise in func.tags
            for tensor, here in zip(tensors, on_gpu, strict=True):
                if not here and not (numbers and tensor.ndim == 0) and not (name == "cat" and tensor.shape == (0,)):
                    raise WrongDevice(f"{_line()}: {func} gets a CPU tensor of shape {tuple(tensor.shape)} beside cuda:0")
            sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) and not sized:
                self.gpu.wait(name)
        out = func(*args, **kwargs)
        return out if name == "copy_" else self.gpu.put(out, True)

    def _copy_or_index(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "copy_":
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            here, there = map(self.gpu.has, args[:2])
            if here != there and not non_blocking and (there or args[1].ndim):
                self.gpu.wait("copy to the device" if here else "copy to the host")
            if there and not here and non_blocking:
                storage = args[0].untyped_storage()
                self.gpu.unfinished[storage._cdata] = StorageWeakRef(storage)
        elif name.startswith(("index", "_index")):
            if not self.gpu.has(args[0]):
                raise WrongDevice(f"{_line()}: a CPU tensor is indexed by one on cuda:0")
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.gpu.wait("a mask as an index")
            if not all(map(self.gpu.has, indices)):
                self.gpu.wait("indices on the host")


class _Questions(TorchFunctionMode):
    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None:
            if name == "__get__":
                asked = getattr(getattr(func, "__self__", None), "__name__", "")
                if asked == "device" and self.gpu.has(tensor):
                    return GPU
                if asked in ("is_cuda", "is_cpu"):
                    return self.gpu.has(tensor) == (asked == "is_cuda")
                return func(*args, **kwargs)
            if name == "to":
                return self._to(tensor, *args[1:], **kwargs)
            if name in ("cuda", "cpu"):
                return self.gpu.move(tensor, name == "cuda", kwargs.get("non_blocking", False))
            if name in ("numpy", "__array__", "tolist", "item"):
                self.gpu.check_finished(tensor)
            if self.gpu.has(tensor):
                if name in ("numpy", "__array__"):
                    raise WrongDevice(f"{_line()}: numpy cannot read a tensor on cuda:0")
                if name == "tolist":
                    self.gpu.wait("tolist")
                    with self.gpu.not_counting():
                        return func(*args, **kwargs)
                if name == "new_tensor" and kwargs.get("device") is None:
                    self.gpu.wait("new_tensor")
                    return self.gpu.put(func(*args, **kwargs), True)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type == "meta":
            return func(*args, **kwargs)
        to_gpu = torch.device(kwargs["device"]).type == "cuda"
        if to_gpu and name in ("tensor", "as_tensor", "asarray") and not (tensor is not None and self.gpu.has(tensor)):
            self.gpu.wait(f"torch.{name} of host data")
        with self.gpu.not_counting():
            out = func(*args, **{**kwargs, "device": HOST})
        return self.gpu.put(out.clone() if out is tensor and self.gpu.has(out) != to_gpu else out, to_gpu)

    def _to(self, tensor: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **given: Any) -> Tensor:
        device, dtype = given.get("device"), given.get("dtype")
        flags = [arg for arg in args if isinstance(arg, bool)]
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = (GPU if self.gpu.has(arg) else HOST), arg.dtype
            elif isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, torch.device)):
                device = arg
        device = None if device is None else torch.device(device)
        if device is not None and device.type == "meta":
            return tensor.to(device=device, dtype=dtype)
        here = self.gpu.has(tensor)
        there = here if device is None else device.type == "cuda"
        if dtype is not None and dtype is not tensor.dtype:
            tensor = tensor.to(dtype=dtype)
        elif here == there and (copy or flags[1:2] == [True]):
            return tensor.clone()
        return self.gpu.move(tensor, there, non_blocking or flags[:1] == [True])


def _line() -> str:
    """The innermost line of the package on the stack, or else the innermost one outside of torch."""
    frame: Any = sys._getframe(2)
    other = "torch"
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/lightning_align/")
        if found:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        if other == "torch" and "/torch/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__:
            other = f"{'/'.join(frame.f_code.co_filename.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class _NoSetup(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def pretended_trainer(*, precision: Any = "32-true", **options: Any) -> L.Trainer:
    """A Trainer on the pretended GPU. Make it within the block."""
    if precision == "bf16-mixed":
        options["plugins"] = [MixedPrecision("bf16-mixed", "cuda")]
    else:
        options["precision"] = precision
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator=_NoSetup(), devices=1, strategy=SingleDeviceStrategy(device=GPU), **{**quiet, **options})
