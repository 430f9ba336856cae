"""Programs beside this one: LyCORIS as network module, diffusers as reader of our files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.messages import log
from library.models.family import family
from library.options.network_convert import NetworkConvertConfig
from networks import clients, converting, diffusers_format, dylora, lora, lora_fa, oft
from tests.networks.network_models import predict, randomize, small_text_encoder, small_unet

pytest.importorskip("peft")
pytest.importorskip("lycoris")


@pytest.mark.parametrize(
    "arguments", [{}, {"algo": "loha", "conv_dim": "4", "conv_alpha": "1"}, {"algo": "lokr", "factor": "4"}]
)
def test_lycoris_as_network_module(tmp_path: Path, arguments: dict[str, str]) -> None:
    """The calls of a training script in their order, then the file loaded again and merged."""
    module = importlib.import_module("lycoris.kohya")
    text_encoder, unet = small_text_encoder(), small_unet()
    network = module.create_network(
        1.0, 4, 1.0, None, text_encoder, unet, neuron_dropout=None, dropout=None, **arguments
    )
    network.apply_to(text_encoder, unet, True, True)
    before = predict(unet).detach()
    groups, names = network.prepare_optimizer_params(1e-4, 1e-2, 1e-3)
    assert names == ["textencoder", "unet"]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    network.prepare_grad_etc(text_encoder, unet)
    network.on_epoch_start(text_encoder, unet)
    for _ in range(2):
        predict(unet).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = predict(unet).detach()
    assert (trained - before).abs().max() > 1e-3

    file = tmp_path / "lycoris.safetensors"
    network.save_weights(str(file), torch.float32, {"ss_network_module": "lycoris.kohya"})
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in load_file(file))
    merges = (False, True) if not arguments else (False,)  # LyCORIS merges its other methods to other weights
    for merge in merges:
        text_encoder, unet = small_text_encoder(), small_unet()
        again, weights = module.create_network_from_weights(
            1.0, str(file), None, text_encoder, unet, for_inference=True
        )
        if merge:
            again.merge_to(text_encoder, unet, weights, torch.float32, "cpu")
        else:
            again.apply_to(text_encoder, unet, True, True)
            again.load_state_dict(weights, False)
        with torch.no_grad():
            torch.testing.assert_close(predict(unet), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "conv_alpha": "1.5"}])
def test_diffusers_loads_our_files(tmp_path: Path, tiny_sd15: Path, arguments: dict[str, str]) -> None:
    """A pipeline built from local parts gives our outputs with our file, text encoder included."""
    from diffusers import StableDiffusionPipeline

    sd = family("sd")
    model = sd.load(tiny_sd15)
    sd.save(model, tmp_path / "model", stability_layout=False)
    text_encoder, unet = model.text_encoders[0].eval(), model.unet.eval()
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, **arguments)
    network.apply_to(text_encoder, unet, True, True)
    randomize(network, 0.1)
    file = tmp_path / "ours.safetensors"
    network.save_weights(str(file), None, {"ss_network_module": "networks.lora"})

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None, local_files_only=True)
    ids = torch.arange(77)[None] * 7
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        ours_text = text_encoder(ids)[0]
        ours = unet(latents, time, ours_text).sample
        plain = pipeline.unet(latents, time, ours_text).sample
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        theirs_text = pipeline.text_encoder(ids)[0]
        theirs = pipeline.unet(latents, time, theirs_text).sample
    assert (plain - ours).abs().max() > 1e-2
    torch.testing.assert_close(theirs_text, ours_text, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def pipeline_of(name: str, folder: Path, model: Path) -> tuple[Any, Any]:
    """Our model, and diffusers' pipeline of the same weights."""
    import diffusers

    ours = family(name).load(model)
    family(name).save(ours, folder, stability_layout=False)
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    extra = {} if name == "sdxl" else {"safety_checker": None}
    return ours, kind.from_pretrained(folder, local_files_only=True, **extra)


