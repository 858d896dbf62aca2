"""The HTTP service over checkpoint roots: ``ckpt serve``.

It has no state of its own: what it answers lies in the roots, so it can run anywhere, many times
over, and end at any moment.
"""

from .app import create_app
from .config import Limits, RootSpec, ServiceConfig

__all__ = ["Limits", "RootSpec", "ServiceConfig", "create_app"]
