"""CapturedRunner: decode steps that are captured once for each size, and replayed without the model's Python code.

A decode step of a few rows takes the device less time than Python takes to launch it. So a step whose chunks are of one
token each is padded to one of a few sizes; at the second use of a size the forward is recorded over tensors of its own
(`recorder.py`), and from then on a step fills these and replays. All other steps run eagerly.

A recording holds what the forward found: the addresses of weights and pages, and what its Python code made of
attributes, functions and settings. Before each step the runner makes sure that all of this is as it was. If it is not,
everything captured is dropped.
"""

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_paged.atomic import after_fork_in_child
from hf_paged.compat.torch import DeviceMode, count_dispatch_modes, count_function_modes, function_modes
from hf_paged.compat.transformers import is_hooked_by_accelerate
from hf_paged.execution.attempt import attempt
from hf_paged.execution.compile_recorder import CompileRecorder
from hf_paged.execution.model_runner import ModelIdentity, ModelRunner
from hf_paged.execution.op_recorder import OpRecorder
from hf_paged.execution.packed_cache import NotPackableError
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.execution.recorder import GraphRecorder, Recorder, Recording, UncapturableError
from hf_paged.execution.step_buffers import StepBuffers, StepSize
from hf_paged.execution.step_inputs import StepInputs, prepare_inputs
from hf_paged.memory.kv_pool import KVPool
from hf_paged.reasons import Reason, Why, count_and_log
from hf_paged.scheduling.scheduler import Chunk
from hf_paged_kernels import backends

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
MAX_CAPTURES = 24  # Each size of a step takes memory, and contexts that grow bring new ones.
_LEAST_WIDTH = 16  # Blocks in a row of the block tables.
# Of the largest logit: what a replayed step may differ by from the model. Kernels round differently by number of rows.
_TOLERANCE = 0.05


@dataclass
class _CapturedStep:
    """One captured step: fill `buffers` with a step of `size`, and replay."""

    size: StepSize
    buffers: StepBuffers
    recording: Recording
    num_replays: int = 0


@dataclass(frozen=True)
class _Eager:
    """A step that is to run eagerly.

    Attributes
    ----------
    refused : bool
        Whether steps of this size are to do so from now on.
    size : StepSize or None
        None: of every size.
    """

    why: Why
    refused: bool = False
    size: StepSize | None = None


class _BakedIn(NamedTuple):
    """All that a recording holds of what may change: the digest of the model, settings, addresses of the pages."""

    digest: bytes
    settings: tuple
    addresses: tuple[int, ...]

    def difference(self, other: "_BakedIn | None") -> Reason:
        """The reason to drop what was captured under `other`, which is not the same."""
        if other is None or self.digest != other.digest:
            return Reason.OTHER_MODEL
        return Reason.OTHER_SETTINGS if self.settings != other.settings else Reason.MOVED_PAGES


class _Captures:
    """The captured steps of a model that does not change.

    Parameters
    ----------
    recorder : Recorder
    baked_in : _BakedIn or None
        Compared with what is there before each step. None: nothing is captured yet.

    Attributes
    ----------
    steps : dict of StepSize to _CapturedStep
        In the order of their last use.
    seen : set of StepSize
        Those that have run.
    refused : dict of (StepSize or None) to Why
        Those that are to run eagerly; None: all.
    """

    def __init__(self, recorder: Recorder, baked_in: _BakedIn | None):
        self.recorder, self.baked_in = recorder, baked_in
        self.steps: dict[StepSize, _CapturedStep] = {}
        self.seen: set[StepSize] = set()
        self.refused: dict[StepSize | None, Why] = {}


