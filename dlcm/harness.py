"""lm-evaluation-harness: the model class and the task class that it runs. Importing this takes seconds."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlcm.errors import UserError
from dlcm.generate import Sampling, generate
from dlcm.model import Model
from dlcm.scoring import Question, Scorer
from dlcm.tasks import SCORING_VERSION, EvalTask, Item
from dlcm.tokens import Tokenizer

_BATCH_TOKENS = 4_096
_MAX_NEW_TOKENS = 64


class HarnessModel(TemplateLM):
    """A DLCM or dense model as lm-eval sees it.

    Every sequence starts with the end of text, as every training document does. What requests share is read once, and what
    they do not share is packed by length (`dlcm.scoring`).
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
        self._autocast = autocast or torch.autocast(next(model.parameters()).device.type, enabled=False)
        self._scorer = Scorer(model, batch_tokens, self._autocast, trees=isinstance(model, Model))
        self._known: dict[str, list[int]] = {}
        self.on_progress: Callable[[int, int], None] = lambda *_: None
        # Task -> items whose prompt lost its beginning.
        self.truncated: defaultdict[str | None, set[int | None]] = defaultdict(set)

    @property
    def eot_token_id(self) -> int:
        """Id that starts every document."""
        return self.text.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Ids of a text, nothing added."""
        known = self._known.get(string)
        return self.text.encode(string).tolist() if known is None else known

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would write it.

        A request is (context, continuation), or (context, continuation, context ids, continuation ids) where the task is
        cut at tokens. All requests of all tasks are answered together.
        """
        texts = {text for r in requests if len(r.arguments) == 2 for text in _encoded_texts(*r.arguments)}
        self._known = dict(zip(texts, (ids.tolist() for ids in self.text.encode_batch(list(texts)))))
        encoded = [(request.arguments[:2], *self._ids_of(request.arguments)) for request in requests]
        self._known = {}
        for request, (_, context, continuation) in zip(requests, encoded):
            if len(context) > self._room(continuation):
                self.truncated[request.task_name].add(request.doc_id)
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
        questions = [Question(self._sequence(*ids), len(ids[1])) for _, *ids in requests]
        answers = self._scorer.score(questions, lambda done: self.on_progress(done, len(requests)))
        for (texts, *_), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _room(self, continuation: Sequence[int]) -> int:
        """Tokens of the context that the model can read before it; the last token is predicted, not read."""
        return max(self.max_length - len(continuation), 0)

    def _sequence(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """End of text, as much of the context's end as fits, and the continuation."""
        room = self._room(continuation)
        kept = tuple(context)[-room:] if room else ()
        return (self.eot_token_id, *(kept[1:] if kept[:1] == (self.eot_token_id,) else kept), *continuation)


def _encoded_texts(context: str, continuation: str) -> tuple[str, ...]:
    """What lm-eval encodes of a request: the context without white space at its end, and both together."""
    return (continuation, context.rstrip(), context + continuation) if context else (continuation,)


class HarnessTask(Task):
    """An `EvalTask` as lm-eval sees it: its items, examples and all, are given instead of fetched."""

    VERSION = SCORING_VERSION
    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, task: EvalTask) -> None:
        """Wrap a task."""
        # Not lm-eval's own __init__, which takes every task for one that generates text.
        self.task, self._instances = task, None
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        facts: dict[str, Any] = {"num_fewshot": 0, "metadata": {"version": SCORING_VERSION}}
        self._config = TaskConfig(task=task.name, output_type="multiple_choice", **facts)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is fetched."""

    def has_training_docs(self) -> bool:
        """No: examples stand in the prompts already."""
        return False

    def has_validation_docs(self) -> bool:
        """No: there is one set of items."""
        return False

    def has_test_docs(self) -> bool:
        """Yes: the items."""
        return True

    def test_docs(self) -> list[Item]:
        """The items."""
        return list(self.task.items)

    def doc_to_text(self, doc: Item) -> str:
        """The prompt of the right answer."""
        return doc.prompts[doc.gold]

    def doc_to_target(self, doc: Item) -> str:
        """The right answer."""
        return doc.answers[doc.gold]

    def doc_to_prefix(self, doc: Item) -> None:
        """Nothing is put before what the model writes."""

    def build_all_requests(self, *, limit: int | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        """One request an answer, and one more without its prompt where that is scored too."""
        items: Sequence[Any] = self.task.items[:limit]  # lm-eval hands documents on, whatever they are
        self._instances = [
            Instance("loglikelihood", item, arguments, i, metadata=(self.task.name, number, 1))
            for number, item in enumerate(items)
            for i, arguments in enumerate(self.construct_requests(item, ""))
        ]

    def construct_requests(self, doc: Item, ctx: str, **kwargs: Any) -> list[tuple]:  # noqa: ARG002
        """Prompt and answer of each request; ids ride along where the task is cut at tokens."""
        pairs: list[tuple] = list(zip(doc.prompts, doc.answers))
        alone: list[tuple] = [("", answer) for answer in doc.answers]
        if doc.prompt_ids is not None and doc.answer_ids is not None:
            pairs = [(*pair, *ids) for pair, ids in zip(pairs, zip(doc.prompt_ids, doc.answer_ids))]
            alone = [(*pair, (), ids) for pair, ids in zip(alone, doc.answer_ids)]
        return pairs + (alone if self.task.scoring == "gain" else [])

    def process_results(self, doc: Item, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Scores of one item: acc by the task's scoring, acc_norm by log-likelihood per byte, bits per byte of the right answer.

        An item of which any log-likelihood is no number is answered wrong.
        """
        values = [value for value, _ in results]
        given, gold = values[: len(doc.answers)], doc.gold
        per_byte = [value / max(n, 1) for value, n in zip(given, doc.answer_bytes)]
        finite = all(map(math.isfinite, values))
        scores = {"bits_per_byte": -per_byte[gold] / math.log(2)}
        if self.task.scoring == "greedy":
            return {"acc": float(finite and results[gold][1]), **scores}
        ranked = [a - b for a, b in zip(given, values[len(given) :])] if self.task.scoring == "gain" else given
        accuracies = {"acc": ranked, "acc_norm": per_byte}
        return {**{name: float(finite and _argmax(v) == gold) for name, v in accuracies.items()}, **scores}

    def aggregation(self) -> dict[str, Callable]:
        """Means over items."""
        return dict.fromkeys(self.higher_is_better(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Which way each score points."""
        return {"acc": True, **({} if self.task.scoring == "greedy" else {"acc_norm": True}), "bits_per_byte": False}


def _argmax(values: Sequence[float]) -> int:
    """Index of the largest value, the first of equal ones, as lm-eval takes it."""
    return max(range(len(values)), key=values.__getitem__)
