"""Resolve a spec of names to a spec of contents: cheap, and all that `spec_id` depends on.

    resolved = resolve(spec, setup)     # resolved.spec.spec_id is that of the result to come

Names are checked first (`run.names`). A model is fetched if it is not on this machine; a text, a
mask or a file of ratios is identified by its origin or its hash. Nothing is tokenized (but for
`--ppl-tokens`) and no model is built: `plan.load_inputs` does that, for a spec without a result.
Every step returns the fields that it fills in; they are applied once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.allocators.allocation import Allocator
from prunebench.calibration.text_list import identify_texts
from prunebench.calibration.texts import TextIdentity, identify_text
from prunebench.calibration.windows import load_windows
from prunebench.checkpoints.fp8 import is_fp8
from prunebench.checkpoints.packed24 import unpacked
from prunebench.checkpoints.save import check_target
from prunebench.errors import UsageError
from prunebench.evaluate.perplexity import count_windows, protocol_of
from prunebench.files import cache_dir, require_writable
from prunebench.models.device import choose_devices
from prunebench.models.load import load_tokenizer
from prunebench.models.masks import masks_origin
from prunebench.models.source import LocalModel, fetch_model, find_model
from prunebench.models.stored_dtype import StoredDtype
from prunebench.progress import StageTimer
from prunebench.pruners.protocol import Pruner
from prunebench.pruners.training import TrainingNeeds
from prunebench.recovery.protocol import BlockRecoverer, ModelRecoverer
from prunebench.results.store import ResultStore
from prunebench.run.devices import check_packed, require_one_device
from prunebench.run.dtype import DtypeChoice, choose_dtype
from prunebench.run.names import Fields, NamedSpec, check_names, is_text_option, place_texts
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec whose names have become contents.

    Attributes:
        spec: With revisions, origins, hashes and all options: its `spec_id` is that of the result.
        named: The spec with names, which say where the contents are.
        setup: Where the run happens.
        store: The results folder.
        progress: Reports and times the stages.
        devices: Share the calibration batches; everything else runs on the first.
        model: The folder of the weights.
        dtype: The dtype of the weights, with the reason.
        pruner: The method with its options.
        allocator: Spreads the sparsity over the layers; None where a file does.
        recoverer: Trains the kept weights of each block after it was pruned, if anything does.
        model_recoverer: Trains all kept weights at the end, if anything does.
        sparsity: The target.
        calibration_text: Identity of the calibration text; None for a file of tokens.
        training_text: Identity of the training text, if any.
        recovery_text: Identity of the text that `model_recoverer` trains on.
        started: `time.perf_counter()` at the beginning.
    """

    spec: RunSpec
    named: RunSpec
    setup: Setup
    store: ResultStore
    progress: StageTimer
    devices: tuple[torch.device, ...]
    model: LocalModel
    dtype: DtypeChoice
    pruner: Pruner
    allocator: Allocator | None
    recoverer: BlockRecoverer | None
    model_recoverer: ModelRecoverer | None
    sparsity: Sparsity
    calibration_text: TextIdentity | None
    training_text: TextIdentity | None
    recovery_text: TextIdentity | None
    started: float

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.devices[0]

    @property
    def recovery_needs(self) -> TrainingNeeds | None:
        """The windows that the end-to-end recovery trains on, if there is one."""
        return self.model_recoverer.needs.training if self.model_recoverer else None

    @property
    def training_needs(self) -> tuple[TrainingNeeds, ...]:
        """The windows of whatever trains the whole model: the method, the recovery, or both."""
        return tuple(filter(None, (self.pruner.needs.training, self.recovery_needs)))


