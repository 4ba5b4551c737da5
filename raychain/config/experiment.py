"""What a user may write in an experiment file: one frozen model a component, every field with its unit and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raychain.config.data import Data, StageData
from raychain.config.lengths import in_samples
from raychain.config.origin import AnyStart, given_alone, misplaced, trained_whole
from raychain.config.search import Search
from raychain.config.track import Track
from raychain.evaluators.config import Evaluate
from raychain.paradigms.task import AnyTask, Task
from raychain.schema.allocation import Allocation
from raychain.schema.component import Component, OneOrMore, Seed
from raychain.schema.durations import Bytes, Duration, Epochs, Every, Horizon, Interval, Warmup
from raychain.schema.generate import Generates
from raychain.schema.problems import ProblemsError

Beta = Annotated[float, Field(ge=0, lt=1)]


def _range(workers: int | tuple[int, int]) -> int | tuple[int, int]:
    if not isinstance(workers, int) and workers[0] > workers[1]:
        raise ValueError("allowed is a number, or [min, max] with 1 <= min <= max")
    return workers


Workers = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], AfterValidator(_range)]


class Change(Component):
    """Another learning rate from some step of a stage on."""

    at: Every
    """Steps that are done before: "N steps", "N samples" or "N epochs"."""
    lr: float = Field(gt=0)
    """Peak learning rate from there on. The schedule, AdamW's moments and the averaged weights go on as they are."""


class Stage(Component):
    """One model of the chain: trained, or, as the first, a checkpoint that one has already."""

    checkpoint: str | None = Field(None, min_length=1)
    """A model for the first stage that is measured and grown, but not trained here. An open_clip folder, the stage
    folder of a run, a `.safetensors` or `.pt` file, also on s3:// and gs://; its content is part of the keys. Nothing
    but `model` stands beside it. Its own training is not in the totals."""
    model: str = ""
    """A name of raychain's families, of open_clip's or timm's models, or of `models`. May be left out where a
    checkpoint says which model it is (`open_clip_config.json`, `stage.json`)."""
    epochs: Epochs | None = None
    """Length of the stage: a number of epochs, or "N steps", "N samples"."""
    start: AnyStart | None = None
    """A checkpoint, as `checkpoint` takes it, that this stage grows from and follows (`transfer`) in place of the
    stage before; {checkpoint: …, model: …} where it does not say which model it is."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of this stage, whatever `train` and `transfer` say."""
    warmup: Warmup | None = None
    """Warm-up of this stage, whatever `train` and `transfer` say."""
    changes: tuple[Change, ...] = ()
    """Learning rates from given steps on, as after a divergence: `[{at: "1200 steps", lr: 5.0e-4}]`. The stage goes on
    from what the run folder holds of the same stage without the change; where that is nothing it trains these steps
    too, to the same result."""
    workers: Workers | None = None
    """Workers of this stage instead of `compute.workers`. Where they are not those of the stage before, it gets a
    worker group of its own, which takes some ten seconds."""
    data: StageData = StageData()
    """What this stage reads instead of `data`: other pictures, captions, resolution. Position embeddings, the
    teacher's too, are interpolated to a new resolution."""

    @model_validator(mode="after")
    def _given_or_trained(self) -> Stage:
        if problems := trained_whole(self) if self.checkpoint is None else given_alone(self):
            raise ProblemsError(problems)
        return self

    @property
    def length(self) -> Duration:
        """How long it is trained; 0 epochs for a checkpoint."""
        return self.epochs or Duration(0, "epochs")


class Distill(Component):
    """Inverse feature distillation: alpha times the squared distance of normalised features, towers averaged."""

    alpha: float = Field(2.0, ge=0)
    """Weight of the distillation loss beside the task's."""
    cap: bool = True
    """Scale the distillation loss down wherever it would exceed the task loss."""
    until: Horizon | None = None
    """Length over which alpha falls to zero in a straight line ("N steps", "N %" of the stage, …); then there are no
    forward passes of the teacher either, and MACs count none. Absent: alpha stays as it is to the end."""


