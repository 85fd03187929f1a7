"""What must change around megatron-core 0.16.1 so that it runs on CPUs under gloo.

Only torch.cuda, four functions of Megatron's that name a device, and what two of its classes refuse without a GPU are
replaced; its mathematics, its sharding and its checkpointing stay its own. `patch()` must run before anything imports
`megatron`.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# TORCHDYNAMO_DISABLE: Megatron's `jit_fuser` is torch.compile; eager is enough and starts at once.
# CUDA_DEVICE_MAX_CONNECTIONS: asserted by Megatron's column-parallel layer when TP > 1.
# One thread a process: the processes share the cores.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONWARNINGS": "ignore",
}


class NoStream:
    """A CUDA stream or event where everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self  # an event recorded on a stream is waited for

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def patch() -> None:
    """Makes this process one that megatron-core can be imported and run in."""
    os.environ.update(ENVIRONMENT)
    patch_torch()
    from megahf.judge import grouped_gemm, mamba_ssm, transformer_engine

    transformer_engine.install()
    grouped_gemm.install()
    mamba_ssm.install()
    patch_megatron()
    patch_experts()
    patch_latent_attention()
    grouped_gemm.allow_fp32()


def nothing() -> Callable[..., None]:
    """A function that does nothing, a new one each time: torch keeps a table by function and wants no twins in it."""
    return lambda *args, **kwargs: None


def patch_torch() -> None:
    import torch

    torch.set_num_threads(1)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"  # Megatron writes `device=torch.cuda.current_device()` everywhere
    for name in ("set_device", "empty_cache", "synchronize", "set_rng_state", "manual_seed"):
        setattr(cuda, name, nothing())
    cuda.get_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    cuda.Stream = cuda.Event = NoStream  # the writer of distributed checkpoints copies on a side stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self  # tied embeddings are summed over stages with `.cuda()`
    tensor.record_stream = nothing()
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def patch_megatron() -> None:
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import utils

    # CUDA generators: dropout is off and weights are initialised on the CPU, so no state is needed.
    tracker: Any = random.CudaRNGStatesTracker
    tracker.fork = lambda self, name=None: contextlib.nullcontext()
    tracker.add = lambda self, name, seed: None
    random.initialize_rng_tracker()

    # Between an asynchronous writer and the trainer stands a manager process, which costs each rank an import of torch;
    # here saving is synchronous and both ends are in one process.
    results: Any = SimpleQueue()
    writer: Any = filesystem_async
    writer._get_write_results_queue = lambda: results

    def causal(size: int) -> torch.Tensor:  # [s, s], True where a query must not look
        return torch.triu(torch.ones(size, size), diagonal=1).bool()

    def window(queries: int, keys: int, size: tuple[int, int]) -> torch.Tensor:  # [s_q, s_k]
        lower = torch.triu(torch.ones(queries, keys, dtype=torch.bool), diagonal=keys - queries - size[0])
        return ~torch.tril(lower, diagonal=keys - queries + size[1])

    # Megatron's own two masks with device="cuda" taken out; fused_softmax holds its own references.
    for place in (fused_softmax, utils):
        holder: Any = place
        holder.get_default_causal_mask = causal
        holder.get_sliding_window_causal_mask = window


def patch_experts() -> None:
    """Sizes for all-to-all become numpy arrays, but only those that come from a GPU; gloo needs them as well."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if hasattr(value, "numpy") and as_numpy else value

    holder: Any = token_dispatcher
    holder.maybe_move_tensor_to_cpu = to_cpu


def patch_latent_attention() -> None:
    """Multi-latent attention gives its core the width of keys and of values; that of the local spec takes neither."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    make = DotProductAttention.__init__

    def init(self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **more: Any) -> None:
        make(self, *args, **more)
        if v_channels is not None:
            heads = self.config.num_attention_heads
            self.hidden_size_per_partition = v_channels * heads // self.tp_group.size()

    holder: Any = DotProductAttention
    holder.__init__ = init


def start(args: Namespace) -> None:
    """Lays the process group out as `args` say: tensor, pipeline and expert ranks; the rest is data."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,  # every group is a gloo group here
    )
    torch.manual_seed(1234)
