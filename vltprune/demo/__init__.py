"""The demo: accuracy and cost of the shipped model on synthetic image pairs, and the report of it."""