class Transfer(Component):
    """What a stage takes from the one before it, or from the checkpoint in its place."""

    width: str = "centred"
    """Growth operator for widths."""
    depth: str = "identity"
    """Growth operator for layers."""
    shrink: float = Field(1.0, ge=0, le=1)
    """Share of the grown weights in what a stage starts from; the rest is its random init ("shrink and perturb"). 1 is
    growth as it is, 0 a random start."""
    optimizer: Literal["grow", "reset"] = "reset"
    """AdamW's moments: from zero, or grown with the weights. A checkpoint has some if it is a stage of raychain's; else
    they begin at zero, which is said."""
    lr_scale: float = Field(1.0, gt=0)
    """Peak learning rate of grown stages as a multiple of `train.lr`."""
    warmup: Warmup | None = None
    """Warm-up of grown stages instead of `train.warmup`."""
    distill: Distill | None = Distill()
    """null, or an alpha of 0: no distillation, and no forward passes of the teacher."""

    @field_validator("distill")
    @classmethod
    def _no_idle_teacher(cls, distill: Distill | None) -> Distill | None:
        return distill if distill and distill.alpha else None


class Train(Component):
    """The recipe; stages may override `lr` and `warmup`."""

    global_batch: int = Field(1024, ge=2)
    """Samples a step over all workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples of which a worker holds the activations at once; the rest are run again for their gradients (GradCache),
    which costs a forward pass and leaves the loss of the global batch as it is. Absent: a worker's whole share, halved
    whenever the accelerator's memory turns out too small."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup: Warmup = Duration(1000, "steps")
    """Linear warm-up: "N steps", "N samples", "N epochs" or "N %" of the stage."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, constant, or constant with a cool-down at the end (wsd). Stages
    that differ in their length alone share their constant part, the trunk, where they share a storage."""
    cooldown: Horizon | None = None
    """Length of the cool-down of `schedule: wsd`: "N steps" or "N %" of the stage, in which the learning rate falls to
    zero as 1 - sqrt. Absent: 20 %. The average of the weights begins with it."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices and tables; gains, biases and logit_scale have none."""
    betas: tuple[Beta, Beta] | None = None
    """AdamW's. Absent: (0.9, 0.98) for vision transformers, (0.9, 0.999) for other image towers."""
    eps: float | None = Field(None, gt=0)
    """AdamW's. Absent: 1e-6 for vision transformers, 1e-8 for other image towers."""
    average: Horizon | None = Duration(10, "%")
    """Measure, publish and grow the exponential moving average of the weights over about this long ("N steps", "N %" of
    the stage); null: the last weights. With it a grown stage never falls below its teacher while the learning rate
    rises (experiments/growth)."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradient norm is clipped to this; null: not clipped."""
    precision: Literal["bf16", "fp32"] | None = None
    """Autocast of the forward pass; weights and optimiser are fp32. Absent: fp32, on CPUs alone, many of which have no
    bf16 arithmetic and emulate it ten times slower. With GPUs it has to be named, so that they do not decide it."""
    seed: Seed = 0
    """Seed of initial weights, the order of samples, captions, crops and dropout."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of metrics.jsonl."""

    @field_validator("cooldown")
    @classmethod
    def _cooldown_of_wsd(cls, cooldown: Duration | None, info: ValidationInfo) -> Duration | None:
        if cooldown is not None and info.data.get("schedule") != "wsd":
            raise ValueError("allowed is a cool-down of `train.schedule: wsd` only")
        return cooldown


class Compute(Component):
    """Where the chain runs."""

    workers: Workers = 1
    """Ray Train workers, one process each: a number, or [min, max] for a run that shrinks and grows with the cluster.
    The global batch is divided among the workers there are; losses and gradients do not depend on their number."""
    gpus_per_worker: float = Field(0, ge=0, le=1)
    """1: CUDA and NCCL; 0: CPU and gloo."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs Ray reserves a worker, which sets its threads. Absent: this machine's cores shared out; on a cluster 1."""
    max_failures: int = Field(3, ge=0)
    """Failures in a row without a checkpoint or a finished stage between them, after which the run fails. Lost nodes
    count; drained ones and growth do not."""

    @model_validator(mode="after")
    def _whole_gpu(self) -> Compute:
        if self.gpus_per_worker not in (0, 1):
            raise ValueError("gpus_per_worker: allowed is 0 or 1")
        return self


class Preload(Component):
    """The node-local cache of decoded shards."""

    cache: str = "~/.cache/raychain"
    """Folder on a local disk of each node."""
    budget: Bytes = 64 * 2**30
    """Bytes the cache may hold; the least recently used shards go first."""
    cpus: float | None = Field(None, ge=0)
    """Cores of each node that may decode ahead, at the lowest priority. Absent: a quarter of the node's, at least one.
    0: nothing is prepared for the next stage before the current one ends."""


