"""`LmEvalTask`: a task or group of lm-eval, evaluated in process on the pruned model object itself.

lm-eval's evaluator is called as its own command line calls it. What is added: a protocol for every
score, and the answers item by item.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.errors import IncompatibleData, MissingResource
from prunebench.evaluate.outcome import Item, Measure, Outcome
from prunebench.evaluate.records import Loaded, data_set_key
from prunebench.progress import quiet_libraries

_FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class Protocol:
    """Shots, limit and prompt format, the same for all tasks of a run.

    Attributes:
        num_fewshot: Examples before each question; None is the task's own number.
        limit: Only the first so many documents of every task; None is all.
        apply_chat_template: Put the question into the tokenizer's chat template.
        batch_size: Sequences at a time; None is 1 on a CPU and 16 on CUDA.
        include_path: A folder with more task files.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    batch_size: int | None = None
    include_path: Path | None = None


@dataclass(frozen=True)
class LmEvalTask:
    """One task or group of lm-eval, built and ready to be evaluated.

    Attributes:
        name: As the user gave it.
        built: lm-eval's task objects (`TaskManager.load`).
        loaded: Where each data set came from, by `data_set_key`.
        counts: Documents of each task, without a limit.
        protocol: Shots, limit and prompt format.
        tokenizer: The model's.
        tokenizer_sha256: Its hash, of before lm-eval sets its padding.
    """

    name: str
    built: dict[str, Any]
    loaded: dict[str, Loaded]
    counts: dict[str, int]
    protocol: Protocol
    tokenizer: Any
    tokenizer_sha256: str

    @property
    def unit(self) -> str:
        """The unit of `units`."""
        return "documents"

    @property
    def units(self) -> int:
        """Number of documents."""
        return sum(min(count, self.protocol.limit or count) for count in self.counts.values())

    @property
    def generates(self) -> bool:
        """Whether some task generates text instead of scoring given answers."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.built["tasks"].values())

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols of all scores."""
        return tuple(self._protocol_of(name, task) for name, task in self._all())

    @property
    def key(self) -> str:
        """Cache key: lm-eval's version, the tasks' files and records, protocol, and tokenizer."""
        import lm_eval

        facts = [
            [name, self._protocol_of(name, task), self._source(task).content, task.dump_config()]
            for name, task in self.built["tasks"].items()
        ]
        # the same questions under another group have another mean
        groups = self.built.get("groups", {}).values()
        means = [[group.name, self._leaves(group), group.aggregate_metric_list] for group in groups]
        key = [self.name, lm_eval.__version__, self.tokenizer_sha256, facts, means]
        return json.dumps(key, default=_text_of, sort_keys=True)

    def require_examples(self) -> None:
        """Refuse few-shot prompts whose examples are in a split that the wheel lacks.

        Raises:
            MissingResource: Says so.
        """
        for name, task in self.built["tasks"].items():
            if (task.get_config("num_fewshot") or 0) > 0 and self._source(task).records:
                raise MissingResource(
                    f"{name} with --num-fewshot needs the hub, and it cannot be reached",
                    where="the examples come from the training split, which the wheel has not",
                    fix="connect to the network, or leave --num-fewshot out",
                )

    def score(self, model: nn.Module, *, advance: Callable[[int], None]) -> list[Outcome]:
        """Evaluate `model` on the task.

        Raises:
            IncompatibleData: lm-eval refuses the task or the model.
        """
        with quiet_libraries():
            from lm_eval.evaluator import evaluate

            from prunebench.evaluate.lm_eval_adapter import wrap_model

            for task in self.built["tasks"].values():  # the same examples for every model
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            lm = wrap_model(
                model,
                self.name,
                tokenizer=self.tokenizer,
                batch_size=self.protocol.batch_size,
                answered=_document_counter(self.units, advance),
            )
            try:
                report = evaluate(
                    lm=lm,
                    task_dict=self.built,
                    limit=self.protocol.limit,
                    log_samples=True,  # without it the report has means only, no items
                    apply_chat_template=self.protocol.apply_chat_template,
                    # in a chat, each example is a turn of its own
                    fewshot_as_multiturn=self.protocol.apply_chat_template,
                )
            # lm-eval raises all of these for tasks or models that it cannot work with
            except (ValueError, NotImplementedError, AssertionError) as error:
                raise IncompatibleData(
                    f"lm-eval cannot run {self.name}", where=str(error).splitlines()[0][:200]
                ) from error
        return [self._outcome(name, task, report) for name, task in self._all()]

    def _all(self) -> list[tuple[str, Any]]:
        return [*self.built["tasks"].items(), *self.built.get("groups", {}).items()]

    def _outcome(self, name: str, task: Any, report: dict[str, Any]) -> Outcome:
        row, higher_is_better = report["results"][name], report["higher_is_better"].get(name, {})
        measures = {}
        for key, value in row.items():
            # lm-eval's keys are `metric,filter`: `acc,none`, `exact_match,strict-match`
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise IncompatibleData(
                    f"{name}: {metric} is {value}",
                    where="the model's logits are NaN, or the metric is not defined here",
                    fix="leave the task out, ask more documents, or use --dtype float32",
                )
            stderr = row.get(f"{metric}_stderr,{kind}")
            # lm-eval writes "N/A" where it has no standard error
            has_stderr = isinstance(stderr, int | float) and math.isfinite(stderr)
            measures[metric if kind == "none" else key] = Measure(
                float(value),
                float(stderr) if has_stderr else None,
                bool(higher_is_better.get(metric, True)),
            )
        # a group has no samples of its own; its hash is over those of its leaves
        members = [name] if name in report["samples"] else self._leaves(task)
        items = {member: _items(report["samples"][member]) for member in members}
        hashes = [item.sha256 for member in members for item in items[member]]
        return Outcome(
            protocol=self._protocol_of(name, task),
            dataset=name,
            origin=" ".join(sorted({self._source(self.built["tasks"][m]).origin for m in members})),
            targets=len(hashes),
            limited=any(map(self._is_limited, members)),
            sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
            measures=measures,
            items=items.get(name, ()),
            member_of=self._group_of(name),
        )

    def _group_of(self, name: str) -> str:
        """Return the outermost group with a score that holds a task or group; empty without one."""
        for group in self.built.get("groups", {}).values():  # outer ones before those in them
            inner = [member.name for member in group.get_all_groups()]
            if group.has_aggregation and name in [*self._leaves(group), *inner]:
                return str(group.name)
        return ""

    def _leaves(self, group: Any) -> list[str]:
        return [task.task_name for task in group.get_all_tasks()]

    def _protocol_of(self, name: str, task: Any) -> str:
        """Return e.g. `lm-eval/piqa/0-shot/v1.0/first-100`."""
        leaves = [name] if name in self.built["tasks"] else self._leaves(task)
        tasks = [self.built["tasks"][leaf] for leaf in leaves]
        # the tasks of a group may differ in shots, as in 0+5
        shots = "+".join(sorted({str(member.get_config("num_fewshot")) for member in tasks}))
        version = tasks[0].VERSION if name in self.built["tasks"] else (task.version or 0)
        text = f"lm-eval/{name}/{shots}-shot/v{version}"
        # "" is the split that lm-eval evaluates; another one becomes part of the protocol
        others = sorted({r.split for member in tasks if (r := self._source(member).records)} - {""})
        text += "".join(f"/on-{split}" for split in others)
        if self.protocol.apply_chat_template:
            text += "/chat"
        limited = any(map(self._is_limited, leaves))
        return f"{text}/first-{self.protocol.limit}" if limited else text

    def _source(self, task: Any) -> Loaded:
        config = task.config
        where = data_set_key(config.dataset_path, config.dataset_name, config.dataset_kwargs)
        return self.loaded.get(where) or Loaded("task-file", self.name)

    def _is_limited(self, name: str) -> bool:
        return self.protocol.limit is not None and self.protocol.limit < self.counts[name]