@pytest.mark.parametrize("form", ["kohya", "kohya_diffusers_names", "diffusers", "peft"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_form_in_diffusers_and_peft(
    tmp_path: Path, tiny_sd15: Path, tiny_sdxl: Path, name: str, form: str
) -> None:
    """Our U-Net's output with a network is theirs with its file: alphas and convolutions included."""
    ours, pipeline = pipeline_of(name, tmp_path / "model", tiny_sdxl if name == "sdxl" else tiny_sd15)
    encoders = ours.text_encoders if name == "sdxl" else ours.text_encoders[0]
    network = lora.create_network(1.0, 4, 2.0, None, encoders, ours.unet, conv_dim="2", conv_alpha="1.5")
    network.apply_to(encoders, ours.unet, True, True)
    randomize(network, 0.1)
    network.eval()
    file, target = tmp_path / "own.safetensors", tmp_path / ("peft" if form == "peft" else "file.safetensors")
    network.save_weights(str(file), None, {})
    converting.convert_file(NetworkConvertConfig(model=str(file), save_to=str(target), to=form))

    generator = torch.Generator().manual_seed(0)
    width = ours.unet.config.cross_attention_dim
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 77, width)))
    time, ids = torch.tensor([300]), torch.arange(77)[None] * 7
    added: dict[str, Any] = {}
    if name == "sdxl":
        from library.models.unet_sdxl import size_embeddings

        pooled = torch.randn(1, ours.text_encoders[1].config.projection_dim, generator=generator)
        sizes = torch.tensor([[64.0, 64.0]]), torch.zeros(1, 2), torch.tensor([[64.0, 64.0]])
        vector = torch.cat([pooled, size_embeddings(*sizes)], 1)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.cat(sizes, 1)}}
    with torch.no_grad():
        expected = ours.unet(latents, time, text, vector) if name == "sdxl" else ours.unet(latents, time, text).sample
        plain = pipeline.unet(latents, time, text, **added).sample
        if form == "peft":
            from peft import PeftModel

            theirs = PeftModel.from_pretrained(pipeline.unet, target / "unet")(latents, time, text, **added).sample
        else:
            pipeline.load_lora_weights(tmp_path, weight_name=target.name)
            theirs = pipeline.unet(latents, time, text, **added).sample
            theirs_text = [pipeline.text_encoder(ids)[0]]
            theirs_text += [pipeline.text_encoder_2(ids)[0]] if name == "sdxl" else []
            for encoder, found in zip(ours.text_encoders, theirs_text, strict=True):
                torch.testing.assert_close(found, encoder(ids)[0], atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)


UP, DOWN = torch.zeros(4, 2), torch.zeros(2, 4)
Q = "down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"
SGM = "input_blocks_4_1_transformer_blocks_1_attn1_to_q"


def pair(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_up.weight": UP, f"{name}.lora_down.weight": DOWN, f"{name}.alpha": torch.tensor(1.0)}


# kind of file -> tensors of one
SAMPLES: dict[str, dict[str, torch.Tensor]] = {
    "LoRA": pair(f"lora_unet_{SGM}") | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    "SDXL LoRA in diffusers names": pair(f"lora_unet_{Q}") | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    "SD 1.x/2.x LoRA in Stability names": pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
    "LoRA in both styles of U-Net names": pair(f"lora_unet_{SGM.replace('4', '5')}") | pair(f"lora_unet_{Q}"),
    "OFT": {f"oft_unet_{SGM}.oft_blocks": UP, f"oft_unet_{SGM}.alpha": torch.tensor(1.0)},
    "ControlNet-LLLite": {f"lllite_unet_{SGM}.down.0.weight": UP},
    "LoRA with an embedding in it": pair(f"lora_unet_{SGM}") | {"bundle_emb.a.clip_l": UP},
    "LoHa": {f"lora_unet_{SGM}.hada_w1_a": UP, f"lora_unet_{SGM}.alpha": torch.tensor(1.0)},
    "LoKr": {f"lora_unet_{SGM}.lokr_w1": UP},
    "LoCon with Tucker decomposition": pair(f"lora_unet_{SGM}") | {f"lora_unet_{SGM}.lora_mid.weight": UP},
    "full weights or norms": {f"lora_unet_{SGM}.diff": UP},
    "DoRA": pair(f"lora_unet_{SGM}") | {f"lora_unet_{SGM}.dora_scale": UP},
    "LoRA of diffusers": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight": DOWN,
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_B.weight": UP,
    },
}


def module_of(key: str) -> str:
    """The path of a module from a key of any release of diffusers."""
    return re.split(r"[._]lora[._]", key)[0].replace(".processor", "")


