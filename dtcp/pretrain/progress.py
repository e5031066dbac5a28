"""What a run prints: its shape at the start, then one line per step."""

import contextlib
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from dtcp.torchtitan import compat as compat
from dtcp.torchtitan.hf_model import HuggingFaceConfig

import torch
from torch import distributed as dist
from torch import nn
from torchtitan.components import metrics as titan
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.models.common.decoder import Decoder

from dtcp.copied_weights import COPIES_OP
from dtcp.distributed.groups import rank_of_process
from dtcp.distributed.ledger import LEDGER, traffic_since
from dtcp.experts import library_for
from dtcp.mixer import Mixer
from dtcp.parallelize.experts import largest_load
from dtcp.planner.even_routes import EXPERT_OPS
from dtcp.pretrain.dry_run import is_dry
from dtcp.pretrain.expected import warning
from dtcp.pretrain.launch import ranks_of_machine
from dtcp.pretrain.row_losses import RowLosses
from dtcp.pretrain.staged import largest_of_stages, of_all_stages

LOGGED_BY_RANK_0 = "ZBVZeroBubble"
"""A schedule whose runs torchtitan (0.3.0) has logged by rank 0, and not by the last stage's."""

RECENT = 20  # steps whose mean duration predicts the time that is left

EXPECTED = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",  # torchrun sets it, torchtitan sets it otherwise
    "model.safetensors.index.json not found",  # only exports read it, and they do without
    "please use `get_last_lr",  # torchtitan asks a scheduler that it has just loaded
    "Set timeout is now only supported",  # of a dry run's process group there is nothing to wait
    "may not have complete support on cpu device mesh",  # why verify starts from whole weights
    "Pipeline Parallel loss is not visible",  # every stage hears it, and rank 0 prints
    "Matplotlib created a temporary cache",  # where nobody has a home, as in many containers
)


def quiet(rank: int) -> None:
    """Show only warnings of libraries, on rank 0 alone, and without expected ones."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(lambda record: not any(x in record.getMessage() for x in EXPECTED))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger().setLevel(logging.WARNING if rank == 0 else logging.CRITICAL)
    # How DTensor splits a redistribution, once for each kind of tensor and rank.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    if rank != 0:
        warnings.simplefilter("ignore")
    for text in EXPECTED:
        warnings.filterwarnings("ignore", message=f".*{text}")


def say(line: str) -> None:
    """Print a line on the first rank, or on the only one of a dry run."""
    if not dist.is_initialized() or dist.get_rank() == 0 or dist.get_backend() == "fake":
        print(line, flush=True)


class TensorBoard(titan.TensorBoardLogger):
    """torchtitan's, with each line in the file once it is logged: a run may be killed after it."""

    def log(self, metrics: dict[str, Any], step: int) -> None:
        super().log(metrics, step)
        # By itself the writer does so every two minutes; 0.2 ms.
        self.writer.flush()


