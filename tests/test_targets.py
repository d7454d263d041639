"""TARGET and REF texts: every form reads back, every hostile one is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from medllm_pack.digests import Digest
from medllm_pack.errors import DigestError, UsageError
from medllm_pack.publish.targets import (
    BundleTarget,
    HubTarget,
    RegistryTarget,
    checked_tag,
    parse_target,
)

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("oci://h:5000/ns/m", RegistryTarget("oci", "h:5000", "ns/m")),
        ("oci://h/a/b/c:7b-Q4_K_M", RegistryTarget("oci", "h", "a/b/c", "7b-Q4_K_M")),
        (f"oci://h/m@sha256:{HEX}", RegistryTarget("oci", "h", "m", None, Digest(HEX))),
        (f"oci://h/m:t@sha256:{HEX}", RegistryTarget("oci", "h", "m", "t", Digest(HEX))),
        ("oci://[::1]:5000/ns/m", RegistryTarget("oci", "[::1]:5000", "ns/m")),
        (
            "ollama://registry.ollama.ai/ns/m:t",
            RegistryTarget("ollama", "registry.ollama.ai", "ns/m", "t"),
        ),
        ("ollama://127.0.0.1:9/ns/m", RegistryTarget("ollama", "127.0.0.1:9", "ns/m")),
        ("hf://org/repo", HubTarget("org/repo")),
        ("hf://org/repo@v1.0", HubTarget("org/repo", "v1.0")),
        ("file://bundle.tar", BundleTarget(Path("bundle.tar"))),
        ("file:///mnt/stick/b.tar", BundleTarget(Path("/mnt/stick/b.tar"))),
    ],
)
def test_a_target_reads_back_as_it_prints(text: str, value: object) -> None:
    assert parse_target(text) == value
    assert str(parse_target(text)) == text


def test_ollama_names_have_a_default_host_and_its_registry_is_ollamas_by_any_scheme() -> None:
    short = parse_target("ollama://me/clinical-br:7b")
    assert short == RegistryTarget("ollama", "registry.ollama.ai", "me/clinical-br", "7b")
    assert parse_target("oci://registry.ollama.ai/me/clinical-br:7b") == short


@pytest.mark.parametrize(
    "text",
    [
        "", "oci", "oci://", "oci://h", "oci://h/", "oci:///ns/m", "docker://h/ns/m", "/ns/m",
        "oci://h/NS/m", "oci://h/ns/../m", "oci://h/ns//m", "oci://h/ns/m/", "oci://h/.ns/m",
        "oci://h/ns/m:", "oci://h/ns/m:-t", "oci://h/ns/m:t/x", "oci://h:99999/ns/m", "oci://h:/m",
        "oci://h h/ns/m", "oci://h/ns/m?x=1", "oci://h/ns/m#f", "oci://h/ns/m\n", "oci://ｈ/ns/m",
        "oci://h:٣/ns/m", f"oci://h/{'a' * 256}", f"oci://h/m:{'t' * 81}", "oci://h\\x/ns/m",
        "ollama://m", "ollama://a/b/c/d", "ollama://NS/m", "ollama://ns/m:t:u",
        "hf://org", "hf://org/repo/x", "hf://../repo", "hf://org/repo@", "hf://org/repo@../x",
        "hf://org/.git", "file://",
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digest", [f"sha256-{HEX}", f"SHA256:{HEX}", f"sha256:{HEX[:-1]}", "x"])
def test_only_one_form_of_digest_is_taken(digest: str) -> None:
    with pytest.raises(DigestError):
        parse_target(f"oci://h/ns/m@{digest}")


def test_a_login_in_a_target_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_target("oci://user:hunter2@h/ns/m")
    assert "hunter2" not in str(caught.value)


def test_a_tag_must_fit_registries_and_ollama() -> None:
    assert checked_tag("7b-Q4_K_M") == "7b-Q4_K_M"
    for tag in ("", ".x", "a b", "a/b", "é", "x" * 81):
        with pytest.raises(UsageError):
            checked_tag(tag)
