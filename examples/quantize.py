"""Equalise a network, then go on in the tools that quantise and export.

The equalised model is an ordinary module with batch norms folded: torchao or torch.ao quantise it,
ONNX exports it, and Brevitas and AIMET take it as input. What is not installed is skipped.
"""

import copy
import io
import warnings
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from pathlift.absorption import fold_batch_norms_
from pathlift.quantization import equalize_, quantised


def network() -> nn.Sequential:
    """A small network whose channels have very different ranges."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    with torch.no_grad():
        for _ in range(20):  # the batch norms see some data
            model(torch.randn(64, 3, 16, 16))
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(len(module.weight)).exp())
    return model.eval()


def sqnr(exact: torch.Tensor, found: torch.Tensor) -> str:
    """Signal to quantisation noise, in dB."""
    return f"{10 * torch.log10(exact.square().sum() / (exact - found).square().sum()):.1f} dB"


def torch_ao(model: nn.Module, typical: torch.Tensor) -> nn.Module:
    """Linear layers in int8, activations quantised on the way."""
    made: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return made


def torchao(model: nn.Module, typical: torch.Tensor) -> nn.Module:
    """Linear layers with int8 weights."""
    tool = import_module("torchao.quantization")
    tool.quantize_(model, tool.Int8WeightOnlyConfig())
    return model


def onnx(model: nn.Module, typical: torch.Tensor) -> nn.Module:
    """Exported, looked at and compared in ONNX's own reference runtime."""
    evaluator = import_module("onnx.reference")
    import_module("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(model, (typical,), file, dynamo=True, verbose=False)
    file.seek(0)
    run = evaluator.ReferenceEvaluator(import_module("onnx").load(file))
    (name,) = run.input_names

    class Exported(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [run.run(None, {name: part.numpy()})[0] for part in x.split(len(typical))]
            return torch.cat([torch.from_numpy(part) for part in parts])

    return Exported()


def brevitas(model: nn.Module, typical: torch.Tensor) -> nn.Module:
    """Brevitas takes it as input (here: for its own equalization, which finds little to do)."""
    tool = import_module("brevitas.graph.quantize")
    made: nn.Module = tool.preprocess_for_quantize(model, equalize_iters=20)
    return made


def aimet(model: nn.Module, typical: torch.Tensor) -> nn.Module:
    """So does AIMET."""
    import_module("aimet_torch.cross_layer_equalization").equalize_model(model, dummy_input=typical)
    return model


@torch.no_grad()
def main() -> None:
    """Every way on, with what it makes of the outputs."""
    warnings.simplefilter("ignore")
    model, typical, x = network(), torch.randn(8, 3, 16, 16), torch.randn(64, 3, 16, 16)
    exact = model(x)
    folded = copy.deepcopy(model)
    fold_batch_norms_(folded, typical)
    report = equalize_(model, typical, relu6="per-channel")
    print(report)
    print(report.table())
    print("int8 weights, folded only    ", sqnr(exact, quantised(folded)(x)))
    print("int8 weights, equalised      ", sqnr(exact, quantised(model)(x)))
    tools: list[Callable[[nn.Module, torch.Tensor], nn.Module]]
    tools = [aimet, torch_ao, torchao, brevitas, onnx]
    for tool in tools:
        try:
            made = tool(copy.deepcopy(model), typical)
        except (ImportError, RuntimeError) as error:  # not installed, or not for this machine
            print(f"{tool.__name__} skipped: {str(error).splitlines()[0]}")
            continue
        print(f"{tool.__name__:<29}", sqnr(exact, made(x)))


if __name__ == "__main__":
    main()
