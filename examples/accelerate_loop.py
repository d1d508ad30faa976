"""Accelerate: condition what `prepare` returned; on many processes every one makes the call.

accelerate launch accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathlift


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 1)
    )
    x = torch.randn(256, 16)
    loader = DataLoader(TensorDataset(x, x[:, :1].abs()), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    example = torch.zeros(2, 16, device=accelerator.device)
    # Accelerate wraps the optimiser; its state stands in the one inside.
    report = pathlift.condition_(model, example, optimizer=optimizer.optimizer)

    loss = torch.zeros(())
    for _ in range(5):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            accelerator.backward(loss)
            optimizer.step()
    accelerator.print(report)
    accelerator.print(f"loss {float(loss.detach()):.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
