"""Work that takes long: asked for over HTTP, recorded in the root, done by any service."""
