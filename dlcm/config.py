"""What a run is: frozen, validated, hashable to a run id. No torch here, so that planning is fast.

Symbols of the paper beside the names used here: d_token = d, d_concept = D (width), compression_ratio = R.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field

from dlcm.data_config import DataConfig as DataConfig
from dlcm.frozen import Frozen as Frozen
from dlcm.frozen import PositiveInt, Share

SCHEMA_VERSION = 1
# The last share of the steps, over which the realised R in training is averaged.
FINAL_SHARE = 0.1
# Fields, by block, that the steps before the decay do not depend on.
NOT_IN_TRUNK = {
    "data": ("validation_tokens",),
    "optim": ("decay_share", "final_lr_ratio"),
    "train": ("tokens", "measure_stable"),
}

Detector = Literal["learned", "cosine", "fixed", "random", "delimiter_word", "delimiter_sentence"]


class BoundaryConfig(Frozen):
    """How concept boundaries are decided, and how their rate is held (eqs 5, 6, 10 of the paper)."""

    detector: Detector = Field(
        default="learned", description="what proposes a boundary; all but `learned` are controls"
    )
    compression_ratio: float = Field(
        default=4.0, gt=1.0, description="R, the target number of tokens per concept; above 1"
    )
    d_scan: PositiveInt = Field(
        default=64, description="width of the scan space of W_q, W_k; fixed across model widths"
    )
    temperature: float = Field(default=0.1, gt=0.0, description="p_sharp = sigmoid(logit(p) / temperature)")
    decision: Literal["sample", "threshold"] = Field(
        default="sample",
        description="training decisions: Bernoulli(p_sharp) as in the paper, or the threshold used at inference",
    )
    control: Literal["none", "bias"] = Field(
        default="bias",
        description="`bias` adds an integral controller of the boundary rate; `none` leaves it to the ratio loss",
    )
    control_gain: float = Field(
        default=1.0, gt=0.0, lt=2.0, description="share of the rate error that the controller takes back each step"
    )
    ratio_loss_weight: float = Field(default=0.03, ge=0.0, description="lambda, weight of the ratio loss (eq 15)")
    straight_through: bool = Field(
        default=False, description="let the language-model loss reach W_q, W_k; the paper does not"
    )


class ModelConfig(Frozen):
    """The architecture of a DLCM or of the dense baseline.

    A dense model is the encoder alone: `n_concept_layers = n_decoder_layers = 0` and no boundary block.
    """

    kind: Literal["dlcm", "dense"] = Field(
        default="dlcm", description="DLCM, or a LLaMA-style decoder from the same code"
    )
    vocab_size: PositiveInt = Field(default=4096, description="rows of the embedding")
    d_token: PositiveInt = Field(description="width of encoder and decoder")
    d_concept: int = Field(default=0, ge=0, description="width of the concept backbone; 0 for a dense model")
    n_encoder_layers: PositiveInt = Field(description="layers of the encoder; all layers of a dense model")
    n_concept_layers: int = Field(default=0, ge=0, description="layers of the concept backbone")
    n_decoder_layers: int = Field(default=0, ge=0, description="layers of the decoder")
    d_head: PositiveInt = Field(
        default=32, description="width of one attention head, everywhere; even, for the rotary embedding"
    )
    n_heads_token: PositiveInt = Field(description="query heads of encoder, decoder and cross-attention")
    n_heads_concept: int = Field(default=0, ge=0, description="query heads of the backbone")
    n_kv_heads_token: PositiveInt = Field(
        default_factory=lambda data: data.get("n_heads_token", 1), description="key-value heads (GQA) on the token side"
    )
    n_kv_heads_concept: int = Field(
        default_factory=lambda data: data.get("n_heads_concept", 0), ge=0, description="key-value heads of the backbone"
    )
    d_ff_token: PositiveInt = Field(description="hidden width of the SwiGLU of encoder and decoder")
    d_ff_concept: int = Field(default=0, ge=0, description="hidden width of the SwiGLU of the backbone")
    boundary: BoundaryConfig | None = Field(
        default_factory=lambda data: BoundaryConfig() if data.get("kind") == "dlcm" else None,
        description="boundary detector and its rate control; none for a dense model",
    )
    pooling: Literal["mean", "first"] = Field(default="mean", description="how a segment becomes a concept (eq 7)")
    smoothing: Literal["none", "causal"] = Field(default="causal", description="smoother of the concepts (eq 11)")
    concept_bias: Literal["log_length", "none"] = Field(
        default="log_length",
        description="bias on cross-attention scores: as concept replication trains it, or eq 14 as printed",
    )
    cross_attention: Literal["every_layer", "once"] = Field(
        default="every_layer", description="cross-attention in each decoder layer, or in the first alone"
    )
    attention_backend: Literal["auto", "reference", "sdpa", "replicated", "flex", "staircase"] = Field(
        default="auto", description="how attention is computed; `auto` takes the fastest for device and dtype"
    )
    tie_embeddings: bool = Field(default=False, description="share the embedding with the unembedding")
    rope_theta: float = Field(default=10_000.0, gt=0.0, description="base of the rotary frequencies")
    d_token_base: PositiveInt = Field(
        default_factory=lambda data: data.get("d_token", 1),
        description="token width at which learning rates were tuned (muP)",
    )
    d_concept_base: int = Field(
        default_factory=lambda data: data.get("d_concept", 0), ge=0, description="concept width of the same proxy (muP)"
    )
    init_gain: float = Field(
        default=1.0,
        gt=0.0,
        description="initial standard deviation of a matrix times the square root of its fan-in width",
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        concept_fields = ("d_concept", "n_concept_layers", "n_decoder_layers", "n_heads_concept", "d_ff_concept")
        if self.kind == "dense":
            given = [name for name in concept_fields if getattr(self, name)]
            if given or self.boundary is not None:
                raise ValueError(
                    f"a dense model takes no {', '.join(given or ['boundary'])}; remove it or set kind: dlcm"
                )
        else:
            absent = [name for name in (*concept_fields, "d_concept_base") if not getattr(self, name)]
            if absent or self.boundary is None:
                raise ValueError(f"a dlcm model needs {', '.join(absent or ['boundary'])} above 0; or set kind: dense")
        for side in ("token", "concept"):
            n_heads, n_kv = getattr(self, f"n_heads_{side}"), getattr(self, f"n_kv_heads_{side}")
            if n_kv and n_heads % n_kv:
                raise ValueError(f"n_heads_{side} = {n_heads} is not a multiple of n_kv_heads_{side} = {n_kv}")
        if self.d_head % 2:
            raise ValueError(f"d_head = {self.d_head} is odd; the rotary embedding rotates pairs")
        return self

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense baseline."""
        return self.kind == "dense"

    @property
    def compression_target(self) -> float:
        """R, the requested tokens per concept; 1 for a dense model, where every token is its own unit."""
        return self.boundary.compression_ratio if self.boundary else 1.0

    @property
    def mup_scale_token(self) -> float:
        """s_token = d_token / d_base (eq 18)."""
        return self.d_token / self.d_token_base

    @property
    def mup_scale_concept(self) -> float:
        """s_concept = d_concept / d_base (eq 18); 1 for a dense model."""
        return self.d_concept / self.d_concept_base if self.d_concept else 1.0

    @property
    def n_cross_attentions(self) -> int:
        """How many decoder layers carry a cross-attention."""
        return min(self.n_decoder_layers, 1) if self.cross_attention == "once" else self.n_decoder_layers


