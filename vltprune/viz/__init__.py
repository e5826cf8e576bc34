"""Visualization: images of kept tokens, SVG charts, and HTML reports."""
