"""The Hugging Face Trainer: a callback conditions before training."""

from __future__ import annotations

import tempfile

import torch
import transformers
from torch import Tensor, nn

from pathlift.training.huggingface import ConditioningCallback


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    transformers.set_seed(0)
    x = torch.randn(256, 16)
    samples = [{"x": row, "labels": int(row.sum() > 0)} for row in x]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=Classifier(),
            args=transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=3,
                per_device_train_batch_size=32,
                learning_rate=0.01,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=samples,
            callbacks=[ConditioningCallback()],
        )
        trainer.train()
        for entry in trainer.state.log_history:
            if "pathlift/imbalance_after" in entry:
                before, after = (entry[f"pathlift/imbalance_{w}"] for w in ("before", "after"))
                print(f"epoch {entry['epoch']:g}: imbalance {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
