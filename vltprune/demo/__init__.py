"""The demo: accuracy, cost and kept tokens of the shipped model on synthetic NLVR, and its report."""
