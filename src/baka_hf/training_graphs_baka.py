"""Training calls by CUDA graphs, `model.cuda_graphs_enable()`.

What the blocks do in a call, all chunks forward and all of them backward, depends on shapes alone: which rows begin a
text is a matter of masks. So it is recorded once for each kind of call, as two graphs over tensors that stay where they
are, and from then on launched at once. What comes in is copied to these tensors, what comes out from them, so that
callers need not know. Embedding, head, loss and optimizer are not in the graphs.

Between the two graphs the activations lie in memory that all recorded calls share. Therefore one call at a time can
wait for its backward pass; others are read without graphs meanwhile.
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from .cache_baka import BakaCache
from .calls_baka import Call, Results
from .compile_baka import on_host, runs_compiled_parts
from .functions_baka import rotary_table_of
from .graphs_baka import PlainWeights, recording
from .reading_baka import Reading
from .stream_baka import fixed_pauses

# Where calls are read this way. Without a graph it is right everywhere, but no faster.
DEVICES = ("cuda",)

NUM_GRAPHS = 8  # kinds of calls that are recorded for a model; each keeps what goes in and comes out
PATIENCE = 64  # calls before one of another kind may take the place of a recorded one

_recorders: "weakref.WeakKeyDictionary[nn.Module, Recorder]" = weakref.WeakKeyDictionary()


@on_host
def recorder_of(model: Any, call: Call) -> "Recorder | None":
    """What records calls of `model`, a `BakaModel`; None if this one cannot be recorded."""
    text, cache, config = call.text, call.cache, model.config
    if not (model.training and torch.is_grad_enabled()) or text.device.type not in DEVICES:
        return None
    if call.with_states or call.with_weights or call.with_memories or not text.is_floating_point():
        return None
    if call.real is not None or not all(span.is_aligned and span.in_step for span in call.spans):
        return None
    if config._attn_implementation != "sdpa" or config.uses_random_pauses:
        return None
    if any(layer.gradient_checkpointing for layer in model.layers) or _is_watched():
        return None
    if cache is not None and any(tensor.requires_grad for tensor in _tensors(cache)):
        return None
    recorder = _recorders.get(model)
    if recorder is None or not recorder.weights.are_in_place():
        forget(model)
        weights = PlainWeights(model)
        are_shared = len(set(map(id, weights.tensors))) < len(weights.tensors)
        if not weights.are_plain or are_shared or any(each.device != text.device for each in weights.tensors):
            return None
        recorder = _recorders[model] = Recorder(weights, model.embed_tokens.weight)
    return recorder


def _is_watched() -> bool:
    """Whether somebody looks at what autograd keeps or modules do: a replay shows nothing of it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or torch.is_anomaly_enabled() or _has_any_global_hook()


def forget(model: Any) -> None:
    """Free what is recorded for a model."""
    _recorders.pop(model, None)


class Recorder:
    """The recorded calls of a model, by their kind."""

    def __init__(self, weights: PlainWeights, embedding: torch.Tensor):
        self.weights, self.embedding = weights, embedding
        self.graphs: OrderedDict[Any, TrainingGraph] = OrderedDict()  # the one used last comes last
        self.seen: OrderedDict[Any, None] = OrderedDict()  # kinds of calls that were read as ever
        self.calls, self.last_recorded = count(), -PATIENCE
        self.lock = threading.Lock()
        self.turn: Any = None  # a weak reference to that of the call whose backward pass may still come
        device = embedding.device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @on_host
    def find(self, model: Any, call: Call) -> "Turn | None":
        """The turn of `call` with the graph that reads it; None the first time, and while another has its turn."""
        # Not the embedding, which is not in the graphs.
        trained = [each for each in self.weights.tensors if each.requires_grad and each is not self.embedding]
        if not trained:
            return None
        config = model.config
        kind = _kind_of(call), config.bptt_chunks, config.associative_write_cost > 0, tuple(map(id, trained))
        with self.lock:
            graph = self._graph_of(kind, trained, next(self.calls))
            turn = self.turn and self.turn()
            if graph is None or not (turn is None or turn.is_over):
                return None
            turn = Turn(graph)
            self.turn = weakref.ref(turn)
        return turn

    def _graph_of(self, kind: Any, trained: list[torch.Tensor], number: int) -> "TrainingGraph | None":
        if kind in self.graphs:
            self.graphs.move_to_end(kind)
            self.graphs[kind].last_call = number
            return self.graphs[kind]
        if kind not in self.seen:
            self.seen[kind] = None
            if len(self.seen) > 8 * NUM_GRAPHS:
                self.seen.popitem(last=False)
            return None
        if len(self.graphs) >= NUM_GRAPHS:
            # Texts of many lengths would all be recorded over and over.
            least = next(iter(self.graphs.values()))
            if number - max(least.last_call, self.last_recorded) < PATIENCE:
                return None
            self.graphs.popitem(last=False)
        self.last_recorded = number
        self.graphs[kind] = TrainingGraph(self, trained, number)
        return self.graphs[kind]


