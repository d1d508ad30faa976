"""Lightning: a callback conditions before the first epoch and every five epochs after it."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pathlift.training.lightning import ConditioningCallback


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(256, 16)
    loader = DataLoader(TensorDataset(x, x[:, :1].abs()), batch_size=32, shuffle=True)
    callback = ConditioningCallback(every=5)  # example inputs come from the data
    trainer = L.Trainer(
        max_epochs=10,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), loader)
    for entry in callback.schedule.history:
        print(
            f"epoch {entry['step']}: imbalance {entry['imbalance_before']:.3f} -> "
            f"{entry['imbalance_after']:.3f}, {entry['moved']} scales moved"
        )


if __name__ == "__main__":
    main()
