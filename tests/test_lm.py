"""Language models without Ray: data, loss and gradients at any number of ranks, perplexity, folders, costs."""

from __future__ import annotations

import json
import math
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from language import exact, gpt2, rotary
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from raychain.config.data import Data
from raychain.config.experiment import Distill
from raychain.core.dist import mean_over_ranks, rank_slice
from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.order import Order
from raychain.data.tokens import bytes_content, read_tokenizer, trained_content
from raychain.errors import InputError
from raychain.evaluators.context import Context
from raychain.evaluators.measure import measure
from raychain.evaluators.perplexity import resolve_perplexity
from raychain.paradigms import make_paradigm, make_task, model_size
from raychain.paradigms.lm.models import build, checked
from raychain.paradigms.lm.objective import LanguageObjective
from raychain.paradigms.lm.paradigm import LanguageTask
from raychain.paradigms.objective import Projector
from raychain.training.step import forward_backward

TEXT = [f"Document {i} says that {i} times {i} is {i * i}; naïve café №{i}.\n" * (1 + i % 5) for i in range(60)]


def task(**options: Any) -> Any:
    return make_paradigm(make_task({"paradigm": "lm", **options}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in every kind of file."""
    out = tmp_path_factory.mktemp("text")
    (out / "a.txt").write_text("".join(TEXT))
    (out / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in TEXT))
    pq.write_table(pa.table({"text": TEXT}), out / "a.parquet")
    with tarfile.open(out / "a.tar", "w") as tar:
        for i, text in enumerate(TEXT):
            info = tarfile.TarInfo(f"{i:04}.txt")
            info.size = len(text.encode())
            tar.addfile(info, BytesIO(text.encode()))
    (out / "cache" / "counts").mkdir(parents=True)
    return out


def batches(folder: Path, name: str, steps: int, rank: int = 0, world: int = 1, **options: Any) -> list[np.ndarray]:
    paradigm = task(length=32, **options)
    data = Data.model_validate({"train": str(folder / name)})
    shards = paradigm.survey([str(folder / name)], data, folder / "cache", "data.train")
    order = Order(tuple(shard.samples for shard in shards), seed=1)
    reader = paradigm.reader(data, {"vocab_size": 9999}, 32, order.samples)
    cache = ShardCache(folder / "cache", 2**30)
    with Loader(Feed(tuple(shards), order, reader), cache, global_batch=7, start=0, stop=steps, rank=rank,
                world=world) as loader:  # fmt: skip
        return [batch["tokens"].numpy() for batch in loader]


def test_rows_are_the_text(folder: Path) -> None:
    """A pass has rows of consecutive tokens from one offset, each once; the next pass has another offset."""
    text = bytes(np.random.default_rng(0).integers(32, 127, 3000).astype(np.uint8)).decode()
    (folder / "random.txt").write_text(text)
    stream = [*text.encode(), 256]
    rows = (len(stream) - 32) // 32
    found = np.concatenate(batches(folder, "random.txt", -(-2 * rows // 7)))[: 2 * rows]
    starts = []
    for row in found.tolist():
        starts.append(next(i for i in range(len(stream)) if stream[i : i + 33] == row))
    first, second = sorted(starts[:rows]), sorted(starts[rows:])
    assert first == list(range(first[0], first[0] + 32 * rows, 32))
    assert second == list(range(second[0], second[0] + 32 * rows, 32))
    assert first[0] != second[0]
    assert starts[:rows] != first  # and they are shuffled


def test_kinds_of_files_hold_the_same_documents(folder: Path) -> None:
    wanted = batches(folder, "a.jsonl", 3)
    for name in ("a.parquet", "a.tar"):
        assert all(np.array_equal(x, y) for x, y in zip(batches(folder, name, 3), wanted, strict=True)), name
    for world in (2, 3):
        parts = [batches(folder, "a.jsonl", 3, rank, world) for rank in range(world)]
        assert all(
            np.array_equal(np.concatenate(ps), w) for ps, w in zip(zip(*parts, strict=True), wanted, strict=True)
        )


def test_the_tokenizer_of_bytes_is_the_one_in_its_file() -> None:
    import tokenizers

    library, own = tokenizers.Tokenizer.from_str(bytes_content()), read_tokenizer("bytes")
    for text in (*TEXT[:3], "\0\t\u2028 \U0001f600  x\r\n"):
        assert library.encode(text, add_special_tokens=False).ids == own.ids([text])[0].tolist()
        assert own.words(own.ids([text])[0].tolist()) == text
    assert library.token_to_id("<|endoftext|>") == own.end == 256


def test_a_tokenizers_path_holds_in_other_working_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert LanguageTask(tokenizer="mine/tokenizer.json").tokenizer == str(tmp_path / "mine" / "tokenizer.json")
    assert [LanguageTask(tokenizer=name).tokenizer for name in ("bytes", "s3://a/b")] == ["bytes", "s3://a/b"]


def test_a_trained_tokenizer_makes_fewer_tokens(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(trained_content(TEXT, 400))
    tokenizer = read_tokenizer(str(folder))
    ids = tokenizer.ids(TEXT)
    assert tokenizer.size <= 400
    assert sum(map(len, ids)) < 0.5 * len("".join(TEXT).encode())
    assert [tokenizer.words(one.tolist()) for one in ids] == TEXT
    found = batches(folder, "a.jsonl", 1, tokenizer=str(folder / "tokenizer.json"))[0]
    stream = np.concatenate([np.append(one, tokenizer.end) for one in ids])
    assert any(np.array_equal(stream[i : i + 33], found[0]) for i in range(len(stream)))


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"tokenizer": "nowhere/tokenizer.json"}, "a.txt", "task.tokenizer"),
        ({"end": "</s>"}, "a.txt", "task.end"),
        ({"text": "body"}, "a.jsonl", "no text under 'body'"),
        ({"text": "body"}, "a.parquet", "no column 'body'"),
        ({"length": 100_000}, "a.txt", "task.length"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(folder: Path, options: dict[str, Any], name: str, said: str) -> None:
    paradigm, data = task(**{"length": 32} | options), Data.model_validate({"train": str(folder / name)})
    with pytest.raises(InputError, match=said):
        paradigm.survey([str(folder / name)], data, folder / "cache", "data.train")


SMALL, LARGE = rotary("qwen3", 32, 1, 4, 2, 48), rotary("qwen3", 48, 2, 8, 4, 64)
BATCH = 10


def pair(dtype: torch.dtype) -> tuple[LanguageObjective, LanguageObjective]:
    """A student that follows a teacher of another width."""
    models = [exact(config, i).to(dtype) for i, config in enumerate((LARGE, SMALL))]
    torch.manual_seed(0)
    student = LanguageObjective(models[0], Projector({"hidden": (48, 32)}))
    return student.to(dtype), LanguageObjective(models[1]).to(dtype)


def batch(part: slice) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (BATCH, 13), generator=torch.Generator().manual_seed(2))
    return {"tokens": ids[part], "seed": torch.arange(BATCH)[part]}


def reference(cap: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """The definitions, in float64 in one process, of the whole batch."""
    student, teacher = pair(torch.float64)
    ids = batch(slice(None))["tokens"]
    out, followed = (side.model(input_ids=ids[:, :-1], output_hidden_states=True) for side in (student, teacher))
    task = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    assert student.projector is not None
    ours = F.normalize(student.projector["hidden"](out.hidden_states[-1]), dim=-1)
    distance = (ours - F.normalize(followed.hidden_states[-1], dim=-1)).square().sum(-1).mean()
    alpha = min(40.0, 0.999 * task.item() / distance.item()) if cap else 40.0
    (task + alpha * distance).backward()
    return (task + alpha * distance).item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4))])
def test_losses_and_gradients_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """At uneven ranks, whole or in three micro-batches, accumulated (no cap) or run twice (cap); head in chunks."""
    torch.save({cap: reference(cap) for cap in (True, False)}, tmp_path / "expected")
    if world == 1:
        compare(0, 1, tmp_path)
    else:
        torch.multiprocessing.spawn(_rank, args=(world, tmp_path), nprocs=world)


def _rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        compare(rank, world, folder)
    finally:
        dist.destroy_process_group()


def compare(rank: int, world: int, folder: Path) -> None:
    from raychain.models import next_token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_token, "VALUES", 61 * 7)  # seven tokens a chunk
        for cap, (loss, gradients) in torch.load(folder / "expected").items():
            part = batch(rank_slice(BATCH, rank, world))
            for micro in (None, 1 if world == 4 else 2 if world == 3 else 4):
                student, teacher = pair(torch.float32)
                student.micro_batch = teacher.micro_batch = micro
                wrapped = DistributedDataParallel(student) if world > 1 else student
                losses = forward_backward(wrapped, student, teacher, part, Distill(alpha=40, cap=cap), BATCH)
                assert float(mean_over_ranks(losses.total)) == pytest.approx(loss, rel=1e-6)
                for name, parameter in student.named_parameters():
                    assert parameter.grad is not None
                    error = (parameter.grad.double() - gradients[name]).norm() / gradients[name].norm()
                    assert error < 2e-5, f"{name}: {error:.1e} at {world} ranks, micro-batch {micro}, cap {cap}"


def test_perplexity_is_the_one_computed_by_hand(folder: Path) -> None:
    """Of a GPT-2 with transformers' own class, window by window; and the same from files of any kind."""
    model = exact(gpt2(32, 2, 4, vocab_size=257)).float()
    context = Context(ShardCache(folder / "cache", 2**30), None, 24, (), (), torch.device("cpu"),
                      words=read_tokenizer("bytes"))  # fmt: skip
    found = measure(model, resolve_perplexity([str(folder / "a.jsonl")], "text", folder / "cache", "x"), context)
    ids = [256, *(byte for text in TEXT for byte in [*text.encode(), 256])]
    nats = 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 24):
            piece = torch.tensor(ids[i : i + 25])
            logits = model(piece[None, :-1]).logits[0].double()
            nats -= logits.log_softmax(-1)[range(len(piece) - 1), piece[1:]].sum().item()
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len("".join(TEXT).encode()), abs=1e-5)


