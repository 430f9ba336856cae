"""`--debug_dataset` from a script's options: contact sheets in the output folder, token ids where words are new."""

from __future__ import annotations

import pytest

from library.options.parser import parse
from library.training.network_trainer import NetworkTrainer
from library.training.textual_inversion_trainer import TextualInversionTrainer

WORD = ["--token_string", "zqx", "--num_vectors_per_token", "2", "--init_word", "cat", "--use_object_template"]


@pytest.mark.parametrize(
    ("script", "trainer", "more", "says_ids"),
    [
        ("train_network.py", NetworkTrainer, ["--network_module", "networks.lora"], False),
        ("train_textual_inversion.py", TextualInversionTrainer, WORD, True),
    ],
)
def test_debug_view(script, trainer, more, says_ids, reference, tmp_path, caplog):
    data = ["--train_data_dir", str(reference / "data" / "train"), "--caption_extension", ".txt"]
    size = ["--resolution", "128", "--enable_bucket", "--min_bucket_reso", "64", "--max_bucket_reso", "256"]
    argv = [*data, *size, *more, "--debug_dataset", "--output_dir", str(tmp_path / "out"), "--seed", "1"]
    with caplog.at_level("INFO"):
        trainer().train(parse(script, argv))
    assert ("49408, 49409" in caplog.text) == says_ids == ("zqx zqx1" in caplog.text)
    sheets = [path.name for path in (tmp_path / "out" / "debug_dataset").iterdir()]
    assert sheets and all(name.startswith("bucket_") for name in sheets)