class OptimConfig(Frozen):
    """AdamW with muP groups, and the schedule. Learning rates are those of the base width."""

    lr_token: float = Field(
        default=3e-3, gt=0.0, description="peak learning rate of the token-side matrices at the base width"
    )
    lr_concept: float = Field(
        default=3e-3, gt=0.0, description="peak learning rate of the concept-side matrices at the base width"
    )
    schedule: Literal["wsd", "cosine"] = Field(
        default="wsd", description="warm-up, stable, decay; or warm-up and cosine"
    )
    warmup_share: Share = Field(default=0.05, description="share of the tokens spent warming up")
    warmup_tokens: int | None = Field(
        default=None,
        ge=0,
        description="tokens spent warming up, in place of `warmup_share`: runs of unequal length then begin alike, and share a "
        "trunk",
    )
    decay_share: Share = Field(default=0.2, description="share of the tokens in the final linear decay of `wsd`")
    final_lr_ratio: Share = Field(default=0.0, description="learning rate at the end over the peak")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="Adam beta 1")
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0, description="Adam beta 2")
    eps: float = Field(default=1e-8, gt=0.0, description="Adam epsilon at the base width")
    weight_decay: float = Field(default=0.1, ge=0.0, description="decoupled weight decay at the base width")
    clip_norm: float = Field(default=1.0, gt=0.0, description="largest global gradient norm")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.schedule == "wsd" and self.warmup_tokens is None and self.warmup_share + self.decay_share > 1.0:
            raise ValueError("warmup_share + decay_share is above 1; lower one of them")
        return self


