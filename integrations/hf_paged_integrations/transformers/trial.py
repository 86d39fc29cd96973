"""The trial of a model: tiny forwards that tell whether its rows can run packed, before an engine serves it."""

import contextlib
import functools
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged.atomic import Undo, atomically
from hf_paged.cache.layers import PagedLayer
from hf_paged.compat.torch import DispatchMode, draws_random_numbers
from hf_paged.compat.transformers import CACHE_ARGUMENT
from hf_paged.errors import OutOfBlocksError
from hf_paged.execution.packed_cache import NotPackableError
from hf_paged.execution.workspace import WorkspaceMeter
from hf_paged.generation.engine import Engine
from hf_paged.memory.kv_pool import KVPool
from hf_paged.models import forward_context, registry
from hf_paged.models.module_state import ModuleState
from hf_paged.models.refusal import Refusal
from hf_paged.reasons import Reason
from hf_paged.scheduling.request import Request
from hf_paged.scheduling.scheduler import Scheduler, SchedulerOutput
from hf_paged_kernels.faults import is_device_fault, is_out_of_memory

# Of the largest logit: what a row may change by when another is packed beside it.
_TOLERANCE = 0.05


class _NoRandomNumbers(DispatchMode):
    """Lets no operator of this thread draw random numbers: the caller's are as they were.

    In dense ``generate`` a model in training mode draws them for a rectangle of rows, in an order that packed steps do
    not have.

    Raises
    ------
    NotPackableError
        At the first operator that would.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if draws_random_numbers(func, args, kwargs):
            raise NotPackableError(Reason.TRAINING.of(str(func)))
        return func(*args, **kwargs)


class _ForwardError(Exception):
    """The model's forward has raised `error`."""

    def __init__(self, error: Exception):
        super().__init__(type(error).__name__)
        self.error = error


def make_engine(model: PreTrainedModel, device: torch.device, may_draw: bool = True) -> Engine | Refusal:
    """Make an engine for a model, or find out why it can have none.

    Runs a token, and one more after it, through an ordinary cache, which sizes the model's pool, and then packed. The
    second of each shows what a model keeps elsewhere than in its cache, such as a recurrent state. The forwards run
    uncompiled, whatever the user compiled: what they check is not checked again in compiled steps.

    Parameters
    ----------
    device : torch.device
        Where a forward of the model begins.
    may_draw : bool
        Whether the model may draw random numbers.

    Raises
    ------
    PagedError
        If the model's config comes from the environment, and a variable has a wrong value.
    Exception
        What a forward raises once and not again: such an error, as of a signal's handler, is the caller's. One that
        comes again is the model's own, and a reason to refuse it. A device that fails, or has no memory for a token,
        says nothing of the model: that error is the caller's as well.
    """
    registry.config_of(model)  # A wrong value of the environment is the user's, and no failure of the model.
    # The stance is the process's: callers hold `registry.trial_lock`.
    with torch.compiler.set_stance("force_eager"), contextlib.nullcontext() if may_draw else _NoRandomNumbers():
        try:
            return _try_model(model, device)
        except _ForwardError as failure:
            first = failure.error
        try:
            is_models_own = not is_device_fault(first) and not is_out_of_memory(first)
            if is_models_own and _fails_again(model, device, type(first)):
                return Refusal(Reason.FAILING_STEP.of(type(first).__name__))
            raise first
        finally:
            del first  # Its traceback holds this frame: the cycle would keep blocks until gc.


def _fails_again(model: PreTrainedModel, device: torch.device, kind: type[Exception]) -> bool:
    """Tell whether a second trial ends with an error of the same kind."""
    try:
        _try_model(model, device)
    except _ForwardError as failure:
        return type(failure.error) is kind
    return False


def _try_model(model: PreTrainedModel, device: torch.device) -> Engine | Refusal:
    """Size the pool, make the engine, run a packed step on it, and compare the logits of both forwards."""
    token = model.generation_config.bos_token_id
    token = token if isinstance(token, int) and token >= 0 else 0
    try:
        alone, pool = _run_alone(model, token, device)
        if pool is None:
            # In a call from inside a forward, nothing is stored yet.
            return Refusal(Reason.NO_POOL, is_lasting=forward_context.current_forward() is None)
        engine = Engine(pool)
        meter = WorkspaceMeter()
        packed = _run_packed(model, engine, token, meter)
    except NotPackableError as error:
        return Refusal(error.why, is_lasting=error.why is not Reason.FULL_POOL)
    except OutOfBlocksError:
        return Refusal(Reason.FULL_POOL, is_lasting=False)
    # A row that is packed beside another must not feel it, and finds all that it has stored.
    if not torch.allclose(packed, alone, rtol=_TOLERANCE, atol=float(_TOLERANCE * alone.abs().max())):
        return Refusal(Reason.MIXED_ROWS)
    engine.make_room(meter.workspace())
    return engine


