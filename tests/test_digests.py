"""A digest is sha256 and 64 lower-case hex digits, or it is refused: it may become a path."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_pack.digests import Digest
from medllm_pack.errors import DigestError

HEX = hashlib.sha256(b"").hexdigest()


@given(st.binary(max_size=64))
def test_text_of_a_digest_parses_to_the_same_digest(data: bytes) -> None:
    digest = Digest.of(data)
    assert Digest.parse(str(digest)) == digest
    assert str(digest) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert digest.file_name == str(digest).replace(":", "-")


@pytest.mark.parametrize(
    "text",
    [
        f"sha256-{HEX}", f"sha512:{HEX}", f"sha256:{HEX.upper()}", f"sha256:{HEX[:-1]}",
        f"sha256:{HEX}0", f"sha256:{HEX}\n", f" sha256:{HEX}", f"sha256:{HEX[:-1]}٣",
        f"sha256:{HEX[:-3]}/..", "sha256:../../etc/passwd", "sha256:", "", f"SHA256:{HEX}",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DigestError):
        Digest.parse(text)
    with pytest.raises(DigestError):
        Digest(text)
