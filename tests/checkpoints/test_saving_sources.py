"""From an FP8 or GGUF checkpoint through a run to what plain transformers loads."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunebench.models.hashing import hash_weights
from prunebench.results.store import ResultStore
from prunebench.testing import tiny_model
from tests.factories import line_of_run
from tests.gguf_files import write_gguf
from tests.model_folders import with_blocks_ahead
from tests.ways_in import to_fp8


def scored(tmp_path):
    return ResultStore(tmp_path / "results").read()[0][-1].model.evaluated_sha256


@pytest.mark.parametrize("weights", ["resident", "disk"])
def test_an_fp8_checkpoint_is_saved_as_what_was_scored(
    cli, tmp_path, eval_file, byte_tokenizer, weights
):
    """With what the text model does not use, which is dequantized like all else."""
    model = with_blocks_ahead(tmp_path / "model", byte_tokenizer)
    to_fp8(model)
    line = line_of_run(model, "out", eval_file, "--weights", weights)
    cli(*line, "--results-dir", tmp_path / "results")
    loaded = AutoModelForCausalLM.from_pretrained("out")
    assert hash_weights(loaded) == scored(tmp_path)
    assert "quantization_config" not in Path("out/config.json").read_text()
    cli("export", "out", "-o", "packed", "--to", "packed24")
    cli("export", "packed", "-o", "back", "--to", "dense")
    assert hash_weights(AutoModelForCausalLM.from_pretrained("back")) == scored(tmp_path)


def test_a_gguf_file_is_saved_as_what_was_scored_with_a_clean_tokenizer(cli, tmp_path, eval_file):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    for _ in range(2):  # the second time from a folder in the cache as older versions made it
        line = line_of_run(file, "out", eval_file, "--force")
        cli(*line, "--results-dir", tmp_path / "results")
        assert hash_weights(AutoModelForCausalLM.from_pretrained("out")) == scored(tmp_path)
        config = json.loads(Path("out/tokenizer_config.json").read_text())
        assert config.keys().isdisjoint({"is_local", "local_files_only", "name_or_path"})
        assert config.get("model_max_length", 0) < 1e20
        AutoTokenizer.from_pretrained("out")
        (dirty,) = (tmp_path / "cache" / "models").glob("*/tokenizer_config.json")
        dirty.write_text(json.dumps(config | {"is_local": True, "model_max_length": int(1e30)}))
