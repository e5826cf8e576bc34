"""Training losses: the objective of each task, alignment, and distillation from the dense teacher."""
