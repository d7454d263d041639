"""Where the shipped data is: recipes, mixes, Modelfile styles, the tiny model.

In the repository these folders stand at the top, where people look for them; in the wheel they
lie inside the package. This module is the only place that knows.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """Return the shipped folder ``name``, such as ``"quant_recipes/mixes"``.

    Raises:
        FileNotFoundError: if neither the package nor the source tree holds it.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root / name
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"the installation lacks its folder {name!r}; install medllm-pack again"
    )
