"""verify and sign: no change goes unnoticed, and what says no never sounds like yes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medllm_pack.errors import MedllmError
from medllm_pack.pack import papers
from medllm_pack.progress import Silent
from medllm_pack.publish import signing
from medllm_pack.publish.signing import check_signature, sign
from medllm_pack.publish.verify import verify_pack
from tests import pico_packs as packs
from tests.test_bad_input import run

FLIPS = 40  # a file
LARGE = (
    pytest.mark.large,
    pytest.mark.skipif(
        os.environ.get("MEDLLM_TEST_LARGE") != "1", reason="minutes; set MEDLLM_TEST_LARGE=1"
    ),
)


def write_keys(
    folder: Path, name: str, *, curve: ec.EllipticCurve | None = None, password: bytes | None = None
) -> tuple[Path, Path]:
    """Write a new pair of keys and return their files."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "signer")


@pytest.fixture(scope="module")
def signed_once(
    tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, keys: tuple[Path, Path]
) -> Path:
    root = tmp_path_factory.mktemp("verify")
    recipe = packs.write_recipe(root / "recipe", llama_folder)
    pack = packs.make(root / "pack", recipe, quants=("q4_k_m",))
    packs.give_parity(pack)
    papers.update(pack, packs.document(pack), {})  # the papers that derive from the verdict
    sign(pack, key=keys[0], password=None, replace=False, report=Silent())
    return pack


@pytest.fixture
def pack(signed_once: Path, tmp_path: Path) -> Path:
    return packs.copy(signed_once, tmp_path / "another-name")


def verify(capsys: pytest.CaptureFixture[str], pack: Path, *options: str | Path) -> tuple[int, str]:
    code, out, err = run(["verify", str(pack), *map(str, options)], capsys)
    if code:
        assert not re.search(r"\b(ok|verified|valid)\b", out + err, re.IGNORECASE)
    return code, out + err


def test_a_whole_signed_pack_is_verified(
    pack: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = verify(capsys, pack, "--key", keys[1])
    assert code == 0
    assert "verified: no check says no" in said
    assert len(re.findall(r"^\S+ +yes ", said, re.MULTILINE)) == 11


@pytest.mark.parametrize("damaged", [False, True])
def test_the_commands_of_the_card_check_the_pack(
    pack: Path, keys: tuple[Path, Path], damaged: bool
) -> None:
    """As a reader of README.md runs them, in the pack, with the key beside it."""
    shutil.copy(keys[1], pack.parent / "signer.pub")
    program = pack.parent / "bin" / "medllm-pack"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m medllm_pack "$@"\n')
    program.chmod(0o755)
    card = (pack / "README.md").read_text(encoding="utf-8")
    _, _, section = card.partition("## Check it yourself")
    commands = section.split("```")[1].strip().splitlines()
    if damaged:
        path = pack / "Modelfile.q4_k_m"
        path.write_bytes(path.read_bytes().replace(b"FROM", b"from"))
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    codes = [
        subprocess.run(line, shell=True, cwd=pack, env=environment, check=False).returncode
        for line in commands
    ]
    assert codes == ([1, 3, 3] if damaged else [0, 0, 0])


def test_json_holds_every_check(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["verify", str(pack), "--json"], capsys)
    content = json.loads(out)
    assert (code, content["passed"]) == (0, True)
    assert {c["name"] for c in content["checks"]} >= {
        "files", "digests", "agreement", "headers", "papers", "licence", "parity", "signature",
    }  # fmt: skip


@pytest.mark.parametrize("flips", [FLIPS, pytest.param(2500, marks=LARGE)])
def test_every_flipped_bit_is_found(signed_once: Path, tmp_path: Path, flips: int) -> None:
    """Random places of every file, its first and last bytes among them; a header has more."""
    pack = packs.copy(signed_once, tmp_path / "flipped")
    chance, tried = random.Random(20261125), 0
    for path in sorted(pack.iterdir()):
        if path.name == "model.sig":
            continue  # the signature is its own check, below
        data = path.read_bytes()
        places = {0, len(data) - 1} | {chance.randrange(len(data)) for _ in range(flips)}
        if path.suffix == ".gguf":
            places |= {chance.randrange(4096) for _ in range(flips)}
        for place in sorted(places):
            _flip(path, place, bit := 1 << chance.randrange(8))
            verified = verify_pack(pack, key=None, report=Silent())
            assert verified.failed, f"{path.name}: byte {place}, bit {bit}"
            _flip(path, place, bit)
            tried += 1
    assert tried > 4 * flips
    print(f"{tried} flipped bits, all noticed")
    assert not verify_pack(pack, key=None, report=Silent()).failed


def _flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bit]))


