"""Statistics of losses and boundaries token by token, with errors that know that tokens of one document are alike.

Every figure is a ratio of two sums over tokens: a mean loss is nats over tokens, R is tokens over concepts. Documents are drawn
independently, tokens are not, so the error is that of a ratio over clusters, linearised:

    r = sum_c y_c / sum_c x_c,    se(r)^2 = G / (G - 1) sum_c (y_c - r x_c)^2 / (sum_c x_c)^2

with y_c and x_c the sums of one document and G the number of documents (Cochran 1977, section 6; Cameron & Miller 2015).
numpy alone: no torch.

Shape legend: T tokens; G groups whose figures are asked for.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

RELATIVE_BINS = 5
"""Parts that a concept is divided into, from its first token to its last."""
SHORTEST_RELATIVE = 3
"""Tokens that a concept must have for the place inside it to be more than first or last."""


@dataclass(frozen=True)
class Ratios:
    """One ratio a group.

    Attributes:
        value: r; NaN where the denominator is 0.
        stderr: its standard error over documents; NaN where fewer than two documents have a part in the group.
        n_tokens: int64, tokens of the group.
        n_documents: int64, documents that have a token of it.
    """

    value: Array
    stderr: Array
    n_tokens: Array
    n_documents: Array

    def rows(self) -> list[dict[str, float | int | None]]:
        """As JSON: one object a group, None for NaN."""
        numbers = zip(self.value.tolist(), self.stderr.tolist(), self.n_tokens.tolist(), self.n_documents.tolist())
        return [
            {"value": _known(value), "stderr": _known(error), "n_tokens": tokens, "n_documents": documents}
            for value, error, tokens, documents in numbers
        ]


def grouped_ratio(y_T: Array, x_T: Array, group_T: Array, document_T: Array, n_groups: int) -> Ratios:
    """Sum of y over sum of x, for the tokens of each group, with its error over documents.

    Args:
        y_T: what is summed above the line.
        x_T: what is summed below it; ones for a mean over tokens.
        group_T: int, group of each token; negative: of none.
        document_T: int, document of each token.
        n_groups: G.
    """
    kept = group_T >= 0
    y_T, x_T, group_T = y_T[kept].astype(float), x_T[kept].astype(float), group_T[kept].astype(np.int64)
    documents, document_T = np.unique(document_T[kept], return_inverse=True)
    shape = (len(documents), n_groups)
    place_T = document_T * n_groups + group_T
    y, x, n = (np.bincount(place_T, w, minlength=shape[0] * n_groups).reshape(shape) for w in (y_T, x_T, None))
    n_documents = (n > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = y.sum(0) / x.sum(0)
        squares = ((y - value * x) ** 2).sum(0) / x.sum(0) ** 2
        stderr = np.sqrt(squares * n_documents / (n_documents - 1))
    value = np.where(x.sum(0) > 0, value, np.nan)
    stderr = np.where((n_documents > 1) & np.isfinite(value), stderr, np.nan)
    return Ratios(value, stderr, n.sum(0).astype(np.int64), n_documents.astype(np.int64))


@dataclass(frozen=True)
class Places:
    """Where each token stands in its concept.

    Attributes:
        offset_T: int64, from the first token of the concept, 0; -1 where that is not known.
        length_T: int64, tokens of its concept; -1 where the concept is cut by the end of what was read.
    """

    offset_T: Array
    length_T: Array

    @property
    def relative_T(self) -> Array:
        """int64, part of the concept from 0 (its first token) to `RELATIVE_BINS` - 1 (its last); -1 unknown or too short."""
        known = (self.offset_T >= 0) & (self.length_T >= SHORTEST_RELATIVE)
        # The first and the last token are parts of their own; what is between is divided evenly, by the middle of each token.
        share_T = (self.offset_T - 0.5) / np.maximum(self.length_T - 2, 1)
        inner_T = 1 + (share_T * (RELATIVE_BINS - 2)).astype(np.int64)
        part_T = np.where(
            self.offset_T == 0, 0, np.where(self.offset_T == self.length_T - 1, RELATIVE_BINS - 1, inner_T)
        )
        return np.where(known, part_T, -1)


def places_in_concepts(begins_T: Array, cu_seqlens: Array, opens_T: Array, closes_S: Array) -> Places:
    """Place of each token of packed sequences in its concept.

    Args:
        begins_T: bool, whether a concept begins; true at the start of every sequence.
        cu_seqlens: starts of the S sequences and the total length.
        opens_T: bool, whether a token opens a document. A sequence that starts otherwise was cut off from what is before it: its
            first concept began at an unknown place.
        closes_S: bool, whether the document ends with the sequence. Else its last concept is longer than what was read.
    """
    starts = np.flatnonzero(begins_T)
    n_tokens = int(cu_seqlens[-1])
    concept_T = begins_T.cumsum() - 1
    length_K = np.diff(np.append(starts, n_tokens))
    offset_T = np.arange(n_tokens) - starts[concept_T]
    length_T = length_K[concept_T]
    firsts = np.asarray(cu_seqlens[:-1], np.int64)
    unknown = np.isin(concept_T, concept_T[firsts[~opens_T[firsts]]])
    cut = np.isin(concept_T, concept_T[np.asarray(cu_seqlens[1:], np.int64)[~closes_S] - 1])
    return Places(np.where(unknown, -1, offset_T), np.where(unknown | cut, -1, length_T))


def loss_by_place(nats_T: Array, group_T: Array, document_T: Array, n_groups: int) -> Ratios:
    """Mean loss of each group of tokens, in nats; of a difference of two losses, its mean, with the error of the pairs.

    Args:
        nats_T: loss of each token; NaN where it was not predicted.
        group_T: group of each token, as an offset or a part of its concept; negative: of none.
        document_T: document of each token.
        n_groups: groups; a larger group number counts with the last.
    """
    group_T = np.where(np.isnan(nats_T), -1, np.minimum(group_T, n_groups - 1))
    return grouped_ratio(np.nan_to_num(nats_T), np.ones_like(nats_T), group_T, document_T, n_groups)


def tokens_per_concept_by(label_T: Array, begins_T: Array, document_T: Array, n_labels: int) -> Ratios:
    """R of each label: its tokens over the concepts that begin with one of them.

    Args:
        label_T: label of each token, as of its content or its source.
        begins_T: bool, whether a concept begins.
        document_T: document of each token.
        n_labels: labels.
    """
    return grouped_ratio(np.ones(len(label_T)), begins_T, label_T, document_T, n_labels)


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None
