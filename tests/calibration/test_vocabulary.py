"""Token ids that the model has no row for: refused in one way, however they come in."""

import json

import pytest
import torch

from prunebench.calibration.vocabulary import largest_id, require_known, vocabulary_size
from prunebench.calibration.windows import Windows, save_windows
from prunebench.errors import IncompatibleData
from prunebench.testing import tiny_model
from tests.conftest import prose

# One worker: the index of lm-eval's tasks takes seconds to build.
pytestmark = pytest.mark.xdist_group("lm-eval")

WORDS = ("quick fox", "dog", "cat", "bird", "cow", "fish")
ROWS = 100  # letters are below, the space is not


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory, byte_tokenizer):
    """A model with 100 tokens and a tokenizer with 256."""
    from transformers import LlamaForCausalLM

    config = tiny_model("llama").config
    config.vocab_size = ROWS
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts and tokens that fit, and such as do not; two tasks that do not."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "fits.txt").write_text(prose(9000, seed=3).replace(" ", ""))
    (folder / "calibration.txt").write_text(prose(9000, seed=4).replace(" ", ""))
    (folder / "spaces.txt").write_text(prose(9000, seed=5))
    save_windows(folder / "beyond.safetensors", Windows(torch.full((8, 32), 100), packed=False))
    rows = [{"q": "whatgoeswith", "a": word, "b": word[::-1]} for word in WORDS]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/q.jsonl}}}}\n"
    head += 'test_split: test\ndoc_to_text: "{{q}}"\nmetadata: {version: 1.0}\n'
    (folder / "choose.yaml").write_text(
        f"{head}task: choose\noutput_type: multiple_choice\ndoc_to_target: 0\n"
        'doc_to_choice: "{{[a, b]}}"\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "write.yaml").write_text(
        head.replace('"{{q}}"', '"{{q}} is"')  # what is outside is in the prompt
        + 'task: write\noutput_type: generate_until\ndoc_to_target: "{{a}}"\n'
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


FITS = {"calibration": "file:{}/calibration.txt", "ppl": "file:{}/fits.txt"}


def words(folder, files, tmp_path, method="wanda", **options):
    given = {**FITS, "calibration-samples": 4, "seqlen": 32, "ppl-seqlen": 64, **options}
    if method == "maskllm":
        del given["calibration"], given["calibration-samples"], given["seqlen"]
    run = ["run", "-m", method, "-M", folder, "--results-dir", tmp_path / "results"]
    return run + [w for k, v in given.items() for w in (f"--{k}", str(v).format(files))]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calibration": "file:{}/spaces.txt"}, "spaces.txt does not fit"),
        ({"calibration": "tokens:{}/beyond.safetensors"}, "beyond.safetensors does not fit"),
        ({"ppl": "file:{}/spaces.txt"}, "spaces.txt does not fit"),
        ({"ppl": "file:{}/spaces.txt", "method": "magnitude"}, "spaces.txt does not fit"),
        ({"ppl": "tokens:{}/beyond.safetensors"}, "beyond.safetensors does not fit"),
        ({"ppl": "file:{}/spaces.txt", "weights": "disk"}, "spaces.txt does not fit"),
        ({"tasks": "choose", "include-path": "{}"}, "the task choose does not fit"),
        ({"tasks": "write", "include-path": "{}"}, "the task write does not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_no_way_in_lets_a_token_through_that_the_embedding_has_not(
    cli, small_folder, files, tmp_path, options, says
):
    outcome = cli(*words(small_folder, files, tmp_path, **options), code=4)
    assert says in outcome.stderr and "vocabulary of 100 tokens" in outcome.stderr
    assert "largest token is" in outcome.stderr and "embedding has 100 rows" in outcome.stderr
    assert "\nload " not in outcome.stderr
    if "file:" in str(options):
        assert "(' ')" in outcome.stderr  # the token's text


def test_the_text_that_is_learned_from_is_looked_at_too(cli, small_folder, files, tmp_path):
    options = {"train_data": f"file:{files}/spaces.txt", "steps": 1, "batch": 2, "held_out": 2,
               "train_seqlen": 24, "prior": "magnitude"}  # fmt: skip
    given = [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    run = words(small_folder, files, tmp_path, "maskllm", sparsity="2:4")
    outcome = cli(*run, *given, code=4)
    assert "spaces.txt does not fit" in outcome.stderr and "\nload " not in outcome.stderr


def test_what_fits_is_run(cli, small_folder, files, tmp_path):
    assert "wanda 0.5 on small" in cli(*words(small_folder, files, tmp_path)).stdout


def test_a_larger_tokenizer_is_fine_where_its_tokens_are_not_used(
    cli, tiny_folder, files, tmp_path, byte_tokenizer
):
    """An added padding token changes nothing, few-shot examples included."""
    import copy
    import shutil

    folder = tmp_path / "padded"
    shutil.copytree(tiny_folder, folder)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert largest_id(tokenizer) == 256
    ids = []
    for model in (tiny_folder, folder):
        run = words(model, files, tmp_path, tasks="choose", limit=1)
        run += ["--include-path", files, "--num-fewshot", "1", "--log-samples", "--json"]
        ids.append(json.loads(cli(*run).stdout)["scores"])
    assert ids[0] == ids[1]


def test_a_token_that_only_lm_eval_adds_is_refused_before_the_model_sees_it(
    monkeypatch, small_folder, files, byte_tokenizer
):
    """The second look, at what lm-eval really asks."""
    from prunebench.evaluate import tasks
    from prunebench.evaluate.lm_eval_task import Protocol
    from prunebench.models.load import load_model
    from prunebench.progress import Silent

    monkeypatch.setattr(tasks, "require_known_requests", lambda *args, **kwargs: None)
    device = torch.device("cpu")
    model = load_model(small_folder, dtype=torch.float32, device=device)
    for name in ("choose", "write"):
        (task,) = tasks.prepare_tasks(
            [name], Protocol(include_path=files), tokenizer=byte_tokenizer,
            vocabulary=ROWS, progress=Silent(),
        )  # fmt: skip
        with pytest.raises(IncompatibleData, match=f"the task {name} does not fit"):
            task.score(model, advance=lambda done: None)


def test_the_vocabulary_is_what_embedding_and_head_have_both():
    model = tiny_model("llama")
    assert vocabulary_size(model) == 256
    model.lm_head = torch.nn.Linear(32, 200, bias=False)
    assert vocabulary_size(model) == 200
    require_known([0, 199], vocabulary=200, source="x")
    with pytest.raises(IncompatibleData, match="vocabulary of 200"):
        require_known(torch.tensor([[200]]), vocabulary=200, source="x")


def test_every_model_is_asked_with_the_same_examples(files, byte_tokenizer):
    """lm-eval draws on from where the last model's examples ended, unless it is told not to."""
    from prunebench.evaluate.lm_eval_task import Protocol
    from prunebench.evaluate.tasks import prepare_tasks
    from prunebench.progress import Silent

    (task,) = prepare_tasks(
        ["choose"], Protocol(num_fewshot=1, include_path=files), tokenizer=byte_tokenizer,
        vocabulary=256, progress=Silent(),
    )  # fmt: skip
    asked = [
        [item.sha256 for item in task.score(model, advance=lambda done: None)[0].items]
        for model in (tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("llama"))
    ]
    assert len(asked[0]) == 6 and asked[0] == asked[1] == asked[2]
