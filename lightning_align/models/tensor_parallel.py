"""Tensor parallelism: the ranks of a group hold parts of the weights of each layer and compute parts of its heads and width.

Shoeybi et al. 2019, arXiv 1909.08053, section 3. A layer reads the whole hidden states, which every rank has. Its first linear
layers give a part of their outputs (``colwise``), its last ones sum the products of all parts (``rowwise``).

Every parameter becomes a ``DTensor`` over the group: sharded where a layer is split, replicated elsewhere. So optimizers,
checkpoints and FSDP2 see one kind of parameter, and a gathered checkpoint is that of one process. The products use the local
parts, without ``DTensor`` dispatch.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_align.models.lora import Adapter
from lightning_align.models.palm import PaLM, PaLMBlock
from lightning_align.models.peft_adapters import has_peft
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.runtime.modes import evaluating

AXIS = "tensor_parallel"
"""The name that Lightning gives the dimension of the mesh."""
TOLERANCE = 1e-3
"""The largest difference of the logits of a split model, in standard deviations of the logits."""
REPLICATED = ("embedding_rowwise", "embedding_colwise", "replicate")
"""Styles of a plan that say how a weight may be stored. Here every rank has all of it."""


# -- collectives with gradients


class _Spread(torch.autograd.Function):
    """Gives the same input to all ranks; the gradient is the sum of what the parts of the ranks give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Sums the parts of the ranks; each part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Join(torch.autograd.Function):
    """Concatenates the parts of the ranks in the last dimension; each rank goes on with all of them in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(dist.get_world_size(ctx.group), dim=-1)[dist.get_rank(ctx.group)].contiguous(), None


class _Part(torch.autograd.Function):
    """Takes this rank's part of the last dimension of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Join.forward(ctx, grad, ctx.group), None


