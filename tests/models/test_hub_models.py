"""Models by their hub name, over a stand-in for the hub library: what is asked for, and what comes of it."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from library.messages import UserError
from library.models.family import family
from library.models.vae import load_vae


class FakeHub:
    """Repositories are folders below `root`; downloads are copies of the wanted files."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.wanted: list[str] = []
        self.is_online = True

    def list_repo_files(self, repository: str) -> list[str]:
        if not self.is_online:
            raise ConnectionError("no network")
        folder = self.root / repository
        if not folder.is_dir():
            raise FileNotFoundError(f"404: {repository}")
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def snapshot_download(
        self, repository: str, allow_patterns: list[str] | None = None, local_files_only: bool = False
    ) -> str:
        target = self.cache / repository
        if local_files_only:
            if not target.is_dir():
                raise FileNotFoundError(f"{repository} is not in the cache")
            return str(target)
        for name in self.list_repo_files(repository):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                self.wanted.append(name)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / repository / name, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_hub_model_is_the_local_one(hub, name, tiny_sd15, tiny_sdxl):
    own = family(name)
    model = own.load({"sd": tiny_sd15, "sdxl": tiny_sdxl}[name])
    repository = hub.root / "someone" / "model"
    own.save(model, repository, stability_layout=False)
    for path in list(repository.rglob("*.safetensors")):  # what need not be fetched
        path.with_name(f"{path.stem}.fp16.safetensors").write_bytes(b"half")
        path.with_suffix(".bin").write_bytes(b"pickle")
    (repository / "model.safetensors").write_bytes(b"a single file")
    again = own.load("someone/model")
    assert all(v.equal(model.unet.state_dict()[k]) for k, v in again.unet.state_dict().items())
    assert again.source == "someone/model" and not again.is_stability_layout
    weights = [n for n in hub.wanted if n.endswith((".safetensors", ".bin"))]
    parts = {"sd": 3, "sdxl": 4}[name]
    assert len(weights) == parts and not [n for n in weights if "fp16" in n or n.endswith(".bin") or "/" not in n]
    hub.is_online = False
    offline = own.load("someone/model")
    assert all(v.equal(model.unet.state_dict()[k]) for k, v in offline.unet.state_dict().items())


def test_only_the_variant_is_there(hub, tiny_sdxl):
    own = family("sdxl")
    model = own.load(tiny_sdxl)
    repository = hub.root / "someone" / "half"
    own.save(model, repository, stability_layout=False, dtype=torch.float16)
    for path in list(repository.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    again = own.load("someone/half")
    assert again.unet.dtype == torch.float32
    assert all(v.half().equal(model.unet.state_dict()[k].half()) for k, v in again.unet.state_dict().items())


def test_a_vae_alone(hub, tiny_sdxl):
    own = family("sdxl")
    model = own.load(tiny_sdxl)
    own.save(model, hub.root / "someone" / "model", stability_layout=False)
    shutil.copytree(hub.root / "someone" / "model" / "vae", hub.root / "someone" / "vae")
    for name in ("someone/vae", "someone/model"):
        vae = load_vae(name)
        assert all(v.equal(model.vae.state_dict()[k]) for k, v in vae.state_dict().items())
    with_other = own.load(tiny_sdxl, vae="someone/vae")
    assert with_other.vae.config.scaling_factor == own.latent_scale


def test_what_is_nowhere_is_named(hub):
    with pytest.raises(UserError, match=r"model someone/nothing is neither on this disk nor .* \(404"):
        family("sdxl").load("someone/nothing")
    hub.is_online = False
    with pytest.raises(UserError, match="no network"):
        family("sd").load("someone/nothing")
