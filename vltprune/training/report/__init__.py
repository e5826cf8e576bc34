"""Report of a compression: an HTML page with tables, charts and example records."""
