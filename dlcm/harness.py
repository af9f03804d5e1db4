"""lm-evaluation-harness: the model class and the task class that it runs. Importing this takes seconds.

T tokens of one packed forward pass, V vocabulary.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlcm.errors import UserError
from dlcm.generate import Sampling, generate
from dlcm.tasks import SCORING_VERSION, EvalTask
from dlcm.tokens import Tokenizer

_BATCH_TOKENS = 4_096
_MAX_NEW_TOKENS = 64


class HarnessModel(TemplateLM):
    """A DLCM or dense model as lm-eval sees it.

    Every sequence starts with the end of text, as every training document does. Requests are sorted by length and packed,
    several sequences to one forward pass, so nothing is padded. Log-softmax is computed in float32.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        batch_tokens: int = _BATCH_TOKENS,
        autocast: torch.autocast | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: called as `model(tokens_T, cu_seqlens=...)`; its answer has `.logits`, (T, V). A `dlcm.model.Model`.
            tokenizer: the one it was trained with.
            max_length: tokens that the model was trained to look back on, end of text included; what is longer loses
                its beginning, but never a part of the answer.
            batch_tokens: tokens of one forward pass.
            autocast: context of the forward pass.
        """
        super().__init__()
        self.model, self.text, self.max_length = model, tokenizer, max_length
        self._batch_tokens = batch_tokens
        self._device = next(model.parameters()).device
        self._autocast = autocast or torch.autocast(self._device.type, enabled=False)
        self.on_progress: Callable[[int, int], None] = lambda *_: None

    @property
    def eot_token_id(self) -> int:
        """Id that starts every document."""
        return self.text.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Ids of a text, nothing added."""
        return self.text.encode(string).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would write it.

        A request is (context, continuation), or (context, continuation, context ids, continuation ids) where the task is
        cut at tokens.
        """
        encoded = [(request.arguments[:2], *self._ids_of(request.arguments)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _ids_of(self, args: tuple) -> tuple[list[int], list[int]]:
        if len(args) == 4:
            return args[2], args[3]
        context, continuation = args
        return self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of whole texts; each token is predicted once, in windows of `max_length`."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((("", ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)):
            totals[owner] += value
        return totals

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Greedy continuation of each context up to a stop text, the end of text, or `max_gen_toks` tokens.

        Raises:
            UserError: the request asks for sampling.
        """
        return [self._generate(request.arguments[0], dict(request.arguments[1])) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0):
            raise UserError("this model generates greedily for lm-eval; set do_sample: false in the task")
        until = options.get("until") or []
        n_new = int(options.get("max_gen_toks") or _MAX_NEW_TOKENS)
        sampling = Sampling(n_new, temperature=0.0, stop=tuple([until] if isinstance(until, str) else until))
        # The context gives way, so that nothing is written beyond the length that the model was trained at.
        room = max(self.max_length - 1 - n_new, 0)
        ids = self.tok_encode(context)[-room:] if room else []
        return generate(self.model, self.text, [ids], sampling, autocast=self._autocast)[0].text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does it; an answer that merges into the prompt's last token is encoded by itself."""
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return context_ids, continuation_ids or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sequences = [self._sequence(context, continuation) for _, context, continuation in requests]
        done = 0
        for batch in self._batches([len(sequence) for sequence in sequences]):
            lengths = [len(requests[i][2]) for i in batch]
            for i, answer in zip(batch, self._score([sequences[i] for i in batch], lengths)):
                answers[i] = answer
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
            done += len(batch)
            self.on_progress(done, len(requests))
        return answers

    def _sequence(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """End of text, as much of the context's end as fits, and the continuation."""
        room = max(self.max_length - len(continuation), 0)  # the last token is predicted, not read
        kept = list(context)[-room:] if room else []
        return [self.eot_token_id, *(kept[1:] if kept[:1] == [self.eot_token_id] else kept), *continuation]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices by falling length, grouped up to the token limit: an out-of-memory shows at once."""
        batch, tokens = [], 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and tokens + lengths[i] > self._batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        if batch:
            yield batch

    def _logits(self, sequences: list[list[int]]) -> torch.Tensor:
        """Logits (T, V) of packed sequences."""
        cu_seqlens = [0]
        for sequence in sequences:
            cu_seqlens.append(cu_seqlens[-1] + len(sequence))
        tokens_T = torch.tensor([token for sequence in sequences for token in sequence], device=self._device)
        with self._autocast:
            return self.model(
                tokens_T, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32, device=self._device)
            ).logits

    @torch.no_grad()
    def _score(self, sequences: list[list[int]], lengths: list[int]) -> list[tuple[float, bool]]:
        """Sum of log p over the last `lengths[i]` tokens of each sequence, and whether each of them is the argmax."""
        logits_TV = self._logits([sequence[:-1] for sequence in sequences])
        rows, targets, end = [], [], 0
        for sequence, length in zip(sequences, lengths):
            end += len(sequence) - 1
            rows += range(end - length, end)
            targets += sequence[len(sequence) - length :]
        targets_T = torch.tensor(targets, dtype=torch.int64, device=self._device)
        picked_TV = logits_TV[torch.tensor(rows, dtype=torch.int64, device=self._device)].float()
        log_prob_T = picked_TV.gather(1, targets_T[:, None])[:, 0] - picked_TV.logsumexp(1)
        greedy_T = picked_TV.argmax(1) == targets_T
        values, greedy = log_prob_T.double().cpu().split(lengths), greedy_T.cpu().split(lengths)
        return [(float(value.sum()), bool(all_.all())) for value, all_ in zip(values, greedy)]


class HarnessTask(ConfigurableTask):
    """An `EvalTask` as lm-eval sees it: multiple choice, zero-shot, its items given instead of fetched."""

    def __init__(self, task: EvalTask) -> None:
        """Wrap a task."""
        self._rows = [asdict(item) for item in task.items]
        # Name in a result -> name in lm-eval.
        self.metrics = {name: name for name in ("acc", "acc_norm", "bits_per_byte")}
        if task.against_prior:
            self.metrics["acc"] = "acc_mutual_info"
        metrics = [
            {"metric": theirs, "aggregation": "mean", "higher_is_better": name != "bits_per_byte"}
            for name, theirs in self.metrics.items()
        ]
        config = {
            "task": task.name,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": task.delimiter,
            "metric_list": metrics,
            "num_fewshot": 0,
            "metadata": {"version": SCORING_VERSION},
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Put the items where lm-eval looks for a data set; nothing is fetched."""
        self.dataset = {"test": datasets.Dataset.from_list(self._rows)}

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests without lm-eval's own progress bar, which cannot be turned off."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**kwargs)

    def construct_requests(self, doc: dict, ctx: str | list[str], **kwargs: Any) -> list[Instance]:
        """One request an answer; ids ride along where the task is cut at tokens."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        assert isinstance(requests, list)
        if doc["query_ids"] is not None:
            # Where the prior is asked for, a second round of requests follows, without the query.
            queries = [doc["query_ids"]] * len(doc["choices"]) + [[]] * len(doc["choices"])
            for request, query, ids in zip(requests, queries, doc["choice_ids"] * 2):
                request.arguments = (*request.arguments, query, ids)
        return requests

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
        """Scores of one item: acc as lm-eval has it; acc_norm by bytes in every version of lm-eval; bits per byte."""
        n_bytes, gold = doc["choice_bytes"], doc["gold"]
        per_byte = [value / max(n, 1) for (value, _), n in zip(results, n_bytes)]
        acc = self.metrics["acc"]
        return {
            acc: super().process_results(doc, results)[acc],
            "acc_norm": float(max(range(len(per_byte)), key=per_byte.__getitem__) == gold),
            "bits_per_byte": -per_byte[gold] / math.log(2),
        }
