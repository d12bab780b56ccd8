"""Copies between the host and a device."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: object, device: torch.device) -> Tensor:
    """Make a tensor of host data on a device without making the host wait for the device.

    Args:
        values: An array, a number, or lists of numbers.
        device: The device.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else torch.tensor(values)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # from other memory the host waits until the device has read it
    return tensor.to(device, non_blocking=True)