class TrainConfig(Frozen):
    """How long, in which batches, and what is written on the way."""

    tokens: PositiveInt = Field(description="training tokens, the budget of the run; rounded down to whole steps")
    batch_tokens: PositiveInt = Field(default=2_048, description="tokens of one optimizer step, over all ranks")
    micro_batch_tokens: PositiveInt | None = Field(
        default=None, description="tokens of one forward pass; all of the batch by default"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on GPU, fp32 on CPU"
    )
    log_every: PositiveInt = Field(default=10, description="steps between two lines of metrics.jsonl")
    checkpoint_every: PositiveInt = Field(default=100, description="steps between two checkpoints")
    divergence_factor: float = Field(
        default=1.5,
        gt=1.0,
        description="diverged when the running loss exceeds this many times ln(vocabulary), or is not finite",
    )
    measure_stable: bool = Field(
        default=False,
        description="measure the validation loss also where the decay of `wsd` begins, for the law of the decay's gain (eq 23)",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="torch.compile of the stacks; auto: on a GPU where a measurement says that it pays, never on a CPU",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="what several ranks keep: `ddp` the whole model each, `fsdp` a share of weights, gradients and moments; "
        "auto: `ddp` unless 16 bytes a parameter exceed 60 % of a GPU's memory. One process keeps all",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only the input of each block and compute the rest again in the backward pass: less memory, a "
        "forward pass more, the same gradients",
    )

    def is_bf16(self, device: str) -> bool:
        """Whether forward passes run under bf16 autocast on this kind of device (`cpu`, `cuda`)."""
        return self.precision == "bf16" or (self.precision == "auto" and device == "cuda")


