"""ModelRunner: turns a planned step into logits. Runners that capture steps come in here."""

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch

from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.execution.packed_cache import PACKED_FORWARD, NotPackableError, PackedCache, PackedForward
from hf_paged.execution.prepacked_linear import PrepackedLinears
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.execution.step_inputs import StepInputs, prepare_inputs
from hf_paged.memory.kv_pool import KVPool
from hf_paged.reasons import Reason
from hf_paged.scheduling.scheduler import Chunk


class ModelIdentity(Protocol):
    """A model as it was found when a call began: `hf_paged.models.fingerprint` makes it."""

    @property
    def digest(self) -> bytes:
        """Equal for two of them between which the model was not changed."""

    def holds(self) -> bool:
        """Tell whether the model is still the same."""


class ModelRunner:
    """Runs the steps of one engine, each with a forward of the model: the eager runner, and the base of all others.

    The engine hands a step over in two calls: `make_ready` for each KV cache group, then `run`, which is `prepare`
    and `execute`. Both come from the thread of the call that drives the engine, and steps never overlap. A subclass
    that captures steps (CUDA graphs, ``torch.compile``) overrides `execute`, or `run` if it pads steps to the sizes
    that it has captured, as `CapturedRunner` does; `register_runner` gives it to the engines that it serves.

    What a subclass can rely on, and what it must keep to:

    Addresses
        The tensors of `StepInputs` lie in `buffers`. A tensor has the same address in every step until one needs more
        room than any before; then it moves for good, to a buffer of the next power of two. Shapes are the step's own.
        The tensors of a `KVStorage` never move on the CPU. On other devices `make_ready` replaces them when the pool
        grows, and nothing else does. The user may replace or move the model's weights between any two steps.
    Counts
        `PackedForward` checks that each layer attends once, and counts in Python. Code that is replayed counts
        nothing: check a step when it is captured. For each step that `run` returns from, the engine counts one read
        of the pages per layer.
    Results
        The logits belong to the caller for good. Other calls sample from them while the next step runs: a runner with
        an output of its own returns a copy.
    Errors
        `NotPackableError` means that the model cannot be packed: the engine is given up, and calls without a token so
        far go on in transformers' loop. After any other error the engine runs the same chunks again, call by call, to
        find the call whose error it is. So a chunk may run twice: it stores the same states in the same slots.
    Interrupts
        A KeyboardInterrupt, or what another signal handler raises, may end `prepare` and `execute` at any line. The
        step is as if it had not begun: its slots may be written, but they count as empty. What a runner keeps for
        later steps must be whole at every line: put it in place when it is complete.

    Parameters
    ----------
    pool : KVPool
        Knows all KV cache groups of the model already.

    Attributes
    ----------
    groups : list of KVCacheGroup
        In the order of the requests' tables.
    buffers : StepBuffers
    linears : PrepackedLinears or None
        The copies of the model's weights that steps multiply with, if the pool's config wants them.
    """

    def __init__(self, pool: KVPool):
        self.pool = pool
        self.groups = list(pool.groups.values())
        self.buffers = StepBuffers(self.groups[0].spec.device)
        self.linears = PrepackedLinears() if pool.config.prepack_weights else None

    @classmethod
    def serves(cls, pool: KVPool) -> bool:
        """Tell whether this kind of runner is one for the engine of `pool`."""
        return True

    @property
    def needs_identity(self) -> bool:
        """Tell whether `run` is to be given the model's identity. It costs an inspection of the model for each call."""
        return False

    @property
    def captured_buckets(self) -> tuple[int, ...]:
        """Sizes in rows of the decode steps that are captured now."""
        return ()

    def make_ready(self, number: int, copies: list[tuple[int, int]]) -> None:
        """Make every block of a KV cache group addressable, and copy the blocks that rows will share no longer.

        Takes the pool's lock. May be called again after an error.

        Parameters
        ----------
        number : int
            Of the group in `groups`.
        copies : list of (source, destination)
            Block ids.

        Raises
        ------
        torch.OutOfMemoryError
            If the device has no memory for them. Blocks up to `num_ready` are addressable.
        """
        group = self.groups[number]
        with self.pool.lock:
            if copies:
                group.copy_blocks(copies)
            else:
                group.ensure()

    def num_ready(self, number: int) -> int:
        """Blocks of a KV cache group that are addressable in all its layers: those with smaller ids."""
        return min(storage.num_blocks for storage in self.groups[number].layers.values())

    def begin(self) -> None:
        """Learn that steps are to come after a pause, in which the model may have been trained."""
        if self.linears is not None:
            self.linears.forget_changed()

    def run(
        self,
        model: torch.nn.Module,
        chunks: Sequence[Chunk],
        identity: ModelIdentity | None = None,
        others_draw: bool = False,
    ) -> torch.Tensor:
        """Run the chunks of a step in one forward: their states are stored in the pages of their rows.

        Parameters
        ----------
        model : torch.nn.Module
        chunks : sequence of Chunk
        identity : ModelIdentity, optional
            Of the model. None: a change of it cannot be seen, or the runner needs none.
        others_draw : bool
            Whether other threads may draw random numbers meanwhile, for calls that sample by themselves.

        Returns
        -------
        torch.Tensor
            ``[num_samples, vocab]``: logits of the last token of each chunk that samples, in the order of `chunks`.

        Raises
        ------
        NotPackableError
            If the model cannot be packed.
        Exception
            What the model raises.
        """
        # Tensors made under one caller's inference_mode could not be changed by another's processors.
        with torch.inference_mode(False), torch.no_grad():
            return self.execute(model, self.prepare(chunks))

    def try_out(self, model: torch.nn.Module, chunks: Sequence[Chunk]) -> torch.Tensor:
        """As `run`, with all checks and none of the means that make later steps fast."""
        with torch.inference_mode(False), torch.no_grad():
            return self.forward(model, self.prepare(chunks))

    def prepare(self, chunks: Sequence[Chunk]) -> StepInputs:
        """Fill `buffers` with a step. The step before is over: its inputs are overwritten."""
        return prepare_inputs(chunks, self.groups, self.buffers)

    def execute(self, model: torch.nn.Module, inputs: StepInputs) -> torch.Tensor:
        """Compute the logits of a prepared step, ``[num_samples, vocab]``. Here: with one eager forward."""
        with contextlib.nullcontext() if self.linears is None else self.linears.used_by(model):
            return self.forward(model, inputs)

    def forward(self, model: torch.nn.Module, inputs: StepInputs) -> torch.Tensor:
        """Call the model once, and check that all its layers attended through the pages. Not to be overridden."""
        forward = PackedForward(inputs)
        output = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            logits_to_keep=inputs.sample_index,
            use_cache=True,
            return_dict=True,
            **{CACHE_ARGUMENT: PackedCache(forward), PACKED_FORWARD: forward},
        )
        if not forward.has_attended:
            raise NotPackableError(Reason.OWN_ATTENTION)
        return output.logits[0]


_kinds: list[type[ModelRunner]] = [ModelRunner]


def register_runner(kind: type[ModelRunner]) -> None:
    """Let the engines that are made from now on have runners of this kind, where it serves their pool."""
    _kinds.insert(0, kind)


def make_runner(pool: KVPool) -> ModelRunner:
    """The runner of an engine on `pool`: of the kind that was registered last among those that serve it."""
    return next(kind for kind in _kinds if kind.serves(pool))(pool)