class Checkpoint(Component):
    """Saved states of an unfinished stage."""

    every: Interval = Duration(300, "s")
    """How often a state is saved: "5 minutes", "30 seconds" or "500 steps"."""
    keep: int = Field(2, ge=1)
    """States of a stage that are kept; older ones are deleted."""


class Baseline(Component):
    """The training that the chain is compared with."""

    model: str
    """The model that would be trained alone."""
    epochs: Epochs
    """For how long."""


class Experiment(Component):
    """A chain of models on one data set, or a family from which the planner chooses one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder."""
    task: AnyTask = Task()
    """What is learned: `{paradigm: clip}` (the default), or a paradigm of an installed package, with the
    paradigm's options beside its name."""
    data: Data
    family: OneOrMore | None = None
    """Models to choose a chain from, instead of `chain`: names, with braces and globs (`CoM-ViT-{T,S,B,L}-16`). The
    largest is what the chain is for."""
    generate: Generates = ()
    """Models between known ones, by expansion ratio; one, or a list. `chain`, `family`, `baseline` and `search` may use
    their names, which `raychain plan` shows. Without `chain` and `family` they are the family, with the two that they
    are between."""
    allocation: Allocation | None = None
    """How to choose; only with `family`."""
    chain: Annotated[tuple[Stage, ...], Field(validate_default=True)] = ()
    """The models in training order. Never empty once `family` is resolved."""
    models: str | None = None
    """Folder of open_clip model configs, NAME.json each, or one such file (`--models`): `chain`, `family`, `baseline`
    and `search` may use their names beside the known ones. They are read by the process that starts the run; workers
    get the configs, which are part of the stages' keys, as the folder's path is not."""
    transfer: Transfer = Transfer()
    train: Train = Train()
    compute: Compute = Compute()
    preload: Preload = Preload()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    baseline: Baseline | None = None
    """Absent: the last model trained alone for the epochs of the first stage that is trained."""
    search: Search | None = None
    """What `raychain search` varies; `raychain run` trains the chain as it stands."""
    storage: str = "runs"
    """Folder or address under which run folders are made."""
    license: str | None = Field(None, min_length=1, max_length=100)
    """What the cards of the published models say of their licence, such as `apache-2.0`. Absent: `unknown`. No part of
    the stages' keys."""

    @model_validator(mode="before")
    @classmethod
    def _in_samples(cls, value: Any) -> Any:
        return in_samples(value)

    @field_validator("chain")
    @classmethod
    def _chain_or_family(cls, chain: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        family, allocation, generate = (info.data.get(key) for key in ("family", "allocation", "generate"))
        if not (chain or family or generate) and {"family", "generate"} <= info.data.keys():
            raise ValueError("allowed is a list of stages {model, epochs}, or `family:` to let the planner choose")
        if chain and (family or allocation):
            raise ValueError("allowed is either `chain`, or `family` (with `allocation`) to let the planner choose")
        if problems := misplaced(chain):
            raise ProblemsError(problems)
        return chain

    @property
    def first_trained(self) -> int:
        """Index of the chain's first stage that is not given."""
        return 1 if self.chain and self.chain[0].checkpoint is not None else 0

    def workers(self, index: int) -> tuple[int, int]:
        """The fewest and the most workers of stage `index`."""
        return self._all_workers()[index]

    @property
    def most_workers(self) -> int:
        """The most that any stage makes use of."""
        return max(most for _, most in self._all_workers())

    @property
    def fewest_workers(self) -> int:
        """What every stage has enough with."""
        return max(fewest for fewest, _ in self._all_workers())

    def _all_workers(self) -> list[tuple[int, int]]:
        """The range of each stage; without a chain, as for a search, that of `compute`."""
        given = [stage.workers or self.compute.workers for stage in self.chain] or [self.compute.workers]
        return [(own, own) if isinstance(own, int) else own for own in given]

    def stage_data(self, index: int) -> Data:
        """What stage `index` reads: `data` with the stage's own keys in place of its."""
        own = self.chain[index].data
        given = {name: getattr(own, name) for name in own.model_fields_set}
        changes = {name: value for name, value in given.items() if value is not None or name == "crop"}
        if "train" in changes and "samples" not in changes:
            changes["samples"] = None
        return self.data.model_copy(update=changes)
