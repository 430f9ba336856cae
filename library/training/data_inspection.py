"""The data-set report of a training's options: reads the data as the training would, without opening a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.data import sources
from library.data.config import resolve_datasets
from library.data.group import DatasetGroup, build_group
from library.data.inspection import Run, inspect
from library.data.support import SUPPORT, with_masks
from library.data.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, names_word, write_out
from library.messages import UserError, log
from library.options.config_file import unknown_message
from library.options.parser import Resolved, defaults, resolve
from library.options.registries import nearest
from library.options.scripts import SCRIPTS, find_script

# Stands for the word of a textual inversion that is not named.
WORD = "*"


def training_options(namespace: argparse.Namespace, script: str, own_script: str) -> Resolved:
    """The options as the training script reads them, checked by its rules, except that no model need be given.

    Args:
        namespace: of the report's own parser, which takes the options of every training script.
        script: the training script; options that it does not have are named in a warning.
        own_script: the report's script.

    Raises:
        UserError: no such training script, or options that it would refuse.
    """
    trainings = [name for name in SUPPORT if name in SCRIPTS and "optimizer" in SCRIPTS[name].concerns]
    if script not in trainings:
        near = nearest(script, trainings, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(trainings)}"
        raise UserError(f"--script {script} is no training script", hint)
    here, there = defaults(own_script), defaults(script)
    given = {name: value for name, value in vars(namespace).items() if name not in here or value != here[name]}
    own = {option.dest for option in dict(find_script(own_script).groups())["data_inspect"]}
    strange = [name for name in given if name not in there and name not in own]
    if strange:
        log.warning("%s", unknown_message(strange, there))
    values = {**there, **{name: value for name, value in given.items() if name in there}}
    # as for --debug_dataset, neither model nor output folder need be given; nor a word to learn
    word = values.get("token_string") or (WORD if "token_string" in there else None)
    namespace = argparse.Namespace(**{**values, "debug_dataset": True, **({"token_string": word} if word else {})})
    return resolve(namespace, script).replace(debug_dataset=False)


def inspect_options(
    options: Resolved, *, processes: int = 1, read_pictures: bool = True
) -> tuple[dict[str, Any], DatasetGroup]:
    """The report of a training's data, and the group that it is about.

    Args:
        options: of the training script.
        processes: that will train together.
        read_pictures: see `library.data.inspection.inspect`.

    Raises:
        UserError: a setting that a training would refuse.
    """
    if options.dataset.dataset_class:
        raise UserError("--dataset_class makes its own batches, there is nothing to report", "leave it out")
    support = with_masks(SUPPORT[options.script], bool(options.value("masked_loss")))
    settings = resolve_datasets(options.dataset, support=support, max_token_length=options.model.max_token_length)
    seed = options.loop.seed or 0
    scans = [sources.scan(one, seed=seed, skip_broken=True, check_pixels=False) for one in settings]
    group = build_group(settings, scans, tokenize=None, seed=seed)
    family = find_script(options.script).family
    run = Run(
        script=options.script,
        family=family,
        processes=processes,
        accumulation=options.loop.gradient_accumulation_steps,
        max_train_steps=options.loop.max_train_steps,
        max_train_epochs=options.loop.max_train_epochs,
        caches_latents=options.dataset.cache_latents,
    )
    trained = [scan for one, scan in zip(settings, scans, strict=True) if not one.is_validation]
    words = write_word(options, group)
    counter = token_counter(options.model.v2, options.model.tokenizer_cache_dir, words)
    facts = inspect(group, trained, run, count_tokens=counter, read_pictures=read_pictures)
    if words and not _has_templates(options) and not names_word(group, words[0]):
        text = f"no caption holds the word {words[0]}: it cannot be learned (name it, or use a template option)"
        facts["problems"].insert(0, {"level": "error", "text": text})
    return facts, group


def write_word(options: Resolved, group: DatasetGroup) -> list[str]:
    """Let captions name the word of a textual inversion as its training does; its tokens, none in other trainings."""
    if "embedding" not in options or options.embedding.token_string in (None, WORD):
        return []
    from library.models.embeddings import token_strings

    word = options.embedding.token_string
    tokens = token_strings(word, options.embedding.num_vectors_per_token)
    templates = OBJECT_TEMPLATES if options.embedding.use_object_template else STYLE_TEMPLATES
    write_out(group, word, tokens, templates if _has_templates(options) else None)
    return tokens


def _has_templates(options: Resolved) -> bool:
    return options.embedding.use_object_template or options.embedding.use_style_template


def token_counter(
    v2: bool, cache_dir: str | Path | None, words: Sequence[str] = ()
) -> Callable[[Sequence[str]], list[int]] | None:
    """Counts tokens with the family's tokenizer; None, and a warning with the reason, where it cannot be had.

    All families share one vocabulary, which comes with the program; nothing is downloaded.

    Args:
        v2: the model is Stable Diffusion 2.x.
        cache_dir: `--tokenizer_cache_dir`.
        words: that are one token each.
    """
    try:
        import ftfy  # noqa: F401 - the tokenizer uses it where it is installed
    except ImportError:
        log.warning("ftfy is not installed: captions with HTML entities or curly quotes may be counted a little wrong")
    try:
        from library.models.tokenizers import CLIP_L, OPENCLIP_H, load_tokenizer, text_ids

        tokenizer = load_tokenizer(OPENCLIP_H if v2 else CLIP_L, cache_dir)
        tokenizer.add_tokens(list(words))
    except (ImportError, UserError) as error:
        log.warning("tokens are not counted: %s", error)
        return None
    return lambda captions: [len(ids) for ids in text_ids(tokenizer, captions)]