def _items(samples: list[dict[str, Any]]) -> tuple[Item, ...]:
    """Return the values of every document, in the order of the data set.

    A document that went through several of lm-eval's answer filters keeps the first one's values.
    """
    rows: dict[int, Item] = {}
    for sample in sorted(samples, key=lambda row: int(row["doc_id"])):
        # two runs match a document by the hash of its prompt and target: a changed prompt format
        # must not be compared as the same item
        asked = json.dumps([sample["arguments"], sample["target"]], default=str, sort_keys=True)
        values = {
            metric: float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample[metric], int | float)
        }
        rows.setdefault(
            int(sample["doc_id"]), Item(hashlib.sha256(asked.encode()).hexdigest(), values)
        )
    return tuple(rows.values())


def _document_counter(units: int, advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Convert answered requests, of which a document has several, into documents for progress."""
    reported = 0

    def answered(done: int, total: int) -> None:
        nonlocal reported
        # lm-eval sorts requests by length, so those of a document are apart: count by share
        documents = units * done // max(1, total)
        advance(documents - reported)
        reported = documents

    return answered


def _text_of(value: object) -> str:
    # str of a function has its address, which is another one in every process: never read again.
    # That is right for a closure or a partial, whose source does not say what it was made with.
    if inspect.isfunction(value) and value.__closure__ is None:
        # the whole file: a function of a task may call others in it
        with contextlib.suppress(OSError):
            text = Path(value.__code__.co_filename).read_text(encoding="utf-8")
            return f"{inspect.getsource(value)}\n{hashlib.sha256(text.encode()).hexdigest()}"
    return str(value)
