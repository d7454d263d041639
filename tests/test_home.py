"""A user without a home folder, as in a container that runs under any number."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from medllm_pack.errors import StoreAccessError, UsageError
from medllm_pack.home import expanded, home
from medllm_pack.ollama.store import Store, candidates
from medllm_pack.parity import cache
from medllm_pack.publish.credentials import exposed, ollama_key_path
from medllm_pack.state import state_folder


@pytest.fixture
def _homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry in passwd, which only another user could really lack."""

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "MEDLLM_CACHE", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_nothing_is_there_and_nothing_breaks() -> None:
    assert not home().exists()
    with pytest.raises(OSError, match="no-home"):
        home().mkdir(parents=True)  # not by root either
    for path in (state_folder(), cache.folder(), ollama_key_path(), candidates()[0]):
        assert path.is_relative_to(home())
    assert [*exposed("oci"), *exposed("ollama")] == []


@pytest.mark.usefixtures("_homeless")
def test_store_without_a_home_asks_for_one() -> None:
    with pytest.raises(StoreAccessError, match="no home folder .* set HOME, .* --store") as error:
        Store(candidates()[0]).check_access()
    assert "no-home" not in str(error.value)


def test_home_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match=r"'~niemand9/x\.toml' names a home folder that does not"):
        expanded("~niemand9/x.toml")
    assert expanded("~/x") == Path.home() / "x"
