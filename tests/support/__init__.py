"""Helpers of the test suite: spawned ranks and the functions that run on them."""