@pytest.mark.parametrize("config", [SMALL | {"vocab_size": 257}, gpt2(32, 2, 4, vocab_size=257)], ids=["qwen3", "gpt2"])
def test_stage_folders_are_transformers_own(config: dict[str, Any], tmp_path: Path) -> None:
    """It loads model and tokenizer, gives the same logits, and goes on training; raychain reads it back too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paradigm, config = task(length=32), checked(config, "test")
    model = build(config, seed=3)
    paradigm.save(tmp_path, model, config, 32)
    theirs, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = words("naïve café", return_tensors="pt").input_ids
    assert ids[0].tolist() == list("naïve café".encode())
    assert theirs.config.eos_token_id == words.eos_token_id == 256
    assert torch.allclose(theirs(ids).logits, model.eval()(ids).logits, atol=1e-6)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(theirs(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert torch.equal(paradigm.load(tmp_path).state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    name = paradigm.model_in(tmp_path, "mine")
    assert torch.equal(paradigm.read(tmp_path, name).model(ids).logits, paradigm.load(tmp_path)(ids).logits)
    with pytest.raises(ValueError, match=r"hidden_size|n_embd|model_type|is of another"):
        paradigm.read(tmp_path, "CoM-LM-S")


def test_costs_are_those_that_torch_counts_of_all_layers() -> None:
    """GPT-2's published parameters, and the formula of a token: 2DHh + 2DKh + 3DF + 2LHh a layer, and DV."""
    size = model_size(make_task({"paradigm": "lm", "length": 64}), "CoM-LM-S")
    layer = 2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256 + 2 * 64 * 96
    assert size.parts["decoder"].macs == 64 * 3 * layer
    assert size.parts["tokens"].macs == 64 * 96 * 257
    items = {"decoder": 1, "tokens": 1}
    assert size.teaching(items) == size.forward(items) - 64 * 96 * 257
    model = build({**checked(rotary("llama", 96, 3, 12, 6, 256), "x"), "vocab_size": 257}, seed=0, device="meta")
    mask, ids = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="meta"), torch.zeros(1, 64, dtype=int, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask)
    assert counter.get_total_flops() // 2 == 64 * (
        3 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256 + 2 * 64 * 96) + 96 * 257
    )
    for name, millions in (("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("Qwen3-0.6B", 596.0)):
        assert model_size(make_task({"paradigm": "lm"}), name).params / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_model_is_the_same_for_the_same_seed_and_leaves_the_process_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (build(checked(SMALL, "x"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_command_makes_tokens_and_tells_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from raychain.cli.data import data

    def call(*options: str) -> Any:
        return CliRunner().invoke(data, ["tokenize", str(folder / "a.jsonl"), "--out", str(tmp_path / "out"), *options])

    made = call("--vocabulary", "300", "--held-out", "0.2", "--json")
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert result["train"]["documents"] + result["held_out"]["documents"] == len(TEXT)
    assert result["train"]["bytes"] + result["held_out"]["bytes"] == len("".join(TEXT).encode())
    tokens = np.fromfile(tmp_path / "out" / "train-00000.bin", np.uint16)
    tokenizer = read_tokenizer(str(tmp_path / "out"))
    assert (tokens == tokenizer.end).sum() == result["train"]["documents"]
    assert len(tokens) == result["train"]["tokens"]
    assert isinstance(call().exception, InputError)  # the folder is not empty


def test_lengths_in_tokens_are_samples() -> None:
    from raychain.config.loading import validate

    tree = {"name": "x", "data": {"train": "a.bin"}, "chain": [{"model": "CoM-LM-XS", "epochs": "6.4e3 tokens"}]}
    found = validate(tree | {"task": {"paradigm": "lm", "length": 64}})
    assert str(found.chain[0].epochs) == "100 samples"
    with pytest.raises(InputError, match="one unit"):
        validate(tree)


def test_python_brings_text_along() -> None:
    from itertools import islice

    from raychain.demo.text import docstrings, documents

    found = list(islice(documents(), 70))
    assert sum(map(len, found)) > 300_000
    text = docstrings(Path(json.__file__), "json")
    assert "json.dumps(obj, *, skipkeys=False" in text
    assert "Serialize ``obj`` to a JSON formatted" in text