def _run_alone(model: PreTrainedModel, token: int, device: torch.device) -> tuple[torch.Tensor, KVPool | None]:
    """Run a token, and the next, through an ordinary cache: this makes the model's pool and sizes its groups.

    Returns
    -------
    (logits, pool)
        Logits ``[2, vocab]``, of either token; None for the pool if the model does not have just one. The pool knows
        the model's KV cache groups then, and no others: what was stored under another dtype stays behind.

    Raises
    ------
    NotPackableError
        If the states of the model did not go into pages, or not all of them.
    """
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        logits = [_logits(model, token, cache, device)]
        pools = registry.pools_under(model)
        stored = [layer for layer in cache.layers if isinstance(layer, PagedLayer) and layer.is_paged]
        if len(pools) != 1 or not pools[0].groups or not stored:
            _raise_what_kept_out(cache)
            return logits[0][None], None
        if pools[0].groups.keys() == stored[0].batch.groups.keys():
            break
        registry.renew_pools(model, even_good=True)
    state, counted = ModuleState(model), (pools[0].page_reads, pools[0].gathers.copy())
    logits.append(_logits(model, token, cache, device))
    pools[0].page_reads, pools[0].gathers = counted  # Statistics are of the user's calls.
    if (name := state.changed(model)) is not None:
        raise NotPackableError(Reason.MODULE_STATE.of(name))
    return torch.stack(logits), pools[0]


def _logits(model: PreTrainedModel, token: int, cache: DynamicCache, device: torch.device) -> torch.Tensor:
    """Append a token to a cache of one row: its logits ``[vocab]``."""
    ids = torch.tensor([[token]], device=device)
    with torch.no_grad():
        forward = functools.partial(model, input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache})
        return _call(forward).logits[0, -1]


def _raise_what_kept_out(cache: DynamicCache) -> None:
    """Raise why a forward's states did not go into pages, if a layer knows, as with autocast inside the forward."""
    layers = (layer for layer in cache.layers if isinstance(layer, PagedLayer))
    why = next((layer.dense_because for layer in layers if layer.dense_because is not None), None)
    if why is not None:
        raise NotPackableError(why)


def _run_packed(model: PreTrainedModel, engine: Engine, token: int, meter: WorkspaceMeter) -> torch.Tensor:
    """Run a token, and the next, beside another row, in packed steps of the engine's runner: logits ``[2, vocab]``."""
    scheduler, runner = Scheduler(engine.scheduler.groups, token_budget=8), engine.runner
    away = -1 if token > 1 else 1  # The other row has other tokens: a mean over equal ones would show nothing.
    others = [token + away, token + 2 * away, token + away]
    requests = [Request(others, engine.block_pools), Request([token], engine.block_pools)]
    undo = Undo(functools.partial(_release, engine.pool, requests))
    try:
        atomically(functools.partial(_enter, engine.pool, scheduler, requests))
        logits = []
        for _ in range(2):
            step = atomically(functools.partial(_plan, engine.pool, scheduler, requests))
            runner.prepare(step.chunks)  # Its buffers grow now, and not while the forward is measured.
            forward = functools.partial(_call, functools.partial(runner.try_out, model, step.chunks))
            logits.append(meter.run(forward, sum(chunk.end - chunk.start for chunk in step.chunks))[1])
            atomically(functools.partial(_note, engine.pool, scheduler, step, token))
        return torch.stack(logits)
    finally:
        undo.now()


def _call(forward: Callable):
    """Call a forward. An error of the model's own is told from all others."""
    try:
        return forward()
    except (NotPackableError, OutOfBlocksError):
        raise
    except Exception as error:
        raise _ForwardError(error) from error


# In sections.


def _enter(pool: KVPool, scheduler: Scheduler, requests: list[Request]) -> None:
    with pool.lock:
        for request in requests:
            scheduler.add(request)


def _plan(pool: KVPool, scheduler: Scheduler, requests: list[Request]) -> SchedulerOutput:
    """Plan one step of all tokens of the requests."""
    with pool.lock:
        step = scheduler.schedule()
    if len(step.chunks) < len(requests):
        raise NotPackableError(Reason.FULL_POOL)
    return step


def _note(pool: KVPool, scheduler: Scheduler, step: SchedulerOutput, token: int) -> None:
    """Note that a step has run, and that `token` is next in every row."""
    with pool.lock:
        scheduler.commit(step)
        for chunk in step.chunks:
            chunk.request.tokens.append(token)


def _release(pool: KVPool, requests: list[Request]) -> None:
    with pool.lock:
        for request in requests:
            request.release()
