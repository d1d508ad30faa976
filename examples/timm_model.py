"""A model of timm: conditioned with its optimiser in the middle of training, its average too."""

from __future__ import annotations

import copy

import timm
import torch
from timm.optim import create_optimizer_v2

import pathlift


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    average = copy.deepcopy(model)  # as an average of weights would be
    group = pathlift.rescaling_group(model, images[:1])
    report = pathlift.condition_(model, images[:1], optimizer=optimizer)
    group.rescale_(average, report.log2_scales)  # an average is rescaled like the model

    print(report)
    print(f"loss {step():.4f}")


if __name__ == "__main__":
    main()
