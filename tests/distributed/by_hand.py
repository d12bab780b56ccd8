"""One rank of a loop of Fabric under DDP: ``python by_hand.py folder``. Each optimizer batch has a micro-batch on each rank."""

import sys
from pathlib import Path

import lightning as L
import torch

from lightning_align import DPOModule
from tests.toys import preference_batch, tiny_palm


def main(folder: Path) -> None:
    torch.manual_seed(0)
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    module = DPOModule(tiny_palm(dtype=torch.float64), beta=0.5)
    module.configure_model()
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.policy.parameters(), lr=0.5))
    for numbers in ((0, 2), (1, 3)):  # of unequal sizes
        number = numbers[fabric.global_rank]
        output = wrapped.training_step(preference_batch(2 + number, seed=number), 0)
        fabric.backward(output["loss"])
        module.average_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    if fabric.is_global_zero:
        torch.save(module.policy.state_dict(), folder / "policy.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
