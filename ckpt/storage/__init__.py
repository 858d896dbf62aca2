"""Stores: one protocol, POSIX and fsspec behind it."""
