"""A stand-in for a part of AReaL: its attributes and the order of its calls, nothing more."""
