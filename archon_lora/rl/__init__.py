"""A small asynchronous GRPO loop: the main job of the command line."""
