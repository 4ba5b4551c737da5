"""How well the training step uses a GPU: `python experiments/benchmarks/gpu.py --out gpu.json`. Needs one CUDA GPU.

The step of raychain's own loop (bf16, fused AdamW, clipping, several captions) on random pictures that lie on the GPU:

- samples/s and MFU of each model alone and distilled from the one before it in the family, eager and compiled;
- what distillation costs beside its share of the MACs;
- peak memory and speed with cached gradients, at smaller and smaller micro batches;
- where the time goes, by torch's profiler;
- the gap between the stages of a real run (`raychain.run`, one worker with the GPU, photograph-like JPEGs).

Without a GPU it says so and ends with status 0. `--device cpu --models CoM-micro-S --batch 16` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loader import make_shards
from torch import nn
from torch.profiler import ProfilerActivity, profile

import raychain
from raychain.config.experiment import Distill
from raychain.config.loading import validate
from raychain.growth import grow
from raychain.models import build, model_config
from raychain.paradigms import make_paradigm, model_size
from raychain.paradigms.task import Task
from raychain.planning.macs import stage_macs
from raychain.training.optimizer import make_optimizer
from raychain.training.step import forward_backward

CLIP = make_paradigm(Task())
TEACHERS = {"CoM-ViT-S-16": "CoM-ViT-T-16", "CoM-ViT-B-16": "CoM-ViT-S-16", "CoM-ViT-L-16": "CoM-ViT-B-16",
            "CoM-micro-S": "CoM-micro-T", "CoM-micro-M": "CoM-micro-S"}  # fmt: skip
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}
"""Dense bf16 TFLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first that fits."""
WARM_UP = 5


class Step:
    """One training step of a model, distilled or not."""

    def __init__(self, model: str, options: argparse.Namespace, *, distilled: bool, compiled: bool) -> None:
        self.device, self.batch = torch.device(options.device), options.batch
        self.distill = Distill() if distilled else None
        network, config, self.teacher, before = build(model, seed=1), model_config(model), None, None
        if distilled:
            teacher, before = build(TEACHERS[model], seed=0), model_config(TEACHERS[model])
            grow(teacher, network, width="centred", depth="identity")
            self.teacher = CLIP.objective(teacher, before).to(self.device).eval().requires_grad_(False)
        self.student = CLIP.objective(network, config, before).to(self.device)
        betas, eps = CLIP.adam(config)
        self.optimizer = make_optimizer(self.student, weight_decay=0.1, betas=betas, eps=eps)
        size, length = (
            model_config(model)["vision_cfg"]["image_size"],
            model_config(model)["text_cfg"]["context_length"],
        )
        vocabulary = model_config(model)["text_cfg"]["vocab_size"]
        images = torch.randint(0, 256, (self.batch, size, size, 3), dtype=torch.uint8, device=self.device)
        tokens = torch.randint(1, vocabulary, (self.batch, options.captions, length), device=self.device)
        self.data = {"images": images, "tokens": tokens}
        self.run: nn.Module = torch.compile(self.student) if compiled else self.student
        if compiled and self.teacher:
            self.teacher.features = torch.compile(self.teacher.features)  # type: ignore[method-assign]

    def __call__(self) -> None:
        """Forward, backward, clipping, AdamW."""
        forward = partial(torch.autocast, self.device.type, torch.bfloat16)
        forward_backward(self.run, self.student, self.teacher, self.data, self.distill, self.batch, forward)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(step: Callable[[], None], steps: int, device: str) -> list[float]:
    """Of each step after the warm-up."""
    took = []
    for number in range(WARM_UP + steps):
        _synchronize(device)
        began = time.perf_counter()
        step()
        _synchronize(device)
        if number >= WARM_UP:
            took.append(time.perf_counter() - began)
    return took


def speed(model: str, options: argparse.Namespace, peak: float | None) -> list[dict[str, Any]]:
    """A row for each way to train it."""
    rows = []
    for compiled in (False, True) if options.compile else (False,):
        for distilled in (False, True):
            step = Step(model, options, distilled=distilled, compiled=compiled)
            took = seconds(step, options.steps, options.device)
            teacher = model_size(Task(), TEACHERS[model]) if distilled else None
            items = {"image": 1, "text": options.captions}
            macs = stage_macs(model_size(Task(), model), teacher, options.batch, items)
            median = statistics.median(took)
            rows.append({
                "model": model, "distilled": distilled, "compiled": compiled,
                "step_ms": [1000 * f(took) for f in (min, statistics.median, max)],
                "samples_per_s": options.batch / median,
                "macs_a_step": macs,
                "mfu": 2 * macs / median / (peak * 1e12) if peak else None,
            })  # fmt: skip
            _tell(rows[-1])
            del step
            _empty(options.device)
    return rows


def overheads(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Distillation's part of the time beside its part of the MACs, both in terms of the step without it."""
    found = []
    for plain in (row for row in rows if not row["distilled"]):
        same = ("model", "compiled")
        other = next(row for row in rows if row["distilled"] and all(row[k] == plain[k] for k in same))
        found.append({
            **{key: plain[key] for key in same},
            "of_time": other["step_ms"][1] / plain["step_ms"][1] - 1,
            "of_macs": other["macs_a_step"] / plain["macs_a_step"] - 1,
        })  # fmt: skip
    return found


