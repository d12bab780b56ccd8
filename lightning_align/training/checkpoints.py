"""What a checkpoint holds: no frozen base model, and optimizer states that any strategy can load."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align.models.building import backbone_spec
from lightning_align.models.composed import COMPOSITION, check_record, is_composed, record_frozen, without_frozen
from lightning_align.models.weights import POLICY_PREFIX, frozen_parameters, policy_state
from lightning_align.runtime.plain import foreign, plain


def frozen_names(policy: nn.Module) -> list[str]:
    """Return the names, in the module's state dict, of the policy's parameters that do not train."""
    return [POLICY_PREFIX + name for name in frozen_parameters(policy)]


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


def drop_composed(checkpoint: dict[str, Any], policy: nn.Module, *, sharded: bool) -> None:
    """Replace the frozen models of a composed policy by their hashes and its description, in place.

    A sharded strategy restores every weight from the checkpoint, so there the frozen weights stay in it.

    Args:
        checkpoint: The checkpoint.
        policy: Any policy. Nothing is done for others than composed ones.
        sharded: Whether the weights are sharded.
    """
    if not is_composed(policy):
        return
    checkpoint |= record_frozen(policy)
    checkpoint[COMPOSITION] = backbone_spec(policy)
    if not sharded:
        state = checkpoint["state_dict"]
        kept = {POLICY_PREFIX + name for name in without_frozen(policy, _policy_part(state))}
        checkpoint["state_dict"] = {n: value for n, value in state.items() if not n.startswith(POLICY_PREFIX) or n in kept}


def restore_composed(checkpoint: dict[str, Any], policy: nn.Module, path: str | Path, *, sharded: bool) -> None:
    """Compare the frozen models of a composed policy with the hashes, and add their weights, in place.

    Args:
        checkpoint: The checkpoint, which is then loaded strictly.
        policy: Any policy. Nothing is done for others than composed ones.
        path: The path of the checkpoint, for the message.
        sharded: Whether the weights are sharded.

    Raises:
        ValueError: If a frozen model has other weights than in training.
    """
    if not is_composed(policy):
        return
    check_record(policy, checkpoint, path)
    if not sharded:
        own = policy.state_dict()
        for name in own.keys() - without_frozen(policy, own).keys():
            checkpoint["state_dict"].setdefault(POLICY_PREFIX + name, own[name])


def check_trained_count(checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer], path: str | Path) -> None:
    """Check that a checkpoint trains as many weights as a run that loads it without strictness.

    Args:
        checkpoint: The checkpoint. One without states of optimizers is not checked.
        optimizers: The optimizers of the run.
        path: The path of the checkpoint, for the message.

    Raises:
        ValueError: If the numbers differ, so that some weights would keep their initial values.
    """
    states = checkpoint.get("optimizer_states")
    if not states or not optimizers:
        return
    saved = sum(len(group["params"]) for state in states for group in state["param_groups"])
    own = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
    if saved != own:
        raise ValueError(
            f"checkpoint {path} must train {own} weights, as this run does, but trains {saved}. Give the run the layers, "
            "connections or adapters that the checkpoint was written with."
        )


def _policy_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return policy_state(state) if any(name.startswith(POLICY_PREFIX) for name in state) else {}


def storable_hyperparameters(module: L.LightningModule) -> None:
    """Replace containers of other libraries in ``hparams``, and leave out what a checkpoint cannot hold, in place.

    Args:
        module: The module, after `save_hyperparameters`.
    """
    leave_out_foreign(module.hparams, type(module).__name__)


def leave_out_foreign(arguments: MutableMapping[str, Any], owner: str) -> None:
    """Replace containers of other libraries in arguments, and leave out what a checkpoint cannot hold, in place.

    Args:
        arguments: The arguments by name.
        owner: The name of the class that takes them, for the warning.
    """
    for name, value in list(arguments.items()):
        arguments[name] = plain(value)
        if found := next(foreign(arguments[name], name), None):
            del arguments[name]
            rank_zero_warn(
                f"{owner}: the argument `{name}` is not saved in checkpoints, because {found.path} is a "
                f"{found.kind}, and a checkpoint holds tensors and primitive types only. Pass `{name}` again to "
                "`load_from_checkpoint`."
            )


def make_storable(checkpoint: dict[str, Any], owner: str) -> None:
    """Replace containers of other libraries in a checkpoint, in place, so that it opens with ``weights_only=True``.

    They come from configurations: an optimizer keeps its ``betas`` in its state, a callback its arguments.

    Args:
        checkpoint: The whole checkpoint. Its weights are not looked at.
        owner: The name of the class of the module, for the warning.
    """
    for name, value in checkpoint.items():
        if name == "state_dict":
            continue
        if name == "hyper_parameters":  # a subclass may have saved more of them than `storable_hyperparameters` has seen
            checkpoint[name] = dict(value)
            leave_out_foreign(checkpoint[name], owner)
            continue
        checkpoint[name] = plain(value)
        if found := next(foreign(checkpoint[name], name), None):
            rank_zero_warn(
                f"The checkpoint holds a {found.kind} in {found.path}, so it can be opened only with `weights_only=False`. "
                "Let the state of that part hold tensors and primitive types only."
            )


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
