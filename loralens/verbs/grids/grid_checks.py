"""Checks every run of a grid against its model and texts before the first one begins, and estimates its memory."""

from typing import TYPE_CHECKING, NamedTuple

from loralens.verbs.inputs.adapters import read_adapter
from loralens.verbs.inputs.training import TrainingInputs
from loralens.verbs.inputs.training_options import TrainingOptions

if TYPE_CHECKING:  # torch takes a second
    from torch import nn

# A process that has imported torch and transformers and has run a step, without its model: measured with torch 2.13 for
# CPUs and transformers 5.
PROCESS = 600_000_000
# Bytes for each number that is trained: itself, its gradient, and the two moments of AdamW, in float32.
TRAINED = 16
# What a process holds of what it uses: allocators keep some, and how much depends on their kind and on the threads. The
# same run of a causal model took 1.8 GB on one machine, and on another 2.6 GB, 0.8 % more than the parts add up to.
HELD = 1.15
# Numbers that are kept for the backward pass or live beside it, for each output of a layer with weights: its input, its
# output, and what functions between layers keep. See tests/verbs/grids/test_memory.py.
KEPT = 4.5


class Counts(NamedTuple):
    """The number of parameters that a run trains, and of those of the model that it does not."""

    trainable: int
    frozen: int


def check_run(options: TrainingOptions, inputs: TrainingInputs) -> Counts:
    """Refuse a run that its model or its texts do not allow, and count its parameters.

    Raises
    ------
    OptionError
        A glob matches nothing, a rank is larger than any matrix allows, the texts of a step cannot be divided, or
        there are no texts to evaluate on.
    """
    from loralens.training.from_adapter import start_options
    from loralens.training.layers.construction import matrix_of
    from loralens.training.layers.embedding import EmbeddingLayer
    from loralens.training.layers.experts import ExpertLayer
    from loralens.training.targets import check_numbers, plan_layers

    options.part(1)
    options.check_evaluation(has_texts=inputs.evaluated is not None)
    method = options.training_method()
    rank, alpha = options.rank, options.alpha
    targets, exclude, pattern = list(options.targets), list(options.exclude), dict(options.rank_pattern)
    if options.start_from is not None:
        start = start_options(read_adapter(options.start_from, {}, applies_all=True), method=method)
        targets, rank, pattern, alpha, exclude = start.targets, start.rank, start.rank_pattern, start.alpha, []
    check_numbers(method, rank=rank, alpha=alpha, dropout=options.dropout, seed=options.seed)
    plan = plan_layers(
        inputs.loaded.model,
        method,
        targets=targets,
        exclude=exclude,
        rank=rank,
        rank_pattern=pattern,
        heads=list(options.heads or inputs.heads),
        dropout=options.dropout,
    )
    trainable = 0
    for name, kind in plan.kinds.items():
        module = plan.named[name]
        matrix, count = matrix_of(module, kind, name), 1
        if kind is ExpertLayer:
            count = len(ExpertLayer.stack(module, name.rpartition(".")[2]))
        out, in_ = matrix.shape
        # The factor that is drawn may be frozen: A, for an embedding B.
        sides = out + in_ if not method.frozen else in_ if kind is EmbeddingLayer else out
        trainable += count * plan.ranks[name] * sides + (out if method.magnitude else 0)
    heads = {id(p): p.numel() for head in plan.heads for p in plan.named[head].parameters()}
    total = sum(parameter.numel() for parameter in inputs.loaded.model.parameters())
    return Counts(trainable + sum(heads.values()), total - sum(heads.values()))


def run_bytes(options: TrainingOptions, inputs: TrainingInputs, trained: int) -> int:
    """An estimate of the memory of a run in a process of its own, in bytes, rather too much than too little."""
    model = inputs.loaded.model
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    longest = max((len(tokens) for tokens in inputs.examples.tokens), default=1)
    tokens = options.part(1) * min(longest, options.length)
    if options.checkpointing:
        # The blocks keep their inputs alone, and one block at a time everything.
        tokens = tokens // 2
    # The pages of the file from which the weights are read count as memory of the process too.
    return PROCESS + int(HELD * (2 * weights + TRAINED * trained + KEPT * 4 * tokens * _outputs(model)))


def _outputs(model: "nn.Module") -> int:
    """The number of outputs of all layers with weights for one token, except for the layer that maps to the vocabulary.

    The loss of a causal language model does not compute all logits at once.
    """
    from loralens.training.targets import output_embedding_of

    head = output_embedding_of(model)
    leaves = [module for module in model.modules() if module is not head and not any(True for _ in module.children())]
    return sum(_width(module) for module in leaves)


def _width(module: "nn.Module") -> int:
    """The number of outputs of a layer for one token, by the shape of its weight; 0 without a weight."""
    weight = getattr(module, "weight", None)
    if weight is None or not hasattr(weight, "shape") or not weight.ndim:
        return 0
    # An embedding has (words, width) and a linear layer (out, in).
    sides = {"num_embeddings": 1}
    return int(weight.shape[next((side for name, side in sides.items() if hasattr(module, name)), 0)])
