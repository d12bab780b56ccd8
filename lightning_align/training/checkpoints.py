"""What a checkpoint holds: no frozen base model, and optimizer states that any strategy can load."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.models.weights import POLICY_PREFIX


def frozen_names(policy: nn.Module) -> list[str]:
    """Return the names, in the module's state dict, of the policy's parameters that do not train."""
    return [POLICY_PREFIX + name for name, parameter in policy.named_parameters() if not parameter.requires_grad]


def drop_frozen(checkpoint: dict[str, Any], policy: nn.Module) -> None:
    """Remove the policy's frozen parameters from a checkpoint, in place."""
    for name in frozen_names(policy):
        checkpoint["state_dict"].pop(name, None)


def restore_frozen(checkpoint: dict[str, Any], policy: nn.Module, state: dict[str, Tensor]) -> None:
    """Add the frozen parameters that a checkpoint lacks, in place, so that it can be loaded strictly.

    Args:
        checkpoint: Of adapters.
        policy: Built, with its base model.
        state: The module's own state dict.
    """
    for name in frozen_names(policy):
        checkpoint["state_dict"].setdefault(name, state[name])


def number_parameters(state: dict[str, Any], optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Number the parameters of an optimizer state by their positions in the module, in place.

    To an optimizer the numbers are names. A sharded strategy that opens the checkpoint takes them for positions.

    Args:
        state: The optimizer's state dict in the checkpoint.
        optimizer: The optimizer that it is of.
        parameters: All parameters of the module, in order.
    """
    position_of = {id(parameter): position for position, parameter in enumerate(parameters)}
    positions = [position_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {positions[number]: value for number, value in state["state"].items()}
    state["param_groups"] = [{**g, "params": [positions[number] for number in g["params"]]} for g in state["param_groups"]]
