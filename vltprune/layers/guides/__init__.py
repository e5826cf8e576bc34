"""Alignment guides: how the tokens of all towers relate to anchors, weights of the guide or a text."""
