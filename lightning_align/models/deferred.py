"""Models that are built without their weights, so that each rank of a sharded run only ever holds its own shards.

Within `build_deferred`, large parameters are created on the meta device, and what would have been done to them (random
initialization, reading from a file) is recorded. `fill` does it after the model is sharded, for one parameter at a time, and
keeps the shard. The weights are those of an ordinary build, bit for bit: while a build is recorded, each random operation
advances the generator as it always does, and its state before the operation is kept.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

LEAST = 256
"""The number of elements from which on a tensor is deferred."""
Slices = tuple[slice, ...]
Reader = Callable[[Slices], Tensor]
"""Reads a part of a weight."""
_OVERWRITES = ("normal_", "uniform_", "zero_", "fill_", "copy_")
_EMPTY = torch.ops.aten.empty.memory_format
_RECIPE = "_deferred_recipe"


class CannotDefer(BaseException):
    """A build needs the values of weights that are not there yet. What reports the errors of a build must not catch this."""


class Recipe:
    """How the values of one deferred weight are made."""

    def __init__(self, like: Tensor) -> None:
        """Start with a weight that nothing was done to.

        Args:
            like: The weight on the meta device.
        """
        self.shape, self.dtype = like.shape, like.dtype
        self._source: Reader | None = None
        self._steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor | None]] = []

    def start_from(self, source: Reader) -> None:
        """Read the values from elsewhere, whatever was done before."""
        self._source, self._steps = source, []

    def add(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor | None) -> None:
        """Record an operation in place.

        Args:
            function: The operator.
            args: Its arguments, with the weight on the meta device, or a view of it, in its place.
            kwargs: Its other arguments.
            state: The state of the random number generator before a random operation.
        """
        whole = args[0].numel() == self.shape.numel() and args[0].is_contiguous()
        if whole and function.overloadpacket.__name__ in _OVERWRITES:
            self._source, self._steps = None, []
        self._steps.append((function, args, kwargs, state))

    @torch.no_grad()
    def read(self, where: Slices) -> Tensor:
        """Return a part of the values, on the CPU. It is one of its own only if operations were recorded."""
        if not self._steps:
            return _scratch(self.shape, self.dtype)[where] if self._source is None else self._source(where)
        values = _scratch(self.shape, self.dtype)
        if self._source is not None:
            values.copy_(self._source(tuple(slice(0, size) for size in self.shape)))
        with torch.random.fork_rng([]):
            for function, args, kwargs, state in self._steps:
                if state is not None:
                    torch.set_rng_state(state)
                function(
                    *(_on(values, value) for value in args), **{name: _on(values, value) for name, value in kwargs.items()}
                )
        return values[where]

    def whole(self) -> Tensor:
        """Return all values, on the CPU."""
        return self.read(tuple(slice(0, size) for size in self.shape))


def _scratch(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return memory for a short time, zeroed. It is mapped apart: in the heap, small objects would soon lie in its place."""
    size = max(shape.numel(), 1)
    mapped: Tensor = torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize), dtype=dtype)
    return mapped[: shape.numel()].view(shape)


def _on(values: Tensor, argument: Any) -> Any:
    """Return the view of real values that a tensor on the meta device stands for. Other arguments are returned as they are."""
    if isinstance(argument, Tensor) and argument.is_meta:
        return values.as_strided(argument.shape, argument.stride(), argument.storage_offset())
    return argument