class RunConfig(Frozen):
    """One run, whole: the same config is the same run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    seed: int = Field(default=0, ge=0, lt=2**63, description="seeds initial weights, data order and boundary sampling")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "RunConfig":
        train, seq_len = self.train, self.data.seq_len
        if train.batch_tokens % seq_len:
            raise ValueError(f"train.batch_tokens = {train.batch_tokens} is not a multiple of data.seq_len = {seq_len}")
        micro = train.micro_batch_tokens or train.batch_tokens
        if train.batch_tokens % micro or micro % seq_len:
            raise ValueError(
                f"train.micro_batch_tokens = {micro} must divide batch_tokens = {train.batch_tokens} "
                f"and be a multiple of data.seq_len = {seq_len}"
            )
        if self.n_steps < 1:
            raise ValueError(
                f"train.tokens = {train.tokens} is less than one step of batch_tokens = {train.batch_tokens}; "
                "raise the budget or lower batch_tokens"
            )
        if train.measure_stable and self.optim.schedule != "wsd":
            raise ValueError(
                f"train.measure_stable: a {self.optim.schedule} schedule has no stable part; set optim.schedule: wsd, or drop it"
            )
        decay = self.optim.decay_share * self.tokens if self.optim.schedule == "wsd" else 0.0
        if self.optim.warmup_tokens is not None and self.optim.warmup_tokens > self.tokens - decay:
            raise ValueError(
                f"optim.warmup_tokens = {self.optim.warmup_tokens} reaches into the decay, which begins at "
                f"{self.tokens - decay:.0f} tokens of {self.tokens}; lower it, or raise train.tokens"
            )
        return self

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.train.tokens // self.train.batch_tokens

    @property
    def tokens(self) -> int:
        """Tokens that are trained on: whole steps."""
        return self.n_steps * self.train.batch_tokens

    @property
    def n_warmup_steps(self) -> float:
        """Steps of the linear warm-up; whole or not."""
        if self.optim.warmup_tokens is None:
            return self.optim.warmup_share * self.n_steps
        return self.optim.warmup_tokens / self.train.batch_tokens

    @property
    def decay_begins(self) -> int | None:
        """The step before which the decay of `wsd` begins: the last one where there is no decay; None for other schedules."""
        if self.optim.schedule != "wsd":
            return None
        return self.n_steps - math.ceil(self.optim.decay_share * self.n_steps - 1e-9)

    @property
    def n_stable_steps(self) -> int:
        """Steps that do not depend on where the run ends.

        Those before the decay of `wsd` and before the last tenth, over which R in training is averaged. 0 for `cosine`, and
        where the warm-up is a share of the run.
        """
        if self.decay_begins is None or self.optim.warmup_tokens is None:
            return 0
        return min(self.decay_begins, self.n_steps - self.n_final_steps)

    @property
    def n_final_steps(self) -> int:
        """Steps at the end over which the realised R in training is averaged."""
        return max(round(FINAL_SHARE * self.n_steps), 1)

    @property
    def trunk(self) -> str | None:
        """Hash of all that the first `n_stable_steps` depend on; runs that agree in it agree in those steps. None where 0.

        It leaves out `NOT_IN_TRUNK`: how long the run is, how it decays, and how it is judged.
        """
        if self.n_stable_steps == 0:
            return None
        blocks = self.model_dump(mode="json", exclude={name: set(fields) for name, fields in NOT_IN_TRUNK.items()})
        return hashlib.sha256(canonical_json(blocks).encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """Readable prefix and hash of the whole config; the same config has the same id on every machine."""
        return self.identify()

    def identify(self, written: Mapping[str, str] | None = None) -> str:
        """`run_id`, where some blocks are at hand as JSON: the thousands of runs of a plan share theirs.

        Args:
            written: name of a block -> its `canonical_json`.
        """
        model = self.model
        shape = (
            f"w{model.d_token}x{model.d_concept}-r{model.compression_target:g}"
            if not model.is_dense
            else f"w{model.d_token}"
        )
        return f"{model.kind}-{shape}-t{_short(self.tokens)}-s{self.seed}-{self._digest(written or {})[:10]}"

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the config, hexadecimal."""
        return self._digest({})

    def _digest(self, written: Mapping[str, str]) -> str:
        # Put together from its blocks in the order of their names, the text is that of `canonical_json` of the whole.
        blocks = {"data": self.data, "model": self.model, "optim": self.optim, "train": self.train}
        parts = {name: written.get(name) or canonical_json(block) for name, block in blocks.items()}
        parts["seed"] = str(self.seed)
        text = ",".join(f'"{name}":{part}' for name, part in sorted(parts.items()))
        return hashlib.sha256(f"{{{text}}}".encode()).hexdigest()


def canonical_json(data: Any) -> str:
    """A config, or plain data, as JSON with sorted keys and no blanks: equal ones give equal text."""
    plain = data.model_dump(mode="json") if isinstance(data, pydantic.BaseModel) else data
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _short(count: int) -> str:
    for unit, size in (("t", 10**12), ("b", 10**9), ("m", 10**6), ("k", 10**3)):
        # By the rounded number: whole steps make a little less than 1e12 of it, which is 1t, not 1e+03b.
        if float(f"{count / size:.3g}") >= 1:
            return f"{count / size:.3g}{unit}"
    return str(count)
