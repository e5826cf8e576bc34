"""Reducers: what becomes of the tokens that go."""
