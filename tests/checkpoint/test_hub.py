"""Hub ids against a stand-in hub: what a download brings, and a clear outcome for everything that can go wrong."""

from __future__ import annotations

import errno
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoint_writer import moe_model, pt_tensors, write_checkpoint
from standin_hub import Repository, StandInHub

from tern.checkpoint import hub as hub_module
from tern.checkpoint import load_tensors, resolve_model
from tern.cli import main
from tern.errors import HubError

MODEL = "tern/little-ernie"
CUT_SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sharded checkpoint, with files beside it that nobody needs."""
    model = moe_model()
    directory = write_checkpoint(tmp_path_factory.mktemp("hub") / "files", model, pt_tensors(model), shards=3)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    useless = {
        "pytorch_model.bin": b"pickle",
        "modeling_ernie.py": b"raise SystemExit",
        "original/model.safetensors": b"",
    }
    return {**files, **useless, "README.md": b"# Little ERNIE", "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no settings or tokens of whoever runs the tests."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The client waits a second before it resumes a transfer; nothing here gets better by waiting.
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what HF_ENDPOINT sets, in this process, where huggingface_hub has read it already."""

    def point(endpoint: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


@pytest.fixture
def hub(checkpoint_files: dict[str, bytes], point_at: Callable[[str], None]) -> Iterator[StandInHub]:
    """A running hub with the checkpoint on branch `main` and a changed one on branch `next`."""
    changed = {**checkpoint_files, "generation_config.json": b'{"temperature": 0.25}'}
    stand_in = StandInHub({MODEL: Repository({"main": checkpoint_files, "next": changed})})
    point_at(stand_in.endpoint)
    yield stand_in
    stand_in.stop()


@pytest.mark.usefixtures("hub")
def test_download_brings_a_model_that_loads(cache: Path) -> None:
    source = resolve_model(MODEL)
    assert source.name == MODEL
    assert source.directory.is_relative_to(cache)
    expected = pt_tensors(moe_model())
    assert torch.equal(load_tensors(source)["embed"], expected["model.embed_tokens.weight"])
    present = {path.name for path in source.directory.iterdir()}
    assert {"config.json", "tokenizer.json", CUT_SHARD} <= present
    assert not present & {"pytorch_model.bin", "modeling_ernie.py", "original", "README.md"}


def test_doctor_downloads_the_description_only(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", MODEL])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "download   0.0 GB in bfloat16" in said
    assert f"try        tern serve {MODEL}" in said
    fetched = [path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched == ["config.json"]
    source = resolve_model(MODEL)
    assert len(hub.transfers_of(CUT_SHARD)) == 1, "what doctor left in the cache is not taken for the whole model"
    assert load_tensors(source)
    with pytest.raises(SystemExit):
        main(["doctor", MODEL])
    assert "download " not in capsys.readouterr().out


def test_second_run_transfers_nothing(hub: StandInHub) -> None:
    resolve_model(MODEL)
    transfers = len(hub.transfers_of(CUT_SHARD))
    resolve_model(MODEL)
    assert len(hub.transfers_of(CUT_SHARD)) == transfers == 1


def test_revision_selects_a_branch_or_a_commit(hub: StandInHub) -> None:
    assert resolve_model(MODEL).generation.temperature is None
    assert resolve_model(MODEL, revision="next").generation.temperature == 0.25
    commit = hub.repositories[MODEL].commit("next")
    assert resolve_model(MODEL, revision=commit).generation.temperature == 0.25


def test_transfer_that_breaks_off_resumes_where_it_stopped(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.repositories[MODEL].cut_after[CUT_SHARD] = [5000, 3000]
    source = resolve_model(MODEL)
    assert hub.transfers_of(CUT_SHARD) == [None, "bytes=5000-", "bytes=8000-"]
    content = hub.repositories[MODEL].branches["main"][CUT_SHARD]
    assert (source.directory / CUT_SHARD).read_bytes() == content


def test_run_after_a_failed_one_keeps_the_complete_files(hub: StandInHub) -> None:
    repository = hub.repositories[MODEL]
    repository.cut_after[CUT_SHARD] = [0] * 50
    with pytest.raises(HubError, match=r"broke off .*run again"):
        resolve_model(MODEL)
    repository.cut_after.clear()
    hub.requests.clear()
    load_tensors(resolve_model(MODEL))
    assert hub.transfers_of(CUT_SHARD) == [None]
    assert len([1 for method, path, _ in hub.requests if method == "GET" and "safetensors" in path]) <= 3


def test_private_model_needs_its_token(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[MODEL].token = "hf_right"
    with pytest.raises(HubError, match=r"no model tern/little-ernie, or it is private.*HF_TOKEN"):
        resolve_model(MODEL)
    with pytest.raises(HubError, match=r"refused the token"):
        resolve_model(MODEL, token="hf_wrong")
    assert resolve_model(MODEL, token="hf_right").name == MODEL
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert resolve_model(MODEL).name == MODEL


def test_token_never_stands_in_a_message(hub: StandInHub) -> None:
    hub.repositories[MODEL].token = "hf_right"
    with pytest.raises(HubError) as caught:
        resolve_model(MODEL, token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_gated_model_says_where_to_accept_the_terms(hub: StandInHub) -> None:
    hub.repositories[MODEL].gated = True
    with pytest.raises(HubError, match=rf"is gated: accept its terms at {hub.endpoint}/{MODEL}"):
        resolve_model(MODEL, token="hf_any")


@pytest.mark.usefixtures("hub")
def test_unknown_model_and_unknown_revision() -> None:
    with pytest.raises(HubError, match="has no model tern/nothing"):
        resolve_model("tern/nothing")
    with pytest.raises(HubError, match="has no revision 'v9'"):
        resolve_model(MODEL, revision="v9")


def test_failing_server_is_named_with_its_status(hub: StandInHub) -> None:
    hub.repositories[MODEL].status = 403
    with pytest.raises(HubError, match=r"HTTP 403"):
        resolve_model(MODEL)


def test_endpoint_that_is_no_hub(hub: StandInHub) -> None:
    hub.page = b"<html>Welcome to this hotel's network!</html>"
    with pytest.raises(HubError, match=rf"Downloading {MODEL} from {hub.endpoint} broke off"):
        resolve_model(MODEL)


def test_offline_uses_the_cache_or_says_so(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set and none of tern/little-ernie"):
            resolve_model(MODEL)
    resolve_model(MODEL)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "embed" in load_tensors(resolve_model(MODEL))
    assert hub.requests == []


def test_offline_with_half_a_model_says_so(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[MODEL].cut_after[CUT_SHARD] = [0] * 50
    with pytest.raises(HubError):
        resolve_model(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="only part of tern/little-ernie"):
        resolve_model(MODEL)


@pytest.mark.usefixtures("hub")
def test_no_network(point_at: Callable[[str], None]) -> None:
    resolve_model(MODEL)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    point_at(dead)
    assert "embed" in load_tensors(resolve_model(MODEL)), "what was downloaded before is used"
    with pytest.raises(HubError, match=rf"{dead} cannot be reached and none of tern/other"):
        resolve_model("tern/other")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "/cache may not be written.*HF_HOME"),
    ],
)
def test_disk_trouble(monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub_module, "snapshot_download", fail)
    with pytest.raises(HubError, match=sentence):
        resolve_model(MODEL)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_terminals_only(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "progress_bar_states", {})
    shown = {}
    for wanted, stream in ((True, _Terminal()), (False, _Terminal()), (True, io.StringIO())):
        revision = hub.repositories[MODEL].commit("main") if not shown else "next" if len(shown) == 1 else "main"
        monkeypatch.setattr(sys, "stderr", stream)
        resolve_model(MODEL, revision=revision, progress=wanted)
        shown[(wanted, stream.isatty())] = stream.getvalue()
    assert "Fetching" in shown[(True, True)]
    assert shown[(False, True)] == shown[(True, False)] == ""


def test_the_environment_rules_without_hf_xet(hub: StandInHub, tmp_path: Path) -> None:
    """A fresh process, told by the client's own variables, with the xet transfer made unimportable."""
    program = (
        "import sys; sys.modules['hf_xet'] = None\n"
        "from tern.checkpoint import resolve_model\n"
        "from tern.errors import HubError\n"
        f"print(resolve_model({MODEL!r}).directory)\n"
    )
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    assert done.stderr == "", "nothing is drawn where stderr is no terminal"
