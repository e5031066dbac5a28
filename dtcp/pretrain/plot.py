"""Draw the loss of a run, from its TensorBoard log: python -m dtcp.pretrain.plot FOLDER."""

import sys
from pathlib import Path

TRAINING = "loss_metrics/global_avg_loss"
VALIDATION = "validation_metrics/loss"


def read_losses(folder: Path, tag: str) -> dict[int, float]:
    """Loss by step over all starts of a run; a step that was repeated counts as it was last."""
    # A second to import; only rank 0 ever reads.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for events in sorted(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime):
        log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        if tag in log.Tags()["scalars"]:
            losses.update({event.step: event.value for event in log.Scalars(tag)})
    return dict(sorted(losses.items()))


def plot_losses(folder: Path, *, title: str = "") -> Path:
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
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    print(plot_losses(Path(sys.argv[1])))
