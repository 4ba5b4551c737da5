"""Chains of language models: run, measured, grown, searched, stopped, killed, with fewer and more workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml

import raychain
from raychain.config.loading import opened, validate
from raychain.dataprep.tokenize import Options, tokenize
from raychain.events import Event, Step
from raychain.runs.origins import named, publish
from raychain.runs.resolve import make_task
from raychain.training.stage import ChainWorker

SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
LARGE = SMALL | {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 8,
                 "num_key_value_heads": 4}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of counting texts, and two tiny models."""
    folder = tmp_path_factory.mktemp("lm")
    texts = [" ".join(str(7 * i + j) for j in range(40)) + ".\n" for i in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = tokenize([str(folder / "text.jsonl")], folder / "tokens", Options(vocabulary=300, held_out=0.1))
    assert made["train"]["documents"] + made["held_out"]["documents"] == 400
    (folder / "models").mkdir()
    for name, config in (("tiny-S", SMALL), ("tiny-M", LARGE)):
        (folder / "models" / f"{name}.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tree(data: Path, tmp_path: Path) -> dict[str, Any]:
    tokens = data / "tokens"
    return {
        "name": "words",
        "task": {"paradigm": "lm", "tokenizer": str(tokens), "length": 32},
        "data": {"train": str(tokens / "train-*.bin")},
        "models": str(data / "models"),
        "chain": [{"model": "tiny-S", "epochs": "24 steps"}, {"model": "tiny-M", "epochs": f"{16 * 12 * 32} tokens"}],
        "train": {"global_batch": 12, "warmup": "25 %", "precision": "fp32", "log_every": 4, "lr": 5.0e-3},
        "transfer": {"distill": {"until": "50 %"}},
        "compute": {"workers": 1, "cpus_per_worker": 1},
        "preload": {"cache": str(tmp_path / "cache")},
        "evaluate": {"counting": {"type": "perplexity", "data": str(tokens / "held_out.bin")}},
        "storage": str(tmp_path / "runs"),
    }


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_chain_of_language_models_from_plan_to_report(ray_session: None, tree: dict[str, Any], tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    plan = raychain.plan(validate(tree))
    assert (plan["sample_tokens"], plan["principal"], plan["warnings"]) == (32, "decoder", [])
    run = raychain.run(validate(tree))
    out = tmp_path / "runs" / "words"
    second = run["stages"][1]
    assert [(s["status"], s["steps"]) for s in run["stages"]] == [("trained", 24), ("trained", 16)]
    assert [s["macs"] for s in run["stages"]] == [s["macs"] for s in plan["stages"]]
    assert second["gap_s"] < 2, "seconds; the suite runs other tests beside"
    losses = [s["metrics"]["counting/loss"] for s in run["stages"]]
    assert losses[1] < losses[0] < 5.7
    follows = {x["step"]: x["alpha"] for x in lines(out) if x["stage"] == 1}
    assert follows == pytest.approx({4: 1.25, 8: 0.25, 12: 0, 16: 0})  # 2 at first, 0 from the middle on
    assert lines(out)[-1]["tokens_per_s"] == pytest.approx(32 * lines(out)[-1]["samples_per_s"])
    said = capsys.readouterr()
    assert "tokens/s" in said.err + said.out
    assert "images" not in said.err + said.out
    page = (out / "report.html").read_text()
    assert "tokens/s" in page
    assert "images/s" not in page
    assert "parameters without tables of tokens" in page
    # the same again, measured by the command, and as transformers loads it
    assert [s["status"] for s in raychain.run(validate(tree))["stages"]] == ["reused", "reused"]
    folder = out / "stages" / "1-tiny-M"
    alone = raychain.evaluate(str(folder), evaluators=tree["evaluate"])
    assert alone["metrics"]["counting/loss"] == pytest.approx(losses[1], rel=1e-5)
    assert alone["tokens"] == 32
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 48


def test_the_command_grows_a_folder(tree: dict[str, Any], data: Path, tmp_path: Path) -> None:
    from language import exact

    from raychain.api.grow import grow_checkpoint
    from raychain.paradigms import make_paradigm, make_task

    small = exact(SMALL | {"vocab_size": 300}).float()
    (tmp_path / "small").mkdir()
    paradigm = make_paradigm(make_task(tree["task"]))
    paradigm.save(tmp_path / "small", small, {}, 32)
    grown = grow_checkpoint(tmp_path / "small", "tiny-M", tmp_path / "large", models=str(data / "models"))
    assert grown.drift["logits"].relative_error < 1e-5
    assert paradigm.load(tmp_path / "large").config.num_hidden_layers == 2


def work(tree: dict[str, Any], out: Path, stop_at: tuple[int, int] | None = None) -> dict[tuple[int, int], float]:
    """Losses by stage and step of this rank, which stops after a step of a stage. No Ray."""
    place = [(0, 0)]
    found: dict[tuple[int, int], float] = {}

    def emit(event: Event) -> None:
        if isinstance(event, Step):
            place[0] = event.stage, event.step
            found[place[0]] = event.loss

    out.mkdir(exist_ok=True)
    task = make_task(named(opened(validate(tree))), str(out))
    for stage in task.stages:
        if stage.given and not stage.published and not dist.is_initialized():
            publish(task, stage)
    worker = ChainWorker(task, torch.device("cpu"), emit, lambda: stop_at is not None and place[0] >= stop_at)
    assert worker.run() == (stop_at is None)
    return found


def quick(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"evaluate": {}, "train": tree["train"] | {"log_every": 1, "micro_batch": 5}}


def test_a_stopped_chain_goes_on_to_the_same_losses(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = quick(tree)
    whole = work(tree, tmp_path / "whole")
    assert len(whole) == 40
    before = work(tree, tmp_path / "stopped", (1, 5))
    after = work(tree, tmp_path / "stopped")
    assert max(before) == (1, 5)
    assert min(after) == (1, 6)
    assert before | after == pytest.approx(whole, rel=1e-6)
    stage = str(tmp_path / "whole" / "stages" / "0-tiny-S")
    tree["chain"] = [{"checkpoint": stage}, tree["chain"][1]]  # the same weights, in another chain
    begun = work(tree, tmp_path / "begun")
    assert begun == pytest.approx({place: loss for place, loss in whole.items() if place[0] == 1}, rel=1e-5)


def _rank(rank: int, world: int, rendezvous: str, tree: dict[str, Any], out: Path, stop_at: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        found = work(tree, out, stop_at)
        if rank == 0:
            torch.save(found, f"{rendezvous}.losses")
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_losses_do_not_depend_on_the_number_of_workers_or_its_changes(tree: dict[str, Any], tmp_path: Path) -> None:
    """2 → 1 → 2 workers, whose shares are uneven with 3: relative deviation at most 1e-4."""
    tree = quick(tree)
    whole, found = work(tree, tmp_path / "whole"), {}
    for number, (world, stop_at) in enumerate([(2, (0, 9)), (1, (1, 3)), (2, (1, 7)), (3, None)]):
        rendezvous = str(tmp_path / f"rendezvous-{number}")
        torch.multiprocessing.spawn(_rank, args=(world, rendezvous, tree, tmp_path / "elastic", stop_at), nprocs=world)
        found |= torch.load(f"{rendezvous}.losses")
    assert found == pytest.approx(whole, rel=1e-4)


@pytest.mark.long
def test_a_chain_survives_a_killed_worker(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = quick(tree) | {"checkpoint": {"every": "4 steps"}}
    tree["train"]["lr"] = 1e-3  # with more, rounding by other numbers of threads grows from step to step
    tree["chain"] = [{"model": "tiny-S", "epochs": "24 steps"}, {"model": "tiny-M", "epochs": "50 steps"}]
    whole = work(tree, tmp_path / "whole")
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "raychain.run", str(tmp_path / "words.yaml"), "--out", str(tmp_path / "killed")]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=said, stderr=said)
        killed, until = False, time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            log = tmp_path / "killed" / "metrics.jsonl"
            if not killed and log.exists() and '"stage": 1' in log.read_text():
                workers = [child for child in psutil.Process(process.pid).children(recursive=True)
                           if child.cmdline()[:1] == ["ray::RayTrainWorker"]]  # fmt: skip
                for child in workers:
                    child.send_signal(signal.SIGKILL)
                killed = bool(workers)
            time.sleep(0.05)
    assert (process.wait(), killed) == (0, True), (tmp_path / "said").read_text()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["restarts"]
    found = {(x["stage"], x["step"]): x["loss"] for x in lines(tmp_path / "killed")}
    assert max(found) == (1, 50)  # what a killed worker has done since it last reported is not in the log
    assert len(found) >= 60
    assert found == pytest.approx({place: whole[place] for place in found}, rel=1e-4)


@pytest.mark.long
def test_a_search_prefers_the_lower_loss(ray_session: None, tree: dict[str, Any], tmp_path: Path) -> None:
    """Halving, controls, best.yaml and the report, with a metric that is better when it is lower."""
    del tree["chain"]
    tree |= {"family": ["tiny-S", "tiny-M"]}
    space = {"models": "tiny-{S,M}", "first": "10 steps", "grown": ["3 steps", "9 steps"]}
    tree["search"] = {"trials": 2, "seeds": 1, "space": space, "controls": {"equal_macs": False}, "sampler": "grid"}
    result = raychain.search(validate(tree)).record
    losses = [t["metrics"]["counting/loss"] for t in result["trials"] if t["kind"] == "sampled"]
    assert len(losses) == 2
    assert result["best"]["metrics"]["counting/loss"] == min(losses)
    assert "counting loss" in (tmp_path / "runs" / "words-search" / "report.html").read_text()