@pytest.mark.parametrize("kind", list(SAMPLES))
def test_the_table_says_what_diffusers_does(kind: str) -> None:
    """Every kind of file through diffusers' real converter."""
    from types import SimpleNamespace

    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    weights = SAMPLES[kind]
    found = clients.file_kind(weights)
    assert found.name == kind
    is_sd = kind.startswith("SD 1.x")
    loader = StableDiffusionPipeline if is_sd else StableDiffusionXLPipeline
    config = {} if is_sd else {"unet_config": SimpleNamespace(layers_per_block=2)}
    try:
        state, _ = loader.lora_state_dict(dict(weights), **config)
        if not all("lora" in key for key in state):
            raise ValueError("Invalid LoRA checkpoint")
    except (ValueError, RuntimeError):
        assert found.verdict("diffusers") == "no"
        return
    modules = {module_of(key) for key in state}
    plain = {key: value for key, value in weights.items() if "dora_scale" not in key}
    expected = plain if kind == "LoRA of diffusers" else diffusers_format.from_kohya(plain)[0]
    wanted = {module_of(key) for key in expected}
    missing = wanted - modules
    is_changed = "partly" if missing < wanted else "no"
    is_whole = not missing and len(plain) == len(weights)
    assert found.verdict("diffusers") == ("loads" if is_whole else is_changed), (modules, missing)


def test_the_table_is_whole() -> None:
    names = [kind.name for kind in clients.ALL_KINDS]
    assert len(set(names)) == len(names)
    for kind in clients.ALL_KINDS:
        assert set(kind.loads) | set(kind.partly) <= set(clients.CLIENTS)
        assert not set(kind.loads) & set(kind.partly)


@pytest.mark.parametrize("module", [lora, lora_fa, dylora, oft])
def test_saving_says_once_who_can_load(
    tmp_path: Path, module: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    text_encoder, unet = small_text_encoder(), small_unet()
    network = module.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    with caplog.at_level("INFO", "toolkit"):
        for number in range(2):
            network.save_weights(str(tmp_path / f"{number}.safetensors"), None, {})
    said = [record.getMessage() for record in caplog.records if "loads in" in record.getMessage()]
    expected = (
        "OFT loads in A1111; not in diffusers, ComfyUI, LyCORIS, peft"
        if module is oft
        else "LoRA loads in diffusers, ComfyUI, A1111, LyCORIS; not in peft (networks/convert_lora.py --to peft makes a"
        " folder for it)"
    )
    assert said == [expected]


def test_lycoris_keys(tmp_path: Path) -> None:
    """Files that LyCORIS writes are told apart by their keys, and our methods say what they are."""
    module = importlib.import_module("lycoris.kohya")
    for algo, kind in {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}.items():
        text_encoder, unet = small_text_encoder(), small_unet()
        network = module.create_network(1.0, 4, 1.0, None, text_encoder, unet, algo=algo)
        network.apply_to(text_encoder, unet, True, True)
        file = tmp_path / f"{algo}.safetensors"
        network.save_weights(str(file), None, {})
        assert clients.file_kind(load_file(file)).name == kind
        assert clients.report(load_file(file))["LyCORIS"] == "loads"


def test_lycoris_reads_our_files(tmp_path: Path) -> None:
    """Every tensor of a plain LoRA of ours is taken by LyCORIS, with the same output."""
    module = importlib.import_module("lycoris.kohya")
    text_encoder, unet = small_text_encoder(), small_unet()
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, conv_dim="2", conv_alpha="1")
    network.apply_to(text_encoder, unet, True, True)
    randomize(network)
    network.eval()
    file = tmp_path / "ours.safetensors"
    network.save_weights(str(file), None, {})
    with torch.no_grad():
        expected = predict(unet)
    text_encoder, unet = small_text_encoder(), small_unet()
    theirs, weights = module.create_network_from_weights(1.0, str(file), None, text_encoder, unet)
    theirs.apply_to(text_encoder, unet, True, True)
    assert not theirs.load_state_dict(weights, False).unexpected_keys
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(predict(unet), expected, atol=1e-4, rtol=1e-4)


def test_the_page_has_the_table() -> None:
    """docs/networks.md shows what the table says."""
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")
    words = {"loads": "yes", "no": "no"}
    for kind in clients.ALL_KINDS:
        cells = [words.get(kind.verdict(c), f"partly: {kind.partly.get(c)}") for c in clients.CLIENTS]
        assert (f"| {kind.name} | {' | '.join(cells)} |" in page) == (kind is not clients.UNKNOWN), kind.name
