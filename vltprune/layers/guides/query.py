"""Text queries: `query`, the context in which a pruned tower's tokens are compared with a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_current: ContextVar[Tensor | None] = ContextVar("query", default=None)


@contextlib.contextmanager
def query(embedding: Tensor) -> Iterator[None]:
    """Compares the tokens of pruned image towers that run within the `with` block with a text.

    Presets whose guide is `text_query` or `text_embedding` read it; others do not. It holds in the thread that enters the
    block. A query inside another one takes its place.

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
def set_query(embedding: Tensor | None) -> Iterator[None]:
    """Sets the query within the `with` block, unchecked.

    Args:
        embedding: [batch, segments, dim]. None for no query, whatever is set outside.
    """
    token = _current.set(embedding)
    try:
        yield
    finally:
        _current.reset(token)


def current_query() -> Tensor | None:
    """The query that holds in this thread, [batch, segments, dim]. None outside of `query`."""
    return _current.get()
