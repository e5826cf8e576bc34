"""Visualization: images of kept tokens, SVG charts, and HTML reports."""

from .prompts import draw_prompt, seen_images

__all__ = ["draw_prompt", "seen_images"]