class CapturedRunner(ModelRunner):
    """A model runner that captures decode steps. Keeps nothing of the model alive but what a recording holds.

    A captured step is put in place when it is whole, and dropped by letting go of it: an interrupt at any line leaves
    those that were there. See `ModelRunner` for the rest of the contract.

    Parameters
    ----------
    pool : KVPool
        Its `CaptureCounts` say what became of each step.
    """

    def __init__(self, pool: KVPool):
        super().__init__(pool)
        self.counts = pool.capture_counts
        self._captures = self._none()
        _runners.add(self)

    @classmethod
    def serves(cls, pool: KVPool) -> bool:
        device, *others = {spec.device for spec in pool.groups}
        return not others and make_recorder(pool.config.capture, device) is not None

    @property
    def needs_identity(self) -> bool:
        return True

    @property
    def captured_buckets(self) -> tuple[int, ...]:
        return tuple(size.num_rows for size in list(self._captures.steps))

    def run(
        self,
        model: torch.nn.Module,
        chunks: Sequence[Chunk],
        pending: PendingTokens | None = None,
        identity: ModelIdentity | None = None,
        others_draw: bool = False,
    ) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            outcome = self._run_captured(model, chunks, pending, identity, others_draw)
        if isinstance(outcome, torch.Tensor):
            self.counts.replays += 1
            return outcome
        captures = self._captures
        logits = super().run(model, chunks, pending)
        if outcome.refused:  # Not if the model itself raises an error: it may be a call's.
            captures.refused[outcome.size] = outcome.why
        count_and_log(self.counts.eager_steps, outcome.why, "a step runs eagerly")
        return logits

    def drop(self, why: Reason) -> None:
        """Let go of all that is captured. For any thread; a replay that is under way ends as it began."""
        count = len(self._captures.steps)
        self._captures = self._none()
        if count:
            count_and_log(self.counts.dropped, why, "captured steps are dropped", count)

    def _none(self, baked_in: _BakedIn | None = None) -> _Captures:
        recorder = make_recorder(self.pool.config.capture, self.buffers.device)
        assert recorder is not None, "`serves` has seen to it"
        return _Captures(recorder, baked_in)

    def _run_captured(
        self,
        model: torch.nn.Module,
        chunks: Sequence[Chunk],
        pending: PendingTokens | None,
        identity: ModelIdentity | None,
        others_draw: bool,
    ) -> torch.Tensor | _Eager:
        """Logits ``[num_rows, vocab]`` of a captured step, or why there is none for these chunks."""
        why = _unsuited(chunks) or self._look(identity)
        if why is not None:
            return _Eager(why)
        captures, size = self._captures, padded_size(chunks)
        why = captures.refused.get(None) or captures.refused.get(size)
        if why is not None:
            return _Eager(why)
        step = captures.steps.get(size)
        if step is None:
            if size not in captures.seen:
                captures.seen.add(size)
                return _Eager(Reason.FIRST_USE)
            if others_draw and captures.recorder.must_be_alone:
                return _Eager(Reason.OTHERS_DRAW)
            captured = self._capture(captures.recorder, model, chunks, pending, size)
            if isinstance(captured, _Eager):
                return captured
            step = captured
        self._put_last(captures, step)
        return self._replay(step, model, chunks, pending)

    def _look(self, identity: ModelIdentity | None) -> Why | None:
        """Drop what is captured if it is out of date. Returns why no captured step may run now, if so."""
        if identity is None:
            return Reason.UNSEEN_CHANGES
        if _is_watched():
            return Reason.MODES
        if not identity.holds():
            self.drop(Reason.OTHER_MODEL)
            return Reason.CHANGED_MODEL
        baked_in = _BakedIn(identity.digest, _settings(), self._addresses())
        if baked_in != self._captures.baked_in:
            self.drop(baked_in.difference(self._captures.baked_in))
            self._captures = self._none(baked_in)
        return None

    def _addresses(self) -> tuple[int, ...]:
        """Where the pages of all layers lie."""
        storages = (storage for group in self.groups for storage in group.layers.values())
        return tuple(page.data_ptr() for storage in storages for page in storage.pages)

    def _capture(
        self,
        recorder: Recorder,
        model: torch.nn.Module,
        chunks: Sequence[Chunk],
        pending: PendingTokens | None,
        size: StepSize,
    ) -> _CapturedStep | _Eager:
        """Record the forward over a step: it writes what the step is to write, perhaps several times."""
        if any(map(is_hooked_by_accelerate, model.modules())):
            return _Eager(Reason.MOVED_INPUTS, refused=True)
        buffers = StepBuffers(self.buffers.device, size)
        inputs = self._fill(buffers, size, chunks, pending)
        recording, error = attempt(functools.partial(recorder.record, functools.partial(self.execute, model, inputs)))
        if recording is not None:
            return _CapturedStep(size, buffers, recording)
        try:
            if isinstance(error, NotPackableError):
                raise error
            if isinstance(error, UncapturableError):
                return _Eager(error.why, refused=True)
            return _Eager(Reason.FAILED_CAPTURE.of(type(error).__name__), refused=True, size=size)
        finally:
            del error  # Its traceback holds this frame: no cycle.

    def _fill(
        self, buffers: StepBuffers, size: StepSize, chunks: Sequence[Chunk], pending: PendingTokens | None
    ) -> StepInputs:
        """Put a step into the buffers of a captured one."""
        inputs = prepare_inputs(chunks, self.groups, buffers, padded_to=size)
        if pending is not None:
            pending.put_into(inputs.input_ids, chunks)
        return inputs

    def _replay(
        self, step: _CapturedStep, model: torch.nn.Module, chunks: Sequence[Chunk], pending: PendingTokens | None
    ) -> torch.Tensor | _Eager:
        """Run a captured step. At the first step that it was not recorded with it is compared with the model."""
        self._fill(step.buffers, step.size, chunks, pending)
        logits = step.recording.replay()[: len(chunks)].clone()
        if step.num_replays == 1 and not _is_close(logits, super().run(model, chunks, pending)):
            return _Eager(Reason.OTHER_LOGITS, refused=True)
        step.num_replays += 1
        return logits

    def _put_last(self, captures: _Captures, step: _CapturedStep) -> None:
        """Note that a step is the one used last. The one whose last use is the longest ago makes room."""
        captures.steps.pop(step.size, None)
        captures.steps[step.size] = step
        if len(captures.steps) > MAX_CAPTURES:
            captures.steps.pop(next(iter(captures.steps)))
            count_and_log(self.counts.dropped, Reason.RARELY_USED, "captured steps are dropped")


