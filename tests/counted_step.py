"""The bytes of a step of the real program at true shapes: `train_step` on pretended tensors, beside ranks that are pretended, every storage
followed from its birth to its death. Minutes for a model of 32 layers."""

import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from memory import Alive
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megacpt.data.loader import Batch, StepCounts
from megacpt.model.build import build_model, sharding_of
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.optim import adamw
from megacpt.optim.trainable import set_trainable
from megacpt.parallel.mesh import build_mesh, rank_grid
from megacpt.plan.memory import CHUNK_LOGITS, Job
from megacpt.train.step import Update, train_step


class Peak(Alive):
    """The most bytes after any operation that is no view."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if not function.is_view:
            self.most = max(self.most, self.bytes())
        return out


def counted_peak(job: Job, rank: int) -> int:
    """Bytes at the fullest moment of the second step of a pipeline rank, as on a GPU: in bfloat16, with Triton's operations. On a process
    of its own (`on_ranks`): its groups are replaced."""
    if dist.is_initialized():
        dist.destroy_process_group()
    first = int(rank_grid(job.layout)[rank, 0, 0, 0, 0])
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=job.layout.world_size)
    head = sys.modules["megacpt_kernels.linear_cross_entropy"]
    head._chunk = lambda weight, chunk_logits: max(64, CHUNK_LOGITS // weight.shape[0])
    adamw.place_of = lambda name, parameter: adamw.Place(0, 1, 1, 0)
    mesh, options = (
        build_mesh(job.layout, torch.device("cpu")),
        ModelOptions(attention_backend="triton", operations="triton"),
    )
    to_empty, Decoder.to_empty = Decoder.to_empty, lambda self, device: self  # no memory for it before all is pretended
    without_master = frozenset(job.config.shapes()) - job.held if job.exact else ()
    sharding = sharding_of(job.parallel)
    model = build_model(job.config, mesh, torch.bfloat16, options, job.plan, sharding, without_master)
    Decoder.to_empty = to_empty
    tokens, update = job.parallel.micro_batch_tokens, Update(1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
    starts, ids = np.arange(0, tokens, job.seq_len), np.zeros((tokens // job.seq_len, job.seq_len), np.int64)
    positions = np.tile(np.arange(job.seq_len), (len(starts), 1))
    batch = Batch(ids, ids + 1, positions, starts, np.arange(len(starts) + 1), [""] * len(starts))
    step = SimpleNamespace(micro_batches=[batch] * job.micro_batches, counts=StepCounts(tokens, tokens, 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.set_activation_checkpointing(job.parallel.activation_checkpointing)
        optimizer = adamw.AdamW(dict(model.named_parameters()), "torch", held=job.held)
        if job.trainable:
            set_trainable(model, optimizer, job.trainable)
        with Peak() as peak:
            for _ in range(2):
                train_step(model, optimizer, step, job.reduce, update)
    return peak.most
