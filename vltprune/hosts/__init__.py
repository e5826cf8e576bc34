"""Hosts: run the towers of each supported library with their own submodules, and find the host of a model."""

from .base import Composite, Host
from .find import find_composite, find_host

__all__ = ["Composite", "Host", "find_composite", "find_host"]
