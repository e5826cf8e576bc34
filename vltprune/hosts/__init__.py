"""Hosts: how a tower is run with its own submodules. A library's host module is imported when its model is met."""

from .base import Composite, Host
from .find import find_composite, find_host, supported

__all__ = ["Composite", "Host", "find_composite", "find_host", "supported"]
