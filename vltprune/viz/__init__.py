"""Images of kept tokens, SVG charts, and HTML pages."""