def resolve(spec: RunSpec, setup: Setup) -> ResolvedSpec:
    """Resolve every name to its content, and check what needs no tokens.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    started = time.perf_counter()
    progress = StageTimer(setup.progress)
    with progress.stage("check", detail=f"{spec.method} on {spec.model}"):
        source = find_model(spec.model)
        # names first: a typo must not cost a download
        named = check_names(place_texts(spec, source.kind), setup)
        devices = choose_devices(setup.device)
        require_one_device(named, devices)
        check_packed(named.spec, named.sparsity, backend=setup.backend, device=devices[0])
        store = ResultStore(setup.results_dir)
        # before the model is fetched: an hour of pruning must not end at a read-only folder
        store.require_writable(named.spec)
        require_writable(cache_dir())
        # the size of the model is not known yet; `plan` asks again with it
        require_outputs(setup, need_model_bytes=1 << 20)
    fetched = fetch_model(source, progress)
    model = unpacked(fetched, progress)
    dtype = choose_dtype(
        named.spec.dtype,
        source,
        model.path,
        devices[0],
        saves=setup.save_model is not None,
        # the dense copy of an FP8 checkpoint is float32, and the model is not
        stored=StoredDtype.of(fetched.path) if is_fp8(fetched.path) else None,
    )
    return identify_contents(
        named, setup, store=store, progress=progress, devices=devices, model=model, dtype=dtype,
        started=started,
    )  # fmt: skip


def identify_contents(
    named: NamedSpec,
    setup: Setup,
    *,
    store: ResultStore,
    progress: StageTimer,
    devices: tuple[torch.device, ...],
    model: LocalModel,
    dtype: DtypeChoice,
    started: float,
) -> ResolvedSpec:
    """Replace the names of a spec by contents, for a model that is on this machine.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    calibration, calibration_fields = _identify_calibration(named.spec)
    training_text = _identify_training(named.pruner)
    recovery_text = _identify_training(named.model_recoverer)
    fields: Fields = {
        "model": model.source.id,
        # commit, not branch: `main` moves, and equal hashes must mean equal weights
        "model_revision": model.revision,
        "dtype": dtype.dtype,
        **_identify_allocation(named.spec),
        **_identify_method(named, training_text, progress),
        **_identify_recovery(named.spec, recovery_text),
        **calibration_fields,
        **_identify_ppl(named.spec, model, progress),
    }
    # all at once: no step sees a spec that is half names and half contents
    resolved = named.spec.model_copy(update=fields)
    # now with the dtype that `auto` became
    check_packed(resolved, named.sparsity, backend=setup.backend, device=devices[0])
    _require_unseen(resolved, named.spec.ppl, training_text, recovery_text)
    return ResolvedSpec(
        spec=resolved,
        named=named.spec,
        setup=setup,
        store=store,
        progress=progress,
        devices=devices,
        model=model,
        dtype=dtype,
        pruner=named.pruner,
        allocator=named.allocator,
        recoverer=named.recoverer,
        model_recoverer=named.model_recoverer,
        sparsity=named.sparsity,
        calibration_text=calibration,
        training_text=training_text,
        recovery_text=recovery_text,
        started=started,
    )


# ---------------------------------------------------------------- contents


def _identify_calibration(spec: RunSpec) -> tuple[TextIdentity | None, Fields]:
    name = spec.calibration
    if name is None:
        return None, {}
    if name.startswith("tokens:"):
        windows = load_windows(path_in(name))
        samples, seqlen = windows.token_ids.shape  # [samples, seqlen]
        fields = {"calibration": "tokens", "calibration_origin": f"sha256:{windows.sha256}"}
        # the hash gets what the file holds, whatever the options say
        return None, {**fields, "calibration_samples": samples, "seqlen": seqlen}
    text = identify_text(name, use="calibration")
    return text, {"calibration": text.name, "calibration_origin": text.origin}


def _identify_training(learner: Pruner | ModelRecoverer | None) -> TextIdentity | None:
    need = learner.needs.training if learner else None
    if need is None:
        return None
    if need.text.startswith("tokens:"):
        # of the tokens, as where they are calibrated on or scored: one file is seen to be the same
        digest = load_windows(path_in(need.text)).sha256
        # 12 digits are enough to tell files apart in a table; the origin has all
        return TextIdentity(f"tokens-{digest[:12]}", "all", f"sha256:{digest}")
    return identify_texts(need.text)


