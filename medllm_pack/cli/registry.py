"""What the commands that talk to registries share: their options, and the extra they need."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medllm_pack.publish.transport import Access

_NEEDED = ("httpx", "cryptography")

InsecureOpt = Annotated[
    bool, typer.Option("--insecure", help="allow plain HTTP; this machine is always allowed")
]
CaOpt = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="a further authority to trust, in PEM")
]
AllowHostOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="HOST",
        help="local host the registry may send us to; may be repeated",
    ),
]
AuthHostOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--auth-host", metavar="HOST", help="token server that may see the login; may be repeated"
    ),
]


def access(
    insecure: bool, ca: Path | None, allow_hosts: list[str] | None, auth_hosts: list[str] | None
) -> Access:
    """Return the options as a value.

    Raises:
        MedllmError: if the extra is not installed, with the command that does.
    """
    from medllm_pack.errors import MedllmError

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MedllmError(
            f"registries need {', '.join(missing)}; run: pip install 'medllm-pack[publish]'"
        )
    from medllm_pack.publish.transport import Access

    return Access(
        insecure=insecure, ca=ca,
        allow_hosts=tuple(allow_hosts or ()), auth_hosts=tuple(auth_hosts or ()),
    )  # fmt: skip
