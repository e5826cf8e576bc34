"""How to take a tower apart with its own submodules. A library's room is entered only when a module of it is met."""

from .base import Composite, Host, find_composite, find_host, supported

__all__ = ["Composite", "Host", "find_composite", "find_host", "supported"]
