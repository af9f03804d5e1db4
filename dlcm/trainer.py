"""The steps of a run: `dlcm.train` says what it leaves behind."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlcm.boundary import (
    RateStatistics,
    gather_scores,
    global_statistics,
    ratio_loss,
    uniform_draws,
)
from dlcm.checkpoint import check_corpus, corpus_record, load_checkpoint, save_checkpoint
from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.distributed import Ranks, device_of
from dlcm.errors import UserError
from dlcm.loader import Loader
from dlcm.meter import Meter, load_meter
from dlcm.micro_batch import micro_batches, most_micro_batches
from dlcm.mixture import Mixture
from dlcm.optim import build_optimizer, lr_factor
from dlcm.prepare import parameter_counts, prepare_model
from dlcm.progress import Progress, StopTraining, metrics_row
from dlcm.provenance import describe_environment
from dlcm.record import append_metrics, begin_metrics, cut_metrics, read_metrics, sync_metrics, write_json
from dlcm.result import Result
from dlcm.shards import Corpus, open_corpus
from dlcm.sharing import share_model
from dlcm.tally import StepSums, Tally
from dlcm.tracking import Tracking
from dlcm.trunk import load_branch, save_branch
from dlcm.validation import calibrate_threshold, evaluate_loss, stable_loss

# Weight of the past in the running loss that decides about divergence.
_RUNNING_LOSS_DECAY = 0.9
# A checkpoint is good while the running loss is at most so many times its lowest: the noise of ten batches, not a rise.
_GOOD_FACTOR = 1.05
# Tokens, targets, cu_seqlens, and positions or draws of a micro-batch.
Part = tuple[Tensor, Tensor, Tensor, Tensor]


class Trainer:
    """State and steps of one run."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        corpus: Corpus | Mixture | None = None,
        *,
        executed: RunConfig | None = None,
        guard: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
        trunk: Path | None = None,
        keep: Collection[int] = (),
        compiled: bool = False,
        trackers: Sequence[str] = (),
    ) -> None:
        self.config, self.run_dir, self.guard = config, run_dir, guard
        self.compiled, self.trackers = compiled, trackers
        self.trunk, self.keep = trunk, frozenset(keep)
        self.ranks = ranks or Ranks()
        self.executed = executed or config  # the same run, perhaps with other micro-batches
        self.corpus = corpus or open_corpus(config.data)
        self.device, self.device_name = device_of(self.ranks)
        bf16 = config.train.is_bf16(self.device.type)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)
        self.shared = share_model(
            prepare_model(config, self.corpus), config, self.device, self.ranks, compiled=compiled
        )
        self.model = self.shared.model
        self.optimizer = build_optimizer(self.model, config.optim)
        self.tally, self.step = Tally(), 0
        self.branched = False  # whether this start goes on from a trunk's state
        self.loader = Loader(self.corpus, config)
        self.meter: Meter | None = None
        self.metrics_path = run_dir / "metrics.jsonl"

    def run(self, on_step: Callable[[Progress], None] | None) -> Result:
        """Train from the last checkpoint, or from the start, to the end."""
        check_corpus(self.run_dir, self.corpus)
        self._restore()
        environment = describe_environment(self.device_name, torch.get_num_threads())
        facts = {
            "corpus": corpus_record(self.corpus),
            "micro_batch_tokens": self.executed.train.micro_batch_tokens,
            "n_ranks": self.ranks.world_size,
            "compiled": self.compiled,
            "parallel": self.shared.mode,
        }
        self._write_json("env.json", {"schema": SCHEMA_VERSION, **environment, **facts})
        self.meter = load_meter(self.config, {**environment, **facts})
        with self.loader, self._tracking() as tracking:
            result = self._steps(on_step, tracking)
            tracking.finish(asdict(result))
        return result

    def _tracking(self) -> Tracking:
        names = self.trackers if self.ranks.is_main else ()
        return Tracking(names, self.config, self.run_dir, read_metrics(self.metrics_path) if names else ())

    def _steps(self, on_step: Callable[[Progress], None] | None, tracking: Tracking) -> Result:
        """The steps that are left, and the result."""
        clock = begun = time.perf_counter()
        first, reason = self.step, None
        if self.branched:  # from here on the trunk is not needed any more, and a divergence has a step to go back to
            clock = self._save(clock)
        while self.step < self.config.n_steps and reason is None:
            if self.step == self.config.decay_begins and self.config.train.measure_stable:
                self.tally.stable_loss = stable_loss(self.model, self.corpus, self.config, self.autocast)
            started = time.perf_counter()
            loss, grad_norm = self.train_step()
            self.step += 1
            now = time.perf_counter()
            speed = self._progress(loss, now - started, (now - begun) / (self.step - first))
            reason = self._divergence(loss, grad_norm)
            last = self.step == self.config.n_steps
            if reason or self._is_logged(self.step):
                tracking.log(self._log(grad_norm, speed))
            if last and not reason:
                self.tally.uncalibrated = calibrate_threshold(self.model, self.corpus, self.config, self.autocast)
            if self.step in self.keep and not reason:
                self._keep_branch(self.tally.wall_s + time.perf_counter() - clock)
            saved = not reason and (last or self.step % self.config.train.checkpoint_every == 0)
            if saved:
                clock = self._save(clock)
            fault = self._told(on_step, speed)
            if fault is not None:
                if isinstance(fault, StopTraining) and not reason and not saved:
                    self._save(clock)
                raise fault
        result = self._result(reason, self.tally.wall_s + time.perf_counter() - clock)
        self._write_json("result.json", asdict(result))
        return result

    def _is_logged(self, step: int) -> bool:
        return step == self.config.n_steps or step % self.config.train.log_every == 0

    def _progress(self, loss: float, seconds: float, mean_seconds: float) -> Progress:
        """Where the run stands after a step that took `seconds`; the steps of this start took `mean_seconds`."""
        tokens_per_s = self.config.train.batch_tokens / seconds
        return Progress(
            step=self.step,
            n_steps=self.config.n_steps,
            tokens=self._tokens,
            loss_nats=loss,
            tokens_per_s=tokens_per_s,
            mfu=None if self.meter is None else self.meter(tokens_per_s, self.tally.tokens_per_concept),
            seconds_left=mean_seconds * (self.config.n_steps - self.step),
        )

    def _told(self, on_step: Callable[[Progress], None] | None, progress: Progress) -> Exception | None:
        """Tell rank 0's caller how far it is; what the caller raises ends all ranks at this step."""
        fault: Exception | None = None
        if on_step is not None and self.ranks.is_main:
            try:
                on_step(progress)
            except Exception as error:
                fault = error
        if self.ranks.world_size > 1:
            (ended,) = self.ranks.sum(
                [(1.0 if isinstance(fault, StopTraining) else 1e6) if fault else 0.0], self.device
            )
            if ended and fault is None:
                fault = StopTraining("rank 0 was told to stop") if ended < 1e6 else UserError("rank 0 has ended")
        return fault

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        if self.ranks.is_main:
            self.guard()
            write_json(self.run_dir / name, data)

    @property
    def _tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

    def _restore(self) -> None:
        mapped = self.shared.mode == "fsdp"
        state = load_checkpoint(self.run_dir, self.config, mapped=mapped)
        if state is None and self.trunk is not None:
            check_corpus(self.trunk, self.corpus)
            state = load_branch(self.trunk, self.config, mapped=mapped)
            if self.ranks.is_main:
                self.guard()
                begin_metrics(self.metrics_path, state["metrics"])
            self.branched = True
        if state is not None:
            self.shared.load(state, self.optimizer)
            self.step, self.tally = state["step"], Tally(**state["tally"])
        due = self.step - self.step % self.config.train.log_every
        self.ranks.on_main(lambda: cut_metrics(self.metrics_path, self.step, due))

    def _save(self, clock: float) -> float:
        """Save a checkpoint; `clock` is when the time since the one before began, and what comes back is when the next begins."""
        now = time.perf_counter()
        tally = self.tally
        tally.wall_s += now - clock
        if tally.running_loss is not None and tally.lowest_loss is not None:
            is_good = tally.running_loss <= _GOOD_FACTOR * tally.lowest_loss
            tally.good_step = self.step if is_good else tally.good_step
        state = self._state()
        if self.ranks.is_main:
            self.guard()
            sync_metrics(self.metrics_path)  # a resumed run does not write again what came before its checkpoint
            save_checkpoint(self.run_dir, self.step, self.config, state, tally.good_step)
        return now

    def _keep_branch(self, seconds: float) -> None:
        state = self._state()
        if self.ranks.is_main:
            self.guard()
            save_branch(self.run_dir, self.step, self.config, state, seconds)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, on rank 0; all ranks call it, since each may have a share of the model."""
        return {**self.shared.state(self.optimizer), "tally": asdict(self.tally)}

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the language-model loss in nats per token and the gradient norm before clipping."""
        config = self.config
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(config, self.step)
        batch = self.loader.batch(self.step)
        rank, n_ranks = self.ranks.rank, self.ranks.world_size
        parts = [self._to_device(part) for part in micro_batches(batch, self.executed, rank, n_ranks)]
        passes = self.shared.passes(parts, most_micro_batches(self.executed, n_ranks))
        ahead = self._statistics_ahead(passes)
        self.optimizer.zero_grad(set_to_none=True)
        sums = StepSums()
        for i, (part, counts) in enumerate(passes):
            with self.shared.accumulating(i + 1 < len(passes)):
                self._backward(part, ahead, sums, counts)
        (sums.loss,) = self.ranks.sum([sums.loss], self.device) if n_ranks > 1 else (sums.loss,)
        norm = self.shared.clip_gradients(config.optim.clip_norm)
        # A step along a gradient that is not finite would destroy the weights of a run whose divergence is a result.
        if math.isfinite(norm):
            self.optimizer.step()
        self._account(sums)
        return sums.loss / config.train.batch_tokens, norm

    def _to_device(self, part: Part) -> Part:
        tokens_T, targets_T, cu_seqlens, position_T = (x.to(self.device, non_blocking=True) for x in part)
        return tokens_T, targets_T, cu_seqlens, uniform_draws(self.config.seed, self.step, position_T)

    def _statistics_ahead(self, passes: list[tuple[Part, bool]]) -> RateStatistics | None:
        """F and G of the whole batch, before any gradient: with several micro-batches the encoder runs once more for it."""
        if most_micro_batches(self.executed, self.ranks.world_size) == 1 or not self._has_ratio_loss:
            return None
        with self.autocast:
            of_all = [self.model.detect(tokens_T, cu, draws_T) for (tokens_T, _, cu, draws_T), _ in passes]
        found = [detected for detected, (_, counts) in zip(of_all, passes) if counts]
        n_boundaries = sum(detected.decision_T.sum() for detected in found)
        prob_sum = torch.stack([detected.prob_T.sum() for detected in found]).sum()
        return global_statistics(n_boundaries, prob_sum, sum(detected.prob_T.numel() for detected in found))

    @property
    def _has_ratio_loss(self) -> bool:
        boundary = self.config.model.boundary
        return boundary is not None and boundary.detector == "learned" and boundary.ratio_loss_weight > 0

    def _backward(self, part: Part, ahead: RateStatistics | None, sums: StepSums, counts: bool) -> None:
        """Add the gradients of a micro-batch, and its sums; zeros where it does not count."""
        tokens_T, targets_T, cu_seqlens, draws_T = part
        n_tokens = self.config.train.batch_tokens
        with self.autocast:
            out = self.shared(
                tokens_T,
                cu_seqlens=cu_seqlens,
                draws=draws_T,
                targets=targets_T,
                with_scales=self._is_logged(self.step + 1),
            )
        loss_sum = out.loss_sum
        assert loss_sum is not None
        # The mean over the ranks is the gradient of the global batch, whatever share of it a rank has.
        objective = loss_sum * (self.ranks.world_size / n_tokens)
        boundary = self.config.model.boundary
        if boundary is not None and self._has_ratio_loss:
            prob_sum = out.boundary_prob.sum()
            if ahead is None:
                statistics = global_statistics(out.n_concepts, prob_sum, tokens_T.numel())
            else:
                statistics = ahead.through(prob_sum)
            objective = objective + boundary.ratio_loss_weight * ratio_loss(statistics, boundary.compression_ratio)
        if not counts:
            (0.0 * objective).backward()
            return
        objective.backward()
        sums.loss += float(loss_sum.detach())
        sums.concepts += out.n_concepts
        sums.prob += float(out.boundary_prob.detach().double().sum())
        sums.tokens += tokens_T.numel()
        sums.add_scales(out.scales or {}, tokens_T.numel())
        if out.detection is not None and out.detection.score_T is not None:
            sums.scores.append(out.detection.score_T.detach())

    def _account(self, sums: StepSums) -> None:
        """Move the ratio controller and add the step to the running sums."""
        tally = self.tally
        if sums.squares:
            totals = self.ranks.sum(sums.squares.values(), self.device)
            n_tokens = self.config.train.batch_tokens
            tally.scales = {part: math.sqrt(total / n_tokens) for part, total in zip(sums.squares, totals)}
        prob_sum = torch.tensor(sums.prob, dtype=torch.float64, device=self.device)
        statistics = global_statistics(sums.concepts, prob_sum, sums.tokens)
        n_tokens, n_concepts = int(statistics.n_tokens), int(statistics.n_boundaries)
        if sums.scores:
            scores_T = gather_scores(torch.cat(sums.scores))
            self.model.boundary.control(n_concepts / n_tokens, scores_T, first_step=self.step == 0)
        tally.loss_sum += sums.loss
        tally.boundary_sum += n_concepts
        tally.prob_sum += float(statistics.prob) * n_tokens
        tally.n_tokens += n_tokens
        if self.step >= self.config.n_steps - self.config.n_final_steps:
            tally.final_tokens += n_tokens
            tally.final_concepts += n_concepts

    def _divergence(self, loss: float, grad_norm: float) -> str | None:
        """Why the run counts as diverged, or None."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value} at step {self.step}"
        before = self.tally.running_loss
        running = loss if before is None else _RUNNING_LOSS_DECAY * before + (1 - _RUNNING_LOSS_DECAY) * loss
        self.tally.running_loss = running
        self.tally.lowest_loss = min(running, self.tally.lowest_loss or running)
        limit = self.config.train.divergence_factor * math.log(self.config.model.vocab_size)
        if running > limit:
            return (
                f"running loss {running:.3f} nats is above {limit:.3f} (divergence_factor x ln V) at step {self.step}"
            )
        return None

    def _log(self, grad_norm: float, speed: Progress) -> Mapping[str, Any]:
        """Write a line of metrics.jsonl, and return it."""
        is_dense = self.config.model.is_dense
        row = metrics_row(
            speed,
            self.tally,
            lr=self.config.optim.lr_token * lr_factor(self.config, self.step - 1),
            boundary_offset=None if is_dense else self.model.boundary.controlled_offset,
            grad_norm=grad_norm,
        )
        if self.ranks.is_main:
            self.guard()
            append_metrics(self.metrics_path, row)
        self.tally.reset_interval()
        return row

    def _result(self, reason: str | None, wall_s: float) -> Result:
        tally = self.tally
        measured = None if reason else evaluate_loss(self.model, self.corpus, self.config, self.autocast)
        return Result(
            run_id=self.config.run_id,
            status="diverged" if reason else "finished",
            step=self.step,
            tokens=self._tokens,
            loss_nats=measured.loss_nats if measured else None,
            bits_per_byte=measured.bits_per_byte if measured else None,
            tokens_per_concept=measured.tokens_per_concept if measured else None,
            tokens_per_concept_train=tally.final_tokens / tally.final_concepts if tally.final_concepts else None,
            tokens_per_concept_uncalibrated=tally.uncalibrated,
            epochs=self.corpus.train.epochs(self._tokens),
            params=parameter_counts(self.model),
            wall_s=round(wall_s, 3),
            device=self.device_name,
            reason=reason,
            domains=measured.domains if measured else None,
            epochs_by_source=self.corpus.train.epochs_by_source(self._tokens),
            sources=measured.sources if measured else None,
            micro_batch_tokens=self.executed.train.micro_batch_tokens,
            loss_nats_stable=tally.stable_loss,
            trunk=tally.trunk,
            trunk_tokens=tally.trunk_tokens,
            trunk_wall_s=round(tally.trunk_wall_s, 3),
            last_good_step=tally.good_step if reason else None,
        )
