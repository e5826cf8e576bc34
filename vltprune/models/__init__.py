"""Dense models that no installed package offers, their tokenizer and weights, and `create_model`."""
