"""The textual inversion scripts on the tiny models: files, samples, resume, hooks, formats, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library import messages
from library.generation.embeddings import add_embeddings, read_embeddings
from library.generation.engine import Engine
from library.generation.request import ImageRequest
from library.messages import UserError
from library.models.embedding_files import XTI_LAYERS
from library.models.embeddings import rows_of, token_table
from library.models.family import LoadedModel, family
from library.options.parser import parse
from library.training import assemble
from library.training.recipes.embedding import EmbeddingRecipe
from library.training.textual_inversion_trainer import (
    LayeredInversionTrainer,
    SdxlTextualInversionTrainer,
    TextualInversionTrainer,
)

DATA = Path(__file__).parents[1] / "reference" / "data"
KEYS = {
    TextualInversionTrainer: {"emb_params"},
    SdxlTextualInversionTrainer: {"clip_l", "clip_g"},
    LayeredInversionTrainer: set(XTI_LAYERS),
}
WORDS = 49408


@pytest.fixture
def models(tiny_sd15: Path, tiny_sdxl: Path) -> dict[str, Path]:
    return {"sd": tiny_sd15, "sdxl": tiny_sdxl}


@pytest.fixture
def arguments(models: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    """The namespace of a small run."""

    def make(trainer: Any, *options: str, output: str = "out", steps: int = 2) -> Any:
        argv = [
            *("--pretrained_model_name_or_path", str(models[trainer.family_name])),
            *("--train_data_dir", str(DATA / "ti"), "--caption_extension", ".txt", "--resolution", "64,64"),
            *("--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "64", "--train_batch_size", "2"),
            *("--learning_rate", "1e-2", "--seed", "1", "--max_data_loader_n_workers", "0"),
            *("--output_dir", str(tmp_path / output), "--token_string", "zqx", "--max_train_steps", str(steps)),
            *("--save_model_as", "safetensors", "--num_vectors_per_token", "2", *options),
        ]
        return parse(trainer.script, argv)

    return make


@pytest.fixture
def teach(arguments: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Run a training; returns its output folder."""

    def run(trainer: Any, *options: str, output: str = "out", steps: int = 2) -> Path:
        trainer.train(arguments(trainer, *options, output=output, steps=steps))
        return tmp_path / output

    return run


@pytest.fixture
def built(arguments: Callable[..., Any]) -> Callable[..., Any]:
    """A run before its first step."""

    def make(trainer: Any, *options: str) -> Any:
        trainer.run = assemble.build_run(EmbeddingRecipe(trainer), arguments(trainer, *options))
        return trainer.run

    return make


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(messages.log, "propagate", True)
    return caplog


@pytest.mark.parametrize("kind", KEYS)
def test_whole_run(kind: type, teach: Callable[..., Path], models: dict[str, Path], tmp_path: Path) -> None:
    """Files named after the word, samples that know it, an exact resume; the file works in pictures and diffusers."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zqx --n zqx --w 64 --h 64 --s 1 --d 5", encoding="utf-8")
    sampling = ("--sample_every_n_steps", "1", "--sample_prompts", str(prompts))
    out = teach(kind(), *sampling, "--save_every_n_steps", "1", "--save_state", "--init_word", "red circle")
    tensors = load_file(out / "zqx.safetensors")
    assert tensors.keys() == KEYS[kind]
    assert {tuple(table.shape) for table in tensors.values()} == {(2, 64)}
    with safe_open(out / "zqx.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "zqx"
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")
    assert not [key for key in metadata if key.startswith("ss_")]

    samples = sorted((out / "sample").glob("*.png"))
    assert len(samples) == 2
    assert Image.open(samples[0]).tobytes() != Image.open(samples[1]).tobytes(), "the word has changed in between"

    early = load_file(out / "zqx-step00000001.safetensors")
    assert any(not torch.equal(early[key], tensors[key]) for key in tensors)
    rest = load_file(
        teach(kind(), "--resume", str(out / "zqx-step00000001-state"), "--init_word", "red circle", output="rest")
        / "zqx.safetensors"
    )
    assert [key for key in tensors if not torch.equal(rest[key], tensors[key])] == []

    use_in_pictures(kind, out / "zqx.safetensors", tensors, models, samples[1])
    if not kind.layered:
        use_in_diffusers(kind, tensors, models)


def use_in_pictures(
    kind: Any, path: Path, tensors: dict[str, torch.Tensor], models: dict[str, Path], sample: Path
) -> None:
    """The file's rows are in the text encoder, and the picture is the sample that the training drew last."""
    own = family(kind.family_name)
    model = own.load(models[kind.family_name])
    files = (None, [str(path)]) if kind.layered else ([str(path)], None)
    words = add_embeddings(model, read_embeddings(*files))
    request = ImageRequest(
        prompt="a zqx", negative_prompt="zqx", width=64, height=64, steps=1, scale=7.5, seed=5, sampler="ddim"
    )
    drawn = Engine(own, model, words=words, max_chunks=3).generate([request])[0]
    difference = np.asarray(drawn, dtype=int) - np.asarray(Image.open(sample), dtype=int)
    assert np.abs(difference).max() <= 1
    first = WORDS + 2 * kind.layered
    key = {"sdxl": "clip_l", "sd": "IN01" if kind.layered else "emb_params"}[kind.family_name]
    assert torch.equal(rows_of(model.text_encoders[0], [first, first + 1]), tensors[key])


