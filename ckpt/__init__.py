"""A distributed checkpoint service for adapters and their optimizer state."""
