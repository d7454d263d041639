"""JSON that decides what weights mean, read strictly: headers, indexes, configurations.

Two readers of the same bytes must not come to different results. Knows no key of any document.
"""

from __future__ import annotations

import json
from typing import Any

from medllm_pack.errors import CheckpointError, shown


def strict_json(data: bytes, *, what: str) -> dict[str, Any]:
    """Parse a JSON object; refuse duplicate keys and non-finite numbers.

    Raises:
        CheckpointError: naming ``what``.
    """
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers could disagree on which of two equal keys counts.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(double)} stands twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
