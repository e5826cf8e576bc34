"""Text queries: `query`, the context in which a pruned tower's tokens are compared with a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Query:
    """A text that tokens are compared with.

    Attributes:
        embedding: [batch, segments, dim], the text of each instance.
        project: maps contents of tokens, [total, dim of the tower], into the text's space, where that is the one of a language
            model that reads both. None where a guide has to map them.
    """

    embedding: Tensor
    project: Callable[[Tensor], Tensor] | None = None


_current: ContextVar[Query | None] = ContextVar("query", default=None)


@contextlib.contextmanager
def query(embedding: Tensor) -> Iterator[None]:
    """Compares the tokens of pruned image towers that run within the `with` block with a text.

    Presets whose guide is `text_query` or `text_embedding` read it; others do not. It holds in the thread that enters the
    block. A query inside another one takes its place. In a vision-language model with a language model it takes the place of
    the prompt's own text.

        with vltprune.query(model.encode_text(texts)):
            features = model.encode_image(images)

    Args:
        embedding: the embedding of each image's text, [batch, dim], or of several segments of it, [batch, segments, dim].
            Gradients flow back into it.

    Yields:
        Nothing.

    Raises:
        TypeError: for what is no tensor of floating-point numbers.
        ValueError: for another shape, and for an empty batch.
    """
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        kind = embedding.dtype if isinstance(embedding, Tensor) else type(embedding).__name__
        raise TypeError(
            f"query takes the embedding of each image's text, a tensor of floating-point numbers, not {kind}: encode the "
            "texts first, query(model.encode_text(texts))"
        )
    if embedding.dim() not in (2, 3) or embedding.numel() == 0:
        raise ValueError(
            f"query takes an embedding [batch, dim] or [batch, segments, dim], one for each image, not {list(embedding.shape)}"
        )
    with set_query(embedding if embedding.dim() == 3 else embedding[:, None]):
        yield


@contextlib.contextmanager
def set_query(embedding: Tensor | None, project: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Sets the query within the `with` block, unchecked.

    Args:
        embedding: [batch, segments, dim]. None for no query, whatever is set outside.
        project: as `Query` has it.
    """
    token = _current.set(None if embedding is None else Query(embedding, project))
    try:
        yield
    finally:
        _current.reset(token)


def current_query() -> Query | None:
    """The query that holds in this thread. None outside of `query`."""
    return _current.get()
