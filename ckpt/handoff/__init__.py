"""Hand-over: published versions made live on inference engines, with proof."""
