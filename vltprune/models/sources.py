"""Addresses of published weights for this library's own backbones, and their download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..io.checkpoint import CheckpointError

_BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """Where one file of weights can be downloaded: an address, and a hub repository that is tried second.

    Attributes:
        url: Address of the file; it is kept under its last part in torch.hub's folder of checkpoints ($TORCH_HOME).
        sha256: Hash of the file at the address, where that is known.
        hub: "org/name" of a hub repository with the same weights in transformers' layout.
    """

    url: str
    sha256: str | None = None
    hub: str | None = None

    @property
    def path(self) -> Path:
        """The local path of the downloaded file, where it may also be put by hand."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]


# backbone -> tag -> source; the first tag is what pretrained=True means without one. Published by BLIP's authors.
SOURCES: Mapping[str, Mapping[str, Source]] = {
    "blip_base": {
        "capfilt": Source(_BLIP + "model_base_capfilt_large.pth"),
        "129m": Source(_BLIP + "model_base.pth"),
        "14m": Source(_BLIP + "model_base_14M.pth"),
    },
    "blip_large": {"129m": Source(_BLIP + "model_large.pth")},
    "blip_nlvr_base": {"nlvr2": Source(_BLIP + "model_base_nlvr.pth")},
    "blip_vqa_base": {
        "capfilt": Source(_BLIP + "model_base_vqa_capfilt_large.pth", hub="Salesforce/blip-vqa-capfilt-large"),
        "129m": Source(_BLIP + "model_vqa.pth"),
    },
    "blip_caption_base": {
        "coco": Source(
            _BLIP + "model_base_caption_capfilt_large.pth",
            "96ac8749bd0a568c274ebe302b3a3748ab9be614c737f3d8c529697139174086",
            hub="Salesforce/blip-image-captioning-base",
        )
    },
    "blip_caption_large": {
        "coco": Source(_BLIP + "model_large_caption.pth", hub="Salesforce/blip-image-captioning-large")
    },
    "blip_retrieval_base": {
        "coco": Source(_BLIP + "model_base_retrieval_coco.pth", hub="Salesforce/blip-itm-base-coco"),
        "flickr30k": Source(_BLIP + "model_base_retrieval_flickr.pth", hub="Salesforce/blip-itm-base-flickr"),
    },
    "blip_retrieval_large": {
        "coco": Source(_BLIP + "model_large_retrieval_coco.pth", hub="Salesforce/blip-itm-large-coco"),
        "flickr30k": Source(_BLIP + "model_large_retrieval_flickr.pth", hub="Salesforce/blip-itm-large-flickr"),
    },
}


def download(source: Source) -> Path:
    """Download a file of weights, from its address or else from the hub, unless it is here.

    Args:
        source: Where the file may be had.

    Returns:
        The file, in torch.hub's or the hub's cache.

    Raises:
        CheckpointError: If it cannot be had, with what to fetch and where to put it; or if it is not what was published.
    """
    if source.path.is_file():
        _check_hash(source)
        return source.path
    failures = []
    for get in (_from_address, _from_hub):
        try:
            return get(source)
        # whatever a network does: the next source may do
        except Exception as error:
            failures.append(f"{error or type(error).__name__}")
    raise CheckpointError(
        f"cannot get the weights at {source.url} ({'; '.join(failures)}). Offline, download that file elsewhere and put "
        f"it at {source.path}, or give its path as pretrained=PATH"
    )


def _from_address(source: Source) -> Path:
    source.path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(source.url, str(source.path), hash_prefix=source.sha256)
    return source.path


def _from_hub(source: Source) -> Path:
    if source.hub is None:
        raise LookupError("no hub repository has them")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    first, second = _HUB_FILES
    try:
        return Path(hf_hub_download(source.hub, first, library_name="vltprune"))
    # no connection, after all the hub's retries: they are not repeated for the second name
    except LocalEntryNotFoundError:
        cached = try_to_load_from_cache(source.hub, second)
        if isinstance(cached, str):
            return Path(cached)
        raise
    except EntryNotFoundError:
        return Path(hf_hub_download(source.hub, second, library_name="vltprune"))


def _check_hash(source: Source) -> None:
    """CheckpointError for a file whose content is not the published one."""
    if source.sha256 is None:
        return
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    found = digest.hexdigest()
    if found != source.sha256:
        raise CheckpointError(
            f"{source.path} is not the file published at {source.url}: its sha256 is {found}, not {source.sha256}. "
            "Remove it, so that it is downloaded again"
        )
