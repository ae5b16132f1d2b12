"""A stage's change of what is trained, in place: between steps, on all ranks."""

from megacpt.config.trainable import Trainable
from megacpt.model import build
from megacpt.model.decoder import Decoder
from megacpt.optim.adamw import AdamW


def set_trainable(model: Decoder, optimizer: AdamW, trainable: Trainable) -> None:
    """From now on the stage's parameters get gradients, and no others. What it trains first gets a master and moments; what it freezes
    keeps both, and stands where it stands."""
    build.set_trainable(model, trainable.names)
    optimizer.parameters = dict(model.named_parameters())  # one that got a master is another object
    optimizer.hold(trainable.held)
