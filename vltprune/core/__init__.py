"""Packed tokens, operations per instance, attention with its statistics, precision. Imports nothing else of the library."""
