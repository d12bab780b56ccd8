"""Where a model keeps its residual stream: the layers of any decoder, and taps that read it or add to it.

A tap is a hook that does nothing until it is told to. It stands in the model from the composition to its release, and not for
the length of a forward pass: what ``torch.compile`` has compiled does not notice hooks that come and go.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Position = Literal["input", "output"]
Visit = Callable[[Tensor], Tensor | None]
"""Sees a hidden state (B, N, D); what it returns takes its place."""

_STREAM_NAMES = ("hidden_states", "x", "hidden", "inputs_embeds")


class Site(NamedTuple):
    """A place of the residual stream: what goes into a module, or what comes out of it."""

    module: nn.Module
    at: Position


class Layer(NamedTuple):
    """One layer of a model by the residual stream before and after it."""

    before: Site
    after: Site

    def site(self, at: Position) -> Site:
        """The stream at the layer's input or output."""
        return self.before if at == "input" else self.after


def find_layers(model: nn.Module, pattern: str | None = None) -> list[Layer]:
    """The layers of a model, first to last.

    Args:
        model: any module. Without a pattern these are the layers of x-transformers' ``AttentionLayers`` where it has such, else
            the members of its largest ``ModuleList``, which is where PaLM, the decoders of transformers and most others have
            them.
        pattern: names of the layers, as in ``named_modules``, with ``*`` for one part of a name: ``transformer.h.*``. The empty
            string is the model as a whole.

    Raises:
        ValueError: if there are none, or it cannot be told which they are.
    """
    name = type(model).__name__
    if pattern is not None:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        found = [module for path, module in model.named_modules() if expression.fullmatch(path)]
        if not found:
            parts = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, _ in model.named_modules() if path})
            raise ValueError(f"layers {pattern!r} match no part of the {name}; its parts are {', '.join(parts[:12])}")
        return [Layer(Site(module, "input"), Site(module, "output")) for module in found]
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
            f"cannot tell which parts of the {name} are its layers"
            f"{' (' + ' or '.join(path for _, path in sizes[:2]) + ')' if sizes else ''}: name them with `layers`, such as "
            "'model.layers.*'"
        )
    blocks = dict(outer)[sizes[0][1]]
    return [Layer(Site(block, "input"), Site(block, "output")) for block in blocks]


def _x_transformers_layers(stack: Any) -> Iterator[Layer]:
    """There, a layer is a run of sublayers, and the stream comes out of the last one's residual module."""
    size = 1 if getattr(stack, "has_custom_layer_types", False) else int(getattr(stack, "len_default_block", 1))
    before = Site(stack, "input")
    for stop in range(size, len(stack.layers) + 1, size):
        after = Site(stack.layers[stop - 1][2], "output")
        yield Layer(before, after)
        before = after


class Tap:
    """A hook at a site; inert unless `visit` is set."""

    def __init__(self, site: Site) -> None:
        """Hook it in.

        Args:
            site: where.
        """
        self.visit: Visit | None = None
        self.visits = 0
        if site.at == "output":
            self._handle = site.module.register_forward_hook(self._after)
        else:
            self._handle = site.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook out."""
        self._handle.remove()

    def _see(self, hidden: Tensor) -> Tensor | None:
        self.visits += 1
        assert self.visit is not None
        return self.visit(hidden)

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call,untyped-decorator]  # torch types it not
    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.visit is None:
            return None
        if isinstance(output, Tensor):
            return self._see(output)
        changed = self._see(output[0])
        return None if changed is None else (changed, *output[1:])

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call,untyped-decorator]  # torch types it not
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.visit is None:
            return None
        if args:
            changed = self._see(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next(name for name in _STREAM_NAMES if name in kwargs)
        changed = self._see(kwargs[name])
        return None if changed is None else (args, {**kwargs, name: changed})


@contextmanager
def visiting(visits: dict[Tap, Visit]) -> Iterator[None]:
    """Let taps see what passes by, for the length of a block."""
    for tap, visit in visits.items():
        tap.visit, tap.visits = visit, 0
    try:
        yield
    finally:
        for tap in visits:
            tap.visit = None
