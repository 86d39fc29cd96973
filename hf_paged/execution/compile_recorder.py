"""CompileRecorder: records the operators of a function, and has ``torch.compile`` fuse them."""

import functools

import torch

from hf_paged.execution.op_recorder import OpRecorder, OpRecording
from hf_paged.execution.recorder import GraphRecorder, Recorder, Recording, Work


class CompileRecorder(Recorder):
    """Compiles what an `OpRecorder` records, for the shapes that its tensors have.

    The compiler sees a list of operators, and nothing of the model's Python code. Fused operators round otherwise than
    torch's own: equal tokens are not promised, as they are of other recorders.

    Parameters
    ----------
    graphs : GraphRecorder or None
        Records the compiled functions; None: a replay calls them.
    """

    def __init__(self, graphs: GraphRecorder | None):
        _wake_compiler()
        self._ops, self._graphs = OpRecorder(), graphs
        self.must_be_alone = graphs is not None

    def record(self, function: Work) -> Recording:
        operators = self._ops.record(function)
        compiled = OpRecording(torch.compile(operators.code, fullgraph=True, dynamic=False), operators.constants)
        if self._graphs is not None:
            return self._graphs.record(compiled.replay)
        compiled.replay()  # It is compiled now.
        return compiled


@functools.cache
def _wake_compiler() -> None:
    """Let the compiler come up: with its first function it replaces functions of torch's, which looks as if a model had
    changed whose calls have begun.
    """
    torch.compile(torch.neg, backend="eager")(torch.zeros(2))  # Which needs no C++ compiler.
