"""Trees of arrays and QTensors in one safetensors file."""

__all__: list[str] = []
