"""Sharding, applied to a built model: the model files know no process groups."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model's parameters over the ranks of a mesh (FSDP2): each block by itself, then the rest.

    Args:
        model: changed in place; its ``blocks``, where it has them, are gathered one at a time.
        mesh: one-dimensional.

    Returns:
        The model.
    """
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("hidden", "packed_hidden"):
        if hasattr(model, name):
            # Only `forward` gathers the parameters by itself.
            register_fsdp_forward_method(model, name)
    return model
