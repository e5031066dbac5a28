"""Draw the loss of a run, from its TensorBoard log: python -m dtcp.pretrain.plot FOLDER."""

import sys
from pathlib import Path

from dtcp.pretrain.folder_lock import NAME as LOCK

TRAINING = "loss_metrics/global_avg_loss"
VALIDATION = "validation_metrics/loss"


def read_losses(folder: Path, tag: str) -> dict[int, float]:
    """Loss by step over all starts of a run, as each step was last.

    A start that went back to an earlier step replaces what was logged from there on: those steps
    are no longer part of the run.
    """
    # A second to import; only rank 0 ever reads.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for events in _logs_of(folder):
        log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        tags = log.Tags()["scalars"]
        first = min((log.Scalars(each)[0].step for each in tags), default=sys.maxsize)
        losses = {step: value for step, value in losses.items() if step < first}
        if tag in tags:
            losses.update({event.step: event.value for event in log.Scalars(tag)})
    return losses


def _logs_of(folder: Path) -> list[Path]:
    """Logs of a run in the order of its starts, without those of runs in folders below its own."""
    runs = {lock.parent for lock in folder.rglob(LOCK)} - {folder}
    logs = folder.rglob("events.out.tfevents.*")
    # Their names begin with the second they were opened in; a copy has other times on the disk.
    return sorted((x for x in logs if runs.isdisjoint(x.parents)), key=lambda path: path.name)


def plot_losses(folder: Path) -> Path:
    """Write FOLDER/loss.png: training loss of each logged step, validation loss where measured.

    Raises:
        ValueError: the folder has no loss to draw.
    """
    training, validation = read_losses(folder, TRAINING), read_losses(folder, VALIDATION)
    if not training:
        raise ValueError(
            f"A plot is drawn from a TensorBoard log, got none in folder={folder}: "
            f"run with --metrics.enable_tensorboard."
        )
    # Without a display, and without pyplot's global figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(training), list(training.values()), linewidth=1.2, label="training")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    print(plot_losses(Path(sys.argv[1])))