def _kind_of(call: Call) -> Any:
    """What a call must have in common with a recorded one."""
    text, cache, device = call.text, call.cache, call.text.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    flags = tuple(None if _comes_in(call, flag) else flag for flag in _flags_of(call))
    spans = flags, tuple((span.start, span.count) for span in call.spans)
    state = None if cache is None else tuple((x.shape, x.dtype) for x in _tensors(cache))
    return spans, (text.shape, text.dtype, text.requires_grad), state, autocast


def _flags_of(call: Call) -> list[Any]:
    """`first` and `has_previous` of every span."""
    return [flag for span in call.spans for flag in (span.first, span.has_previous)]


def _comes_in(call: Call, flag: Any) -> bool:
    """Whether a flag is input of a graph: if rows differ, and with a state in any case, lest there be more kinds."""
    return call.cache is not None or isinstance(flag, torch.Tensor)


def _inputs_of(call: Call) -> torch.Tensor:
    """[2 · spans, B] bool on the host: all flags, for each row."""
    return torch.stack([torch.as_tensor(flag).expand(call.batch_size) for flag in _flags_of(call)])


def _tensors(cache: BakaCache) -> list[torch.Tensor]:
    """What memory holds, keys and values of a state."""
    return list(cache.tensors().values())


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class TrainingGraph:
    """A kind of call, recorded: what goes in, what comes out, and the graphs between.

    Outputs are the normed states [B, L, D], if writing has a cost the strength of writes, a scalar, and if there is a
    state what its memory holds and each block's keys and values.

    While it runs, other leaves over the same numbers stand in the place of the model's parameters. Autograd ends at a
    leaf on the stream where it was first used, and whoever trains in parallel has used the parameters elsewhere.
    """

    call: Call  # as it is recorded: its text, its state and the flags of its spans are tensors of this object
    flags: torch.Tensor | None  # as `_inputs_of`, on the device; None if none comes in
    known_flags: torch.Tensor  # what they are, on the host
    inputs: list[torch.Tensor]  # the leaves
    outputs: list[torch.Tensor]
    num_judged: int  # how many of them come first that gradients come back for
    names: list[str]  # of what memory holds among them
    gradients: list[torch.Tensor | None]  # of `inputs`

    def __init__(self, recorder: Recorder, parameters: list[torch.Tensor], call_number: int):
        self.parameters, self.last_call = parameters, call_number
        self.pool, self.stream = recorder.pool, recorder.stream
        leaves = {id(parameter): nn.Parameter(parameter.detach()) for parameter in parameters}
        weights = recorder.weights
        places = zip(weights.holders, weights.names, weights.held, strict=True)
        self.places = [(*place, leaves[id(place[2])]) for place in places if id(place[2]) in leaves]
        self.leaves = list(leaves.values())
        self.graphs: tuple[Any, Any] | None = None  # forward and backward
        self.is_ready = False

    @property
    def text(self) -> torch.Tensor:
        """Embeddings [B, L, D]."""
        return self.call.text

    @runs_compiled_parts
    def read(self, model: Any, call: Call, turn: "Turn") -> Results:
        """Read all spans of `call`."""
        if not self.is_ready:
            with recording:
                self._prepare(model, call)
                self._record(model)
            self.is_ready = True
        self._take_in(call)
        outputs = _Replay.apply(turn, model, call.text, *self.parameters)
        (states, *strengths), state = outputs[: self.num_judged], outputs[self.num_judged :]
        memory, keys_values = None, []
        if call.cache is not None:
            memory, rest = dict(zip(self.names, state, strict=False)), state[len(self.names) :]
            keys_values = list(zip(rest[::2], rest[1::2], strict=True))
        pauses = torch.tensor(fixed_pauses(model.config), dtype=torch.int64)
        return Results([[states]], [[]], memory, keys_values, pauses, strength=next(iter(strengths), None))

    @on_host
    def _prepare(self, model: Any, call: Call) -> None:
        """Make room for what goes in."""
        text = call.text.detach().clone().requires_grad_(call.text.requires_grad)
        self.inputs = [*([text] if text.requires_grad else []), *self.leaves]
        flags, spans = _flags_of(call), call.spans
        self.flags = None
        if any(_comes_in(call, flag) for flag in flags):
            self.known_flags = _inputs_of(call)
            self.flags = self.known_flags.clone().to(text.device)
            flags = [own if _comes_in(call, flag) else flag for flag, own in zip(flags, self.flags, strict=True)]
            spans = [
                span._replace(first=first, has_previous=has_previous)
                for span, first, has_previous in zip(spans, flags[::2], flags[1::2], strict=True)
            ]
        cache = None if call.cache is None else call.cache.clone().to(text.device)
        self.call = replace(call, text=text, spans=spans, cache=cache)
        self.table = rotary_table_of(model.config, text.device, text.dtype)  # what graphs read must stay

    @on_host
    def _take_in(self, call: Call) -> None:
        if self.flags is not None:
            flags = _inputs_of(call)
            if not torch.equal(flags, self.known_flags):
                self.known_flags = flags.new_empty(0)  # unknown, should this be interrupted
                self.flags.copy_(flags.pin_memory() if self.flags.is_cuda else flags, non_blocking=True)
                self.known_flags = flags
        if self.call.cache is not None and call.cache is not None:
            torch._foreach_copy_(_tensors(self.call.cache), _tensors(call.cache))

    @runs_compiled_parts
    def _record(self, model: Any) -> None:
        device = self.text.device
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            # Once as it is: kernels are compiled and chosen.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run_forward(model)
                self._run_backward()
                self.outputs, self.gradients = [], []
            torch.cuda.current_stream().wait_stream(stream)
            graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            options: dict[str, Any] = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
            with torch.cuda.graph(graphs[0], **options):
                self._run_forward(model)
            with torch.cuda.graph(graphs[1], **options):
                self._run_backward()
        self.outputs = [output.detach() for output in self.outputs]  # activations belong to whoever is recorded next
        self.graphs = graphs

    @runs_compiled_parts
    def _run_forward(self, model: Any) -> None:
        try:
            self._put(leaves=True)
            with torch.enable_grad():
                reading = Reading(model, self.call, keeps_casts=False)
                reading.read()
                self._keep(reading.results())
        finally:
            self._put(leaves=False)

    @on_host
    def _put(self, leaves: bool) -> None:
        """Put the leaves in the place of the parameters, or these back in theirs."""
        for holder, name, parameter, leaf in self.places:
            holder[name] = leaf if leaves else parameter

    @on_host
    def _keep(self, results: Results) -> None:
        strengths = [] if results.strength is None else [results.strength]
        self.outputs = [torch.cat([states[-1] for states in results.states], dim=1), *strengths]
        self.num_judged = len(self.outputs)
        if self.call.cache is not None:
            assert results.memory is not None
            self.names = list(results.memory)
            self.outputs += [*results.memory.values(), *(x for both in results.keys_values for x in both)]

    @on_host
    def _run_backward(self) -> None:
        with torch.autocast(self.text.device.type, enabled=False):
            # The gradients of what is judged come in where that has been: it is not needed any more.
            judged = self.outputs[: self.num_judged]
            gradients = [each.detach() for each in judged]
            self.gradients = list(torch.autograd.grad(judged, self.inputs, gradients, allow_unused=True))

    # What callers see. Tensors of the graphs are written anew with each call: they get copies.

    def forward(self, model: Any, embeddings: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            self.text.copy_(embeddings)
        if self.graphs is None:
            self._run_forward(model)
        else:
            self.graphs[0].replay()
        return _copies([output.detach() for output in self.outputs])

    def backward(self, gradients: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """The gradients of `inputs`, of those of what is judged."""
        for output, gradient in zip(self.outputs, gradients, strict=False):
            output.detach().copy_(torch.zeros_like(output) if gradient is None else gradient)
        if self.graphs is None:
            self._run_backward()
        else:
            self.graphs[1].replay()
        copies = iter(_copies([gradient for gradient in self.gradients if gradient is not None]))
        return [None if gradient is None else next(copies) for gradient in self.gradients]


class Turn:
    """A call between its forward pass and its backward pass, and the graph that no other call can have until then."""

    def __init__(self, graph: TrainingGraph):
        self.graph, self.is_over = graph, False


class _Replay(torch.autograd.Function):
    """The outputs of a graph, as a function of the embeddings and of the weights it was recorded with."""

    @staticmethod
    @on_host
    def forward(
        ctx: Any, turn: Turn, model: Any, text: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.turn = turn
        ctx.versions = [parameter._version for parameter in turn.graph.parameters]
        return tuple(turn.graph.forward(model, text))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        judged, of_state = gradients[: ctx.turn.graph.num_judged], gradients[ctx.turn.graph.num_judged :]
        if all(gradient is None for gradient in judged) or any(gradient is not None for gradient in of_state):
            raise ValueError(
                "expected a state without gradients in the next call (`state.detach_()`): none flow from one call that "
                "CUDA graphs have read into another. `cuda_graphs_enable(False)` reads calls without them."
            )
        if ctx.turn.is_over:
            raise ValueError("expected one backward pass through a call that CUDA graphs have read, got another.")
        ctx.turn.is_over = True
        if [parameter._version for parameter in ctx.turn.graph.parameters] != ctx.versions:
            raise ValueError("expected the weights that the call was read with in its backward pass, got changed ones.")
        of_inputs = ctx.turn.graph.backward(judged)
        return None, None, *([] if ctx.turn.graph.text.requires_grad else [None]), *of_inputs
