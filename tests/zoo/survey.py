"""Every architecture of three model libraries: captured, scales found, bits kept.

    make zoo                      # what is missing in docs/zoo.json, then docs/zoo.md
    python tests/zoo/survey.py --fresh
    python tests/zoo/survey.py --only timm:resnet18 transformers:bert
    python tests/zoo/survey.py --without solve    # rows that have no such column yet

One process per model, with a time limit. Each model is built without weights, its norms get generic
statistics and affine parameters, then it is captured and its group inferred (both timed), rescaled
by random integers in [-2, 2], and every tensor it returns is compared bit for bit in evaluation
and in training mode. Then it is conditioned (not verified), and captured again: *solve* is the
solver's processor time, and *reported - measured* the imbalance that the report gives for afterwards, less
the one that is found on the conditioned model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from zoo.libraries import randomise_  # noqa: E402  (makes torchvision importable, too)
from zoo.traces import call  # noqa: E402

TABLE, DATA = ROOT / "docs" / "zoo.md", ROOT / "docs" / "zoo.json"
LIMIT = 400  # seconds per model
SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "tiny",
    "xxs",
    "_xs",
    "mini",
    "small",
    "_s",
    "18",
    "b0",
    "b1",
    "lite",
    "26",
    "050",
)

# Hugging Face architectures: configuration and model class, and what makes each small.
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MLP = {**BASE, "intermediate_size": 48}
DECODER = {**MLP, "num_key_value_heads": 2, "use_cache": False, "max_position_embeddings": 64}
VISION = {k: v for k, v in MLP.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "use_cache": False}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "use_cache": False,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", MLP),
    "roberta": ("RobertaModel", MLP),
    "xlm-roberta": ("XLMRobertaModel", MLP),
    "electra": ("ElectraModel", {**MLP, "embedding_size": 16}),
    "albert": ("AlbertModel", {**MLP, "embedding_size": 16}),
    "distilbert": ("DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64}),
    "mpnet": ("MPNetModel", MLP),
    "deberta-v2": ("DebertaV2Model", MLP),
    "funnel-free-ernie": ("ErnieModel", MLP),
    "gpt2": ("GPT2Model", GPT),
    "gpt-neo": ("GPTNeoModel", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "vocab_size": 64, "use_cache": False}),
    "gpt-neox": ("GPTNeoXModel", {**MLP, "use_cache": False}),
    "gptj": ("GPTJModel", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenModel", {**GPT, "rotary_dim": 4}),
    "bloom": ("BloomModel", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "use_cache": False}),
    "opt": ("OPTModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": 64, "use_cache": False, "max_position_embeddings": 64}),
    "llama": ("LlamaModel", DECODER),
    "mistral": ("MistralModel", DECODER),
    "mixtral": ("MixtralModel", {**DECODER, "num_local_experts": 2}),
    "qwen2": ("Qwen2Model", DECODER),
    "qwen3": ("Qwen3Model", {**DECODER, "head_dim": 8}),
    "gemma": ("GemmaModel", {**DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2Model", {**DECODER, "head_dim": 8}),
    "phi": ("PhiModel", DECODER),
    "phi3": ("Phi3Model", {**DECODER, "pad_token_id": 0}),
    "falcon": ("FalconModel", {**BASE, "use_cache": False}),
    "stablelm": ("StableLmModel", DECODER),
    "olmo": ("OlmoModel", DECODER),
    "cohere": ("CohereModel", DECODER),
    "t5": ("T5EncoderModel", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}),
    "bart": ("BartModel", SEQ2SEQ),
    "mbart": ("MBartModel", SEQ2SEQ),
    "pegasus": ("PegasusModel", SEQ2SEQ),
    "vit": ("ViTModel", VISION),
    "deit": ("DeiTModel", VISION),
    "beit": ("BeitModel", VISION),
    "dinov2": ("Dinov2Model", {k: v for k, v in VISION.items() if k != "intermediate_size"}),
    "swin": ("SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "convnext": ("ConvNextModel", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}),
    "resnet": ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}),
    "regnet": ("RegNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "groups_width": 4}),
    "segformer": ("SegformerModel", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}),
    "mobilenet-v2": ("MobileNetV2Model", {}),
    "mamba": ("MambaModel", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "use_cache": False}),
    "wav2vec2": ("Wav2Vec2Model", {**MLP, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
}  # fmt: skip


def candidates() -> list[str]:
    """Every torchvision model, one small model of every timm module, every tiny transformer."""
    from timm.models._registry import _model_to_module
    from torchvision.models import list_models

    modules: dict[str, list[str]] = {}
    for name, module in _model_to_module.items():
        modules.setdefault(module, []).append(name)

    def size(name: str) -> tuple[int, int, str]:
        ranks = [k for k, word in enumerate(SMALL) if word in name]
        return (ranks[0] if ranks else len(SMALL), len(name), name)

    return (
        [f"torchvision:{name}" for name in list_models()]
        + [f"timm:{min(names, key=size)}" for _, names in sorted(modules.items())]
        + [f"transformers:{name}" for name in TRANSFORMERS]
    )


def build(name: str) -> tuple[nn.Module, Any]:
    """The model with generic norms, and inputs it runs on in evaluation mode."""
    library, _, short = name.partition(":")
    make = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library]
    problem: Exception = ValueError("no input size fits")
    for attempt in make(short):
        try:
            torch.manual_seed(0)
            model, inputs = attempt()
            randomise_(model)
            run_model(model, inputs, False)
            return model, inputs
        except Exception as error:  # the next size may fit
            problem = error
    raise problem


Attempts = list[Callable[[], tuple[nn.Module, Any]]]


def _torchvision(name: str) -> Attempts:
    from torchvision.models import get_model

    extra: dict[str, Any] = {"weights": None}
    if "rcnn" in name or name.startswith(("fcos", "retinanet", "ssd", "deeplab", "fcn", "lraspp")):
        extra["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = False

    def at(*shape: int, **more: Any) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (get_model(name, **extra, **more), torch.randn(*shape))

    if name.startswith("vit"):
        patch = 14 if "_14" in name else 32 if "_32" in name else 16
        return [at(2, 3, 2 * patch, 2 * patch, image_size=2 * patch)]
    if name.endswith("inception_v3"):
        return [at(2, 3, 299, 299)]
    if name.startswith("raft"):
        return [lambda: (get_model(name, weights=None), (torch.randn(1, 3, 128, 128),) * 2)]
    video = ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")
    if name.startswith(video):
        return [at(2, 3, 16, 64, 64), at(1, 3, 16, 112, 112), at(1, 3, 16, 224, 224)]
    if "rcnn" in name or name.startswith(("fcos", "retinanet", "ssd")):
        return [lambda: (get_model(name, **extra), ([torch.randn(3, 64, 64)],))]
    return [at(2, 3, n, n) for n in (64, 96, 128, 224, 299)]


def _timm(name: str) -> Attempts:
    import timm

    def at(size: int, **more: Any) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (timm.create_model(name, **more), torch.randn(2, 3, size, size))

    tries = [at(n, **more) for n in (64, 96, 128) for more in ({"img_size": n}, {})]
    config = timm.get_pretrained_cfg(name)
    return [*tries, at(config.input_size[-1] if config else 224)]


def _transformers(name: str) -> Attempts:
    import transformers

    cls, small = TRANSFORMERS[name]
    model_class = getattr(transformers, cls)
    config = model_class.config_class(**small)
    config.return_dict = True

    def make() -> tuple[nn.Module, Any]:
        model = model_class(config)
        kind = model.main_input_name
        if kind == "pixel_values":
            size = getattr(config, "image_size", 64)
            return model, {kind: torch.randn(2, 3, size, size) if isinstance(size, int) else None}
        if kind == "input_values":
            return model, {kind: torch.randn(2, 400)}
        ids = torch.arange(16).reshape(2, 8) + 3
        more = (
            {"decoder_input_ids": ids} if config.is_encoder_decoder and "Encoder" not in cls else {}
        )
        return model, {"input_ids": ids, **more}

    return [make]


def run_model(model: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """Outputs and updated buffers from one fixed seed; buffers are put back."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train(training)
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            found = [t.clone() for t in call(model, inputs)]
        return found + [b.clone() for b, _ in buffers]
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        if a.is_sparse:
            a, b = a.to_dense(), b.to_dense()
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())

    return len(before) == len(after) and all(
        equal(a, b) for a, b in zip(before, after, strict=True)
    )


