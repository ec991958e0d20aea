"""Stderr is for our progress: no bars and logs of other libraries, and nothing with `-q`."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import prunebench
from prunebench.progress import quiet_libraries
from prunebench.testing import tiny_model

# One worker: the index of lm-eval's tasks takes seconds to build.
pytestmark = pytest.mark.xdist_group("lm-eval")

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "embed_tokens": "token_embd", "norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The tiny Llama and a byte tokenizer as one GGUF file."""
    import gguf
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny_model("llama")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(256)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens[250] = "ab"  # a merge makes a byte-pair tokenizer of it
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(255)
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        own = ".".join(parts[2:] if block else parts)
        writer.add_tensor(f"{block}{_GGUF_NAMES[own]}.weight", parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": "what goes with", "a": word} for word in ("fox", "dog")]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/q.jsonl}}}}\n"
    head += 'test_split: test\ndoc_to_text: "{{q}}"\n'
    (folder / "choose.yaml").write_text(
        f"{head}task: choose\noutput_type: multiple_choice\ndoc_to_target: 0\n"
        'doc_to_choice: ["fox", "dog"]\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "write.yaml").write_text(
        f'{head}task: write\noutput_type: generate_until\ndoc_to_target: "{{{{a}}}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


OURS = {"start", "check", "hash", "convert", "calibration", "tokenize", "tasks", "download", "load",
        "baseline", "divergence", "prune", "measure", "score", "save", "verify"}  # fmt: skip


def noisy(tiny_run, gguf_file, task_folder):
    """A run that converts, loads, asks lm-eval and saves: what others draw bars for."""
    return [
        *tiny_run, "--model", gguf_file, "-m", "wanda", "--tasks", "choose,write",
        "--include-path", task_folder, "--save-model", "out", "--force",
    ]  # fmt: skip


def test_a_quiet_run_leaves_stderr_empty(cli, tiny_run, gguf_file, task_folder):
    outcome = cli(*noisy(tiny_run, gguf_file, task_folder), "-q")
    assert outcome.stderr == ""
    assert "acc choose" in outcome.stdout and "model saved to out" in outcome.stdout


def test_a_run_that_is_not_quiet_shows_our_stages_and_no_bar_of_others(
    cli, tiny_run, gguf_file, task_folder
):
    lines = cli(*noisy(tiny_run, gguf_file, task_folder)).stderr.splitlines()
    assert {line.split()[0] for line in lines} - {"of", "the"} <= OURS
    assert any(line.startswith("convert") for line in lines)
    assert not any("%|" in line or "it/s" in line for line in lines)


@pytest.mark.slow
def test_a_quiet_process_writes_nothing_to_stderr(tiny_run, gguf_file, task_folder, tmp_path):
    """The real program: what libraries write while they are imported or at the end counts too."""
    command = [sys.executable, "-m", "prunebench", *noisy(tiny_run, gguf_file, task_folder), "-q"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(prunebench.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_bars_of_all_libraries_are_hidden_and_come_back(capsys):
    import datasets.utils.tqdm
    import huggingface_hub.utils
    import tqdm
    import tqdm.auto
    from transformers.utils import logging as of_transformers

    bars = (tqdm.tqdm, tqdm.auto.tqdm, huggingface_hub.utils.tqdm, datasets.utils.tqdm,
            of_transformers.tqdm, tqdm.trange)  # fmt: skip
    with quiet_libraries():
        for bar in bars:
            assert list(bar(range(3) if bar is not tqdm.trange else 3)) == [0, 1, 2]
            list(bar(range(3), disable=False) if bar is not tqdm.trange else bar(3, disable=False))
        logging.getLogger("some.library").warning("heed me")
    assert capsys.readouterr().err == ""
    list(tqdm.tqdm(range(3)))
    assert "3/3" in capsys.readouterr().err


def test_warnings_of_others_are_hidden_only_in_quiet_and_ours_never():
    def heard(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with quiet_libraries(**options):
                warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="torch.nn")
                warnings.warn_explicit("ours", UserWarning, "y.py", 2, module="prunebench.spec")
        return [str(warning.message) for warning in caught]

    assert heard() == ["theirs", "ours"]
    assert heard(warn=False) == ["ours"]


def test_a_warning_of_ours_is_one_line_without_file_and_code(capsys):
    ours = str(Path(prunebench.__file__).parent / "spec.py")
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit("slowly: no compiler", UserWarning, ours, 1)
    assert capsys.readouterr().err == "warning: slowly: no compiler\n"