def make_recorder(capture: str, device: torch.device) -> Recorder | None:
    """The recorder for steps on a device, as ``PagedConfig.capture`` says; None if none are captured."""
    graphs = GraphRecorder(device) if device.type == "cuda" else None
    if capture == "ops":
        return OpRecorder()
    if capture == "compile":
        return CompileRecorder(graphs)
    return graphs if capture == "auto" else None


def padded_size(chunks: Sequence[Chunk]) -> StepSize:
    """The size to which a decode step is padded: the next bucket, and tables of the next power of two."""
    num_groups = len(chunks[0].request.tables)
    longest = [max(len(chunk.request.tables[number].blocks) for chunk in chunks) for number in range(num_groups)]
    num_rows = next(bucket for bucket in BUCKETS if bucket >= len(chunks))
    widths = tuple(max(_LEAST_WIDTH, 1 << (length - 1).bit_length()) for length in longest)
    return StepSize(num_tokens=num_rows, num_rows=num_rows, table_widths=widths)


def drop_all(why: Reason) -> None:
    """Let go of the captured steps of all models."""
    for runner in list(_runners):
        runner.drop(why)


def _unsuited(chunks: Sequence[Chunk]) -> Why | None:
    """The reason why no step of these chunks is captured; None if some are."""
    if not all(chunk.end - chunk.start == 1 and chunk.samples for chunk in chunks):
        return Reason.PROMPT_TOKENS
    return Reason.MANY_ROWS if len(chunks) > BUCKETS[-1] else None


def _is_watched() -> bool:
    """Tell whether a mode sees the calls of this thread; a replay would pass it by."""
    if count_dispatch_modes():
        return True
    # That of a default device has no part in what a recording holds.
    return bool(count_function_modes()) and not all(isinstance(mode, DeviceMode) for mode in function_modes())


def _settings() -> tuple:
    """Settings of torch that choose kernels, and the attention backends."""
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        backends.registered(),
    )


def _is_close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    atol = float(_TOLERANCE * expected.abs().max())
    return torch.allclose(logits, expected, rtol=_TOLERANCE, atol=atol, equal_nan=True)


_runners: "weakref.WeakSet[CapturedRunner]" = weakref.WeakSet()


def _drop_in_child() -> None:
    drop_all(Reason.FORKED)


after_fork_in_child(_drop_in_child)
