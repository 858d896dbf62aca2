"""LoRA core for the Archon engine."""
