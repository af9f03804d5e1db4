"""Errors that a user can act on: one line, naming the place and the way out."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import pydantic  # imported where it is used: the command needs UserError at once, and pydantic takes a fifth of its start

ModelT = TypeVar("ModelT", bound="pydantic.BaseModel")


class UserError(Exception):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the list of valid words where none is close."""
    valid = sorted(set(valid))
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def user_path(name: str, where: str) -> Path:
    """The path that a user wrote, `~` and `~user` expanded.

    Args:
        name: as written.
        where: file or key that it came from, for the message.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where}: {name}: {error}; write the path out") from None


def parse(model: type[ModelT], data: object, where: str, block: str = "") -> ModelT:
    """Validate `data` as `model`.

    Args:
        model: a pydantic class.
        data: what was read, usually a mapping.
        where: file and key that `data` came from, for the message.
        block: key of `data` in what holds it, for the message to name every key by its whole path.

    Raises:
        UserError: one line with every fault, each with its key, the value, and the nearest valid key.
    """
    import pydantic

    if not isinstance(data, Mapping):
        place = f"{where}: {block}" if block else where
        raise UserError(f"{place}: expected a mapping of keys to values, found {type(data).__name__}")
    try:
        return model.model_validate(dict(data))
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_describe(model, item, block) for item in error.errors())) from None


def _describe(model: "type[pydantic.BaseModel]", item: Mapping, block: str) -> str:
    loc = [str(part) for part in item["loc"]]
    path = [block, *loc] if block else loc
    key = ".".join(path) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(loc[-1], _fields_at(model, loc[:-1]))}"
    if item["type"] == "missing":
        return f"missing key '{key}'"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message if not path else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _fields_at(model: "type[pydantic.BaseModel]", path: Iterable[str]) -> list[str]:
    """Field names of the (nested) model at `path`; those of the last model found where the path leaves models."""
    current = model
    for part in path:
        field = current.model_fields.get(part)
        candidates = _models_in(field.annotation) if field is not None else []
        if not candidates:
            break
        current = candidates[0]
    return list(current.model_fields)


def _models_in(annotation: object) -> "list[type[pydantic.BaseModel]]":
    import pydantic

    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
