"""Entering a stage: another layout where the stage has one, its rotary embedding, its checkpointing."""

import gc
from dataclasses import replace

from megacpt import log
from megacpt.checkpoint.load import load_training
from megacpt.checkpoint.manifest import directory_name
from megacpt.config.resolve import ResolvedStage
from megacpt.config.timeline import Event
from megacpt.parallel.mesh import picture, restart_process_group
from megacpt.train.build import build, held_exactly, set_up_stage
from megacpt.train.saving import report_finished_saves, save_checkpoint
from megacpt.train.session import Session


def enter(session: Session, event: Event) -> None:
    """Sets the model up for a stage. Losses of another stage are no measure for its own."""
    stage = session.plan.stages[event.stage]
    if stage.build != session.stage.build:
        change_layout(session, stage)
    session.stage = stage
    set_up_stage(session.model, session.optimizer, stage)
    session.drop_rows()
    session.state = replace(session.state, accepted=[])
    rope = stage.model.rope
    first = session.clock.stage_first_token[stage.index]
    described = {"theta": rope.theta, "type": rope.type, **rope.fields}
    session.directory.event("stage", event.step, first, stage=stage.name, rope=described)


def change_layout(session: Session, stage: ResolvedStage) -> None:
    """Builds the model under the layout of another stage, through a checkpoint of the step that is done."""
    step, mesh = session.state.step, session.model.mesh
    before, device, compute = mesh.layout, mesh.device, session.model.compute
    counts = session.optimizer.num_updates, session.optimizer.missed
    session.saver.wait()
    report_finished_saves(session, step, agreed=True)
    if session.saved is None or session.saved.step != step:
        save_checkpoint(session, session.state)
    session.saver.close()
    session.drop_rows()
    del mesh
    del session.model, session.optimizer  # the old shards leave memory before the new ones come
    gc.collect()
    restart_process_group(device, f"layout{stage.index}", session.plan.recipe.health.start_timeout_seconds)
    session.enter_phase("start")
    path = session.directory.checkpoints / directory_name(step)
    exact = held_exactly(session.plan, path, compute)
    session.model, session.optimizer = build(session.plan, stage, compute, device, exact)
    load_training(path, session.optimizer, *counts)
    session.open_saver()
    after = session.model.mesh.layout
    session.directory.change_facts(layout=str(after))
    session.directory.event("layout", step, session.state.tokens, before=str(before), after=str(after))
    log.info(f"from stage {stage.name} on: {picture(after)}")
