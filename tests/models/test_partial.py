"""Text encoders opened without the rest of a model."""

from __future__ import annotations

import pytest
import torch

from library.messages import UserError
from library.models.family import family
from library.models.partial import load_sdxl_text_encoders, require_family


def test_encoders_equal_those_of_the_whole_model(tiny_sdxl, tiny_sd15, tmp_path):
    sdxl = family("sdxl")
    model = sdxl.load(tiny_sdxl, dtype=torch.bfloat16)
    sdxl.save(model, tmp_path / "folder", stability_layout=False)
    for source in (tiny_sdxl, tmp_path / "folder"):
        encoders = load_sdxl_text_encoders(source, dtype=torch.bfloat16)
        assert len(encoders) == 2 and not any(p.requires_grad for e in encoders for p in e.parameters())
        for ours, whole in zip(encoders, model.text_encoders, strict=True):
            state = whole.state_dict()
            assert ours.state_dict().keys() == state.keys() and not ours.training
            assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    with pytest.raises(UserError, match="is a model of Stable Diffusion 1"):
        load_sdxl_text_encoders(tiny_sd15, dtype=torch.float32)
    with pytest.raises(UserError, match="does not exist"):
        load_sdxl_text_encoders(tmp_path / "absent", dtype=torch.float32)


def test_other_families_are_refused(tiny_sdxl, tiny_sd15):
    require_family(tiny_sdxl, sdxl=True)
    require_family(tiny_sd15, sdxl=False)
    require_family("some/name", sdxl=True)  # of a hub: looked at when it is opened
    with pytest.raises(UserError, match="leave out --sdxl"):
        require_family(tiny_sd15, sdxl=True)
    with pytest.raises(UserError, match="add --sdxl"):
        require_family(tiny_sdxl, sdxl=False)
