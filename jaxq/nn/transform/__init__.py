"""The loop that quantizes a model."""
