"""The model of a run as training and evaluation begin with it."""

from dlcm.boundary import delimiter_table
from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.mixture import Mixture
from dlcm.model import Model, build_model
from dlcm.shards import Corpus


def prepare_model(config: RunConfig, corpus: Corpus | Mixture) -> Model:
    """Build the model of a run and give it what it needs of the tokenizer.

    Raises:
        UserError: the tokenizer has more tokens than the model has embeddings.
    """
    tokenizer = corpus.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} tokens, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or choose another tokenizer"
        )
    model = build_model(config.model, seed=config.seed)
    boundary = config.model.boundary
    if boundary is not None and boundary.detector.startswith("delimiter_"):
        granularity = boundary.detector.removeprefix("delimiter_")
        table = delimiter_table(tokenizer.token_bytes(), config.model.vocab_size, granularity)
        model.boundary.delimiters_V4.copy_(table)
    return model


def parameter_counts(model: Model) -> dict[str, int]:
    """Parameters by group, counted on the model: total = embedding + token + concept (the backbone's blocks)."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(p): p.numel() for p in (model.embedding.weight, model.unembedding.weight)}
    concept = 0 if model.config.is_dense else sum(p.numel() for p in model.concepts.blocks.parameters())
    embedding = sum(tables.values())
    return {"total": total, "embedding": embedding, "token": total - embedding - concept, "concept": concept}
