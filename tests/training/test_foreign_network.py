"""A third party's network module trains through `--network_module`, unchanged."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
def test_lycoris_trains_and_its_file_is_loaded_again(train, algorithm: str) -> None:
    options = ("--network_module", "lycoris.kohya", "--network_args", f"algo={algorithm}", "preset=attn-mlp")
    first = train(*options, output="first", steps=2) / "x.safetensors"
    weights = load_file(first)
    assert any(key.startswith("lora_unet_") for key in weights)

    # a learning rate next to nothing: what comes out is what went in
    again = train(*options, "--network_weights", str(first), "--learning_rate", "1e-12", output="again", steps=1)
    for key, tensor in load_file(again / "x.safetensors").items():
        assert (tensor.float() - weights[key].float()).abs().max() < 1e-6, key