def _changed(pack: Path) -> None:
    _flip(pack / "README.md", 100, 1)


def _weights(pack: Path) -> None:
    _flip(pack / "Pico-Q4_K_M.gguf", 500_000, 1)


def _extra(pack: Path) -> None:
    (pack / "payload.bin").write_bytes(b"x")


def _hidden(pack: Path) -> None:
    (pack / ".hidden").write_bytes(b"")


def _subfolder(pack: Path) -> None:
    (pack / "more").mkdir()


def _missing(pack: Path) -> None:
    (pack / "Modelfile.q4_k_m").unlink()


def _no_pack_json(pack: Path) -> None:
    (pack / "pack.json").unlink()


def _no_sums(pack: Path) -> None:
    (pack / "SHA256SUMS").unlink()


def _truncated(pack: Path) -> None:
    path = pack / "Pico-Q4_K_M.gguf"
    path.write_bytes(path.read_bytes()[:-1])


def _link(pack: Path) -> None:
    (pack / "README.md").rename(pack.parent / "README.md")
    (pack / "README.md").symlink_to(pack.parent / "README.md")


@pytest.mark.parametrize(
    "damage",
    [_changed, _weights, _extra, _hidden, _subfolder, _missing, _no_pack_json, _no_sums,
     _truncated, _link],
)  # fmt: skip
def test_damage_is_a_no(
    pack: Path, keys: tuple[Path, Path], damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    damage(pack)
    code, said = verify(capsys, pack)
    assert code == 3
    assert "NO" in said
    code, _ = verify(capsys, pack, "--key", keys[1])
    assert code == 3


def test_sums_written_anew_are_caught_by_the_signature_alone(
    pack: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (pack / "Modelfile.q4_k_m").write_text("FROM ./Pico-Q4_K_M.gguf\nSYSTEM evil\n")
    packs.reseal(pack)
    assert verify(capsys, pack)[0] == 0
    code, said = verify(capsys, pack, "--key", keys[1])
    assert code == 3
    assert "model.sig does not hold" in said


def test_a_wrong_key_is_a_no(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for curve in (ec.SECP256R1(), ec.SECP384R1()):
        _, other = write_keys(tmp_path, f"other{curve.key_size}", curve=curve)
        code, said = verify(capsys, pack, "--key", other)
        assert code == 3
        assert "signature  NO" in said


def test_unsigned_is_a_no_where_a_signature_is_asked_for(
    pack: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (pack / "model.sig").unlink()
    code, said = verify(capsys, pack, "--key", keys[1])
    assert code == 3
    assert "there is no model.sig" in said
    assert verify(capsys, pack)[0] == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"mediaType":1}', b"\xff\xfe"])
def test_a_broken_signature_is_a_no(
    pack: Path, keys: tuple[Path, Path], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (pack / "model.sig").write_bytes(content)
    assert verify(capsys, pack, "--key", keys[1])[0] == 3


def test_what_is_no_key_is_wrong_usage(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("absent", None), ("text", b"no key"), ("empty", b"")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        code, said = verify(capsys, pack, "--key", path)
        assert code == 2
        assert "cannot be used" in said


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_signs_and_verifies(
    pack: Path, tmp_path: Path, curve: ec.EllipticCurve
) -> None:
    private, public = write_keys(tmp_path, "k", curve=curve)
    sign(pack, key=private, password=None, replace=True, report=Silent())
    assert check_signature(pack, key=public) is None


def test_a_key_with_a_password(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = write_keys(tmp_path, "k", password=b"correct horse")
    arguments = ["sign", str(pack), "--key", str(private), "--force"]
    code, out, err = run(arguments, capsys)
    assert (code, "--password-env" in err) == (2, True)
    monkeypatch.setenv("KEY_PASSWORD", "wrong")
    assert run([*arguments, "--password-env", "KEY_PASSWORD"], capsys)[0] == 2
    monkeypatch.setenv("KEY_PASSWORD", "correct horse")
    code, out, err = run([*arguments, "--password-env", "KEY_PASSWORD"], capsys)
    assert code == 0
    assert "correct horse" not in out + err + (pack / "model.sig").read_text()
    assert check_signature(pack, key=public) is None
    assert run([*arguments, "--password-env", "ABSENT"], capsys)[0] == 2


def test_what_is_not_whole_is_not_signed(pack: Path, keys: tuple[Path, Path]) -> None:
    (pack / "model.sig").unlink()
    _changed(pack)
    with pytest.raises(MedllmError, match="not signed") as caught:
        sign(pack, key=keys[0], password=None, replace=False, report=Silent())
    assert caught.value.exit_code == 3
    assert not (pack / "model.sig").exists()
    assert list(pack.parent.glob(".*.sig-*")) == []


def test_a_signed_pack_is_not_signed_again_by_accident(
    pack: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["sign", str(pack), "--key", str(keys[0])], capsys)
    assert (code, "--force" in err) == (2, True)


def model_signing(*arguments: str | Path) -> int:
    """Run the command line of the model-signing library."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_the_library_s_own_command_accepts_ours(pack: Path, keys: tuple[Path, Path]) -> None:
    arguments = ("verify", "key", pack, "--signature", pack / "model.sig", "--public_key", keys[1])
    assert model_signing(*arguments) == 0
    _extra(pack)
    assert model_signing(*arguments) != 0


def test_we_accept_a_signature_of_the_library_s_own_command(
    pack: Path, keys: tuple[Path, Path]
) -> None:
    (pack / "model.sig").unlink()
    assert (
        model_signing(
            "sign", "key", pack, "--signature", pack / "model.sig", "--private_key", keys[0]
        )
        == 0
    )
    assert check_signature(pack, key=keys[1]) is None
    _changed(pack)
    assert check_signature(pack, key=keys[1]) is not None


def test_new_papers_remove_the_signature(pack: Path) -> None:
    papers.update(pack, packs.document(pack), {})
    assert not (pack / "model.sig").exists()


def test_a_failed_parity_is_a_no(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packs.give_parity(pack, q4_k_m=False)
    papers.update(pack, packs.document(pack), {})
    code, said = verify(capsys, pack)
    assert code == 3
    assert "parity     NO" in said


def test_papers_that_contradict_pack_json_are_a_no_from_the_same_version_only(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pack / "provenance.json").write_text("{}\n")
    packs.reseal(pack)
    code, said = verify(capsys, pack)
    assert (code, "papers     NO" in said) == (3, True)
    packs.change(pack, lambda content: content["tools"].update({"medllm-pack": "0.0.1"}))
    code, said = verify(capsys, pack)
    assert (code, "made by version '0.0.1'" in said) == (0, True)


def test_a_gguf_file_is_checked_against_the_sums_beside_it(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pack / "Pico-Q4_K_M.gguf"
    assert verify(capsys, path)[0] == 0
    _weights(pack)
    assert verify(capsys, path)[0] == 3
    alone = shutil.copy(path, tmp_path / "alone.gguf")
    code, said = verify(capsys, Path(alone))
    assert code == 0
    assert "no SHA256SUMS beside the file" in said
    (pack / "other.gguf").write_bytes(path.read_bytes())
    assert verify(capsys, pack / "other.gguf")[0] == 3


def test_what_does_not_exist_or_is_no_pack_could_not_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(capsys, tmp_path / "absent")[0] == 1
    (tmp_path / "empty").mkdir()
    assert verify(capsys, tmp_path / "empty")[0] == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("publish", ["publish", "{pack}", "oci://h/ns/m"]),
        ("publish", ["pull", "oci://h/ns/m", "--out", "back"]),
        ("publish", ["verify", "oci://h/ns/m"]),
        ("sign", ["sign", "{pack}", "--key", "absent.pem"]),
        ("sign", ["verify", "{pack}", "--key", "absent.pem"]),
    ],
)
def test_missing_extra_is_one_line_with_the_command(
    signed_once: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    extra: str, words: list[str],
) -> None:  # fmt: skip
    from medllm_pack.cli import registry

    monkeypatch.setattr(registry, "_NEEDED", ("httpx", "no_such_library"))
    monkeypatch.setattr(signing, "_NEEDED", ("no_such_library",))
    code, out, err = run([word.format(pack=signed_once) for word in words], capsys)
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (1, "")
    assert f"need no_such_library; run: pip install 'medllm-pack[{extra}]'" in line.replace(
        "needs", "need"
    )
