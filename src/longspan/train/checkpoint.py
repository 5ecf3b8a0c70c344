"""Checkpoints: torch distributed checkpoint, written in the background, made visible by one rename.

A checkpoint is a directory `step_000123/` with the files of `torch.distributed.checkpoint` (model parameters and
buffers, and the tensors of the optimiser's state, under their fully qualified names) and `manifest.json`: the size and
blake2b digest of every file, the step, the format version and the caller's `meta`.

* Atomic. Everything is written and fsynced in `step_000123.partial/`, then renamed. A kill at any moment leaves either
  the old state or the new one. A step that is written again replaces the old directory through `.old`, which is
  put back if the kill fell between the two renames.
* Asynchronous. Tensors are copied to host memory, then a thread writes them and talks to the other ranks over a gloo
  group of its own: sharing the training group hangs, because collectives of two threads interleave.
* Resharding. Names and global shapes are stored, not ranks: any number of ranks, replicated or FSDP2, can resume.
* Checked. Sizes and digests are compared before one byte is loaded; a damaged file is refused by name.

What is not stored: learning rate, weight decay and the other options of the parameter groups, which are functions of
the configuration and the step; and random state, which is derived from (seed, step).
The tensor files are read by torch without pickle, but torch's own index `.metadata` is a pickle: load only checkpoints
that you trust, as with every torch checkpoint.

Cost: host memory of one copy of the rank's shard while a save is under way; every byte is written once and read once
more for its digest (blake2b, about 1 GB/s a rank).
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from longspan.layout.weights import Box
from longspan.train.accord import Accord, Failure, failure_of, outcome_of, say
from longspan.train.manifest import (
    FORMAT,
    CheckpointError,
    SaveError,
    digest_file,
    fsync_directory,
    read_manifest,
    step_name,
    step_of,
    verify_files,
    write_manifest,
)
from longspan.train.state import (
    Writer,
    check_same_architecture,
    described,
    held,
    model_state,
    optimizer_state,
    parameter_of,
    set_model_state,
    set_optimizer_state,
)

log = logging.getLogger(__name__)

PARTIAL, REPLACED = ".partial", ".old"


class CheckpointStore:
    """The checkpoints of one run, in one directory that all ranks see.

    Every method but `list`, `latest`, `meta` and `verify` is collective: all ranks call it, in the same order.

    Args:
        directory: made if missing. Leftovers of a killed save are removed here, unless `read_only`.
        keep: how many checkpoints stay, the most recently written ones.
        read_only: for evaluation and generation beside a run that may still be writing: nothing is touched.
        timeout_s: limit of one exchange between the ranks' writers.

    Raises:
        ValueError: `keep` below 1, or a directory that cannot be written.
    """

    def __init__(
        self, directory: str | Path, keep: int = 3, *, read_only: bool = False, timeout_s: float = 1800.0
    ) -> None:
        if keep < 1:
            raise ValueError(f"a checkpoint store keeps at least 1 checkpoint, got keep={keep}; pass keep=1 or more")
        self.directory = Path(directory)
        self.keep = keep
        self.read_only = read_only
        self._thread: threading.Thread | None = None
        self._failure: Failure | None = None
        self._accord = Accord(timeout_s)
        self._group, self.rank, self.world_size = self._accord.group, self._accord.rank, self._accord.size
        if self._group is None:
            # torch says so on every save and load; one process is a supported use here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        if not read_only:
            failure = self._accord.on_rank_0(lambda: failure_of(self._prepare))
            if failure is not None:
                raise CheckpointError(
                    f"{directory} cannot hold checkpoints: {failure.reason}; choose another directory"
                )

    def list(self) -> list[int]:
        """Steps of the complete checkpoints, in the order in which they were written (not checked against damage)."""
        if not self.directory.is_dir():
            return []
        steps = [step for path in self.directory.iterdir() if (step := step_of(path)) is not None]
        order = {step: float(self._order(step)) for step in steps}
        written = {}
        for step in steps:
            with suppress(FileNotFoundError):  # the run that writes here has removed it meanwhile, as an old one
                written[step] = self.path(step).stat().st_mtime_ns
        steps = list(written)
        for step in [step for step in steps if order[step] == 0]:  # damaged: by its date, so that it is not passed over
            order[step] = 0.5 + max((order[s] for s in steps if written[s] <= written[step]), default=0.0)
        return sorted(steps, key=lambda step: (order[step], step))

    def latest(self) -> int | None:
        """The step of the most recently written checkpoint, or None."""
        steps = self.list()
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        return self.directory / step_name(step)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The caller's `meta` of one checkpoint (None: the latest), without loading tensors or checking their files.

        Raises:
            CheckpointError: no such checkpoint, or its manifest is damaged.
        """
        return read_manifest(self.path(self._resolve(step)))["meta"]

    def verify(self, path: str | Path) -> None:
        """Compares every file of one checkpoint with its manifest.

        Raises:
            CheckpointError: names the first damaged or missing file.
        """
        verify_files(Path(path))

    def save_async(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | None,
        meta: Mapping[str, Any],
        boxes: Mapping[str, Box] = MappingProxyType({}),
    ) -> None:
        """Copies the state now and writes it in the background. Waits for the previous save first.

        A full or failing disk does not raise: the last good checkpoint stays, one warning is logged, `wait` returns
        False. Call between optimiser steps.

        Args:
            meta: JSON values: config, plan, position in the data, ... Rank 0's is stored.
            boxes: where parameters stand that are parts of whole ones (`DecoderLM.boxes`). Ranks may hold different
                parameters, as those of a pipeline do.

        Raises:
            ValueError: `meta` is not JSON, `step` is negative, or the store is read-only.
            SaveError: the previous save failed for another reason than the disk.
        """
        if self.read_only:
            raise ValueError(f"{self.directory} was opened read_only=True, and save_async writes; open it without")
        if step < 0:
            raise ValueError(f"a step is 0 or more, got {step}")
        try:
            frozen = json.loads(json.dumps(dict(meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint meta must be plain JSON: {error}; convert it before saving") from None
        self.wait()
        state = model_state(model)
        # Before the first step there is no state; asking torch for it would make one by a step with zero gradients.
        if optimizer is not None and any(optimizer.state.values()):
            state |= optimizer_state(model, optimizer)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage(state)
        stager.close()
        assert isinstance(staged, dict)
        self._failure = Failure("its writer thread ended early", expected=False)  # until it says otherwise
        self._thread = threading.Thread(
            target=self._save, args=(step, held(staged, boxes), frozen), name="longspan-checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> bool:
        """Waits for the save under way. Returns whether the last one landed (True if there was none).

        Raises:
            SaveError: it failed for another reason than the disk.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None and not self._failure.expected:
                raise SaveError(f"the checkpoint could not be saved: {self._failure.reason}")
        return self._failure is None

    def _save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """The writer thread, on every rank."""
        try:
            self._failure = self._write(step, state, meta)
        except (OSError, RuntimeError) as error:  # a lost peer: the training's own collectives say which
            self._failure = Failure(f"{type(error).__name__}: {error}", expected=False)
        if self._failure is not None and self._failure.expected and self.rank == 0:
            log.warning(
                "checkpoint of step %d was not saved: %s; training goes on, the last good checkpoint is %s",
                step, self._failure.reason, "none" if (last := self.latest()) is None else step_name(last),
            )  # fmt: skip

    def _write(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Failure | None:
        partial = self.directory / (step_name(step) + PARTIAL)  # not there: _prepare and failed saves remove theirs
        failure = self._accord.on_rank_0(lambda: failure_of(lambda: partial.mkdir(parents=True)))
        if failure is None:
            try:
                writer = Writer(partial)
                save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            except CheckpointException as error:  # raised on every rank
                causes = [cause for cause, _ in error.failures.values()]
                failure = Failure(
                    "; ".join(sorted({say(cause) for cause in causes})),
                    all(isinstance(cause, OSError) for cause in causes),
                )
        files: dict[str, dict[str, Any]] = {}

        def digests() -> None:
            # Each rank reads back what it wrote; rank 0 also takes torch's index.
            for path in partial.iterdir():
                if path.name.startswith(f"__{self.rank}_") or (self.rank == 0 and path.name == ".metadata"):
                    files[path.name] = digest_file(path)

        if failure is None:
            failure = failure_of(digests)
        gathered = self._accord.gather((failure, files))
        failure = next((f for f, _ in gathered if f is not None), None)
        if failure is None:
            everything = {name: entry for _, part in gathered for name, entry in part.items()}
            failure = self._accord.on_rank_0(lambda: failure_of(lambda: self._publish(step, partial, everything, meta)))
        if failure is not None:
            self._accord.on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        return failure

    def _publish(self, step: int, partial: Path, files: dict[str, Any], meta: dict[str, Any]) -> None:
        """Rank 0: manifest, fsync, rename, and what is older than the last `keep` goes."""
        seen = {path.name for path in partial.iterdir()}
        if seen != set(files):
            raise OSError(f"rank 0 sees {len(seen)} of {len(files)} files in {partial}, which all ranks must share")
        order = 1 + max((self._order(other) for other in self.list()), default=0)
        write_manifest(partial, {"format": FORMAT, "step": step, "order": order, "meta": meta, "files": files})
        fsync_directory(partial)
        final = self.path(step)
        old = final.with_name(final.name + REPLACED)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        fsync_directory(self.directory)
        shutil.rmtree(old, ignore_errors=True)
        for other in self.list()[: -self.keep]:
            # Renamed first, so that a kill in the middle of the removal leaves no directory that looks complete.
            doomed = self.path(other).rename(self.directory / (step_name(other) + PARTIAL))
            shutil.rmtree(doomed, ignore_errors=True)

    def _order(self, step: int) -> int:
        """The how-manieth save of the directory it was, from 1; 0 if its manifest is damaged."""
        try:
            return int(read_manifest(self.path(step))["order"])
        except CheckpointError:
            return 0

    def load(
        self,
        step: int | None,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        boxes: Mapping[str, Box] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Loads in place into model and optimiser, whatever ranks and sharding wrote it, and returns `meta`.

        Gradients are dropped. The options of the optimiser's parameter groups stay as they are.

        Args:
            step: which checkpoint; None: the latest.
            optimizer: None loads the model alone.
            boxes: as in `save_async`.

        Raises:
            CheckpointError: no checkpoint, a damaged file (named, with the newest intact step that remains), another
                architecture (names the first parameter that differs).
        """
        self.wait()
        chosen: int = self._accord.on_rank_0(lambda: outcome_of(lambda: self._resolve(step)))
        path = self.path(chosen)
        self._accord.agree(lambda: self._check(chosen))
        manifest = read_manifest(path)
        reader = FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        state = model_state(model)
        of_all = self._accord.union(described(held(state, boxes)))
        self._accord.agree(
            lambda: check_same_architecture(path, {k: v for k, v in stored.items() if k.startswith("model/")}, of_all)
        )
        absent: set[str] = set()
        if optimizer is not None:
            # All of it is replaced; torch makes state for every parameter only where there is none and no gradient.
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()
            own = optimizer_state(model, optimizer)
            kept = {key for key in stored if key.startswith("optimizer/")}
            if extra := sorted(kept - self._accord.union(dict.fromkeys(own)).keys()):
                raise CheckpointError(
                    f"checkpoint {path.name} holds optimiser state {extra[0]} ({len(extra)} such entries) that this "
                    f"{type(optimizer).__name__} does not have; load it with the optimiser that wrote it"
                )
            # A parameter that never had a gradient has no state in the checkpoint, and must have none here.
            absent = {parameter_of(key) for key in own.keys() - kept}
            state |= {key: value for key, value in own.items() if key in kept}
        try:
            load(held(state, boxes), storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            reasons = "; ".join(sorted({say(cause) for cause, _ in error.failures.values()}))
            raise CheckpointError(f"checkpoint {path.name} could not be read: {reasons}") from None
        set_model_state(model, state)
        if optimizer is not None:
            set_optimizer_state(model, optimizer, state, absent)
        return manifest["meta"]

    def _resolve(self, step: int | None) -> int:
        steps = self.list()
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {self.directory}; start without --resume in a new --out")
        if step is None:
            return steps[-1]
        if step not in steps:
            there = ", ".join(step_name(s) for s in steps)
            raise CheckpointError(f"there is no checkpoint {step_name(step)} in {self.directory}; there are {there}")
        return step

    def _check(self, step: int) -> None:
        """Each rank checks its share of the files."""
        try:
            verify_files(self.path(step), part=(self.rank, self.world_size))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(step)}") from None

    def _offer(self, bad: int) -> str:
        for other in reversed([step for step in self.list() if step != bad]):
            try:
                verify_files(self.path(other))
            except CheckpointError:
                continue
            return f"resume with --resume {step_name(other)}"
        return "no other checkpoint is intact: start again without --resume in a new --out"

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.directory.iterdir()):
            if path.name.endswith(REPLACED) and not (final := path.with_suffix("")).exists():
                path.rename(final)
            elif path.name.endswith((PARTIAL, REPLACED)) and step_of(path.with_suffix("")) is not None:
                log.info("removing %s, left by a save that was interrupted", path)
                shutil.rmtree(path, ignore_errors=True)
