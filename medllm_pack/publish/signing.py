"""A signature over a whole pack, in OpenSSF's model signing format, with a key and offline.

``model.sig`` covers every file of the pack but itself: a changed, missing or extra file breaks it.
Anybody checks it with the model-signing library alone; keys are elliptic curve keys in PEM form.
The only door to that library. The password of a key comes from the caller and is kept nowhere.
"""

from __future__ import annotations

import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medllm_pack import files
from medllm_pack.errors import CheckFailedError, MedllmError, SourceError, UsageError, shown
from medllm_pack.pack import integrity
from medllm_pack.pack.shape import read_pack
from medllm_pack.pack.sums import SIGNATURE, read_sums
from medllm_pack.progress import SILENT, Reporter

_NEEDED = ("model_signing", "OpenSSL")


def require_extra() -> None:
    """Say how to install what is missing, if it is.

    Raises:
        MedllmError: with the command that installs it.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MedllmError(
            f"signing needs {', '.join(missing)}; run: pip install 'medllm-pack[sign]'"
        )


def sign(
    folder: Path,
    *,
    key: Path,
    password: str | None = None,
    replace: bool = False,
    report: Reporter = SILENT,
) -> Path:
    """Sign a pack and return its signature file.

    Args:
        folder: the pack.
        key: the private key, PEM, curve P-256, P-384 or P-521.
        password: of the key, if it has one.
        replace: whether an older signature may be replaced.
        report: listener.

    Raises:
        UsageError: if the pack is signed already, or the key cannot be used.
        CheckFailedError: if the pack is not whole; it is not signed then.
        WriteError: if the disk says no.
    """
    require_extra()
    read_pack(folder)
    target = folder / SIGNATURE
    if target.exists() and not replace:
        raise UsageError(f"{shown(folder)} is signed already; --force signs it again")
    _require_whole(folder, report)
    from model_signing import signing

    config = signing.Config().set_hashing_config(_hashing())
    try:
        config.use_elliptic_key_signer(
            private_key=key, password=password.encode() if password is not None else None
        )
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the key {shown(key)} cannot be used: {_fact(error)}; an elliptic curve key in PEM "
            "form is needed, and --password-env where it has a password"
        ) from error
    report.step("signing")
    # Beside the folder, so that the signature is not there while the files are being listed.
    partial = folder.absolute().parent / f".{folder.name}.sig-{secrets.token_hex(4)}"
    with files.translated(target, elsewhere="another place"):
        try:
            config.sign(folder, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        files.sync_folder(folder)
    return target


def check_signature(folder: Path, *, key: Path) -> str | None:
    """Return why a pack's signature does not hold; None if it does.

    Raises:
        UsageError: if the public key cannot be read.
    """
    require_extra()
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        return f"there is no {SIGNATURE}: the pack was not signed, or was changed since"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the key {shown(key)} cannot be used: {_fact(error)}; the signer's public key in PEM "
            "form is needed"
        ) from error
    config.set_hashing_config(_hashing())
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # whatever a foreign library says about foreign bytes, it is a no
        return f"{SIGNATURE} does not hold: {_fact(error)}"
    return None


def _hashing() -> Any:
    """Return what is signed: every file but the signature, those of git included."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _require_whole(folder: Path, report: Reporter) -> None:
    try:
        sums = read_sums(folder)
    except SourceError as error:
        raise CheckFailedError(f"{error}; it was not signed") from error
    faults = [*integrity.listing_faults(folder, sums),
              *integrity.digest_faults(folder, sums, report=report)]  # fmt: skip
    if faults:
        raise CheckFailedError(f"{faults[0]}; the pack is not what was built and was not signed")


def _fact(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
