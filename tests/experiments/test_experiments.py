"""Vectorised training equals training one by one; the demo writes a page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pathlift.experiments.architectures import autoencoder
from pathlift.experiments.demo import main
from pathlift.experiments.training import train_autoencoders


def test_vectorised_training_equals_a_plain_loop() -> None:
    data = torch.randn(50, 6, dtype=torch.float64)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(autoencoder((6, 4, 6)).double())
    seeds, rates = [0, 1, 1], [0.1, 0.2, 1e6]
    curves = train_autoencoders(models, seeds, rates, data, epochs=3, batch=10)
    assert torch.isinf(curves.loss[2, -1])  # this rate diverges, the others do not notice
    for k in (0, 1):
        generator = torch.Generator().manual_seed(seeds[k])
        optimizer = torch.optim.SGD(models[k].parameters(), lr=rates[k])
        for epoch in range(3):
            total = 0.0
            for index in torch.randperm(50, generator=generator).split(10):
                x = data[index]
                loss = (models[k](x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            assert float(curves.loss[k, epoch]) == pytest.approx(total / 5, rel=1e-10)


def test_the_demo_writes_one_page(tmp_path: Path) -> None:
    found = main(tmp_path, quick=True, progress=lambda text: None)
    text = Path(found["data"]["page"]).read_text()
    assert text.count("data:image/svg+xml;base64,") == 2
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<td>changed by") == 2 and "of the largest" in text
