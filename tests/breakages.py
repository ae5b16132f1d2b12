"""What the layout comparison must see: each function breaks one thing on the rank that calls it."""

from dataclasses import replace


def replicated() -> None:
    """tp: gradients of norms and of repeated key heads are not summed."""
    import megacpt.model.run as run

    run.sum_replicated_gradients = lambda parameters, group: None


def keys() -> None:
    """cp: the gathered keys are those of the token before."""
    import megacpt.parallel.context as context

    take = context.Gather.take
    context.Gather.take = lambda self, k, v: tuple(x.roll(1, 0) for x in take(self, k, v))


def local_count() -> None:
    """dp, cp: the loss is divided by the labels of this rank's rows (Megatron-LM issue 7452, finding 9)."""
    import megacpt.train.step as step

    original = step.forward_backward

    def local(model, batches, counts, *rest):
        labels = sum(_labels_of(model, batch) for batch in batches)
        return original(model, batches, replace(counts, weight=labels), *rest)

    step.forward_backward = local


def _labels_of(model, micro_batch) -> int:
    from megacpt.model.inputs import to_inputs

    return int((to_inputs(micro_batch, model.mesh).labels >= 0).sum())


def tied() -> None:
    """pp: the embedding and the head of a tied model each keep their own gradient."""
    import megacpt.model.run as run

    run.sum_tied_gradients = lambda model: None


def other_micro_batch() -> None:
    """pp: stages after the first take positions and documents of the micro-batch before."""
    import megacpt.model.run as run

    original = run._Work.inputs_of

    def before(self, micro_batch):
        return original(self, max(0, micro_batch - (0 not in self.model.plan.of(self.model.mesh.pipeline_rank))))

    run._Work.inputs_of = before


def doubled_weights() -> None:
    """zero-bubble: one weight gradient of each action is added twice."""
    import megacpt.model.run as run

    original = run.compute_deferred
    run.compute_deferred = lambda later: (later.queue.append(later.queue[0]), original(later))


def counted_twice() -> None:
    """The norm counts the tied embedding on both of its ranks."""
    from megacpt.model.decoder import Decoder

    Decoder.counted_parameters = lambda self: list(self.parameters())


def norm_of_the_stage() -> None:
    """The norm is that of a rank's own stages."""
    import megacpt.train.step as step
    from megacpt.optim import clip

    original = clip.grad_norm

    class Without:
        def __init__(self, mesh):
            self.device, self.tensor = mesh.device, mesh.tensor
            self.sum_over = lambda axes, x: mesh.sum_over([axis for axis in axes if axis != "pp"], x)

    step.grad_norm = lambda parameters, mesh, backend: original(parameters, Without(mesh), backend)


def norm_counts_replicas() -> None:
    """The norm counts parameters that tp replicates once on every tp rank (Megatron-LM issues 7452 and 5916)."""
    from megacpt.optim import clip

    clip.is_replicated = lambda parameter: False


def mean_of_means() -> None:
    """Each micro-batch's loss is divided by its own labels: gradients of short micro-batches weigh too much."""
    from megacpt.model import run

    original = run._Gradients.__init__

    def each_alone(self, model, schedule, micro_batches, objective, scale, every):
        labels = max(1, _labels_of(model, micro_batches[0]))
        original(self, model, schedule, micro_batches, objective, 1 / (labels * len(micro_batches)), every)

    run._Gradients.__init__ = each_alone


def averaged_gradients() -> None:
    """FSDP averages gradients over its ranks, although the loss is divided by the global count already."""
    from megacpt.parallel import fsdp

    original = fsdp.shard

    def dividing(root, blocks, mesh, *more) -> None:
        original(root, blocks, mesh, *more)
        for module in [*blocks, root]:
            module.set_gradient_divide_factor(float(mesh.fsdp.size()))

    fsdp.shard = dividing
    from megacpt.model import build

    build.shard = dividing


def own_keys_only() -> None:
    """cp: gradients of keys and values that other ranks' queries have are lost."""
    from megacpt.parallel import context

    def own(total, group):
        return total.view(group.size(), -1, *total.shape[1:])[group.rank()]

    context.scatter_sum_tokens = own


def weights_of_the_token_before() -> None:
    """data: a label weighs what the token weighs that predicts it."""
    from megacpt.data.domain import DomainData

    original = DomainData.label_weights
    DomainData.label_weights = lambda self, document, offset, length: original(self, document, offset - 1, length)


def all_labels_counted() -> None:
    """data: the step is divided by its number of labels, whatever they weigh."""
    from megacpt.data.loader import StageData, StepCounts

    def by_lengths(self, picks):
        lengths = [length for pick in picks for _, _, length in self.indices[pick.domain].row(pick.row)]
        labels = sum(lengths) - len(lengths)
        return StepCounts(labels, float(labels), len(lengths))

    StageData.count = by_lengths


def documents_alone() -> None:
    """data: documents that belong together are items of their own."""
    from megacpt.data import loader

    original = loader.make_batch
    loader.make_batch = lambda *arguments: replace(original(*arguments), item=None)