def _apply(function: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
    result: Tensor = function.apply(x, mesh.get_group())
    return result


def _own(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


# -- layers


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Any, tied: dict[Tensor, nn.Parameter]) -> None:
    """Replace a parameter. In another module that has the same one, it stays the same."""
    parameter = module.get_parameter(name)
    if parameter not in tied:
        whole = parameter.detach().to(mesh.device_type)
        tied[parameter] = nn.Parameter(distribute_tensor(whole, mesh, [placement]), requires_grad=parameter.requires_grad)
    module.register_parameter(name, tied[parameter])


def _split_linear(layer: nn.Linear, mesh: DeviceMesh, style: str) -> None:
    """Split a linear layer over its outputs (``colwise``) or its inputs (``rowwise``)."""
    columns = style.startswith("colwise")
    _distribute(layer, "weight", mesh, Shard(0 if columns else 1), {})
    if layer.bias is not None:
        _distribute(layer, "bias", mesh, Shard(0) if columns else Replicate(), {})

    def colwise(x: Tensor) -> Tensor:
        bias = None if layer.bias is None else _own(layer.bias)
        out = F.linear(_apply(_Spread, x, mesh), _own(layer.weight), bias)
        return _apply(_Join, out, mesh) if style == "colwise_gather_output" else out

    def rowwise(x: Tensor) -> Tensor:
        part = _apply(_Part, x, mesh) if style == "rowwise_split_input" else x
        out = _apply(_Sum, F.linear(part, _own(layer.weight)), mesh)
        return out if layer.bias is None else out + _own(layer.bias)

    untyped: Any = layer
    untyped.forward = colwise if columns else rowwise


def _split_fused(layer: nn.Linear, mesh: DeviceMesh, splits: Iterable[tuple[int, bool]]) -> None:
    """Split a linear layer whose outputs are several parts.

    The weight is sharded as a whole, in the order of a checkpoint. Before the product it is gathered, as FSDP2 gathers a layer,
    and a rank keeps its rows.

    Args:
        layer: The layer, without a bias.
        mesh: The group.
        splits: The width of each part, and whether it is divided over the ranks. Otherwise each rank computes all of it.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    rows, start = [], 0
    for width, divided in splits:
        own = width // size if divided else width
        begin = start + (rank * own if divided else 0)
        rows.append(slice(begin, begin + own))
        start += width
    even = next((dim for dim in (0, 1) if layer.weight.shape[dim] % size == 0), None)
    _distribute(layer, "weight", mesh, Replicate() if even is None else Shard(even), {})

    def forward(x: Tensor) -> Tensor:
        weight: Any = layer.weight
        # Each rank has the gradient of its own rows, and a part of that of rows which all have.
        whole = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return F.linear(_apply(_Spread, x, mesh), torch.cat([whole[part] for part in rows]))

    untyped: Any = layer
    untyped.forward = forward


def _replicate(
    module: nn.Module, mesh: DeviceMesh, *, within: bool = False, tied: dict[Tensor, nn.Parameter] | None = None
) -> None:
    """Replicate the parameters of a module itself, without those of its submodules, and use them as plain tensors in it.

    Args:
        module: The module.
        mesh: The group.
        within: Whether the module works on a part of the heads or width, so that gradients must be summed over the ranks.
        tied: The parameters that have been replaced in other modules, with their replacements.
    """
    names = [name for name, value in module.named_parameters(recurse=False) if not isinstance(value, DTensor)]
    if not names:
        return
    for name in names:
        _distribute(module, name, mesh, Replicate(), {} if tied is None else tied)
    stored: list[dict[str, Any]] = []

    def use(module: nn.Module, *_: Any) -> None:
        stored.append({name: module._parameters[name] for name in names})
        for name, value in stored[-1].items():
            plain = _own(value)
            plain_parameters: Any = module._parameters
            plain_parameters[name] = _apply(_Spread, plain, mesh) if within else plain

    def put_back(module: nn.Module, *_: Any) -> None:
        if stored:
            module._parameters.update(stored.pop())

    module.register_forward_pre_hook(use)
    module.register_forward_hook(put_back, always_call=True)


# -- models


def split_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split a model over the ranks of a group, in place.

    Args:
        model: A `PaLM`, or a `PretrainedLM` whose model has a tensor-parallel plan. It has the same weights on every rank.
        mesh: A one-dimensional mesh.

    Returns:
        The model.

    Raises:
        ValueError: If there is no plan for the model, it has adapters or compiled layers, a width cannot be divided by the
            number of ranks, or the split model computes something else.
    """
    _check(model)
    before = _logits(model)
    if isinstance(model, PaLM):
        for block in model.blocks:
            assert isinstance(block, PaLMBlock)
            _split_block(block, mesh)
    else:
        assert isinstance(model, PretrainedLM)
        _split_by_plan(model, mesh)
    tied: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        _replicate(module, mesh, tied=tied)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(mesh.device_type)
    if before is not None:
        _compare(model, before, _logits(model))
    return model


def _check(model: nn.Module) -> None:
    name = type(model.model if isinstance(model, PretrainedLM) else model).__name__
    if not isinstance(model, PaLM | PretrainedLM):
        raise ValueError(
            f"tensor_parallel_size must be 1 for {name}, which has no tensor-parallel plan. PaLM and models of transformers "
            "with a `base_model_tp_plan` have one. Shard the others with data_parallel_size."
        )
    if _has_adapters(model):
        raise ValueError(
            f"tensor_parallel_size must be 1 for {name} with LoRA or PEFT adapters, which have no tensor-parallel plan. Train "
            "them with data_parallel_size, which shards the base model, or train all weights."
        )
    if getattr(model, "compile_backend", None) is not None:
        raise ValueError(
            f"`compile` of {name} must not be set with a tensor_parallel_size above 1, but got {model.compile_backend!r}."
        )


def _has_adapters(model: nn.Module) -> bool:
    own = any(isinstance(module, Adapter) for module in model.modules())
    return own or (isinstance(model, PretrainedLM) and has_peft(model.model))


def _check_divides(size: int, **widths: int) -> None:
    for name, width in widths.items():
        if width % size:
            divisors = [str(number) for number in range(1, width + 1) if width % number == 0]
            raise ValueError(
                f"tensor_parallel_size must divide `{name}` of the model, which is {width}, but got {size}. Use "
                f"{', '.join(divisors[:8])}, and shard further with data_parallel_size."
            )


def _split_block(block: PaLMBlock, mesh: DeviceMesh) -> None:
    """Split the heads and the feed-forward width. The one key and value head is computed on every rank."""
    queries, keys, values, width, gate = block.splits
    size = mesh.size()
    _check_divides(size, heads=block.heads, **{"ff_mult * dim": width})
    divided = (True, False, False, True, True)
    _split_fused(block.in_proj, mesh, zip(block.splits, divided, strict=True))
    block.splits = (queries // size, keys, values, width // size, gate // size)
    block.heads //= size
    for layer in (block.attn_out, block.ff_out):
        _split_linear(layer, mesh, "rowwise")
    _replicate(block, mesh, within=True)  # the gains of queries and keys


def plan_of(model: PretrainedLM) -> dict[str, str]:
    """Return the style of each split module of a model of transformers, by name.

    Raises:
        ValueError: If the model has no plan, or one with a style that is not known here.
    """
    decoder, name = model.decoder, type(model.model).__name__
    plan = getattr(decoder.config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"tensor_parallel_size must be 1 for {name}, because transformers has no tensor-parallel plan for it. Shard it "
            "with data_parallel_size, or use a model with a `base_model_tp_plan`, such as Llama, Mistral, Qwen or Gemma."
        )
    known: dict[str, Callable[..., None]] = {
        **dict.fromkeys(("colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"), _split_linear),
        **dict.fromkeys((*REPLICATED, "replicated_with_grad_allreduce"), _replicate),
    }
    styles = {}
    for path, module in decoder.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatchcase(path, pattern)), None)
        if style is None:
            continue
        if style not in known or (known[style] is _split_linear and not isinstance(module, nn.Linear)):
            raise ValueError(
                f"tensor_parallel_size must be 1 for {name}: its plan has {path!r} as {style!r}, which is not supported. Shard "
                "it with data_parallel_size."
            )
        styles[path] = style
    return styles