def memory(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory and speed of the distilled step by micro batch."""
    rows = []
    for part in (1, 4, 16):
        step = Step(model, options, distilled=True, compiled=False)
        for tower in (step.student, step.teacher):
            assert tower is not None, "distilled"
            tower.micro_batch = max(1, options.batch // part)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = statistics.median(seconds(step, options.steps, options.device))
        gib = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
        rows.append({"model": model, "micro_batch": max(1, options.batch // part), "peak_gib": gib,
                     "samples_per_s": options.batch / took})  # fmt: skip
        _tell(rows[-1])
        del step
        _empty(options.device)
    return rows


def costs(model: str, options: argparse.Namespace, top: int = 15) -> list[dict[str, Any]]:
    """The kernels (without a GPU: operators) that take the most time in the distilled step."""
    step = Step(model, options, distilled=True, compiled=False)
    seconds(step, 1, options.device)
    cuda = options.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(3):
            step()
        _synchronize(options.device)
    spent = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
             for event in profiler.key_averages()}  # fmt: skip
    total = sum(spent.values())
    most = sorted(spent, key=lambda key: -spent[key])[:top]
    return [{"name": name, "share": spent[name] / total, "ms_a_step": spent[name] / 3000} for name in most]


def gap(small: str, large: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gap and data wait of the second stage of a run on the GPU."""
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name), 4, 96, seed=0)
        run = raychain.run(validate({
            "name": "gpu",
            "data": {"train": f"{name}/*.tar", "captions": {"keys": ["txt"]},
                     "image_size": model_config(large)["vision_cfg"]["image_size"]},
            "chain": [{"model": small, "epochs": f"{options.run_steps} steps"},
                      {"model": large, "epochs": f"{options.run_steps} steps"}],
            "train": {"global_batch": min(options.batch, 256), "warmup": "10 %",
                      "precision": "bf16" if options.device == "cuda" else "fp32"},
            "compute": {"workers": 1, "gpus_per_worker": int(options.device == "cuda"),
                        "cpus_per_worker": max(1, (os.cpu_count() or 2) - 2)},
            "preload": {"cache": f"{name}/cache"},
            "storage": f"{name}/runs",
        }))  # fmt: skip
    kept = ("model", "steps", "wall_s", "gap_s", "first_step_s", "data_wait_s", "samples_seen")
    return {"stages": [{key: stage[key] for key in kept} for stage in run["stages"]]}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _empty(device: str) -> None:
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def _tell(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(TEACHERS), default=["CoM-ViT-S-16", "CoM-ViT-B-16"])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--run-steps", type=int, default=60, help="of each stage of the run that shows the gap")
    parser.add_argument("--tflops", type=float, help="dense bf16 peak; absent: by the GPU's name")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA GPU here")
        return
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    peak = options.tflops or next((tflops for part, tflops in PEAKS.items() if part in name), None)
    rows = [row for model in options.models for row in speed(model, options, peak)]
    record = {
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "device": name, "peak_tflops": peak,
        "torch": torch.__version__, "batch": options.batch, "captions": options.captions,
        "speed": rows, "distillation": overheads(rows),
    }  # fmt: skip
    largest = options.models[-1]
    for part, find in (("memory", memory), ("costs", costs)):
        record[part] = find(largest, options)
        options.out.write_text(json.dumps(record, indent=1) + "\n")  # so that a run that is cut keeps what it has
    record["gap"] = gap(TEACHERS[largest], largest, options)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("| model | distilled | compiled | samples/s | MFU |\n|---|---|---|---|---|")
    for row in rows:
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "–"
        print(f"| {row['model']} | {row['distilled']} | {row['compiled']} | {row['samples_per_s']:.0f} | {mfu} |")
    for key in ("distillation", "memory", "costs", "gap"):
        print(f"{key}: {json.dumps(record[key], indent=1)}")


if __name__ == "__main__":
    main()