class _Recorder(TorchDispatchMode):
    """Creates large tensors on the meta device, and records what is done to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.draws = True
        self._known: dict[int, tuple[Any, Recipe]] = {}  # the storage is kept, so that its address is not used again

    def recipe(self, tensor: Tensor) -> Recipe | None:
        """Return the recipe of a tensor that this mode created, or of a view of it."""
        if not tensor.is_meta:
            return None
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _EMPTY and torch.Size(args[0]).numel() >= LEAST and kwargs.get("device") in (None, torch.device("cpu")):
            made: Tensor = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False})
            self._known[made.untyped_storage()._cdata] = (made.untyped_storage(), Recipe(made))
            return made
        found = {id(recipe): recipe for value in _tensors((*args, *kwargs.values())) if (recipe := self.recipe(value))}
        if not found:
            return func(*args, **kwargs)
        returns = func._schema.returns
        views = bool(returns) and all(value.alias_info is not None for value in returns)
        if not views:
            raise CannotDefer(f"{func} reads weights")
        if any(value.alias_info.is_write for value in returns):
            recipe = self.recipe(args[0])
            if recipe is None or len(found) > 1 or kwargs.get("generator") is not None:
                raise CannotDefer(f"{func} combines weights")
            recipe.add(func, args, kwargs, self._draw(func, args, kwargs))
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Advance the random number generator as an operation would. Return its state before, or None if it draws nothing."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        state = torch.get_rng_state()
        if self.draws:
            drawn = args[0]
            span = sum((size - 1) * step for size, step in zip(drawn.shape, drawn.stride(), strict=True)) + 1
            func(_scratch(torch.Size((span,)), drawn.dtype).as_strided(drawn.shape, drawn.stride()), *args[1:], **kwargs)
        return state


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_active: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


def is_deferring() -> bool:
    """Return whether a build is being recorded."""
    return _active.get() is not None


@contextmanager
def without_draws() -> Iterator[None]:
    """Within a recorded build, leave the random number generator as it is: the weights will be read from a file."""
    recorder = _active.get()
    assert recorder is not None
    state, recorder.draws = torch.get_rng_state(), False
    try:
        yield
    finally:
        recorder.draws = True
        torch.set_rng_state(state)


def recipe_of(weight: Tensor) -> Recipe | None:
    """Return how the values of a weight are made, or None if it has them."""
    if not weight.is_meta:
        return None
    recorder = _active.get()
    found: Recipe | None = getattr(weight, _RECIPE, None)
    return found if found is not None or recorder is None else recorder.recipe(weight)


def build_deferred(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without its weights where that is possible, else with them.

    Args:
        build: Builds the model. It is called a second time if the build needs the values of weights.

    Returns:
        The model. `recipe_of` gives the recipes of its parameters on the meta device.
    """
    state = torch.get_rng_state()
    try:
        with _Recorder() as recorder:
            token = _active.set(recorder)
            try:
                model = build()
            finally:
                _active.reset(token)
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_meta and not hasattr(weight, _RECIPE):
                recipe = recorder.recipe(weight)
                if recipe is None or recipe.shape != weight.shape or not isinstance(weight, nn.Parameter):
                    raise CannotDefer(f"{name} is not a parameter of its own")
                setattr(weight, _RECIPE, recipe)
        return model
    except CannotDefer as reason:
        rank_zero_info(
            f"Every rank builds the whole model before it is sharded, because the build reads its weights ({reason})."
        )
    torch.set_rng_state(state)
    return build()


def defer_loading(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Make the deferred weights of a model come from a state dict, which is best mapped from a file.

    Args:
        model: The model.
        state: Tensors by the names of weights, with their shapes.

    Returns:
        The names that were taken. The others are still to be loaded.
    """
    taken = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in state and (recipe := recipe_of(weight)) is not None:
            recipe.start_from(state[name].__getitem__)
            taken.add(name)
    return taken


def is_deferred(model: nn.Module) -> bool:
    """Return whether a model has weights that are still to be made."""
    return any(recipe_of(weight) is not None for weight in model.parameters())


@contextmanager
def recipes_kept(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Give the recipes of a model to the models that are made of it within a ``with`` block, by the names of weights.

    Args:
        model: The model.

    Yields:
        An empty list, for the models: a copy, or the model itself if it is converted.
    """
    recipes = {name: recipe for name, weight in model.named_parameters(remove_duplicate=False) if (recipe := recipe_of(weight))}
    made: list[nn.Module] = []
    yield made
    for each in made:
        for name, weight in each.named_parameters(remove_duplicate=False):
            if name in recipes and weight.is_meta:
                setattr(weight, _RECIPE, recipes[name])


@torch.no_grad()
def fill(model: nn.Module, shard: Callable[[nn.Module], object], device: torch.device) -> None:
    """Shard a model and make its weights, one at a time.

    Args:
        model: The model, deferred or not. It is changed in place.
        shard: Shards the model in place.
        device: The device of the weights.
    """
    recipes = {name: recipe for name, weight in model.named_parameters(remove_duplicate=False) if (recipe := recipe_of(weight))}
    shard(model)
    if not recipes:
        return
    model._apply(lambda weight: torch.empty_like(weight, device=device) if weight.is_meta else weight)
    for name, weight in model.named_parameters():
        if name not in recipes:
            continue
        if isinstance(weight, DTensor):
            shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
            if all(shape):
                where = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                weight.to_local().copy_(recipes[name].read(where))
        else:
            weight.copy_(recipes[name].whole())