def survey(name: str) -> dict[str, Any]:
    """One row of the table."""
    from pathlift.capture.model import capture
    from pathlift.errors import PathliftError
    from pathlift.symmetry.group import infer_group

    row: dict[str, Any] = {"name": name}
    try:
        model, inputs = build(name)
    except Exception as error:
        return row | {"not built": first_line(error)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    before: list[Any] = []
    for mode in (False, True):
        try:
            before.append(run_model(model, inputs, mode))
        except Exception as error:
            before.append(first_line(error))
    model.train(not isinstance(before[1], str))
    try:
        start = time.perf_counter()
        program = capture(model, inputs)
        row["capture"] = time.perf_counter() - start
        start = time.perf_counter()
        group = infer_group(program)
        row["inference"] = time.perf_counter() - start
    except PathliftError as error:
        return row | {"not captured": first_line(error)}
    row |= {"scales": group.num_scales, "pinned": group.unsupported}
    group.rescale_(model, torch.randint(-2, 3, (group.num_scales,)))
    for key, mode in (("eval", False), ("train", True)):
        if isinstance(before[mode], str):
            row[key] = f"does not run: {before[mode]}"
        else:
            row[key] = (
                "identical" if same(before[mode], run_model(model, inputs, mode)) else "DIFFERENT"
            )
    return row | conditioned(model, inputs)


def conditioned(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What conditioning reports, and what a fresh capture of the result measures."""
    from pathlift import condition_
    from pathlift.errors import PathliftError

    options = {"verify": False, "on_nothing": "ignore"}
    try:
        # Seconds of this process, whatever else the machine does.
        with mock.patch("time.perf_counter", time.process_time):
            report = condition_(model, inputs, **options)
        measured = condition_(model, inputs, exact=True, **options).imbalance_before
    except PathliftError as error:
        return {"not conditioned": first_line(error)}
    return {
        "solve": report.seconds["solve"],
        "converged": report.converged,
        "imbalance": [report.imbalance_before, report.imbalance_after],
        "reported - measured": report.imbalance_after - measured,
    }


def first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


def isolated(name: str, script: Path = Path(__file__), limit: int = LIMIT) -> dict[str, Any]:
    """A row made by ``script --one name`` in a process of its own."""
    command = [sys.executable, "-W", "ignore", str(script.resolve()), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"name": name, "crashed": f"no answer within {limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"name": name, "crashed": last[:300].replace(str(ROOT), "")}


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    captured = [r for r in rows if "scales" in r]
    different = [r for r in rows if "DIFFERENT" in (r.get("eval"), r.get("train"))]
    crashed = [r for r in rows if "crashed" in r]
    faster = sum(r["inference"] < r["capture"] for r in captured)
    slowest = max(captured, key=lambda r: r["inference"])
    solved = [r for r in captured if "solve" in r]
    pins = Counter(op for r in captured for op in r["pinned"])
    lines = [
        "# Model zoos",
        "",
        "Made by `make zoo` (see tests/zoo/survey.py for what each column means): random integer",
        "scales, outputs compared bit for bit in evaluation and training mode; one thread per model.",
        "",
        f"- models: {len(rows)}; built: {sum('not built' not in r for r in rows)}; "
        f"captured: {len(captured)}",
        f"- outputs different: {len(different)}; crashed: {len(crashed)}",
        f"- inference faster than capture: {faster} of {len(captured)}; slowest inference: "
        f"{slowest['name']}, {slowest['inference']:.2f} s",
        *_solved_lines(solved),
        "- operations that pin, by number of models: "
        + ", ".join(f"{op} {n}" for op, n in pins.most_common(25)),
        "",
        "| model | parameters | scales | eval | train | pinned by | capture s | inference s | "
        "solve s | imbalance | reported - measured |",
        "|---|---:|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        reason = r.get("crashed") or r.get("not built") or r.get("not captured")
        if reason:
            kind = next(k for k in ("crashed", "not built", "not captured") if k in r)
            lines.append(f"| {r['name']} | | | {kind}: {cell(reason)} | | | | | | | |")
            continue
        pinned = ", ".join(f"{op} {n}" for op, n in list(r["pinned"].items())[:4])
        lines.append(
            f"| {r['name']} | {r['parameters']:,} | {r['scales']:,} | {cell(r['eval'])} | "
            f"{cell(r['train'])} | {pinned} | {r['capture']:.2f} | {r['inference']:.3f} | "
            f"{_solved_cells(r)} |"
        )
    return "\n".join(lines) + "\n"


def _solved_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    slowest = max(rows, key=lambda r: r["solve"])
    far = [r for r in rows if abs(r["reported - measured"]) > 1e-6]
    return [
        f"- conditioned: {len(rows)}; solver arrived: {sum(r['converged'] for r in rows)}; slowest "
        f"solve: {slowest['name']}, {slowest['solve']:.2f} s",
        f"- imbalance reported and measured differ by more than 1e-6: {len(far)}"
        + "".join(f", {r['name']} {r['reported - measured']:.1e}" for r in far),
    ]


def _solved_cells(row: dict[str, Any]) -> str:
    if "solve" not in row:
        return f"{cell(row.get('not conditioned', ''))} | | "
    before, after = row["imbalance"]
    gap = row["reported - measured"]
    return f"{row['solve']:.2f} | {before:.3f} -> {after:.3f} | {gap:.0e}"


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="survey these again")
    parser.add_argument("--without", metavar="COLUMN", help="survey rows without it again")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(survey(args.one)))
        return
    names = candidates()
    known = (
        {}
        if args.fresh or not DATA.exists()
        else {r["name"]: r for r in json.loads(DATA.read_text())}
    )
    missing = args.only or [n for n in names if n not in known]
    if args.without:
        missing = [n for n, r in known.items() if "scales" in r and args.without not in r]
    with ThreadPoolExecutor(args.jobs) as pool:
        for k, row in enumerate(pool.map(isolated, missing), 1):
            known[row["name"]] = row
            rows = [known[n] for n in dict.fromkeys([*names, *known]) if n in known]
            DATA.write_text(json.dumps(rows, indent=1) + "\n")
            state = row.get("eval") or next(v for k, v in row.items() if k != "name")
            print(f"{k}/{len(missing)} {row['name']}: {state}", flush=True)
    TABLE.write_text(table(list(known.values())))


if __name__ == "__main__":
    main()
