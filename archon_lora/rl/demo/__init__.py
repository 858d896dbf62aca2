"""The demonstration: the whole job on a tiny model, with every claim checked on the way."""
