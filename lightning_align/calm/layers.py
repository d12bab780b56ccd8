"""The layers of any decoder, and taps (hooks) that read the residual stream at a layer or add to it.

A tap does nothing until its `visit` function is set. It stays registered from composition until release, not only during a
forward pass, because a model that ``torch.compile`` has compiled does not see hooks that are added or removed later.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_align.calm.streams import stream_argument, stream_of, with_stream

Position = Literal["input", "output"]
Visit = Callable[[Tensor], Tensor | None]
"""A function that gets a hidden state (B, N, D). If it returns a tensor, that tensor replaces the hidden state."""
LayerChoice = str | Sequence[Any] | Callable[[nn.Module], Sequence[Any]]
"""How to choose layers: names, a list of names or modules, or a function from the model to such a list."""


class Site(NamedTuple):
    """A point of the residual stream: the input or the output of a module."""

    module: nn.Module
    at: Position


class Layer(NamedTuple):
    """One layer of a model, given by the points of the residual stream before and after it."""

    before: Site
    after: Site
    parts: tuple[nn.Module, ...] = ()
    """The modules that compute the layer, of which none contains a site."""

    def site(self, at: Position) -> Site:
        """Return the site at the layer's input or output."""
        return self.before if at == "input" else self.after


def _whole(module: nn.Module) -> Layer:
    return Layer(Site(module, "input"), Site(module, "output"), (module,))


def find_layers(model: nn.Module, pattern: LayerChoice | None = None) -> list[Layer]:
    """Find the layers of a model, first to last.

    Without a pattern, these are the layers of x-transformers' ``AttentionLayers`` if the model has one. Otherwise they are the
    members of the outermost ``ModuleList`` with the most parameters. PaLM, the decoders of transformers and most other models
    keep their layers there.

    Args:
        model: Any module.
        pattern: The names of the layers, as in ``named_modules``, with ``*`` for one part of a name: ``transformer.h.*``. The
            empty string means the whole model as a single layer. Or a list of such names or of modules of the model, first to
            last, or a function that gets the model and returns such a list.

    Returns:
        The layers in order.

    Raises:
        ValueError: If the pattern matches no module, a module is not in the model or given twice, or the layers cannot be
            determined without a pattern.
    """
    name = type(model).__name__
    if pattern is not None and not isinstance(pattern, str):
        return [_whole(module) for module in _chosen(model, pattern)]
    if pattern is not None:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [module for path, module in model.named_modules() if expression.fullmatch(path)]
        if not found:
            parts = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, _ in model.named_modules() if path})
            raise ValueError(
                f"`layers` must match modules of the {name}, but {pattern!r} matches none. "
                f"Its modules are {', '.join(parts[:12])}."
            )
        return [_whole(module) for module in found]
    for module in model.modules():
        if isinstance(getattr(module, "layer_types", None), tuple) and isinstance(
            getattr(module, "layers", None), nn.ModuleList
        ):
            return list(_x_transformers_layers(module))
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [(path, module) for path, module in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    sizes = sorted(((sum(p.numel() for p in module.parameters()), path) for path, module in outer), reverse=True)
    if not sizes or (len(sizes) > 1 and sizes[0][0] == sizes[1][0]):
        raise ValueError(
            f"Cannot determine which modules of the {name} are its layers"
            f"{' (' + ' or '.join(path for _, path in sizes[:2]) + ')' if sizes else ''}. Name them with `layers`, such as "
            "'model.layers.*'."
        )
    blocks = dict(outer)[sizes[0][1]]
    return [_whole(block) for block in blocks]


def _chosen(model: nn.Module, choice: Sequence[Any] | Callable[[nn.Module], Sequence[Any]]) -> list[nn.Module]:
    """Return the modules of a list of names or modules, or of a function that returns one."""
    listed: Any = choice if isinstance(choice, nn.Module) or not callable(choice) else choice(model)
    found: list[nn.Module] = []
    for entry in listed:
        found += [layer.after.module for layer in find_layers(model, entry)] if isinstance(entry, str) else [entry]
    known = set(model.modules())
    wrong = next((module for module in found if module not in known or found.count(module) > 1), None)
    if wrong is not None or not found:
        fault = "none" if wrong is None else f"a {type(wrong).__name__} that is {'twice' if wrong in known else 'not in it'}"
        raise ValueError(f"`layers` must list different modules of the {type(model).__name__}, but got {fault}.")
    return found


def _x_transformers_layers(stack: Any) -> Iterator[Layer]:
    """Yield the layers of an ``AttentionLayers``. Each is a run of sublayers that ends at the last one's residual module."""
    size = 1 if getattr(stack, "has_custom_layer_types", False) else int(getattr(stack, "len_default_block", 1))
    before = Site(stack, "input")
    for stop in range(size, len(stack.layers) + 1, size):
        after = Site(stack.layers[stop - 1][2], "output")
        yield Layer(before, after, tuple(part[1] for part in stack.layers[stop - size : stop]))
        before = after


class Tap:
    """A hook at a site of the residual stream. It does nothing unless `visit` is set."""

    def __init__(self, site: Site) -> None:
        """Register the hook.

        Args:
            site: The point of the residual stream.
        """
        self.visit: Visit | None = None
        self.visits = 0
        if site.at == "output":
            self._handle = site.module.register_forward_hook(self._after)
        else:
            self._handle = site.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _call_visit(self, hidden: Tensor) -> Tensor | None:
        self.visits += 1
        assert self.visit is not None
        return self.visit(hidden)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.visit is None:
            return None
        changed = self._call_visit(stream_of(output))
        return None if changed is None else with_stream(output, changed)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.visit is None:
            return None
        if args:
            changed = self._call_visit(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = stream_argument(kwargs)
        changed = self._call_visit(kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})


@contextmanager
def visiting(visits: Mapping[Tap, Visit]) -> Iterator[None]:
    """Set the `visit` functions of taps inside a ``with`` block, and count their calls in `visits`."""
    for tap, visit in visits.items():
        tap.visit, tap.visits = visit, 0
    try:
        yield
    finally:
        for tap in visits:
            tap.visit = None
