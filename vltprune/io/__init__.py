"""Saving and loading of models: folders, the hub, and how a model wants its images preprocessed."""
