"""OpRecorder: records the operators that a function runs, on any device. A replay calls them one after another."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from hf_paged.compat.torch import DispatchMode, draws_random_numbers, returns_to_host, tree_map_only
from hf_paged.execution.recorder import Recorder, Recording, UncapturableError, Work
from hf_paged.reasons import Reason, Why

Code = Callable[..., torch.Tensor]
# Ways to what a tensor holds that pass by the operators.
_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}


class OpRecorder(Recorder):
    """Records the operators that a function runs, those of torch and custom ones.

    A replay runs no Python code of the function. What that may depend on must be as it was, so a recording ends where
    an operator tells the host what tensors hold, or a size that depends on it, and where one draws random numbers.
    """

    def record(self, function: Work) -> "OpRecording":
        tape = _Tape()
        with _Reads(tape), tape:
            result = function()
        return OpRecording(*tape.finish(result))


class OpRecording(Recording):
    """A list of operators, as a function without branches.

    Attributes
    ----------
    code : callable
        Takes the constants, and returns the result.
    constants : list of torch.Tensor
        The tensors that no operator made: inputs, weights, pages. Kept alive.
    """

    def __init__(self, code: Code, constants: list[torch.Tensor]):
        self.code, self.constants = code, constants

    def replay(self) -> torch.Tensor:
        return self.code(*self.constants)


class _Tape(DispatchMode):
    """Notes every operator that its thread runs in an `fx.Graph`, and runs it.

    A tensor is known by its identity: an operator in place returns the tensor that it writes to. All tensors are kept
    until the recording is over, so that no other one gets the identity of one, or its memory.
    """

    def __init__(self):
        super().__init__()
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}  # By the identity of a tensor.
        self._tensors: list[torch.Tensor] = []
        self._constants: list[torch.Tensor] = []
        self._last_constant: fx.Node | None = None
        # Addresses of memory: that of constants, and that which operators have made.
        self._given: set[int] = set()
        self._made: set[int] = set()
        self._obstacle: Why | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if draws_random_numbers(func, args, kwargs):
            self.refuse(Reason.RANDOM_STEP.of(str(func)))
        if returns_to_host(func, args):
            self.refuse(Reason.HOST_READ.of(str(func)))
        inputs, options = tree_map_only(torch.Tensor, self._node_of, (args, kwargs))
        output = func(*args, **kwargs)
        self._note(self._graph.call_function(func, tuple(inputs), options), output)
        return output

    def refuse(self, why: Why) -> None:
        """End the recording.

        Raises
        ------
        UncapturableError
            Code of the function may catch it; `finish` raises it again.
        """
        self._obstacle = self._obstacle or why
        raise UncapturableError(why)

    def has_made(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies in memory that an operator made during this recording."""
        return _address(tensor) in self._made

    def finish(self, result: torch.Tensor) -> tuple[Code, list[torch.Tensor]]:
        """The function of all operators that returns `result`, and the constants that it takes."""
        if self._obstacle is not None:
            raise UncapturableError(self._obstacle)
        self._graph.output(self._node_of(result))
        source = self._graph.python_code("self")
        namespace = dict(source.globals)
        exec(compile(source.src, "<recorded operators>", "exec"), namespace)
        return functools.partial(namespace["forward"], None), self._constants

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node of a tensor that an operator takes; one that none has returned is a constant."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)]
        if self.has_made(tensor):
            self.refuse(Reason.UNKNOWN_TENSOR.of(f"shape {tuple(tensor.shape)}"))
        self._given.add(_address(tensor))
        # Constants are the parameters of the code, and stand before all else.
        with self._graph.inserting_after(self._last_constant):
            node = self._last_constant = self._graph.placeholder(f"constant_{len(self._constants)}")
        self._constants.append(tensor)
        self._keep(tensor, node)
        return node

    def _note(self, node: fx.Node, output: Any) -> None:
        """Note what an operator has returned: a tensor, several, or nothing."""
        if isinstance(output, torch.Tensor):
            self._note_tensor(node, output)
        elif isinstance(output, list | tuple):
            for index, part in enumerate(output):
                if part is not None:
                    self._note(self._graph.call_function(operator.getitem, (node, index)), part)
        elif output is not None:
            self.refuse(Reason.HOST_READ.of(str(node.target)))

    def _note_tensor(self, node: fx.Node, tensor: torch.Tensor) -> None:
        if id(tensor) in self._nodes:
            return  # It was written in place.
        self._keep(tensor, node)
        if _address(tensor) not in self._given:
            self._made.add(_address(tensor))

    def _keep(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._tensors.append(tensor)
        self._nodes[id(tensor)] = node


def _address(tensor: torch.Tensor) -> int:
    """Where the memory begins that a tensor is a view of; its own identity for one that has none."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # oneDNN's layouts, and classes that wrap other tensors.
        return id(tensor)


class _Reads(TorchFunctionMode):
    """Ends a recording where Python reads a tensor past the operators."""

    def __init__(self, tape: _Tape):
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS or func is torch.Tensor.data_ptr and self._tape.has_made(args[0]):
            self._tape.refuse(Reason.HOST_READ.of(func.__name__))
        return func(*args, **(kwargs or {}))
