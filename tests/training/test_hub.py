"""Uploads and states on the hub, against recorded calls, with a stand-in for the client."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from library.messages import UserError
from library.options.hub import HubConfig
from library.training import hub, saving
from tests.conftest import GOLDEN, load_json

CASES = load_json(GOLDEN / "training_uploads.json")["cases"]


@pytest.fixture
def client(monkeypatch):
    """Records the calls; no repository is visible. `files` are what a visible one holds."""
    calls, files = [], []
    state = SimpleNamespace(calls=calls, files=files, visible=False, fail=None)

    class Api:
        def __init__(self, token=None):
            state.token = token

        def repo_info(self, **kwargs):
            calls.append(["repo_info", kwargs])
            if not state.visible:
                raise RuntimeError("404")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

        def create_repo(self, **kwargs):
            calls.append(["create_repo", kwargs])

        def upload_file(self, **kwargs):
            if state.fail:
                raise state.fail
            calls.append(["upload_file", kwargs])

        def upload_folder(self, **kwargs):
            calls.append(["upload_folder", kwargs])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    start = threading.Thread.start

    def started(thread):
        if thread.name.startswith("upload"):
            calls.append(["thread", {}])
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    return state


def short(calls):
    """Files and folders by their names only."""
    paths = ("path_or_fileobj", "folder_path")
    return [[kind, {k: Path(v).name if k in paths else v for k, v in kwargs.items()}] for kind, kwargs in calls]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_recorded_calls(index, client, tmp_path):
    case = CASES[index]
    options = {"huggingface_repo_id": "u/r", "huggingface_path_in_repo": "dir", **case["options"]}
    saves_state = options.pop("save_state", False)
    uploads = hub.Uploads(HubConfig(**options))
    stability = case["stability_layout"]
    ext = ".safetensors" if stability else ""
    names = {
        "epoch": saving.epoch_name("m", 1, ext),
        "step": saving.step_name("m", 5, ext),
        "end": saving.last_name("m", ext),
        "state": saving.last_state_name("m"),
    }
    path = tmp_path / names[case["save"]]
    if path.suffix:
        path.write_text("x")
    else:
        path.mkdir()
    if case["save"] == "state":
        uploads.send_state(path)
    else:
        uploads.send(path, last=case["save"] == "end")
    if saves_state:
        state = tmp_path / saving.epoch_state_name("m", 1)
        state.mkdir()
        uploads.send_state(state)
    uploads.wait()
    assert short(client.calls) == mended(case, path.name)


def mended(case, name):
    """The recorded calls, with folders under their own names and a destination where no folder is given."""
    calls = [[kind, dict(kwargs)] for kind, kwargs in case["calls"]]
    for kind, kwargs in calls:
        if kind == "upload_folder" and not kwargs["folder_path"].endswith("-state"):
            kwargs["path_in_repo"] = f"dir/{name}"
        if kind == "upload_file" and kwargs["path_in_repo"] is None:
            kwargs["path_in_repo"] = name
    return calls


def test_nothing_is_sent_without_a_repository(client, tmp_path):
    uploads = hub.Uploads(HubConfig(save_state_to_huggingface=True))
    uploads.send(tmp_path / "m.safetensors")
    uploads.send_state(tmp_path)
    assert client.calls == []


def test_states_are_sent_only_when_asked(client, tmp_path):
    hub.Uploads(HubConfig(huggingface_repo_id="u/r")).send_state(tmp_path)
    assert client.calls == []


def test_an_error_does_not_stop_the_run(client, tmp_path, caplog):
    client.fail = RuntimeError("quota")
    (tmp_path / "m.ckpt").write_text("x")
    hub.Uploads(HubConfig(huggingface_repo_id="u/r", huggingface_token="secret")).send(tmp_path / "m.ckpt")
    assert client.token == "secret"
    assert not any(kind == "upload_file" for kind, _ in client.calls)


def test_a_file_is_busy_until_its_upload_is_done(client, tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(hub, "_upload", lambda *args: release.wait(10))
    uploads = hub.Uploads(HubConfig(huggingface_repo_id="u/r", async_upload=True))
    path = tmp_path / "m-000001.safetensors"
    path.write_text("x")
    uploads.send(path)
    files = saving.SavedFiles()
    files.add(path, "epoch", 1)
    assert files.remove_until("epoch", 1, busy=uploads.is_busy) == []
    release.set()
    uploads.wait()
    assert files.remove_until("epoch", 1, busy=uploads.is_busy) == [str(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u/r/x-state", ("u/r", "x-state", None, None)),
        ("u/r/a/b-state", ("u/r", "a/b-state", None, None)),
        ("u/r/x-state:dev", ("u/r", "x-state", "dev", "model")),
        ("u/r/x-state:dev:dataset", ("u/r", "x-state", "dev", "dataset")),
    ],
)
def test_addresses(text, expected):
    assert hub.parse_state_address(text) == expected


@pytest.mark.parametrize("text", ["u/r", "u//x", "x", "u/r/x:a:b:c"])
def test_bad_addresses(text):
    with pytest.raises(UserError, match="USER/REPO/PATH"):
        hub.parse_state_address(text)


def test_a_state_is_fetched_as_a_folder(client, tmp_path, monkeypatch):
    client.visible = True
    names = ["run/x-state/run.json", "run/x-state/deep/optimizer.pt", "run/x-state2/run.json", "m.safetensors"]
    client.files.extend(names)
    fetched = []

    def download(**kwargs):
        fetched.append(kwargs)
        return str(tmp_path / "snapshot" / kwargs["filename"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    folder = hub.download_state("u/r/run/x-state:dev", "secret")
    assert folder == tmp_path / "snapshot" / "run" / "x-state"
    # a folder whose name only begins like it is not taken
    assert [kwargs["filename"] for kwargs in fetched] == names[:2]
    common = {"repo_id": "u/r", "revision": "dev", "repo_type": "model", "token": "secret"}
    assert all(common.items() <= kwargs.items() for kwargs in fetched)
    client.files[:] = client.files[1:]
    assert hub.download_state("u/r/run/x-state") == folder


def test_a_state_that_is_not_there(client):
    client.visible = True
    with pytest.raises(UserError, match="no folder x-state in u/r"):
        hub.download_state("u/r/x-state")
    client.visible = False
    with pytest.raises(UserError, match="404"):
        hub.download_state("u/r/x-state")
