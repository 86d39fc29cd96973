"""ModelRunner: turns a planned step into logits. Runners that capture steps come in here."""

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch

from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.execution.packed_cache import PACKED_FORWARD, NotPackableError, PackedCache, PackedForward
from hf_paged.execution.pending_tokens import PendingTokens
from hf_paged.execution.prepacked_linear import PrepackedLinears
from hf_paged.execution.step_buffers import StepBuffers
from hf_paged.execution.step_inputs import StepInputs, on_devices_of_layers, prepare_inputs
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
    and `execute`. Both come from the thread of the call that drives the engine, one step after another. A subclass
    that captures steps (CUDA graphs, ``torch.compile``) overrides `execute`, or `run` if it pads steps to the sizes
    that it has captured, as `CapturedRunner` does; `register_runner` gives it to the engines that it serves.

    What a subclass can rely on, and what it must keep to:

    Addresses
        The tensors of `StepInputs` lie in `buffers`, in one arena. A tensor has the same address in every step until a
        step needs more room than any before, for tokens, rows or blocks of a row; then all move for good, and
        `buffers.room` differs. Shapes are the step's own. A subclass that captures steps makes buffers of its own, as
        small as its largest step, and pads steps to a `StepSize`: see `prepare_inputs`.
        Of a model on several devices this holds for those on the first: a runner that captures does not serve it.
        The tensors of a `KVStorage` never move, on no device: they are allocated once, at the budget, before a runner
        is made. A pool that is released or made anew has another engine, and so another runner. The user may replace
        or move the model's weights between any two steps.
    Order
        A step is brought to the device by one copy in the current stream, behind the step before: where
        `is_asynchronous`, `run` may return before the device has run the step, and the next one is prepared meanwhile.
        The host waits for the copy before the last one, and for nothing else. Between `prepare` and `execute` tokens
        that only the device knows are written into `StepInputs.input_ids`, on the device (`PendingTokens`).
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
    is_on_several_devices : bool
        Whether layers lie on several devices, one after the other. What they read a step by is copied to each then.
    buffers : StepBuffers
        On the device of the first layer.
    linears : PrepackedLinears or None
        The copies of the model's weights that steps multiply with, if the pool's config wants them.
    """

    def __init__(self, pool: KVPool):
        self.pool = pool
        self.groups = list(pool.groups.values())
        self.is_on_several_devices = len({group.spec.device for group in self.groups}) > 1
        self.buffers = StepBuffers(self.groups[0].spec.device)
        self.linears = PrepackedLinears() if pool.config.prepack_weights else None

    @property
    def is_asynchronous(self) -> bool:
        """Tell whether the device works on a step while the host prepares the next: an accelerator, as torch says."""
        accelerator = torch.accelerator.current_accelerator()
        return accelerator is not None and accelerator.type == self.buffers.device.type

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
        """Copy the blocks of a KV cache group that rows will share no longer.

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
            If the device has no memory for what a copy needs besides. Any of the copies may be missing.
        """
        with self.pool.lock:
            self.groups[number].copy_blocks(copies)

    def begin(self) -> None:
        """Learn that steps are to come after a pause, in which the model may have been trained."""
        if self.linears is not None:
            self.linears.forget_changed()

    def run(
        self,
        model: torch.nn.Module,
        chunks: Sequence[Chunk],
        pending: PendingTokens | None = None,
        identity: ModelIdentity | None = None,
        others_draw: bool = False,
    ) -> torch.Tensor:
        """Run the chunks of a step in one forward: their states are stored in the pages of their rows.

        Parameters
        ----------
        model : torch.nn.Module
        chunks : sequence of Chunk
        pending : PendingTokens or None
            Has the tokens with which chunks run ahead; None: no chunk does.
        identity : ModelIdentity or None
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
            inputs = self.prepare(chunks)
            if pending is not None:
                pending.put_into(inputs.input_ids, chunks)
            return self.execute(model, inputs)

    def try_out(self, model: torch.nn.Module, chunks: Sequence[Chunk]) -> torch.Tensor:
        """As `run`, with all checks and none of the means that make later steps fast."""
        with torch.inference_mode(False), torch.no_grad():
            return self.forward(model, self.prepare(chunks), is_trial=True)

    def prepare(self, chunks: Sequence[Chunk]) -> StepInputs:
        """Fill `buffers` with a step. The step before was launched: its inputs are overwritten behind it."""
        inputs = prepare_inputs(chunks, self.groups, self.buffers)
        return on_devices_of_layers(inputs, chunks) if self.is_on_several_devices else inputs

    def execute(self, model: torch.nn.Module, inputs: StepInputs) -> torch.Tensor:
        """Compute the logits of a prepared step, ``[num_samples, vocab]``. Here: with one eager forward."""
        with contextlib.nullcontext() if self.linears is None else self.linears.used_by(model):
            return self.forward(model, inputs)

    def forward(self, model: torch.nn.Module, inputs: StepInputs, is_trial: bool = False) -> torch.Tensor:
        """Call the model once, and check that all its layers attended through the pages. Not to be overridden."""
        forward = PackedForward(inputs, is_trial)
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
        return output.logits[0].to(self.buffers.device)  # Hooks of accelerate have brought them there before.


_kinds: list[type[ModelRunner]] = [ModelRunner]


def register_runner(kind: type[ModelRunner]) -> None:
    """Let the engines that are made from now on have runners of this kind, where it serves their pool."""
    _kinds.insert(0, kind)


def make_runner(pool: KVPool) -> ModelRunner:
    """The runner of an engine on `pool`: of the kind that was registered last among those that serve it."""
    return next(kind for kind in _kinds if kind.serves(pool))(pool)