class Progress(MetricsProcessor):
    """torchtitan's metrics (TensorBoard, W&B), and one line per step for the console."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(self, config: Config, *, config_dict: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(config, config_dict=config_dict, **kwargs)
        self.steps = config_dict["training"]["steps"]
        each = config_dict["dtcp"]["ranks_per_node"] or ranks_of_machine()
        self.ranks_per_node: int = each if each < dist.get_world_size() else 0
        self.losses: dict[int, float] = {}
        self._traffic = LEDGER.snapshot()
        self.is_held = False  # to a forecast
        self.expected = 0  # bytes over cp since the last line, of a run that is held
        self.row_losses = RowLosses(self.parallel_dims)
        self.row_work: list[tuple[int, ...]] = []
        """Of each micro-batch since the last line, attention work by data-parallel rank."""
        self._counted_from = 0
        """The step after which what a line says was counted from."""
        self._has_compiled = False
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def _build_metric_logger(self, **kwargs: Any) -> BaseLogger:
        # torchtitan (0.3.0) looks the class up by its name, and hides what it has made.
        # Nor does the first rank of the last stage know more: all stages know the loss.
        kwargs["pp_schedule"] = LOGGED_BY_RANK_0
        plain = titan.TensorBoardLogger
        titan.TensorBoardLogger = TensorBoard
        try:
            return super()._build_metric_logger(**kwargs)
        finally:
            titan.TensorBoardLogger = plain

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Send the metrics to the loggers and print the line.

        Bytes per step are those that rank 0 received for context and expert parallelism, as the
        ops counted them; FSDP's and TP's own are left out. Of experts, the tokens of the most
        loaded one over the mean, in the worst layer; of rows, the work of the busiest rank.
        """
        now = time.perf_counter()
        steps = step - self._counted_from
        seconds = (now - self.time_last_log) / steps
        batch_ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        tokens = self.ntokens_since_last_log * batch_ranks / (now - self.time_last_log)
        received, of_experts, between = (each / steps for each in self._received())
        expected = self.expected / steps
        load = self._largest_load()
        rows = largest_work(self.row_work)
        memory = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        if self.parallel_dims.cp > 1:
            global_max_loss = self.row_losses.largest()
        if isnan(global_max_loss):
            # That of a rank without a token that has a loss: torchtitan (0.3.0) divides 0 by 0.
            global_max_loss = global_avg_loss
        metrics = {
            "loss_metrics/global_avg_loss": global_avg_loss,
            "loss_metrics/global_max_loss": global_max_loss,
            "grad_norm": grad_norm,
            "throughput(tokens/s)": tokens,
            "time_metrics/end_to_end(s)": seconds,
            "time_metrics/data_loading(s)": sum(self.data_loading_times) / steps,
            "memory/max_reserved(GiB)": memory,
            "context_parallel/received(bytes)": received,
            **({"context_parallel/expected(bytes)": expected} if expected else {}),
            **({"context_parallel/between_nodes(bytes)": between} if self.ranks_per_node else {}),
            **({"experts/received(bytes)": of_experts} if of_experts else {}),
            **({} if load is None else {"experts/largest_load": load}),
            **({} if rows is None else {"data_parallel/largest_work": rows}),
            **(extra_metrics or {}),
        }
        self._send(metrics, step)
        self.losses[step] = global_avg_loss
        say(
            f"step {step:>5}/{self.steps}  loss {global_avg_loss:8.5f}  grad {grad_norm:7.4f}  "
            f"{tokens:9,.0f} tokens/s  {memory:5.2f} GiB  "
            f"{self._crossed(received, of_experts, between, expected)}  "
            f"{'' if load is None else f'experts {load:.2f} of mean  '}"
            f"{'' if rows is None else f'rows {rows:.2f} of mean  '}"
            f"{self._time_left(step, seconds)} left"
        )
        if self.is_held and (said := warning(received, expected)):
            say(said)
        self._has_compiled = True
        self.count_from(step)

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        self._send({"validation_metrics/loss": loss, **(extra_metrics or {})}, step)
        say(f"step {step:>5}/{self.steps}  validation loss {loss:8.5f}")
        self.count_from(step)

    def _send(self, metrics: dict[str, Any], step: int) -> None:
        """Hand numbers to the loggers.

        Raises:
            ValueError: they are written to a disk that is full, or not there any more.
        """
        try:
            self.logger.log(metrics, step)
        except OSError as error:
            raise ValueError(
                f"A run writes its metrics into its folder, got {error.strerror} at step={step}: "
                f"make room and start again, or do without (--metrics.no-enable_tensorboard)."
            ) from error

    def close(self) -> None:
        # What was sent is in the files, or has ended the run: an error here would hide that one.
        with contextlib.suppress(OSError):
            super().close()

    def _largest_load(self) -> float | None:
        """Of the layers of all stages."""
        dims = self.parallel_dims
        own = largest_load(self.model_parts, dims.get_optional_mesh("loss"))
        return largest_of_stages(own, dims.get_optional_mesh("pp"))

    def _received(self) -> tuple[int, int, int]:
        """Bytes since the last line: for cp, for ep, and of both from other nodes."""
        traffic = traffic_since(self._traffic)
        nodes = self.ranks_per_node or dist.get_world_size()
        of_experts = sum(traffic[op].received for op in EXPERT_OPS)
        between = traffic.crossing(dist.get_rank(), nodes)[1]
        of_cp = traffic.received - of_experts - traffic[COPIES_OP].received
        return of_cp, of_experts, between

    def _crossed(self, received: float, of_experts: float, between: float, expected: float) -> str:
        """Of the step's line, what this rank received."""
        said = f"rank {rank_of_process()} received {_bytes(received)} for cp"
        said += f", {received / expected:.3f} of what is expected" if expected else ""
        # Where tokens went is the routers' choice: no forecast knows it.
        said += f", {_bytes(of_experts)} for ep" if of_experts else ""
        return said + (f", {_bytes(between)} from other nodes" if self.ranks_per_node else "")

    def count_from(self, step: int) -> None:
        """Count tokens, bytes and seconds anew, of what comes after a step."""
        self._counted_from = step
        self._traffic = LEDGER.snapshot()
        self.ntokens_since_last_log = 0
        self.expected = 0
        self.row_work.clear()
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def _time_left(self, step: int, seconds: float) -> str:
        # The first step compiles, and would make every estimate hours.
        if self._has_compiled:
            self._seconds.append(seconds)
        if not self._seconds:
            return "?"
        left = round((self.steps - step) * sum(self._seconds) / len(self._seconds))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


def largest_work(micro_batches: Sequence[Sequence[int]]) -> float | None:
    """Work of the busiest rank of each micro-batch over the mean; None on one rank."""
    total = sum(sum(work) for work in micro_batches)
    ranks = max(map(len, micro_batches), default=1)
    return sum(max(work) for work in micro_batches) * ranks / total if ranks > 1 else None


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:6.1f} {unit}"
        count /= 1024
    return f"{count:6.1f} GiB"


