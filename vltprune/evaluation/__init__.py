"""Evaluation of models, dense or pruned, on data sets: tasks, metrics, results."""
