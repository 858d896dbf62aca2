"""The format behind plain ``torch.distributed.checkpoint`` calls.

``dcp.save(sd, storage_writer=Writer(url))``, ``dcp.async_save`` and ``dcp.load(sd,
storage_reader=Reader(url))`` work as with DCP's own storage, on one rank or many and on any store,
but a checkpoint is committed whole or absent, verified before it is used, and read without pickle.
"""

from .failure import convert, converted
from .reader import Reader
from .writer import Writer

__all__ = ["Reader", "Writer", "convert", "converted"]
