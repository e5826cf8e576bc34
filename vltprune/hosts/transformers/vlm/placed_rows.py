"""Rows of visual tokens at the placeholders of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .visual_rows import VisualRows, check_count


@dataclass(frozen=True)
class PlacedRows:
    """Rows of visual tokens, and where the prompts have them.

    Attributes:
        ids: [batch, length], the tokens of the prompts.
        rows: The rows of each modality.
        places: [batch, length] bool, the placeholders of each modality.
    """

    ids: Tensor
    rows: Mapping[str, VisualRows]
    places: Mapping[str, Tensor]

    @classmethod
    def from_ids(cls, ids: Tensor, rows: Mapping[str, VisualRows], token_ids: Mapping[str, int]) -> PlacedRows:
        """Find the placeholders.

        Args:
            ids: [batch, length], the tokens of the prompts.
            rows: The rows of each modality.
            token_ids: The id of the placeholders of each modality.

        Returns:
            The rows at their places.

        Raises:
            ValueError: For more or fewer rows than placeholders.
        """
        places = {modality: ids == token_ids[modality] for modality in rows}
        for modality, found in rows.items():
            check_count(int(places[modality].sum()), found.kept.shape[0], modality)
        return cls(ids, rows, places)

    def is_kept(self) -> Tensor:
        """Which tokens stay, text too, [batch, length] bool."""
        stays = torch.ones_like(self.ids, dtype=torch.bool)
        for modality, found in self.rows.items():
            stays = stays.masked_scatter(self.places[modality], found.kept.to(self.ids.device))
        return stays

    def is_visual(self) -> Tensor:
        """Which tokens are visual, [batch, length] bool."""
        return sum(self.places.values(), torch.zeros_like(self.ids, dtype=torch.bool))

    def is_free(self) -> Tensor:
        """Which tokens end no line of an image, text too, [batch, length] bool."""
        free = torch.ones_like(self.ids, dtype=torch.bool)
        for modality, found in self.rows.items():
            if found.protected is not None:
                free = free.masked_scatter(self.places[modality], ~found.protected.to(self.ids.device))
        return free

    def weights(self) -> tuple[Tensor, ...]:
        """The probability that each token stays, [batch, length], for the loss and for the cost; none for 1."""
        if all(found.keep_prob is None for found in self.rows.values()):
            return ()
        weights = []
        for name in ("keep_prob", "counted_prob"):
            weight = torch.ones(self.ids.shape, device=self.ids.device)
            for modality, found in self.rows.items():
                one, places = getattr(found, name), self.places[modality]
                if one is not None:
                    kept = torch.zeros_like(places).masked_scatter(places, found.kept.to(places.device))
                    weight = weight.masked_scatter(kept, one.to(weight))
            weights.append(weight)
        return tuple(weights)

    def source(self) -> Tensor | None:
        """Which token of the image tower each token is, [batch, length], -1 for none; None where they are in its order."""
        found = {modality: rows.source for modality, rows in self.rows.items() if rows.source is not None}
        if not found:
            return None
        source = torch.full_like(self.ids, -1)
        for modality, rows in found.items():
            source = source.masked_scatter(self.places[modality], rows.to(self.ids))
        return source

    def grid(self) -> Tensor | None:
        """Row and column of visual tokens [2, batch, length], -1 of text, images below each other; None for no grid."""
        row, column, below = torch.full_like(self.ids, -1), torch.full_like(self.ids, -1), 0
        for modality, found in self.rows.items():
            if found.grid is None:
                return None
            places, grid = self.places[modality], found.grid.to(self.ids)
            row, column = row.masked_scatter(places, grid[:, 0] + below), column.masked_scatter(places, grid[:, 1])
            below += int(grid[:, 0].amax()) + 1
        for one in row:
            # the images of a prompt alone
            one[one >= 0] = one[one >= 0].unique(return_inverse=True)[1]
        return torch.stack([row, column])
