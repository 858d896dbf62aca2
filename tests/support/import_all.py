"""A program: import every module of the packages; print the missing package that stopped each."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

import archon_lora
import ckpt


def main() -> None:
    stopped = {}
    for package in (archon_lora, ckpt):
        for module in pkgutil.walk_packages(
            package.__path__, f"{package.__name__}.", onerror=lambda _name: None
        ):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                stopped[module.name] = error.name
            except Exception as error:
                stopped[module.name] = f"{type(error).__name__}: {error}"
    json.dump({"stopped": stopped, "loaded": sorted(sys.modules)}, sys.stdout)


main()
