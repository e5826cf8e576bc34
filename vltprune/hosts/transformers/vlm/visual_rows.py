"""Rows of visual tokens that enter a language model, and the features that they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class VisualRows:
    """The rows of visual tokens that enter the language model, of all images of a call.

    Attributes:
        output: What stays, as the dense model takes it in `mm_encoder_outputs`.
        kept: [rows] bool, which rows stay of those that the dense model has, image after image.
        protected: [rows] bool, which of these end a line of an image, so that no layer prunes them. None for none.
        keep_prob: [kept rows], the probability that each of those that stay does, in soft training. None for 1.
        counted_prob: [kept rows], the same with the gradients of the cost. None where `keep_prob` is.
        grid: [rows, 2] int64, row and column of each of all rows, images below each other. None where they are no grid.
        source: [rows] int64, which token of the image tower each of all rows is, -1 where it is none or gone. None where rows
            are in the tower's order.
    """

    output: ModelOutput
    kept: Tensor
    protected: Tensor | None = None
    keep_prob: Tensor | None = None
    counted_prob: Tensor | None = None
    grid: Tensor | None = None
    source: Tensor | None = None

    def select(self, chosen: Tensor) -> VisualRows:
        """Some of all rows, outside of soft training.

        Args:
            chosen: [rows] bool.

        Returns:
            These rows.
        """
        stays = chosen[self.kept]

        def of(features: Any) -> Any:
            if isinstance(features, Tensor):
                left = features.flatten(0, 1)[stays][None]
                return left if left.numel() else []
            pairs = zip(features, stays.split([len(one) for one in features]), strict=True)
            return [one[which] for one, which in pairs if which.any()]

        output: Any = type(self.output)()
        output["pooler_output"] = of(self.output["pooler_output"])
        if self.output.get("deepstack_features") is not None:
            output["deepstack_features"] = [of(level) for level in self.output["deepstack_features"]]
        columns = (self.protected, self.grid, self.source)
        protected, grid, source = (None if one is None else one[chosen] for one in columns)
        return VisualRows(output, self.kept[chosen], protected, grid=grid, source=source)


def square_grid(images: int, height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of the patches of equal images, one image below the other.

    Args:
        images: How many images there are.
        height: Rows of each.
        width: Columns of each.
        device: Of the result.

    Returns:
        [images * height * width, 2] int64.
    """
    return torch.cartesian_prod(torch.arange(images * height, device=device), torch.arange(width, device=device))


def split_by_image(
    kind: type[ModelOutput], features: Tensor, lengths: Sequence[int], levels: Sequence[Tensor] | None = None
) -> Any:
    """Split features by image, as the dense model takes them.

    Args:
        kind: The class of the dense model's own output.
        features: [rows, dim], image after image.
        lengths: Rows of each image.
        levels: The features of deeper levels, [rows, dim] each. None for none.

    Returns:
        An output whose `pooler_output` is the list of images; `deepstack_features`, where there are levels, has one of each.
    """
    output: Any = kind()
    output["pooler_output"] = list(features.split(list(lengths)))
    if levels is not None:
        output["deepstack_features"] = [list(level.split(list(lengths))) for level in levels]
    return output


def check_count(places: int, rows: int, modality: str) -> None:
    """Check that prompts have a placeholder for each visual token.

    Args:
        places: How many placeholders there are in all prompts.
        rows: How many visual tokens there are of all images or videos.
        modality: "image" or "video".

    Raises:
        ValueError: For more or fewer.
    """
    if places != rows:
        raise ValueError(
            f"the prompts have {places} placeholders of {modality}s, and the {modality}s give {rows} visual tokens: prepare "
            "both in one call of this model's processor"
        )
