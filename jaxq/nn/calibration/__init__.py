"""Statistics of the inputs of a model's layers."""