def describe_device() -> str:
    """The devices and the backend of the ranks."""
    backend = dist.get_backend()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return f"{dist.get_world_size()} ranks on {kind} over {backend}"


@dataclass(frozen=True)
class _StageSize:
    """What is printed about a stage, or a model without stages."""

    parameters: int
    layers: int
    strategies: tuple[str, ...]

    @classmethod
    def of(cls, part: nn.Module) -> "_StageSize":
        mixers = [m for m in part.modules() if isinstance(m, Mixer)]
        styles = dict.fromkeys(f"{m.style}" for m in mixers if m.style is not None)
        layers, stage = getattr(part, "layers", None), getattr(part, "stage", None)
        number = sum(1 for _ in layers.children()) if isinstance(layers, nn.Module) else 0
        number = number if stage is None else len(stage.layers)
        copies = () if stage is None else stage.copies
        own = sum(p.numel() for name, p in part.named_parameters() if name not in copies)
        return cls(own, number, tuple(styles))


def _stages(trainer: Any) -> list[_StageSize]:
    """Of all stages, in their order; all ranks call it."""
    own = {
        f"{part.stage.index if trainer.mesh.pp else 0:06}": _StageSize.of(part)
        for part in trainer.model_parts
    }
    return [size for _, size in sorted(of_all_stages(own, trainer.mesh.pp).items())]


def _exchange(trainer: Any) -> str:
    """How tokens travel to experts, where dtcp sends them."""
    if isinstance(trainer.config.model_spec.model, Decoder.Config):
        return ""
    library = library_for(trainer.config.dtcp.expert_exchange, trainer.device.type)
    if library:
        return f" by {library}"
    each = trainer.mesh.ep_ranks_per_node
    return " by all_to_all" + (f", {each} on each machine" if each else "")


def _left_out(source: Any) -> str:
    """Files of a data folder that a run does not read."""
    others = getattr(source, "left_out", {})
    ends = ", ".join(sorted(end or "no suffix" for end in others))
    return f"; files of other kinds are left out: {sum(others.values())} ({ends})" if others else ""


def describe_run(trainer: Any, validation: str) -> str:
    """Mesh, model, layout, strategy and data of a run, one line each.

    Args:
        validation: what is said of it behind the data that are trained on.
    """
    config, dims = trainer.config, trainer.parallel_dims
    axes = {"pp": dims.pp, "dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard}
    axes |= {"cp": dims.cp, "tp": dims.tp}
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in axes.items() if degree > 1)
    if dims.ep > 1:
        mesh += f", experts over {dims.ep} of them{_exchange(trainer)}"
    spec, training = config.model_spec, config.training
    stages = _stages(trainer)
    count = sum(each.parameters for each in stages)
    of_transformers = isinstance(spec.model, HuggingFaceConfig)
    layers = spec.model.num_layers if of_transformers else sum(each.layers for each in stages)
    steps = trainer.gradient_accumulation_steps
    rows = training.local_batch_size * dims.dp_replicate * dims.dp_shard * steps
    steps *= trainer.num_pipeline_parallel_microbatches
    strategies = dict.fromkeys(x for each in stages for x in each.strategies)
    compiled = config.compile.backend if config.compile.enable else "eager"
    lines = {
        "ranks": describe_device(),
        "mesh": f"{mesh or 'one rank'}; weights sharded over {dims.dp_shard * dims.cp} ranks",
        "model": f"{spec.name} {spec.flavor}, {layers} layers, {count:,} parameters, {compiled}",
        "layout": f"{config.dtcp.sequence_layout().__name__}, {training.seq_len // dims.cp} "
        f"of {training.seq_len} tokens per rank",
        "strategy": ", ".join(strategies) or "none, rows are whole",
        "data": f"{config.dataloader.dataset}, {rows} row{'s' * (rows > 1)} per step"
        + (f" in {steps} parts" if steps > 1 else "")
        + validation
        + _left_out(getattr(trainer.dataloader, "source", None)),
        "output": "none" if is_dry(config) else config.dump_folder,
    }
    if dims.pp_enabled:
        sizes = " + ".join(str(each.layers) for each in stages)
        lines["stages"] = (
            f"{sizes} layers, {config.parallelism.pipeline_parallel_schedule} of "
            f"{trainer.num_pipeline_parallel_microbatches} micro-batches"
        )
    if trainer.copied is not None:
        each_way = _bytes(trainer.copied.bytes_per_step).strip()
        lines["copied"] = f"{trainer.copied}; {each_way} of a rank each way in a step"
    if config.compile.enable:
        lines["compiling"] = "in the first step, for a minute or so; the others are fast"
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())
