"""What the layout comparison must see: each breaks one thing on every rank."""


def replicated() -> None:
    """Gradients of norms and of repeated key heads are not summed over tp."""
    import megacpt.model.run as run

    run.sum_replicated_gradients = lambda parameters, group: None
