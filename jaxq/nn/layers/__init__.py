"""What each layer kind is, and how a quantized weight enters it."""