def _identify_ppl(spec: RunSpec, model: LocalModel, progress: StageTimer) -> Fields:
    protocols, origins = [], []
    for name in spec.ppl:
        tokens = None
        if name.startswith("tokens:"):
            windows = load_windows(path_in(name))
            digest, seqlen = windows.sha256, windows.token_ids.shape[1]  # of [windows, seqlen]
            text = TextIdentity(f"tokens-{digest[:12]}", "all", f"sha256:{digest}")
            tokens = windows.token_ids.numel()
        else:
            text, seqlen = identify_text(name, use="evaluation"), spec.ppl_seqlen
            if spec.ppl_tokens is not None:  # whether the text has more is part of the protocol
                tokenizer = load_tokenizer(model.path)
                count = count_windows(
                    name, tokenizer, seqlen=seqlen, bos=spec.ppl_bos, progress=progress
                )
                tokens = count * seqlen
        protocols.append(
            protocol_of(text, seqlen=seqlen, bos=spec.ppl_bos, tokens=tokens, limit=spec.ppl_tokens)
        )
        origins.append(text.origin)
    return {"ppl": tuple(protocols), "ppl_origins": tuple(origins)}


def _identify_allocation(spec: RunSpec) -> Fields:
    """Name the content of `file:PATH`, not the path."""
    if not spec.allocation.startswith("file:"):
        return {}
    path = path_in(spec.allocation)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the allocation {path}", where=str(error.strerror)) from None
    return {"allocation": "file", "allocation_options": {"sha256": digest}}


def _identify_method(
    named: NamedSpec, training_text: TextIdentity | None, progress: StageTimer
) -> Fields:
    """Replace masks and training text by their identity in the options of the method."""
    name, options = named.pruner.needs.masks, dict(named.spec.method_options)
    if name is not None:
        with progress.stage("masks", detail=name):
            origin = masks_origin(name, progress)
        # the option that named the masks is found by its value: its key is the method's own
        options = {key: origin if value == name else value for key, value in options.items()}
    if training_text is not None:
        options["train_data"] = training_text.name
    return {"method_options": options}


def _identify_recovery(spec: RunSpec, text: TextIdentity | None) -> Fields:
    """Replace the training text of a recovery by its identity."""
    if text is None:
        return {}
    options = spec.recover_options.items()
    return {"recover_options": {k: text.name if is_text_option(k) else v for k, v in options}}


def path_in(name: str) -> Path:
    """Return the path of a name such as `tokens:PATH` or `file:PATH`."""
    return Path(name.partition(":")[2]).expanduser()


# ---------------------------------------------------------------- checks


def _require_unseen(
    spec: RunSpec,
    names: Sequence[str],
    training_text: TextIdentity | None,
    recovery_text: TextIdentity | None,
) -> None:
    """Refuse to score a text that was calibrated on or learned from; `names`: of scored texts."""
    # by content, so a copy of the text under another name is found as well
    scored = {origin for origin in spec.ppl_origins if origin.startswith("sha256:")}
    for name in names:
        # `wikitext2:PATH` is scored as the papers join it, and read as it is elsewhere
        if ":" in name and not name.startswith(("tokens:", "file:")):
            scored.add(identify_text(f"file:{path_in(name)}", use="evaluation").origin)
    if spec.calibration_origin in scored:
        raise UsageError(
            f"{spec.calibration} is calibrated on and evaluated on",
            where="a score on the calibration text says nothing",
            fix="use another text for --calibration or for --ppl",
        )
    for text, option in ((training_text, "train_data"), (recovery_text, "recover.data")):
        if text is not None and scored & set(text.origin.split(",")):
            raise UsageError(
                "one text is learned from and evaluated on",
                where="a score on the training text says nothing",
                fix=f"use another text for --set {option} or for --ppl",
            )


def require_outputs(setup: Setup, *, need_model_bytes: int) -> None:
    """Refuse targets of --save-* that cannot be written.

    Raises:
        UsageError: Something is there already.
        SaveError: It cannot be written, or there is too little space.
    """
    folder, replace = setup.save_model, setup.force
    if folder:
        check_target(folder, need_bytes=need_model_bytes, replace=replace, folder=True)
    for file in filter(None, (setup.save_masks, setup.save_calibration, setup.save_allocation)):
        check_target(file, need_bytes=1 << 20, replace=replace, folder=False)