def use_in_diffusers(kind: Any, tensors: dict[str, torch.Tensor], models: dict[str, Path]) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: ClassVar[dict[str, Any]] = {}

    model = family(kind.family_name).load(models[kind.family_name])
    for index, (encoder, tokenizer) in enumerate(zip(model.text_encoders, model.tokenizers, strict=True)):
        table = tensors.get(("clip_l", "clip_g")[index], tensors.get("emb_params"))
        Pipeline().load_textual_inversion({"zqx": table}, token="zqx", tokenizer=tokenizer, text_encoder=encoder)
        assert torch.equal(rows_of(encoder, [WORDS, WORDS + 1]), table)


class Foreign(SdxlTextualInversionTrainer):
    """Overrides every hook as a third party would, by the arguments of sd-scripts 0.7.0."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.seen: dict[str, Any] = {}

    def load_tokenizer(self, args):
        self.calls.append("load_tokenizer")
        return super().load_tokenizer(args)

    def assert_token_string(self, token_string, tokenizers):
        self.calls.append("assert_token_string")
        assert (token_string, len(tokenizers)) == ("zqx", 2)

    def load_target_model(self, args, weight_dtype, accelerator):
        self.calls.append("load_target_model")
        version, encoders, vae, unet = super().load_target_model(args, weight_dtype, accelerator)
        assert isinstance(encoders, list)
        return version, encoders, vae, unet

    def load_weights(self, file):
        self.calls.append("load_weights")
        return [torch.full((2, 64), 0.5), None]

    def assert_extra_args(self, args, train_dataset_group):
        self.calls.append("assert_extra_args")
        super().assert_extra_args(args, train_dataset_group)

    def get_text_cond(self, args, accelerator, batch, tokenizers, text_encoders, weight_dtype):
        self.calls.append("get_text_cond")
        with torch.enable_grad():
            return super().get_text_cond(args, accelerator, batch, tokenizers, text_encoders, weight_dtype)

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype):
        self.calls.append("call_unet")
        assert len(text_conds) == 3
        assert all(states.requires_grad for states in text_conds)
        return super().call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype)

    def sample_images(
        self, accelerator, args, epoch, global_step, device, vae, tokenizer, text_encoder, unet, prompt_replacement
    ):
        self.calls.append("sample_images")
        self.seen["sample"] = (len(tokenizer), len(text_encoder), prompt_replacement)

    def save_weights(self, file, updated_embs, save_dtype, metadata):
        self.calls.append("save_weights")
        self.seen["saved"] = ([tuple(table.shape) for table in updated_embs], save_dtype, sorted(metadata)[0])
        save_file({"mine": updated_embs[0]}, file)

    def generate_step_logs(self, *_: Any, **__: Any) -> dict:
        raise AssertionError("the embedding trainers have no such hook")


def test_overridden_hooks(teach: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "start.pt").touch()
    trainer = Foreign()
    out = teach(trainer, "--weights", str(tmp_path / "start.pt"), "--save_precision", "fp16", steps=1)
    before = trainer.calls.index("get_text_cond")
    assert trainer.calls[:2] == ["load_tokenizer", "assert_token_string"]
    assert set(trainer.calls[:before]) == {
        *("load_tokenizer", "assert_token_string", "load_target_model", "load_weights", "assert_extra_args")
    }
    assert trainer.calls[before:] == ["get_text_cond", "call_unet", "sample_images", "sample_images", "save_weights"]
    assert trainer.seen["sample"] == (2, 2, ("zqx", "zqx zqx1"))
    shapes, dtype, key = trainer.seen["saved"]
    assert (shapes, dtype) == ([(2, 64), (2, 64)], torch.float16)
    assert key.startswith("modelspec.")
    start = load_file(out / "zqx.safetensors")["mine"]
    assert (start - 0.5).abs().max() < 0.02


def test_start_from_a_file(built: Callable[..., Any], tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(2, 64)
    torch.save({"string_to_param": nn.ParameterDict({"*": nn.Parameter(rows)})}, tmp_path / "a.pt")
    (found,) = built(TextualInversionTrainer(), "--weights", str(tmp_path / "a.pt")).target.rows()
    assert torch.equal(found, rows)

    torch.save({layer: rows + number for number, layer in reversed(list(enumerate(XTI_LAYERS)))}, tmp_path / "x.pt")
    (found,) = built(LayeredInversionTrainer(), "--weights", str(tmp_path / "x.pt")).target.rows()
    assert torch.equal(found.reshape(16, 2, 64), torch.stack([rows + number for number in range(16)]))

    save_file({"clip_g": rows}, tmp_path / "g.safetensors")
    options = ("--weights", str(tmp_path / "g.safetensors"), "--init_word", "red")
    run = built(SdxlTextualInversionTrainer(), *options)
    first, second = run.target.rows()
    assert torch.equal(second, rows)
    red = run.target.model.tokenizers[0]("red", add_special_tokens=False)["input_ids"]
    assert torch.equal(first, rows_of(run.target.model.text_encoders[0], red * 2))
    assert "has no vectors for text encoder 1" in warnings.text


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (TextualInversionTrainer, {"emb_params": torch.zeros(3, 64)}, "3 vectors, --num_vectors_per_token is 2"),
        (TextualInversionTrainer, {"emb_params": torch.zeros(2, 768)}, r"768 numbers \(those of SD 1.x\)"),
        (TextualInversionTrainer, dict.fromkeys(XTI_LAYERS, torch.zeros(2, 64)), "is an XTI file"),
        (LayeredInversionTrainer, dict.fromkeys(XTI_LAYERS, torch.zeros(1, 64)), "1 vectors, --num_vectors_per_token"),
        (LayeredInversionTrainer, {"emb_params": torch.zeros(2, 64)}, "an XTI file is needed"),
        (SdxlTextualInversionTrainer, {"emb_params": torch.zeros(2, 64)}, "an SDXL embedding is needed"),
    ],
)
def test_files_that_do_not_fit(
    kind: type, content: Any, message: str, built: Callable[..., Any], tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        built(kind(), "--weights", str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--token_string", "cat"), "'cat' is a token of the tokenizer already"),
        (("--token_string", " "), "--token_string missing"),
        (("--num_vectors_per_token", "0"), "--num_vectors_per_token 0 is below 1"),
        (("--init_word", ""), "--init_word is empty"),
        (("--token_string", "a/b"), "--token_string a/b cannot be a file name"),
        (("--weights", "none.pt"), r"--weights none\.pt: there is no such file"),
        (("--cache_latents", "--color_aug"), "latents cannot be cached with color_aug"),
    ],
)
def test_options_that_cannot_work(options: tuple[str, ...], message: str, built: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=message):
        built(TextualInversionTrainer(), *options)


def test_a_word_that_no_caption_names(built: Callable[..., Any], warnings: pytest.LogCaptureFixture) -> None:
    built(TextualInversionTrainer(), "--token_string", "qqq", "--dry_run")
    assert "no caption holds the word qqq" in warnings.text
    warnings.clear()
    built(TextualInversionTrainer(), "--token_string", "qqq", "--use_style_template", "--dry_run")
    built(TextualInversionTrainer(), "--token_string", "qqq", "--caption_prefix", "qqq", "--dry_run")
    assert "no caption holds" not in warnings.text


def test_only_the_new_rows_change_in_half_precision(built: Callable[..., Any]) -> None:
    """With gradient checkpointing; the optimizer decays whole tables, and all other rows come back bit by bit."""
    from library.training import loop

    options = ("--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing", "--init_word", "red")
    run = built(SdxlTextualInversionTrainer(), *options, "--optimizer_args", "weight_decay=0.5")
    before = [table.detach().clone() for table in run.target.tables]
    loop.train(run)
    for table, old in zip(run.target.tables, before, strict=True):
        assert table.dtype == torch.bfloat16
        assert torch.equal(table[:WORDS], old[:WORDS])
        assert not torch.equal(table[WORDS:], old[WORDS:])


def test_logs_and_what_is_never_written(built: Callable[..., Any], tmp_path: Path) -> None:
    from library.training import loop

    run = built(TextualInversionTrainer(), "--save_model_as", "pt")
    logs: list[dict[str, Any]] = []
    run.log.log_to = lambda values, step: logs.append(values)
    loop.train(run)
    assert {"loss", "lr"} <= logs[0].keys()
    assert "loss/epoch" in logs[-1]
    assert torch.load(tmp_path / "out" / "zqx.pt", weights_only=True).keys() == {"emb_params"}

    run.target.rows()[0].fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        run.target.save(tmp_path / "bad.pt", None, {}, epoch=1, step=1)
    assert not (tmp_path / "bad.pt").exists()


def test_state_of_sd_scripts(built: Callable[..., Any]) -> None:
    """Its folders hold the whole text encoder."""
    run = built(TextualInversionTrainer())
    encoder = run.target.model.text_encoders[0]
    state = {key: torch.ones_like(value) for key, value in encoder.state_dict().items()}
    run.target.load_prepared([state])
    table = token_table(encoder).weight
    assert torch.equal(table[WORDS:], torch.ones(2, 64))
    assert not torch.equal(table[:2], torch.ones(2, 64))
    with pytest.raises(ValueError, match="a token table of"):
        run.target.load_prepared([{"a.embeddings.token_embedding.weight": torch.ones(5, 64)}])


def test_old_functions_of_the_scripts(tmp_path: Path) -> None:
    import train_textual_inversion
    import train_textual_inversion_XTI as layered

    assert len(train_textual_inversion.imagenet_templates_small) == 27
    assert len(layered.imagenet_style_templates_small) == 19
    rows = torch.randn(32, 8)
    layered.save_weights(str(tmp_path / "x.safetensors"), rows, torch.float32)
    assert torch.equal(layered.load_weights(str(tmp_path / "x.safetensors")), rows)
    assert load_file(tmp_path / "x.safetensors")["MID"].shape == (2, 8)


def test_opened_model_is_untouched_by_another_word(built: Callable[..., Any]) -> None:
    """Two words one after the other: each starts with its own tokenizers."""
    first: LoadedModel = built(TextualInversionTrainer()).target.model
    second: LoadedModel = built(TextualInversionTrainer(), "--token_string", "qqq").target.model
    assert "qqq" not in first.tokenizers[0].get_vocab()
    assert "zqx" not in second.tokenizers[0].get_vocab()


@pytest.mark.parametrize("kind", [SdxlTextualInversionTrainer, LayeredInversionTrainer])
def test_a_micro_step_reads_nothing_from_the_device(kind: type, built: Callable[..., Any]) -> None:
    from benchmarks.counting import count
    from library.training import loop

    run = built(kind(), "--use_object_template")
    plan = run.feed.plan(1)
    batch, place = next(iter(run.feed.batches(plan, 0, 0))), run.feed.place(1, 0)

    def step() -> None:
        loop.micro_step(run, batch, place, last=True)
        run.target.reduce_gradients(run.processes)
        run.target.on_step_end()

    assert count(step).host_reads == 0
