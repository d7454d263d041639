"""What the commands that talk to registries share: their options, and the extra they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medllm_pack.publish.transport import Access

InsecureOpt = Annotated[
    bool, typer.Option("--insecure", help="allow plain HTTP; this machine is always allowed")
]
CaOpt = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="a further authority to trust, in PEM")
]
AllowHostOpt = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="local host the registry may send us to"),
]
AuthHostOpt = Annotated[
    list[str] | None,
    typer.Option("--auth-host", metavar="HOST", help="token server that may see the login"),
]


def access(
    insecure: bool, ca: Path | None, allow_hosts: list[str] | None, auth_hosts: list[str] | None
) -> Access:
    """Return the options as a value.

    Raises:
        UsageError: if the extra is not installed.
    """
    from medllm_pack.errors import UsageError

    try:
        from medllm_pack.publish.transport import Access
    except ModuleNotFoundError as error:
        raise UsageError(
            f"registries need {error.name}: pip install 'medllm-pack[publish]'"
        ) from error
    return Access(
        insecure=insecure, ca=ca,
        allow_hosts=tuple(allow_hosts or ()), auth_hosts=tuple(auth_hosts or ()),
    )  # fmt: skip
