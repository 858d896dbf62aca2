"""What a plan depends on, as a hash: while it holds, a save neither plans nor asks other ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

PLAN_FORMAT = 1
"""Part of every fingerprint: a layout of another format version is another layout."""


def fingerprint(tensors: Mapping[str, torch.Tensor], world: int) -> str:
    """SHA-256 over this rank's names, shapes, dtypes, meshes and placements.

    Equal on all ranks, unless they hold different parts of the model.
    """
    entries = []
    for name, tensor in tensors.items():
        place: list[Any] = []
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            place = [list(mesh.shape), mesh.mesh_dim_names, [str(p) for p in tensor.placements]]
        entries.append([name, str(tensor.dtype), list(tensor.shape), place])
    text = json.dumps([PLAN_FORMAT, world, entries], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def joint_fingerprint(prints: Sequence[str]) -> str:
    """One fingerprint for all ranks, by rank; theirs, if they are all the same."""
    if len(set(prints)) == 1:
        return prints[0]
    return hashlib.sha256(json.dumps(list(prints)).encode()).hexdigest()


def mesh_json(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The device meshes of the tensors: their shapes and dimension names."""
    meshes: list[dict[str, Any]] = []
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            names = None if mesh.mesh_dim_names is None else list(mesh.mesh_dim_names)
            entry = {"shape": list(mesh.shape), "dim_names": names}
            if entry not in meshes:
                meshes.append(entry)
    return {"meshes": meshes} if meshes else None


def joint_mesh(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The meshes of all ranks, from what :func:`mesh_json` gave on each."""
    meshes: list[Any] = []
    for part in parts:
        meshes += [mesh for mesh in (part or {"meshes": []})["meshes"] if mesh not in meshes]
    return {"meshes": meshes} if meshes else None