def _split_by_plan(model: PretrainedLM, mesh: DeviceMesh) -> None:
    config, styles, size = model.decoder.config, plan_of(model), mesh.size()
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    _check_divides(size, **{name: value for name in names if isinstance(value := getattr(config, name, None), int)})
    for path, style in styles.items():
        module = model.decoder.get_submodule(path)
        if style == "replicated_with_grad_allreduce":
            _replicate(module, mesh, within=True)
        elif style not in REPLICATED:
            _check_divides(size, **{path: module.weight.shape[0 if style.startswith("colwise") else 1]})
            _split_linear(module, mesh, style)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor | None:
    if next(model.parameters()).is_meta:
        return None
    assert isinstance(model, PaLM | PretrainedLM)
    weight = model.token_emb.weight if isinstance(model, PaLM) else model.model.get_input_embeddings().weight
    with evaluating(model):
        logits: Tensor = model(torch.arange(min(8, weight.shape[0]), device=weight.device)[None])
    return logits.float().cpu()


def _compare(model: nn.Module, before: Tensor, after: Tensor | None) -> None:
    """Raise if a plan of transformers does not fit how the model uses its layers."""
    assert after is not None
    error = float((after - before).abs().max() / before.std().clamp(min=1e-6))
    tolerance = TOLERANCE if next(model.parameters()).dtype in (torch.float32, torch.float64) else 100 * TOLERANCE
    if not error <= tolerance:
        name = type(model.model if isinstance(model, PretrainedLM) else model).__name__
        raise ValueError(
            f"tensor_parallel_size must be 1 for {name}: its plan gives other logits (by {error:.1e} of their standard "
            "deviation). Shard it with data_parallel_size."
        )
